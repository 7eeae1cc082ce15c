"""Measurements of attached memories at a tiny size: every case is told, and what is built for a turn goes."""

from __future__ import annotations

import gc
import sys
import weakref
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
overhead: Any = import_module("attach_overhead")
backbone: Any = import_module("attached.backbone")
training: Any = import_module("attached.training")
versus: Any = import_module("attach_vs_peft")


@pytest.fixture(scope="module")
def base() -> Any:
    made = backbone.backbone(None, torch.device("cpu"), torch.float32, tiny=True)
    made.model.config.use_cache = False
    return made


def test_the_overhead_is_told_of_every_batch(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {}
    monkeypatch.setattr(overhead, "tell", lambda case, samples, unit, **_: told.update({case: (samples, unit)}))
    monkeypatch.setattr(overhead, "backbone", lambda *_: base)
    overhead.main(
        ["--tiny", "--device", "cpu", "--turns", "2", "--tokens", "12", "--prompt", "4", "--batches", "1", "2"]
    )
    for batch in (1, 2):
        assert told[f"batch-{batch}"][1] == told[f"batch-{batch}-prefill"][1] == "times"
        for way in ("with", "without"):
            samples, unit = told[f"batch-{batch}-{way}"]
            assert unit == "ms a token" and len(samples) == 2 and min(samples) > 0
    assert "random weights" in told["weights"][1]


def test_a_free_memory_is_the_model_and_its_backward(base: Any) -> None:
    ids = torch.randint(3, 500, (1, 2, 16))
    with torch.no_grad():
        before = base.model(input_ids=ids[0], labels=ids[0]).loss
    way = training.Free(training.Setting(base, 3200, 8, (1, 2), ids))
    loss = way.loss(0)
    loss.backward()
    assert torch.equal(loss, before) and way._vector.grad.abs().min() > 0
    way.optimizer.step()
    assert not torch.equal(way.loss(0), before)
    way.remove()
    assert torch.equal(way.loss(0), before)


def test_a_way_learns_and_leaves_nothing(base: Any) -> None:
    ids = torch.randint(3, 500, (1, 2, 2, 16)).expand(4, -1, -1, -1).reshape(8, 2, 16)
    setting = training.Setting(base, 3200, 8, (1, 2), ids)
    made = []

    def build(*given: Any, **rates: Any) -> Any:
        way = training.Ours(*given, **rates)
        made.append(weakref.ref(way.memory.bank))
        return way

    with torch.no_grad():
        before = float(base.model(input_ids=ids[0], labels=ids[0]).loss)
    assert versus.learned(build, setting, ids[:1], lr=1e-2, row_lr=1e-1) < before - 0.1
    speed, _ = versus.turn(build, setting, steps=1, warm_up=1)
    gc.collect()
    assert speed > 0 and not any(bank() for bank in made)
    with torch.no_grad():
        assert float(base.model(input_ids=ids[0], labels=ids[0]).loss) == before
