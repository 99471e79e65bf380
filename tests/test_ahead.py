"""Kernels compiled by other processes, with a cache folder of their own."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import edge_moe
from edge_moe.kernels import launch

BEGIN = """
import time
from pathlib import Path
from numba import types
from edge_moe.kernels import ahead, jit
from edge_moe.kernels.blocks import TAGS
from edge_moe.kernels.product_units import decode_units
jobs = [(decode_units, TAGS[name]) for name in ("F32", "Q8_0", "Q4_K")]
workers = ahead.Workers()
compiled = []
jit._observers.append(compiled.append)
"""
# The worker begins with the last job; the caller takes one that it has not come to.
SHARED = """
workers.start(jobs, 1)
folder = Path(workers._folder.name)
while not any(folder.glob("*.done")):
    time.sleep(0.05)
for function, tag in (jobs[0], jobs[2]):
    workers.leave_to_caller(function, tag)
    function.compile((tag, types.int64))
    print(tag.format_name, compiled)
workers.leave_to_caller(*jobs[1])  # whoever has it
print(folder.exists(), workers._processes)
workers.start(jobs, 1)
print(workers._processes)
"""
KILLED = """
workers.start(jobs, 1)
folder, process = Path(workers._folder.name), workers._processes[0]
while not any(folder.iterdir()):
    time.sleep(0.05)
process.kill()
for job in jobs:
    workers.leave_to_caller(*job)
print(folder.exists(), process.poll() is not None)
"""
ORPHANED = """
workers.start(jobs, 1)
print(workers._processes[0].pid, workers._folder.name, flush=True)
import os
os._exit(0)
"""


LATE = """
import os
from contextlib import suppress
import tempfile
folder = tempfile.mkdtemp()
Path(folder, "job").touch()
rmdir = os.rmdir
def claim_and_remove(path, **where):
    print(ahead._claim(Path(folder), "late"), flush=True)
    with suppress(OSError):
        rmdir(path, **where)
    print(*Path(folder).parent.glob(f"{Path(folder).name}*"), flush=True)
os.rmdir = claim_and_remove
ahead._end_with_parent(folder)
"""


def run(tmp_path: Path, script: str, returncode: int = 0, **settings: str) -> list[str]:
    env = os.environ | {"EDGE_MOE_CACHE_DIR": str(tmp_path)} | settings
    command = [sys.executable, "-c", BEGIN + script]
    done = subprocess.run(command, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == returncode, done.stderr
    return done.stdout.splitlines()


def test_what_a_worker_compiled_is_loaded(tmp_path):
    assert run(tmp_path, SHARED) == ["F32 ['decode_units']", "Q4_K ['decode_units']", "False []", "[]"]


def test_a_killed_worker_is_not_waited_for(tmp_path):
    assert run(tmp_path, KILLED) == ["False True"]


def test_nothing_is_started_where_there_is_no_cache_to_share(tmp_path):
    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file", "workers.start(jobs, 1); print(workers._processes)") == ["[]"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="processes are looked up in /proc")
def test_a_worker_ends_with_its_parent(tmp_path):
    ((pid, folder),) = (line.split() for line in run(tmp_path, ORPHANED))
    status = Path(f"/proc/{pid}/status")
    for _ in range(100):
        try:
            if "zombie" in status.read_text():
                break
        except FileNotFoundError:
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"process {pid} goes on without its parent")
    assert not list(Path(folder).parent.glob(f"{Path(folder).name}*"))


def test_nothing_is_claimed_in_a_folder_that_is_being_removed(tmp_path):
    """A file made between the emptying and the removal would leave the folder for good."""
    assert run(tmp_path, LATE, returncode=1) == ["False", ""]


@pytest.mark.parametrize(("folder", "attends"), [("golden", True), ("golden_llama", False)])
def test_only_what_the_model_needs_is_compiled_ahead(folder, attends, monkeypatch):
    """Kernels of latent attention are none of Llama's."""
    asked = []
    monkeypatch.setattr(launch, "compile_ahead", lambda jobs, n_workers: asked.extend(jobs))
    edge_moe.load(next(iter(sorted((Path(__file__).parent / folder).glob("*.gguf")))), threads=2)
    names = {function.py_func.__name__ for function, _ in asked}
    assert names == ({"product_units", "prepare_units", "attend_units"} if attends else {"product_units"})
