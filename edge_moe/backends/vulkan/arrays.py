"""Numbers in a device's memory as a model pass sees them: to be cut and reshaped, never read."""

import weakref
from typing import Any

import numpy as np

from edge_moe.errors import ShapeError

_ALIGNMENT = 64  # numbers


class DeviceArray:
    """A place for numbers; cut and reshaped as numpy does it, by a numpy array that nobody reads or writes."""

    def __init__(self, block: "Block", shadow: np.ndarray) -> None:
        self.block = block
        self._shadow = shadow

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shadow.shape

    @property
    def size(self) -> int:
        return self._shadow.size

    @property
    def at(self) -> int:
        """Where the first number lies, in numbers."""
        return self.block.at + (_address(self._shadow) - _address(self.block.shadow)) // 4

    @property
    def strides(self) -> tuple[int, ...]:
        """From one to the next along each axis, in numbers."""
        return tuple(stride // 4 for stride in self._shadow.strides)

    @property
    def is_contiguous(self) -> bool:
        return self._shadow.flags.c_contiguous

    def __len__(self) -> int:
        return len(self._shadow)

    def __getitem__(self, key: Any) -> "DeviceArray":
        return DeviceArray(self.block, self._shadow[key])

    def reshape(self, *shape: int) -> "DeviceArray":
        """As numpy's. Raises ShapeError where the numbers would have to be moved."""
        shadow = self._shadow.reshape(*shape)
        if shadow.size and not np.may_share_memory(shadow, self._shadow):
            raise ShapeError(f"a part of {self.shape} cannot be seen as {shape} on a device")
        return DeviceArray(self.block, shadow)


class Block:
    """Memory that one result takes, until nobody names it any more."""

    def __init__(self, at: int, shape: tuple[int, ...]) -> None:
        self.at = at
        self.shadow = np.empty(shape, np.float32)  # the system gives no pages before they are written


class Allocator:
    """Places in a buffer, given again when their arrays are gone.

    Steps run in the order in which they are recorded, so what a later one writes may lie where an earlier one read.
    """

    def __init__(self, first: int = 0) -> None:
        self.end = first  # the numbers that all of it takes
        self._free: list[tuple[int, int]] = []  # where and how many, in order

    def take(self, *shape: int) -> DeviceArray:
        """A new array; its numbers are whatever was there."""
        size = -(-int(np.prod(shape, dtype=np.int64)) // _ALIGNMENT) * _ALIGNMENT
        for i, (at, n) in enumerate(self._free):
            if n >= size:
                self._free[i : i + 1] = [(at + size, n - size)] if n > size else []
                break
        else:
            at = self.end
            if self._free and sum(self._free[-1]) == self.end:  # the last piece is free: only what it lacks is new
                at = self._free.pop()[0]
            self.end = at + size
        block = Block(at, shape)
        weakref.finalize(block, self._give_back, at, size).atexit = False
        return DeviceArray(block, block.shadow)

    def _give_back(self, at: int, size: int) -> None:
        pieces = sorted([*self._free, (at, size)])
        merged = [pieces[0]]
        for first, n in pieces[1:]:
            if sum(merged[-1]) == first:
                merged[-1] = (merged[-1][0], merged[-1][1] + n)
            else:
                merged.append((first, n))
        self._free = merged


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])
