"""Malformed files: every damage to a sound model gives a typed error or a sound reading, soon and in little memory."""

import io
import os
import re
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from corruptions import (
    FAMILIES,
    Anatomy,
    dissect,
    flipped_header_bytes,
    missing_and_double_keys,
    truncations,
    wild_counts,
    wrong_key_types,
    wrong_key_values,
)
from gguf_files import raw_array, raw_gguf, write_tiny_deepseek2

from edge_moe.checkpoint import open_checkpoint
from edge_moe.cli import main
from edge_moe.errors import EdgeMoeError
from edge_moe.gguf import StringArray, open_gguf
from edge_moe.models.deepseek2 import load_weights
from edge_moe.tokenizer import Tokenizer

MAX_MEMORY_BYTES = 200_000_000
MAX_TIME_S = 5.0
# The share of a family's cases that no reader of the structure may accept.
LEAST_REFUSED = {
    "truncations": 1.0, "wild_counts": 0.9, "wild_dimensions": 0.6, "wild_offsets": 0.9, "bad_names": 0.4,
    "other_files": 0.7,
}  # fmt: skip

each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)


SMALLEST = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 1, "vocab_size": 264}


@pytest.fixture(scope="module")
def sound_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "tiny.gguf"
    write_tiny_deepseek2(path, **SMALLEST, q_lora_rank=32, selection_bias=True, n_group=2, topk_group=2)
    return path


@pytest.fixture(scope="module")
def anatomy(sound_file) -> Anatomy:
    return dissect(sound_file.read_bytes())


@contextmanager
def limited_memory() -> Iterator[None]:
    """Let the block take at most MAX_MEMORY_BYTES more than the process has: beyond that it gets a MemoryError."""
    if sys.platform == "linux":
        import resource

        status = Path("/proc/self/status").read_text(encoding="utf-8")
        now_bytes = 1024 * int(re.search(r"VmData:\s*(\d+) kB", status)[1])
        before = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (now_bytes + MAX_MEMORY_BYTES, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, before)
    else:  # several times slower
        tracemalloc.start()
        try:
            yield
            assert tracemalloc.get_traced_memory()[1] < MAX_MEMORY_BYTES
        finally:
            tracemalloc.stop()


def assert_all_are_handled(cases, path: Path, use: Callable[[Path], object]) -> float:
    """Every case must be used soundly or refused by a one-line typed error; returns the share of those refused."""
    problems = []
    n_sound = n_refused = 0
    with limited_memory():
        for what, content in cases:
            path.write_bytes(content)
            start_s = time.perf_counter()
            try:
                use(path)
                n_sound += 1
            except EdgeMoeError as error:
                n_refused += 1
                if "\n" in str(error) or len(str(error)) > 1000 or str(path.parent) not in str(error):
                    problems.append(f"{what}: a message that is not one line about the file: {error}")
            except Exception as error:
                problems.append(f"{what}: {type(error).__name__}: {error}")
            if (took_s := time.perf_counter() - start_s) > MAX_TIME_S:
                problems.append(f"{what}: took {took_s:.1f} s")
    assert not problems, f"{len(problems)} of {n_sound + n_refused}:\n" + "\n".join(problems[:20])
    return n_refused / (n_sound + n_refused)


def some_of(cases, most: int) -> list:
    """At most `most` cases, evenly chosen."""
    cases = list(cases)
    return cases[:: -(-len(cases) // most)]


def read_all(path: Path) -> None:
    """Read a file, and check what a sound reading must be: bytes as the shapes say, every string readable."""
    opened = open_gguf(path)
    for name, entry in opened.tensors.items():
        n_rows = 1
        for size in entry.shape[:-1]:
            n_rows *= size
        assert name == entry.name
        assert entry.data.size == n_rows * entry.format.row_bytes(entry.shape[-1])
    for value in opened.metadata.values():
        if isinstance(value, StringArray):
            assert len([item.encode("utf-8") for item in value]) == len(value)


def test_there_are_enough_corruptions_and_the_file_itself_is_sound(anatomy, sound_file):
    n_cases = [sum(1 for _ in family(anatomy)) for family in FAMILIES]
    assert min(n_cases) >= 10
    assert sum(n_cases) >= 2000
    read_all(sound_file)


def test_the_memory_limit_is_one(tmp_path):
    with pytest.raises(AssertionError, match="greedy: MemoryError"):
        assert_all_are_handled([("greedy", b"")], tmp_path / "x.gguf", lambda path: bytearray(2 * MAX_MEMORY_BYTES))


@each_family
def test_the_reader_refuses_or_reads_soundly(anatomy, family, tmp_path):
    refused = assert_all_are_handled(family(anatomy), tmp_path / "x.gguf", read_all)
    assert refused >= LEAST_REFUSED.get(family.__name__, 0.0)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a sparse file may take its whole size on the disk")
@pytest.mark.parametrize("value_type", range(14))
@pytest.mark.parametrize("count", [1_000_000, 60_000_000, 2**33, 2**61, 2**64 - 1])
def test_a_wild_array_in_a_file_of_20_gigabytes_costs_little(tmp_path, value_type, count):
    path = tmp_path / "sparse.gguf"
    path.write_bytes(raw_gguf([(b"k", 9, raw_array(value_type, count, b""))], n_keys=2))
    os.truncate(path, 20_000_000_000)  # zeros: valid numbers, and valid empty strings
    with limited_memory(), pytest.raises(EdgeMoeError, match=f"{path}: "):
        open_gguf(path)


@pytest.mark.parametrize("part", [1, 2])
@pytest.mark.parametrize(
    "family",
    [truncations, wild_counts, wrong_key_types, wrong_key_values, missing_and_double_keys, flipped_header_bytes],
    ids=lambda family: family.__name__,
)
def test_a_damaged_part_of_a_split_file_is_refused_or_read_soundly(tmp_path, family, part):
    write_tiny_deepseek2(tmp_path / "tiny.gguf", **SMALLEST, split_kv_b=False, tensors_per_part=10)
    parts = sorted(tmp_path.glob("tiny-*.gguf"))
    assert len(parts) == 3
    cases = some_of(family(dissect(parts[part].read_bytes())), 100)
    assert_all_are_handled(cases, parts[part], lambda _: read_all(parts[0]))


# ---- the rooms above the reader -------------------------------------------------------------------------------------


def load_all(path: Path) -> None:
    """Everything that is done with a file before the model runs."""
    checkpoint = open_checkpoint(path)
    load_weights(checkpoint)
    tokenizer = Tokenizer.from_metadata(checkpoint.metadata, checkpoint.path)
    tokenizer.decode(tokenizer.encode("Hello, wörld 🙂\n"))


@each_family
def test_the_checkpoint_and_the_tokenizer_refuse_or_read_soundly(anatomy, family, tmp_path):
    refused = assert_all_are_handled(family(anatomy), tmp_path / "x.gguf", load_all)
    assert refused >= LEAST_REFUSED.get(family.__name__, 0.0)


class UncleanExitError(Exception):
    """The command line did something else than exit with 0, or with 2 and one line."""


def run_command(path: Path, *argv: str) -> None:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main([argv[0], str(path), *argv[1:]])
    lines = err.getvalue().splitlines()
    if status == 2 and len(lines) == 1 and lines[0].startswith("edge-moe: error: ") and not out.getvalue():
        if "out of memory" in lines[0]:
            raise UncleanExitError(lines[0])
        raise EdgeMoeError(f"{path}: {lines[0]}")
    if status != 0:
        raise UncleanExitError(f"status {status}, {out.getvalue()[:300]!r}, {err.getvalue()[:1000]!r}")


@each_family
def test_info_prints_one_line_or_a_report(anatomy, family, tmp_path):
    cases = some_of(family(anatomy), 100)
    assert_all_are_handled(cases, tmp_path / "x.gguf", lambda path: run_command(path, "info", "--json"))


@each_family
def test_run_prints_one_line_or_an_answer(anatomy, family, tmp_path, sound_file):
    # another format of a tensor may be sound, but would have kernels compiled for it
    cases = some_of((case for case in family(anatomy) if not case[0].startswith("format of")), 60)
    hello = ("run", "hi", "-n", "2", "--temp", "0", "-t", "1")
    run_command(sound_file, *hello)  # kernels are compiled or loaded before memory is limited
    assert_all_are_handled(cases, tmp_path / "x.gguf", lambda path: run_command(path, *hello))


REAL_COMMAND = """
import sys
from edge_moe.cli import main
from edge_moe.cli.report import peak_rss_bytes
status = main(sys.argv[1:])
print(peak_rss_bytes())
sys.exit(status)
"""


@pytest.mark.parametrize(
    "family",
    [each for each in FAMILIES if each.__name__ not in ("wrong_key_values", "random_mutations", "broken_weights")],
    ids=lambda family: family.__name__,
)
def test_a_real_process_says_one_line_and_takes_little_memory(anatomy, family, tmp_path):
    path = tmp_path / "x.gguf"
    cases = list(family(anatomy))
    for _, content in cases[len(cases) // 2 :]:
        path.write_bytes(content)
        try:
            load_all(path)
        except EdgeMoeError as error:
            message = str(error)
            break
    command = [sys.executable, "-c", REAL_COMMAND, "run", str(path), "hi", "-n", "1"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, check=False)
    assert (done.returncode, done.stderr) == (2, f"edge-moe: error: {message}\n")
    assert int(done.stdout) < MAX_MEMORY_BYTES
