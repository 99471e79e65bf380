"""Weights as MLX has them, each made once from its blocks when a pass first names it."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_moe.backends.mlx.forms import GROUP, affine, is_float, is_lossless
from edge_moe.weights import Weight


@dataclass(frozen=True, eq=False)
class MlxMatrix:
    """A matrix or a stack of them: packed codes with scales and biases, or floats as they were."""

    w: Any
    scales: Any = None
    biases: Any = None
    bits: int = 0


class MlxWeights:
    """The weights that a pass has named."""

    def __init__(self, mx: Any) -> None:
        self._mx = mx
        self._matrices: dict[tuple[int, int, tuple[int, ...]], tuple[MlxMatrix, Weight]] = {}
        self._vectors: dict[int, tuple[Any, np.ndarray]] = {}
        self.inexact: set[str] = set()  # formats that became others

    def matrix(self, weight: Weight) -> MlxMatrix:
        """The weight's own form; a copy, since MLX has no place for blocks."""
        key = weight.address, weight.stride_bytes, weight.shape
        if key not in self._matrices:
            if not is_lossless(weight.format):
                self.inexact.add(weight.format.name)
            self._matrices[key] = self._made(weight), weight  # which keeps the address taken
        return self._matrices[key][0]

    def vector(self, values: np.ndarray) -> Any:
        """A gain or bias f32[n]."""
        key = values.ctypes.data
        if key not in self._vectors:
            self._vectors[key] = self._mx.array(np.asarray(values, np.float32)), values
        return self._vectors[key][0]

    def rows(self, weight: Weight, ids: Any) -> Any:
        """Rows of a matrix as numbers, f32[T,cols]."""
        mx, m = self._mx, self.matrix(weight)
        if not m.bits:
            return m.w[ids].astype(mx.float32)
        return mx.dequantize(m.w[ids], m.scales[ids], m.biases[ids], group_size=GROUP, bits=m.bits)

    def product(self, x: Any, weight: Weight, *, transpose: bool = True) -> Any:
        """x times the transposed matrix, or times itself; a stack meets a stack of inputs."""
        mx, m = self._mx, self.matrix(weight)
        if not m.bits:
            w = m.w.astype(mx.float32)
            return x @ (w.swapaxes(-1, -2) if transpose else w)
        return mx.quantized_matmul(x, m.w, m.scales, m.biases, transpose=transpose, group_size=GROUP, bits=m.bits)

    def gathered(self, x: Any, weight: Weight, ids: Any) -> Any:
        """x [T,k,1,C] (k 1 or K) times the transposed matrices of a stack that ids [T,K] choose -> [T,K,1,n_rows]."""
        mx, m = self._mx, self.matrix(weight)
        if not m.bits:
            return mx.gather_mm(x, m.w.astype(mx.float32).swapaxes(-1, -2), rhs_indices=ids)
        return mx.gather_qmm(x, m.w, m.scales, m.biases, rhs_indices=ids, transpose=True, group_size=GROUP, bits=m.bits)

    def _made(self, weight: Weight) -> MlxMatrix:
        mx, fmt = self._mx, weight.format
        if len(weight.shape) == 2:
            data = weight.data[weight.first_byte : weight.first_byte + weight.matrix_bytes]
            data = data.reshape(weight.shape[0], -1)
        else:
            matrices = weight.data.reshape(weight.shape[0], -1)[:, weight.first_byte :][:, : weight.matrix_bytes]
            data = matrices.reshape(*weight.shape[:2], -1)
        if is_float(fmt):
            floats = np.ascontiguousarray(data)
            if fmt.name == "BF16":
                return MlxMatrix(mx.array(floats.view(np.uint16)).view(mx.bfloat16))
            return MlxMatrix(mx.array(floats.view(np.float16 if fmt.name == "F16" else np.float32)))
        parts = [affine(fmt, matrix) for matrix in (data if data.ndim == 3 else data[None])]  # bounds the scratch
        made = [
            mx.stack([mx.array(each) for each in arrays]) if data.ndim == 3 else mx.array(arrays[0])
            for arrays in (
                [part.packed() for part in parts],
                [part.scales for part in parts],
                [part.biases for part in parts],
            )
        ]
        mx.eval(made)
        return MlxMatrix(made[0], made[1], made[2], parts[0].bits)
