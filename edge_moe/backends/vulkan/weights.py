"""Weights in a device's memory, each sent there once and as it lies in the file."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_moe.backends.vulkan.device import Device, buffer_bytes
from edge_moe.errors import DeviceError
from edge_moe.weights import Weight


@dataclass(eq=False)
class WeightPart:
    """Rows of a weight in one buffer: as many as a shader can see at once."""

    data: np.ndarray  # u8, in the file
    first_row: int
    n_rows: int
    owner: np.ndarray  # whose address stands for the weight while this lives
    buffer: Any = None  # None: not sent yet


class DeviceWeights:
    """The weights that a pass has named, and the buffers of those that were sent."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._parts: dict[tuple[int, int], list[WeightPart]] = {}

    def parts(self, weight: Weight) -> list[WeightPart]:
        """A matrix in parts of whole rows; a stack of matrices is always one part. Raises DeviceError."""
        key = weight.data.ctypes.data, weight.data.size
        if key not in self._parts:
            most = self._device.max_binding_bytes
            if buffer_bytes(weight.data.size) <= most:
                parts = [WeightPart(weight.data, 0, weight.shape[-2], weight.data)]
            elif len(weight.shape) == 2:
                step, n_rows = (most - 256) // weight.row_bytes, weight.shape[0]
                parts = [
                    WeightPart(
                        weight.data[first * weight.row_bytes : min(first + step, n_rows) * weight.row_bytes],
                        first,
                        min(step, n_rows - first),
                        weight.data,
                    )
                    for first in range(0, n_rows, step)
                ]
            else:
                raise DeviceError(
                    f"{self._device.name}: tensor {weight.name} has {weight.data.size} bytes, "
                    f"shaders see at most {most} there; use --backend cpu"
                )
            self._parts[key] = parts
        return self._parts[key]

    def vector(self, values: np.ndarray) -> WeightPart:
        """A gain or bias f32[n]."""
        key = values.ctypes.data, values.nbytes
        if key not in self._parts:
            data = np.ascontiguousarray(values, np.float32).view(np.uint8)
            self._parts[key] = [WeightPart(data, 0, 1, values)]
        return self._parts[key][0]

    @property
    def n_bytes(self) -> int:
        """Device memory that all named weights take."""
        return sum(buffer_bytes(part.data.size) for part in self._all())

    def upload(self) -> None:
        """Send those that were named and not sent yet. Raises DeviceError."""
        for part in self._all():
            if part.buffer is None:
                part.buffer = self._device.create(part.data.size)
                self._device.write(part.buffer, 0, part.data)

    def _all(self) -> list[WeightPart]:
        return [part for parts in self._parts.values() for part in parts]
