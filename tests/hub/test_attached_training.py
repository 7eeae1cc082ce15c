"""A memory on a model is trained by loops that know nothing of it: a plain one, Trainer, SFTTrainer, beside LoRA."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import peft
import transformers
import trl
from datasets import Dataset

from models import VOCAB, make_model, make_tokenizer
from torch_engram.hub import Attached, attach, config_for, from_pretrained, restore_memories
from torch_engram.optim import RowAdam
from torch_engram.stores import make_keys

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers renames what trl and peft call
FIELDS: dict[str, Any] = dict(layers=(1,), heads=2, row_dim=8, rows_per_head=300)


def make(kind: str = "llama", lr: float = 1e-2, **options: Any) -> tuple[Any, Attached]:
    model, tokenizer = make_model(kind), make_tokenizer()
    config = config_for(model, tokenizer, **FIELDS)
    torch.manual_seed(0)
    return model, attach(model, tokenizer, config, optimizer=lambda rows: RowAdam(rows, lr=lr), **options)


def batches(steps: int = 3, micro: int = 2) -> Tensor:
    return torch.randint(3, VOCAB, (steps, micro, 2, 9), generator=torch.Generator().manual_seed(2))


def rows_of(memory: Attached) -> list[Tensor]:
    memory.bank.flush()
    return [
        memory.bank.source(table).store.fetch(make_keys(table.space, torch.arange(table.rows)))
        for table in memory.bank.tables
    ]


def test_a_forward_without_a_backward_keeps_no_memory_alive() -> None:
    model, memory = make()
    ref = weakref.ref(memory.bank)
    model.train()
    model(batches()[0, 0]).logits  # noqa: B018
    memory.detach()
    del memory
    gc.collect()
    assert ref() is None


def test_a_steps_rows_go_without_the_garbage_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    model, memory = make()
    optimizer, prefetch, asked = memory.optimizer(lr=1e-2), memory.bank.prefetch, []

    def watched(*tokens: Any) -> Any:
        found = prefetch(*tokens)
        asked.append(weakref.ref(found))
        return found

    monkeypatch.setattr(memory.bank, "prefetch", watched)
    model.train()
    gc.disable()
    try:
        for step in batches(3):
            for tokens in step:
                model(tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert [ref() is None for ref in asked] == [True] * 5 + [False]
    finally:
        gc.enable()


@pytest.mark.parametrize("options", [{}, {"placement": "host"}, {"codec": "bf16"}])
def test_a_loop_that_knows_no_working_set_trains_as_one_that_does(
    options: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With accumulation and clipping, which counts the rows."""
    (one, plain), (other, known) = make(**options), make(**options)
    optimizers = plain.optimizer(lr=1e-2), known.optimizer(lr=1e-2)
    one.train()
    other.train()
    for step in batches():
        for tokens in step:
            (one(tokens, labels=tokens).loss / len(step)).backward()
        norm = nn.utils.clip_grad_norm_(one.parameters(), 0.05)
        optimizers[0].step()
        optimizers[0].zero_grad()

        rows = known.bank.prefetch(*step)
        coming = [rows[1], rows[0]]
        told = SimpleNamespace(read=lambda _, coming=coming: coming.pop(), begins_at=lambda _: None)
        monkeypatch.setattr(known._steps, "follow", lambda _, told=told: told)
        for tokens in step:
            (other(tokens, labels=tokens).loss / len(step)).backward()
        rows.reduce()
        assert norm > 0.05
        torch.testing.assert_close(nn.utils.clip_grad_norm_(other.parameters(), 0.05), norm)
        optimizers[1].step()
        optimizers[1].zero_grad()
    close = dict(rtol=2e-2, atol=1e-3) if "codec" in options else dict(rtol=1e-3, atol=1e-6)  # bf16 is rounded by luck
    for table in plain.bank.tables:
        decode = plain.bank.source(table).format.decode
        keys = make_keys(table.space, torch.arange(table.rows))
        mine, theirs = (decode(keys, rows_of(memory)[table.space])["value"] for memory in (plain, known))
        torch.testing.assert_close(mine, theirs, **close)
    for name, weight in plain.engrams.state_dict().items():
        torch.testing.assert_close(weight, known.engrams.state_dict()[name], rtol=1e-3, atol=1e-6)


def test_a_step_that_is_skipped_leaves_no_gradient() -> None:
    (one, skips), (other, plain) = make(), make()
    steps = batches(2, 1)[:, 0]
    first = skips.optimizer()
    one.train()
    one(steps[0], labels=steps[0]).loss.backward()
    first.zero_grad()  # as a scaler that met infinities does
    second = plain.optimizer()
    other.train()
    for model, optimizer in ((one, first), (other, second)):
        model(steps[1], labels=steps[1]).loss.backward()
        optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(rows_of(skips), rows_of(plain), strict=True))


def test_a_forward_without_a_backward_holds_no_rows() -> None:
    model, memory = make()
    model.train()
    ids = batches()[0, 0]
    with torch.no_grad():
        model(ids)
    for _ in range(3):
        loss = model(ids, labels=ids).loss
        del loss
    import gc

    gc.collect()
    assert not memory.bank.source(memory.bank.tables[0]).in_use


@pytest.mark.parametrize("recompute", [False, True])
def test_trainer(recompute: bool, tmp_path) -> None:
    model, memory = make(lr=3e-2)
    own = {name: weight.clone() for name, weight in model.state_dict().items()}
    data = [{"input_ids": ids, "labels": ids} for ids in batches(4, 1).flatten(0, 2)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), num_train_epochs=6, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        max_grad_norm=1.0, learning_rate=1e-2, gradient_checkpointing=recompute, save_strategy="epoch", report_to=[],
        logging_steps=1, disable_tqdm=True, use_cpu=True, save_total_limit=1,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=data, optimizers=(memory.optimizer(lr=1e-2), None))
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0] - 0.3
    assert all(torch.equal(weight, own[name]) for name, weight in model.state_dict().items())
    (saved,) = tmp_path.glob("checkpoint-*")
    again = from_pretrained(saved, make_tokenizer(), attn_implementation="eager").eval()
    ids = batches()[0, 0]
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)


def test_a_trainer_that_is_resumed_ends_as_one_that_was_not(tmp_path) -> None:
    data = [{"input_ids": ids, "labels": ids} for ids in batches(4, 1).flatten(0, 2)]

    def run(name: str, **options: Any) -> tuple[Any, Attached, transformers.Trainer]:
        model, memory = make(lr=3e-2)
        arguments = transformers.TrainingArguments(
            str(tmp_path / name), per_device_train_batch_size=2, save_strategy="steps", save_steps=2, report_to=[],
            disable_tqdm=True, use_cpu=True, max_steps=4,
        )  # fmt: skip
        optimizers = memory.optimizer(lr=1e-2), None
        return model, memory, transformers.Trainer(model, arguments, train_dataset=data, optimizers=optimizers)

    _, whole, trainer = run("whole")
    trainer.train()
    half = tmp_path / "whole" / "checkpoint-2"
    model, memory, trainer = run("resumed")
    with pytest.raises(
        ValueError, match="'memory' are not those that this optimiser's state was saved with: load them"
    ):
        trainer.train(resume_from_checkpoint=str(half))
    model, memory, trainer = run("resumed")
    restore_memories(model, half)
    trainer.train(resume_from_checkpoint=str(half))
    assert all(torch.equal(*pair) for pair in zip(rows_of(memory), rows_of(whole), strict=True))
    for name, weight in whole.engrams.state_dict().items():
        assert torch.equal(weight, memory.engrams.state_dict()[name])


def test_recomputation_changes_no_gradient() -> None:
    found = []
    for recompute in (False, True):
        model, memory = make()
        if recompute:
            model.gradient_checkpointing_enable()
        model.train()
        optimizer = memory.optimizer()
        for ids in batches(3, 1)[:, 0]:
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(rows_of(memory))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_sft_trainer(tmp_path) -> None:
    model, memory = make(lr=3e-2)
    tokenizer = make_tokenizer()
    texts = Dataset.from_dict({"text": [tokenizer.decode(ids) for ids in batches(4, 1).flatten(0, 2)]})
    arguments = trl.SFTConfig(
        str(tmp_path), num_train_epochs=8, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        logging_steps=1, disable_tqdm=True, use_cpu=True, save_strategy="no", max_length=16, bf16=False,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model, arguments, train_dataset=texts, processing_class=tokenizer,
        optimizers=(memory.optimizer(lr=1e-2), None),
    )  # fmt: skip
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0] - 0.3


def test_lora_beside_a_memory(tmp_path) -> None:
    """Attached to a model with LoRA, both are trained, and nothing else."""
    base, tokenizer = make_model("llama"), make_tokenizer()
    own = {name: weight.clone() for name, weight in base.state_dict().items()}
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    adapters = {name: weight.clone() for name, weight in model.named_parameters() if weight.requires_grad}
    memory = attach(model, tokenizer, config_for(model, tokenizer, **FIELDS))
    optimizer = memory.optimizer(lr=1e-2)
    model.train()
    before = rows_of(memory)
    for ids in batches(3, 1)[:, 0]:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not any(torch.equal(*pair) for pair in zip(rows_of(memory), before, strict=True))
    now = dict(model.named_parameters())
    assert not all(torch.equal(now[name], weight) for name, weight in adapters.items())
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").exists() and (tmp_path / "memories" / "memory").is_dir()
    memory.detach()
    plain = model.unload().state_dict()
    assert all(torch.equal(plain[name], weight) for name, weight in own.items())


def test_compiled() -> None:
    model, memory = make()
    model.train()
    optimizer = memory.optimizer()
    ids = batches()[0, 0]
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        expected = model(ids).logits
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(ids).logits, expected)
        other = ids.flip(1)
        torch.testing.assert_close(compiled(other).logits, model(other).logits)
