"""The rules that FlexAttention is given, against the dense mask that a CPU uses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask

from torch_engram.models import layout
from torch_engram.models.layout import find_places


@given(st.integers(1, 3), st.integers(2, 20), st.floats(0, 0.5), st.sampled_from([None, 0.0, 0.3]), st.integers(0, 99))
def test_rules_see_what_the_dense_mask_shows(
    batch: int, tokens: int, starts: float, dead: float | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    doc_start = torch.rand(batch, tokens, generator=generator) < starts
    doc_start[0, 1] = True  # else there is nothing to mask
    live = None if dead is None else torch.rand(batch, tokens, generator=generator) >= dead
    placement = find_places(torch.zeros(batch, tokens, dtype=torch.int64), doc_start, live, None)
    rules = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "_compiled_block_mask", lambda: lambda rule, *_, **__: rules.append(rule))
        layout._block_mask(placement)
    shown = create_mask(rules[0], batch, 1, tokens, tokens, device="cpu")
    assert torch.equal(shown, layout._dense_mask(placement, tokens, torch.float32) == 0)
