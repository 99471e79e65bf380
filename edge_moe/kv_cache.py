"""The cache of grouped-query attention: keys and values of a few heads per token and layer, in bf16, 8 bits or f32."""

import numpy as np

from edge_moe.config import KV_KINDS, LlamaConfig
from edge_moe.errors import OptionError, ShapeError
from edge_moe.kernels import grouped_attention
from edge_moe.kernels.attention import Step
from edge_moe.kernels.grouped_formats import FORMATS, head_bytes
from edge_moe.token_cache import TokenCache, check_context_length, run_steps

KINDS = tuple(kind for kind in KV_KINDS if kind in FORMATS)


def kv_cache_bytes(config: LlamaConfig, context_length: int, kind: str = KINDS[0]) -> int:
    """Bytes of a cache for `context_length` tokens. Raises OptionError for a kind that there is not."""
    if kind not in KINDS:
        raise OptionError(f"--kv {kind}: a model of grouped-query attention takes one of {', '.join(KINDS)}")
    n_heads = config.num_hidden_layers * config.num_key_value_heads
    return n_heads * head_bytes(FORMATS[kind], context_length, config.head_dim)


class KvCache(TokenCache):
    """Keys and values of the tokens seen so far.

    `kind` says how they are kept: "bf16" (2 bytes a number), "int8" (8 bits, with a scale for each key and each value
    of a head) or "f32", which loses nothing.
    """

    def __init__(self, config: LlamaConfig, context_length: int, kind: str = KINDS[0]) -> None:
        check_context_length(config, context_length)
        super().__init__(config, context_length, kind, kv_cache_bytes(config, context_length, kind))
        self._format = FORMATS[kind]
        self._shape = config.num_key_value_heads, config.head_dim
        self._window = config.sliding_window or 0

    def attention_scratch(self, n_tokens: int, n_heads: int) -> np.ndarray:
        """Memory u8[] for the steps of n_tokens at once; one serves all layers, run one after the other."""
        n_bytes = grouped_attention.scratch_bytes(n_tokens, n_heads, *self._shape, self.context_length)
        return np.empty(n_bytes, np.uint8)

    def attention_steps(
        self,
        layer: int,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        out: np.ndarray,
        scratch: np.ndarray,
        scale: float,
    ) -> list[Step]:
        """Steps that store T new tokens behind those seen, and attend each to those it sees: to be run in order.

        q and out f32[T,H,N], k and v f32[T,K,N] are read and written when the steps are run, at the addresses they
        have now; any strides, but the last axis must be contiguous. `scratch` is that of `attention_scratch` for T
        tokens or more. The caller keeps all of them and the cache alive. The steps can be run again for the next token
        as soon as `advance` has counted the last one, as those of `LatentCache` can.

        Raises ShapeError for arrays that do not fit together or to the model.
        """
        return self._steps(layer, self.context_length, q, k, v, out, scratch, scale)

    def _steps(
        self,
        layer: int,
        end: int,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        out: np.ndarray,
        scratch: np.ndarray,
        scale: float,
    ) -> list[Step]:
        """The steps in a context of `end` tokens."""
        if k.shape[1:] != self._shape:
            raise ShapeError(f"keys {list(k.shape[1:])} for a cache of heads {list(self._shape)}")
        return grouped_attention.attention_steps(
            self._format,
            self._layer_address(layer),
            self._layer_bytes // self._shape[0],
            self._length.ctypes.data,
            end,
            q,
            k,
            v,
            out,
            scratch,
            scale,
            self._window,
        )

    def attend(
        self, layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, n_threads: int
    ) -> np.ndarray:
        """Run the steps of `attention_steps` at once. All arrays f32 -> f32[T,H,N], the weighted sums of values.

        Raises ShapeError for arrays that do not fit together or into the cache.
        """
        n_tokens, n_heads = q.shape[:2]
        self._check_room(n_tokens)
        q, k, v = (array if array.strides[-1] == 4 else array.copy() for array in (q, k, v))
        out = np.empty(q.shape, np.float32)
        end = self.length + n_tokens
        scratch = self._scratch_of(grouped_attention.scratch_bytes(n_tokens, n_heads, *self._shape, end))
        run_steps(self._steps(layer, end, q, k, v, out, scratch, scale), n_threads)
        return out
