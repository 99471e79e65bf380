"""A device for tests of the vulkan backend, and single operations run on it."""

import numpy as np
import pytest

from edge_moe.backends.vulkan.cache import DeviceCache
from edge_moe.backends.vulkan.device import Device, find_adapter
from edge_moe.backends.vulkan.experts import ExpertSlots
from edge_moe.backends.vulkan.program import DeviceProgram
from edge_moe.backends.vulkan.recorder import record
from edge_moe.backends.vulkan.weights import DeviceWeights
from edge_moe.config import LlamaConfig
from edge_moe.errors import DeviceError
from edge_moe.weights import Weight


def adapter_or_skip():
    """The best device; without one the test is skipped, and says why."""
    try:
        return find_adapter()
    except DeviceError as error:
        pytest.skip(str(error))


def config(n_layers=1, context_length=4096):
    """All that a cache reads of a model."""
    sizes = dict.fromkeys(LlamaConfig.__dataclass_fields__, 1)
    return LlamaConfig(**sizes | {"num_hidden_layers": n_layers, "max_position_embeddings": context_length})


def weight_of(fmt, data, *shape):
    """A weight whose blocks u8[..., row_bytes] are in memory, not at its very beginning."""
    held = np.zeros(data.size + 6, np.uint8)
    held[6:] = data.ravel()
    return Weight("test", fmt, shape, held[6:])


class Bench:
    """Runs a few operations at a time on a device of its own."""

    def __init__(self, adapter, max_binding_bytes=None):
        self.device = Device(adapter, max_binding_bytes=max_binding_bytes)
        self.weights = DeviceWeights(self.device)

    def run(self, operations, *arrays, n_tokens=1, position=0, cache=None, stacks=(), n_slots=0, ids=None):
        """`operations(ops, token_ids, cache, *places)` of arrays f32 -> its result, a new f32 array."""

        def compute(ops, token_ids, cache, all_logits):
            places = []
            for array in arrays:
                place = ops.arena.take(*array.shape)
                ops.recording.inputs.append((place, lambda position, array=array: np.float32(array)))
                places.append(place)
            return operations(ops, token_ids, cache, *places)

        if cache is None:
            cache = DeviceCache(config(), 64, "f32", 2)
        tables = sum(each[0].shape[0] for each in stacks)
        dry = record(compute, (n_tokens,), True, cache, self.weights, tables, None)
        arena, state = self.device.create(4 * dry.arena_numbers), self.device.create(4 * dry.state_numbers)
        slots = ExpertSlots(self.device, state, stacks, n_slots) if stacks else None
        recording = record(compute, (n_tokens,), True, cache, self.weights, tables, slots)
        self.weights.upload()
        length = self.device.create_uniform(16)
        program = DeviceProgram(self.device, recording, cache, arena, state, length, slots)
        return program.run(np.arange(n_tokens) if ids is None else np.asarray(ids), position)
