"""Where the fusion's product stands in FP8 on a GPU: quantisation, our product, one by TMA, cuBLAS's, and bf16.

    python dev/experiments/fp8.py

Prints medians in milliseconds by CUDA events, and each product's error as a share of its size against fp32: 16,384
tokens, 12,800 numbers of keys and value, embeddings of 1,280 and 6,144. Then the constants of the kernels, one by one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from torch_engram.fusion import fp8_kernels, fp8_linear
from torch_engram.fusion.fp8 import WIDTH, Blocks
from torch_engram.fusion.fp8_kernels import product_triton, quantise_triton

TOKENS, OUT, EMBEDDINGS = 16_384, 12_800, (1_280, 6_144)
BF16 = torch.bfloat16


@triton.jit
def _product_tma(
    a, a_scales, b, b_scales, out, m, n, height, width, inner,
    SQUARE: tl.constexpr, ROW_TILES: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """As the library's product, operands by TMA; with two halves a tile is 128x256, scaled half by half, which takes a
    quarter off what L2 must deliver. ``width`` of all tiles together is a multiple of 128 only."""
    down, across = height // 128, tl.cdiv(width, 128 * HALVES)
    group = tl.program_id(0) // (ROW_TILES * across)
    left = tl.program_id(0) % (ROW_TILES * across)
    in_group = tl.minimum(down - group * ROW_TILES, ROW_TILES)
    tile_row, tile_column = group * ROW_TILES + left % in_group, left // in_group * HALVES
    place = tl.arange(0, 128)
    row, column = tile_row * 128 + place, tile_column * 128 + place
    first = tl.zeros([128, 128], tl.float32)
    second = tl.zeros([128, 128], tl.float32)
    b_wide: tl.constexpr = 1 if SQUARE else 128
    b_tiles = width // 128
    other = tl.minimum(tile_column + 1, b_tiles - 1)  # a last half that is not there reads this one and is not stored
    for block in range(inner // 128):
        x = a.load([tile_row * 128, block * 128])
        a_scale = tl.load(a_scales + block * height + row)
        at = b_scales + block * b_tiles * b_wide
        part = tl.dot(x, b.load([tile_column * 128, block * 128]).T)
        if SQUARE:
            first += part * (a_scale * tl.load(at + tile_column))[:, None]
        else:
            first += part * a_scale[:, None] * tl.load(at + column)[None]
        if HALVES == 2:
            part = tl.dot(x, b.load([other * 128, block * 128]).T)
            if SQUARE:
                second += part * (a_scale * tl.load(at + other))[:, None]
            else:
                second += part * a_scale[:, None] * tl.load(at + other * 128 + place)[None]
    to = out + row.to(tl.int64)[:, None] * n + column[None]
    tl.store(to, first.to(out.dtype.element_ty), mask=(row < m)[:, None] & (column < n)[None])
    if HALVES == 2:
        tl.store(to + 128, second.to(out.dtype.element_ty), mask=(row < m)[:, None] & (column + 128 < n)[None])


def product_tma(a: Blocks, b: Blocks, shape: tuple[int, int], dtype: torch.dtype, halves: int, stages: int) -> Tensor:
    out = a.scales.new_empty(shape, dtype=dtype)
    (height, inner), width = a.codes.shape, len(b.codes)
    a_tiles, b_tiles = (TensorDescriptor.from_tensor(codes, [128, 128]) for codes in (a.codes, b.codes))
    _product_tma[(height // 128 * triton.cdiv(width, 128 * halves),)](
        a_tiles, a.scales, b_tiles, b.scales, out, *shape, height, width, inner,
        SQUARE=b.scales.shape[1] != width, ROW_TILES=8, HALVES=halves, num_warps=8, num_stages=stages,
    )  # fmt: skip
    return out


def cublas_forms(a: Blocks, b: Blocks) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """PyTorch's calls of cuBLAS's block-scaled product; which layout of the 128x128 scales it takes depends on it."""
    x, w = a.codes, b.codes.t()
    square = b.scales.shape[1] != len(b.codes)
    inner = len(b.scales)
    padded = F.pad(b.scales.t(), (0, -inner % 4)).contiguous().t()  # [K / 128 up to a multiple of 4, N / 128]
    if hasattr(F, "scaled_mm"):
        one, two = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
        scales = {"padded": padded, "plain": b.scales.t().contiguous().t()} if square else {"1x128": b.scales.t()}
        for name, scale in scales.items():
            yield (
                f"F.scaled_mm, {name}",
                lambda scale=scale: F.scaled_mm(
                    x, w, a.scales.t(), one, scale, two if square else one, output_dtype=BF16
                ),
            )
    layouts = {"K-major": b.scales.t().contiguous().t(), "N-major": b.scales}
    for name, scale in layouts.items():
        yield (
            f"torch._scaled_mm, {name}",
            lambda scale=scale: torch._scaled_mm(x, w, scale_a=a.scales.t(), scale_b=scale, out_dtype=BF16),
        )


def milliseconds(call: Callable[[], object], times: int = 10) -> float:
    for _ in range(3):
        call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(times)]
    for before, after in events:
        before.record()
        call()
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in events)


def show(what: str, call: Callable[[], object], flops: float = 0.0, exact: Tensor | None = None) -> None:
    """A line of the table, or why there is none."""
    try:
        result, time = call(), milliseconds(call)
    except Exception as error:
        print(
            f"  {what:<40} fails: {str(error).strip().splitlines()[0][:150] if str(error) else type(error)}", flush=True
        )
        return
    line = f"  {what:<40} {time:8.3f} ms"
    if flops:
        line += f" {flops / time / 1e9:8.0f} TFLOP/s"
    if exact is not None and isinstance(result, Tensor):
        line += f"   off by {float((result.float() - exact).norm() / exact.norm()):.5f}"
    print(line, flush=True)


def products(name: str, left: Tensor, right: Tensor, a: Blocks, b: Blocks) -> None:
    """``left`` ``[m, k]`` times ``right^T``, ``[n, k]``, in every form."""
    shape = len(left), len(right)
    flops = 2.0 * math.prod(shape) * left.shape[1]
    exact = left.float() @ right.float().t()
    print(f"{name}: {shape[0]} x {shape[1]}, summed over {left.shape[1]}")
    show("bf16, torch.mm", lambda: left @ right.t(), flops, exact)
    show("FP8, ours", lambda: product_triton(a, b, shape, BF16), flops, exact)
    for halves, stages in ((1, 3), (1, 4), (2, 3), (2, 4)):
        what = f"FP8, TMA, tile 128x{128 * halves}, {stages} stages"
        show(what, lambda h=halves, s=stages: product_tma(a, b, shape, BF16, h, s), flops, exact)
    for what, call in cublas_forms(a, b):
        show(f"FP8, {what}", call, flops, exact)


def constants(a: Blocks, b: Blocks, shape: tuple[int, int], grad: Tensor) -> None:
    print(f"Constants of the kernels, product of {shape[0]} x {shape[1]} over {a.codes.shape[1]}")
    flops = 2.0 * math.prod(shape) * a.codes.shape[1]
    for name, values in (("_PRODUCT_STAGES", (3, 4, 5)), ("_ROW_TILES", (4, 8, 16))):
        before = getattr(fp8_kernels, name)
        for value in values:
            setattr(fp8_kernels, name, value)
            show(f"product with {name} = {value}", lambda: product_triton(a, b, shape, BF16), flops)
        setattr(fp8_kernels, name, before)
    before = fp8_kernels._QUANTISE_WARPS
    for value in (8, 16):
        fp8_kernels._QUANTISE_WARPS = value
        show(f"gradient both ways with _QUANTISE_WARPS = {value}", lambda: quantise_triton(grad, columns=True))
        show(f"gradient along rows with _QUANTISE_WARPS = {value}", lambda: quantise_triton(grad))
    fp8_kernels._QUANTISE_WARPS = before


def whole(form: Callable[..., Tensor], x: Tensor, weight: Tensor, grad: Tensor) -> Callable[[], object]:
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    return lambda: torch.autograd.grad(form(*leaves), leaves, grad)


def one_width(embedding: int) -> None:
    x, weight, grad = (
        torch.randn(*shape, device="cuda").to(BF16) for shape in ((TOKENS, embedding), (OUT, embedding), (TOKENS, OUT))
    )
    weight *= embedding**-0.5
    print(f"\nE = {embedding}: quantisation")
    show("x, along rows", lambda: quantise_triton(x))
    show("x, transposed", lambda: quantise_triton(x, rows=False, columns=True))
    show("weight, 128x128", lambda: quantise_triton(weight, square=True))
    show("weight, 128x128, transposed", lambda: quantise_triton(weight, rows=False, columns=True, square=True))
    show("gradient, both ways", lambda: quantise_triton(grad, columns=True))
    show("copy of the gradient, bf16", lambda: grad.clone())
    (x_rows, x_columns), (w_rows, w_columns), (g_rows, g_columns) = (
        quantise_triton(tensor, columns=True, square=tensor is weight) for tensor in (x, weight, grad)
    )
    products("forward", x, weight, x_rows, w_rows)
    products("gradient of x", grad, weight.t().contiguous(), g_rows, w_columns)
    products("gradient of the weight", grad.t().contiguous(), x.t().contiguous(), g_columns, x_columns)
    print("all together, quantisation included")
    show("forward, F.linear in bf16", lambda: F.linear(x, weight))
    show("forward, fp8_linear", lambda: fp8_linear(x, weight))
    show("forward and backward, F.linear in bf16", whole(F.linear, x, weight, grad))
    show("forward and backward, fp8_linear", whole(fp8_linear, x, weight, grad))
    constants(x_rows, w_rows, (TOKENS, OUT), grad)


def main() -> None:
    assert WIDTH == 128
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    print(torch.cuda.get_device_name(), torch.__version__, triton.__version__, torch.version.cuda)
    for embedding in EMBEDDINGS:
        one_width(embedding)


if __name__ == "__main__":
    main()
