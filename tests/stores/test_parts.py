"""A table on disk: real safetensors, aligned, whole or refused with a sentence that names the file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from torch_engram.durable import file_digest
from torch_engram.stores import (
    Manifest,
    Plane,
    RecordLayout,
    check_table,
    load_table,
    parts,
    parts_in,
    save_table,
    save_touched,
    update_table,
)

LAYOUT = RecordLayout((Plane("value", 3, "bf16"), Plane("count", 1, "int32"), Plane("moment", 2, "int8")))


def records_of(rows: int, layout: RecordLayout = LAYOUT) -> Tensor:
    """Random bytes in every field, zeros in the gaps that no file keeps."""
    records = layout.empty(rows)
    for field in layout.fields:
        records[:, field.start : field.stop] = torch.randint(256, (rows, field.stop - field.start)).to(torch.uint8)
    return records


def save(folder: Path, records: Tensor, rows_per_part: int = 4096, layout: RecordLayout = LAYOUT) -> Manifest:
    manifest = save_table(folder, len(records), layout, records.__getitem__, rows_per_part)
    return Manifest.from_dict(json.loads(json.dumps(manifest.to_dict())))


def load(folder: Path, manifest: Manifest, rows: int, layout: RecordLayout = LAYOUT) -> Tensor:
    found = layout.empty(rows)
    check_table(folder, manifest, rows, layout)
    load_table(folder, manifest, layout, found.__setitem__)
    return found


@given(st.integers(0, 40), st.integers(1, 17), st.integers(1, 13))
def test_saved_and_loaded_is_the_same(
    tmp_path_factory: pytest.TempPathFactory, rows: int, rows_per_part: int, chunk: int
) -> None:
    folder, records = tmp_path_factory.mktemp("table"), records_of(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "CHUNK_ROWS", chunk)
        manifest = save(folder, records, rows_per_part)
        assert torch.equal(load(folder, manifest, rows), records)
    assert len(manifest.parts) == -(-rows // rows_per_part)
    assert {path.name for path in folder.iterdir()} == {part.file for part in manifest.parts}


@given(st.integers(1, 40), st.lists(st.sets(st.integers(0, 39)), max_size=5), st.integers(1, 13))
def test_changed_rows_are_added_and_nothing_earlier_is_touched(
    tmp_path_factory: pytest.TempPathFactory, rows: int, updates: list[set[int]], chunk: int
) -> None:
    folder, records = tmp_path_factory.mktemp("table"), records_of(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "CHUNK_ROWS", chunk)
        patch.setattr(parts, "ROWS_PER_PART", 7)
        manifests, tables = [save(folder, records)], [records]
        for update in updates:
            changed = torch.tensor(sorted(row for row in update if row < rows), dtype=torch.int64)
            records = records.clone()
            records[changed] = records_of(len(changed))
            manifests.append(update_table(folder, manifests[-1], changed, LAYOUT, records.__getitem__))
            tables.append(records)
        for manifest, table in zip(manifests, tables, strict=True):  # every one of them is still whole
            assert torch.equal(load(folder, manifest, rows), table)
            assert sum(part.rows for part in manifest.parts) <= rows + rows // 2


def test_an_update_writes_the_changed_rows_alone_until_they_are_half_of_the_table(tmp_path: Path) -> None:
    records = records_of(4096)
    manifest = save(tmp_path, records)
    (whole,) = tmp_path.iterdir()
    inode = whole.stat().st_ino
    for times in (1, 2):
        manifest = update_table(tmp_path, manifest, torch.arange(0, 4096, 4), LAYOUT, records.__getitem__)
        assert [part.rows for part in manifest.parts] == [4096, *times * [1024]]
    assert whole.stat().st_ino == inode
    with safe_open(tmp_path / manifest.changes[0].file, framework="pt") as file:
        assert torch.equal(file.get_tensor("row"), torch.arange(0, 4096, 4))
        assert file.get_tensor("value").shape == (1024, 3)
    manifest = update_table(tmp_path, manifest, torch.tensor([9]), LAYOUT, records.__getitem__)
    assert not manifest.changes


@pytest.mark.parametrize("why", ["a part is gone", "a part is cut off", "other planes"])
def test_what_cannot_be_added_to_is_written_anew(tmp_path: Path, why: str) -> None:
    records, layout = records_of(10), LAYOUT
    manifest = save(tmp_path, records)
    whole = tmp_path / manifest.parts[0].file
    if why == "a part is gone":
        whole.unlink()
    elif why == "a part is cut off":
        whole.write_bytes(whole.read_bytes()[:-1])
    else:
        layout = RecordLayout(LAYOUT.planes[:2])
        records = records_of(10, layout)
    manifest = update_table(tmp_path, manifest, torch.tensor([3]), layout, records.__getitem__)
    assert torch.equal(load(tmp_path, manifest, 10, layout), records) and not manifest.changes


def test_touched_rows_alone_are_saved_and_never_added_to(tmp_path: Path) -> None:
    records, touched = LAYOUT.empty(100_000), torch.tensor([0, 7, 99_999])
    records[touched] = records_of(3)
    manifest = save_touched(tmp_path, 100_000, touched, LAYOUT, records.__getitem__)
    assert Manifest.from_dict(json.loads(json.dumps(manifest.to_dict()))) == manifest and manifest.touched == 3
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 8192
    assert torch.equal(load(tmp_path, manifest, 100_000), records)
    whole = update_table(tmp_path, manifest, torch.tensor([3]), LAYOUT, records.__getitem__)
    assert whole.touched is None and torch.equal(load(tmp_path, whole, 100_000), records)
    content = manifest.to_dict()
    for wrong in ({"parts": []}, {"touched": 4}, {"touched": None}, {"parts": whole.to_dict()["parts"]}):
        with pytest.raises(ValueError, match="does not name parts for all of its rows"):
            Manifest.from_dict(content | wrong)


def test_a_part_of_another_table_is_refused_although_its_checksum_is_right(tmp_path: Path) -> None:
    manifest = save_touched(tmp_path, 10, torch.tensor([2, 5]), LAYOUT, records_of(10).__getitem__)
    (part,) = manifest.parts
    file, content = tmp_path / part.file, load_file(tmp_path / part.file)
    for other, sentence in (
        (content | {"row": torch.tensor([2, 10])}, "lists rows out of order"),
        (content | {"count": content["count"].float()}, r"is not the part that is listed \('count' differs\)"),
        (None, "is no whole safetensors file"),
    ):
        save_file(other, file) if other is not None else torch.save(content, file)  # a pickle
        named = replace(manifest, parts=(replace(part, sha256=file_digest(file)),))
        with pytest.raises(ValueError, match=rf"{part.file} {sentence}"):
            load(tmp_path, named, 10)


def test_parts_are_told_from_other_files(tmp_path: Path) -> None:
    manifest = save(tmp_path, records_of(10), rows_per_part=8)
    manifest = update_table(tmp_path, manifest, torch.tensor([3]), LAYOUT, records_of(10).__getitem__)
    mine = {"unnamed-89abcdef.0123abcd.tmp", "unnamed-89abcdef", *(part.file for part in manifest.parts)}
    others = {
        "notes.txt",
        "rows-by-country.csv",
        "changes-of-2024.safetensors",
        "unnamed.txt",
        "my-" + manifest.parts[0].file,
    }
    for name in ("unnamed-89abcdef.0123abcd.tmp", "unnamed-89abcdef", *others):
        (tmp_path / name).write_text("")
    (tmp_path / f"changes-{'0' * 16}.safetensors").mkdir()
    assert {path.name for path in parts_in(tmp_path)} == mine and len(manifest.parts) == 3


def test_parts_are_safetensors_with_aligned_data(tmp_path: Path) -> None:
    records = records_of(4096 + 9)
    full, rest = (tmp_path / part.file for part in save(tmp_path, records).parts)
    with safe_open(full, framework="pt") as file:
        assert set(file.keys()) == {"value", "count", "moment", "moment.scale"}
        assert torch.equal(file.get_tensor("count").view(torch.uint8), records[:4096, 8:12])
        assert file.get_tensor("value").dtype == torch.bfloat16
        assert file.get_tensor("moment.scale").shape == (4096, 1)
    for path, every_tensor in ((full, True), (rest, False)):
        length = int.from_bytes(path.read_bytes()[:8], "little")
        assert (8 + length) % 4096 == 0
        starts = [entry["data_offsets"][0] for entry in json.loads(path.read_bytes()[8 : 8 + length]).values()]
        assert not every_tensor or all(start % 4096 == 0 for start in starts)


def test_planes_that_a_reader_lacks_stay_on_disk(tmp_path: Path) -> None:
    records, fewer = records_of(10), RecordLayout(LAYOUT.planes[:1])
    assert torch.equal(load(tmp_path, save(tmp_path, records), 10, fewer)[:, :6], records[:, :6])


OTHER_PLANES = [
    (Plane("mean", 3),), (Plane("value", 3, "fp32"),), (Plane("value", 2, "bf16"),), (Plane("count", 3, "int32"),),
    (Plane("moment", 2, "fp32"),),
]  # fmt: skip


@pytest.mark.parametrize("planes", OTHER_PLANES)
def test_other_planes_are_refused(tmp_path: Path, planes: tuple[Plane, ...]) -> None:
    manifest = save(tmp_path, records_of(10))
    with pytest.raises(ValueError, match=r"has other planes than this table: load it with its own"):
        load(tmp_path, manifest, 10, RecordLayout(planes))


@pytest.mark.parametrize("damage, sentence", [
    ("truncate", r"rows-0+8-0+10-\w+\.safetensors is truncated or damaged .* use an earlier checkpoint"),
    ("flip", r"rows-0+8-0+10-\w+\.safetensors is truncated or damaged"),
    ("remove", r"rows-0+8-0+10-\w+\.safetensors cannot be read .* incomplete"),
    ("changes", r"changes-\w+\.safetensors is truncated or damaged"),
    ("rows", "holds 10 rows where 11 are needed"),
])  # fmt: skip
def test_damage_is_named_before_any_row_is_handed_on(tmp_path: Path, damage: str, sentence: str) -> None:
    manifest = save(tmp_path, records_of(10), rows_per_part=8)
    manifest = update_table(tmp_path, manifest, torch.tensor([3]), LAYOUT, records_of(10).__getitem__)
    part, changes = tmp_path / manifest.parts[1].file, tmp_path / manifest.changes[0].file
    match damage:
        case "truncate":
            part.write_bytes(part.read_bytes()[:-1])
        case "flip":
            content = bytearray(part.read_bytes())
            content[-3] ^= 4
            part.write_bytes(content)
        case "remove":
            part.unlink()
        case "changes":
            changes.write_bytes(changes.read_bytes()[:-1])
    with pytest.raises(ValueError, match=sentence) as caught:
        load(tmp_path, manifest, 11 if damage == "rows" else 10)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change, sentence", [
    (lambda m: m.clear(), "is no table's manifest"),
    (lambda m: m.update(parts=[1]), "is no table's manifest"),
    (lambda m: m.update(planes=3), "is no table's manifest"),
    (lambda m: m["parts"][0].pop("sha256"), "is no table's manifest"),
    (lambda m: m["parts"].pop(1), "does not name parts for all of its rows"),
    (lambda m: m["parts"][1].update(first=9), "does not name parts for all of its rows"),
    (lambda m: m["parts"].reverse(), "does not name parts for all of its rows"),
    (lambda m: m["parts"][1].update(file="../elsewhere.safetensors"), "does not name parts for all of its rows"),
])  # fmt: skip
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, change: Any, sentence: str) -> None:
    manifest = save(tmp_path, records_of(10), rows_per_part=8)
    content = update_table(tmp_path, manifest, torch.tensor([3]), LAYOUT, records_of(10).__getitem__).to_dict()
    assert Manifest.from_dict(content).to_dict() == content
    change(content)
    with pytest.raises(ValueError, match=sentence):
        Manifest.from_dict(content)


def test_a_disk_error_leaves_the_earlier_table_and_no_litter(tmp_path: Path) -> None:
    records = records_of(10)

    def read(rows: Tensor) -> Tensor:
        raise OSError(28, "No space left on device")

    manifest = save(tmp_path, records)
    with pytest.raises(OSError, match="No space left"):
        save_table(tmp_path, 10, LAYOUT, read, rows_per_part=8)
    assert not list(tmp_path.glob("unnamed*"))
    assert torch.equal(load(tmp_path, manifest, 10), records)
