"""Centred kernel alignment (CKA): how alike layers of two models see the same tokens, and which is like which.

With Gram matrices K = X X^T and L = Y Y^T of n tokens' states (Kornblith et al. 2019; arXiv 2601.07372, equation 8):

    CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))

HSIC is the unbiased estimator (Song et al. 2012, equation 5), so that it may be averaged over minibatches of tokens
before the quotient is taken (Nguyen et al. 2021), and the CKA of unrelated states is 0 in the mean, not above it.
Shapes: A and B states of the two models, n tokens, d width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import permutations

import torch
from torch import Tensor

from torch_engram.analysis.reading import Reading
from torch_engram.analysis.subject import Subject

MINIBATCH = 512
"""Tokens whose Gram matrices are held at once."""
NEAREST = 5
"""Layers that :func:`soft_alignment` weighs, as in the paper."""
_LEAST = 4
"""Tokens that the unbiased estimator needs."""


def hsic_naive(k: Tensor, l: Tensor) -> float:  # noqa: E741
    """The unbiased HSIC of Gram matrices ``[n, n]`` by its definition: over all four distinct tokens i, j, q, r the
    mean of k_ij (l_ij + l_qr - 2 l_iq), which is its form as a U-statistic (Song et al. 2012)."""
    terms = [k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q]) for i, j, q, r in permutations(range(len(k)), 4)]
    return float(sum(terms)) / len(terms)


def hsic(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741
    """The unbiased HSIC ``[A, B]`` of every pair of Gram matrices ``[A, n, n]`` and ``[B, n, n]``, with zero diagonals.

    n is at least 4. With K and L of a pair, (tr(KL) + 1'K1 1'L1 / ((n-1)(n-2)) - 2 1'KL1 / (n-2)) / (n(n-3)).
    """
    n = k.shape[-1]
    k_sums, l_sums = k.sum(-1), l.sum(-1)
    trace = k.flatten(1) @ l.flatten(1).T
    totals = torch.outer(k_sums.sum(-1), l_sums.sum(-1))
    return (trace + totals / ((n - 1) * (n - 2)) - 2 * (k_sums @ l_sums.T) / (n - 2)) / (n * (n - 3))


def grams(states: Tensor) -> Tensor:
    """Gram matrices fp64 ``[A, n, n]`` of states ``[A, n, d]``, with zero diagonals.

    States are centred first: HSIC is the same, and loses no digits to a mean far from 0, such as trained models have.
    """
    centred = states.double() - states.double().mean(1, keepdim=True)
    gram = centred @ centred.mT
    gram.diagonal(dim1=-2, dim2=-1).zero_()
    return gram


def cka(x: Tensor, y: Tensor) -> float:
    """The CKA of states ``[n, d1]`` and ``[n, d2]`` of the same n tokens: 1 where they are the same up to an orthogonal
    map and a factor, and around 0, also below, where they have nothing to do with each other.

    Raises ``ValueError`` for fewer than four tokens, unlike numbers of them, and for states that do not differ.
    """
    if len(x) != len(y):
        raise ValueError(f"CKA compares the same tokens, and these are {len(x)} and {len(y)}: give as many of both.")
    return float(_matrix([(x[None], y[None])]))


def cka_matrix(a: Subject, b: Subject, readings: Iterable[Reading], *, minibatch: int = MINIBATCH) -> Tensor:
    """The CKA of every state of ``a`` with every state of ``b``: fp64 ``[A, B]``, state 0 being the embedding.

    ``readings``: of a text in the ids of both models. HSIC is averaged over minibatches of their chosen positions; what
    remains at the end is left out, unless it is all there is. Raises ``ValueError`` as :func:`cka` does.
    """
    return _matrix(_minibatches(a, b, readings, minibatch))


def _matrix(minibatches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """From states ``[A, n, d1]`` and ``[B, n, d2]``, any number of times."""
    cross = own_a = own_b = torch.zeros((), dtype=torch.float64)
    for x, y in minibatches:
        if x.shape[1] < _LEAST:
            raise ValueError(
                f"CKA needs {_LEAST} tokens, and there are {x.shape[1]}: give more text, or more entities."
            )
        of_a, of_b = grams(x), grams(y)
        cross = cross + hsic(of_a, of_b).cpu()
        own_a, own_b = own_a + hsic(of_a, of_a).diagonal().cpu(), own_b + hsic(of_b, of_b).diagonal().cpu()
    for own in (own_a, own_b):
        if not (own > 0).all():
            raise ValueError(
                f"State {int((own > 0).int().argmin())} of a model is the same, or nearly so, at all tokens that are "
                "compared: give more text, or more entities."
            )
    return cross / torch.outer(own_a, own_b).sqrt()


def _minibatches(a: Subject, b: Subject, readings: Iterable[Reading], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """States of both models at the same ``size`` chosen positions. They are drawn from a batch's sequences in an order
    of no meaning, for neighbours are alike."""
    generator = torch.Generator().manual_seed(0)
    x, y, gave = torch.empty(0), torch.empty(0), False
    for reading in readings:
        places = reading.chosen.flatten().nonzero()[:, 0]
        places = places[torch.randperm(len(places), generator=generator)]
        more_x, more_y = (_at(places, model.states(reading.batch)) for model in (a, b))
        x, y = (torch.cat((x, more_x), 1), torch.cat((y, more_y), 1)) if x.numel() else (more_x, more_y)
        while x.shape[1] >= size:
            yield x[:, :size], y[:, :size]
            x, y, gave = x[:, size:], y[:, size:], True
    if not gave:
        yield x, y


def _at(places: Tensor, states: Tensor) -> Tensor:
    """``[A, n, d]`` of states ``[A, B, T, d]``, at n of the B * T positions."""
    return states.flatten(1, 2)[:, places.to(states.device)]


def soft_alignment(similarity: Tensor, k: int = NEAREST) -> Tensor:
    """Of every state of A, the depth in B that it is like: ``[A]`` from similarities S ``[A, B]``.

    a_l = sum_j S_lj j / sum_j S_lj over the ``k`` states j of B that are most like l, or all where B has fewer
    (arXiv 2601.07372, equation 9, whose i and j are j and l here). j = 0 is the embedding, so that j counts the blocks
    that a state has passed. A negative estimate counts as 0; where none is positive, the depth is NaN.
    """
    weights, depths = similarity.clamp(min=0).topk(min(k, similarity.shape[1]), dim=1)
    return (weights * depths).sum(1) / weights.sum(1)
