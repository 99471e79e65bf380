"""A recording bound to buffers: run for any tokens of its number, in one submission or one more for each fetch."""

from typing import Any

import numpy as np

from edge_moe.backends.vulkan.arrays import DeviceArray
from edge_moe.backends.vulkan.cache import DeviceCache
from edge_moe.backends.vulkan.device import PARAMS_BYTES, Device
from edge_moe.backends.vulkan.experts import ExpertSlots
from edge_moe.backends.vulkan.recorder import Fetch, Recording, Step, packed

Bound = tuple[Any, Any, int, tuple[int, int, int]]  # pipeline, bind group, offset of the parameters, workgroups


class DeviceProgram:
    """`run(source, position)` gives the logits of tokens behind those in the cache."""

    def __init__(
        self,
        device: Device,
        recording: Recording,
        cache: DeviceCache,
        arena: Any,
        state: Any,
        length: Any,
        slots: ExpertSlots | None,
    ) -> None:
        """arena, state and length are buffers that programs share. Raises DeviceError."""
        assert recording.source is not None and recording.logits is not None
        self._device, self._slots = device, slots
        self._arena, self._state, self._length = arena, state, length
        self._source: DeviceArray = recording.source
        self._logits: DeviceArray = recording.logits
        self._inputs = recording.inputs
        steps = [step for step in recording.steps if isinstance(step, Step)]
        self.params = device.create_uniform(PARAMS_BYTES * len(steps))
        words = np.zeros((len(steps), PARAMS_BYTES // 4), np.uint32)
        for row, each in zip(words, steps, strict=True):
            row[: len(each.params)] = packed(each.params)
        device.write(self.params, 0, words)
        groups: dict[tuple[int, int], Any] = {}
        self._parts: list[tuple[list[Bound], Fetch | None]] = []
        bound: list[Bound] = []
        offset = 0
        for step in recording.steps:
            if isinstance(step, Fetch):
                self._parts.append((bound, step))
                bound = []
                continue
            weights = step.weights.buffer if step.weights is not None else None
            rows = cache.buffer(device, step.layer) if step.layer is not None else None
            key = id(weights), id(rows)
            if key not in groups:
                groups[key] = device.bind_group(self.params, arena, state, weights, rows, length)
            bound.append((device.pipeline(*step.pipeline), groups[key], offset, step.groups))
            offset += PARAMS_BYTES
        self._parts.append((bound, None))

    def run(self, source: np.ndarray, position: int) -> np.ndarray:
        """Ids or hidden states from `position` on, the cache holding all before -> f32[T,vocab] or f32[1,vocab]."""
        device = self._device
        if source.ndim == 1:
            device.write(self._state, 4 * self._source.at, source.astype(np.uint32))
        else:
            device.write(self._arena, 4 * self._source.at, source.astype(np.float32))
        device.write(self._length, 0, np.array([position, 0, 0, 0], np.uint32))
        for place, values in self._inputs:
            device.write(self._arena, 4 * place.at, values(position))
        for steps, fetch in self._parts:
            if fetch is not None:
                assert self._slots is not None
                ids = device.run(steps, self._state, 4 * fetch.at, 4 * fetch.n_ids).view(np.uint32)
                self._slots.fetch(fetch.layer, ids)
            else:
                logits = device.run(steps, self._arena, 4 * self._logits.at, 4 * self._logits.size)
        return logits.view(np.float32).reshape(self._logits.shape)
