"""Finds and runs llama.cpp's programs, and says how to build them.

The sdist of llama-cpp-python carries llama.cpp's source, so that a Python registry is enough (about 15 minutes on two
cores):

    pip download --no-deps --no-binary :all: llama-cpp-python -d sdist
    mkdir llama-src && tar xzf sdist/*.tar.gz -C llama-src --strip-components 1
    cmake -S llama-src/vendor/llama.cpp -B llama -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF -DLLAMA_BUILD_UI=OFF \\
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
    cmake --build llama -j --target llama-bench llama-quantize llama-perplexity llama-imatrix

The programs are then in llama/bin. CMake and a C++ compiler are needed. On a CPU with AMX llama.cpp may abort at models
with latent attention; built for the CPU's other features it does not:

    -DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VBMI=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON
"""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

HOW_TO_BUILD = __doc__.partition("\n")[2].strip()


class ToolError(Exception):
    """Something that the user can put right, in one line."""


def find_tool(name: str, folder: Path | None) -> Path:
    """The path of one of llama.cpp's programs, in `folder` (or its bin) or on PATH. Raises ToolError."""
    places = [folder, folder / "bin"] if folder is not None else []
    found = shutil.which(name, path=":".join(map(str, places))) if places else shutil.which(name)
    if found is None:
        where = f"in {folder}" if folder is not None else "on PATH"
        raise ToolError(f"{name} is not {where}; build it as --help says and give its folder with --llama")
    return Path(found)


def run(command: Sequence[str | Path]) -> str:
    """Run a program to its end; returns standard output and error together. Raises ToolError with its last words."""
    words = [str(word) for word in command]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    text = done.stdout.decode("utf-8", "replace")
    if done.returncode != 0:
        lines = [line for line in text.splitlines() if line.strip()]
        raise ToolError(f"{words[0]} failed with status {done.returncode}: {lines[-1] if lines else 'it said nothing'}")
    return text


def parse_statistics(output: str) -> dict[str, float]:
    """Figures of `llama-perplexity --kl-divergence`, named as in edge_moe.divergence.Evaluation. Raises ToolError."""
    wanted = {
        "Mean PPL(Q)": ("ppl", 1.0),
        "Mean PPL(Q)/PPL(base)": ("ppl_ratio", 1.0),
        "Mean KLD": ("kld_mean", 1.0),
        "Median KLD": ("kld_median", 1.0),
        "99.0% KLD": ("kld_p99", 1.0),
        "99.9% KLD": ("kld_p999", 1.0),
        "Maximum KLD": ("kld_max", 1.0),
        "RMS Δp": ("delta_p_rms", 0.01),
        "Same top p": ("top1_agreement", 0.01),
    }
    found = {}
    for line in output.splitlines():
        name, colon, value = line.partition(":")
        name = " ".join(name.split())
        if colon and name in wanted:
            key, unit = wanted[name]
            found[key] = float(value.split()[0].removesuffix("%")) * unit
    missing = {key for key, _ in wanted.values()} - set(found)
    if missing:
        raise ToolError(f"llama-perplexity printed no {', '.join(sorted(missing))}; its version may be another")
    return found
