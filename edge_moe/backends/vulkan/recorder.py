"""A pass as a list of shader runs: its operations give places in device memory and note what will fill them.

A recorded pass is right for any tokens of its number: what differs from run to run (ids, rotations, the length of the
cache, where experts are) is read from memory when the shaders run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from edge_moe.backends.protocol import Compute
from edge_moe.backends.rotations import rotations_at
from edge_moe.backends.vulkan.arrays import Allocator, DeviceArray
from edge_moe.backends.vulkan.cache import DeviceCache
from edge_moe.backends.vulkan.device import buffer_bytes
from edge_moe.backends.vulkan.experts import ExpertSlots, SlotPart, Stacks
from edge_moe.backends.vulkan.weights import DeviceWeights, WeightPart
from edge_moe.errors import DeviceError
from edge_moe.weights import Weight

TILE_TOKENS = 8  # inputs that share decoded weights; as many lanes as a row has can write their sums
_ROWS = 4  # of a product's workgroup
_SPLIT_TOKENS, _MOST_SPLITS = 256, 16  # of the context: single tokens have few workgroups otherwise
_MOST_EXPERTS, _MOST_GROUPS, _MOST_DIMS = 1024, 256, 1024  # as the shaders have them
_MOST_WORKGROUPS = 65535  # along an axis
Params = tuple[int | float, ...]


@dataclass(frozen=True)
class Step:
    """One run of a shader."""

    pipeline: tuple[str, ...]  # names of its files
    params: Params
    groups: tuple[int, int, int]
    weights: WeightPart | SlotPart | None = None
    layer: int | None = None  # of the cache


@dataclass(frozen=True)
class Fetch:
    """Between two steps: the experts whose ids lie at `at` in the state are wanted on the device."""

    layer: int
    at: int
    n_ids: int


@dataclass
class Recording:
    """What was recorded, and the memory that it needs."""

    steps: list[Step | Fetch] = field(default_factory=list)
    inputs: list[tuple[DeviceArray, Callable[[int], np.ndarray]]] = field(default_factory=list)  # by the position
    stacks: list[Stacks] = field(default_factory=list)  # of experts, by layer
    top_k: int = 0
    source: DeviceArray | None = None  # token ids in the state, or hidden states in the arena
    logits: DeviceArray | None = None
    arena_numbers: int = 0
    state_numbers: int = 0

    @property
    def n_bytes(self) -> int:
        """Device memory of the arena and the state."""
        return buffer_bytes(4 * self.arena_numbers) + buffer_bytes(4 * self.state_numbers)


def record(
    compute: Compute,
    shape: tuple[int, ...],
    all_logits: bool,
    cache: DeviceCache,
    weights: DeviceWeights,
    tables_size: int,
    slots: ExpertSlots | None,
) -> Recording:
    """Record a pass over ids [T] or hidden states [T,D]. Without slots it says what it needs, but cannot be run.

    tables_size: numbers of the state that are not the pass's own. Raises DeviceError.
    """
    recorder = DeviceRecorder(cache, weights, tables_size, slots)
    recording = recorder.recording
    recording.source = (recorder.state if len(shape) == 1 else recorder.arena).take(*shape)
    recording.logits = compute(recorder, recording.source, cache, all_logits)
    recording.arena_numbers, recording.state_numbers = recorder.arena.end, recorder.state.end
    return recording


class DeviceRecorder:
    """The operations of a model pass; each gives the place that will hold its result."""

    def __init__(self, cache: DeviceCache, weights: DeviceWeights, tables_size: int, slots: ExpertSlots | None) -> None:
        self.recording = Recording()
        self.arena, self.state = Allocator(), Allocator(tables_size)
        self._cache, self._weights, self._slots = cache, weights, slots

    def rotations(
        self, cache: DeviceCache, n_tokens: int, inv_freq: np.ndarray, factor: float
    ) -> tuple[DeviceArray, DeviceArray]:
        """cos and sin [T,P/2], made on the CPU for each run."""
        both = self.arena.take(2, n_tokens, len(inv_freq))

        def values(position: int) -> np.ndarray:
            return rotations_at(position, n_tokens, inv_freq, factor)

        self.recording.inputs.append((both, values))
        return both[0], both[1]

    def embed(self, weight: Weight, token_ids: DeviceArray) -> DeviceArray:
        """Rows of the embedding matrix. token_ids [T] -> [T,D]."""
        n_tokens, n_cols = len(token_ids), weight.shape[-1]
        out = self.arena.take(n_tokens, n_cols)
        for part in self._weights.parts(weight):
            params = (n_cols, weight.row_bytes, 0, part.first_row, part.n_rows, token_ids.at, out.at, n_cols)
            self._step(_blocks(weight, "rows"), params, (_over(n_cols, 256), n_tokens, 1), part)
        return out

    def add(self, a: DeviceArray, b: DeviceArray) -> DeviceArray:
        """a + b, both [T,D]."""
        return self._elementwise("add", a, b)

    def norm(self, x: DeviceArray, weight: np.ndarray, eps: float) -> DeviceArray:
        """RMSNorm of each row. x [T,D], weight f32[D] -> [T,D]."""
        out = self.arena.take(*x.shape)
        params = (x.shape[1], x.at, x.strides[0], out.at, float(eps))
        self._step(("norm",), params, (len(x), 1, 1), self._weights.vector(weight))
        return out

    def linear(self, x: DeviceArray, *weights: Weight, fine: Sequence[Weight] = ()) -> list[DeviceArray]:
        """Products of one input with several matrices, all fine: x is not rounded. x [T,C] -> a list of [T,n_rows]."""
        outputs = []
        for weight in (*weights, *fine):
            out = self.arena.take(len(x), weight.shape[0])
            for part in self._weights.parts(weight):
                y = out.at + part.first_row, out.strides[0], 0
                self._product(weight, part, (part.n_rows, 0, 0), (x.at, x.strides[0], 0, 1), y, len(x), 1)
            outputs.append(out)
        return outputs

    def per_head(self, x: DeviceArray, weight: Weight) -> DeviceArray:
        """A matrix of its own for each head. x [T,H,C], weight [H,n_rows,C] -> [T,H,n_rows]."""
        n_tokens, n_heads, _ = x.shape
        out = self.arena.take(n_tokens, n_heads, weight.shape[1])
        (part,) = self._weights.parts(weight)
        matrices = weight.shape[1], weight.first_byte, weight.stride_bytes or weight.matrix_bytes
        x_place = x.at, x.strides[0], x.strides[1], 1
        self._product(weight, part, matrices, x_place, (out.at, out.strides[0], out.strides[1]), n_tokens, n_heads)
        return out

    def per_head_transposed(self, x: DeviceArray, weight: Weight) -> DeviceArray:
        """The same with each matrix transposed. x [T,H,n_rows], weight [H,n_rows,C] -> [T,H,C]."""
        (n_tokens, n_heads, n_rows), n_cols = x.shape, weight.shape[2]
        out = self.arena.take(n_tokens, n_heads, n_cols)
        (part,) = self._weights.parts(weight)
        stride_bytes = weight.stride_bytes or weight.matrix_bytes
        params: Params = (n_rows, n_cols, weight.row_bytes, weight.first_byte, stride_bytes)
        params += (x.at, *x.strides[:2], out.at, *out.strides[:2])
        self._step(_blocks(weight, "transposed"), params, (_over(n_cols, 256), n_tokens, n_heads), part)
        return out

    def rope(self, x: DeviceArray, cos: DeviceArray, sin: DeviceArray) -> DeviceArray:
        """Rotate adjacent pairs. x [T,H,P], cos and sin [T,P/2] -> [T,H,P]."""
        n_tokens, n_heads, n_dims = x.shape
        out = self.arena.take(*x.shape)
        params = (n_tokens, n_heads, n_dims // 2, x.at, *x.strides[:2], cos.at, sin.at, out.at)
        self._step(("rope",), params, _flat(x.size // 2))
        return out

    def latent_attention(
        self,
        q_latent: DeviceArray,
        q_pe: DeviceArray,
        c_kv: DeviceArray,
        k_pe: DeviceArray,
        cache: DeviceCache,
        layer: int,
        scale: float,
    ) -> DeviceArray:
        """Append the new latents to the cache, then attend to all of it; shapes as of the protocol."""
        self._store(c_kv, k_pe, cache, layer)
        n_heads, rank = q_latent.shape[1:]
        second = q_pe.shape[2], q_pe.at, *q_pe.strides[:2]
        return self._attend(q_latent, second, n_heads, 0, rank, cache, layer, scale)

    def expands(self, n_tokens: int, cache: DeviceCache) -> bool:
        """Never: one form of attention is enough here."""
        return False

    def expanded_attention(self, *arguments: object) -> DeviceArray:
        """Never asked for."""
        raise NotImplementedError

    def grouped_attention(
        self, q: DeviceArray, k: DeviceArray, v: DeviceArray, cache: DeviceCache, layer: int, scale: float
    ) -> DeviceArray:
        """Append the new keys and values to the cache, then attend; shapes as of the protocol."""
        n_tokens, n_keys, n_dims = k.shape
        self._store(k.reshape(n_tokens, -1), v.reshape(n_tokens, -1), cache, layer)
        return self._attend(q, (0, 0, 0, 0), q.shape[1] // n_keys, n_keys * n_dims, n_dims, cache, layer, scale)

    def route(
        self,
        logits: DeviceArray,
        bias: np.ndarray,
        *,
        sigmoid: bool,
        n_group: int,
        topk_group: int,
        group_score_experts: int,
        top_k: int,
        norm: bool,
        scale: float,
    ) -> tuple[DeviceArray, DeviceArray]:
        """Choose experts. logits [T,E], bias f32[E] -> ids [T,K], weights [T,K]. Raises DeviceError."""
        n_tokens, n_experts = logits.shape
        if n_experts > _MOST_EXPERTS or n_group > _MOST_GROUPS or group_score_experts > 2:
            most = f"{_MOST_EXPERTS} experts in {_MOST_GROUPS} groups"
            raise DeviceError(f"the router's shader takes {most}, found {n_experts} in {n_group}; use --backend cpu")
        ids, weights = self.state.take(n_tokens, top_k), self.arena.take(n_tokens, top_k)
        params: Params = (n_experts, top_k, logits.at, ids.at, weights.at, int(sigmoid), n_group, topk_group)
        params += (group_score_experts, int(norm), float(scale))
        self._step(("route",), params, (n_tokens, 1, 1), self._weights.vector(bias))
        return ids, weights

    @property
    def looks_ahead(self) -> bool:
        """Experts are not guessed here."""
        return False

    def request(self, ids: DeviceArray, down: Weight) -> None:
        """Unless all experts are on the device, those of `ids` [T,K] are sent there now."""
        if self._slots is not None and not self._slots.holds_all:
            self.recording.steps.append(Fetch(self._slots.layer_of(down), ids.at, ids.size))

    def prefetch(self, ids: DeviceArray, down: Weight) -> None:
        """Never asked for."""

    def favour(self, bias: np.ndarray, down: Weight) -> np.ndarray:
        """The bias itself."""
        return bias

    def gated_mlp(self, x: DeviceArray, gate: Weight, up: Weight, down: Weight, *, fine: bool = False) -> DeviceArray:
        """down(silu(gate x) * (up x)). x [T,D] -> [T,D]."""
        return self.linear(self._elementwise("silu", *self.linear(x, gate, up)), down)[0]

    def experts(
        self, x: DeviceArray, ids: DeviceArray, weights: DeviceArray, gate: Weight, up: Weight, down: Weight
    ) -> DeviceArray:
        """The chosen experts' gated MLPs, weighted and summed. x [T,D], ids [T,K], weights [T,K] -> [T,D]."""
        self.recording.stacks.append((gate, up, down))
        n_tokens, top_k = ids.shape
        self.recording.top_k = top_k
        gated = [self.arena.take(n_tokens * top_k, stack.shape[1]) for stack in (gate, up)]
        for which, out in enumerate(gated):
            self._expert_product(which, (x.at, 0, x.strides[0], top_k), ids, out)
        product = self._elementwise("silu", *gated)
        del gated
        out = self.arena.take(n_tokens * top_k, down.shape[1])
        self._expert_product(2, (product.at, 0, product.strides[0], 1), ids, out)
        total = self.arena.take(n_tokens, down.shape[1])
        params = (down.shape[1], top_k, out.at, weights.at, total.at)
        self._step(("weighted_sum",), params, (_over(down.shape[1], 64), n_tokens, 1))
        return total

    # ---- parts of the above

    def _step(
        self,
        pipeline: tuple[str, ...],
        params: Params,
        groups: tuple[int, int, int],
        weights: WeightPart | SlotPart | None = None,
        layer: int | None = None,
    ) -> None:
        if max(groups) > _MOST_WORKGROUPS:
            raise DeviceError(
                f"{groups} workgroups of {pipeline[-1]}: a device takes {_MOST_WORKGROUPS} along each axis"
            )
        self.recording.steps.append(Step(pipeline, params, groups, weights, layer))

    def _elementwise(self, name: str, a: DeviceArray, b: DeviceArray) -> DeviceArray:
        assert a.is_contiguous and b.is_contiguous
        out = self.arena.take(*a.shape)
        self._step((name,), (a.size, a.at, b.at, out.at), _flat(a.size))
        return out

    def _product(
        self,
        weight: Weight,
        part: WeightPart | SlotPart,
        matrices: tuple[int, int, int],  # rows, first byte, bytes from one to the next
        x: tuple[int, int, int, int],  # where, from token to token, from entry to entry, entries with one input
        y: tuple[int, int, int],
        n_tokens: int,
        n_entries: int,
        slots: tuple[int, int, int, int] | None = None,  # ids, table, first slot, slots
    ) -> None:
        n_rows, first_byte, matrix_bytes = matrices
        tile = 1 if n_tokens == 1 else TILE_TOKENS
        params: Params = (n_rows, weight.shape[-1], weight.row_bytes, first_byte, matrix_bytes, n_tokens, *x, *y)
        params += (0, 0, 0, 0, 0) if slots is None else (1, *slots)
        groups = _over(n_rows, _ROWS), _over(n_tokens, tile), n_entries
        self._step((f"TOKENS={tile}", *_blocks(weight, "product")), params, groups, part)

    def _expert_product(self, which: int, x: tuple[int, int, int, int], ids: DeviceArray, out: DeviceArray) -> None:
        """Gate, up or down (0 to 2) of the latest stacks, for each entry of ids."""
        stacks = self.recording.stacks[-1]
        if self._slots is None:  # it is only asked what would be needed
            return
        layer, stack = self._slots.layer_of(stacks[-1]), stacks[which]
        for part in self._slots.parts[layer][which]:
            table = ids.at, self._slots.table_at(layer), part.first_slot, part.n_slots
            matrices = stack.shape[1], 0, part.stride_bytes
            self._product(stack, part, matrices, x, (out.at, 0, out.strides[0]), 1, ids.size, table)

    def _store(self, a: DeviceArray, b: DeviceArray, cache: DeviceCache, layer: int) -> None:
        params = (len(a), a.shape[1], b.shape[1], a.at, a.strides[0], b.at, b.strides[0])
        groups = _over(a.shape[1] + b.shape[1], 128), len(a), 1
        self._step((f"cache_{cache.kind}", "store"), params, groups, layer=layer)

    def _attend(
        self,
        q: DeviceArray,
        second: tuple[int, ...],  # the query's second part: dims, where, from token to token, from head to head
        queries_per_key: int,
        value_at: int,
        value_dims: int,
        cache: DeviceCache,
        layer: int,
        scale: float,
    ) -> DeviceArray:
        n_tokens, n_heads, n_dims = q.shape
        if max(n_dims + second[0], value_dims) > _MOST_DIMS:
            raise DeviceError(f"heads of {n_dims + second[0]}: the attention's shader takes {_MOST_DIMS} dims")
        n_splits = min(_MOST_SPLITS, _over(cache.context_length, _SPLIT_TOKENS)) if n_tokens <= TILE_TOKENS else 1
        parts = self.arena.take(n_tokens, n_heads, n_splits, value_dims + 2)
        params: Params = (n_splits, queries_per_key, n_dims, second[0], q.at, *q.strides[:2])
        params += (*second[1:], cache.row, value_at, value_dims, cache.window, float(scale), n_heads, parts.at)
        groups = n_heads, n_tokens, n_splits
        self._step((f"cache_{cache.kind}", "attention"), params, groups, layer=layer)
        out = self.arena.take(n_tokens, n_heads, value_dims)
        groups = _over(value_dims, 64), n_tokens * n_heads, 1
        self._step(("merge",), (n_splits, value_dims, parts.at, out.at), groups)
        return out


def _blocks(weight: Weight, shader: str) -> tuple[str, ...]:
    return "blocks", f"blocks_{weight.format.name.lower()}", shader


def _over(n: int, size: int) -> int:
    return -(-n // size)


def _flat(n: int) -> tuple[int, int, int]:
    """Workgroups of 64 for n invocations."""
    groups = _over(n, 64)
    return min(groups, 1024), _over(groups, 1024), 1


def packed(params: Sequence[int | float]) -> np.ndarray:
    """Parameters as a shader reads them: u32 and f32, one behind the other."""
    return np.concatenate(
        [np.array([value], np.float32 if isinstance(value, float) else np.uint32).view(np.uint32) for value in params]
    )
