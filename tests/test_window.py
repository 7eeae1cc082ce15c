"""A Window behaves like the whole history cut to its last positions, whatever a cache does to its sequences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_engram.window import DecodeState, Window


def operations() -> st.SearchStrategy[list[tuple[str, int]]]:
    names = st.sampled_from(["push", "advance", "select", "repeat", "crop", "reset"])
    return st.lists(st.tuples(names, st.integers(0, 5)), max_size=25)


@pytest.fixture(autouse=True)
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch_engram.window._ROOM", 2)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 4), st.integers(0, 3), operations())
def test_equals_the_cut_history(keep: int, drafts: int, steps: list[tuple[str, int]]) -> None:
    window = Window(keep, drafts)
    whole: Tensor | None = None
    clock, lost = 0, 0  # the next token; positions up to here cannot come back
    for name, number in steps:
        if name == "push":
            batch = 2 if whole is None else len(whole)
            chunk = torch.arange(clock, clock + number).expand(batch, -1) + 1000 * torch.arange(batch)[:, None]
            clock += number
            window.push(chunk, chunk % 2 == 0)
            whole = chunk if whole is None else torch.cat((whole, chunk), dim=1)
            lost = max(lost, whole.shape[1] - keep - drafts)
        elif name == "advance" and whole is not None and whole.shape[1]:
            chunk = torch.full((len(whole), 1), clock)
            clock += 1
            seen = window.advance()
            assert all(torch.equal(view[:, :-1], before) for view, before in zip(seen, held(whole, keep), strict=True))
            for view, new in zip(seen, (chunk, chunk % 2 == 0), strict=True):
                view[:, -1:] = new
            whole = torch.cat((whole, chunk), dim=1)
            lost = max(lost, whole.shape[1] - keep - drafts)
        elif name == "reset":
            window.reset()
            whole, lost = None, 0
        elif whole is not None and name == "select":
            index = torch.tensor([number % len(whole), 0])
            window.select(index)
            whole = whole[index]
        elif whole is not None and name == "repeat" and len(whole) <= 4:
            window.repeat(number + 1)
            whole = whole.repeat_interleave(number + 1, dim=0)
        elif whole is not None and name == "crop":
            left = whole.shape[1] - number
            if lost > 0 and left - lost < keep:
                with pytest.raises(ValueError, match="raise drafts"):
                    window.crop(number)
            else:
                window.crop(number)
                whole = whole[:, :left] if left > 0 else None
                lost = lost if left > 0 else 0
        assert window.sequences == (0 if whole is None else len(whole))
        expected = () if whole is None else held(whole, keep)
        assert len(window) == (expected[0].shape[1] if expected else 0)
        for mine, theirs in zip(window.last() if len(window) else (), expected, strict=False):
            assert torch.equal(mine, theirs)


def held(whole: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """What a window of such tokens, and of which are even, looks back on."""
    tokens = whole[:, max(0, whole.shape[1] - keep) :]
    return tokens, tokens % 2 == 0


def test_is_a_decode_state_and_keeps_no_graph() -> None:
    window = Window(2)
    state: DecodeState = window
    window.push(torch.ones(1, 3, 4, requires_grad=True) * 2)
    assert not window.last()[0].requires_grad
    state.reset()
    assert window.last() == ()


def test_owns_what_it_holds() -> None:
    """Neither a caller's tensor is written, nor what was made in inference mode outside of it."""
    window, given = Window(2, 1), torch.arange(5)[None]
    with torch.inference_mode():
        window.push(given)
    window.crop(1)
    window.push(torch.tensor([[9]]))
    (seen,) = window.advance()
    seen[:, -1] = 7
    assert seen.tolist() == [[3, 9, 7]] and given.tolist() == [[0, 1, 2, 3, 4]]
    assert window.last()[0].tolist() == [[9, 7]]
