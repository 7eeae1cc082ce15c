"""An attached memory on a GPU: what it says there is what it says on a CPU, decoded with a cache, captured, trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from models import PAD, VOCAB, make_model, make_tokenizer
from torch_engram.hub import Attached, attach, config_for

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]  # compilers warn of what could be faster
IDS = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(6))


def make(device: str, **options: Any) -> tuple[Any, Attached]:
    model, tokenizer = make_model("llama").to(device), make_tokenizer()
    config = config_for(model, tokenizer, layers=(0, 2), heads=2, row_dim=16, rows_per_head=500, init_std=0.5)
    torch.manual_seed(0)
    memory = attach(model, tokenizer, config, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for engram in memory.engrams.values():  # the same on both, whatever draws them
            for weight in engram.parameters():
                weight.copy_(torch.randn(weight.shape) * 0.2)
    return model, memory


@torch.no_grad()
def test_logits_are_those_of_the_cpu() -> None:
    (here, _), (there, _) = make("cpu"), make("cuda")
    torch.testing.assert_close(there(IDS.cuda()).logits.cpu(), here(IDS).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_generate(cache: str) -> None:
    model, _ = make("cuda")
    settings = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=PAD)
    prompt = torch.cat((torch.full((2, 2), PAD), IDS), 1).cuda()
    mask = (prompt != PAD).long()
    expected = model.generate(prompt, attention_mask=mask, use_cache=False, **settings)
    assert torch.equal(model.generate(prompt, attention_mask=mask, cache_implementation=cache, **settings), expected)


@pytest.mark.parametrize("placement", ["device", "host"])
def test_a_training_loop_of_several_micro_batches(placement: str) -> None:
    model, memory = make("cuda", placement=placement)
    optimizer = memory.optimizer(lr=1e-2)
    model.train()
    losses = []
    for _ in range(12):
        for ids in IDS.cuda().split(1):
            loss = model(ids, labels=ids).loss / 2
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert norm > 0
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.1
