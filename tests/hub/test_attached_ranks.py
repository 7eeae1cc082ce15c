"""Processes that train one model together keep one memory: real ones, gloo between them, started once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

pytest.importorskip("transformers")

import transformers

from models import VOCAB, make_model, make_tokenizer
from ranks import run_ranks
from torch_engram.hub import Attached, attach, config_for, from_pretrained, load_memory, memories_of, restore_memories
from torch_engram.optim import RowAdam
from torch_engram.stores import make_keys

RANKS, STEPS, MICRO = 2, 3, 2
FIELDS: dict[str, Any] = dict(layers=(0, 1), heads=2, row_dim=8, rows_per_head=300)
CLOSE = dict(rtol=1e-3, atol=1e-6)


def make(device: str = "cpu", **options: Any) -> tuple[Any, Attached]:
    """Modules begin otherwise on every rank: wrapping the model brings those of rank 0 to all."""
    model, tokenizer = make_model("llama").to(device), make_tokenizer()
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    config = config_for(model, tokenizer, **FIELDS)
    memory = attach(model, tokenizer, config, optimizer=lambda rows: RowAdam(rows, lr=1e-2), **options)
    return model.train(), memory


def parts(steps: int = STEPS) -> Tensor:
    """Tokens ``[steps, micro-batches, ranks, 2, 9]``."""
    return torch.randint(3, VOCAB, (steps, MICRO, RANKS, 2, 9), generator=torch.Generator().manual_seed(2))


def held(memory: Attached) -> list[Tensor]:
    """Every plane of every row, then weights."""
    memory.bank.flush()
    found = []
    for table in memory.bank.tables:
        source = memory.bank.source(table)
        keys = make_keys(table.space, torch.arange(table.rows, device=memory.bank.device))
        rows = source.format.decode(keys, source.store.fetch(keys))
        found += [rows[plane.name].clone().cpu() for plane in source.format.layout.planes]
    return found + [weight.detach().clone().cpu() for weight in memory.engrams.state_dict().values()]


def same(mine: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(mine, theirs, strict=True))


def assert_close(mine: list[Tensor], theirs: list[Tensor], **close: float) -> None:
    for pair in zip(mine, theirs, strict=True):
        torch.testing.assert_close(*pair, **(close or CLOSE))


# -- a loop of one's own ----------------------------------------------------------------------------------------------


def train(options: dict[str, Any], micro_batches: str = "no_sync") -> dict[str, Any]:
    """One rank's half of each batch, or in a process alone the whole; in between, ranks read what they like."""
    model, memory = make(**options)
    rank = dist.get_rank() if dist.is_initialized() else None
    whole = model if rank is None else DistributedDataParallel(model)
    optimizer = memory.optimizer(lr=1e-2)
    norms = []
    for number, step in enumerate(parts().to(model.device)):
        for micro, batch in enumerate(step):
            ids = batch.flatten(0, 1) if rank is None else batch[rank]
            accumulates = rank is not None and micro < MICRO - 1 and micro_batches == "no_sync"
            with whole.no_sync() if accumulates else nullcontext():
                (whole(ids, labels=ids).loss / MICRO).backward()
        norms.append(nn.utils.clip_grad_norm_(whole.parameters(), 0.05).cpu())
        optimizer.step()
        optimizer.zero_grad()
        if rank == number % 2:
            read_alone(model, 1 + number)
    return {"norms": norms, "held": held(memory)}


def read_alone(model: Any, batches: int) -> None:
    """What no other rank takes part in."""
    ids = parts()[0, 0, 0].to(model.device)
    model.eval()
    for _ in range(batches):
        with torch.no_grad():
            model(ids)
    model.generate(ids, max_new_tokens=2, do_sample=False)
    model.train()
    model(ids)  # a forward in training, whose backward never comes


OWN: list[tuple[dict[str, Any], str]] = [
    ({}, "no_sync"), ({}, "each time"), ({"placement": "host", "codec": "bf16"}, "no_sync"),
]  # fmt: skip


# -- a rank that reads nothing, or more often than another ------------------------------------------------------------


class Several(nn.Module):
    """A model that is called as often as its batch has parts."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, *parts: Tensor) -> Tensor:
        return torch.stack([self.model(ids, labels=ids).loss for ids in parts]).sum()


def train_apart() -> list[Tensor]:
    """In each step another rank leaves the memory out, or sees padding alone, as both do in the last but one. Of the
    model a norm is trained, too."""
    model, memory = make()
    model.model.norm.requires_grad_(True)
    rank = dist.get_rank() if dist.is_initialized() else None
    several: nn.Module = Several(model)
    whole = model
    if rank is not None:
        whole = DistributedDataParallel(model, find_unused_parameters=True)
        several = DistributedDataParallel(several, find_unused_parameters=True)
    optimizer = memory.optimizer(lr=1e-2)
    share = 1 if rank is not None else RANKS
    for number, step in enumerate(parts(5)):
        for of, ids in enumerate(step[0]):
            if rank in (None, of):
                odd = number % 2 == of
                mask = torch.full_like(ids, number < 2 or not (odd or number == 4))
                with memory.disabled() if odd and number < 2 else nullcontext():
                    (whole(ids, attention_mask=mask, labels=ids).loss / share).backward()
        optimizer.step()
        optimizer.zero_grad()
    for of, ids in enumerate(parts(1)[0, 0]):
        if rank in (None, of):
            (several(*ids.split(1 + of)) / share).backward()
    optimizer.step()
    return held(memory)


# -- Trainer ----------------------------------------------------------------------------------------------------------


def arguments_for(folder: Path, batch: int, **more: Any) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(
        str(folder), max_steps=4, per_device_train_batch_size=batch, gradient_accumulation_steps=2, learning_rate=1e-2,
        save_steps=2, eval_strategy="steps", eval_steps=2, report_to=[], disable_tqdm=True, use_cpu=True,
        max_grad_norm=0.05, **more,
    )  # fmt: skip


def run_trainer(folder: Path, batch: int, resume: Path | None = None, **more: Any) -> list[Tensor]:
    model, memory = make()
    texts = [{"input_ids": ids, "labels": ids} for ids in parts(4).flatten(0, 3)]
    trainer = transformers.Trainer(
        model, arguments_for(folder, batch, **more), train_dataset=texts, eval_dataset=texts[:5],
        optimizers=(memory.optimizer(lr=1e-2), None),
    )  # fmt: skip
    if resume is not None:
        restore_memories(model, resume)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    if dist.is_initialized():
        assert isinstance(trainer.model_wrapped, DistributedDataParallel)
    return held(memory)


# -- what is refused --------------------------------------------------------------------------------------------------


def refused(folder: Path) -> dict[str, str]:
    rank, ids = dist.get_rank(), parts()[0, 0, 0]
    told = {}

    def expect(name: str, act: Any) -> None:
        with pytest.raises(ValueError) as error:
            act()
        told[name] = str(error.value)

    model, memory = make()
    expect("no wrapper", model(ids, labels=ids).loss.backward)

    model, memory = make()
    whole, optimizer = DistributedDataParallel(model), memory.optimizer()
    with whole.no_sync():
        whole(ids, labels=ids).loss.backward()
    before = held(memory)
    expect("only no_sync", optimizer.step)
    assert same(held(memory), before)
    whole(ids, labels=ids).loss.backward()
    optimizer.step()
    with whole.join():
        expect("join", lambda: whole(ids, labels=ids))

    model = make_model("llama")
    whole = DistributedDataParallel(model)
    tokenizer = make_tokenizer()
    memory = attach(model, tokenizer, config_for(model, tokenizer, **FIELDS))
    expect("wrapped before", lambda: whole(ids, labels=ids))
    expect("divided", lambda: attach(
        model, tokenizer, config_for(model, tokenizer, **FIELDS), name="other", group=dist.group.WORLD
    ))  # fmt: skip

    model = make_model("llama")
    if rank == 0:
        memory = load_memory(model, tokenizer, folder)
    else:
        memory = attach(model, tokenizer, config_for(model, tokenizer, **FIELDS))
    whole = DistributedDataParallel(model.train())
    expect("other rows", whole(ids, labels=ids).loss.backward)

    model, memory = make()
    whole, optimizer = DistributedDataParallel(model), memory.optimizer()
    for skips in (True, False):
        loss = whole(ids, labels=ids).loss
        if skips:
            loss.backward()
        else:
            expect("a step that one skipped", loss.backward)
        if not (skips and rank == 1):
            optimizer.step() if skips else None
        optimizer.zero_grad()
    return told


def save_all(folder: Path) -> list[Tensor]:
    """Every rank saves to the same place at once."""
    model, memory = make()
    whole, optimizer, ids = DistributedDataParallel(model), memory.optimizer(), parts()[0, 0, dist.get_rank()]
    for _ in range(2):
        whole(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.save_pretrained(folder)
    return held(memory)


# -- all of it, once --------------------------------------------------------------------------------------------------


def train_all(cases: list[tuple[dict[str, Any], str]]) -> list[dict[str, Any]]:
    return [train(*case) for case in cases]


def everything(folder: Path) -> dict[str, Any]:
    rank = str(dist.get_rank())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(RANKS), MASTER_ADDR="localhost", MASTER_PORT="0")
    transformers.logging.set_verbosity_error()
    return {
        "own": train_all(OWN),
        "apart": train_apart(),
        "trainer": run_trainer(folder / "ranks", 1),
        "recomputing": run_trainer(folder / "recomputing", 1, gradient_checkpointing=True),
        "resumed": run_trainer(folder / "resumed", 1, folder / "alone" / "checkpoint-2"),
        "saved": save_all(folder / "saved"),
        "refused": refused(folder / "alone" / "checkpoint-2" / "memories" / "memory"),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[Tensor]:
    return run_trainer(folder / "alone", RANKS)


@pytest.fixture(scope="module")
def by_ranks(folder: Path, alone: list[Tensor]) -> Iterator[list[dict[str, Any]]]:
    yield run_ranks(RANKS, everything, folder, imports=["transformers.trainer", "torch_engram.hub"])


@pytest.mark.parametrize("case", range(len(OWN)))
def test_ranks_with_half_batches_train_as_one_process_with_whole_ones(case: int, by_ranks: Any) -> None:
    """While they evaluate and generate each for itself."""
    one, other = (rank["own"][case] for rank in by_ranks)
    assert same(one["held"], other["held"]) and same(one["norms"], other["norms"])
    alone = train(*OWN[case])
    close = dict(rtol=2e-2, atol=1e-3) if "codec" in OWN[case][0] else CLOSE  # bf16 is rounded by luck
    assert_close(one["norms"], alone["norms"], **close)
    assert_close(one["held"], alone["held"], **close)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_as_one() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"device": "cuda"}, "no_sync"), ({"device": "cuda", "placement": "host"}, "each time"),
    ]  # fmt: skip
    for case, one, other in zip(cases, *run_ranks(RANKS, train_all, cases, device="cuda"), strict=True):
        assert same(one["held"], other["held"]) and same(one["norms"], other["norms"])
        assert_close(one["held"], train(*case)["held"], rtol=1e-2, atol=1e-4)


def test_a_rank_that_reads_nothing_takes_the_step_of_the_others(by_ranks: Any) -> None:
    one, other = (rank["apart"] for rank in by_ranks)
    assert same(one, other)
    assert_close(one, train_apart())


def test_trainer_on_ranks_is_trainer_alone(by_ranks: Any, alone: list[Tensor], folder: Path) -> None:
    for case in ("trainer", "recomputing", "resumed"):
        one, other = (rank[case] for rank in by_ranks)
        assert same(one, other)
        assert_close(one, alone)
    assert not same(alone, held(make()[1]))


def test_what_ranks_saved_one_process_goes_on_with(by_ranks: Any, folder: Path, alone: list[Tensor]) -> None:
    assert_close(run_trainer(folder / "again", RANKS, folder / "ranks" / "checkpoint-2"), alone)
    saved = from_pretrained(folder / "ranks" / "checkpoint-4", make_tokenizer())
    assert same(held(memories_of(saved)["memory"]), by_ranks[0]["trainer"])


def test_ranks_that_all_save_to_one_place_leave_it_whole(by_ranks: Any, folder: Path) -> None:
    saved = from_pretrained(folder / "saved", make_tokenizer())
    assert same(held(memories_of(saved)["memory"]), by_ranks[0]["saved"])
    own = folder / "saved" / "memories" / "memory"
    assert len([path for path in own.iterdir() if path.name.startswith(("rows-", "modules-"))]) == 2


def test_what_would_part_the_ranks_is_refused_on_all_of_them(by_ranks: Any) -> None:
    for rank, told in enumerate(each["refused"] for each in by_ranks):
        assert told["no wrapper"].startswith(f"Rank {rank} of 2 trains memory 'memory' by itself")
        assert "outside no_sync()" in told["only no_sync"]
        assert "within join()" in told["join"]
        assert "attach it before the model is wrapped" in told["wrapped before"]
        assert "leave out group=" in told["divided"]
        assert told["other rows"].startswith("Rank 1 has other rows of memory 'memory' than rank 0")
        assert told["a step that one skipped"].startswith("Rank 1 has other rows")
