"""The model that decoding is measured on: its kernels against their twins, and its steps with a memory."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torch_engram.memory import FixedMemory, MemoryBank, Tokens
from torch_engram.window import Window

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
attention: Any = import_module("decoding.attention")
kernels: Any = import_module("decoding.kernels")
model: Any = import_module("decoding.model")
replay: Any = import_module("decoding.replay")
stand: Any = import_module("decoding.stand")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16  # the interpreter multiplies no bf16


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel forgets to write is not a number."""
    real = Tensor.new_empty

    def poison(*args: Any, **options: Any) -> Tensor:
        made = real(*args, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made  # the interpreter makes others, too

    monkeypatch.setattr(Tensor, "new_empty", poison)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("heads, groups", [(1, 1), (4, 2), (8, 2)])
@pytest.mark.parametrize("setting", range(3))
def test_attention_equals_its_twin(heads: int, groups: int, dtype: torch.dtype, setting: int, monkeypatch: Any) -> None:
    """At lengths about the blocks' own, and 0; the new keys and values too, and none but they changed."""
    monkeypatch.setattr(kernels, "_chosen", kernels._SETTINGS[setting])
    lengths, width = (70, 64, 63, 33, 32, 1, 0), 16
    cache = attention.RaggedCache(lengths, 2, 1, groups, width, DEVICE, dtype)
    cells, before = cache.layers[0], cache.layers[0].clone()
    qkv = torch.randn(len(lengths), (heads + 2 * groups) * width, device=DEVICE).to(dtype)
    scales = [torch.rand(width, device=DEVICE).to(dtype) for _ in range(2)]
    angles = torch.randn(cache.positions, width // 2, device=DEVICE)
    inputs = (qkv, *scales, angles.cos(), angles.sin())
    expected = attention.attend_naive(*inputs, twin := before.clone(), cache.starts, cache.lengths)
    got = kernels.attend_triton(*inputs, cells, cache.starts, cache.lengths)
    close = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=2**-6, atol=2**-6)
    torch.testing.assert_close(got, expected, **close)
    torch.testing.assert_close(cells, twin, **close)
    new = cache.starts + cache.lengths
    old = torch.ones(len(cells), dtype=torch.bool, device=DEVICE).index_fill_(0, new, False)
    assert torch.equal(cells[old], before[old])
    assert torch.equal(cells[new, :, 1], qkv.view(len(lengths), -1, width)[:, -groups:])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("size", [(1, 1), (3, 70), (2, 1025)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_equals_its_twin(size: tuple[int, int], dtype: torch.dtype) -> None:
    gate_up = torch.randn(size[0], 2 * size[1], device=DEVICE).to(dtype)
    gate, up = gate_up.float().chunk(2, dim=-1)
    close = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(kernels.swiglu_triton(gate_up).float(), F.silu(gate) * up, **close)


class Reads:
    """A bank's ordinary reads, at fixed addresses."""

    def __init__(self, bank: MemoryBank, sequences: int):
        self.bank, self.fixed = bank, FixedMemory(bank, sequences, 1)
        self.ids, self.wait, self.seen = torch.zeros(sequences, 1, dtype=torch.int64), self.fixed.wait, []

    def begin(self, history: Window) -> None:
        self.history = history

    def read(self, ids: Tensor, *, after: Any = None) -> None:
        self.seen.append(ids[:, 0].clone())
        self.fixed.load(self.bank.prefetch(Tokens(ids.clone(), history=self.history)))


def whole(decoder: Any, cache: Any, bank: MemoryBank, engram: Any, text: Tensor, first: int) -> Tensor:
    """Logits ``[B, V]`` of the last column of ``text``, by attention over whole sequences; what stands before column
    ``first`` of the text are the keys and values that the cache began with."""
    rows = bank.read(Tokens(text)).wait(replay.LAYER)[bank.name]
    shape, out = decoder.shape, []
    for number, length in enumerate(cache.lengths.tolist()):
        x = decoder.embedding[text[number, first:]]
        start = int(cache.starts[number])
        before = length - len(x)
        for layer, weights in enumerate(decoder.layers):
            if layer == replay.LAYER:
                x = engram(x[None, :, None], rows[number : number + 1, first:])[0, :, 0]
            qkv = F.linear(F.rms_norm(x, x.shape[1:], eps=1e-6), weights.qkv).unflatten(1, (-1, shape.width))
            turned = F.rms_norm(qkv[:, : -shape.groups], (shape.width,), eps=1e-6)
            cos, sin = (angle[before:length, None] for angle in (decoder.cos, decoder.sin))
            query, key = attention.rotate(turned, cos, sin).split((shape.heads, shape.groups), 1)
            old = cache.layers[layer][start : start + before]
            keys = torch.cat((old[:, :, 0], key)).repeat_interleave(shape.heads // shape.groups, 1)
            values = torch.cat((old[:, :, 1], qkv[:, -shape.groups :])).repeat_interleave(
                shape.heads // shape.groups, 1
            )
            mask = torch.ones(len(x), length, dtype=torch.bool).tril(before)
            heads = (part.transpose(0, 1) for part in (query, keys, values))
            mixed = F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(0, 1).flatten(1)
            x = x + mixed @ weights.out.t()
            gate, up = F.linear(F.rms_norm(x, x.shape[1:], eps=1e-6), weights.gate_up).chunk(2, -1)
            x = x + (F.silu(gate) * up) @ weights.down.t()
        out.append(F.linear(F.rms_norm(x[-1], x.shape[1:], eps=1e-6), decoder.head))
    return torch.stack(out)


def test_steps_equal_the_whole(make_bank: Callable[..., MemoryBank]) -> None:
    """Round by round, every step decodes the text's next tokens with their memory, on sequences of their lengths."""
    bank = make_bank(dict(layers=(replay.LAYER,)))
    shape = model.Shape(hidden=32, inner=24, layers=3, heads=4, groups=2, width=8, vocab=60)
    lengths, steps = stand.spread(4, 1, 9), 3
    assert lengths == [8, 6, 4, 2]
    cpu = torch.device("cpu")
    cache = attention.RaggedCache(lengths, steps + 1, shape.layers, shape.groups, shape.width, cpu, torch.float32)
    decoder = model.DecodeModel(shape, cache.positions, cpu, torch.float32)
    text = torch.randint(60, (4, replay.PROMPT + 2 * steps + 1))
    batch, memory, engram = replay.Batch(decoder, cache, text), Reads(bank, 4), stand.engram_for(bank, shape.hidden)
    decoding = replay.Decoding(batch, replay.Remembered(bank, memory, engram))
    plain = replay.Decoding(batch, graphs=1)
    memory.seen.clear()
    for turn in range(2):
        first = replay.PROMPT + turn * steps
        plain.rate(steps)
        without = batch.logits.clone()
        assert decoding.rate(steps) > 0
        assert torch.equal(torch.stack(memory.seen[-steps:], 1), text[:, first : first + steps])
        decoding.require_right()
        assert cache.lengths.tolist() == [length + steps for length in lengths]
        expected = whole(decoder, cache, bank, engram, text[:, : first + steps], first)
        torch.testing.assert_close(batch.logits, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(without, batch.logits, atol=1e-3)
    memory.fixed.wait(replay.LAYER)[bank.name][0, 0, 0] += 1
    with pytest.raises(ValueError, match="nothing is timed"):
        decoding.require_right()
