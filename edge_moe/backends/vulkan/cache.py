"""The tokens seen, in a device's memory: rows of latents and rope keys, or of keys and values, in bf16 or f32."""

import weakref
from typing import Any

from edge_moe.backends.vulkan.device import Device, buffer_bytes
from edge_moe.config import ModelConfig
from edge_moe.errors import DeviceError, OptionError
from edge_moe.token_cache import TokenCache, check_context_length

KINDS = {"bf16": 2, "f32": 4}  # bytes of a number


class DeviceCache(TokenCache):
    """A row of `row` numbers for each token and layer. Memory is taken when a pass first runs on it."""

    def __init__(self, config: ModelConfig, context_length: int, kind: str, row: int, window: int = 0) -> None:
        """window: tokens that a token sees; 0: all. Raises OptionError, DeviceError."""
        check_context_length(config, context_length)
        if kind not in KINDS:
            raise OptionError(f"--kv {kind}: the vulkan backend keeps one of {', '.join(KINDS)}")
        if row % 2:
            raise DeviceError(f"a cache of {row} numbers a token cannot be kept on a device; use --backend cpu")
        super().__init__(config, context_length, kind, 0)
        self.row, self.window = row, window
        self._row_bytes = KINDS[kind] * row
        self._n_layers = config.num_hidden_layers
        self._buffers: list[Any] = []

    @property
    def n_bytes(self) -> int:
        return self._n_layers * buffer_bytes(self.context_length * self._row_bytes)

    def buffer(self, device: Device, layer: int) -> Any:
        """The rows of a layer. Raises DeviceError when they do not fit."""
        if not self._buffers:
            n_bytes = self.context_length * self._row_bytes
            if buffer_bytes(n_bytes) > device.max_binding_bytes:
                raise DeviceError(
                    f"a cache of {n_bytes} bytes a layer: {device.name} takes {device.max_binding_bytes}; "
                    "a smaller context (-c) needs less"
                )
            buffers: list[Any] = []
            weakref.finalize(self, _release, device, buffers).atexit = False
            for _ in range(self._n_layers):
                buffers.append(device.create(n_bytes))
            self._buffers = buffers
        return self._buffers[layer]


def _release(device: Device, buffers: list[Any]) -> None:
    for buffer in buffers:
        device.release(buffer)
