"""Muon for matrices, one or a stack of them: momentum, orthogonalised by Newton-Schulz (K. Jordan et al., 2024).

``torch.optim.Muon`` takes 2-D weights one at a time. Here all matrices of one size, experts' ``[experts, in, out]``
and transposed ones among them, are one batch, so that a step is a handful of launches and not thousands.
:func:`orthogonalise` reads like the definition; :func:`orthogonalise_batch` is what a step runs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch_engram.train.sharded import Rows

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Jordan's quintic: steep at zero, and stable up to 1
_ITERATIONS = 5
_BATCH_NUMBERS = 1 << 29
"""Most numbers of a batch: 2 GiB in fp32."""


def orthogonalise(update: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly (singular values end near 1): ``[..., m, n]``, computed in bf16."""
    x = update.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = x.mT if tall else x
    return result


def orthogonalise_batch(x: Tensor) -> Tensor:
    """:func:`orthogonalise` of ``[count, m, n]`` with m <= n, in its type, with sums inside the matrix products.

    a is added to the diagonal of the polynomial, which is smaller than the matrices: a product that adds to something
    first copies it.
    """
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        x = torch.bmm(polynomial, x)
    return x


@dataclass(frozen=True)
class _Piece:
    """Matrices of one parameter, ``[count, rows, columns]``: views of what they were made of."""

    parameter: Tensor
    grad: Tensor
    momentum: Tensor
    rows: int
    """Of a whole matrix; this rank may hold fewer."""

    @property
    def tall(self) -> bool:
        return self.rows > self.grad.shape[2]

    @property
    def numel(self) -> int:
        """Numbers of the whole matrices."""
        return len(self.grad) * self.rows * self.grad.shape[2]


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; decoupled weight decay.

    An update is scaled by 0.2·sqrt(max(m, n)), which gives it AdamW's usual root mean square (arXiv 2502.16982), so
    learning rates are of AdamW's size.

    ``divided``: how the ranks hold matrices whose parameters are ``DTensor``s, cut along their first dimension. Momenta
    are cut alike; a matrix is brought together to be orthogonalised, and each rank updates its own rows. Of a stack a
    rank has whole matrices.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 2e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        *,
        divided: Rows | None = None,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self._divided = divided

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. Nothing waits for the device."""
        assert closure is None, "Muon takes no closure"
        for group in self.param_groups:
            kinds: dict[tuple[Any, ...], list[_Piece]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    size = tuple(sorted(parameter.shape[-2:]))
                    cut = self._divided is not None and parameter.ndim == 2
                    kinds[size, parameter.dtype, parameter.device, cut].extend(self._pieces(parameter))
            for (*_, cut), pieces in kinds.items():
                for batch in _batches(pieces):
                    _update(batch, group, self._divided if cut else None)

    def _pieces(self, parameter: Tensor) -> Iterator[_Piece]:
        """The parameter's matrices, in parts that fit into a batch."""
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        assert parameter.grad is not None
        most = max(1, _BATCH_NUMBERS // (parameter.shape[-2] * parameter.shape[-1]))
        tensors = [parameter, parameter.grad, state["momentum"]]
        if self._divided is not None:
            tensors = [self._divided.held(tensor) for tensor in tensors]
        stacks = (_stack(tensor).split(most) for tensor in tensors)
        for mine, grad, momentum in zip(*stacks, strict=True):
            yield _Piece(mine, grad, momentum, parameter.shape[-2])


def _stack(matrices: Tensor) -> Tensor:
    return matrices.unsqueeze(0) if matrices.ndim == 2 else matrices.flatten(0, -3)


def _batches(pieces: list[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces in their order, as many at once as the bound allows."""
    batch: list[_Piece] = []
    held = 0
    for piece in pieces:
        if batch and held + piece.numel > _BATCH_NUMBERS:
            yield batch
            batch, held = [], 0
        batch.append(piece)
        held += piece.numel
    if batch:
        yield batch


def _update(batch: list[_Piece], group: dict[str, Any], divided: Rows | None) -> None:
    """One step of matrices of one size, the tall ones turned. ``divided``: of which every rank holds some rows."""
    grads, momenta = [piece.grad for piece in batch], [piece.momentum for piece in batch]
    rows, columns = sorted((batch[0].rows, grads[0].shape[2]))
    counts = [len(grad) for grad in grads]
    directions = torch.empty(sum(counts), rows, columns, dtype=_product_type(grads[0].device), device=grads[0].device)
    torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
    nesterov = torch._foreach_lerp(grads, momenta, group["momentum"])
    if divided is not None:
        parts = [part[0] for part in nesterov]
        nesterov = tuple(whole[None] for whole in divided.gather(parts, [piece.rows for piece in batch]))
    torch._foreach_copy_(_turned(directions.split(counts), batch), nesterov)
    del nesterov
    steps = _turned(orthogonalise_batch(directions).split(counts), batch)
    if divided is not None:
        steps = [divided.own(step[0])[None] for step in steps]
    parameters = [piece.parameter for piece in batch]
    if group["weight_decay"]:
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
    for parameter, step in zip(parameters, steps, strict=True):  # one by one they are cast on the way
        parameter.add_(step, alpha=-group["lr"] * 0.2 * columns**0.5)


def _product_type(device: torch.device) -> torch.dtype:
    """bf16, but for CPUs that have no products in it: there they take many times as long as in fp32 (dev/LOG.md)."""
    slow = device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.float32 if slow else torch.bfloat16


def _turned(stacks: Iterable[Tensor], pieces: list[_Piece]) -> list[Tensor]:
    """Views of stacks of wide matrices as their pieces lie."""
    return [stack.mT if piece.tall else stack for stack, piece in zip(stacks, pieces, strict=True)]
