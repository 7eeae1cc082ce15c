"""A memory on tiny models of every architecture: what it may not change, and what it has to do like a full forward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from models import ARCHITECTURES, PAD, VOCAB, make_model, make_tokenizer
from torch_engram.hub import Attached, attach, config_for, from_pretrained

FIELDS = dict(layers=(1, 2), heads=2, row_dim=8, rows_per_head=200)
CLOSE = dict(rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def train(memory: Attached, model, ids: Tensor, steps: int = 3) -> None:
    """Until the memory says something, and its convolution, too."""
    optimizer = memory.optimizer(lr=3e-2)
    model.train()
    for _ in range(steps):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize("kind", ARCHITECTURES)
@torch.no_grad()
def test_a_memory_on_a_model(kind: str, tokenizer, tmp_path: Path) -> None:
    model = make_model(kind)
    ids = torch.randint(2, VOCAB, (2, 10), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(10).repeat(2)[None]
    before, weights = model(ids).logits, {name: weight.clone() for name, weight in model.state_dict().items()}
    memory = attach(model, tokenizer, config_for(model, tokenizer, **FIELDS))
    assert torch.equal(model(ids).logits, before)  # rows are zero
    with torch.enable_grad():
        train(memory, model, ids)
    full = model(ids).logits
    assert (full - before).abs().max() > 1e-2
    with memory.disabled():
        assert torch.equal(model(ids).logits, before)

    first = model(ids[:, :4], use_cache=True)
    parts, cache = [first.logits], first.cache
    for at in range(4, 10):
        step = model(ids[:, at : at + 1], cache=cache)
        parts.append(step.logits)
    torch.testing.assert_close(torch.cat(parts, 1), full, **CLOSE)

    packed = model(ids.view(1, -1), position_ids=positions, use_cache=False).logits.view(2, 10, -1)
    torch.testing.assert_close(packed, full, **CLOSE)

    padded = torch.cat((torch.full((1, 3), PAD), ids[:1, :7]), 1)
    batch = torch.cat((padded, ids[1:]))
    mask = torch.ones_like(batch)
    mask[0, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp_(min=0)
    found = model(batch, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(found[0, 3:], full[0, :7], **CLOSE)
    torch.testing.assert_close(found[1], full[1], **CLOSE)

    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path, tokenizer, attn_implementation="eager").eval()
    assert torch.equal(again(ids).logits, full)
    memory.detach()
    assert torch.equal(model(ids).logits, before)
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert all(weight.requires_grad for weight in model.parameters())
