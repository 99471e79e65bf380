"""The Python interface: load a model, stream text from it, or take its logits."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from os import PathLike
from pathlib import Path

import numpy as np
import psutil

from edge_moe.backends.choice import choose_backend
from edge_moe.backends.cpu import CpuBackend, compile_ahead
from edge_moe.backends.mlx.backend import MlxBackend, import_mlx
from edge_moe.backends.mlx.forms import form_bytes
from edge_moe.backends.protocol import Backend
from edge_moe.backends.split import SplitBackend
from edge_moe.backends.vulkan.backend import VulkanBackend
from edge_moe.backends.vulkan.device import DeviceStats, find_adapter
from edge_moe.checkpoint import Checkpoint, open_checkpoint, product_formats
from edge_moe.config import KV_KINDS, ModelConfig
from edge_moe.errors import DeviceError, OptionError
from edge_moe.expert_store import ExpertStore
from edge_moe.formats import BlockFormat
from edge_moe.generate import Cache, GenerationStats, LanguageModel, Session
from edge_moe.kernels.elementwise import max_threads
from edge_moe.memory_plan import MemoryPlan, expert_layers, hold_in_memory, plan_memory
from edge_moe.models.architectures import load_pass
from edge_moe.onnx_folder import OnnxFolder, OnnxPass
from edge_moe.resident_pages import map_resident_pages
from edge_moe.routes import shares
from edge_moe.sampling import Sampler, SamplingOptions
from edge_moe.token_cache import check_kind
from edge_moe.tokenizer import Tokenizer

DEFAULT_CONTEXT_LENGTH = 16384


@dataclass(frozen=True)
class _Place:
    """Where a model is to run; `load` says what each means."""

    backend: str
    vram_bytes: int | None
    gpu_layers: int | None
    on_backend: Callable[[str], None]

    def check_cpu(self) -> None:
        """Raises OptionError for what the CPU has no use for."""
        for option, value in (("--vram", self.vram_bytes), ("--gpu-layers", self.gpu_layers)):
            if value is not None:
                raise OptionError(f"{option}: the cpu backend has no device; add --backend, or leave {option} out")


@dataclass(frozen=True)
class _Bound:
    """What is asked of a model that may not fit into memory; `load` says what each means."""

    ram_bytes: int | None
    route_slack: float
    routes: np.ndarray | None
    on_plan: Callable[[MemoryPlan], None] | None


class Model:
    """A loaded model. Its weights stay in the file; one instance serves one thread at a time."""

    def __init__(
        self,
        checkpoint: Checkpoint | OnnxFolder,
        *,
        threads: int,
        context_length: int | None = None,
        kv: str = KV_KINDS[0],
        ram_bytes: int | None = None,
        route_slack: float = 0.0,
        routes: np.ndarray | None = None,
        on_plan: Callable[[MemoryPlan], None] | None = None,
        backend: str = "cpu",
        vram_bytes: int | None = None,
        gpu_layers: int | None = None,
        on_backend: Callable[[str], None] | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.config: ModelConfig = checkpoint.config
        longest = self.config.max_position_embeddings
        self.context_length = min(longest, DEFAULT_CONTEXT_LENGTH) if context_length is None else context_length
        if not 1 <= self.context_length <= longest:
            raise OptionError(f"-c/--ctx-size {context_length}: {checkpoint.path} takes 1 to {longest} tokens")
        self.threads = threads
        self.kv = check_kind(kv)
        if isinstance(checkpoint, OnnxFolder) and kv != KV_KINDS[0]:
            raise OptionError(f"--kv {kv}: {checkpoint.path} is an ONNX model, which keeps its cache its own way")
        self._last_session: Session | None = None
        self._pass: LanguageModel
        self.memory_plan: MemoryPlan | None = None  # None: all of the file fits
        self.expert_store: ExpertStore | None = None
        if gpu_layers is not None and gpu_layers < 1:
            raise OptionError(f"--gpu-layers {gpu_layers}: expected at least 1; --backend cpu runs all on the CPU")
        self.backend = "cpu"
        self.device_name: str | None = None  # of a backend with a device
        self.device_stats: DeviceStats | None = None  # what was sent there
        if isinstance(checkpoint, OnnxFolder):
            if backend not in ("auto", "cpu") or vram_bytes is not None or gpu_layers is not None:
                words = f"--backend {backend}" if backend not in ("auto", "cpu") else "--vram or --gpu-layers"
                raise OptionError(f"{words}: {checkpoint.path} is an ONNX model, which onnxruntime runs on the CPU")
            if ram_bytes is not None:
                raise OptionError(f"--ram: {checkpoint.path} is an ONNX model, whose memory onnxruntime decides")
            self._pass = OnnxPass(checkpoint, threads)
        else:
            bound = _Bound(ram_bytes, route_slack, routes, on_plan)
            place = _Place(backend, vram_bytes, gpu_layers, on_backend or (lambda line: None))
            on_device = self._device_pass(checkpoint, place, bound)
            self._pass = on_device or self._cpu_pass(checkpoint, bound)

    def _device_pass(self, checkpoint: Checkpoint, place: "_Place", bound: "_Bound") -> LanguageModel | None:
        """The pass on the device of the backend asked for; None for the CPU. Raises OptionError, DeviceError."""
        name, reason = choose_backend(place.backend)
        is_auto = place.backend == "auto"
        try:
            if name == "cpu":
                if not is_auto:
                    place.check_cpu()
                return None
            device = self._open_device(name, checkpoint, place, bound)
            backend: Backend = device
            n_layers = self.config.num_hidden_layers
            if place.gpu_layers is not None and place.gpu_layers < n_layers:
                at = n_layers - place.gpu_layers
                backend = SplitBackend(CpuBackend(self.threads), device, at, self.config)
            model = load_pass(checkpoint, backend)
            model.prepare(self.context_length, self.kv)
        except (DeviceError, OptionError) as error:
            if not is_auto:
                raise
            name, reason = "cpu", str(error)
            return None
        finally:
            if is_auto:
                place.on_backend(f"backend {name}: {reason}")
        self.backend, self.device_name = name, device.name
        if isinstance(device, VulkanBackend):
            self.device_stats = device.stats
        elif device.weights.inexact:
            formats = ", ".join(sorted(device.weights.inexact))
            place.on_backend(
                f"backend mlx: {formats} has no equal there and is kept in 8-bit groups of 32, not without loss"
            )
        return model

    def _open_device(
        self, name: str, checkpoint: Checkpoint, place: "_Place", bound: "_Bound"
    ) -> "VulkanBackend | MlxBackend":
        """The backend of a device. Raises OptionError, DeviceError."""
        if bound.ram_bytes is not None and (name == "vulkan" or place.gpu_layers is not None):
            other = "--vram says how much of the device to take" if name == "vulkan" else "leave one of them out"
            raise OptionError(f"--ram is neither for the vulkan backend nor for --gpu-layers; {other}")
        if name == "vulkan":
            return VulkanBackend(find_adapter(), place.vram_bytes)
        if place.vram_bytes is not None:
            raise OptionError("--vram: the mlx backend has no memory of its own; --ram bounds all of it")
        import_mlx()  # before memory is planned: it takes some
        is_split = place.gpu_layers is not None
        return MlxBackend(self.threads, None if is_split else self._bounded_store(checkpoint, bound, form_bytes))

    def _cpu_pass(self, checkpoint: Checkpoint, bound: "_Bound") -> LanguageModel:
        """The pass by our own kernels. Raises OptionError, ReadError."""
        self.expert_store = self._bounded_store(checkpoint, bound, None)
        if self.expert_store is not None:
            checkpoint = hold_in_memory(checkpoint)
        else:
            map_resident_pages(self, checkpoint.maps)
        model = load_pass(checkpoint, CpuBackend(self.threads, self.expert_store))
        if self.expert_store is None:  # processes beside would take memory that a budget does not count
            compile_ahead(self.config, product_formats(checkpoint), self.kv, self.threads - 1)
        return model

    def _bounded_store(
        self, checkpoint: Checkpoint, bound: "_Bound", form_bytes: Callable[[BlockFormat, int], int] | None
    ) -> ExpertStore | None:
        """Slots for experts where the model does not fit into memory. Raises OptionError, ReadError."""
        layers = expert_layers(checkpoint)
        plan = plan_memory(checkpoint, layers, self.context_length, self.kv, bound.ram_bytes, form_bytes)
        self.memory_plan, self.expert_store = plan, None
        if plan is None:
            return None
        if bound.on_plan:
            bound.on_plan(plan)
        top_k = self.config.num_experts_per_tok
        self.expert_store = ExpertStore(layers, plan.slots_bytes, top_k, route_slack=bound.route_slack)
        if bound.routes is not None:
            self.expert_store.seed(shares(bound.routes, self.config.n_routed_experts))
        return self.expert_store

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The file's own tokenizer."""
        return Tokenizer.from_metadata(self.checkpoint.metadata, self.checkpoint.path)

    @property
    def runs_tokens_singly(self) -> bool:
        """Whether a text must be run token by token to be run as it is generated: with a slack of the router."""
        return self.expert_store is not None and self.expert_store.route_slack > 0

    @property
    def last_stats(self) -> GenerationStats:
        """The figures of the latest `generate`, also while it runs."""
        return self._last_session.stats if self._last_session else GenerationStats()

    def new_session(self, context_length: int | None = None) -> Session:
        """An empty cache to generate with; a chat keeps one, so that each turn runs only what is new."""
        length = context_length or self.context_length
        return Session(self._pass, length, self.new_cache(length))

    def new_cache(self, context_length: int | None = None) -> Cache:
        """An empty cache for `forward`."""
        length = context_length or self.context_length
        return self._pass.new_cache(length, self.kv)

    def forward(self, token_ids: np.ndarray, cache: Cache, *, all_logits: bool = False) -> np.ndarray:
        """Run tokens behind those in `cache`. token_ids i64[T] -> f32[1,vocab] of the last, or f32[T,vocab] of all."""
        return self._pass.forward(token_ids, cache, all_logits=all_logits)

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Logits after each token of a text from its beginning: f32[T,vocab]. Raises OptionError, ShapeError."""
        session = self.new_session(max(1, min(len(token_ids), self.config.max_position_embeddings)))
        return np.concatenate(list(session.prefill([int(i) for i in token_ids], all_logits=True)))

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 256,
        stop: Sequence[str] = (),
        options: SamplingOptions | None = None,
        ignore_eos: bool = False,
        parse_special: bool = False,
        session: Session | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[str]:
        """Stream the continuation of `prompt` (a text, or token ids) in pieces that never split a character.

        Ends before the first of the `stop` strings. `last_stats` holds the figures during and after the iteration.
        Raises OptionError for an empty or too long prompt or bad options.
        """
        if max_new_tokens < 1:
            raise OptionError(f"-n/--n-predict {max_new_tokens}: expected at least 1")
        if any(not each for each in stop):
            raise OptionError("--stop: an empty string would stop before the first token; leave it out")
        tokenizer = self.tokenizer
        ids = tokenizer.encode(prompt, parse_special=parse_special) if isinstance(prompt, str) else list(prompt)
        if session is None:
            session = self.new_session(min(self.context_length, max(len(ids), 1) + max_new_tokens))
        self._last_session = session
        tokens = session.generate(
            ids,
            Sampler(options or SamplingOptions()),
            max_new_tokens=max_new_tokens,
            eos_ids=() if ignore_eos else tokenizer.eos_ids,
            on_progress=on_progress,
        )
        return self._stream(tokens, session, tuple(stop))

    def _stream(self, tokens: Iterator[int], session: Session, stop: tuple[str, ...]) -> Iterator[str]:
        stream = self.tokenizer.stream()
        held = ""  # text that may be the beginning of a stop string
        for token in tokens:
            held += stream.push(token)
            found = [at for at in (held.find(each) for each in stop) if at >= 0]
            if found:
                session.stats.stop_reason = "stop"
                if min(found):
                    yield held[: min(found)]
                return
            keep = max((_overlap(held, each) for each in stop), default=0)
            if len(held) > keep:
                yield held[: len(held) - keep]
                held = held[len(held) - keep :]
        if held := held + stream.flush():
            yield held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def embedded_model_path() -> Path:
    """The small model that comes with the package."""
    return Path(str(resources.files("edge_moe") / "data" / "reference.gguf"))


def default_threads() -> int:
    """Physical cores that this process may use: a second hardware thread per core does not help these kernels."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed, max_threads()))


def load(
    path: str | PathLike[str] | Checkpoint | OnnxFolder | None = None,
    *,
    threads: int | None = None,
    context_length: int | None = None,
    kv: str = KV_KINDS[0],
    ram_bytes: int | None = None,
    route_slack: float = 0.0,
    routes: np.ndarray | None = None,
    on_plan: Callable[[MemoryPlan], None] | None = None,
    backend: str = "cpu",
    vram_bytes: int | None = None,
    gpu_layers: int | None = None,
    on_backend: Callable[[str], None] | None = None,
) -> Model:
    """Open a model (None: the embedded one). The file is mapped, so this takes little time and memory.

    `kv` is how latent caches keep their numbers: "bf16", "int8" (little more than half of that), "int4" (little more
    than a third) or "f32" (exact).

    `ram_bytes` is the memory that the whole process may take; by default what the machine has free, less a tenth.
    Where the model does not fit, all but its experts is read into memory, and experts when they are used:
    `memory_plan` says how much of what, and `on_plan` is called with it before anything is read; `expert_store.stats`
    says what was read.

    Of such a model `routes` i16[T, layers, K], an earlier session's, say which experts to begin with; `route_slack`
    trades exactness for reads: see ExpertStore.

    `backend` is "cpu", "mlx" (Apple's GPUs), "vulkan" (a GPU, through wgpu; at most `vram_bytes` of its memory, the
    experts used last among them) or "auto", which takes a device where there is one. `on_backend` is told in a line
    what auto took and why, and what a backend could not take over without loss. With `gpu_layers` only so many of the
    last layers and the head are run there, the others by the CPU.

    A folder that `edge-moe export onnx` wrote runs through onnxruntime, which holds its weights in memory.

    Raises OptionError, FormatError, UnsupportedError, ReadError, DeviceError.
    """
    if threads is None:
        threads = default_threads()
    elif not 1 <= threads <= max_threads():
        raise OptionError(f"-t/--threads {threads}: this machine takes 1 to {max_threads()}")
    if not isinstance(path, Checkpoint | OnnxFolder):
        path = embedded_model_path() if path is None else Path(path)
        path = OnnxFolder(path) if path.is_dir() else open_checkpoint(path)
    return Model(
        path,
        threads=threads,
        context_length=context_length,
        kv=kv,
        ram_bytes=ram_bytes,
        route_slack=route_slack,
        routes=routes,
        on_plan=on_plan,
        backend=backend,
        vram_bytes=vram_bytes,
        gpu_layers=gpu_layers,
        on_backend=on_backend,
    )
