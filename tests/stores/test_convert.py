"""Conversion of tables: every byte of the same codec, what the codec says of another, and going on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from itertools import count
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from torch_engram.stores import CODECS, convert
from torch_engram.stores.checksums import read_sums
from torch_engram.stores.convert import Conversion
from torch_engram.stores.layouts import components_of
from torch_engram.stores.open_files import ChangedFile
from torch_engram.stores.row_sources import named_rows
from torch_engram.stores.shard_writer import ShardWriter
from torch_engram.stores.shards import Target
from torch_engram.stores.synthetic import synthesise
from torch_engram.stores.tensor_files import encode_header, file_size, read_tensor, tensors_in, write_tensors

CODEC_NAMES = ["fp32", "bf16", "fp16", "fp8", "int8"]


def run(source: Path, folder: Path, *target: object, **options: object) -> Conversion:
    made = Conversion(source, named_rows(source), folder, Target(*target, **options))
    made.run()
    return made


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def rows_of(folder: Path) -> list[tuple[Tensor, ...]]:
    """The components of every table, read by the library."""
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no dict)
    found = []
    for table in named_rows(folder):
        names = [name.replace("*", str(number)) for number, name in enumerate([table.table.name] * len(tensors))]
        parts = [list(components_of(name, table.codec, table.width)) for name in dict.fromkeys(names)]
        found.append(
            tuple(
                torch.cat([tensors[name] for name in column if name in tensors]) for column in zip(*parts, strict=True)
            )
        )
    return found


def same_bytes(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(
        one.dtype == two.dtype and torch.equal(one.view(torch.uint8), two.view(torch.uint8))
        for one, two in zip(a, b, strict=True)
    )


def same_numbers(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    """PyTorch's casts leave the sign and payload of NaN to where in a tensor it stands."""
    return all(
        one.dtype == two.dtype and torch.allclose(one.float(), two.float(), rtol=0, atol=0, equal_nan=True)
        for one, two in zip(a, b, strict=True)
    )


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few rows, and a note after each few."""
    monkeypatch.setattr(convert, "CHUNK_NUMBERS", 40)
    monkeypatch.setattr(convert, "STRIDE", 200)


@settings(max_examples=12)
@given(st.integers(1, 60), st.integers(1, 30), st.tuples(*[st.integers(1, 9)] * 3), st.integers(1, 500))
def test_sharded_anew_and_back_is_the_same_byte_for_byte(
    tmp_path_factory: pytest.TempPathFactory, rows: int, width: int, counts: tuple[int, int, int], chunk: int
) -> None:
    folder = tmp_path_factory.mktemp("tables")
    first, second, third = (min(rows, count) for count in counts)
    synthesise(folder / "source", "qwen4exp", rows, width, "bf16", shards=first)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "CHUNK_NUMBERS", chunk)
        run(folder / "source", folder / "second", shards=second)
        run(folder / "second", folder / "back", shards=first)
        run(folder / "second", folder / "plain", "plain")
        run(folder / "plain", folder / "third", "qwen4exp", shards=third)
        run(folder / "source", folder / "at once", shards=third)
    assert files(folder / "third") == files(folder / "at once")
    made = [data for name, data in files(folder / "back").items() if name.endswith("rs")]
    assert made == list(files(folder / "source").values())
    assert len(list((folder / "second").glob("*.safetensors"))) == second


@pytest.mark.parametrize("begun", CODEC_NAMES)
@pytest.mark.parametrize("wanted", CODEC_NAMES)
@pytest.mark.usefixtures("small_steps")
def test_rows_are_what_the_codec_makes_of_them_and_of_the_same_codec_the_very_bytes(
    tmp_path: Path, begun: str, wanted: str
) -> None:
    """All bytes may be there, those that are no number, too."""
    parts = {
        name: torch.randint(256, (37, part.nbytes), dtype=torch.uint8).view(part.dtype)
        for name, part in components_of("x.weight", begun, 45).items()
    }
    (tmp_path / "source").mkdir()
    save_file(parts, tmp_path / "source" / "x.safetensors")
    run(tmp_path / "source", tmp_path / "out", None, wanted)
    expected = tuple(parts.values())
    (found,) = rows_of(tmp_path / "out")
    if begun == wanted:
        assert same_bytes(found, expected)
    else:
        assert same_numbers(found, CODECS[wanted].encode(CODECS[begun].decode(expected)))


@pytest.fixture
def layers(tmp_path: Path) -> Path:
    """Two layers as DeepSeek-V4.1 has them, in four files with an index."""
    folder = tmp_path / "layers"
    folder.mkdir()
    named = {}
    for layer, rows in ((14, 31), (1, 50)):
        for name, part in components_of(f"layers.{layer}.engram.embed.weight", "fp8", 64).items():
            tensor = torch.randint(1, 255, (rows, part.nbytes), dtype=torch.uint8).view(part.dtype)
            named[name] = f"{len(named)}.safetensors"
            save_file({name: tensor}, folder / named[name])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": named}))
    return folder


@pytest.mark.usefixtures("small_steps")
def test_several_layers_at_once_and_back(tmp_path: Path, layers: Path) -> None:
    run(layers, tmp_path / "two", shards=2)
    run(tmp_path / "two", tmp_path / "plain", "plain", shard_size=10**6)
    run(tmp_path / "plain", tmp_path / "back", "deepseek-v4.1", shards=2)
    assert files(tmp_path / "two") == files(tmp_path / "back")
    run(layers, tmp_path / "dealt", "qwen4exp", shards=3)
    tables = named_rows(tmp_path / "dealt")
    assert [(table.layer, table.rows, table.codec) for table in tables] == [(1, 50, "bf16"), (14, 31, "bf16")]
    for made, parts in zip(rows_of(tmp_path / "dealt"), rows_of(layers), strict=True):
        assert same_bytes(made, (CODECS["fp8"].decode(parts).bfloat16(),))


@pytest.mark.usefixtures("small_steps")
def test_sums_and_index_are_of_what_is_there(tmp_path: Path, layers: Path) -> None:
    made = run(layers, tmp_path / "out", shards=2)
    found = files(tmp_path / "out")
    sums = read_sums(tmp_path / "out")
    assert sums == {name: hashlib.sha256(data).hexdigest() for name, data in found.items() if name != "SHA256SUMS"}
    assert made.nbytes == sum(len(data) for name, data in found.items() if name.endswith(".safetensors"))
    index = json.loads(found["model.safetensors.index.json"])
    for file in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            assert {name for name, where in index["weight_map"].items() if where == file.name} == set(opened.keys())
    assert index["metadata"]["total_size"] == 81 * 66
    run(layers, tmp_path / "one")
    assert set(files(tmp_path / "one")) == {"model.safetensors", "SHA256SUMS"}


@settings(max_examples=12)
@given(st.integers(1, 3000), st.integers(1, 50), st.integers(4096, 40_000))
def test_no_file_is_larger_than_it_may_be_and_fewer_would_not_do(
    tmp_path_factory: pytest.TempPathFactory, rows: int, width: int, size: int
) -> None:
    folder = tmp_path_factory.mktemp("tables")
    synthesise(folder / "source", "qwen4exp", rows, width, "bf16")
    if size < 4096 + 2 * width:
        with pytest.raises(ValueError, match="give a larger --shard-size"):
            run(folder / "source", folder / "out", shard_size=size)
        return
    count = len(run(folder / "source", folder / "out", shard_size=size).shards)
    assert max(file.stat().st_size for file in (folder / "out").glob("*.safetensors")) <= size
    if count > 1:
        run(folder / "source", folder / "fewer", shards=count - 1)
        assert max(file.stat().st_size for file in (folder / "fewer").glob("*.safetensors")) > size


def test_tables_that_stay_whole_are_packed(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    save_file(
        {f"{n}.weight": torch.ones(rows, 8) for n, rows in enumerate((10, 20, 300, 5))},
        tmp_path / "source/x.safetensors",
    )
    made = run(tmp_path / "source", tmp_path / "out", shard_size=4096 + 9600)
    assert [[piece.source.name for piece in shard.pieces] for shard in made.shards] == [
        ["0.weight", "1.weight"], ["2.weight"], ["3.weight"],
    ]  # fmt: skip


# -- going on --------------------------------------------------------------------------------------------------------


class Stop(Exception):
    """What ends a run in these tests."""


def stopped(patch: pytest.MonkeyPatch, after: int) -> None:
    """Runs end after so many chunks."""
    left = iter(range(after))
    put = ShardWriter.put

    def fail(self: ShardWriter, parts: tuple[Tensor, ...]) -> None:
        if next(left, None) is None:
            raise Stop
        put(self, parts)

    patch.setattr(ShardWriter, "put", fail)


DAMAGES = ["nothing", "a whole file", "a begun file", "the journal", "a cut file", "no files", "a wrong number"]


def damage(left: Path, kind: str) -> None:
    table, journal = left / "table", left / "journal.json"
    noted = json.loads(journal.read_text())
    match kind:
        case "a whole file" | "a begun file":
            for name in noted["whole" if kind == "a whole file" else "begun"]:
                data = bytearray((table / name).read_bytes())
                data[4100] ^= 1
                (table / name).write_bytes(bytes(data))
        case "the journal":
            journal.write_bytes(journal.read_bytes()[:-20])
        case "a cut file":
            for file in table.iterdir():
                file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        case "no files":
            for file in table.iterdir():
                file.unlink()
        case "a wrong number":
            for begun in noted["begun"].values():
                begun[0] += 1
            journal.write_text(json.dumps(noted))


@pytest.mark.parametrize("after", [0, 5, 17, 22])  # of 17 and 11 chunks in two files, each noted
@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.usefixtures("small_steps")
def test_what_was_stopped_goes_on_and_what_was_damaged_is_done_again(
    tmp_path: Path, layers: Path, monkeypatch: pytest.MonkeyPatch, after: int, kind: str
) -> None:
    options = ("plain", "int8", 2)
    monkeypatch.setattr(convert, "CHUNK_NUMBERS", 192)
    run(layers, tmp_path / "at once", *options)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        stopped(patch, after)
        run(layers, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()
    damage(tmp_path / "out.converting", kind)
    told: list[int] = []
    again = Conversion(layers, named_rows(layers), tmp_path / "out", Target(*options))
    kept = again.run(told.append)
    assert files(tmp_path / "out") == files(tmp_path / "at once")
    assert sum(told) == again.nbytes and not (tmp_path / "out.converting").exists()
    first, row = 4096 + 50 * 68, 68
    undamaged = {0: 0, 5: 15 * row, 17: first, 22: first + 15 * row}[after]
    match kind:
        case "nothing":
            assert kept == undamaged
        case "a whole file":
            assert kept == undamaged - first * (after >= 17)
        case "a begun file" | "a wrong number":
            assert kept == first * (after >= 17)
        case _:
            assert kept == 0


@pytest.mark.parametrize("number", [3, 4, 11, 12])
@pytest.mark.usefixtures("small_steps")
def test_one_write_that_fails_costs_no_row(
    tmp_path: Path, layers: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Others wait behind it, and there is room again: they must not take its place."""
    monkeypatch.setattr(convert, "STRIDE", 1)
    run(layers, tmp_path / "at once", "plain", "int8")
    calls, write = count(), os.pwrite

    def fail_once(*arguments: int) -> int:
        if next(calls) == number:
            time.sleep(0.02)  # for the others to come
            raise OSError(28, "No space left on device")
        return write(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="No space left") as raised:
        patch.setattr(os, "pwrite", fail_once)
        run(layers, tmp_path / "out", "plain", "int8")
    assert str(raised.value.filename).endswith("out.converting/table/model.safetensors")
    run(layers, tmp_path / "out", "plain", "int8")
    assert files(tmp_path / "out") == files(tmp_path / "at once")


@pytest.mark.usefixtures("small_steps")
def test_a_run_that_ended_between_the_name_and_its_left_over_is_ended(
    tmp_path: Path, layers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert.LeftOver, "remove", lambda self: None)
    run(layers, tmp_path / "out")
    monkeypatch.undo()
    before = files(tmp_path / "out")
    with pytest.raises(ValueError, match=r"--layout was deepseek-v4\.1, not plain"):
        run(layers, tmp_path / "out", "plain", "bf16")
    run(layers, tmp_path / "out")
    assert files(tmp_path / "out") == before and not (tmp_path / "out.converting").exists()
    with pytest.raises(ValueError, match="is there already"):
        run(layers, tmp_path / "out")


@pytest.mark.usefixtures("small_steps")
def test_a_left_over_of_other_arguments_or_sources_is_refused_by_name(tmp_path: Path, layers: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        stopped(patch, 3)
        run(layers, tmp_path / "out", "plain", "bf16", 2)
    for options, needle in {
        ("qwen4exp", "bf16", 2): "--layout was plain, not qwen4exp",
        ("plain", "fp32", 2): "--codec was bf16, not fp32",
        ("plain", "bf16", 1): "--shards was 2, not 1",
        ("plain", "bf16", None, 20_000): "--shards was 2, not left out",
    }.items():
        with pytest.raises(ValueError, match=needle):
            run(layers, tmp_path / "out", *options)
    (layers / "0.safetensors").touch()
    with pytest.raises(ValueError, match=r"0.safetensors has changed since .*out.converting was begun"):
        run(layers, tmp_path / "out", "plain", "bf16", 2)


def test_what_is_nobodys_left_over_stays(tmp_path: Path, layers: Path) -> None:
    (tmp_path / "out.converting").mkdir()
    (tmp_path / "out.converting" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"out.converting is no left-over of a conversion \(thesis.txt\)"):
        run(layers, tmp_path / "out")
    assert files(tmp_path / "out.converting") == {"thesis.txt": b"mine"}


@pytest.mark.usefixtures("small_steps")
def test_a_left_over_that_its_conversion_removes_just_now_is_anothers(
    tmp_path: Path, layers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, make_one = tmp_path / "out.converting", os.mkdir
    beside.mkdir()

    def late(path: Path, mode: int = 0o777) -> None:
        try:
            make_one(path, mode)
        except FileExistsError:
            beside.rmdir()
            raise

    monkeypatch.setattr(os, "mkdir", late)
    with pytest.raises(ValueError, match="Another process converts into"):
        run(layers, tmp_path / "out")
    run(layers, tmp_path / "out")


@pytest.mark.usefixtures("small_steps")
def test_a_source_that_was_read_and_then_replaced_is_found_at_the_end(tmp_path: Path) -> None:
    source, told = tmp_path / "source", []
    synthesise(source, "qwen4exp", 400, 8, "bf16", shards=2)

    def tell(size: int) -> None:
        told.append(size)
        if sum(told) > 0.9 * conversion.nbytes:
            (tmp_path / "other").write_bytes((source / "table-00000.safetensors").read_bytes())
            (tmp_path / "other").rename(source / "table-00000.safetensors")

    conversion = Conversion(source, named_rows(source), tmp_path / "out", Target(shards=4))
    with pytest.raises(ChangedFile, match=r"table-00000\.safetensors was replaced or removed"):
        conversion.run(tell)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.usefixtures("small_steps")
def test_a_source_that_is_replaced_is_found_before_what_was_read_is_noted(tmp_path: Path) -> None:
    source, told = tmp_path / "source", []
    synthesise(source, "plain", 4000, 8, "bf16")

    def tell(size: int) -> None:
        told.append(size)
        if len(told) == 20:
            os.replace(shutil.copy(source / "table-00000.safetensors", tmp_path), source / "table-00000.safetensors")

    conversion = Conversion(source, named_rows(source), tmp_path / "out", Target())
    with pytest.raises(ChangedFile, match=r"table-00000\.safetensors was replaced or removed"):
        conversion.run(tell)
    assert sum(told) < conversion.nbytes / 4
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# -- what is refused -------------------------------------------------------------------------------------------------


def test_what_does_not_go_together_is_refused_before_anything_is_written(tmp_path: Path, layers: Path) -> None:
    huge = tmp_path / "huge.safetensors"
    huge_tensor = {"x.weight": (torch.bfloat16, (1 << 35, 64))}
    huge.write_bytes(encode_header(huge_tensor))
    os.truncate(huge, file_size(huge_tensor))  # 4 TB, none of which is on the disk
    synthesise(tmp_path / "plain", "plain", 10, 8, "bf16")
    (tmp_path / "there").mkdir()
    twice = tmp_path / "twice"
    twice.mkdir()
    save_file({f"layers.1.{name}.weight": torch.ones(3, 4) for name in "ab"}, twice / "x.safetensors")
    before = sorted(tmp_path.rglob("*"))
    for needle, source, out, options in (
        ("there is there already", layers, "there", {}),
        ("layers/x lies in .*layers, which is read", layers, "layers/x", {}),
        ("no layout 'qwen'", layers, "x", {"layout": "qwen"}),
        ("no codec 'fp9'", layers, "x", {"codec": "fp9"}),
        ("deepseek-v4.1 keeps rows in fp8, not bf16", layers, "x", {"codec": "bf16"}),
        ("qwen4exp keeps rows in bf16 or fp16 or fp32, not int8", layers, "x", {"layout": "qwen4exp", "codec": "int8"}),
        ("both say how many files", layers, "x", {"shards": 2, "shard_size": 10**9}),
        ("2 tables of one tensor each do not come in 3 files", layers, "x", {"shards": 3}),
        ("do not come in 32 files: give 1 to 31", layers, "x", {"layout": "qwen4exp", "shards": 32}),
        ("is one tensor in this layout, of 7,396 bytes", layers, "x", {"shard_size": 6000}),
        ("'table.weight' says no layer", tmp_path / "plain", "x", {"layout": "qwen4exp"}),
        ("--layer is for one table, and there are 2", layers, "x", {"layout": "qwen4exp", "layer": 3}),
        ("GB left, and x takes more: choose another folder", huge, "x", {"codec": "fp32"}),
        ("would both be 'layers.1.engram.embed.weight'", twice, "x", {"layout": "deepseek-v4.1"}),
    ):
        with pytest.raises(ValueError, match=needle):
            run(source, tmp_path / out, **options)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_table_without_a_layer_gets_one(tmp_path: Path) -> None:
    synthesise(tmp_path / "plain", "plain", 10, 8, "bf16")
    run(tmp_path / "plain", tmp_path / "out", "qwen4exp", layer=7)
    (table,) = named_rows(tmp_path / "out")
    assert (table.layout, table.layer) == ("qwen4exp", 7)


def test_files_of_two_layouts_need_to_be_told_theirs(tmp_path: Path, layers: Path) -> None:
    (layers / "model.safetensors.index.json").unlink()
    synthesise(tmp_path / "q", "qwen4exp", 10, 64, "bf16", layer=3)
    (tmp_path / "q" / "table-00000.safetensors").rename(layers / "q.safetensors")
    with pytest.raises(ValueError, match=r"tables of deepseek-v4\.1 and qwen4exp: say which --layout"):
        run(layers, tmp_path / "out")
    run(layers, tmp_path / "out", "plain")
    assert [table.codec for table in named_rows(tmp_path / "out")] == ["fp8", "bf16", "fp8"]


def company(folder: Path) -> None:
    """Two files beside the tables, one of them with a tensor."""
    write_tensors(folder / "small.safetensors", {"norm": torch.ones(3), "ids": torch.arange(4)})
    (folder / "config.json").write_text("{}")


def test_what_comes_along_is_in_the_index_and_in_the_sums(tmp_path: Path, layers: Path) -> None:
    alone = run(layers, tmp_path / "alone", "plain")
    made = Conversion(layers, named_rows(layers), tmp_path / "out", Target("plain", stem="tables"), company)
    made.run()
    found = files(tmp_path / "out")
    assert found.keys() == {
        "SHA256SUMS", "config.json", "model.safetensors.index.json", "small.safetensors", "tables.safetensors"
    }  # fmt: skip
    assert found["tables.safetensors"] == files(tmp_path / "alone")["model.safetensors"] and made.nbytes == alone.nbytes
    index = json.loads(found["model.safetensors.index.json"])
    tables = {name: "tables.safetensors" for shard in made.shards for name in shard.tensors}
    assert index["weight_map"] == {**tables, "norm": "small.safetensors", "ids": "small.safetensors"}
    assert index["metadata"]["total_size"] == sum(shard.nbytes for shard in made.shards) + 3 * 4 + 4 * 8
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in found.items() if name != "SHA256SUMS"}
    assert read_sums(tmp_path / "out") == sums
    assert torch.equal(read_tensor(tensors_in(tmp_path / "out")["ids"]), torch.arange(4))


def test_what_came_along_with_a_stopped_run_is_written_anew(tmp_path: Path, layers: Path) -> None:
    def half(folder: Path) -> None:
        (folder / "inner").mkdir()
        (folder / "inner" / "other").touch()
        (folder / "left.json").touch()
        raise Stop

    target = Target("plain")
    with pytest.raises(Stop):
        Conversion(layers, named_rows(layers), tmp_path / "out", target, half).run()
    assert not (tmp_path / "out").exists()
    again = Conversion(layers, named_rows(layers), tmp_path / "out", target, company)
    assert again.run() == again.nbytes, "rows were there already"
    assert not {"left.json", "inner"} & files(tmp_path / "out").keys()


def test_a_run_that_stopped_before_its_first_note_goes_on(
    tmp_path: Path, layers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace
    for number in range(6):
        calls = count()

        def stop(*arguments: object, calls: count[int] = calls, number: int = number) -> None:
            if next(calls) == number:
                raise Stop
            replace(*arguments)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", stop)
            try:
                run(layers, tmp_path / str(number), "plain")
            except Stop:
                assert not (tmp_path / str(number)).exists()
        if not (tmp_path / str(number)).exists():
            run(layers, tmp_path / str(number), "plain")
        assert files(tmp_path / str(number)) == files(tmp_path / "0")
