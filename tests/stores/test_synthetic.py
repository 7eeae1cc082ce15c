"""Random tables: the same rows however they are cut into shards and chunks, all finite, whole or not there at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from torch_engram.stores import CODECS, synthetic
from torch_engram.stores.layouts import LAYOUTS
from torch_engram.stores.named_tables import find_tables
from torch_engram.stores.synthetic import synthesise
from torch_engram.stores.tensor_files import tensors_in

CODEC_NAMES = ["fp32", "bf16", "fp16", "fp8", "int8"]


def rows_of(folder: Path) -> torch.Tensor:
    """Every row of a table in fp32, read by the library."""
    (table,) = find_tables(tensors_in(folder))
    found: dict[str, torch.Tensor] = {}
    for file in table.files:
        with safe_open(file, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no dict)
    values = [name for name in found if name.endswith("weight")]
    values.sort(key=lambda name: int(name.split("shard_")[1].split(".")[0]) if "shard_" in name else 0)
    parts = [torch.cat([found[name] for name in values])]
    if table.scales:
        parts.append(found[values[0].removesuffix("weight") + "scale"])
    return CODECS[table.codec].decode(tuple(parts))


@given(st.integers(1, 60), st.integers(1, 40), st.integers(1, 9), st.integers(1, 70), st.integers(0, 3))
def test_rows_do_not_depend_on_shards(
    tmp_path_factory: pytest.TempPathFactory, rows: int, width: int, shards: int, chunk: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("tables")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic, "_CHUNK_ROWS", chunk)
        for name, count in (("one", 1), ("many", min(rows, shards))):
            synthesise(folder / name, "qwen4exp", rows, width, "bf16", shards=count, seed=seed)
        synthesise(folder / "other", "qwen4exp", rows, width, "bf16", seed=seed + 1)
    one = rows_of(folder / "one")
    assert one.shape == (rows, width) and torch.equal(one, rows_of(folder / "many"))
    assert rows * width < 4 or not torch.equal(one, rows_of(folder / "other"))
    assert sorted(path.name for path in folder.iterdir()) == ["many", "one", "other"]


@pytest.mark.parametrize("codec", CODEC_NAMES)
def test_numbers_are_finite_of_moderate_size_and_no_two_rows_alike(tmp_path: Path, codec: str) -> None:
    told: list[int] = []
    synthesise(tmp_path / "table", "plain", 3000, 40, codec, tell=told.append)
    rows = rows_of(tmp_path / "table")
    assert rows.isfinite().all() and sum(told) == 3000
    assert 1e-3 < rows.std() < 1 and rows.abs().max() < 2 and abs(rows.mean()) < 0.05 * rows.std()
    assert len(rows.unique(dim=0)) == 3000


def test_the_known_layouts_are_known_again(tmp_path: Path) -> None:
    for layout, made in LAYOUTS.items():
        synthesise(tmp_path / layout, layout, 10, made.width, made.codecs[0], layer=14)
        (table,) = find_tables(tensors_in(tmp_path / layout))
        assert (table.rows, table.width, table.codec) == (10, made.width, made.codecs[0])
        assert table.layout.lower() == layout and table.layer == (None if layout == "plain" else 14)


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        synthesise(tmp_path / "table", "plain", 10, 8, "bf16")
    assert not list(tmp_path.iterdir())


def test_a_killed_one_is_not_there(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from torch_engram.cli import main; main()", "table", "synth", "table"]
    running = subprocess.Popen([*command, "--rows", "4000000", "--width", "256"], cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("table.*.tmp/*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    assert not (tmp_path / "table").exists() and len(list(tmp_path.glob("table.*.tmp"))) == 1


def test_what_cannot_be_made_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    for error, arguments in {
        "there is there already": (tmp_path / "there", "plain", 10, 8, "bf16"),
        "deepseek-v4.1 keeps rows in fp8, not bf16": (tmp_path / "x", "deepseek-v4.1", 10, 8, "bf16"),
        "takes more: choose another folder": (tmp_path / "x", "plain", 1 << 38, 64, "fp32"),
    }.items():
        with pytest.raises(ValueError, match=error):
            synthesise(*arguments)
    with pytest.raises(ValueError, match="3 rows do not come in 4 shards"):
        synthesise(tmp_path / "x", "qwen4exp", 3, 8, "bf16", shards=4)
    with pytest.raises(ValueError, match="plain has one tensor a table, not 2"):
        synthesise(tmp_path / "x", "plain", 3, 8, "bf16", shards=2)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
