"""Vector operations, against numpy; and what they become for CPUs that this machine may not have."""

import os
import re
import subprocess
import sys
from pathlib import Path

import llvmlite.binding as llvm
import numba
import numpy as np
import pytest
from llvmlite import ir
from numba import types

from edge_moe.kernels import blocks, dots, file_numbers, picks, simd, tiles
from edge_moe.kernels.launch import compiled_address, launch
from edge_moe.kernels.simd import f32x16, i8x64, i16x16, i32x16, load, store, u8x64, u16x16
from edge_moe.kernels.target import TARGET, target_of


def apply(function, *arrays, result):
    """Run a jitted function of addresses on arrays; the last address is the result's."""
    arrays = [np.ascontiguousarray(a) for a in arrays]
    function(*(a.ctypes.data for a in arrays), result.ctypes.data)
    return result


@numba.njit
def _arithmetic(a, b, out):
    x, y = load(f32x16, a), load(f32x16, b)
    store(out, x + y)
    store(out + 64, x - y)
    store(out + 128, x * y)
    store(out + 192, simd.fma(x, y, x))
    store(out + 256, simd.rounded(x))
    store(out + 320, simd.absolute(x))
    store(out + 384, simd.larger(x, y))


def test_float_arithmetic():
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal(16).astype(np.float32) * 8 for _ in range(2))
    x[:4] = [0.5, 1.5, -0.5, -2.5]  # halves go to the even number
    found = apply(_arithmetic, x, y, result=np.empty((7, 16), np.float32))
    expected = [x + y, x - y, x * y, x * y + x, np.rint(x), np.abs(x), np.maximum(x, y)]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-5)


@numba.njit
def _integers(a, out):
    x = load(i32x16, a)
    store(out, (x << types.int32(3)) ^ (x & types.int32(255)) | types.int32(1))
    store(out + 64, x >> types.int32(5))
    store(out + 128, simd.convert(i32x16, simd.convert(i16x16, x)))
    store(out + 192, simd.convert(i32x16, simd.convert(f32x16, x)))


def test_integer_arithmetic():
    x = np.random.default_rng(1).integers(-(2**22), 2**22, 16, dtype=np.int32)
    found = apply(_integers, x, result=np.empty((4, 16), np.int32))
    expected = [(x << 3) ^ (x & 255) | 1, x >> 5, x.astype(np.int16).astype(np.int32), x]
    np.testing.assert_array_equal(found, expected)


@numba.njit
def _reductions(a, out):
    store(out, simd.reduce_add(load(f32x16, a)))
    store(out + 4, simd.reduce_max(load(f32x16, a)))


def test_reductions():
    x = np.arange(16, dtype=np.float32) - 3
    assert apply(_reductions, x, result=np.empty(2, np.float32)).tolist() == [x.sum(), x.max()]


@numba.njit
def _halves(a, out, n):
    for i in range(0, n, 16):
        store(out + 4 * i, file_numbers.from_half(load(u16x16, a + 2 * i)))
        for j in range(i, i + 16):
            store(out + 4 * (n + j), file_numbers.load_half(a + 2 * j))
        store(out + 4 * (2 * n + i), file_numbers.from_bfloat(load(u16x16, a + 2 * i)))


def test_every_half_precision_number():
    bits = np.arange(65536, dtype=np.uint16)
    found = np.empty((3, bits.size), np.float32)
    _halves(bits.ctypes.data, found.ctypes.data, bits.size)
    half = bits.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(found[0], half)
    np.testing.assert_array_equal(found[1], half)
    np.testing.assert_array_equal(found[2], (bits.astype(np.uint32) << 16).view(np.float32))


_lookup = file_numbers.table_lookup(range(-8, 120, 8))


@numba.njit
def _tables(a, out):
    store(out, _lookup(load(u8x64, a)))


def test_table_lookup():
    indices = np.random.default_rng(2).integers(0, 16, 64, dtype=np.uint8)
    found = apply(_tables, indices, result=np.empty(64, np.int8))
    np.testing.assert_array_equal(found, np.arange(-8, 120, 8)[indices])


@numba.njit
def _bits(codes, words, out):
    found = file_numbers.add_bits(load(u8x64, codes), load(types.uint32, words), load(types.uint32, words + 4), 16)
    store(out, found)


def test_add_bits():
    rng = np.random.default_rng(3)
    codes, words = rng.integers(0, 16, 64, dtype=np.uint8), rng.integers(0, 2**32, 2, dtype=np.uint32)
    found = apply(_bits, codes, words, result=np.empty(64, np.uint8))
    np.testing.assert_array_equal(found, codes + 16 * np.unpackbits(words.view(np.uint8), bitorder="little"))


_left, _right = simd.shifter((-4, -2, 0, 0)), simd.shifter((0, 0, 4, 6))
_some_bits = simd.masker((15, 240))


@numba.njit
def _shift_and_mask(a, out):
    v = load(simd.u16x16, a)
    store(out, _left(v))
    store(out + 32, _right(v))
    store(out + 64, _some_bits(v))


def test_shifts_and_masks_of_parts():
    a = np.random.default_rng(7).integers(0, 2**16, 16, dtype=np.uint16)
    left, right, masked = apply(_shift_and_mask, a, result=np.empty((3, 16), np.uint16))
    np.testing.assert_array_equal(left, a << np.repeat([4, 2, 0, 0], 4).astype(np.uint16))
    np.testing.assert_array_equal(right, a >> np.repeat([0, 0, 4, 6], 4).astype(np.uint16))
    np.testing.assert_array_equal(masked, a & np.repeat([15, 240], 8).astype(np.uint16))


_PICKED = np.random.default_rng(8).integers(0, 64, 64).tolist()
_picked_bytes, _picked_words = picks.whole_picker(_PICKED), picks.whole_picker([i // 2 for i in _PICKED[:32]])
_widened = picks.widener(_PICKED[32:])


@numba.njit
def _pick(a, out):
    store(out, _picked_bytes(load(u8x64, a)))
    store(out + 64, _picked_words(load(simd.i16x32, a)))
    store(out + 128, _widened(load(u8x64, a)))


def test_picks_of_whole_registers():
    a = np.random.default_rng(9).integers(0, 256, 64, dtype=np.uint8)
    octets, words, wide = apply(_pick, a, result=np.empty((3, 64), np.uint8))
    np.testing.assert_array_equal(octets, a[_PICKED])
    np.testing.assert_array_equal(words.view(np.int16), a.view(np.int16)[[i // 2 for i in _PICKED[:32]]])
    np.testing.assert_array_equal(wide.view(np.int16), a[_PICKED[32:]])


_FIELDS = [((0,), 15), ((0, 4), 15), ((0, 4, 0, 4), 15), ((0, 2), 3), ((0, 1), 1), ((0, 2), 16)]


@pytest.mark.parametrize(("shifts", "mask"), _FIELDS)
@pytest.mark.parametrize("kind", [u8x64, simd.u8x32], ids=["64", "32"])
def test_bit_fields(shifts, mask, kind):
    """All bytes, shifted by each part's constant and by one number more, as far as the bits are all of one byte."""
    field = file_numbers.bit_field(shifts, mask)

    @numba.njit
    def fields(a, more, out):
        for i in range(0, 256, kind_lanes):
            store(out + i, field(load(kind, a + i), more))

    kind_lanes, a, found = kind.lanes, np.arange(256, dtype=np.uint8), np.empty(256, np.uint8)
    by = np.repeat(shifts, kind_lanes // len(shifts))
    for more in range(9 - max(shifts) - mask.bit_length()):
        fields(a.ctypes.data, more, found.ctypes.data)
        np.testing.assert_array_equal(found, (a >> np.tile(by + more, 256 // kind_lanes)) & mask)


@pytest.mark.parametrize(("shifts", "mask"), [((-4, -2), 0x30), ((0, 2), 0x30), ((1, -1, 7, 0), 255)])
@pytest.mark.parametrize("kind", [u8x64, simd.u8x32], ids=["64", "32"])
def test_bit_movers(shifts, mask, kind):
    """As far as the bits are all of one byte."""
    move = file_numbers.bit_mover(shifts, mask)

    @numba.njit
    def moved(a, out):
        for i in range(0, 256, kind_lanes):
            store(out + i, move(load(kind, a + i)))

    kind_lanes, found = kind.lanes, np.empty(256, np.uint8)
    by = np.tile(np.repeat(shifts, kind_lanes // len(shifts)), 256 // kind_lanes)
    a = np.arange(256) & (mask << np.maximum(by, 0) >> np.maximum(-by, 0))
    octets = a.astype(np.uint8)
    moved(octets.ctypes.data, found.ctypes.data)
    np.testing.assert_array_equal(found, (a << np.maximum(-by, 0)) >> np.maximum(by, 0))


_OF_FOUR = np.random.default_rng(10).integers(-64, 256, 64).clip(-1).tolist()
_STARTS = np.random.default_rng(11).integers(-8, 64, 64).tolist()
_quartet_picked, _pair_picked = picks.quartet_picker(_OF_FOUR), picks.pair_picker([i // 2 for i in _OF_FOUR])
_bits_picked = picks.bits_picker(_STARTS)


@numba.njit
def _pick_of_many(a, out):
    of_four = _quartet_picked(load(u8x64, a), load(u8x64, a + 64), load(u8x64, a + 128), load(u8x64, a + 192))
    store(out, of_four)
    store(out + 64, _pair_picked(load(u8x64, a), load(u8x64, a + 64)))
    store(out + 128, _bits_picked(load(u8x64, a)))


@pytest.mark.skipif(not TARGET.has_vbmi, reason="what these are for has AVX512-VBMI")
def test_picks_of_several_registers():
    a = np.random.default_rng(12).integers(0, 256, 256, dtype=np.uint8)
    of_four, of_two, bits = apply(_pick_of_many, a, result=np.empty((3, 64), np.uint8))
    np.testing.assert_array_equal(of_four, np.where(np.array(_OF_FOUR) < 0, 0, a[_OF_FOUR]))
    halves = np.array(_OF_FOUR) // 2
    np.testing.assert_array_equal(of_two, np.where(halves < 0, 0, a[halves]))
    wanted = []
    for i, start in enumerate(_STARTS):
        own = np.unpackbits(a[i // 8 * 8 :][:8], bitorder="little")
        wanted.append(np.packbits(own[(start + np.arange(8)) % 64], bitorder="little")[0])
    np.testing.assert_array_equal(bits, wanted)


@numba.njit
def _transpose(a, out):
    tiles.transpose_16x16(a, out)


def test_transpose():
    rows = np.random.default_rng(4).integers(0, 2**31, (16, 16), dtype=np.int32)
    np.testing.assert_array_equal(apply(_transpose, rows, result=np.empty((16, 16), np.int32)), rows.T)


@numba.njit
def _dot(fmt, plan):
    codes = load(u8x64, load(types.int64, plan))
    store(load(types.int64, plan + 16), dots.dot(fmt, codes, load(i8x64, load(types.int64, plan + 8))))
    return 0


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("fmt", [blocks.Q4_0, blocks.Q6_K, blocks.Q8_0], ids=lambda f: f.format_name)
def test_dot_products(fmt, extreme):
    """Exact, also at the ends of the range, where sums of 16 bits could overflow."""
    rng = np.random.default_rng(5)
    low, high = (-128, 127) if fmt.signed else (0, fmt.max_code)
    codes, x = rng.integers(low, high + 1, 64), rng.integers(-127, 128, 64, dtype=np.int8)
    if extreme:
        codes[:], x[:] = (low if fmt.signed else high), -127
    stored = (codes + (dots.SIGN_BIAS if fmt.signed else 0)).astype(np.uint8)
    found = np.empty(16, np.int32)
    plan = np.array([stored.ctypes.data, x.ctypes.data, found.ctypes.data])
    launch(compiled_address(_dot, fmt), plan.ctypes.data, 1, 0, 1)
    expected = codes + (dots.SIGN_BIAS if fmt.signed else 0)
    np.testing.assert_array_equal(found, (expected * x).reshape(16, 4).sum(1))


def test_targets():
    assert target_of("x86_64-unknown-linux-gnu", {"avx2"}, "znver3").reads_past_l2
    assert not target_of("x86_64-unknown-linux-gnu", {"avx2"}, "raptorlake").reads_past_l2
    assert target_of("x86_64-unknown-linux-gnu", {"avx2", "f16c", "ssse3"}).dot == "avx2"
    assert target_of("x86_64-unknown-linux-gnu", {"avx512bw", "avx512vl", "avx512vnni", "avx2"}).dot == "avx512vnni"
    assert target_of("x86_64-pc-windows-msvc", {"avx2", "avxvnni"}).dot == "avxvnni"
    assert target_of("x86_64-unknown-linux-gnu", set()).dot == "plain"
    assert target_of("arm64-apple-darwin", {"dotprod"}).dot == "sdot"
    assert target_of("aarch64-unknown-linux-gnu", {"dotprod", "i8mm"}).dot == "usdot"
    assert target_of("riscv64-unknown-linux-gnu", set()).dot == "plain"


@pytest.mark.parametrize(("dot", "lanes"), [("avx512vnni", 16), ("avxvnni", 8)])
def test_dots_are_declared_as_older_llvms_know_them(dot, lanes, monkeypatch):
    """With words of four bytes, which newer LLVMs take as well: numba 0.61 brings LLVM 15, later ones up to 22."""
    features = {"avx2", "avx512bw", "avx512vl", "avx512vnni"} if dot == "avx512vnni" else {"avx2", "avxvnni"}
    monkeypatch.setattr(dots, "TARGET", target_of("x86_64-unknown-linux-gnu", features))
    monkeypatch.setattr(simd, "TARGET", dots.TARGET)
    module = ir.Module()
    kinds = [simd.llvm_type(kind) for kind in (i32x16, u8x64, i8x64)]
    function = ir.Function(module, ir.FunctionType(kinds[0], kinds), "sums")
    builder = ir.IRBuilder(function.append_basic_block())
    builder.ret(dots._add_dot(builder, *function.args))
    words = f"<{lanes} x i32>"
    (declared,) = re.findall(r'declare (.*) @"?llvm\.x86\.avx512\.vpdpbusd\.\d+"?\((.*)\)', str(module))
    assert declared[0] == words and re.findall(r"<.*?>", declared[1]) == [words] * 3


AVX512 = "avx2,f16c,fma,ssse3,avx512f,avx512bw,avx512vl,avx512dq"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("triple", "cpu", "features", "pattern"),
    [
        ("x86_64-unknown-linux-gnu", "znver4", f"{AVX512},avx512vnni", r"vpdpbusd\s+\d*\(%r\w+,%r\w+\)\{1to16\}, %zmm"),
        ("x86_64-unknown-linux-gnu", "skylake-avx512", AVX512, r"vpmaddubsw.*%zmm"),
        ("x86_64-unknown-linux-gnu", "alderlake", "avx2,f16c,fma,ssse3,avxvnni", r"vpdpbusd.*%ymm"),
        ("aarch64-unknown-linux-gnu", "generic", "neon,dotprod,fullfp16", r"\tsdot\tv\d+\.4s, v\d+\.16b, v\d+\.16b"),
        ("aarch64-unknown-linux-gnu", "generic", "neon,dotprod,i8mm", r"\tusdot\tv\d+\.4s, v\d+\.16b, v\d+\.16b"),
    ],
    ids=["avx512vnni", "avx512", "avxvnni", "sdot", "usdot"],
)
def test_assembly(triple, cpu, features, pattern):
    """A product's inner loops use the CPU's dot products: 8 steps times all tokens of a tile, and some for one row."""
    assert len(re.findall(pattern, assembly("Q4_K", triple, cpu, features))) >= 64


@pytest.mark.slow
def test_assembly_of_tiles_with_few_registers():
    """Sums of products stay in registers: LLVM alone began with several steps at once, and stored and loaded sums."""
    text = assembly("Q4_K", "x86_64-unknown-linux-gnu", "haswell", "avx2,f16c,fma,ssse3")
    assert len(re.findall(r"vpmaddubsw.*%ymm", text)) >= 64
    assert len(re.findall(r"vpaddw.*%ymm", text)) >= 56
    assert not re.search(r"vpaddw\s+-?\d*\(%r[sb]p\)", text)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Q5_K", "Q6_K", "Q8_0", "Q5_0", "Q4_0", "IQ4_NL"])
def test_assembly_of_other_formats(name):
    """The same with AVX512-VNNI: whole registers of dot products, a number for all rows spread by the product."""
    text = assembly(name, "x86_64-unknown-linux-gnu", "znver4", f"{AVX512},avx512vnni")
    assert len(re.findall(r"vpdpbusd\s+\d*\(%r\w+,%r\w+\)\{1to16\}, %zmm", text)) >= 32


@pytest.mark.slow
@pytest.mark.parametrize(("name", "wide"), [("Q4_K", r"vpackssdw.*%zmm"), ("Q5_0", r"vpermb.*%zmm")])
def test_assembly_of_wide_rows(name, wide):
    """What the forms for long registers are made of; without byte permutations blocks of 32 have none."""
    features = f"{AVX512},avx512vnni"
    text = assembly(name, "x86_64-unknown-linux-gnu", "znver4", f"{features},avx512vbmi,gfni")
    assert len(re.findall(wide, text)) >= 8
    assert len(re.findall(r"vgf2p8affineqb.*%zmm", text)) >= 8  # nibbles in one step
    if name == "Q4_K":  # scales are picked and widened in one step
        assert len(re.findall(r"vpermb.*%zmm\d+ \{%k\d\} \{z\}", text)) >= 8
    if name == "Q5_0":
        assert not re.search(wide, assembly(name, "x86_64-unknown-linux-gnu", "cascadelake", features))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cpu", "features", "fetch", "n_lines"),  # a step's of four superblocks of 144 bytes, or of two
    [
        ("znver5", f"{AVX512},avx512vnni,avx512vbmi", "nta", 9),
        ("emeraldrapids", f"{AVX512},avx512vnni,avx512vbmi", "t1", 9),
        ("alderlake", "avx2,f16c,fma,ssse3,avxvnni", "t1", 5),
    ],
)
def test_assembly_of_fetches(cpu, features, fetch, n_lines):
    """Weights are asked for into the level of the cache that keeps more of them under way: the second on Intel's."""
    text = assembly("Q4_K", "x86_64-unknown-linux-gnu", cpu, features)
    kinds = re.findall(r"prefetch(nta|t1|t2)\b", text)
    assert set(kinds) <= {fetch, "t1"}  # rows of a panel always into the second
    assert kinds.count(fetch) >= n_lines
    # what was asked for into the second level is asked for into the first, 2 KB before it is read
    again = [int(offset) for offset in re.findall(r"prefetcht0\s+(2[0-9]{3})\(", text)]
    assert len(again) >= n_lines and {offset % 64 for offset in again} == {0} if fetch == "t1" else not again


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q5_0", "Q8_0", "F16"])
@pytest.mark.parametrize(
    ("cpu", "features"),
    [("emeraldrapids", f"{AVX512},avx512vnni,avx512vbmi"), ("haswell", "avx2,f16c,fma,ssse3")],
)
def test_assembly_spreads_requests(name, cpu, features):
    """Few lines are asked for at a time, with arithmetic between: LLVM puts them all together if it may."""
    text = assembly(name, "x86_64-unknown-linux-gnu", cpu, features)
    longest = n = 0
    for line in text.splitlines():
        if re.search(r"prefetcht1\s+\d*\(%r\w+,%r\w+\)", line):  # of rows; a panel's are one behind the other
            n += 1
        elif re.search(r"%[xyz]mm|:$", line):
            longest, n = max(longest, n), 0
    assert 0 < longest <= 3


def assembly(format_name, triple, cpu, features):
    """A product's machine code for another CPU, as text."""
    try:
        llvm.initialize_all_targets()
        llvm.Target.from_triple(triple)
    except RuntimeError:
        pytest.skip(f"this LLVM does not know {triple}")
    script = Path(__file__).with_name("product_assembly.py")
    command = [sys.executable, str(script), format_name, triple, cpu, features]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, env=os.environ.copy())
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
