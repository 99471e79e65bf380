"""The compressed cache: one latent and one rope key per token and layer, in bf16, 8 bits, 4 bits or f32."""

import numpy as np

from edge_moe.config import KV_KINDS, DeepseekV2Config
from edge_moe.errors import ShapeError
from edge_moe.kernels import attention
from edge_moe.kernels.attention import Step
from edge_moe.kernels.hadamard import rotate_units, rotation_plan
from edge_moe.kernels.launch import NUMBERS
from edge_moe.token_cache import TokenCache, check_context_length, check_kind, run_steps


def latent_cache_bytes(config: DeepseekV2Config, context_length: int, kind: str = KV_KINDS[0]) -> int:
    """Bytes of a cache for `context_length` tokens. Raises OptionError for a kind that there is not."""
    layer_bytes = attention.layer_bytes(
        attention.FORMATS[check_kind(kind)], context_length, config.kv_lora_rank, config.qk_rope_head_dim
    )
    return config.num_hidden_layers * layer_bytes


class LatentCache(TokenCache):
    """Latents of the tokens seen so far. Pages are taken from the system as the context grows.

    `kind` says how they are kept: "bf16" (2 bytes a number), "int8" (latents in 8 bits with a scale for each token and
    128 dims, rope keys in 13), "int4" (4 bits, with a step and a middle for each token and 32 dims) or "f32", which
    loses nothing. With `gains` f32[layers,R], what each layer's norm multiplied its latents with, they are kept without
    them and rotated, so that no channel stands out; answers are given in the latents' own terms all the same.
    """

    def __init__(
        self,
        config: DeepseekV2Config,
        context_length: int,
        kind: str = KV_KINDS[0],
        gains: np.ndarray | None = None,
    ) -> None:
        check_context_length(config, context_length)
        super().__init__(config, context_length, kind, latent_cache_bytes(config, context_length, kind))
        self._format = attention.FORMATS[kind]
        self._shape = config.kv_lora_rank, config.qk_rope_head_dim
        self._rotation: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None  # gains, their inverses, ones
        if gains is not None:
            gains = np.ascontiguousarray(gains, np.float32)
            if gains.shape != (config.num_hidden_layers, config.kv_lora_rank):
                raise ShapeError(f"gains {list(gains.shape)} for {config.num_hidden_layers} x {config.kv_lora_rank}")
            inverses = np.divide(1, gains, where=gains != 0, out=np.zeros_like(gains))  # of 0: such a latent is 0
            self._rotation = gains, inverses, np.ones_like(gains[0])

    def attention_scratch(self, n_tokens: int, n_heads: int) -> np.ndarray:
        """Memory u8[] for the steps of n_tokens at once; one serves all layers, run one after the other."""
        return np.empty(self._scratch_bytes(n_tokens, n_heads, self.context_length), np.uint8)

    def _scratch_bytes(self, n_tokens: int, n_heads: int, end: int) -> int:
        """Bytes for the steps of n_tokens in a context of `end` tokens: rotated queries and latents come first."""
        n_bytes = attention.scratch_bytes(n_tokens, n_heads, *self._shape, end)
        return n_bytes + (4 * n_tokens * (n_heads + 1) * self._shape[0] if self._rotation else 0)

    def attention_steps(
        self,
        layer: int,
        q_latent: np.ndarray,
        q_pe: np.ndarray,
        c_kv: np.ndarray,
        k_pe: np.ndarray,
        out: np.ndarray,
        scratch: np.ndarray,
        scale: float,
    ) -> list[Step]:
        """Steps that store T new tokens behind those seen, and attend each to all up to itself: to be run in order.

        q_latent f32[T,H,R] (absorbed queries), q_pe f32[T,H,P], c_kv f32[T,R], k_pe f32[T,P] and out f32[T,H,R] are
        read and written when the steps are run, at the addresses they have now; any strides, but the last axis must be
        contiguous. `scratch` is that of `attention_scratch` for T tokens or more. `scale` is the softmax's. The caller
        keeps all of them and the cache alive.

        The steps read the cache's length when they are run. So they can be run again for the next token as soon as
        `advance` has counted the last one (after all layers), with each plan's field 0 set to 0 before each run. At
        most context_length - T tokens may be in the cache then; nothing checks it. A step's n_units and operations
        are those of a full cache.

        Raises ShapeError for arrays that do not fit together or to the model.
        """
        return self._steps(layer, self.context_length, q_latent, q_pe, c_kv, k_pe, out, scratch, scale)

    def _steps(
        self,
        layer: int,
        end: int,
        q_latent: np.ndarray,
        q_pe: np.ndarray,
        c_kv: np.ndarray,
        k_pe: np.ndarray,
        out: np.ndarray,
        scratch: np.ndarray,
        scale: float,
    ) -> list[Step]:
        """The steps in a context of `end` tokens."""
        if (q_latent.shape[-1], q_pe.shape[-1]) != self._shape:
            found = q_latent.shape[-1], q_pe.shape[-1]
            raise ShapeError(
                f"queries of {found[0]} + {found[1]} dims for a cache of {self._shape[0]} + {self._shape[1]}"
            )
        address = self._layer_address(layer)
        length = self._length.ctypes.data
        if self._rotation is None:
            return attention.attention_steps(
                self._format, address, length, end, q_latent, q_pe, c_kv, k_pe, out, scratch, scale
            )
        (n_tokens, n_heads, rank), (gains, inverses, ones) = q_latent.shape, self._rotation
        if c_kv.shape != (n_tokens, rank) or scratch.nbytes < self._scratch_bytes(n_tokens, n_heads, end):
            raise ShapeError(f"latents {list(c_kv.shape)} or {scratch.nbytes} bytes of scratch do not fit the queries")
        rows = scratch[: 4 * n_tokens * (n_heads + 1) * rank].view(np.float32).reshape(-1, rank)
        query, latent = rows[n_tokens:].reshape(q_latent.shape), rows[:n_tokens]
        # with c = gain * H r the cache keeps r: q . c = H (gain * q) . r, and the sum of p c is gain * H (sum of p r)
        return [
            _rotation_step(c_kv[:, None], latent[:, None], inverses[layer], ones),
            _rotation_step(q_latent, query, gains[layer], ones),
            *attention.attention_steps(
                self._format, address, length, end, query, q_pe, latent, k_pe, out, scratch[rows.nbytes :], scale
            ),
            _rotation_step(out, out, ones, gains[layer]),
        ]

    def attend(
        self,
        layer: int,
        q_latent: np.ndarray,
        q_pe: np.ndarray,
        c_kv: np.ndarray,
        k_pe: np.ndarray,
        scale: float,
        n_threads: int,
    ) -> np.ndarray:
        """Run the steps of `attention_steps` at once. All arrays f32 -> f32[T,H,R], the weighted sums of latents.

        Raises ShapeError for arrays that do not fit together or into the cache.
        """
        n_tokens, n_heads = q_latent.shape[:2]
        self._check_room(n_tokens)
        q_latent, q_pe, c_kv, k_pe = (x if x.strides[-1] == 4 else x.copy() for x in (q_latent, q_pe, c_kv, k_pe))
        out = np.empty(q_latent.shape, np.float32)
        end = self.length + n_tokens
        scratch = self._scratch_of(self._scratch_bytes(n_tokens, n_heads, end))
        run_steps(self._steps(layer, end, q_latent, q_pe, c_kv, k_pe, out, scratch, scale), n_threads)
        return out

    def store(self, layer: int, c_kv: np.ndarray, k_pe: np.ndarray, n_threads: int) -> None:
        """Store T new tokens behind those seen, and attend to nothing. c_kv f32[T,R], k_pe f32[T,P].

        Raises ShapeError for arrays that do not fit into the cache.
        """
        q_latent, q_pe = (np.empty((len(c_kv), 0, width), np.float32) for width in self._shape)
        self.attend(layer, q_latent, q_pe, c_kv, k_pe, 1.0, n_threads)

    def latents(self, layer: int, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """What a layer keeps of the tokens from `first`, a multiple of 16, to `last`: f32[n,R] latents, f32[n,P] keys.

        They may be stored and not counted yet. Raises ShapeError for tokens that are not in the cache's memory.
        """
        if first % 16 or not 0 <= first < last <= self.context_length:
            raise ShapeError(f"tokens {first} to {last} of a cache of {self.context_length}")
        start = (-self._memory.ctypes.data & 63) + layer * self._layer_bytes
        memory = self._memory[start : start + self._layer_bytes]
        latents, keys = attention.cached(self._format, memory, first, last, *self._shape)
        if self._rotation is not None:
            gains, _, ones = self._rotation
            latents = np.ascontiguousarray(latents)
            step = _rotation_step(latents[:, None], latents[:, None], ones, gains[layer])
            run_steps([step], 1)
        return latents, keys


def _rotation_step(source: np.ndarray, place: np.ndarray, before: np.ndarray, after: np.ndarray) -> Step:
    plan = rotation_plan(source, place, before, after)
    n_rows, rank = source.shape[0] * source.shape[1], source.shape[2]
    return Step(rotate_units, NUMBERS, plan, n_rows, n_rows * rank * (2 + rank.bit_length()))
