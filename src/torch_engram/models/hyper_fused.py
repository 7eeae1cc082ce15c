"""Hyper-connections on a GPU as operators that compilers, recompute and graph capture see whole.

Each calls the kernels of :mod:`torch_engram.models.hyper_kernels` and says its shapes itself. Streams are both read and
written to, so their gradient is a sum of two: reading hands them on to writing, and the way back through reading
takes in what comes from there, which saves a pass over the largest tensors of a block.
n tokens, M branches, d hidden, K = 2M + M^2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_engram.models.hyper_backward_kernels import read_backward_triton, write_backward_triton
from torch_engram.models.hyper_kernels import read_triton, write_triton


def read_fused(
    streams: Tensor, weight: Tensor, strength: Tensor, static: Tensor, iterations: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`torch_engram.models.hyper.read_naive`, from streams ``[B, T, M, d]`` of any type; last, the streams.

    Write to the streams that come back, so that both gradients are added up on the way.
    """
    flat = streams.flatten(0, 1).contiguous()
    parameters = (weight.float(), strength.float(), static.float())
    read, h_res, h_post, through = _Read.apply(flat, *parameters, iterations, eps)
    lead = streams.shape[:2]
    return read.unflatten(0, lead), h_res.unflatten(0, lead), h_post.unflatten(0, lead), through.unflatten(0, lead)


def write_fused(streams: Tensor, output: Tensor, h_res: Tensor, h_post: Tensor) -> Tensor:
    """As :func:`torch_engram.models.hyper.write_naive`."""
    flat = (tensor.flatten(0, 1).contiguous() for tensor in (streams, output, h_res, h_post))
    written: Tensor = _write(*flat)
    return written.view(streams.shape)


@torch.library.custom_op("torch_engram::hyper_read", mutates_args=())
def _read(
    streams: Tensor, weight: Tensor, strength: Tensor, static: Tensor, iterations: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return read_triton(streams, weight, strength, static, iterations, eps)


@_read.register_fake
def _(
    streams: Tensor, weight: Tensor, strength: Tensor, static: Tensor, iterations: int, eps: float
) -> tuple[Tensor, ...]:
    tokens, branches, width = streams.shape
    shapes = ((tokens, branches, branches), (tokens, branches), (tokens, static.shape[0]), (tokens,))
    return streams.new_empty(tokens, width), *(streams.new_empty(shape, dtype=torch.float32) for shape in shapes)


@torch.library.custom_op("torch_engram::hyper_read_backward", mutates_args=())
def _read_backward(
    grad: Tensor, grad_res: Tensor, grad_post: Tensor, passed: Tensor, streams: Tensor, weight: Tensor,
    strength: Tensor, static: Tensor, dynamic: Tensor, factor: Tensor, iterations: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grads, saved = (grad, grad_res, grad_post, passed), (dynamic, factor)
    return read_backward_triton(grads, streams, weight, strength, static, saved, iterations)


@_read_backward.register_fake
def _(
    grad: Tensor, grad_res: Tensor, grad_post: Tensor, passed: Tensor, streams: Tensor, weight: Tensor,
    strength: Tensor, static: Tensor, dynamic: Tensor, factor: Tensor, iterations: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(torch.empty_like(tensor) for tensor in (streams, weight, strength, static))


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        *tensors, iterations, _ = inputs
        read, h_res, h_post, dynamic, factor = _read(*inputs)
        ctx.save_for_backward(*tensors, dynamic, factor)
        ctx.iterations = iterations
        return read, h_res, h_post, tensors[0].view_as(tensors[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        contiguous = (grad.contiguous() for grad in grads)
        return *_read_backward(*contiguous, *ctx.saved_tensors, ctx.iterations), None, None


@torch.library.custom_op("torch_engram::hyper_write", mutates_args=())
def _write(streams: Tensor, output: Tensor, h_res: Tensor, h_post: Tensor) -> Tensor:
    return write_triton(streams, output, h_res, h_post)


@_write.register_fake
def _(streams: Tensor, output: Tensor, h_res: Tensor, h_post: Tensor) -> Tensor:
    return torch.empty_like(streams)


@torch.library.custom_op("torch_engram::hyper_write_backward", mutates_args=())
def _write_backward(
    grad: Tensor, streams: Tensor, output: Tensor, h_res: Tensor, h_post: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return write_backward_triton(grad, streams, output, h_res, h_post)


@_write_backward.register_fake
def _(grad: Tensor, streams: Tensor, output: Tensor, h_res: Tensor, h_post: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(tensor) for tensor in (streams, output, h_res, h_post))


def _save_write(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_write(ctx: Any, grad: Tensor) -> Any:
    return _write_backward(grad.contiguous(), *ctx.saved_tensors)


_write.register_autograd(_differentiate_write, setup_context=_save_write)
