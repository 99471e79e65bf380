"""Turn Debian packages of freely licensed English into training, evaluation and calibration text.

Every domain is a list of documents (a chapter, a page, an entry); whole documents are held out, so that nothing in
eval.txt or calibration.txt is ever trained on. Only permissive licences and public-domain texts are used, because the
held-out text is committed.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import json
import os
import random
import re
import struct
import subprocess
import zlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "edge-moe-reference"

HELD_OUT_BYTES = {"eval": 42_000, "calibration": 42_000}  # per domain

PACKAGES = {  # package -> (domain, licence of the text used)
    "r-cran-janeaustenr": ("novels", "public domain (package: MIT)"),
    "bible-kjv-text": ("scripture", "public domain"),
    "wordnet-base": ("dictionary", "WordNet licence"),
    "python3.11-doc": ("python", "PSF-2.0"),
    "postgresql-doc-15": ("database", "PostgreSQL licence"),
    "fortunes": ("fortunes", "BSD-3-Clause"),
    "fortunes-min": ("fortunes", "BSD-3-Clause"),
    "dict-jargon": ("jargon", "public domain"),
    "dict-devil": ("jargon", "public domain"),
}


def fetch(package: str, cache: Path) -> tuple[Path, dict]:
    """Download and unpack one Debian package into the cache, without installing it -> (its tree, manifest entry)."""
    folder = cache / "debs"
    folder.mkdir(parents=True, exist_ok=True)
    if not list(folder.glob(f"{package}_*.deb")):
        subprocess.run(["apt-get", "download", "-q", package], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    deb = sorted(folder.glob(f"{package}_*.deb"))[-1]
    tree = folder / "unpacked" / deb.stem
    if not tree.exists():
        tree.parent.mkdir(exist_ok=True)
        subprocess.run(["dpkg-deb", "-x", deb, tree], check=True)
    version = subprocess.run(["dpkg-deb", "-f", deb, "Version"], check=True, capture_output=True, text=True).stdout
    domain, licence = PACKAGES[package]
    blob = deb.read_bytes()
    return tree, {
        "package": package,
        "version": version.strip(),
        "domain": domain,
        "licence": licence,
        "deb_bytes": len(blob),
        "deb_sha256": hashlib.sha256(blob).hexdigest(),
    }


# --- one reader per package: its unpacked tree -> documents -----------------------------------------------------------


def paragraphs(lines: Iterator[str]) -> Iterator[str]:
    """Join hard-wrapped lines: a paragraph ends at an empty line."""
    block: list[str] = []
    for line in lines:
        if line.strip():
            block.append(line.strip())
        elif block:
            yield " ".join(block)
            block = []
    if block:
        yield " ".join(block)


class RObject:
    """Read one object of R's XDR serialization, as far as a character vector or the index of a lazy-load database."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 14  # after "X\n" and three version numbers
        self.symbols: list[str] = []
        if struct.unpack_from(">i", data, 2)[0] == 3:  # version 3 also names the native encoding
            self.at += 4 + struct.unpack_from(">i", data, 14)[0]

    def int(self) -> int:
        self.at += 4
        return struct.unpack_from(">i", self.data, self.at - 4)[0]

    def read(self):
        flags = self.int()
        kind = flags & 0xFF
        if kind == 0xFE:  # NULL
            return None
        if kind == 9:  # CHARSXP
            size = self.int()
            self.at += max(size, 0)
            return self.data[self.at - size : self.at].decode("utf-8", "replace") if size >= 0 else ""
        if kind == 1:  # symbol
            self.symbols.append(self.read())
            return self.symbols[-1]
        if kind == 0xFF:  # reference to an earlier symbol
            return self.symbols[(flags >> 8 or self.int()) - 1]
        if kind == 2:  # pairlist: attributes
            pairs = {}
            while kind == 2:
                if flags & 0x200:
                    self.read()
                tag = self.read() if flags & 0x400 else None
                pairs[tag] = self.read()
                flags = self.int()
                kind = flags & 0xFF
            return pairs
        size = self.int()
        if kind in (16, 19):  # character vector, list
            value = [self.read() for _ in range(size)]
        elif kind in (10, 13):  # logical, integer
            value = [self.int() for _ in range(size)]
        elif kind == 14:
            value = list(struct.unpack_from(f">{size}d", self.data, self.at))
            self.at += 8 * size
        else:
            raise ValueError(f"R object kind {kind} is not read")
        if flags & 0x200:
            names = (self.read() or {}).get("names")
            if names:
                return dict(zip(names, value, strict=True))
        return value


def novels(tree: Path) -> Iterator[str]:
    """Jane Austen's novels, a chapter each, out of the R package's lazy-load database."""
    stem = tree / "usr/lib/R/site-library/janeaustenr/data/Rdata"
    index = RObject(gzip.decompress(stem.with_suffix(".rdx").read_bytes())).read()["variables"]
    blob = stem.with_suffix(".rdb").read_bytes()
    for offset, size in index.values():
        lines = RObject(zlib.decompress(blob[offset + 4 : offset + size])).read()
        if not isinstance(lines, list) or len(lines) < 1000:
            continue
        chapter: list[str] = []
        for paragraph in paragraphs(lines):
            if re.match(r"(CHAPTER|Chapter|VOLUME|Volume) ", paragraph) and len(paragraph) < 40:
                if len(chapter) > 3:
                    yield "\n\n".join(chapter)
                chapter = []
            else:
                chapter.append(re.sub(r"_([^_]{1,80})_", r"\1", paragraph))
        if len(chapter) > 3:
            yield "\n\n".join(chapter)


BOOKS = (
    "Genesis; Exodus; Leviticus; Numbers; Deuteronomy; Joshua; Judges; Ruth; 1 Samuel; 2 Samuel; 1 Kings; 2 "
    "Kings; 1 Chronicles; 2 Chronicles; Ezra; Nehemiah; Esther; Job; Psalms; Proverbs; Ecclesiastes; Song of "
    "Solomon; Isaiah; Jeremiah; Lamentations; Ezekiel; Daniel; Hosea; Joel; Amos; Obadiah; Jonah; Micah; Nahum; "
    "Habakkuk; Zephaniah; Haggai; Zechariah; Malachi; Matthew; Mark; Luke; John; Acts; Romans; 1 Corinthians; 2 "
    "Corinthians; Galatians; Ephesians; Philippians; Colossians; 1 Thessalonians; 2 Thessalonians; 1 Timothy; 2 "
    "Timothy; Titus; Philemon; Hebrews; James; 1 Peter; 2 Peter; 1 John; 2 John; 3 John; Jude; Revelation"
)


def scripture(tree: Path) -> Iterator[str]:
    """The King James text, a chapter each. The file is windows of `compress` output that share one 3-byte header."""
    blob = (tree / "usr/lib/bible.data").read_bytes()
    _, window_bytes, count = struct.unpack_from(">3I", blob, 0x50)
    starts = [*struct.unpack_from(f">{count}I", blob, 0x5C), len(blob)]
    magic = blob[starts[0] - 3 : starts[0]]
    text = b""
    for start, stop in pairwise(starts):
        # gzip reads `compress` data; it warns of the trailing bytes, and the window's true size is known.
        done = subprocess.run(["gzip", "-dcq"], input=magic + blob[start:stop], capture_output=True, check=False)
        text += done.stdout[:window_bytes]
    books = BOOKS.split("; ")
    short_names: list[str] = []
    chapter, name = [], None
    for line in text.decode("latin-1").splitlines():
        match = re.match(r"(\w+?)(\d+):(\d+) (.*)", line)
        if not match:
            continue
        short, number, _, verse = match.groups()
        if short not in short_names:
            short_names.append(short)
        if (short, number) != name:
            if chapter:
                yield "\n".join(chapter)
            name = (short, number)
            chapter = [f"{books[short_names.index(short)]} {number}"]
        chapter.append(verse)
    yield "\n".join(chapter)


def dictionary(tree: Path) -> Iterator[str]:
    """WordNet glosses: 40 neighbouring synsets a document, each `words (part of speech): gloss; "example"`."""
    for part in ("noun", "verb", "adj", "adv"):
        entries = []
        for line in (tree / f"usr/share/wordnet/data.{part}").read_text("utf-8").splitlines():
            if line.startswith("  "):  # the licence header
                continue
            data, gloss = line.split(" | ", 1)
            fields = data.split()
            words = [w.split("(")[0].replace("_", " ") for w in fields[4 : 4 + 2 * int(fields[3], 16) : 2]]
            entries.append(f"{', '.join(words)} ({part}): {gloss.strip()}")
        for start in range(0, len(entries), 40):
            yield "\n".join(entries[start : start + 40])


def python(tree: Path) -> Iterator[str]:
    """The sources of the Python documentation, a page each; markup stays, as it marks the domain."""
    skip = {"contents", "copyright", "license", "about", "sphinx"}
    for path in sorted((tree / "usr/share/doc/python3.11/html/_sources").rglob("*.rst.txt")):
        if path.name.split(".")[0] in skip or path.stat().st_size > 400_000:
            continue
        yield path.read_text("utf-8")


def database(tree: Path) -> Iterator[str]:
    """The PostgreSQL manual, a page each, from its HTML."""
    for path in sorted((tree / "usr/share/doc/postgresql-doc-15/html").glob("*.html")):
        if path.name.startswith(("bookindex", "release", "features", "acronyms", "biblio", "legalnotice", "index")):
            continue
        page = path.read_text("utf-8").split("</div>", 1)[1].rsplit('<div class="navfooter">', 1)[0]
        # Line ends in running text are only layout, and those of a listing are meant.
        parts = re.split(r"(<pre.*?</pre>)", page.split("<hr />", 1)[-1], flags=re.S)
        parts = [p if p.startswith("<pre") else re.sub(r"\s+", " ", p) for p in parts]
        page = re.sub(r"</(p|h\d|dt|dd|li|tr|div|pre)>|<br ?/?>|<(pre|ul|dl)[^>]*>", "\n", "".join(parts))
        page = re.sub(r"</t[dh]>", " ", page)
        lines = [line.rstrip() for line in html.unescape(re.sub(r"<[^>]+>", "", page)).replace("\xa0", " ").split("\n")]
        lines = [line if line.startswith("  ") else line.strip() for line in lines]
        yield "\n".join(lines)


def fortunes(tree: Path) -> Iterator[str]:
    """Epigrams, one a document. Drawings, puzzles in cipher and the files of crude or ethnic jokes are left out."""
    skip = {"art", "ascii-art", "translate-me", "ethnic", "men-women", "drugs", "zippy", "magic"}
    for path in sorted((tree / "usr/share/games/fortunes").iterdir()):
        if path.suffix or path.name in skip or path.is_symlink():
            continue
        for fortune in path.read_text("utf-8", errors="replace").split("\n%\n"):
            yield re.sub(r".\x08", "", fortune).strip("%\n")


def jargon(tree: Path) -> Iterator[str]:
    """The Jargon File and The Devil's Dictionary, about ten neighbouring entries a document."""
    path = next((tree / "usr/share/dictd").glob("*.dict.dz"))
    text = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
    entries = re.split(r"\n\n(?=\S)", text)[6:]
    for start in range(0, len(entries), 10):
        block = "\n\n".join(entries[start : start + 10])
        yield re.sub(r"\{([^{}]*)\}", lambda m: re.sub(r"\s+", " ", m[1]).strip(), block)


READERS = {f.__name__: f for f in (novels, scripture, dictionary, python, database, fortunes, jargon)}


# --- cleaning, holding out, writing -----------------------------------------------------------------------------------


def clean(document: str) -> str:
    """Unify line ends and blank lines; drop control characters."""
    document = document.replace("\r\n", "\n").replace("\t", "    ")
    document = re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ufffd]", "", document)
    document = re.sub(r"[ ]+\n", "\n", document)
    return re.sub(r"\n{3,}", "\n\n", document).strip()


def deduplicate(documents: list[str], seen: set[bytes]) -> list[str]:
    """Drop every paragraph of 40 characters or more that an earlier document already has, and emptied documents."""
    kept = []
    for document in documents:
        out = []
        for paragraph in document.split("\n\n"):
            key = hashlib.sha256(re.sub(r"\W+", " ", paragraph).lower().encode()).digest()[:16]
            if len(paragraph) < 40 or key not in seen:
                out.append(paragraph)
            if len(paragraph) >= 40:
                seen.add(key)
        if sum(map(len, out)) >= 40:
            kept.append("\n\n".join(out))
    return kept


def hold_out(documents: list[str], seed: int) -> dict[str, list[str]]:
    """Deal whole documents to eval and calibration until each has its bytes; the rest is for training."""
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    parts: dict[str, list[str]] = {name: [] for name in HELD_OUT_BYTES}
    taken = set()
    for name, budget in HELD_OUT_BYTES.items():
        size = 0
        for i in order:
            length = len(documents[i].encode())
            if i in taken or length > 20_000:  # a domain's share should be several documents, not one
                continue
            taken.add(i)
            parts[name].append(documents[i])
            size += length
            if size >= budget:
                break
    parts["train"] = [d for i, d in enumerate(documents) if i not in taken]
    return parts


def write_held_out(name: str, by_domain: dict[str, list[str]]) -> None:
    """Write NAME.txt and NAME.json, which gives each domain's byte range in it."""
    text, ranges = b"", {}
    for domain, documents in by_domain.items():
        start = len(text)
        text += ("\n\n".join(documents) + "\n\n").encode()
        ranges[domain] = [start, len(text)]
    (HERE / f"{name}.txt").write_bytes(text)
    (HERE / f"{name}.json").write_text(json.dumps({"bytes": len(text), "domains": ranges}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=CACHE)
    args = parser.parse_args()

    documents: dict[str, list[str]] = {domain: [] for domain in READERS}
    manifest = []
    for package, (domain, _) in PACKAGES.items():
        tree, entry = fetch(package, args.cache)
        new = [clean(d) for d in READERS[domain](tree)]
        entry["text_bytes"] = sum(len(d.encode()) for d in new)
        entry["text_sha256"] = hashlib.sha256("\0".join(new).encode()).hexdigest()
        manifest.append(entry)
        documents[domain] += new

    seen: set[bytes] = set()
    held_out: dict[str, dict[str, list[str]]] = {name: {} for name in HELD_OUT_BYTES}
    domains = {}
    with (args.cache / "train.jsonl").open("w", encoding="utf-8") as out:
        for seed, (domain, docs) in enumerate(documents.items()):
            parts = hold_out(deduplicate(docs, seen), seed)
            for document in parts.pop("train"):
                domains.setdefault(domain, {"documents": 0, "train_bytes": 0})
                domains[domain]["documents"] += 1
                domains[domain]["train_bytes"] += len(document.encode())
                out.write(json.dumps({"domain": domain, "text": document}, ensure_ascii=False) + "\n")
            for name, part in parts.items():
                held_out[name][domain] = part
    for name, by_domain in held_out.items():
        write_held_out(name, by_domain)
    total = sum(d["train_bytes"] for d in domains.values())
    report = {"train_bytes": total, "domains": domains, "packages": manifest}
    (HERE / "manifest.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps({"train_bytes": total, **domains}, indent=2))


if __name__ == "__main__":
    main()
