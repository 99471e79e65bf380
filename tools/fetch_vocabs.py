"""Fetch the vocabulary-only GGUF files of llama.cpp, with which the tokenizer tests compare real vocabularies.

They are part of the source distribution of llama-cpp-python (77 MB), not of the installed package.
Usage: python tools/fetch_vocabs.py [--force]
"""

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from importlib import metadata
from pathlib import Path

import platformdirs

MEMBER = re.compile(r"[^/]+/vendor/llama\.cpp/models/(ggml-vocab-[\w.-]+\.gguf)")


def vocabs_folder() -> Path:
    """Where the files are kept: $EDGE_MOE_VOCABS, or the user's cache folder."""
    return Path(os.environ.get("EDGE_MOE_VOCABS") or Path(platformdirs.user_cache_dir("edge-moe"), "vocabs"))


def wanted_release() -> str:
    """The installed release, so that vocabularies and reference are of one age; any if none is installed."""
    try:
        return f"llama-cpp-python=={metadata.version('llama-cpp-python')}"
    except metadata.PackageNotFoundError:
        return "llama-cpp-python"


def download(folder: Path) -> Path:
    """Download the source distribution into `folder`, without building it or its dependencies."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python"]
    subprocess.run([*pip, "--dest", str(folder), wanted_release()], check=True)
    return next(folder.glob("llama_cpp_python-*.tar.gz"))


def extract(archive: Path, folder: Path) -> list[str]:
    """Write the vocabulary files of the archive into `folder`; returns their names."""
    names = []
    with tarfile.open(archive) as members:
        for member in members:
            if (match := MEMBER.fullmatch(member.name)) and (source := members.extractfile(member)):
                part = folder / f"{match[1]}.part"  # a broken download must not leave half a file behind
                part.write_bytes(source.read())
                part.replace(folder / match[1])
                names.append(match[1])
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--force", action="store_true", help="fetch again what is there already")
    args = parser.parse_args()
    folder = vocabs_folder()
    if any(folder.glob("ggml-vocab-*.gguf")) and not args.force:
        print(f"{folder} has them already")
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        try:
            names = extract(download(Path(temporary)), folder)
        except (subprocess.CalledProcessError, StopIteration):
            print("the source distribution of llama-cpp-python cannot be downloaded", file=sys.stderr)
            return 1
    print(f"{len(names)} vocabularies in {folder}")
    return 0 if names else 1


if __name__ == "__main__":
    sys.exit(main())
