"""Tables written anew, in other files or another codec, in one pass: resumable, and under their name only when whole.

Rows of the same codec keep their bytes and are never decoded. Reading and encoding go on while what came before is
written. Memory stays bounded by a few chunks of 2**20 numbers (of one row, where it has more), less than 64 MB above
what a process takes that has converted a small table; a saved memory takes 16 bytes more for every row that later saves
changed, and a few times that while their lists are read.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from torch import Tensor

from torch_engram import __version__
from torch_engram.durable import replacing, require_room, sync
from torch_engram.stores.checksums import digests, write_sums
from torch_engram.stores.codecs import CODECS
from torch_engram.stores.left_over import Journal, LeftOver, beside, left_over
from torch_engram.stores.open_files import ChangedFile
from torch_engram.stores.row_sources import RowSource
from torch_engram.stores.shard_writer import ShardWriter
from torch_engram.stores.shards import Piece, Shard, Target, deal
from torch_engram.stores.tensor_files import file_size, read_header

CHUNK_NUMBERS = 1 << 20
STRIDE = 1 << 28
"""Bytes after which what was written is synced and noted."""
_WAITING = 2
INDEX = "model.safetensors.index.json"

Tell = Callable[[int], None]


class Conversion:
    """From tables to a folder that holds them as a :class:`Target` says.

    ``source``: where the tables are, None for those of a running process, with whose rows no later run may go on.
    ``company``: writes what is to lie beside the tables into the folder that it is given, under names that no table's
    file has; the index names its tensors, too. Raises ``ValueError`` naming what does not go together, when the folder
    is there already or lies in ``source``, or when the disk has no room for it.
    """

    def __init__(
        self,
        source: Path | None,
        tables: Sequence[RowSource],
        folder: Path,
        target: Target,
        company: Callable[[Path], None] | None = None,
    ):
        self.folder = folder = folder.absolute()
        self.shards = deal(tables, target)
        self.nbytes = sum(file_size(shard.tensors) for shard in self.shards)
        """Of all files of rows."""
        self._source, self._tables, self._company = source, tables, company
        layout, codecs = target.settled(tables)
        self._arguments = {
            "the version": f"torch-engram {__version__}",
            "SOURCE": "another process" if source is None else str(source.resolve()),
            "--layout": layout,
            "--codec": ", ".join(dict.fromkeys(codecs)),
            "--shards": str(target.shards or "left out"),
            "--shard-size": str(target.shard_size or "left out"),
            "--layer": "left out" if target.layer is None else str(target.layer),
            "the names of files and tensors": f"{target.stem}, {target.prefix or 'as the layout has them'}",
        }
        if source is not None and source.is_dir() and folder.resolve().is_relative_to(source.resolve()):
            raise ValueError(f"{folder} lies in {source}, which is read: give a folder outside.")
        if folder.exists() and not beside(folder).exists():
            raise ValueError(f"{folder} is there already: give another folder.")
        self._require_room()

    def run(self, tell: Tell = lambda _: None) -> int:
        """Write what is missing; ``tell`` hears of every byte that is there then. Gives the bytes that an earlier run,
        which was stopped, had written.

        Raises :class:`ChangedFile` when a source is no longer what it was, and then nothing is left over. What else
        stops it leaves all that was written for another run: ``ValueError`` when another process converts into the
        folder, or what was left over is of another conversion; ``OSError`` when the disk is full.
        """
        with left_over(self.folder) as left:
            if self._source is None:
                return self._write_at_once(left, tell)
            journal = left.journal(self._arguments, _identities(self._tables))
            if self.folder.exists():
                self._require_own(left, journal)
                left.remove()
                return self.nbytes
            try:
                return self._write(left, journal, tell)
            except ChangedFile:
                left.remove()
                raise

    def _write_at_once(self, left: LeftOver, tell: Tell) -> int:
        """Write all, or leave nothing."""
        if self.folder.exists():
            raise ValueError(f"{self.folder} is there already: give another folder.")
        left.empty()
        try:
            return self._write(left, left.journal(self._arguments, {}), tell)
        except BaseException:
            left.remove()
            raise

    def _require_own(self, left: LeftOver, journal: Journal) -> None:
        """Only what an earlier run did last of all, to remove its left-over, may be left to do."""
        if not journal.renamed or left.table.exists():
            raise ValueError(f"{self.folder} is there already: give another folder.")

    def _write(self, left: LeftOver, journal: Journal, tell: Tell) -> int:
        left.write(journal)  # first: a folder without one is nobody's left-over
        left.table.mkdir(exist_ok=True)
        taken = _keep_whole(self.shards, left, journal, tell)
        for shard in self.shards:
            if shard.name not in journal.whole:
                taken += _write_shard(shard, left, journal, tell)
        for table in self._tables:
            table.require_in_place()
        self._finish(left, journal)
        return taken

    def _finish(self, left: LeftOver, journal: Journal) -> None:
        """Write what speaks of all files, and give the table its name."""
        sums = {left.table / name: digest for name, digest in journal.whole.items()}
        if self._company is not None:
            self._company(left.table)
        if self._company is not None or len(self.shards) > 1:
            _write_index(left.table)
        others = [path for path in sorted(left.table.iterdir()) if path not in sums]
        for path in others:
            sync(path)
        sums |= digests(others)
        write_sums(left.table, sums)
        journal.renamed = True
        left.write(journal)
        if self.folder.exists():
            raise ValueError(f"{self.folder} was made by somebody else meanwhile: move it away, and convert again.")
        left.table.rename(self.folder)
        sync(self.folder.parent)
        left.remove()

    def _require_room(self) -> None:
        table = LeftOver(self.folder).table
        written = sum(path.stat().st_blocks * 512 for path in table.iterdir()) if table.is_dir() else 0
        require_room(self.folder.parent, self.nbytes - written, self.folder.name)


def _identities(tables: Sequence[RowSource]) -> dict[str, list[int]]:
    """Inode, bytes and time of every source file: what stays when the machine is started anew."""
    return {str(file.path.resolve()): list(file.identity[1:]) for table in tables for file in table.files}


def _keep_whole(shards: Sequence[Shard], left: LeftOver, journal: Journal, tell: Tell) -> int:
    """Bytes of files that are what the journal says; it forgets the others."""
    noted = [left.table / shard.name for shard in shards if shard.name in journal.whole]
    found = digests([path for path in noted if path.is_file()], tell)
    journal.whole = {path.name: digest for path, digest in found.items() if digest == journal.whole[path.name]}
    sizes = {path.name: path.stat().st_size for path in found}
    tell(-sum(size for name, size in sizes.items() if name not in journal.whole))
    left.keep_only({*journal.whole, *journal.begun})
    return sum(sizes[name] for name in journal.whole)


def _write_shard(shard: Shard, left: LeftOver, journal: Journal, tell: Tell) -> int:
    """Write the rows that are missing; gives the bytes of those that were there."""
    writer, taken = _open(shard, left, journal, tell)
    unsaved = 0

    def put(parts: tuple[Tensor, ...]) -> None:
        nonlocal unsaved
        writer.put(parts)
        size = sum(part.nbytes for part in parts)
        tell(size)
        unsaved += size
        if unsaved >= STRIDE:
            for piece in shard.pieces:
                piece.source.require_in_place()
            writer.sync()
            journal.begun[shard.name] = writer.begun()
            left.write(journal)
            unsaved = 0

    with closing(writer):
        _behind(put, (_encoded(piece, rows) for piece, rows in _chunks(shard, writer.rows)))
        writer.sync()
    sync(left.table)
    journal.begun.pop(shard.name, None)
    journal.whole[shard.name] = writer.sha256
    left.write(journal)
    return taken


def _open(shard: Shard, left: LeftOver, journal: Journal, tell: Tell) -> tuple[ShardWriter, int]:
    """A writer of the rows that are missing, and the bytes that are there."""
    path, begun = left.table / shard.name, journal.begun.get(shard.name)
    tell(file_size(shard.tensors) - shard.nbytes)
    if begun is not None and path.is_file():
        writer = ShardWriter(path, shard, anew=False)
        taken = 0

        def count(size: int) -> None:
            nonlocal taken
            taken += size
            tell(size)

        if writer.take_over(begun, count):
            return writer, taken
        writer.close()
        tell(-taken)
    writer = ShardWriter(path, shard, anew=True)
    sync(left.table)
    return writer, 0


def _behind(put: Callable[[tuple[Tensor, ...]], None], chunks: Iterator[tuple[Tensor, ...]]) -> None:
    """``put`` every chunk, on a thread of its own while the next ones are made."""

    def put_after(before: Future[None] | None, parts: tuple[Tensor, ...]) -> None:
        if before is not None:
            before.result()  # after one that failed, none is put
        put(parts)

    with ThreadPoolExecutor(1) as pool:
        waiting: deque[Future[None]] = deque()
        for parts in chunks:
            if len(waiting) == _WAITING:
                waiting.popleft().result()
            waiting.append(pool.submit(put_after, waiting[-1] if waiting else None, parts))
        for future in waiting:
            future.result()


def _chunks(shard: Shard, written: int) -> Iterator[tuple[Piece, range]]:
    """The rows of a shard after the first ``written``."""
    for piece in shard.pieces:
        first = piece.rows.start + min(written, len(piece.rows))
        written -= first - piece.rows.start
        step = max(1, CHUNK_NUMBERS // piece.source.width)
        for start in range(first, piece.rows.stop, step):
            yield piece, range(start, min(start + step, piece.rows.stop))


def _encoded(piece: Piece, rows: range) -> tuple[Tensor, ...]:
    parts = piece.source.read(rows)
    if piece.codec == piece.source.codec:
        return parts
    return CODECS[piece.codec].encode(CODECS[piece.source.codec].decode(parts))


def _write_index(folder: Path) -> None:
    """The file that says where each tensor is, as transformers writes it."""
    headers = {path.name: read_header(path) for path in sorted(folder.glob("*.safetensors"))}
    named = {name: file for file, places in headers.items() for name in places}
    total = sum(place.nbytes for places in headers.values() for place in places.values())
    content = {"metadata": {"total_size": total}, "weight_map": named}
    with replacing(folder / INDEX) as file:
        file.write(f"{json.dumps(content, indent=2, sort_keys=True)}\n".encode())
