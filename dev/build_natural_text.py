"""Make a text of some 25 M tokens, English documentation and code about evenly, for hit rates and lookup benchmarks.

    python dev/build_natural_text.py WORK_DIR natural.txt.xz

Run it on Debian bookworm or a system whose apt offers its packages, after `apt-get update`. `apt-get` and `dpkg-deb`
fetch and unpack into WORK_DIR, where what is already there is reused. The file is nobody's to redistribute: some of the
packages are under the GPL and the GFDL. Security updates move the versions, and with them a little of the text.

One xz file of UTF-8 text in which a line holding only a form feed separates the documents. Their order is that of their
sha256, so that neighbours have nothing to do with each other, as requests to a server have not.
"""

import argparse
import gzip
import hashlib
import lzma
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

SEPARATOR = "\f\n"
SHORTEST, LONGEST = 300, 400_000  # characters of a document; what is longer is data
SKIPPED = re.compile(r"/(zsys|zerr|ztypes|tables|testdata)|preprocessed|/locale/")  # made by programs


@dataclass(frozen=True)
class Source:
    """Which files of a package are documents, and how much of them is taken."""

    package: str
    pattern: str
    """Of the files, below the package's folder."""
    megabytes: float
    """At most so much of it, in order of sha256."""


ENGLISH = (
    Source("linux-doc-6.1", "usr/share/doc/*/Documentation/**/*.rst.gz", 20),
    Source("anarchism", "usr/share/doc/anarchism/markdown/*.md.gz", 12),
    Source("python3.11-doc", "usr/share/doc/python3.11/html/_sources/**/*.rst.txt", 11),
    Source("perl-doc", "usr/share/perl/**/*.pod", 9),
    Source("postgresql-doc-15", "usr/share/doc/postgresql-doc-15/html/*.html", 8),
    Source("debian-handbook", "usr/share/doc/debian-handbook/html/en-US/*.html", 3),
)
CODE = (
    Source("libpython3.11-stdlib", "usr/lib/python3.11/**/*.py", 6),
    Source("python3-sympy", "usr/lib/python3/dist-packages/**/*.py", 10),
    Source("python3-django", "usr/lib/python3/dist-packages/**/*.py", 5),
    Source("golang-1.19-src", "usr/share/go-1.19/src/**/*.go", 11),
    Source("libboost1.74-dev", "usr/include/boost/**/*.hpp", 6),
    Source("perl-modules-5.36", "usr/share/perl/**/*.pm", 6),
)


def unpack(work: Path, package: str) -> Path:
    """The folder with a package's files."""
    folder = work / package
    if not folder.exists():
        subprocess.run(["apt-get", "download", package], cwd=work, check=True)
        (archive,) = work.glob(f"{package}_*.deb")
        subprocess.run(["dpkg-deb", "-x", archive, folder], check=True)
    return folder


class Paragraphs(HTMLParser):
    """The text of a page without its marks, scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.silent = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        """Inside some elements nothing is text."""
        self.silent += tag in ("script", "style", "head")

    def handle_endtag(self, tag: str) -> None:
        """Outside them it is again."""
        self.silent -= tag in ("script", "style", "head")

    def handle_data(self, data: str) -> None:
        """Keep what is text."""
        if not self.silent:
            self.parts.append(data)


def text_of(path: Path) -> str:
    """A file's text; empty where it is none."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return ""
    if path.suffix == ".html":
        page = Paragraphs()
        page.feed(text)
        text = re.sub(r"\n\s*\n\s*", "\n\n", "".join(page.parts)).strip() + "\n"
    return text.replace("\f", "").replace("\0", "")


def documents(folder: Path, source: Source) -> Iterator[tuple[str, str]]:
    """Hash and text of a source's documents, in order of hash, up to its share."""
    found: dict[str, str] = {}
    for path in folder.glob(source.pattern):
        if path.is_file() and not path.is_symlink() and not SKIPPED.search(str(path.relative_to(folder))):
            text = text_of(path)
            if SHORTEST <= len(text) <= LONGEST:
                found[hashlib.sha256(text.encode()).hexdigest()] = text
    left = source.megabytes * 1e6
    for digest, text in sorted(found.items()):
        left -= len(text.encode())
        if left < 0:
            return
        yield digest, text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work_dir", type=Path, help="where packages are downloaded and unpacked")
    parser.add_argument("out", type=Path, help="the .txt.xz to write")
    arguments = parser.parse_args()
    work = arguments.work_dir.resolve()
    work.mkdir(parents=True, exist_ok=True)
    every: dict[str, str] = {}
    for kind, sources in (("English", ENGLISH), ("code", CODE)):
        for source in sources:
            found = dict(documents(unpack(work, source.package), source))
            every |= found
            size = sum(len(text.encode()) for text in found.values()) / 1e6
            print(f"{kind}: {source.package}, {len(found):,} documents, {size:.1f} MB", flush=True)
    joined = ("\n" + SEPARATOR).join(text.rstrip("\n") for _, text in sorted(every.items())) + "\n"
    with lzma.open(arguments.out, "wb", preset=6) as file:
        file.write(joined.encode())
    print(f"{arguments.out}: {len(every):,} documents, {len(joined.encode()) / 1e6:.1f} MB of text")


if __name__ == "__main__":
    main()
