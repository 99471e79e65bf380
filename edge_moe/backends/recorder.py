"""One token's pass as a list of steps: recorded once by running the model pass on buffers, replayed for each token.

A recorded pass costs no Python between its kernels. It is right for any token because all that differs from token to
token is read from memory when the steps run: the token id, the rotations, the number of tokens in the cache, the
addresses of the chosen experts, and where the logits go.
"""

import math
import weakref
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from edge_moe.backends.protocol import Compute
from edge_moe.backends.rotations import rotations_at
from edge_moe.backends.streaming import stream_experts
from edge_moe.expert_store import ExpertStore
from edge_moe.kernels import product_units as units
from edge_moe.kernels import steps
from edge_moe.kernels.activations import QUANTIZE_ROWS, quantize_units, record_bytes
from edge_moe.kernels.attention import Step
from edge_moe.kernels.blocks import TAGS, FormatTag
from edge_moe.kernels.launch import NUMBERS, SHARE_BYTES, compiled_address, float_bits
from edge_moe.kernels.program import STEP_FIELDS, run_program, sleep_function
from edge_moe.kernels.steps import VALUE_OPERATIONS
from edge_moe.kv_cache import KvCache
from edge_moe.latent_cache import LatentCache
from edge_moe.token_cache import TokenCache
from edge_moe.weights import Weight

SHARED_OPERATIONS = 30_000  # from so many on a step is shared between threads: some 3 microseconds
ROTATIONS_AT_ONCE = 256  # positions: for a single one numpy takes as long as for many


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


class Program:
    """A recorded pass: `run(token_id, position)` gives the logits f32[1,vocab] of one token."""

    def __init__(self, compute: Compute, cache: TokenCache, threads: int, store: ExpertStore | None = None) -> None:
        recorder = Recorder(threads, store)
        self._threads = threads
        self._token_ids = np.zeros(1, np.int64)
        logits = compute(recorder, self._token_ids, cache, False)
        (field,) = np.flatnonzero(recorder.last == _address(logits))
        self._shape, self._out_field = logits.shape, _address(recorder.last[field:])
        self._rotate = recorder.rotate
        self._keep = recorder.keep  # buffers and plans that the steps know by address
        self._parts: list[np.ndarray | list[Any]] = [
            list(part) if are_calls else np.array(list(part), np.int64).reshape(-1, STEP_FIELDS)
            for are_calls, part in groupby(recorder.steps, callable)
        ]

    def run(self, token_id: int, position: int) -> np.ndarray:
        """The token at `position`, the cache holding all before it -> a new f32[1,vocab]."""
        logits = np.empty(self._shape, np.float32)  # where the last step writes them
        self._token_ids[0] = token_id
        for rotate in self._rotate:
            rotate(position)
        is_done = False
        for part in self._parts:
            if isinstance(part, np.ndarray):
                if not is_done:
                    run_program(part, sleep_function(), self._threads, logits, self._out_field)
            else:
                for call in part:
                    is_done = bool(call())
        return logits


class Inputs(NamedTuple):
    """Addresses i64[M] of the rows that a product takes, and the array they are in, to be held until it has them."""

    addresses: np.ndarray
    memory: np.ndarray


class Matrix(NamedTuple):
    """A matrix of a product: n_rows at an address, times records from `record` on, into f32[n,n_rows].

    With a stride it is one of a stack: the one whose number is found at the address `choice` when the steps run.
    """

    address: int
    n_rows: int
    record: int
    out: np.ndarray
    stride_bytes: int = 0
    choice: int = 0


class Recorder:
    """The operations of a model pass for one token; each gives the buffer that will hold its result."""

    def __init__(self, threads: int, store: ExpertStore | None = None) -> None:
        """With a store, what it does for a token are calls of Python between the steps.

        One that returns True has done what the steps up to the next call would do.
        """
        self.steps: list[tuple[int, ...] | Callable[[], object]] = []
        self._threads, self._store = threads, store
        self.keep: list[object] = []
        self.last = np.zeros(0, np.int64)  # the plan of the last step
        self._free: dict[int, list[np.ndarray]] = {}  # memory by its size
        self.rotate: list[Callable[[int], None]] = []
        self._scratch: np.ndarray | None = None  # of attention: one for all layers
        self._quantized: tuple[np.ndarray, dict[tuple[int, bool], Inputs]] | None = None  # the last input

    def rotations(self, cache: TokenCache, n_tokens: int, inv_freq: np.ndarray, factor: float):
        """cos and sin f32[1,P/2] of the token's position, renewed before each run."""
        cos, sin = self._empty(1, len(inv_freq)), self._empty(1, len(inv_freq))
        known, table = -1, np.empty((2, 0, 0), np.float32)

        def rotate(position: int) -> None:
            nonlocal known, table
            if position // ROTATIONS_AT_ONCE != known:
                known = position // ROTATIONS_AT_ONCE
                table = rotations_at(ROTATIONS_AT_ONCE * known, ROTATIONS_AT_ONCE, inv_freq, factor)
            cos[0], sin[0] = table[:, position % ROTATIONS_AT_ONCE]

        self.rotate.append(rotate)
        return cos, sin

    def embed(self, weight: Weight, token_ids: np.ndarray) -> np.ndarray:
        """The token's row of the embedding matrix, f32[1,D]."""
        n_cols = weight.shape[-1]
        out = self._empty(1, n_cols)
        self.keep.append(token_ids)
        plan = [
            0,
            1,
            n_cols,
            weight.row_bytes,
            0,
            _address(token_ids),
            0,
            0,
            weight.address,
            0,
            0,
            1,
            _address(out),
            0,
            0,
            0,
            0,
        ]
        self._step(units.decode_units, plan, TAGS[weight.format.name])
        return out

    def add(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """a + b, both f32[1,D]."""
        out = self._empty(*a.shape)
        self._step(steps.add_step, [0, a.size, _address(a), _address(b), _address(out)])
        return out

    def norm(self, x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
        """RMSNorm. x f32[1,D], weight f32[D] -> f32[1,D]."""
        self.keep.append(weight)
        out = self._empty(*x.shape)
        self._step(steps.norm_units, [0, 1, x.size, _address(x), _address(weight), float_bits(eps), _address(out)])
        return out

    def linear(self, x: np.ndarray, *weights: Weight, fine: Sequence[Weight] = ()) -> list[np.ndarray]:
        """Products of one input with several matrices, then with `fine` ones. x f32[1,C] -> a list of f32[1,n_rows]."""
        wanted, fine_groups = [*weights, *fine], {w.format.activation_group for w in fine if w.has_8_bits}
        outputs = [self._empty(2 if w.has_8_bits else 1, w.shape[0]) for w in fine]
        outputs = [self._empty(1, weight.shape[0]) for weight in weights] + outputs
        records: dict[int, Inputs] = {}
        for fmt in {weight.format.name: weight.format for weight in wanted}.values():
            group = fmt.activation_group
            if group not in records:
                records[group] = self._quantize(x, group, is_fine=group in fine_groups)
            chosen = [(w, out) for w, out in zip(wanted, outputs, strict=True) if w.format is fmt]
            self._product(chosen[0][0], records[group], [Matrix(w.address, w.shape[0], 0, out) for w, out in chosen])
        return [self._sum_of_terms(out) for out in outputs]

    def per_head(self, x: np.ndarray, weight: Weight) -> np.ndarray:
        """A matrix of its own for each head. x f32[1,H,C], weight [H,n_rows,C] -> f32[1,H,n_rows]."""
        out = self._empty(1, x.shape[1], weight.shape[1])
        records = self._quantize(x[0], weight.format.activation_group)
        addresses = weight.addresses.tolist()
        self._product(weight, records, [Matrix(at, weight.shape[1], h, out[:, h]) for h, at in enumerate(addresses)])
        return out

    def per_head_transposed(self, x: np.ndarray, weight: Weight) -> np.ndarray:
        """The same with each matrix transposed. x f32[1,H,n_rows], weight [H,n_rows,C] -> f32[1,H,C]."""
        (_, n_heads, n_rows), n_cols = x.shape, weight.shape[2]
        out, rows = self._empty(1, n_heads, n_cols), self._contiguous(x[0])
        plan = [0, n_heads, n_cols, weight.row_bytes, 0, _address(rows), 0, 0]
        for h, address in enumerate(weight.addresses.tolist()):
            plan += (address, n_rows, h, h + 1, _address(out), 0, 0, 0, 0)
        self._step(units.transposed_units, plan, TAGS[weight.format.name], 2 * x.size * n_cols)
        return out

    def rope(self, x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
        """Rotate adjacent pairs. x f32[1,H,P], cos and sin f32[1,P/2] -> f32[1,H,P]."""
        out = self._empty(*x.shape)
        plan = [0, 1, x.shape[1], x.shape[2] // 2, _address(x), *x.strides[:2]]
        self._step(steps.rope_units, [*plan, _address(cos), _address(sin), _address(out)])
        return out

    def latent_attention(
        self,
        q_latent: np.ndarray,
        q_pe: np.ndarray,
        c_kv: np.ndarray,
        k_pe: np.ndarray,
        cache: LatentCache,
        layer: int,
        scale: float,
    ) -> np.ndarray:
        """Append the new latent to the cache, then attend to all of it; shapes as of CpuBackend, for one token."""
        out = self._empty(*q_latent.shape)
        if self._scratch is None:
            self._scratch = cache.attention_scratch(1, q_latent.shape[1])
            self.keep.append(self._scratch)
        self._attention(cache.attention_steps(layer, q_latent, q_pe, c_kv, k_pe, out, self._scratch, scale))
        return out

    def grouped_attention(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, cache: KvCache, layer: int, scale: float
    ) -> np.ndarray:
        """Append the new keys and values to the cache, then attend; shapes as of CpuBackend, for one token."""
        out = self._empty(*q.shape)
        if self._scratch is None:
            self._scratch = cache.attention_scratch(1, q.shape[1])
            self.keep.append(self._scratch)
        self._attention(cache.attention_steps(layer, q, k, v, out, self._scratch, scale))
        return out

    def expands(self, n_tokens: int, cache: LatentCache) -> bool:
        """One token never attends in expanded form."""
        return False

    def expanded_attention(self, *arguments: object) -> np.ndarray:
        """Never asked for."""
        raise NotImplementedError

    def route(
        self,
        logits: np.ndarray,
        bias: np.ndarray,
        *,
        sigmoid: bool,
        n_group: int,
        topk_group: int,
        group_score_experts: int,
        top_k: int,
        norm: bool,
        scale: float,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Choose experts. logits f32[1,E], bias f32[E] -> ids i64[1,K], weights f32[1,K]."""
        self.keep.append(bias)
        ids, weights = self._empty(1, top_k, dtype=np.int64), self._empty(1, top_k)
        plan = [0, 1, logits.size, top_k, _address(logits), _address(bias), sigmoid, n_group, topk_group]
        plan += [group_score_experts, norm, float_bits(scale), _address(ids), _address(weights)]
        self._step(steps.route_units, plan)
        return ids, weights

    @property
    def looks_ahead(self) -> bool:
        """As of CpuBackend."""
        return self._store is not None

    def request(self, ids: np.ndarray, down: Weight) -> None:
        """As of CpuBackend, ids i64[1,K]."""
        if (store := self._store) is not None:
            layer = store.layer_of(down)
            self.steps.append(lambda: store.request(layer, ids))

    def prefetch(self, ids: np.ndarray, down: Weight) -> None:
        """As of CpuBackend, ids i64[1,K]."""
        if (store := self._store) is not None:
            layer = store.layer_of(down)
            self.steps.append(lambda: store.prefetch(layer, ids))

    def favour(self, bias: np.ndarray, down: Weight) -> np.ndarray:
        """As of CpuBackend: with a slack, renewed before each run."""
        store = self._store
        if store is None or not store.route_slack:
            return bias
        layer, favoured = store.layer_of(down), self._empty(*bias.shape)

        def renew() -> None:
            favoured[:] = store.favoured(layer, bias)

        self.steps.append(renew)
        return favoured

    def gated_mlp(self, x: np.ndarray, gate: Weight, up: Weight, down: Weight, *, fine: bool = False) -> np.ndarray:
        """down(silu(gate x) * (up x)), all products fine or none. x f32[1,D] -> f32[1,D]."""
        gate_out, up_out = self.linear(x, fine=(gate, up)) if fine else self.linear(x, gate, up)
        is_fine = fine and down.has_8_bits
        out = self._empty(2 if is_fine else 1, down.shape[0])
        inputs = self._gated(gate_out, up_out, down.format.activation_group, is_fine)
        self._product(down, inputs, [Matrix(down.address, down.shape[0], 0, out)])
        return self._sum_of_terms(out)

    def experts(
        self, x: np.ndarray, ids: np.ndarray, weights: np.ndarray, gate: Weight, up: Weight, down: Weight
    ) -> np.ndarray:
        """The chosen experts' gated MLPs, weighted and summed. x f32[1,D], ids i64[1,K], weights f32[1,K] -> as x."""
        top_k, total = ids.size, self._empty(1, down.shape[1])
        tables = None if self._store is None else self._stream(self._store, x, ids, weights, (gate, up, down), total)
        gate_out, up_out = self._empty(top_k, gate.shape[1]), self._empty(top_k, up.shape[1])
        records = {g: self._quantize(x, g) for g in {gate.format.activation_group, up.format.activation_group}}

        def chosen(stack: Weight, which: int, k: int, record: int, rows: np.ndarray) -> Matrix:
            """The matrix of the k-th expert; in the memory of a store, its address is what is chosen."""
            if tables is not None:
                return Matrix(0, stack.shape[1], record, rows, 1, _address(tables[which, k:]))
            stride = stack.stride_bytes or stack.matrix_bytes
            return Matrix(stack.address, stack.shape[1], record, rows, stride, _address(ids[0, k:]))

        gates = [chosen(gate, 0, k, 0, gate_out[k : k + 1]) for k in range(top_k)]
        ups = [chosen(up, 1, k, 0, up_out[k : k + 1]) for k in range(top_k)]
        if gate.format is up.format:
            self._product(gate, records[gate.format.activation_group], gates + ups)
        else:
            self._product(gate, records[gate.format.activation_group], gates)
            self._product(up, records[up.format.activation_group], ups)
        out, gated = self._empty(top_k, down.shape[1]), self._gated(gate_out, up_out, down.format.activation_group)
        downs = [chosen(down, 2, k, k, out[k : k + 1]) for k in range(top_k)]
        self._product(down, gated, downs)
        positions = np.arange(top_k)
        self.keep.append(positions)
        plan = [0, 1, top_k, *out.shape, _address(out), _address(positions), _address(weights), _address(total)]
        self._step(steps.weighted_sum_units, plan)
        if tables is not None:
            self.steps.append(lambda: False)  # what follows is for all tokens again
            self._quantized = None  # its step may have been passed over
        return total

    # ---- parts of the above

    def _stream(
        self,
        store: ExpertStore,
        x: np.ndarray,
        ids: np.ndarray,
        weights: np.ndarray,
        stacks: tuple[Weight, Weight, Weight],
        out: np.ndarray,
    ) -> np.ndarray:
        """Run a token's experts as they arrive; if none has to, leave them to the steps: addresses i64[3,K]."""
        layer, tables = store.layer_of(stacks[2]), np.zeros((3, ids.size), np.int64)

        def stream() -> bool:
            experts = ids[0].tolist()
            if store.holds(layer, experts):
                tables[:] = store.addresses(layer, experts)
                return False
            out[:] = stream_experts(store, x, ids, weights, *stacks)
            return True

        self.steps.append(stream)
        self.keep.append(tables)
        return tables

    def _attention(self, attention_steps: list[Step]) -> None:
        for step in attention_steps:
            operations = step.operations if step.n_units > 1 else 0
            self._step(step.function, step.plan, step.fmt, operations)

    def _empty(self, *shape: int, dtype: type = np.float32) -> np.ndarray:
        """A buffer. Its memory lives as long as the program, but is given again when nobody holds the array any more.

        Steps run in the order in which they are recorded: what comes later may overwrite it, and finds it in the cache.
        """
        n_bytes = (math.prod(shape) * np.dtype(dtype).itemsize + 63) & ~63
        free = self._free.setdefault(n_bytes, [])
        if not free:
            free.append(np.zeros(n_bytes, np.uint8))
            self.keep.append(free[-1])
        memory = free.pop()
        # views of an array made of a memoryview hold that array, not what is below it
        out: np.ndarray = np.frombuffer(memory.data, dtype, math.prod(shape))
        weakref.finalize(out, free.append, memory).atexit = False
        return out.reshape(shape)

    def _step(
        self,
        function: Callable[..., object],
        plan: Sequence[int] | np.ndarray,
        tag: FormatTag = NUMBERS,
        operations: int = 0,
        counts: int = 0,
    ) -> np.ndarray:
        """Add a step; returns its plan as it lies in memory. Of many operations, the step is shared between threads.

        counts: address of those by which it is, where it is not by its plan's first number.
        """
        self.last = numbers = np.array(plan, np.int64)
        self.keep.append(numbers)
        shared = operations > SHARED_OPERATIONS
        self.steps.append((compiled_address(function, tag), _address(numbers), shared, 0, 0, counts))
        return numbers

    def _contiguous(self, x: np.ndarray) -> np.ndarray:
        """The rows of f32[M,C] one behind the other."""
        if x.flags.c_contiguous:
            return x
        out = self._empty(*x.shape)
        self._step(steps.copy_step, [0, *x.shape, _address(x), x.strides[0], _address(out)])
        return out

    def _quantize(self, x: np.ndarray, group: int, is_fine: bool = False) -> Inputs:
        """The rows of x f32[M,C] as the products want them: in int8, or as they are (group 0).

        If fine, behind them what int8 leaves of each.
        """
        if not group:
            return self._inputs(x, len(x), _address(x), x.strides[0])
        if self._quantized is None or self._quantized[0] is not x:
            self._quantized = x, {}  # several products of one input follow each other
        known = self._quantized[1]
        if (group, is_fine) not in known:
            records, first, stride = self._records(len(x), x.shape[1], group, is_fine)
            plan = [0, len(x), _address(x), first, stride, x.shape[1], group, is_fine, x.strides[0]]
            self._step(quantize_units, plan, operations=4 * x.size if len(x) > QUANTIZE_ROWS else 0)
            known[group, is_fine] = self._inputs(records, (1 + is_fine) * len(x), first, stride)
        return known[group, is_fine]

    def _gated(self, gate: np.ndarray, up: np.ndarray, group: int, is_fine: bool = False) -> Inputs:
        """silu(gate) * up as products want it, rows and what they leave as above. f32[M,C], f32[M,C]."""
        if not group:
            out = self._empty(*gate.shape)
            self._step(steps.silu_units, [0, 1, gate.size, _address(gate), _address(up), _address(out)])
            return self._inputs(out, len(out), _address(out), out.strides[0])
        n_rows, n_cols = gate.shape
        records, first, stride = self._records(n_rows, n_cols, group, is_fine)
        plan = [0, n_rows, _address(gate), _address(up), first, stride, n_cols, group, is_fine]
        self._step(steps.gated_units, plan, operations=VALUE_OPERATIONS * gate.size if n_rows > 1 else 0)
        return self._inputs(records, (1 + is_fine) * n_rows, first, stride)

    def _sum_of_terms(self, out: np.ndarray) -> np.ndarray:
        """What a product gave f32[1,n_rows], or a fine one f32[2,n_rows], as f32[1,n_rows]."""
        return out if len(out) == 1 else self.add(out[:1], out[1:])

    def _records(self, n_rows: int, n_cols: int, group: int, is_fine: bool) -> tuple[np.ndarray, int, int]:
        """Memory of records, where they begin, and the bytes from one to the next."""
        stride = record_bytes(n_cols, group)
        memory = self._empty((1 + is_fine) * n_rows * stride + 64, dtype=np.uint8)
        return memory, (_address(memory) + 63) & ~63, stride

    def _inputs(self, memory: np.ndarray, n: int, first: int, stride: int) -> Inputs:
        """n rows or records in some memory, from an address on, `stride` bytes apart."""
        table = first + stride * np.arange(n, dtype=np.int64)
        self.keep.append(table)
        return Inputs(table, memory)

    def _product(
        self,
        weight: Weight,
        inputs: Inputs,
        matrices: Sequence[Matrix],
    ) -> None:
        """Matrices of one format and width, those of `weight`, times records."""
        n_cols, row_bytes = weight.shape[-1], weight.row_bytes
        memory = np.zeros((self._threads + 1) * SHARE_BYTES, np.uint8)
        self.keep.append(memory)
        counts, rows_end = (_address(memory) + SHARE_BYTES - 1) & -SHARE_BYTES, 0
        plan = [0, len(matrices), n_cols, row_bytes, self._threads, _address(inputs.addresses), counts, 0]
        for address, n_rows, record, out, stride, choice in matrices:
            rows_end += n_rows
            # the kernel writes record m's results m * n_rows floats behind the address given
            place = _address(out) - 4 * record * n_rows
            plan += (address, n_rows, record, record + len(out), place, rows_end, 0, stride, choice)
        self._step(units.product_units, plan, TAGS[weight.format.name], rows_end * n_cols, counts)
