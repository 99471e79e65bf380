"""Builds an ONNX model node by node, its large tensors streamed to a file of their own as they are named."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, BinaryIO

import numpy as np
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper

from edge_moe.errors import ShapeError

OPSET, IR_VERSION = 23, 11  # the first with RMSNormalization and RotaryEmbedding
CONTRIB = "com.microsoft"
_ALIGNMENT = 4096  # so that tensors can be mapped from the file
_INLINE_BYTES = 1024

Shape = Sequence[int | str]  # a text names a size that is known when the model runs


class TensorFile:
    """The file of the large tensors; each is written once, its parts one after the other."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.name = name
        self._file = file
        self.n_bytes = 0

    def append(self, parts: Iterable[np.ndarray]) -> tuple[int, int]:
        """Write the bytes of arrays; returns where they begin, and how many they are."""
        padding = -self.n_bytes % _ALIGNMENT
        self._file.write(bytes(padding))
        start = self.n_bytes = self.n_bytes + padding
        for part in parts:
            self._file.write(np.ascontiguousarray(part).data)
            self.n_bytes += part.nbytes
        return start, self.n_bytes - start


class Builder:
    """A graph in the making. Tensors are known by their names; `op` and its kin return the names of results."""

    def __init__(self, file: TensorFile) -> None:
        self.file = file
        self._graph = GraphProto(name="decoder")
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._scope = ""
        self._n_results = 0

    def scope(self, name: str) -> None:
        """Put `name` before the names of the results to come, for those who read the graph."""
        self._scope = name

    # ---- nodes ----

    def op(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        """Add a node of the ONNX standard with one result; an input "" is left out."""
        return self.ops(op_type, 1, *inputs, **attributes)[0]

    def ops(self, op_type: str, n_results: int, *inputs: str, **attributes: Any) -> list[str]:
        """The same with several results."""
        return self._add(op_type, "", n_results, inputs, attributes)

    def contrib(self, op_type: str, shape: Shape, *inputs: str, **attributes: Any) -> str:
        """Add a node of ONNX Runtime's own domain with one f32 result, whose shape the standard cannot tell."""
        result = self._add(op_type, CONTRIB, 1, inputs, attributes)[0]
        self._graph.value_info.append(helper.make_tensor_value_info(result, TensorProto.FLOAT, shape))
        return result

    def _add(
        self, op_type: str, domain: str, n_results: int, inputs: Sequence[str], attributes: dict[str, Any]
    ) -> list[str]:
        results = [self._new_name(op_type) for _ in range(n_results)]
        self._graph.node.append(
            helper.make_node(op_type, inputs, results, name=results[0], domain=domain or None, **attributes)
        )
        return results

    def _new_name(self, kind: str) -> str:
        self._n_results += 1
        return f"{self._scope}/{kind}_{self._n_results}"

    # ---- inputs and outputs ----

    def input(self, name: str, data_type: int, shape: Shape) -> str:
        """An input of the model."""
        self._graph.input.append(helper.make_tensor_value_info(name, data_type, shape))
        return name

    def optional_input(self, name: str, default: np.ndarray) -> str:
        """An input that may be left out; it then has its default."""
        data_type = helper.np_dtype_to_tensor_dtype(default.dtype)
        self._graph.initializer.append(numpy_helper.from_array(default, name))
        return self.input(name, data_type, default.shape)

    def output(self, name: str, data_type: int, shape: Shape, op_type: str, *inputs: str, **attributes: Any) -> str:
        """Add a node whose result is an output of the model, under that name."""
        self._graph.node.append(helper.make_node(op_type, inputs, [name], name=f"{name}/{op_type}", **attributes))
        self._graph.output.append(helper.make_tensor_value_info(name, data_type, shape))
        return name

    # ---- constants ----

    def ints(self, *values: int) -> str:
        """A constant i64[n]."""
        return self.constant(np.array(values, np.int64))

    def scalar(self, value: float) -> str:
        """A constant f32 without a shape."""
        return self.constant(np.array(value, np.float32))

    def constant(self, values: np.ndarray) -> str:
        """A small constant; equal ones are kept once."""
        key = (values.dtype.str, values.shape, values.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[key] = name
            self._graph.initializer.append(numpy_helper.from_array(values, name))
        return self._constants[key]

    def tensor(self, name: str, dtype: type, shape: tuple[int, ...], parts: Iterable[np.ndarray]) -> str:
        """A constant whose arrays go to the file in order; small ones are kept in the model itself.

        Raises ShapeError when the parts do not make up the shape.
        """
        n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        data_type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        if n_bytes <= _INLINE_BYTES:
            values = np.concatenate([np.ravel(part) for part in parts])
            if values.dtype != dtype or values.nbytes != n_bytes:
                raise ShapeError(f"tensor {name}: {values.nbytes} bytes of {values.dtype}, expected {n_bytes}")
            self._graph.initializer.append(numpy_helper.from_array(values.reshape(shape), name))
            return name
        start, length = self.file.append(parts)
        if length != n_bytes:
            raise ShapeError(f"tensor {name}: its parts make {length} bytes, expected {n_bytes}")
        entry = TensorProto(name=name, data_type=data_type, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", self.file.name), ("offset", str(start)), ("length", str(length))):
            entry.external_data.add(key=key, value=value)
        self._graph.initializer.append(entry)
        return name

    def alias(self, name: str, tensor: str, shape: tuple[int, ...]) -> str:
        """The bytes of a tensor once more, under another name and shape."""
        entry = TensorProto()
        entry.CopyFrom(next(each for each in self._graph.initializer if each.name == tensor))
        entry.name = name
        entry.dims[:] = shape
        self._graph.initializer.append(entry)
        return name

    def model(self, producer_version: str) -> ModelProto:
        """The whole model; tensors that only lent their bytes to an alias are not part of it."""
        used = {name for node in self._graph.node for name in node.input}
        kept = [tensor for tensor in self._graph.initializer if tensor.name in used]
        del self._graph.initializer[:]
        self._graph.initializer.extend(kept)
        return helper.make_model(
            self._graph,
            producer_name="edge-moe",
            producer_version=producer_version,
            ir_version=IR_VERSION,
            opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)],
        )
