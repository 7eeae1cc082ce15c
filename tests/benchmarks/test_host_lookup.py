"""The measurement of host lookups goes through on small sizes: right rows, fresh text, every case that claims name."""

from __future__ import annotations

import importlib
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torch_engram.addressing import CanonicalVocab
from torch_engram.data import TokenFile
from torch_engram.stores import shared_memory

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
CLAIMS = {claim["id"]: claim for claim in tomllib.loads((ROOT / "benchmarks" / "claims.toml").read_text())["claim"]}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "FOLDERS", (tmp_path,))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def sparse_tables(folder: None) -> ModuleType:
    return importlib.import_module("sparse_tables")


def text_of(tokens: int) -> TokenFile:
    """Documents of 97 tokens, of 60 ids."""
    ids = np.random.default_rng(0).integers(0, 60, tokens).astype(np.uint16)
    return TokenFile(Path("text"), ids, np.arange(0, tokens, 97), tokens, 60, 0, "")


@pytest.mark.parametrize("placement", ["host", "device"])
def test_a_bank_of_any_size_has_rows_of_its_own_and_no_file(
    sparse_tables: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_vocab: Callable[..., CanonicalVocab],
    placement: str,
) -> None:
    monkeypatch.setattr(sparse_tables.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sparse_tables, "_DRAWN", 1 << 21)
    bank = sparse_tables.host_bank((14, 1), 0.01, make_vocab(), "1MB", CPU, placement)
    store = sparse_tables.store_of(bank)
    records, fields = store.table.records, store.layout.fields
    assert not list(tmp_path.glob("**/*.safetensors")) and bank.config.layers == (1, 14)
    assert 1e7 <= len(records) * sum(field.component.nbytes for field in fields) < 1.001e7
    drawn = (1 << 21) // store.layout.nbytes
    codes = store.layout.view(records, fields[0]).float()
    assert codes.isfinite().all() and len(records[:drawn].unique(dim=0)) == drawn
    assert not (records[:drawn] == records[drawn : 2 * drawn]).all(1).any()
    ids = torch.randint(60, (2, 5))
    found = [bank.read(ids).wait(layer)["engram"] for layer in (1, 14)]
    index = sparse_tables.row_index(bank, ids)
    sparse_tables.require_right(bank, index, found)
    with pytest.raises(ValueError, match="layer 1 are not the rows of the table"):
        sparse_tables.require_right(bank, index, found[::-1])


def test_rows_that_are_read_in_place_cannot_be_drawn(
    sparse_tables: ModuleType, make_vocab: Callable[..., CanonicalVocab]
) -> None:
    with pytest.raises(ValueError, match="'host' or 'device', not 'disk'"):
        sparse_tables.host_bank((1,), 0.01, make_vocab(), None, CPU, "disk")


def test_text_is_taken_once_and_says_where_documents_begin() -> None:
    text = importlib.import_module("lookup_run").FreshText(text_of(1000))
    ids, starts = text.take(200)
    assert torch.equal(ids, torch.from_numpy(text_of(1000).tokens[:200].astype(np.int64)))
    assert starts.nonzero().flatten().tolist() == [0, 97, 194]
    text.next_document()
    more, starts = text.take(3)
    assert torch.equal(more, torch.from_numpy(text_of(1000).tokens[291:294].astype(np.int64)))
    assert starts.tolist() == [True, False, False]
    assert [tokens.ids.shape for tokens in text.chunks(2, 50)] == [(1, 50)] * 2
    with pytest.raises(ValueError, match="has 1,000 tokens, fewer than are read"):
        text.take(1000 - 394 + 1)
    text.take(1000 - 394)
    text.next_document()
    with pytest.raises(ValueError, match="fewer than are read"):
        text.take(1)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 70), st.data())
def test_the_kernel_reads_rows_and_no_others(rows: int, width: int, wanted: int, data: st.DataObject) -> None:
    pinned_reads = importlib.import_module("pinned_reads")
    table = torch.randint(1 << 40, (rows, width + data.draw(st.integers(0, 3))))
    index, out = torch.randint(rows, (wanted,)), torch.full((wanted + 2, width), -1)
    if wanted:
        pinned_reads.read_rows(table, index, out, data.draw(st.sampled_from(pinned_reads.SHAPES)))
    assert torch.equal(out[:wanted], table[index, :width]) and (out[wanted:] == -1).all()


def test_every_case_of_the_claims_is_measured_and_small_sizes_are_not_recorded(
    sparse_tables: ModuleType, monkeypatch: pytest.MonkeyPatch, make_vocab: Callable[..., CanonicalVocab]
) -> None:
    script, run = (importlib.import_module(name) for name in ("host_lookup_gpu", "lookup_run"))
    written: dict[str, set[str]] = {}
    monkeypatch.setattr(script, "record", lambda *_, **__: pytest.fail("nothing is to be recorded"))
    monkeypatch.setattr(script, "show", lambda claim, case, *_, **__: written.setdefault(claim, set()).add(case))
    monkeypatch.setattr(sparse_tables, "_DRAWN", 1 << 21)
    for name, few in (("GROUP", 2), ("LEAD", 1)):
        monkeypatch.setattr(script, name, few)
    # a GPU's part, as far as a CPU has it
    monkeypatch.setattr(script, "by_bus", lambda _: {"bus-copy": [1.0, 2.0, 3.0]})
    monkeypatch.setattr(script, "host_words", lambda bank: sparse_tables.store_of(bank).table.records.view(torch.int64))
    monkeypatch.setattr(script, "pinned_table", lambda rows, words: torch.zeros(rows, words, dtype=torch.int64))
    sizes = run.Sizes(
        gigabytes=0.01, cache="1MB", warm=64, chunk=4, turns=2, alone=2, sequences=3, steps=53, steps_of_one=54,
        general_steps=52,
    )  # fmt: skip
    script.measure(text_of(2000), make_vocab(), sizes, CPU)
    claims = {claim: entry for claim, entry in CLAIMS.items() if entry["script"].endswith("host_lookup_gpu.py")}
    assert written == {claim: {*entry["cases"], *entry["beside"]} for claim, entry in claims.items()}
