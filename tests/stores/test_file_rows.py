"""Rows where they lie in files: as the library reads them, over tensors, files and saves, at any address."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from torch_engram.stores import Manifest, Plane, RecordLayout, parts, save_table, save_touched, update_table
from torch_engram.stores.file_rows import FileRows
from torch_engram.stores.layouts import components_of
from torch_engram.stores.named_tables import NamedTable, find_tables
from torch_engram.stores.open_files import ChangedFile, TensorFile
from torch_engram.stores.synthetic import random_component, synthesise
from torch_engram.stores.tensor_files import TensorWriter, encode_header, file_size, tensors_in

CODEC_NAMES = ["fp32", "bf16", "fp16", "fp8", "int8"]
COUNTED = RecordLayout((Plane("value", 3, "bf16"), Plane("count", 1, "int32")))


def named(folder: Path) -> NamedTable:
    (table,) = find_tables(tensors_in(folder))
    return table


def expected_records(layout: RecordLayout, rows: int, seed: int = 0) -> Tensor:
    """What :func:`synthesise` makes of a table of one chunk."""
    records = layout.empty(rows)
    for field in layout.fields:
        layout.view(records, field).copy_(random_component(field.component, range(rows), seed))
    return records


@given(st.sampled_from(CODEC_NAMES), st.integers(1, 70), st.integers(1, 70), st.integers(1, 9), st.data())
def test_records_are_the_rows_of_the_files(
    tmp_path_factory: pytest.TempPathFactory, codec: str, rows: int, width: int, shards: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("tables") / "table"
    many = codec == "bf16"  # Qwen4Exp's layout is the one with many tensors
    synthesise(folder, "qwen4exp" if many else "plain", rows, width, codec, shards=min(rows, shards) if many else 1)
    table = FileRows.of(named(folder))
    assert (table.rows, table.layout) == (rows, RecordLayout((Plane("value", width, codec),)))
    expected = expected_records(table.layout, rows)
    first = data.draw(st.integers(0, rows))
    last = data.draw(st.integers(first, rows))
    assert torch.equal(table.read(first, last), expected[first:last])
    require_apart(table, first, last)
    for column, files, starts in zip(table.columns, *table.locate(np.arange(rows)), strict=True):
        for row in (first, last):
            if row < rows:
                at = int(starts[row])
                found = table.files[files[row]].path.read_bytes()[at : at + column.nbytes]
                assert found == bytes(expected[row, column.field.start : column.field.stop].tolist())


def require_apart(table: FileRows, first: int, last: int) -> None:
    """The components apart are those of the records."""
    records, parts = table.read(first, last), table.read_apart(first, last)
    for field, part in zip(table.layout.fields, parts, strict=True):
        assert (part.dtype, part.shape) == (field.component.dtype, (last - first, field.component.width))
        assert part.is_contiguous() and torch.equal(part.view(torch.uint8), records[:, field.start : field.stop])


def test_deepseeks_scales_may_lie_in_another_file(tmp_path: Path) -> None:
    synthesise(tmp_path / "table", "deepseek-v4.1", 30, 256, "fp8")
    table = FileRows.of(named(tmp_path / "table"))
    assert table.layout.nbytes == 272 and [column.nbytes for column in table.columns] == [256, 8]
    assert torch.equal(table.read(0, 30), expected_records(table.layout, 30))


def random_records(layout: RecordLayout, rows: int) -> Tensor:
    """Random bytes in every field, zeros in the gaps that no file keeps."""
    records = layout.empty(rows)
    for field in layout.fields:
        records[:, field.start : field.stop] = torch.randint(256, (rows, field.stop - field.start)).to(torch.uint8)
    return records


@given(st.integers(1, 40), st.integers(1, 17), st.lists(st.sets(st.integers(0, 39), max_size=6), max_size=4))
def test_the_newest_record_of_a_saved_row_is_read(
    tmp_path_factory: pytest.TempPathFactory, rows: int, rows_per_part: int, saves: list[set[int]]
) -> None:
    folder, records = tmp_path_factory.mktemp("table"), random_records(COUNTED, rows)
    manifest = save_table(folder, rows, COUNTED, records.__getitem__, rows_per_part)
    for changes in saves:
        changed = torch.tensor(sorted(row for row in changes if row < rows), dtype=torch.int64)
        records[changed] = random_records(COUNTED, len(changed))
        manifest = update_table(folder, manifest, changed, COUNTED, records.__getitem__)
    table = FileRows.saved(folder, manifest, COUNTED)
    assert torch.equal(table.read(0, rows), records)
    middle = rows // 2
    assert torch.equal(table.read(middle, rows), records[middle:])
    require_apart(table, middle, rows)


@given(st.integers(1, 40), st.sets(st.integers(0, 39)), st.integers(1, 9))
def test_rows_that_are_in_no_file_read_as_zeros(
    tmp_path_factory: pytest.TempPathFactory, rows: int, some: set[int], rows_per_part: int
) -> None:
    folder, records = tmp_path_factory.mktemp("table"), COUNTED.empty(rows)
    touched = torch.tensor(sorted(row for row in some if row < rows), dtype=torch.int64)
    records[touched] = random_records(COUNTED, len(touched))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "ROWS_PER_PART", rows_per_part)
        table = FileRows.saved(folder, save_touched(folder, rows, touched, COUNTED, records.__getitem__), COUNTED)
    assert not table.whole and torch.equal(table.read(0, rows), records)
    require_apart(table, rows // 2, rows)
    for first in range(rows):
        assert table.is_hole(first, rows) == (not (touched >= first).any())


def test_changes_that_list_no_rows_or_others_are_refused_by_name(tmp_path: Path) -> None:
    records = random_records(COUNTED, 9)
    manifest = save_table(tmp_path, 9, COUNTED, records.__getitem__)
    manifest = update_table(tmp_path, manifest, torch.tensor([2, 5, 7]), COUNTED, records.__getitem__)
    file = tmp_path / manifest.changes[0].file
    content = load_file(file)
    for rows in ([5, 2, 7], [2, 2, 7], [-1, 2, 7], [2, 5, 9]):
        save_file(content | {"row": torch.tensor(rows)}, file)
        with pytest.raises(ValueError, match=f"{file.name} lists rows out of order: use an intact copy"):
            FileRows.saved(tmp_path, manifest, COUNTED)
    del content["row"]
    save_file(content, file)
    with pytest.raises(ValueError, match=rf"{file.name} is not the part that is listed \('row' differs\)"):
        FileRows.saved(tmp_path, manifest, COUNTED)


def test_tables_of_one_file_open_it_once(tmp_path: Path) -> None:
    save_file({f"layers.{n}.weight": torch.full((3, 4), float(n)) for n in (1, 2)}, tmp_path / "both.safetensors")
    opened: dict[Path, TensorFile] = {}
    one, two = (FileRows.of(table, opened) for table in find_tables(tensors_in(tmp_path)))
    assert one.files == two.files == list(opened.values()) and len(opened) == 1
    assert [table.read_apart(0, 3)[0].unique().item() for table in (one, two)] == [1, 2]


def test_addresses_past_2_to_the_31_and_32(tmp_path: Path) -> None:
    rows, width = 2**31 + 9, 1  # rows past 2**31, bytes past 2**32
    file = tmp_path / "table.safetensors"
    header = encode_header({"table.weight": (torch.bfloat16, (rows, width))})
    with open(file, "wb") as opened:
        opened.write(header)
        opened.truncate(len(header) + 2 * rows)  # holes read as zeros
        for row in (5, 2**30, 2**31 - 1, 2**31 + 8):
            os.pwrite(opened.fileno(), (row % 251 + 1).to_bytes(2, "little"), len(header) + 2 * row)
    table = FileRows.of(named(file))
    for row in (5, 2**30, 2**31 - 1, 2**31 + 8):
        assert table.read(row, row + 1)[0, :2].tolist() == [row % 251 + 1, 0]
        assert not table.read(row - 1, row).any()


def test_rows_that_are_not_there_are_named(tmp_path: Path) -> None:
    synthesise(tmp_path / "table", "plain", 30, 8, "fp32")
    table = FileRows.of(named(tmp_path / "table"))
    for first, last, row in ((-1, 3, "-1"), (3, 31, "30"), (2**40, 2**40 + 1, "1,099,511,627,776")):
        with pytest.raises(ValueError, match=f"Row {row} is not in table.weight, which has 30 rows"):
            table.read(first, last)


def test_files_that_changed_since_their_header_was_read_are_refused(tmp_path: Path) -> None:
    synthesise(tmp_path / "table", "plain", 30, 8, "fp32")
    table = named(tmp_path / "table")
    synthesise(tmp_path / "other", "plain", 31, 8, "fp32")
    (file,), (other,) = table.files, named(tmp_path / "other").files
    os.replace(other, file)
    with pytest.raises(ValueError, match=r"table-00000\.safetensors has another header than before"):
        FileRows.of(table)
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"table-00000\.safetensors is no whole safetensors file"):
        FileRows.of(table)
    file.unlink()
    with pytest.raises(ValueError, match=r"table-00000\.safetensors is no file"):
        FileRows.of(table)


def test_what_is_deleted_or_replaced_is_still_read_and_what_is_changed_is_refused(tmp_path: Path) -> None:
    for name, seed in (("table", 0), ("other", 1)):
        synthesise(tmp_path / name, "plain", 30, 8, "fp32", seed=seed)
    table = FileRows.of(named(tmp_path / "table"))
    expected, file = expected_records(table.layout, 30), table.files[0].path
    table.files[0].require_in_place()
    os.replace(named(tmp_path / "other").files[0], file)
    for _ in range(2):
        assert torch.equal(table.read(0, 30), expected)
        with pytest.raises(ChangedFile, match=r"table-00000\.safetensors was replaced or removed while it was in use"):
            table.files[0].require_in_place()
        file.unlink(missing_ok=True)

    synthesise(tmp_path / "again", "plain", 30, 8, "fp32")
    table = FileRows.of(named(tmp_path / "again"))
    file = table.files[0].path
    content = file.read_bytes()
    with open(file, "r+b") as opened:
        opened.seek(-4, os.SEEK_END)
        opened.write(b"new!")
    with pytest.raises(ChangedFile, match=r"table-00000\.safetensors was changed while it was in use"):
        table.read(0, 1)
    file.write_bytes(content[:-40])
    with pytest.raises(ChangedFile, match=r"table-00000\.safetensors was changed while it was in use"):
        table.read(29, 30)


def test_a_read_error_names_file_and_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synthesise(tmp_path / "table", "plain", 30, 8, "fp32")
    table = FileRows.of(named(tmp_path / "table"))
    folder = os.open(tmp_path, os.O_RDONLY)  # a descriptor that cannot be read
    monkeypatch.setattr(table.files[0], "descriptor", folder)
    with pytest.raises(OSError, match=r"at byte 4,\d\d\d: check the disk.*table-00000\.safetensors"):
        table.read(1, 2)
    os.close(folder)


@given(st.integers(1, 3000), st.data())
def test_holes_are_rows_that_nobody_wrote(
    tmp_path_factory: pytest.TempPathFactory, rows: int, data: st.DataObject
) -> None:
    file = tmp_path_factory.mktemp("sparse") / "table.safetensors"
    components = components_of("table.weight", "fp8", 32)
    tensors = {name: (part.dtype, (rows, part.width)) for name, part in components.items()}
    begin, end = sorted(data.draw(st.tuples(st.integers(0, rows), st.integers(0, rows))))
    with open(file, "wb") as opened:
        writer = TensorWriter(opened, tensors)
        for name, part in components.items():
            if end > begin:
                writer.put(name, begin, random_component(part, range(begin, end), 0))
        opened.truncate(file_size(tensors))
    table = FileRows.of(named(file.parent))
    first, last = sorted(data.draw(st.tuples(st.integers(0, rows), st.integers(0, rows))))
    if table.is_hole(first, last):
        assert not table.read(first, last).any()
        assert end == begin or last <= begin or first >= end or first == last
    else:
        assert end > begin, "what is sparse throughout has holes only"


def test_a_file_that_was_cut_off_is_no_hole(tmp_path: Path) -> None:
    synthesise(tmp_path / "table", "plain", 5000, 32, "fp8")
    table = FileRows.of(named(tmp_path / "table"))
    assert not table.is_hole(0, 5000)
    os.truncate(table.files[0].path, 4096)
    with pytest.raises(ChangedFile, match="was changed while it was in use"):
        table.is_hole(4000, 5000)


def test_what_the_system_reads_in_pieces_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synthesise(tmp_path / "table", "plain", 30, 8, "fp8")
    table, real = FileRows.of(named(tmp_path / "table")), os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, views, at: real(file, [views[0][:7]], at))
    assert torch.equal(table.read(0, 30), expected_records(table.layout, 30))


def test_a_part_that_is_missing_or_another_is_named(tmp_path: Path) -> None:
    records = random_records(COUNTED, 9)
    manifest = save_table(tmp_path, 9, COUNTED, records.__getitem__, 5)
    wide = RecordLayout((Plane("value", 4, "bf16"), Plane("count", 1, "int32")))
    with pytest.raises(ValueError, match=r"has no value of BF16 \[4\]: open it with its own codec"):
        FileRows.saved(tmp_path, manifest, wide)
    one, two = (tmp_path / part.file for part in manifest.parts)
    os.replace(one, two)
    with pytest.raises(ValueError, match="is no file"):
        FileRows.saved(tmp_path, manifest, COUNTED)
    two.rename(one)
    two.write_bytes(one.read_bytes())
    with pytest.raises(ValueError, match=f"{two.name} is not the part that is listed"):
        FileRows.saved(tmp_path, Manifest(9, manifest.planes, manifest.parts), COUNTED)
