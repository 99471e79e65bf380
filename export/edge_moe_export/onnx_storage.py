"""How a model's weights are kept in an ONNX file, and the operators that multiply with them so."""

import math
from collections.abc import Callable, Iterator

import numpy as np

from edge_moe.config import DeepseekV2Config
from edge_moe.errors import OptionError
from edge_moe.formats import Q4_0
from edge_moe.models.deepseek2 import MLP, Attention
from edge_moe.weights import Weight
from edge_moe_export.onnx_builder import Builder
from edge_moe_export.onnx_weights import Loss, decoded, fits, is_lossless, matrix, packed

FLOAT_BITS = 32
_INT8_ACTIVATIONS = 4  # the accuracy_level that rounds activations to 8 bits, as edge_moe's own kernels do


class Storage:
    """Weights in `bits`: 32 (f32, standard operators only), or 4 or 8 for the routed experts.

    Beside the experts, Q4_0 stays 4-bit and all else becomes 8-bit. Rows that are no whole blocks, the router and the
    matrices that attention absorbs stay f32.
    """

    def __init__(
        self, g: Builder, bits: int, block: int, importance: Callable[[Weight], np.ndarray | None] = lambda _: None
    ) -> None:
        """`importance` gives f32[matrices, C], how much errors in a weight's columns count, where that is known."""
        self.g, self.bits, self.block, self.importance = g, bits, block, importance
        self.is_float = bits == FLOAT_BITS
        self.loss = Loss()
        self.n_lossless = 0  # weights that were only repacked
        self.n_float: dict[str, int] = {}  # weights that were decoded, by the reason
        self._stored: dict[str, tuple[str, str]] = {}  # codes and scales by the weight's name, for those that are tied

    # ---- operators ----

    def embed(self, ids: str, weight: Weight) -> str:
        """Rows of the embedding matrix. i64[B,T] -> f32[B,T,D]."""
        if self._stays_float(weight):
            table = self.g.tensor(f"{_name(weight)}.rows", np.float32, weight.shape, decoded(weight))
            return self.g.op("Gather", table, ids)
        bits, (n_rows, n_cols) = self._bits(weight), weight.shape
        codes, scales = self._codes(weight, bits)
        table = self.g.alias(f"{_name(weight)}.rows", codes, (n_rows, n_cols * bits // 8))
        return self.g.contrib(
            "GatherBlockQuantized", ["batch", "tokens", n_cols], table, ids, scales,
            bits=bits, block_size=self.block, gather_axis=0, quantize_axis=1,
        )  # fmt: skip

    def linear(self, x: str, weight: Weight) -> str:
        """x W^T. f32[B,T,C], weight [n,C] -> f32[B,T,n]."""
        if self._stays_float(weight):
            return self.float_linear(x, weight)
        bits, (n_rows, n_cols) = self._bits(weight), weight.shape
        return self.g.contrib(
            "MatMulNBits", ["batch", "tokens", n_rows], x, *self._codes(weight, bits),
            K=n_cols, N=n_rows, bits=bits, block_size=self.block, accuracy_level=_INT8_ACTIVATIONS,
        )  # fmt: skip

    def float_linear(self, x: str, weight: Weight) -> str:
        """The same in f32."""
        transposed = self.g.tensor(f"{_name(weight)}.T", np.float32, weight.shape[::-1], [matrix(weight).T])
        return self.g.op("MatMul", x, transposed)

    def float_stack(self, weight: Weight) -> str:
        """A stack of matrices, each transposed. [E,n,C] -> f32[E,C,n]."""
        n, n_rows, n_cols = weight.shape
        parts = (matrix(weight, index).T for index in range(n))
        return self.g.tensor(f"{_name(weight)}.T", np.float32, (n, n_cols, n_rows), parts)

    def absorbed(self, w: Attention) -> tuple[str, str]:
        """What queries and contexts are multiplied with: k_b f32[H,N,R], v_b f32[H,R,V]."""
        if not self.is_float:
            for weight in (w.k_b_proj, w.v_b_proj):
                self._count_float("per-head matrices of attention", weight)
        if w.k_b_is_transposed:
            keys = self.g.tensor(_name(w.k_b_proj), np.float32, w.k_b_proj.shape, decoded(w.k_b_proj))
        else:
            keys = self.float_stack(w.k_b_proj)
        return keys, self.float_stack(w.v_b_proj)

    def experts(self, w: MLP, x: str, choice: str, scores: str, config: DeepseekV2Config) -> str:
        """The experts with the largest `choice` f32[BT,E], weighted by their `scores` f32[BT,E]. f32[B,T,D] -> same."""
        for weight in (w.gate_proj, w.down_proj):
            if not fits(weight, self.block):
                raise OptionError(
                    f"--block {self.block}: the experts have rows of {weight.shape[-1]}, which are no whole blocks; "
                    "try --block 16"
                )
        all_q4_0 = all(weight.format is Q4_0 for weight in (w.gate_proj, w.up_proj, w.down_proj))
        bits = 4 if all_q4_0 else self.bits  # one width for all matrices of a QMoE
        gate_up, gate_up_scales = self._gate_up_codes(w.gate_proj, w.up_proj, bits)
        down, down_scales = self._codes(w.down_proj, bits)
        inputs = [x, choice, gate_up, gate_up_scales, "", down, down_scales, *[""] * 7, scores]
        return self.g.contrib(
            "QMoE", ["batch", "tokens", config.hidden_size], *inputs,
            k=config.num_experts_per_tok, expert_weight_bits=bits, block_size=self.block,
            activation_type="swiglu", swiglu_fusion=1, activation_alpha=1.0, activation_beta=0.0,
            normalize_routing_weights=int(config.norm_topk_prob), accuracy_level=_INT8_ACTIVATIONS,
        )  # fmt: skip

    # ---- weights ----

    def _stays_float(self, weight: Weight) -> bool:
        if not self.is_float and not fits(weight, self.block):
            self._count_float(f"rows that are no whole blocks of {self.block}", weight)
            return True
        return self.is_float

    def _bits(self, weight: Weight) -> int:
        return 4 if weight.format is Q4_0 else 8

    def _codes(self, weight: Weight, bits: int) -> tuple[str, str]:
        """The names of a weight's codes, [n, blocks, bytes] of a matrix or [E, n, bytes] of a stack, and its scales."""
        name = _name(weight)
        if name not in self._stored:
            *rows, n_cols = weight.shape
            n_blocks = n_cols // self.block
            tail = (n_cols * bits // 8,) if len(rows) == 2 else (n_blocks, self.block * bits // 8)
            scales: list[np.ndarray] = []
            parts = packed(weight, bits, self.block, self.loss, scales, None, self.importance(weight))
            codes = self.g.tensor(f"{name}.codes", np.uint8, (*rows, *tail), parts)
            self._stored[name] = codes, self.g.tensor(f"{name}.scales", np.float32, (*rows, n_blocks), scales)
            self._count_lossless(weight, bits)
        return self._stored[name]

    def _gate_up_codes(self, gate: Weight, up: Weight, bits: int) -> tuple[str, str]:
        """The same of two stacks in one, their rows in turn: gate 0, up 0, gate 1, up 1 and so on."""
        n, width, n_cols = gate.shape
        scales: list[np.ndarray] = []

        def both() -> Iterator[np.ndarray]:
            for expert in range(n):
                codes, expert_scales = [], []
                for weight in (gate, up):
                    own_scales: list[np.ndarray] = []
                    parts = packed(weight, bits, self.block, self.loss, own_scales, expert, self.importance(weight))
                    codes.append(np.concatenate([*parts]))
                    expert_scales.append(np.concatenate(own_scales))
                scales.append(np.stack(expert_scales, axis=1))
                yield np.stack(codes, axis=1)

        name = _name(gate)
        for weight in (gate, up):
            self._count_lossless(weight, bits)
        codes = self.g.tensor(f"{name}.and_up.codes", np.uint8, (n, 2 * width, n_cols * bits // 8), both())
        shape = (n, 2 * width, n_cols // self.block)
        return codes, self.g.tensor(f"{name}.and_up.scales", np.float32, shape, scales)

    def _count_lossless(self, weight: Weight, bits: int) -> None:
        if is_lossless(weight, bits, self.block):
            self.n_lossless += math.prod(weight.shape)

    def _count_float(self, reason: str, weight: Weight) -> None:
        self.n_float[reason] = self.n_float.get(reason, 0) + math.prod(weight.shape)


def _name(weight: Weight) -> str:
    """A name of its own also for a part of a tensor."""
    return f"{weight.name}.from_row_{weight.first_byte // weight.row_bytes}" if weight.stride_bytes else weight.name
