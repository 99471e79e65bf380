"""The cache of compiled kernels, in processes of their own with a folder of their own."""

import os
import subprocess
import sys
import time

import pytest
from numba.core.registry import cpu_target

from edge_moe.kernels import jit  # noqa: F401 (settles what numba compiles for)
from edge_moe.kernels.launch import take_items

# Runs one small kernel and prints what was compiled rather than loaded.
SCRIPT = """
import numpy as np
from edge_moe.kernels.jit import observe_compilation
from edge_moe.kernels.elementwise import store_bf16
with observe_compilation(lambda name: print("compiled", name)):
    out = np.zeros((1, 2), np.uint16)
    store_bf16(np.array([[1.0, -2.0]], np.float32), out)
print(out.tolist())
"""
RESULT = "[[16256, 49152]]"


def run(cache, **settings):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {"EDGE_MOE_CACHE_DIR": str(cache)} | settings,
        capture_output=True,
        text=True,
        check=True,
    )
    *compiled, result = done.stdout.split("\n")[:-1]
    assert result == RESULT
    return compiled


def test_second_process_loads_what_the_first_compiled(tmp_path):
    assert run(tmp_path) == ["compiled store_bf16"]
    assert run(tmp_path) == []


def test_a_cache_file_cut_short_is_compiled_again(tmp_path):
    run(tmp_path)
    files = list(tmp_path.rglob("*.nbc"))
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[:100])
    assert run(tmp_path) == ["compiled store_bf16"]
    assert run(tmp_path) == []


def test_a_cut_index_is_made_again(tmp_path):
    run(tmp_path)
    for file in tmp_path.rglob("*.nbi"):
        file.write_bytes(b"")
    assert run(tmp_path) == ["compiled store_bf16"]


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="a folder that nobody can make is made this way on Unix only")
def test_without_a_folder_each_start_compiles(tmp_path):
    (tmp_path / "file").write_text("")
    run(tmp_path / "file")
    run(tmp_path / "file")


def test_what_old_versions_left_is_removed_in_time(tmp_path):
    old, recent, other = (
        tmp_path / "kernels" / name for name in ("elementwise-0123", "elementwise-4567", "attention-0123")
    )
    for folder in (old, recent, other):
        folder.mkdir(parents=True)
    two_months_ago = time.time() - 60 * 86400
    for folder in (old, other):
        os.utime(folder, (two_months_ago, two_months_ago))
    run(tmp_path)
    assert not old.exists()
    assert recent.exists()
    assert other.exists()  # its turn comes when that module compiles something


TWO_AT_ONCE = """
import numpy as np
from numba.core.caching import IndexDataCacheFile
from edge_moe.kernels import jit
def add_one(x):
    return x + 1
whole, real = jit.kernel(add_one), jit.kernel(add_one)
saved = IndexDataCacheFile.save
def save(self, key, data):  # the other process looks at the index while this one is about to write it
    IndexDataCacheFile.save = saved
    index = self._load_index()
    real(1.5)
    self._load_index = lambda: index
    saved(self, key, data)
IndexDataCacheFile.save = save
whole(1)
again = jit.kernel(add_one)
print(again(1), again(1.5), sum(again.stats.cache_hits.values()))
"""


def test_two_processes_that_compile_at_once_keep_their_code_apart(tmp_path):
    """Both numbered their files by the same index: one's code was then found under the other's signature."""
    (tmp_path / "script.py").write_text(TWO_AT_ONCE)
    env = os.environ | {"EDGE_MOE_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "2 2.5 2\n"


def test_a_part_of_kernels_is_not_called_from_python():
    with pytest.raises(TypeError, match="take_items is a part of kernels"):
        take_items(0, 0, 0, 1, 1, 1)


def test_another_cpu_has_its_own_code(tmp_path):
    run(tmp_path)
    assert run(tmp_path, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="") == ["compiled store_bf16"]
    assert run(tmp_path) == []


def test_slow_byte_extraction_of_sse4a_is_not_used():
    """EXTRQ in a loop over AVX registers made Q4_K four times slower on Zen 3."""
    features = cpu_target.target_context.codegen().magic_tuple()[2].split(",")
    assert "+sse4a" not in features
    assert len(features) > 1, "the host's other features stay"
