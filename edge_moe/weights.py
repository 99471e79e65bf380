"""A weight as it lies in its file: where its matrices begin, never a copy of them."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from edge_moe.formats import BlockFormat


@dataclass(frozen=True, eq=False)
class Weight:
    """One matrix [rows, cols], or a stack of them [n, rows, cols], in the blocks of `format`.

    `data` u8[n_bytes] is a view on the file's mmap and keeps it open. A part of a stack (one half of a fused tensor)
    shares `data` and begins at `first_byte`, its matrices `stride_bytes` apart.
    """

    name: str
    format: BlockFormat
    shape: tuple[int, ...]
    data: np.ndarray
    first_byte: int = 0
    stride_bytes: int = 0
    path: Path = Path()
    data_offset: int = 0  # where in the file `data` begins

    @cached_property
    def row_bytes(self) -> int:
        return self.format.row_bytes(self.shape[-1])

    @cached_property
    def matrix_bytes(self) -> int:
        """Bytes of one matrix."""
        return self.shape[-2] * self.row_bytes

    @cached_property
    def address(self) -> int:
        """Address of the first row."""
        return int(self.data.ctypes.data) + self.first_byte

    @cached_property
    def addresses(self) -> np.ndarray:
        """Address of each matrix of a stack, i64[n]."""
        return self.address + np.arange(self.shape[0], dtype=np.int64) * (self.stride_bytes or self.matrix_bytes)

    @property
    def has_8_bits(self) -> bool:
        """Quantized as finely as activations are. Coarser weights are the larger error by far, floats are none."""
        bits = 8 * self.format.block_bytes / self.format.block_size
        return self.format.activation_group > 0 and bits >= 8

    @property
    def file_offsets(self) -> np.ndarray:
        """Where in the file each matrix of a stack begins, i64[n]."""
        return self.addresses - int(self.data.ctypes.data) + self.data_offset

    @property
    def n_bytes(self) -> int:
        """Bytes of the file that belong to this weight."""
        n_matrices = self.shape[0] if len(self.shape) == 3 else 1
        return n_matrices * self.matrix_bytes

    def split_rows(self, *sizes: int) -> tuple["Weight", ...]:
        """Cut each matrix of a stack into parts of `sizes` rows, as views."""
        parts, first = [], 0
        for n_rows in sizes:
            parts.append(
                replace(
                    self,
                    shape=(self.shape[0], n_rows, self.shape[2]),
                    first_byte=self.first_byte + first * self.row_bytes,
                    stride_bytes=self.stride_bytes or self.matrix_bytes,
                )
            )
            first += n_rows
        return tuple(parts)

    def stacked(self, n: int) -> "Weight":
        """The same rows seen as a stack of `n` matrices."""
        return replace(self, shape=(n, self.shape[0] // n, self.shape[1]))
