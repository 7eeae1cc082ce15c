"""That two memories compute the same: of equal weights and rows, the same loss, and the same gradient of those rows.

engram-peft hashes with the same primes and multipliers, and yet reads other rows: its 2-grams at position t are of the
tokens t-2 and t-1, without the one at t, and multipliers are laid on from the oldest token. So it is given our row ids
here, in place of those that its collator makes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attached.training import Ours, Peft, Setting
from torch_engram.addressing import Addressing, CanonicalVocab
from torch_engram.stores import make_keys
from torch_engram.stores.records import ROW_MASK

NEAR, TOLERANCE = 1e-3, 2e-2
"""Of a loss, and of a gradient as a share of its size: the gate's root is steep where a score is near zero."""
_AT_ONCE = 1 << 17

Grads = dict[int, tuple[Tensor, Tensor]]
"""By layer the rows that were read, ascending, and their gradients ``[U, dim]``."""


def require_same(package: Any, setting: Setting) -> None:
    """An ``assert`` fails where, from engram-peft's random start with weights that let something through, one batch
    gives another loss or another gradient in ours than in engram-peft's, all in fp32; or where a memory at its own
    start changes the model's loss."""
    setting = replace(setting, batches=setting.batches[:1, :2])
    ids = setting.batches[0]
    with torch.no_grad():
        base = float(setting.backbone.model(input_ids=ids, labels=ids).loss)
    theirs = Peft(package, setting, hashes=False)
    theirs.hashed = [_row_ids(theirs, setting)]
    theirs.train(True)
    _require_near("engram-peft's loss at its start", float(theirs.loss(0).detach()), base)
    for weight in theirs.model.engram_layers.parameters():
        if weight.dim() < 2 or weight.shape[-1] != setting.row_dim:
            torch.nn.init.normal_(weight, mean=float(weight.dim() == 1), std=0.1)
    expected = theirs.loss(0)
    expected.backward()
    wanted = {layer: _sparse(theirs, layer) for layer in setting.layers}
    theirs.remove()
    ours = Ours(setting)
    ours.train(True)
    _require_near("our loss at zero rows", float(ours.loss(0).detach()), base)
    for layer in setting.layers:
        _copy(theirs, ours, layer)
    found = ours.loss(0)
    found.backward()
    _require_near("our loss with engram-peft's weights", float(found.detach()), float(expected.detach()))
    for layer, (rows, grads) in _touched(ours).items():
        assert torch.equal(rows, wanted[layer][0]), f"layer {layer}: other rows are read"
        error = float((grads - wanted[layer][1]).norm() / wanted[layer][1].norm())
        assert error < TOLERANCE, f"layer {layer}: the rows' gradient is off by {error:.3g}"
    assert ours.memory.bank.reduced is not None
    ours.memory.bank.reduced.discard()
    ours.remove()
    print(
        f"same loss {float(found.detach()):.5f} (of the model alone {base:.5f}), same rows, same gradients", flush=True
    )


def _row_ids(theirs: Peft, setting: Setting) -> Tensor:
    """Ours of the first batch ``[B, T, L, C]``, without the offsets of heads."""
    addressing = Addressing(setting.config(), CanonicalVocab.of(setting.backbone.tokenizer))
    found, lookup = [], addressing.lookup(setting.batches[0])
    for layer, layout in addressing.layouts.items():
        primes = theirs.model.hash_mapping.prime_tables[layer]
        assert [list(order) for order in layout.primes] == primes, f"layer {layer}: other numbers of rows"
        found.append(lookup(layer)[1] - torch.tensor(layout.offsets, device=setting.device))
    return torch.stack(found, 2)


def _require_near(what: str, found: float, expected: float) -> None:
    assert abs(found - expected) < NEAR, f"{what} is {found:.5f}, not {expected:.5f}"


def _sparse(theirs: Peft, layer: int) -> tuple[Tensor, Tensor]:
    grad = theirs.model.engram_layers[str(layer)].multi_head_embedding.embedding.weight.grad.coalesce()
    return grad.indices()[0], grad.values()


def _touched(ours: Ours) -> Grads:
    bank, found = ours.memory.bank, {}
    assert bank.optimizer is not None
    for table, proxy in zip(bank.tables, bank.parameters(), strict=True):
        planes: Any = bank.optimizer.state[proxy]
        assert proxy.grad is not None
        found[table.layer] = planes.row_keys & ROW_MASK, proxy.grad
    return found


@torch.no_grad()
def _copy(theirs: Peft, ours: Ours, layer: int) -> None:
    """A layer's weights and rows into ours."""
    module, engram = theirs.model.engram_layers[str(layer)], ours.memory.engrams[str(layer)]
    gating, convolution = module.gating, module.short_conv
    engram.wkv.weight.copy_(torch.cat((gating.w_k[0].weight, gating.w_v.weight)))  # type: ignore[union-attr, operator]
    for mine, weight in (
        (engram.query_weight, gating.norm_h[0].weight), (engram.key_weight, gating.norm_k[0].weight),
        (engram.convolution.norm_weight, convolution.norms[0].weight),  # type: ignore[union-attr]
    ):  # fmt: skip
        mine.copy_(weight[None])  # type: ignore[operator]
    engram.convolution.weight.copy_(convolution.conv.weight.permute(2, 1, 0))  # type: ignore[union-attr, operator]
    (table,) = (table for table in ours.memory.bank.tables if table.layer == layer)
    source, values = ours.memory.bank.source(table), module.multi_head_embedding.embedding.weight
    for first in range(0, len(values), _AT_ONCE):
        keys = make_keys(table.space, torch.arange(first, min(first + _AT_ONCE, len(values)), device=values.device))
        planes = source.format.decode(keys, source.store.fetch(keys))
        planes["value"] = values[first : first + len(keys)].float()
        planes["count"] = torch.ones_like(planes["count"])
        source.store.write(keys, source.format.encode(keys, planes))  # type: ignore[attr-defined]
