"""The tokens seen, as MLX arrays: rows of latents and rope keys, or of keys and values, in bf16 or f32."""

from typing import Any

from edge_moe.config import ModelConfig
from edge_moe.errors import OptionError
from edge_moe.token_cache import TokenCache, check_context_length

KINDS = {"bf16": 2, "f32": 4}  # bytes of a number
_STEP = 256  # tokens that room is made for at a time


class MlxCache(TokenCache):
    """A row of `row` numbers for each token and layer; room is made as the context grows."""

    def __init__(self, mx: Any, config: ModelConfig, context_length: int, kind: str, row: int, window: int = 0) -> None:
        """window: tokens that a token sees; 0: all. Raises OptionError."""
        check_context_length(config, context_length)
        if kind not in KINDS:
            raise OptionError(f"--kv {kind}: the mlx backend keeps one of {', '.join(KINDS)}")
        super().__init__(config, context_length, kind, 0)
        self._mx = mx
        self.window = window
        self._row = row
        self._n_layers = config.num_hidden_layers
        self._dtype = mx.bfloat16 if kind == "bf16" else mx.float32
        self.rows: list[Any] = [mx.zeros((0, row), self._dtype) for _ in range(self._n_layers)]

    @property
    def n_bytes(self) -> int:
        return self._n_layers * self.context_length * self._row * KINDS[self.kind]

    def store(self, layer: int, position: int, new: Any) -> Any:
        """Keep rows [T,row] from `position` on -> all rows up to their end, in the cache's own type."""
        mx, rows, end = self._mx, self.rows[layer], position + len(new)
        if len(rows) < end:
            room = min(-(-end // _STEP) * _STEP, self.context_length) - len(rows)
            rows = mx.concatenate([rows, mx.zeros((room, self._row), self._dtype)])
        rows[position:end] = new.astype(self._dtype)
        self.rows[layer] = rows
        return rows[:end]
