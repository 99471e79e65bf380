"""All numba flags, and the cache of compiled kernels in the user's cache folder."""

import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import llvmlite.binding
import numba
import platformdirs
from numba import _dynfunc  # type: ignore[attr-defined]
from numba.core.caching import CompileResultCacheImpl, FunctionCache, IndexDataCacheFile, _CacheLocator
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.registry import CPUDispatcher
from numba.extending import overload_method, register_jitable

F = TypeVar("F", bound=Callable[..., Any])

FLAGS: dict[str, Any] = {
    "nogil": True,  # I/O and other requests go on while a kernel runs
    # LLVM would add and fuse in one order here and in another there: which copy of a helper a kernel gets depends on
    # what was compiled before it, and results with it. Kernels say what is a vector's sum and what is fused.
    "fastmath": False,
    "error_model": "numpy",  # no branch for division by zero in inner loops
    "boundscheck": False,  # shapes and offsets are checked before a kernel is called
}
# GNU OpenMP spins for milliseconds at the end of a parallel loop: on a machine that does other work as well, threads
# that wait hold up those that compute (tiny model, 2 threads, 2 busy cores: 5 tok/s spinning so, 100 tok/s not).
# It reads this when it is loaded, which numba does at the first parallel loop.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# LLVM picks a byte out of a vector by EXTRQ where the CPU has SSE4a. That is no AVX instruction, and on AMD's Zen 3 one
# of them in a loop over AVX registers makes a product of Q4_K four times slower.
if numba.config.CPU_NAME is None and numba.config.CPU_FEATURES is None:  # type: ignore[attr-defined]
    _features = llvmlite.binding.get_host_cpu_features()
    if "sse4a" in _features:
        _features["sse4a"] = False
        numba.config.CPU_FEATURES = _features.flatten()  # type: ignore[attr-defined]
STALE_S = 30 * 86400
_KERNELS_DIR = Path(__file__).parent
_observers: list[Callable[[str], None]] = []


class _PartLibrary(JITCodeLibrary):
    """The code of a helper for the kernels that hold it, as LLVM's instructions: never made machine code by itself."""

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._verify_declare_only_symbols()
        self._finalized = True


def _no_executable(library: Any, fndesc: Any, env: Any) -> Any:
    """In place of numba's CPUContext.get_executable: what stands for a helper where numba wants its Python function."""
    name = fndesc.qualname.rpartition(".")[2]
    return _dynfunc.make_function(fndesc.lookup_module(), name, f"part of kernels: {name}", 0, env, (library,))


class _PartCompiler(Compiler):
    """numba's compiler for helpers that only kernels call: about half of the time went to machine code unused."""

    def compile_extra(self, func: Any) -> Any:
        context = self.state.targetctx
        self.state.targetctx = context.subtarget(get_executable=_no_executable)
        self.state.library = _PartLibrary(context.codegen(), func.__qualname__)
        return super().compile_extra(func)


class _Part(CPUDispatcher):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{self.py_func.__name__} is a part of kernels: only they can call it")


_PART_FLAGS: dict[str, Any] = {"pipeline_class": _PartCompiler, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def _part(function: F, **flags: Any) -> F:
    dispatcher: Any = numba.njit(**FLAGS, **_PART_FLAGS, **flags)(function)
    dispatcher.__class__ = _Part
    return cast(F, dispatcher)


def kernel(function: F) -> F:
    """Compile a kernel that runs on the calling thread."""
    return _cached(numba.njit(**FLAGS)(function))


def parallel_kernel(function: F) -> F:
    """Compile a kernel whose `prange` loops run on all threads; each iteration must own its output."""
    return _cached(numba.njit(parallel=True, **FLAGS)(function))


def inline_kernel(function: F) -> F:
    """Compile a helper that only other kernels call: not cached by itself, since it is part of its callers."""
    return _part(function)


def inlined_kernel(function: F) -> F:
    """An `inline_kernel` that its callers hold in machine code as well: a function takes and gives tiles by memory."""
    return _part(function, forceinline=True)


def kernel_method(kind: Any, name: str, **flags: Any) -> Callable[[F], F]:
    """Like numba's overload_method, for a method of a format that only kernels call."""
    overload: Callable[..., Callable[[F], F]] = overload_method
    return overload(kind, name, jit_options=_PART_FLAGS | flags)


def inlined_method(kind: Any, name: str) -> Callable[[F], F]:
    """A `kernel_method` that is called for each row: a call would cost as much as a tenth of a row."""
    return kernel_method(kind, name, forceinline=True)


def both_sides(function: F) -> F:
    """A rule about whole numbers (sizes, offsets) that Python and kernels share."""
    return register_jitable(pipeline_class=_PartCompiler)(function)


def spliced_kernel(function: F) -> F:
    """A helper with one caller, spliced into it before compilation: cheaper to compile than a function of its own."""
    return numba.njit(inline="always", **FLAGS)(function)


@contextmanager
def observe_compilation(callback: Callable[[str], None]) -> Iterator[None]:
    """Call `callback(kernel_name)` each time a kernel is about to be compiled rather than loaded from the cache."""
    _observers.append(callback)
    try:
        yield
    finally:
        _observers.remove(callback)


def cache_dir() -> Path:
    """Folder of compiled kernels; EDGE_MOE_CACHE_DIR names another place for all that edge_moe caches."""
    root = os.environ.get("EDGE_MOE_CACHE_DIR") or platformdirs.user_cache_dir("edge-moe", appauthor=False)
    return Path(root) / "kernels"


def is_kept(function: Any, signature: tuple[Any, ...]) -> bool:
    """A kernel is compiled for the types, in this process or in the cache; or there is no cache to share."""
    kept = function._cache
    return signature in function.overloads or not isinstance(kept, _KernelCache) or kept.has(function, signature)


@cache
def _source_hash(path: Path) -> str:
    """Hash of a kernel module and the kernel modules it imports: numba alone would look at the first only."""
    seen: set[Path] = set()
    pending = [path]
    while pending:
        current = pending.pop()
        if current in seen or not current.exists():
            continue
        seen.add(current)
        text = current.read_text(encoding="utf-8")
        for package, dotted, listed in re.findall(
            r"(edge_moe\.kernels|edge_moe_quant)(?:\.(\w+)| import ([\w, ]+))", text
        ):
            folder = _KERNELS_DIR if package == "edge_moe.kernels" else path.parent
            pending += [folder / f"{name.strip()}.py" for name in (dotted or listed).split(",")]
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__}".encode())
    for source in sorted(seen):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


class _Locator(_CacheLocator):
    def __init__(self, py_func: Any, py_file: str) -> None:
        self._path, self._py_file = Path(py_file), py_file  # the second name is numba's

    def get_cache_path(self) -> str:
        return str(cache_dir() / f"{self._path.stem}-{_source_hash(self._path)}")

    def get_source_stamp(self) -> str:
        return _source_hash(self._path)

    def get_disambiguator(self) -> None:
        return None

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> "_Locator | None":
        locator = cls(py_func, py_file)
        try:
            locator.ensure_cache_path()
        except OSError:
            return None
        return locator


class _CacheImpl(CompileResultCacheImpl):
    _locator_classes = [_Locator]  # noqa: RUF012 (numba's own interface)


class _KernelCache(FunctionCache):
    _impl_class = _CacheImpl

    def _choose_files(self, sig: Any, codegen: Any) -> None:
        """A signature has files of its own: of two processes that compile at once, each would number its files so."""
        key = hashlib.sha256(repr(self._index_key(sig, codegen)).encode()).hexdigest()[:16]
        name = f"{self._impl.filename_base}-{key}"
        self._cache_file = IndexDataCacheFile(self.cache_path, name, self._impl.locator.get_source_stamp())

    def has(self, function: Any, signature: tuple[Any, ...]) -> bool:
        self._choose_files(signature, function.targetctx.codegen())
        return Path(self._cache_file._index_path).exists()

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        self._choose_files(sig, target_context.codegen())
        try:
            found = super().load_overload(sig, target_context)
        except Exception:  # a cache file cut short by a crash must cost a compilation, not the run
            found = None
            with suppress(OSError):
                self.flush()
        if found is None:
            for observer in _observers:
                observer(self._py_func.__name__)
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        self._choose_files(sig, data.codegen)
        try:
            super().save_overload(sig, data)
            _remove_stale(Path(self.cache_path))
        except OSError:  # a full or read-only disk: run uncached
            self.disable()


def _remove_stale(current: Path) -> None:
    """Remove what other versions of a module compiled, if nothing was added there for a month."""
    module = current.name.rpartition("-")[0]
    for folder in current.parent.glob(f"{module}-*"):
        if folder != current and time.time() - folder.stat().st_mtime > STALE_S:
            shutil.rmtree(folder, ignore_errors=True)


def _cached(dispatcher: Any) -> Any:
    with suppress(RuntimeError):  # raised where no folder can be written: then each start compiles
        dispatcher._cache = _KernelCache(dispatcher.py_func)
    return dispatcher
