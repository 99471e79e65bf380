"""Which backends there are, what is missing for each, and which one a user's word means."""

from collections.abc import Callable
from dataclasses import dataclass

from edge_moe.backends.mlx.backend import import_mlx
from edge_moe.backends.vulkan.device import find_adapter
from edge_moe.config import BACKENDS
from edge_moe.errors import DeviceError, OptionError


@dataclass(frozen=True)
class Availability:
    """A backend on this machine; `detail` says which device, or what is missing."""

    name: str
    detail: str
    is_there: bool = True
    is_slower: bool = False  # it would run on the CPU all the same


def _vulkan() -> Availability:
    try:
        adapter = find_adapter()
    except DeviceError as error:
        return Availability("vulkan", str(error), is_there=False)
    if adapter.is_software:
        return Availability(
            "vulkan", f"{adapter.name} runs on the CPU, more slowly than our own kernels", is_slower=True
        )
    return Availability("vulkan", adapter.name)


def _mlx() -> Availability:
    try:
        mx = import_mlx()
    except DeviceError as error:
        return Availability("mlx", str(error), is_there=False)
    if mx.default_device() == mx.Device(mx.cpu):
        return Availability("mlx", "mlx has no GPU here and computes on the CPU", is_slower=True)
    return Availability("mlx", str(mx.default_device()))


_DEVICES: tuple[Callable[[], Availability], ...] = (_mlx, _vulkan)  # the better ones first


def backends() -> list[Availability]:
    """All backends; a package is imported to ask it for its devices."""
    return [Availability("cpu", "always there"), *(each() for each in _DEVICES)]


def choose_backend(word: str) -> tuple[str, str]:
    """The backend that --backend's word means, and why. Raises OptionError for a word that there is not."""
    if word not in BACKENDS:
        raise OptionError(f"--backend {word}: expected one of {', '.join(BACKENDS)}")
    if word != "auto":
        return word, "asked for"
    found = [each() for each in _DEVICES]
    for each in found:
        if each.is_there and not each.is_slower:
            return each.name, each.detail
    return "cpu", "; ".join(f"{each.name}: {each.detail}" for each in found)
