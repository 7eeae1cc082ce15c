"""Other ways to use n-grams: what they compute, written out, and the study that compares them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from torch_engram.addressing import layouts
from torch_engram.config import EngramConfig
from torch_engram.studies.grid import run_grid
from torch_engram.studies.report import write_report
from torch_engram.studies.slots import ALONE, BEST, ROWS, STUDY
from torch_engram.studies.training import made_ready, train_run
from torch_engram.studies.ways import WAYS, build_way
from torch_engram.train import change, get_recipe
from torch_engram.train.build import build_optimizers

pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

CONFIG = EngramConfig(layers=(0,), hidden=6, vocab_size=50, heads=2, row_dim=2, rows_per_head=11, init_std=0.1)


def written_out(way: str, module: torch.nn.Module, h: Tensor, e: Tensor) -> Tensor:
    """One position: ``h [M, d]``, ``e [E]``."""
    out: Tensor = module.out.weight  # type: ignore[union-attr, assignment]
    if way == "addition":
        return torch.stack([stream + out @ e for stream in h])
    if way == "over-encoding":  # orders 2 and 3 have half of the columns each, by their heads
        return torch.stack([(stream + out[:, :4] @ e[:4] + out[:, 4:] @ e[4:]) / 3 for stream in h])
    inner = [out @ (F.gelu(module.down.weight @ stream, approximate="tanh") * e) for stream in h]  # type: ignore
    return torch.stack([
        stream + x / (x.square().mean() + 1e-6).sqrt() * module.norm.weight  # type: ignore[union-attr, operator]
        for stream, x in zip(h, inner, strict=True)
    ])  # fmt: skip


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_each_is_its_formula_forward_and_backward(way: str, branches: int) -> None:
    module = WAYS[way](replace(CONFIG, branches=branches))
    h, e = torch.randn(2, 3, branches, 6, requires_grad=True), torch.randn(2, 3, 8, requires_grad=True)
    live = torch.tensor([[True, True, False], [True, True, True]])
    found, gates = module(h, e, live=live)
    masked = e * live[..., None]
    wanted = torch.stack([
        torch.stack([written_out(way, module, h[b, t], masked[b, t]) for t in range(3)]) for b in range(2)
    ])  # fmt: skip
    assert gates.shape == (2, 3, branches) and torch.allclose(found, wanted, atol=1e-5)
    mine, theirs = (torch.autograd.grad(each.square().sum(), (h, e, module.out.weight)) for each in (found, wanted))
    for one, other in zip(mine, theirs, strict=True):
        assert torch.allclose(one, other, atol=1e-3, rtol=1e-4)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Over-encoding is done at the input: set layers to \(0,\) for \(1, 4\)"):
        WAYS["over-encoding"](replace(CONFIG, layers=(1, 4)))
    with pytest.raises(ValueError, match=r"rows must not begin at zero: set init_std=0\.02"):
        WAYS["per-layer"](replace(CONFIG, init_std=0.0))
    recipe = get_recipe("tiny")
    with pytest.raises(ValueError, match="There is no way 'adition' to use n-grams: did you mean 'addition'"):
        build_way("adition", recipe, recipe.model)


@pytest.mark.parametrize("way", WAYS)
def test_a_decoder_has_the_way_in_place_of_its_engrams_and_trains_its_matrices(way: str) -> None:
    layers = "0" if way == "over-encoding" else "0,1"
    recipe = change(get_recipe("tiny"), [f"model.engrams.engram.layers={layers}", "model.engrams.engram.init_std=0.1"])
    decoder = build_way(way, recipe, recipe.model)
    found = [name for name, module in decoder.named_modules() if isinstance(module, WAYS[way])]
    assert found == [f"blocks.{layer}.engrams.engram" for layer in map(int, layers.split(","))]
    muon, _ = build_optimizers(recipe, decoder)
    matrices = {id(parameter) for group in muon.param_groups for parameter in group["params"]}
    wanted = ["out.weight", "down.weight"] if way == "per-layer" else ["out.weight"]
    assert all(id(decoder.get_parameter(f"{name}.{matrix}")) in matrices for name in found for matrix in wanted)


def test_all_ways_have_the_same_rows_at_every_size() -> None:
    runs = [run for run in STUDY.grid("small") if run.label in BEST and not run.changed]
    totals: dict[str, list[int]] = {label: [] for label in BEST}
    for run in runs:
        (engram,) = run.recipe.model.engrams.values()
        totals[run.label].append(sum(layout.rows for layout in layouts(engram).values()))
        assert engram.row_dim == 32 and run.recipe.model.moe is not None and run.recipe.model.moe.experts == 29
    for found in totals.values():
        assert found == pytest.approx(ROWS, rel=0.005)
    assert ROWS[-1] / ROWS[0] > 10**2.4 and len(ROWS) >= 6
    (alone,) = [run for run in STUDY.grid("small") if run.label == ALONE]
    assert alone.recipe.model.moe == runs[0].recipe.model.moe and not alone.recipe.model.engrams


def test_the_study_from_its_runs_to_its_report(corpus: str, tmp_path: Path) -> None:
    tiny = STUDY.grid("tiny")
    runs = made_ready(
        [replace(run, recipe=replace(run.recipe, cache=str(tmp_path / "cache"))) for run in tiny], corpus, "cpu"
    )
    lines = run_grid(runs, lambda run: train_run(run, corpus), tmp_path, study="slots", scale="tiny", device="cpu")
    assert all(line["result"]["validation"] is not None for line in lines)
    report = STUDY.report(lines)
    write_report(report, tmp_path)
    sizes, rates = report.sections
    assert [[row[0] for row in sizes.rows].count(label) for label in BEST] == [3] * 4
    assert [[row[0] for row in rates.rows].count(label) for label in BEST] == [2] * 4  # 6e-3 is of the sizes
    assert all(words.startswith(label) for words, label in zip(sizes.words, BEST, strict=True))
    ways = {row["label"]: row["active"] for row in report.data}
    assert ways["Engram"] and ways["addition"] is None  # whose accounting is not an Engram's


def test_a_report_of_whatever_there_is(corpus: str, tmp_path: Path) -> None:
    one = replace(STUDY.grid("tiny")[-1], label=ALONE, way="")
    line = {"run": json.loads(json.dumps(asdict(one))), "result": {"validation": None}, "device": "cpu"}
    line |= {"versions": "1", "code": "a", "date": "today"}
    line["result"] |= {"sizes": {}, "flops": 0.0, "tokens_per_second": 0.0}  # type: ignore[operator]
    report = STUDY.report([line])
    write_report(report, tmp_path)
    assert [section.rows for section in report.sections] == [[], []]
