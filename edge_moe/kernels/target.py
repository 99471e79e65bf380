"""What the CPU that numba compiles for can do, as far as the vector code must know."""

from dataclasses import dataclass
from typing import Literal

from numba.core.registry import cpu_target

from edge_moe.kernels import jit  # noqa: F401 (it settles what numba compiles for)

# Features implied by a name given in NUMBA_CPU_NAME without NUMBA_CPU_FEATURES; other names get plain vector code.
_V2 = {"ssse3", "sse4.1"}
_V3 = _V2 | {"avx2", "f16c", "fma"}
_V4 = _V3 | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
_VNNI512 = _V4 | {"avx512vnni"}
_VBMI = _VNNI512 | {"avx512vbmi", "gfni"}
_FEATURES_OF_CPU = {
    "x86-64-v2": _V2,
    "nehalem": _V2,
    "x86-64-v3": _V3,
    "haswell": _V3,
    "skylake": _V3,
    "znver1": _V3,
    "znver2": _V3,
    "znver3": _V3,
    "alderlake": _V3 | {"avxvnni"},
    "x86-64-v4": _V4,
    "skylake-avx512": _V4,
    "cascadelake": _VNNI512,
    "icelake-server": _VBMI,
    "sapphirerapids": _VBMI,
    "emeraldrapids": _VBMI,
    "znver4": _VBMI,
    "znver5": _VBMI,
}

Dot = Literal["avx512vnni", "avxvnni", "avx512", "avx2", "ssse3", "usdot", "sdot", "plain"]


@dataclass(frozen=True)
class Target:
    """`dot`: how u8 x i8 products are summed; `shuffle`: how bytes are looked up; `registers`: of `register_bytes`."""

    dot: Dot
    shuffle: Literal["avx512", "avx2", "ssse3", "neon", "plain"]
    has_f16: bool
    register_bytes: int
    registers: int
    is_x86: bool = True
    has_vbmi: bool = False  # an instruction that picks bytes from all of two registers
    has_gfni: bool = False  # one that makes each bit of a byte of any of its bits
    # What is read once is best fetched past the second level of the cache. On Intel's CPUs it is not: their first level
    # waits for 16 lines at most, their second for 48 (two cores of an Emerald Rapids: 9 GB/s so, 24 into the second).
    reads_past_l2: bool = True

    @property
    def exact_u8(self) -> bool:
        """All 256 codes can be multiplied unsigned, without saturation in 16 bits."""
        return self.dot in ("avx512vnni", "avxvnni", "usdot", "plain")


def target_of(triple: str, features: set[str], cpu_name: str = "") -> Target:
    """The target with these LLVM feature names; a CPU that LLVM names by AMD's architectures is one of AMD's."""
    if triple.startswith(("aarch64", "arm64")):
        dot: Dot = "usdot" if "i8mm" in features else "sdot" if "dotprod" in features else "plain"
        return Target(dot, "neon", True, 16, 32, is_x86=False)
    if not triple.startswith("x86_64"):
        return Target("plain", "plain", False, 16, 32, is_x86=False)
    f16, is_amd = "f16c" in features, cpu_name.startswith(("znver", "bdver", "btver"))
    if {"avx512bw", "avx512vl"} <= features:
        dot = "avx512vnni" if "avx512vnni" in features else "avx512"
        has_vbmi, has_gfni = "avx512vbmi" in features, "gfni" in features
        return Target(dot, "avx512", f16, 64, 32, has_vbmi=has_vbmi, has_gfni=has_gfni, reads_past_l2=is_amd)
    if "avx2" in features:
        return Target("avxvnni" if "avxvnni" in features else "avx2", "avx2", f16, 32, 16, reads_past_l2=is_amd)
    kind: Literal["ssse3", "plain"] = "ssse3" if "ssse3" in features else "plain"
    return Target(kind, kind, f16, 16, 16, reads_past_l2=is_amd)


def current_target() -> Target:
    """The target numba compiles for now: the host, or what NUMBA_CPU_NAME and NUMBA_CPU_FEATURES say."""
    triple, cpu_name, feature_string = cpu_target.target_context.codegen().magic_tuple()
    features = {f[1:] for f in feature_string.split(",") if f.startswith("+")}
    return target_of(triple, features or set(_FEATURES_OF_CPU.get(cpu_name, ())), cpu_name)


TARGET = current_target()
