"""How a model is held under a budget of memory: what stays, and how many experts fit beside it."""

import math
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from edge_moe.checkpoint import Checkpoint
from edge_moe.direct_io import DirectFile, aligned_bytes, aligned_memory
from edge_moe.errors import OptionError
from edge_moe.expert_store import least_bytes, slot_sizes
from edge_moe.formats import BlockFormat
from edge_moe.generate import PREFILL_CHUNK
from edge_moe.gguf import TensorEntry
from edge_moe.models.architectures import cache_bytes, scratch_bytes
from edge_moe.models.feed_forward import load_mlp
from edge_moe.slice_reader import READERS
from edge_moe.weights import Weight

# What Python, numba and the kernels take, measured on the small model; compiling, at a first use, takes more.
PROCESS_BYTES = 200 << 20
_SLACK = 0.01  # of the budget: what the allocator and the system keep beside what is asked for
_MARGIN = 0.1  # of free memory: left to others where no budget is given
_PROBE_S = 0.25
_CHUNK_BYTES = 8 << 20
_EXPERTS = ".mlp.experts."
ExpertLayer = tuple[Weight, Weight, Weight]  # gate, up, down


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of each part of a process that holds a model within `budget_bytes`."""

    model_bytes: int
    budget_bytes: int
    process_bytes: int
    resident_bytes: int  # all weights but routed experts
    cache_bytes: int
    context_length: int
    scratch_bytes: int
    slots_bytes: int
    experts_bytes: int  # of all routed experts, as they lie in slots
    active_bytes: int  # of the experts of one token
    disk_bytes_per_s: float
    memory_bytes_per_s: float

    @property
    def expert_share(self) -> float:
        """Share of the experts that fit."""
        return min(1.0, self.slots_bytes / self.experts_bytes)

    @property
    def tok_per_s(self) -> tuple[float, float]:
        """What to expect: if a token's experts are any, and if all but a third of those that are not there are."""
        read_s = (1 - self.expert_share) * self.active_bytes / self.disk_bytes_per_s
        compute_s = (self.resident_bytes + self.active_bytes) / self.memory_bytes_per_s
        return 1 / (read_s + compute_s), 1 / (read_s / 3 + compute_s)

    def line(self) -> str:
        """The plan in one line, sizes in GB of 10^9 bytes."""

        def gb(n: float) -> str:
            return f"{n / 1e9:.1f}" if n >= 1e9 else f"{n / 1e9:.2f}"

        low, high = self.tok_per_s
        return (
            f"{gb(self.model_bytes)} GB model, {gb(self.budget_bytes)} GB budget: {gb(self.resident_bytes)} resident, "
            f"{gb(self.cache_bytes)} cache for {self.context_length} tokens, {gb(self.scratch_bytes)} scratch, "
            f"{gb(self.process_bytes)} program, {gb(self.slots_bytes)} expert cache = "
            f"{100 * self.expert_share:.0f} % of experts; "
            f"expect {low:.2g} to {high:.2g} tok/s on this disk ({self.disk_bytes_per_s / 1e9:.2f} GB/s)"
        )


def expert_layers(checkpoint: Checkpoint) -> list[ExpertLayer]:
    """Gate, up and down of each layer that has routed experts, where they lie in the file. Raises FormatError."""
    layers, config = [], checkpoint.config
    for index in range(config.num_hidden_layers if config.n_routed_experts else 0):
        name = f"layers.{index}.mlp.experts"
        entry = checkpoint.tensors.get(checkpoint.tensor_name(f"{name}.down_proj"))
        if entry is not None:
            mlp = load_mlp(checkpoint, name, (config.n_routed_experts,), entry.shape[-1])
            layers.append((mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    return layers


def plan_memory(
    checkpoint: Checkpoint,
    layers: Sequence[ExpertLayer],
    context_length: int,
    kv: str,
    budget_bytes: int | None,
    form_bytes: Callable[[BlockFormat, int], int] | None = None,
) -> MemoryPlan | None:
    """How to hold a model; None where all of it fits, and the file is best left to the system's page cache.

    `form_bytes(format, weights)` says what a backend makes of weights that it does not use as they lie in the file.

    No budget means what is free, less a margin. Raises OptionError for a budget that cannot work.
    """
    free_bytes = free_memory_bytes()
    limit = int(free_bytes * (1 - _MARGIN)) if budget_bytes is None else budget_bytes
    config = checkpoint.config
    kv_bytes = cache_bytes(config, context_length, kv)
    scratch = scratch_bytes(config, min(PREFILL_CHUNK, context_length))
    process_bytes = max(PROCESS_BYTES, process_memory_bytes())
    fixed = process_bytes + kv_bytes + scratch
    experts_in_file = sum(weight.n_bytes for layer in layers for weight in layer)
    model_bytes, resident = checkpoint.size_bytes, checkpoint.size_bytes - experts_in_file
    if form_bytes is not None:
        stacks = {checkpoint.tensor_name(weight.name) for layer in layers for weight in layer}
        sizes = {name: form_bytes(each.format, math.prod(each.shape)) for name, each in checkpoint.tensors.items()}
        model_bytes = sum(sizes.values())
        resident = sum(size for name, size in sizes.items() if name not in stacks)
    if not layers or model_bytes + fixed <= limit:
        if budget_bytes is not None and model_bytes + fixed > limit:
            raise OptionError(
                f"--ram {_gib(limit)}: {checkpoint.path} has no experts to leave on the disk, "
                f"expected at least {_gib(model_bytes + fixed)}"
            )
        return None
    top_k = config.num_experts_per_tok
    least = int((fixed + resident + least_bytes(layers, top_k)) / (1 - _SLACK)) + 1
    if limit < least:
        if budget_bytes is None:
            return None  # too little is free for either way: the page cache makes the best of it
        raise OptionError(
            f"--ram {_gib(limit)}: too little for {checkpoint.path}, expected at least {_gib(least)}: "
            f"{_gib(resident)} weights that every token uses, {_gib(kv_bytes)} cache for {context_length} tokens, "
            f"{_gib(scratch)} scratch, {_gib(process_bytes)} program; a smaller -c or --kv int8 needs less"
        )
    experts_bytes = sum(sum(slot_sizes(layer)) * config.n_routed_experts for layer in layers)
    return MemoryPlan(
        model_bytes=checkpoint.size_bytes,
        budget_bytes=limit,
        process_bytes=process_bytes,
        resident_bytes=resident,
        cache_bytes=kv_bytes,
        context_length=context_length,
        scratch_bytes=scratch,
        slots_bytes=min(int(limit * (1 - _SLACK)) - fixed - resident, experts_bytes),
        experts_bytes=experts_bytes,
        active_bytes=top_k * sum(weight.matrix_bytes for layer in layers for weight in layer),
        disk_bytes_per_s=disk_bytes_per_s(layers[0][0], seconds=_PROBE_S),
        memory_bytes_per_s=_memory_bytes_per_s(),
    )


def hold_in_memory(checkpoint: Checkpoint) -> Checkpoint:
    """The model with all weights but routed experts read into memory, each when it is first asked for.

    So nothing a token always uses can be pushed out, nor vanish if the file is cut. Raises ReadError.
    """
    held: dict[str, TensorEntry] = {}

    def load(name: str, entry: TensorEntry) -> TensorEntry:
        if _EXPERTS in name:
            return entry
        if name not in held:
            held[name] = _read_entry(entry)
        return held[name]

    return checkpoint.loaded_by(load)


def free_memory_bytes(root: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self/cgroup")) -> int:
    """Memory that this process may still take: what is available, and what its control group leaves."""
    free = int(psutil.virtual_memory().available)
    try:
        lines = process.read_text().splitlines()
    except OSError:
        return free
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            folder, name = root / "memory", "memory.limit_in_bytes"
        elif not controllers:
            folder, name = root, "memory.max"
        else:
            continue
        for place in (folder / path.strip("/") / name, folder / name):
            try:
                limit = place.read_text().strip()
            except OSError:
                continue
            if limit.isdigit():
                free = min(free, max(0, int(limit) - process_memory_bytes()))
            break
    return free


def process_memory_bytes(status: Path = Path("/proc/self/status")) -> int:
    """Memory that this process has taken, on Linux without pages of mapped files: those go when room is needed."""
    resident = int(psutil.Process().memory_info().rss)
    try:
        mapped = re.search(r"^RssFile:\s*(\d+) kB$", status.read_text(), re.MULTILINE)
    except OSError:
        return resident
    return max(0, resident - 1024 * int(mapped[1])) if mapped else resident


def disk_bytes_per_s(weight: Weight, *, seconds: float) -> float:
    """Speed of reading slices of a stack's size, past the page cache and with several reads at a time."""
    n_bytes, file = weight.matrix_bytes, DirectFile(weight.path, READERS)
    offsets, end = weight.file_offsets.tolist(), time.perf_counter() + seconds

    def read(reader: int) -> int:
        memory, done = aligned_memory(aligned_bytes(n_bytes)), 0
        while time.perf_counter() < end:
            file.read(reader, offsets[(reader + READERS * done) % len(offsets)], n_bytes, memory)
            done += 1
        return done * n_bytes

    started = time.perf_counter()
    try:
        with ThreadPoolExecutor(READERS) as readers:
            total = sum(readers.map(read, range(READERS)))
    finally:
        file.close()
    return total / (time.perf_counter() - started)


def _read_entry(entry: TensorEntry) -> TensorEntry:
    n_bytes, lead = entry.data.size, entry.offset % 4096
    memory = aligned_memory(aligned_bytes(n_bytes))
    file = DirectFile(entry.path, READERS)
    starts = range(0, lead + n_bytes, _CHUNK_BYTES)

    def read(i: int) -> None:
        first = starts[i]  # of the aligned bytes
        size = min(_CHUNK_BYTES, lead + n_bytes - first)
        file.read(i % READERS, entry.offset - lead + first, size, memory[first:])

    try:
        for batch in range(0, len(starts), READERS):  # each reader has one handle: one read of each at a time
            with ThreadPoolExecutor(READERS) as readers:
                list(readers.map(read, range(batch, min(batch + READERS, len(starts)))))
    finally:
        file.close()
    data = memory[lead : lead + n_bytes]
    data.flags.writeable = False
    return TensorEntry(entry.name, entry.format, entry.shape, data, entry.path, entry.offset)


def _memory_bytes_per_s() -> float:
    numbers = np.ones(4 << 20)
    numbers.sum()
    started = time.perf_counter()
    numbers.sum()
    return numbers.nbytes / (time.perf_counter() - started)


def _gib(n_bytes: int) -> str:
    """Bytes as --ram takes them: 3.812G of 2^30."""
    return f"{n_bytes / (1 << 30):.3f}G"
