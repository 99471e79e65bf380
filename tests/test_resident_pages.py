"""Pages of a mapped file that are in memory are mapped in the background, and nothing is read or broken by that."""

import ctypes
import gc
import mmap
import os
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
from gguf_files import write_tiny_deepseek2

import edge_moe
from edge_moe import api, memory_plan, resident_pages
from edge_moe.errors import OptionError
from edge_moe.gguf import open_gguf
from edge_moe.resident_pages import map_resident_pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what its page cache holds")
MIB = 1 << 20
HUGE_BYTES = 1 << 37  # of a file of one hole


class Owner:
    """Something that can be gone."""


def map_file(path):
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def rss_bytes(data):
    """How much of a mapping u8[n] is mapped: its Rss in /proc/self/smaps."""
    begins = f"{data.ctypes.data:x}-"
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    next(line for line in lines if line.startswith(begins))
    return 1024 * int(next(line for line in lines if line.startswith("Rss:")).split()[1])


def in_cache(path):
    """bool[pages]: what the page cache holds of a file, asked by a mapping of its own."""
    data = map_file(path)
    states = np.zeros(-(-data.size // mmap.PAGESIZE), np.uint8)
    pointers = [ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(data.size), ctypes.c_void_p(states.ctypes.data)]
    assert ctypes.CDLL(None).mincore(*pointers) == 0
    return states & 1 == 1


def write(path, n_bytes):
    with path.open("wb") as file:
        for start in range(0, n_bytes, MIB):
            file.write(np.full(min(MIB, n_bytes - start), start // MIB % 251, np.uint8).tobytes())
        file.flush()
        os.fsync(file.fileno())
    return path


def run(maps, owner=None):
    owner = owner or Owner()
    thread = map_resident_pages(owner, maps)
    if thread is not None:
        thread.join(60)
        assert not thread.is_alive()
    return thread


def works(tmp_path):
    """Whether this kernel can do it at all."""
    data = map_file(write(tmp_path / "probe", MIB))
    return ctypes.CDLL(None).madvise(ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(MIB), 22) == 0


@pytest.mark.parametrize("n_bytes", [1, 4096, 5 * MIB + 1, 16 * MIB, 32 * MIB - 1, 161 * MIB + 5000])
def test_all_that_is_in_memory_is_mapped(tmp_path, n_bytes):
    if not works(tmp_path):
        pytest.skip("a kernel before 5.14")
    path = write(tmp_path / "file", n_bytes)
    if not in_cache(path).all():
        pytest.skip("the system did not keep what was just written")
    data = map_file(path)
    assert rss_bytes(data) == 0
    assert run({path: data}) is not None
    assert rss_bytes(data) == -(-n_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


def test_what_is_not_in_memory_is_not_read(tmp_path):
    """Not even by reading ahead: the last pages that were read carry the mark that would start it."""
    if not works(tmp_path):
        pytest.skip("a kernel before 5.14")
    path = write(tmp_path / "file", 256 * MIB)
    file = os.open(path, os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    if in_cache(path).any():
        os.close(file)
        pytest.skip("this file system keeps its files in memory")
    for start in range(0, 50 * MIB, MIB):
        os.pread(file, MIB, start)
    for start in range(140 * MIB, 200 * MIB, MIB):
        os.pread(file, MIB, start)
    os.close(file)
    time.sleep(0.1)  # the reading ahead of that
    before = in_cache(path)
    assert not before.all()
    data = map_file(path)
    run({path: data})
    time.sleep(0.1)
    assert np.array_equal(in_cache(path), before)
    mapped = rss_bytes(data)
    # 0 to 32 and 144 to 176 MiB at least are whole pieces with a whole one behind them
    assert 64 * MIB <= mapped <= before.sum() * mmap.PAGESIZE


def test_a_kernel_that_cannot_is_left_alone(tmp_path, monkeypatch):
    path = write(tmp_path / "file", MIB)
    data = map_file(path)
    monkeypatch.setattr(resident_pages, "_POPULATE_READ", 12345)  # EINVAL, as for 22 before 5.14
    assert run({path: data}) is not None
    assert rss_bytes(data) == 0


def test_a_system_without_these_calls_is_left_alone(tmp_path, monkeypatch):
    path = write(tmp_path / "file", MIB)

    class Library:
        def __init__(self, *args, **options):
            pass

    monkeypatch.setattr(ctypes, "CDLL", Library)
    assert map_resident_pages(Owner(), {path: map_file(path)}) is None
    monkeypatch.setattr(resident_pages.sys, "platform", "darwin")
    assert map_resident_pages(Owner(), {}) is None


def test_where_no_thread_can_start_nothing_happens(tmp_path, monkeypatch):
    path = write(tmp_path / "file", MIB)

    def start(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(resident_pages.Thread, "start", start)
    assert map_resident_pages(Owner(), {path: map_file(path)}) is None


def test_a_file_that_is_gone_or_cut_does_no_harm(tmp_path):
    path = write(tmp_path / "file", 64 * MIB)
    data = map_file(path)
    os.truncate(path, 8 * MIB)
    run({path: data})
    assert rss_bytes(data) <= 8 * MIB
    path.unlink()
    assert map_resident_pages(Owner(), {path: data}) is None


def test_of_files_of_others_the_kernel_is_not_asked(tmp_path, monkeypatch):
    """It would say that all of them is in memory."""
    path = write(tmp_path / "file", MIB)
    data = map_file(path)
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    monkeypatch.setattr(os, "access", lambda *args, **options: False)
    run({path: data})
    assert rss_bytes(data) == 0


def hole(path):
    with path.open("wb") as file:
        file.truncate(HUGE_BYTES)
    return path


def test_it_ends_with_its_owner_and_lets_go_of_the_mapping(tmp_path, monkeypatch):
    path = hole(tmp_path / "file")
    data, owner, steps = map_file(path), Owner(), threading.Semaphore(0)

    def step(data, first, ask, advise):
        steps.release()
        time.sleep(0.01)

    monkeypatch.setattr(resident_pages, "_map_step", step)
    thread = map_resident_pages(owner, {path: data})
    for _ in range(5):
        assert steps.acquire(timeout=60)
    assert thread.is_alive()
    mapped = weakref.ref(data)
    del owner, data
    thread.join(5)  # of ten seconds
    assert not thread.is_alive()
    del thread
    gc.collect()
    assert mapped() is None


EXIT = """
import sys, mmap, pathlib, time
import numpy as np
from edge_moe.resident_pages import map_resident_pages
path = pathlib.Path(sys.argv[1])
with path.open("rb") as file:
    data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
class Owner: pass
owner = Owner()
thread = map_resident_pages(owner, {path: data})
print(thread.is_alive())
"""


def test_a_program_that_ends_does_not_wait_for_it(tmp_path):
    path = hole(tmp_path / "file")
    command = [sys.executable, "-W", "error", "-c", EXIT, path]
    for _ in range(3):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


# ---- of models


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "resident pages"]


def test_a_model_that_fits_into_memory_is_mapped(tmp_path):
    if not works(tmp_path):
        pytest.skip("a kernel before 5.14")
    path = tmp_path / "model.gguf"
    path.write_bytes(api.embedded_model_path().read_bytes())
    model = edge_moe.load(path, threads=1)
    for thread in threads():
        thread.join(60)
    (data,) = model.checkpoint.maps.values()
    assert data.size == path.stat().st_size
    assert rss_bytes(data) == -(-data.size // mmap.PAGESIZE) * mmap.PAGESIZE


def test_a_model_under_a_budget_is_not(monkeypatch):
    called = []
    monkeypatch.setattr(api, "map_resident_pages", lambda owner, maps: called.append(maps))
    monkeypatch.setattr(memory_plan, "PROCESS_BYTES", 8 << 30)  # the same at each load, whatever the tests before took
    monkeypatch.setattr(memory_plan, "_SLACK", 0)
    with pytest.raises(OptionError, match="expected at least") as error:
        edge_moe.load(ram_bytes=MIB, context_length=64)
    least = float(str(error.value).split("expected at least ")[1].split("G")[0])
    model = edge_moe.load(ram_bytes=int((least + 0.002) * (1 << 30)), context_length=64)
    assert model.expert_store is not None
    assert not called
    edge_moe.load(context_length=64)
    assert len(called) == 1


def test_all_parts_of_a_split_model_are_known(tmp_path):
    write_tiny_deepseek2(tmp_path / "model.gguf", tensors_per_part=8)
    parts = sorted(tmp_path.glob("*.gguf"))
    opened = open_gguf(parts[0])
    assert len(parts) > 1
    assert list(opened.maps) == parts
    assert [data.size for data in opened.maps.values()] == [part.stat().st_size for part in parts]


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this kernel has no huge pages")
def test_the_file_may_be_read_by_huge_pages(tmp_path):
    """The mapping of a model says so to the kernel: flag hg."""
    path = tmp_path / "tiny.gguf"
    write_tiny_deepseek2(path)
    (mapped,) = open_gguf(path).maps.values()
    begins = f"{mapped.ctypes.data:x}-"
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    next(line for line in lines if line.startswith(begins))
    assert "hg" in next(line for line in lines if line.startswith("VmFlags:")).split()
