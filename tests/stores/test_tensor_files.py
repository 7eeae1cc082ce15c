"""Where tensors lie in safetensors files: as the library reads them, over shards, and refused by name when damaged."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from torch_engram.stores.named_tables import find_tables
from torch_engram.stores.tensor_files import DTYPE_NAMES, TensorWriter, file_size, read_header, tensors_in

TYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
SHAPES = st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple)


def random_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    count = dtype.itemsize * torch.Size(shape).numel()
    return torch.randint(256, (count,), dtype=torch.uint8).view(dtype).view(shape)


def in_place(file: Path, start: int, nbytes: int) -> bytes:
    return file.read_bytes()[start : start + nbytes]


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@given(st.lists(st.tuples(st.sampled_from(list(TYPES)), SHAPES), min_size=1, max_size=6), st.booleans())
def test_bytes_are_where_the_header_says(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[tuple[str, tuple[int, ...]]], ours: bool
) -> None:
    file = tmp_path_factory.mktemp("files") / "x.safetensors"
    tensors = {f"t{number}.weight": random_bytes(TYPES[name], shape) for number, (name, shape) in enumerate(kinds)}
    if ours:
        with open(file, "wb") as opened:
            layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
            writer = TensorWriter(opened, layout)
            for name, tensor in tensors.items():
                for row in reversed(range(len(tensor))):
                    writer.put(name, row, tensor[row : row + 1])
        assert file_size(layout) == file.stat().st_size
    else:
        save_file(tensors, file, metadata={"format": "pt"})
    places = read_header(file)
    assert places.keys() == tensors.keys()
    with safe_open(file, framework="pt") as library:
        for name, tensor in tensors.items():
            assert places[name].shape == tuple(tensor.shape) == tuple(library.get_tensor(name).shape)
            assert TYPES[places[name].dtype] == tensor.dtype
            assert in_place(file, places[name].start, places[name].nbytes) == raw(tensor)
            assert places[name].stop <= file.stat().st_size


def test_what_the_system_writes_in_pieces_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: real(file, data[:7], at))
    tensor = torch.randn(9, 3)
    with open(tmp_path / "x.safetensors", "wb") as opened:
        TensorWriter(opened, {"a": (tensor.dtype, (9, 3))}).put("a", 0, tensor)
    place = read_header(tmp_path / "x.safetensors")["a"]
    assert in_place(place.file, place.start, place.nbytes) == raw(tensor)


def header(entries: Any, data: int, length: int | None = None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


def entry(start: int, stop: int, shape: Any = (2, 2), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


HOSTILE = {
    "empty": b"",
    "shorter than a length": b"\x01\x02",
    "a huge length": header({"a": entry(0, 16)}, 16, length=2**63),
    "a length past the end": header({"a": entry(0, 16)}, 16, length=10_000),
    "no UTF-8": header(b"\xff\xfe{}", 0),
    "no JSON": header(b"{", 0),
    "a list": header([1, 2], 0),
    "an entry without offsets": header({"a": {"dtype": "F32", "shape": [1]}}, 4),
    "truncated": header({"a": entry(0, 16)}, 15),
    "longer than it says": header({"a": entry(0, 16)}, 17),
    "overlap": header({"a": entry(0, 16), "b": entry(8, 24)}, 24),
    "a gap": header({"a": entry(0, 16), "b": entry(20, 36)}, 36),
    "backwards": header({"a": entry(16, 0)}, 16),
    "negative": header({"a": entry(-16, 0)}, 16),
    "another size than its shape": header({"a": entry(0, 16, (3, 3))}, 16),
    "a shape past 64 bits": header({"a": entry(0, 16, (2**40, 2**40))}, 16),
    "an unknown type": header({"a": entry(0, 16, dtype="F33")}, 16),
    "a shape of words": header({"a": entry(0, 16, ("2", "2"))}, 16),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_hostile_and_damaged_files_are_refused_by_name(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model-00002.safetensors"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"model-00002\.safetensors is no whole safetensors file \("):
        tensors_in(tmp_path)


def test_a_good_header_of_the_same_making_is_taken(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(header({"a": entry(0, 16), "b": entry(16, 32)}, 32))
    assert list(tensors_in(file)) == ["a", "b"]


def shards(folder: Path, *contents: dict[str, torch.Tensor]) -> list[Path]:
    files = [folder / f"model-{number:05d}-of-{len(contents):05d}.safetensors" for number in range(len(contents))]
    for file, content in zip(files, contents, strict=True):
        save_file(content, file)
    return files


def index(folder: Path, names: dict[str, str], called: str = "model") -> None:
    (folder / f"{called}.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def test_shards_with_and_without_an_index(tmp_path: Path) -> None:
    one, two = shards(tmp_path, {"a": torch.ones(2, 3)}, {"b": torch.ones(1), "c": torch.ones(4)})
    assert {name: place.file for name, place in tensors_in(tmp_path).items()} == {"a": one, "b": two, "c": two}
    assert list(tensors_in(two)) == ["b", "c"]
    index(tmp_path, {"a": one.name, "c": two.name})
    assert list(tensors_in(tmp_path)) == ["a", "c"]


def test_shards_that_do_not_fit_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no \.safetensors file"):
        tensors_in(tmp_path)
    with pytest.raises(ValueError, match="gone is no file"):
        tensors_in(tmp_path / "gone")
    one, two = shards(tmp_path, {"a": torch.ones(2)}, {"a": torch.ones(2)})
    with pytest.raises(ValueError, match=f"{one.name} and .*{two.name} both hold 'a'"):
        tensors_in(tmp_path)
    index(tmp_path, {"a": one.name, "b": two.name})
    with pytest.raises(ValueError, match=f"{two.name} has no 'b', which model.safetensors.index.json says"):
        tensors_in(tmp_path)
    index(tmp_path, {"a": "../a.safetensors"})
    with pytest.raises(ValueError, match="which is not in its folder"):
        tensors_in(tmp_path)
    index(tmp_path, {"a": "model-9.safetensors"})
    with pytest.raises(ValueError, match=r"model-9\.safetensors is no file"):
        tensors_in(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match="is no index of safetensors shards"):
        tensors_in(tmp_path)
    index(tmp_path, {}, "other")
    with pytest.raises(ValueError, match="has 2 indices"):
        tensors_in(tmp_path)


# -- tables by name ---------------------------------------------------------------------------------------------------


def fp8(rows: int, width: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    return random_bytes(torch.float8_e4m3fn, (rows, width)), random_bytes(torch.float8_e8m0fnu, (rows, width // 32))


def deepseek(layer: int, rows: int) -> dict[str, torch.Tensor]:
    weight, scale = fp8(rows)
    return {f"layers.{layer}.engram.embed.weight": weight, f"layers.{layer}.engram.embed.scale": scale}


def qwen(numbers: range, rows: int = 3, width: int = 5) -> dict[str, torch.Tensor]:
    prefix = "model.language_model.layers.1.ple.ple_embedding.ngram_embedding"
    return {f"{prefix}.shard_{number}.weight": torch.full((rows, width), number).bfloat16() for number in numbers}


def test_deepseeks_tables(tmp_path: Path) -> None:
    first, second = deepseek(14, 7), deepseek(1, 5)
    other = {"layers.1.engram.q_weight": torch.ones(4, 8).bfloat16(), "head.weight": torch.ones(9, 8)}
    one, two = shards(tmp_path, first | other, second)
    tables = find_tables(tensors_in(tmp_path))
    assert [(t.layout, t.layer, t.rows, t.width, t.codec) for t in tables] == [
        ("DeepSeek-V4.1", 1, 5, 64, "fp8"),
        ("DeepSeek-V4.1", 14, 7, 64, "fp8"),
    ]
    assert tables[0].files == (two,) and tables[1].files == (one,) and tables[1].nbytes == 7 * 66


def test_qwens_tables_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    one, two = shards(tmp_path, qwen(range(0, 12, 2)), qwen(range(1, 12, 2)))
    (table,) = find_tables(tensors_in(tmp_path))
    assert (table.layout, table.layer, table.rows, table.width, table.codec) == ("Qwen4Exp", 1, 36, 5, "bf16")
    assert "shard_*.weight" in table.name and set(table.files) == {one, two}
    firsts = [in_place(place.file, place.start, 2) for place in table.values]
    assert firsts == [raw(torch.tensor([float(number)]).bfloat16()) for number in range(12)]


@pytest.mark.parametrize(
    "change, error",
    [
        (lambda t: t.pop("layers.1.engram.embed.scale"), "without 'layers.1.engram.embed.scale'"),
        (lambda t: t.update({"layers.1.engram.embed.scale": torch.ones(5, 2)}), "no FP8 rows with a scale"),
        (lambda t: t.update({"layers.1.engram.embed.scale": fp8(4)[1]}), "no FP8 rows with a scale"),
        (lambda t: t.update(qwen(range(3)), **qwen(range(4, 5))), "has no shard 3"),
        (lambda t: t.update(qwen(range(3)), **qwen(range(3, 4), width=6)), "a shard of .* is BF16"),
        (lambda t: t.update({n: v.to(torch.float8_e4m3fn) for n, v in qwen(range(3)).items()}), "which no codec reads"),
    ],
)
def test_what_a_known_layout_lacks_is_named(tmp_path: Path, change: Any, error: str) -> None:
    tensors = deepseek(1, 5)
    change(tensors)
    shards(tmp_path, tensors)
    with pytest.raises(ValueError, match=error):
        find_tables(tensors_in(tmp_path))


def test_other_matrices_are_tables_of_their_type(tmp_path: Path) -> None:
    weight, scale = fp8(6)
    shards(tmp_path, {
        "embed.weight": torch.ones(3, 4).half(), "norm": torch.ones(3), "codes.weight": weight, "codes.scale": scale,
        "small": torch.ones(2, 5, dtype=torch.int8), "small.scale": torch.ones(2, 1), "ids": torch.ones(2, 2).int(),
    })  # fmt: skip
    tables = {table.name: table for table in find_tables(tensors_in(tmp_path))}
    assert {name: (table.codec, len(table.scales)) for name, table in tables.items()} == {
        "embed.weight": ("fp16", 0), "codes.weight": ("fp8", 1), "small": ("int8", 1),
    }  # fmt: skip
