"""The measurement of tables in host memory goes through on small sizes, with every case that claims name."""

from __future__ import annotations

import importlib
import tomllib
from pathlib import Path

import pytest
import torch

from torch_engram.bench import steps
from torch_engram.stores import HostStore, Plane, RecordLayout

ROOT = Path(__file__).parents[2]
SCRIPT = "benchmarks/host_table_gpu.py"
CASES = {
    claim["id"]: {*claim["cases"], *claim["beside"]}
    for claim in tomllib.loads((ROOT / "benchmarks" / "claims.toml").read_text())["claim"]
    if claim["script"] == SCRIPT
}


def test_every_case_of_the_claims_is_measured_and_small_sizes_are_not_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script, made, written = importlib.import_module("host_table_gpu"), list[int](), dict[str, dict[str, float]]()
    real = steps.Runs.start

    def start(self: steps.Runs, recipe: steps.Recipe, *args: object, **options: object) -> steps.Run:
        made.append(round(recipe.model.engrams["engram"].per_order("rows_per_head")[0]))
        recipe = steps.replace(recipe, cache=str(tmp_path / "cache"))
        return real(self, recipe, *args, **options)  # type: ignore[arg-type]

    def write(claim: str, case: str, samples: list[float], unit: str, **_: object) -> None:
        assert unit and case not in written.setdefault(claim, {})
        written[claim][case] = samples[0]

    monkeypatch.setattr(steps.Runs, "start", start)
    monkeypatch.setattr(script, "record", lambda *_, **__: pytest.fail("nothing is to be recorded"))
    monkeypatch.setattr(script, "show", write)
    monkeypatch.setattr(script, "free_memory", lambda: script.LEFT_FREE + 145 * (2 * 640 + 1280 + 6400))
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Of {n} rows {n * n % 97} are read, and {n % 7} are written." for n in range(600)))
    sizes = script.Sizes(
        small=640, middle=1280, largest=10**6, batch_size=2, seq_len=16, accumulation=2, hidden=32, vocab=300, turns=1,
        steps=1, warm_up=1, alone=1, data=str(text),
    )  # fmt: skip
    script.measure(sizes, "cpu")
    assert made == [20, 20, 20, 40, 200], "the last is as large as memory leaves room for"
    assert set(written) == {script.STEP, script.MEMORY, script.FLAT}
    for claim, cases in CASES.items():
        assert set(written[claim]) == cases
    step, memory = written[script.STEP], written[script.MEMORY]
    assert step["distinct-rows"] > 0 and step["resident-mapped"] > 0 and step["numbers-in-rows"] >= 6400 * 64 / 1e9
    assert memory["allowed"] == pytest.approx(3 * step["working-set"] + memory["embeddings"])
    assert memory["embeddings"] == 2 * 2 * (2 * 16) * 16 * 64 * 4 / 2**30


def test_writing_back_what_was_read_changes_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = importlib.import_module("host_table_gpu")
    store = HostStore(RecordLayout((Plane("value", 8),)), {0: 50}, for_gpu=False)
    store.table.records.random_(256)
    before = store.table.records.clone()
    stand = script.Stand(script.Sizes(), "cpu", None, None)
    names = [name for name, took in script.parts(stand, store, [torch.arange(9), torch.arange(20, 50)]) if took > 0]
    assert names == ["fetch-alone", "write-alone", "stage-alone", "cpu-scatter-alone"]
    assert torch.equal(store.table.records, before) and len(store.table.changed(0)) == 39
