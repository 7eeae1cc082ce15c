"""The fusion's one matrix product in FP8: a linear map whose three products multiply E4M3 numbers, summed in fp32.

    y = x W^T            blocks of 1x128 along E for x, of 128x128 for W
    dx = dy W            blocks of 1x128 along N for dy, the same 128x128 for W
    dW = dy^T x          blocks of 1x128 along tokens for both

A block is divided by its scale, the largest size in it over 448 (the largest E4M3 number), and rounded to E4M3, to
nearest and ties to even. Every product has scales of its own along what it sums over; the weight itself stays as it is.
Shapes: n tokens, E and N the widths of what goes in and comes out. All are padded with zeros to multiples of 128.
Source: arXiv 2412.19437, section 3.3; that Engram's projections are one such product: arXiv 2601.07372.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_engram.kernels import use_kernels

WIDTH = 128
"""Numbers of a block along what is summed over."""
LARGEST = 448.0
"""The largest E4M3 number."""
SMALLEST_MAXIMUM = 2.0**-100
"""A block's largest size counts as at least this, so that a block of zeros has a scale, and 448 over it is finite."""


class Blocks(NamedTuple):
    """A matrix ``[r, k]`` in E4M3 with a scale a block, padded with zeros to multiples of 128; k is summed over."""

    codes: Tensor
    """``float8_e4m3fn [r, k]``."""
    scales: Tensor
    """fp32 ``[k / 128, r]``, or ``[k / 128, r / 128]`` for blocks of 128x128."""


class _Quantise(Protocol):
    def __call__(self, x: Tensor, *, rows: bool = ..., columns: bool = ..., square: bool = ...) -> list[Blocks]: ...


class _Multiply(Protocol):
    def __call__(self, a: Blocks, b: Blocks, shape: Sequence[int], dtype: torch.dtype) -> Tensor: ...


def require_fp8(device: torch.device | str) -> None:
    """Raises ``ValueError`` for a GPU without FP8 products; any other device computes the same in fp32."""
    device = torch.device(device)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        major, minor = torch.cuda.get_device_capability(device)
        raise ValueError(
            f"FP8 needs a GPU of compute capability 8.9 or more, and {torch.cuda.get_device_name(device)} has "
            f"{major}.{minor}: set fp8=false."
        )


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As ``F.linear``, its product and those of its gradients in FP8: ``[..., N]`` of the type that it would give.

    ``x`` is ``[..., E]``, ``weight`` ``[N, E]`` of any floating type, ``bias`` ``[N]``. On a GPU by kernels,
    elsewhere by the same formula in fp32; cuBLAS on Hopper rounds every product to bf16 first. A number that is not
    finite makes all sums over its block not finite. Raises ``ValueError`` for widths that differ.
    """
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x has {x.shape[-1]} numbers a token, and the weight takes {weight.shape[1]}: "
            f"give [..., {weight.shape[1]}]."
        )
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    y: Tensor = _linear(x.reshape(-1, x.shape[-1]).contiguous(), weight.contiguous())
    y = y.view(*x.shape[:-1], len(weight))
    return y if bias is None else y + bias.to(y.dtype)


def quantise_naive(x: Tensor, *, rows: bool = True, columns: bool = False, square: bool = False) -> list[Blocks]:
    """``x`` in blocks along its rows, and then ``x^T`` in blocks along those of ``x^T``, as asked; 128x128 if
    ``square``, else 1x128."""
    return [_quantise(matrix.float(), WIDTH if square else 1) for matrix in [x] * rows + [x.t()] * columns]


def _quantise(x: Tensor, height: int) -> Blocks:
    x = F.pad(x, (0, -x.shape[1] % WIDTH, 0, -x.shape[0] % WIDTH))
    tiles = x.reshape(x.shape[0] // height, height, x.shape[1] // WIDTH, WIDTH)
    largest = tiles.abs().amax((1, 3)).clamp_min(SMALLEST_MAXIMUM)
    most = torch.full_like(largest, LARGEST)  # a tensor: by a Python number PyTorch divides less exactly
    codes = (tiles * (most / largest)[:, None, :, None]).to(torch.float8_e4m3fn)
    return Blocks(codes.reshape(x.shape), (largest / most).t().contiguous())


def dequantise(blocks: Blocks) -> Tensor:
    """What the blocks stand for, fp32 ``[r, k]``, padding included."""
    codes, scales = blocks
    scales = scales.t().repeat_interleave(WIDTH, 1)
    return codes.float() * scales.repeat_interleave(codes.shape[0] // max(1, scales.shape[0]), 0)


def product_naive(a: Blocks, b: Blocks, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The product a b^T without its padding, ``shape`` ``[r, r']`` of ``dtype``; summed in fp32."""
    return (dequantise(a) @ dequantise(b).t())[: shape[0], : shape[1]].to(dtype).contiguous()


def product_cublas(a: Blocks, b: Blocks, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """As :func:`product_naive` on a Hopper GPU, rounded to bf16 on the way to ``dtype``; ``a`` has blocks of 1x128."""
    if not shape[0] or not shape[1]:
        return a.scales.new_empty(shape, dtype=dtype)
    lines, squares = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
    scales, kind = b.scales.t(), lines
    if b.scales.shape[1] != len(b.codes):  # a column of these scales is read by fours
        scales, kind = F.pad(scales, (0, -scales.shape[1] % 4)).contiguous().t(), squares
    product = F.scaled_mm(a.codes, b.codes.t(), a.scales.t(), lines, scales, kind, output_dtype=torch.bfloat16)  # type: ignore[attr-defined]
    return product[: shape[0], : shape[1]].to(dtype).contiguous()


def _forms(x: Tensor) -> tuple[_Quantise, _Multiply]:
    if not use_kernels(x):
        return quantise_naive, product_naive
    from torch_engram.fusion.fp8_kernels import product_triton, quantise_triton

    return quantise_triton, product_cublas if _has_cublas(x.device) else product_triton


@functools.cache
def _has_cublas(device: torch.device) -> bool:
    """These blocks are known to cuBLAS on Hopper alone, from CUDA 12.9 on."""
    if device.type != "cuda":
        return False
    toolkit = tuple(int(part) for part in (torch.version.cuda or "0").split(".")[:2])
    return torch.cuda.get_device_capability(device) == (9, 0) and toolkit >= (12, 9)


@torch.library.custom_op("torch_engram::fp8_linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor) -> Tensor:
    quantise, product = _forms(x)
    (a,), (b,) = quantise(x), quantise(weight, square=True)
    return product(a, b, (len(x), len(weight)), x.dtype)


@_linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("torch_engram::fp8_linear_backward", mutates_args=())
def _linear_backward(grad: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool) -> tuple[Tensor, Tensor]:
    """The gradients that are wanted; in place of the other one an empty tensor."""
    quantise, product = _forms(x)
    grads = quantise(grad, rows=of_x, columns=of_weight)
    grad_x, grad_weight = x.new_empty(0), weight.new_empty(0)
    if of_x:
        grad_x = product(grads[0], quantise(weight, rows=False, columns=True, square=True)[0], x.shape, x.dtype)
    if of_weight:
        across = quantise(x, rows=False, columns=True)[0]
        grad_weight = product(grads[-1], across, weight.shape, weight.dtype)
    return grad_x, grad_weight


@_linear_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if of_x else 0), weight.new_empty(weight.shape if of_weight else 0)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    wanted = ctx.needs_input_grad
    grads = _linear_backward(grad.contiguous(), *ctx.saved_tensors, *wanted)
    of_x, of_weight = (found if want else None for found, want in zip(grads, wanted, strict=True))
    return of_x, of_weight


_linear.register_autograd(_differentiate, setup_context=_save)
