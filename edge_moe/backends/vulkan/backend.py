"""The backend itself: what goes to the device, how much of the experts, and passes run there."""

import weakref
from bisect import bisect_right
from collections import OrderedDict
from typing import Any

import numpy as np

from edge_moe.backends.protocol import Compute
from edge_moe.backends.vulkan.cache import DeviceCache
from edge_moe.backends.vulkan.device import PARAMS_BYTES, Adapter, Device, DeviceStats, buffer_bytes
from edge_moe.backends.vulkan.experts import ExpertSlots, layer_bytes
from edge_moe.backends.vulkan.program import DeviceProgram
from edge_moe.backends.vulkan.recorder import Recording, Step, record
from edge_moe.backends.vulkan.weights import DeviceWeights
from edge_moe.config import DeepseekV2Config, LlamaConfig
from edge_moe.errors import DeviceError, OptionError

CHUNK_TOKENS = 64  # of a prompt at a time: enough to share decoded weights, little enough scratch
_MOST_PROGRAMS = 4  # of a cache: a single token's, a whole chunk's and those of the last odd ends
_SMALL_BUFFERS_BYTES = 64 << 10


class VulkanBackend:
    """Runs passes on a device, in at most `vram_bytes` of its memory: what does not fit of the experts is sent anew."""

    def __init__(
        self, adapter: Adapter, vram_bytes: int | None = None, *, max_binding_bytes: int | None = None
    ) -> None:
        """max_binding_bytes as of Device, for tests. Raises DeviceError."""
        self.device = Device(adapter, vram_bytes, max_binding_bytes)
        self.slots: ExpertSlots | None = None
        self.chunk_tokens = CHUNK_TOKENS
        self._weights = DeviceWeights(self.device)
        self._tables_size = 0
        self._width = 0  # of the hidden states that are given; 0: token ids are
        self._arena: Any = None
        self._state: Any = None
        self._length: Any = None
        self._programs: weakref.WeakKeyDictionary[DeviceCache, OrderedDict[tuple[int, bool], DeviceProgram]] = (
            weakref.WeakKeyDictionary()
        )

    @property
    def name(self) -> str:
        """The device's."""
        return self.device.name

    @property
    def stats(self) -> DeviceStats:
        return self.device.stats

    def latent_cache(
        self, config: DeepseekV2Config, context_length: int, kind: str, gains: np.ndarray | None
    ) -> DeviceCache:
        """An empty cache of latents in bf16 or f32. Raises OptionError, DeviceError."""
        return DeviceCache(config, context_length, kind, config.latent_dim)

    def kv_cache(self, config: LlamaConfig, context_length: int, kind: str) -> DeviceCache:
        """An empty cache of keys and values in bf16 or f32. Raises OptionError, DeviceError."""
        row = 2 * config.num_key_value_heads * config.head_dim
        return DeviceCache(config, context_length, kind, row, config.sliding_window or 0)

    def prepare(self, compute: Compute, cache: DeviceCache, width: int = 0) -> None:
        """Send the weights to the device, and as many experts as fit beside a cache like this one.

        Raises OptionError when not even those of one token fit, DeviceError.
        """
        self._width = width
        one = self._recorded(compute, 1, True, cache)
        stacks, top_k = one.stacks, one.top_k
        n_experts = stacks[0][0].shape[0] if stacks else 0
        self.chunk_tokens = min(CHUNK_TOKENS, cache.context_length)
        n_slots = n_experts
        if (limit := self.device.limit_bytes) is not None:
            fixed = {n: self._fixed_bytes(compute, cache, n) for n in (self.chunk_tokens, 1)}

            def needed(n_slots: int) -> int:
                """Device memory with so many experts of each layer."""
                n_tokens = self._chunk_of(n_slots, n_experts, top_k)
                if n_tokens not in fixed:
                    fixed[n_tokens] = self._fixed_bytes(compute, cache, n_tokens)
                return fixed[n_tokens] + sum(
                    layer_bytes(each, n_slots, self.device.max_binding_bytes) for each in stacks
                )

            if needed(top_k) > limit:
                raise OptionError(
                    f"--vram: {limit} bytes are too little for this model, expected at least {needed(top_k)}: "
                    f"{self._weights.n_bytes} of weights that every token uses, {cache.n_bytes} of cache for "
                    f"{cache.context_length} tokens, experts of one token, scratch; a smaller -c needs less"
                )
            n_slots = top_k + bisect_right(range(top_k + 1, n_experts + 1), limit, key=needed)
            self.chunk_tokens = self._chunk_of(n_slots, n_experts, top_k)
        self._tables_size = sum(each[0].shape[0] for each in stacks)
        for n_tokens in (self.chunk_tokens, 1):  # the larger one first: what is taken seldom grows
            self._take(self._recorded(compute, n_tokens, True, cache))
        self._weights.upload()
        if stacks:
            self.slots = ExpertSlots(self.device, self._state, stacks, n_slots)

    def run(self, compute: Compute, source: np.ndarray, cache: DeviceCache, all_logits: bool) -> np.ndarray:
        """Run a pass chunk by chunk. source i64[T] or f32[T,D] -> f32[T,vocab] or f32[1,vocab]. Raises DeviceError."""
        if self._arena is None:
            self.prepare(compute, cache, 0 if source.ndim == 1 else source.shape[1])
        parts: list[np.ndarray] = []
        for first in range(0, len(source), self.chunk_tokens):
            chunk = source[first : first + self.chunk_tokens]
            program = self._program(compute, len(chunk), all_logits and len(chunk) > 1, cache)
            logits = program.run(chunk, cache.length + first)
            parts = [*parts, logits] if all_logits else [logits]
        return np.concatenate(parts)

    # ---- parts of the above

    def _recorded(self, compute: Compute, n_tokens: int, all_logits: bool, cache: DeviceCache) -> Recording:
        shape = (n_tokens, self._width) if self._width else (n_tokens,)
        return record(compute, shape, all_logits, cache, self._weights, self._tables_size, self.slots)

    def _program(self, compute: Compute, n_tokens: int, all_logits: bool, cache: DeviceCache) -> DeviceProgram:
        programs = self._programs.setdefault(cache, OrderedDict())
        key = n_tokens, all_logits
        if key in programs:
            programs.move_to_end(key)
            return programs[key]
        recording = self._recorded(compute, n_tokens, all_logits, cache)
        self._take(recording)
        programs = self._programs.setdefault(cache, OrderedDict())
        while len(programs) >= _MOST_PROGRAMS:
            programs.popitem(last=False)
        program = DeviceProgram(self.device, recording, cache, self._arena, self._state, self._length, self.slots)
        weakref.finalize(program, self.device.release, program.params).atexit = False
        programs[key] = program
        return program

    def _take(self, recording: Recording) -> None:
        """Memory for what a recording needs, in place of less. Raises DeviceError."""
        arena_bytes, state_bytes = 4 * recording.arena_numbers, 4 * recording.state_numbers
        if buffer_bytes(arena_bytes) > self.device.max_binding_bytes:
            raise DeviceError(f"{self.device.name}: {arena_bytes} bytes of scratch are more than shaders see there")
        if self._length is None:
            self._length = self.device.create_uniform(16)
        if self._arena is None or self._arena.size < arena_bytes or self._state.size < state_bytes:
            self._programs.clear()  # they know the buffers
            for buffer in (self._arena, self._state):
                if buffer is not None:
                    self.device.release(buffer)
            self._arena, self._state = self.device.create(arena_bytes), self.device.create(state_bytes)
            if self.slots is not None:
                self.slots.move_tables(self._state)

    def _chunk_of(self, n_slots: int, n_experts: int, top_k: int) -> int:
        """Tokens at a time: all their experts must have a place at once."""
        return self.chunk_tokens if n_slots == n_experts else max(1, min(self.chunk_tokens, n_slots // top_k))

    def _fixed_bytes(self, compute: Compute, cache: DeviceCache, n_tokens: int) -> int:
        """Device memory of all but experts, for passes of up to n_tokens."""
        one, largest = (self._recorded(compute, n, True, cache) for n in (1, n_tokens))
        assert largest.logits is not None
        n_buffers = 16  # of a stack of experts: more steps than were recorded without them
        n_steps = sum(isinstance(step, Step) for step in largest.steps) + 3 * n_buffers * len(one.stacks)
        tables = sum(4 * stacks[0].shape[0] for stacks in one.stacks)
        programs = _MOST_PROGRAMS * buffer_bytes(PARAMS_BYTES * n_steps)
        readback = buffer_bytes(4 * largest.logits.size)
        arena = buffer_bytes(4 * max(one.arena_numbers, largest.arena_numbers))
        state = buffer_bytes(4 * max(one.state_numbers, largest.state_numbers) + tables)
        return self._weights.n_bytes + cache.n_bytes + programs + readback + arena + state + _SMALL_BUFFERS_BYTES
