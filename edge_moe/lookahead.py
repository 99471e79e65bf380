"""Whether experts are predicted: measured while the model runs, since a wrong guess costs the disk a read."""

import statistics

TRIAL_TOKENS = 6  # of each of the four windows of a trial: on, off, on, off
SETTLED_TOKENS = 512  # until the next trial


class Lookahead:
    """Switches prediction on and off by tokens' times: tried both ways in turn, then the quicker for a while."""

    def __init__(self, allowed: bool = True) -> None:
        self.allowed = allowed
        self._times: tuple[list[float], list[float]] = ([], [])  # without, with
        self._n = 0
        self._settled: bool | None = None

    @property
    def is_on(self) -> bool:
        """Whether to predict now."""
        if not self.allowed:
            return False
        if self._settled is not None:
            return self._settled
        return self._n // TRIAL_TOKENS % 2 == 0

    def count(self, seconds: float) -> None:
        """A token has taken so long."""
        if not self.allowed:
            return
        if self._settled is None and self._n % TRIAL_TOKENS:  # a window's first token still has the other way's reads
            self._times[self.is_on].append(seconds)
        self._n += 1
        if self._settled is None and self._n == 4 * TRIAL_TOKENS:
            without, with_it = (statistics.median(times) for times in self._times)
            self._settled, self._n = with_it <= without, 0
        elif self._settled is not None and self._n == SETTLED_TOKENS:
            self._settled, self._n, self._times = None, 0, ([], [])
