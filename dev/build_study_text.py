"""Make the text that the studies train on, some 370 MB: English documentation, prose and dictionaries, and code.

    python dev/build_study_text.py WORK_DIR study.txt.xz

Run it from the repository's root, on Debian bookworm or a system whose apt offers its packages, after `apt-get update`.
Packages are fetched and unpacked into WORK_DIR, where what is already there is reused. The file is nobody's to
redistribute, and security updates move it a little, as with `build_natural_text.py`.

Documents that nearly repeat an earlier one are left out: of two whose sets of five-word pieces have a Jaccard
similarity of some 0.7 or more the one whose sha256 is less stays: splits by document are then splits by content, but
for passages that documents share. One xz file of UTF-8 text in which a line holding only a form feed separates the
documents, by sha256.
"""

import argparse
import gzip
import hashlib
import lzma
import re
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from build_natural_text import CODE, ENGLISH, LONGEST, SEPARATOR, SHORTEST, Source, documents, unpack

MORE_ENGLISH = (
    Source("cppreference-doc-en-html", "usr/share/cppreference/doc/html/en/**/*.html", 18),
    Source("libstdc++-12-doc", "usr/share/doc/gcc-12-base/libstdc++/manual/*.html", 3),
    Source("openjdk-17-doc", "usr/share/doc/openjdk-17-jre-headless/api/java.base/java/**/*.html", 16),
    Source("python-pandas-doc", "usr/share/doc/python-pandas-doc/html/_sources/**/*.rst.txt", 4),
    Source("python-scipy-doc", "usr/share/doc/python-scipy-doc/html/tutorial/**/*.html", 4),
    Source("gimp-help-en", "usr/share/gimp/2.0/help/en/*.html", 6),
    Source("libreoffice-help-en-us", "usr/share/libreoffice/help/en-US/text/**/*.html", 6),
    Source("llvm-14-doc", "usr/share/doc/llvm-14-doc/html/_sources/**/*.txt", 8),
    Source("git-doc", "usr/share/doc/git-doc/**/*.txt", 3),
    Source("apache2-doc", "usr/share/doc/apache2-doc/manual/en/**/*.html", 6),
    Source("nodejs-doc", "usr/share/doc/nodejs/api/*.html", 6),
    Source("octave-doc", "usr/share/doc/octave/octave.html/*.html", 4),
    Source("maxima-doc", "usr/share/doc/maxima-doc/html/*.html", 5),
)
MORE_CODE = (
    Source("python3-scipy", "usr/lib/python3/dist-packages/**/*.py", 10),
    Source("python3-numpy", "usr/lib/python3/dist-packages/**/*.py", 8),
    Source("python3-pandas", "usr/lib/python3/dist-packages/**/*.py", 16),
    Source("rust-src", "usr/src/rustc-*/**/*.rs", 22),
)
PARTS_OF_LINUX = re.compile(r"linux-source-6\.1/(kernel|mm|fs|lib|net|block|crypto|security)/.*\.c$")
MEGABYTES_OF_SHELVES = {"linux": 34, "java": 28}
ENTRIES = 3_000  # characters of a dictionary's document, at least
SHINGLE, SKETCH, BANDS, SIMILAR = 5, 128, 32, 0.7
EMPTY = np.iinfo(np.uint64).max


@dataclass(frozen=True)
class Shelf:
    """Documents that are no files of a package."""

    name: str
    read: Callable[[Path], Iterable[str]]


def dictionary(work: Path, package: str) -> Iterator[str]:
    """Entries, which begin at a line's start, of a dictionary in dictd's format; neighbours share a document."""
    (path,) = unpack(work, package).glob("usr/share/dictd/*.dict.dz")
    entries = re.split(r"\n(?=\S)", gzip.decompress(path.read_bytes()).decode(errors="replace"))
    page: list[str] = []
    for entry in entries:
        page.append(re.sub(r"\n\s+", "\n", entry.strip()))
        if sum(map(len, page)) > ENTRIES:
            yield "\n".join(page)
            page = []


def linux(work: Path) -> Iterator[str]:
    """C of the kernel's own parts; drivers repeat each other."""
    with tarfile.open(unpack(work, "linux-source-6.1") / "usr/src/linux-source-6.1.tar.xz") as archive:
        for member in archive:
            if member.isfile() and PARTS_OF_LINUX.search(member.name):
                yield archive.extractfile(member).read().decode(errors="replace")  # type: ignore[union-attr]


def java(work: Path) -> Iterator[str]:
    """The class library."""
    (path,) = unpack(work, "openjdk-17-source").glob("usr/lib/jvm/**/src.zip")
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(".java"):
                yield archive.read(name).decode(errors="replace")


def transformers(work: Path) -> Iterator[str]:
    """Its Python files."""
    folder = work / "transformers"
    if not folder.exists():
        subprocess.run(
            ["pip", "install", "--quiet", "--no-deps", "--target", folder, "transformers==5.17.0"], check=True
        )
    return (path.read_text() for path in sorted(folder.glob("transformers/**/*.py")))


def shipped(_: Path) -> Iterator[str]:
    """Plays, addresses and glosses that ship with the library, from which the facts of its studies were taken out."""
    for name in ("plays", "sotu", "wordnet"):
        path = Path(f"src/torch_engram/data/corpus/english-{name}.txt.xz")
        yield from lzma.decompress(path.read_bytes()).decode().split(SEPARATOR)


SHELVES = (
    Shelf("shipped", shipped),
    Shelf("dict-gcide", lambda work: dictionary(work, "dict-gcide")),
    Shelf("dict-foldoc", lambda work: dictionary(work, "dict-foldoc")),
    Shelf("linux", linux),
    Shelf("java", java),
    Shelf("transformers", transformers),
)


def on_shelf(work: Path, shelf: Shelf) -> Iterator[tuple[str, str]]:
    """Hash and text of documents, in order of hash, up to the shelf's share."""
    texts = (text.replace("\f", "").replace("\0", "") for text in shelf.read(work))
    found = {hashlib.sha256(text.encode()).hexdigest(): text for text in texts if SHORTEST <= len(text) <= LONGEST}
    left = MEGABYTES_OF_SHELVES.get(shelf.name, 1_000) * 1e6
    for digest, text in sorted(found.items()):
        left -= len(text.encode())
        if left >= 0:
            yield digest, text


def sketch(text: str) -> np.ndarray:
    """The least hash of five-word pieces in each of ``SKETCH`` classes, ``[SKETCH]``, ``EMPTY`` where there is none:
    MinHash of one permutation (Li, Owen and Zhang, One Permutation Hashing, 2012)."""
    words = np.array([hash_of(word) for word in text.split()], dtype=np.uint64)
    if len(words) < SHINGLE:
        words = np.resize(words, SHINGLE) if len(words) else np.zeros(SHINGLE, np.uint64)
    pieces = np.zeros(len(words) - SHINGLE + 1, np.uint64)
    for place in range(SHINGLE):
        pieces = mixed(pieces ^ words[place : place + len(pieces)])
    least = np.full(SKETCH, EMPTY)
    np.minimum.at(least, (pieces % SKETCH).astype(np.int64), pieces)
    return least


_HASHES: dict[str, int] = {}


def hash_of(word: str) -> int:
    """Of a word, the same in every process."""
    if word not in _HASHES:
        _HASHES[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest())
    return _HASHES[word]


def mixed(numbers: np.ndarray) -> np.ndarray:
    """Well distributed 64 bits (the finaliser of SplitMix64)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def similarity(one: np.ndarray, other: np.ndarray) -> float:
    """About the Jaccard similarity of two documents' sets of pieces, by their sketches."""
    filled = (one != EMPTY) | (other != EMPTY)
    return float((one == other)[filled].mean())


def without_near_copies(every: dict[str, str]) -> dict[str, str]:
    """Documents by hash, of which none is nearly another."""
    kept: dict[str, str] = {}
    sketches: list[np.ndarray] = []
    buckets: dict[tuple[int, bytes], list[int]] = {}
    for digest, text in sorted(every.items()):
        own = sketch(text)
        bands = [(number, band.tobytes()) for number, band in enumerate(own.reshape(BANDS, -1)) if (band < EMPTY).any()]
        near = {other for band in bands for other in buckets.get(band, ())}
        if any(similarity(sketches[other], own) >= SIMILAR for other in near):
            continue
        for band in bands:
            buckets.setdefault(band, []).append(len(sketches))
        sketches.append(own)
        kept[digest] = text
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work_dir", type=Path, help="where packages are downloaded and unpacked")
    parser.add_argument("out", type=Path, help="the .txt.xz to write")
    arguments = parser.parse_args()
    work = arguments.work_dir.resolve()
    work.mkdir(parents=True, exist_ok=True)
    every: dict[str, str] = {}
    for source in (*ENGLISH, *MORE_ENGLISH, *CODE, *MORE_CODE):
        told(every, source.package, documents(unpack(work, source.package), source))
    for shelf in SHELVES:
        told(every, shelf.name, on_shelf(work, shelf))
    kept = without_near_copies(every)
    joined = ("\n" + SEPARATOR).join(text.rstrip("\n") for _, text in sorted(kept.items())) + "\n"
    with lzma.open(arguments.out, "wb", preset=6) as file:
        file.write(joined.encode())
    size = len(joined.encode()) / 1e6
    print(f"{arguments.out}: {len(kept):,} documents, {len(every) - len(kept):,} near copies left out, {size:.1f} MB")


def told(every: dict[str, str], name: str, found: Iterable[tuple[str, str]]) -> None:
    """Take documents in, and say how many there are."""
    new = dict(found)
    every |= new
    print(
        f"{name}: {len(new):,} documents, {sum(len(text.encode()) for text in new.values()) / 1e6:.1f} MB", flush=True
    )


if __name__ == "__main__":
    main()
