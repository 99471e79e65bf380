"""Experts in slots of a device's memory: all of them, or those used last, and the table that says where each is."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_moe.backends.vulkan.device import Device, buffer_bytes
from edge_moe.weights import Weight

NOWHERE = 0xFFFFFFFF
Stacks = tuple[Weight, Weight, Weight]  # gate, up, down


@dataclass(frozen=True, eq=False)
class SlotPart:
    """Slots of one stack in one buffer: as many as a shader can see at once."""

    buffer: Any
    first_slot: int
    n_slots: int
    stride_bytes: int


def slot_stride(stack: Weight) -> int:
    """Bytes from one slot of a stack to the next."""
    return (stack.matrix_bytes + 3) & ~3


def layer_bytes(stacks: Stacks, n_slots: int, max_binding_bytes: int) -> int:
    """Device memory of a layer with so many slots."""
    return sum(
        buffer_bytes(n * slot_stride(stack)) for stack in stacks for n in _buffers(stack, n_slots, max_binding_bytes)
    )


def _buffers(stack: Weight, n_slots: int, max_binding_bytes: int) -> list[int]:
    """The slots of each buffer."""
    most = max(1, (max_binding_bytes - 256) // slot_stride(stack))
    return [min(most, n_slots - first) for first in range(0, n_slots, most)]


class ExpertSlots:
    """`n_slots` experts of each layer on the device; who was used longest ago makes room."""

    def __init__(self, device: Device, state: Any, layers: Sequence[Stacks], n_slots: int) -> None:
        """The tables lie at the beginning of the buffer `state`. Raises DeviceError."""
        self._device, self._state, self._layers = device, state, list(layers)
        self.n_slots = n_slots
        self.n_experts = layers[0][0].shape[0]
        self._index = {stacks[-1].name: index for index, stacks in enumerate(layers)}
        self.hits = self.misses = 0
        self.parts: list[tuple[list[SlotPart], ...]] = []  # by layer and stack
        for stacks in layers:
            self.parts.append(tuple(self._slots_of(stack) for stack in stacks))
        self._resident: list[OrderedDict[int, int]] = [OrderedDict() for _ in layers]  # the latest used last
        self._table_is_sent = [False] * len(self._layers)
        if self.holds_all:
            for layer in range(len(layers)):
                self.fetch(layer, np.arange(self.n_experts))
            self.hits = self.misses = 0

    @property
    def holds_all(self) -> bool:
        """Whether no expert ever has to be sent."""
        return self.n_slots == self.n_experts

    def layer_of(self, down: Weight) -> int:
        """The layer whose last stack is `down`."""
        return self._index[down.name]

    def table_at(self, layer: int) -> int:
        """Where in the state a layer's table u32[E] begins: each expert's slot."""
        return layer * self.n_experts

    def fetch(self, layer: int, ids: np.ndarray) -> None:
        """Bring experts to the device that are not there; at most n_slots different ones at once."""
        resident = self._resident[layer]
        experts = np.unique(ids).tolist()
        for expert in experts:
            if expert in resident:
                resident.move_to_end(expert)
        missing = [expert for expert in experts if expert not in resident]
        self.hits += len(experts) - len(missing)
        self.misses += len(missing)
        taken: set[int] = set()
        if missing:
            self._table_is_sent[layer] = False
            taken = set(resident.values())
        empty = iter([slot for slot in range(self.n_slots) if slot not in taken])
        for expert in missing:
            # a Ctrl-C may come anywhere: an expert is in the books only while its weights are on the device
            slot = next(empty, None)
            if slot is None:
                _, slot = resident.popitem(last=False)
            for stack, parts in zip(self._layers[layer], self.parts[layer], strict=True):
                part = next(each for each in parts if slot < each.first_slot + each.n_slots)
                begin = int(stack.addresses[expert]) - int(stack.data.ctypes.data)
                data = stack.data[begin : begin + stack.matrix_bytes]
                self._device.write(part.buffer, (slot - part.first_slot) * part.stride_bytes, data)
            resident[expert] = slot
        self._send_table(layer)

    def move_tables(self, state: Any) -> None:
        """From now on the tables lie in another buffer."""
        self._state = state
        for layer in range(len(self._layers)):
            self._table_is_sent[layer] = False
            self._send_table(layer)

    def _send_table(self, layer: int) -> None:
        if not self._table_is_sent[layer]:
            table = np.full(self.n_experts, NOWHERE, np.uint32)
            for expert, slot in self._resident[layer].items():
                table[expert] = slot
            self._device.write(self._state, 4 * self.table_at(layer), table)
            self._table_is_sent[layer] = True

    def _slots_of(self, stack: Weight) -> list[SlotPart]:
        parts, first = [], 0
        for n in _buffers(stack, self.n_slots, self._device.max_binding_bytes):
            parts.append(SlotPart(self._device.create(n * slot_stride(stack)), first, n, slot_stride(stack)))
            first += n
        return parts
