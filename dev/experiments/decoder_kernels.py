"""The decoder's smaller kernels and its choices of attention at real sizes on a GPU: how exact, and how fast.

    PYTHONPATH=src python dev/experiments/decoder_kernels.py [rotary] [router] [attention]

Medians in milliseconds, forward and forward with backward. The floor is what the device's own copy rate would need
to read every input and write every result once; errors are relative, in norm, the worst over results and gradients.
"""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel, varlen
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from torch_engram.bench import timing
from torch_engram.bench.ops import error
from torch_engram.bench.ops import nbytes as size
from torch_engram.models import rotary_kernels, router_kernels
from torch_engram.models.attention import _SMALL_TILES
from torch_engram.models.layout import find_places, lay_out
from torch_engram.models.rotary import turn_naive
from torch_engram.models.rotary_fused import turn_fused
from torch_engram.models.router import choose_naive
from torch_engram.models.router_fused import choose_fused

DEVICE = torch.device("cuda")
Function = Callable[..., Sequence[Tensor]]


def milliseconds(function: Callable[[], object]) -> float:
    return timing.median(timing.milliseconds(function, repeats=7, warm_up=2))


def both_ways(function: Function, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """Results, of which the last have ``grads``, and the gradients of ``inputs``."""
    results = function(*inputs)
    return [*results, *torch.autograd.grad(results[-len(grads) :], inputs, grads)]


def time_both(function: Function, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> tuple[float, float]:
    return milliseconds(lambda: function(*inputs)), milliseconds(lambda: both_ways(function, inputs, grads))


def show(what: str, times: tuple[float, float], rest: str = "") -> None:
    print(f"  {what:<40} {times[0]:8.3f} {times[1]:8.3f}   {rest}", flush=True)


def compare(kernel: Function, twin: Function, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """A line for the kernel and one for the compiled twin, each with its error against the twin in fp32."""
    exact = [tensor.detach().float().requires_grad_() for tensor in inputs]
    expected = both_ways(twin, exact, [grad.float() for grad in grads])
    del exact
    for name, function in (("kernel", kernel), ("compiled twin", torch.compile(twin, dynamic=False))):
        got = both_ways(function, inputs, grads)
        worst = max(error(a, b) for a, b in zip(got, expected, strict=True) if a.is_floating_point())
        del got
        show(name, time_both(function, inputs, grads), f"error {worst:.1e}")


def try_constants(module: Any, names: Sequence[str], run: Callable[[], tuple[float, float]]) -> None:
    before = {name: getattr(module, name) for name in names}
    for value in (512, 1024, 2048, 4096):
        for name in names:
            setattr(module, name, value)
        show(f"kernel with {', '.join(names)} = {value}", run())
    for name, value in before.items():
        setattr(module, name, value)


def rotary(batch: int, tokens: int, heads: int, width: int, rate: float) -> None:
    print(f"norm and rotation, {batch} x {tokens} tokens, {heads} heads of {width}")
    qkv = torch.randn(batch, tokens, 3 * heads * width, device=DEVICE).bfloat16().requires_grad_()
    scales = [(1 + 0.1 * torch.randn(width, device=DEVICE)).requires_grad_() for _ in range(2)]
    angle = torch.randn(batch, tokens, 1, width // 2, device=DEVICE)  # packed documents: each sequence has its own
    angles, inputs = (angle.cos(), angle.sin()), [qkv, *scales]

    def close(function: Callable[..., Sequence[Tensor]]) -> Function:
        def run(qkv: Tensor, query_norm: Tensor, key_norm: Tensor) -> Sequence[Tensor]:
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=qkv.dtype == torch.bfloat16):
                return function(qkv, query_norm, key_norm, *angles, heads, 1e-6)

        return run

    # The way forward leaves values alone; both read or write what else there is of qkv.
    forward = 4 / 3 * size(qkv) + size(*angles)
    show("bytes alone", (forward / rate, (forward + 8 / 3 * size(qkv) + size(*angles)) / rate))
    grads = [torch.randn_like(result) for result in turn_fused(*inputs, *angles, heads, 1e-6)]
    compare(close(turn_fused), close(turn_naive), inputs, grads)
    names = ["_FORWARD_NUMBERS", "_BACKWARD_NUMBERS"]
    try_constants(rotary_kernels, names, lambda: time_both(close(turn_fused), inputs, grads))


def router(tokens: int, experts: int, top_k: int, rate: float) -> None:
    print(f"{top_k} of {experts} experts, {tokens} tokens")
    inputs = [torch.randn(tokens, experts, device=DEVICE).requires_grad_()]
    bias, grads = 0.01 * torch.randn(experts, device=DEVICE), [torch.randn(tokens, top_k, device=DEVICE)]
    kernel, twin = (partial(function, bias=bias, top_k=top_k) for function in (choose_fused, choose_naive))
    chosen, gates = kernel(*inputs)
    forward = size(inputs[0], chosen, gates, gates)
    show("bytes alone", (forward / rate, 2 * forward / rate))
    compare(kernel, twin, inputs, grads)
    same = (chosen == twin(*inputs)[0]).float().mean().item()
    print(f"  chosen alike: {same:.6f}")
    try_constants(router_kernels, ["_NUMBERS"], lambda: time_both(kernel, inputs, grads))


def packed(batch: int, tokens: int) -> Tensor:
    """Bool ``[B, T]``, True where a document begins: lengths are log-normal around 300, at least 64."""
    lengths = torch.randn(batch, tokens // 64).exp().mul(300).long().clamp(min=64)
    starts = torch.zeros(batch, tokens + 1, dtype=torch.bool)
    starts.scatter_(1, lengths.cumsum(1).clamp(max=tokens), True)
    starts[:, 0] = True
    return starts[:, :-1].to(DEVICE)


def attend(name: str, function: Function, inputs: Sequence[Tensor], grad: Tensor, expected: list[Tensor]) -> None:
    """One line, or the error that it raised. The first that runs is what the others are compared with."""
    began = time.perf_counter()
    try:
        got = both_ways(function, inputs, [grad])
        worst = max((error(a, b) for a, b in zip(got, expected, strict=False)), default=0.0)
        expected.extend([] if expected else got)
        times = time_both(function, inputs, [grad])
        show(name, times, f"error {worst:.1e} ({time.perf_counter() - began:.0f} s to try)")
    except Exception as problem:
        print(f"  {name:<40} {type(problem).__name__}: {str(problem).strip()[:200].partition(chr(10))[0]}", flush=True)
        torch._dynamo.reset()


def flex(mask: BlockMask, **options: Any) -> Function:
    compiled = torch.compile(flex_attention, dynamic=False)

    def run(query: Tensor, key: Tensor, qkv: Tensor) -> Sequence[Tensor]:
        heads = [x.transpose(1, 2) for x in (query, key, values(qkv))]
        return (compiled(*heads, block_mask=mask, kernel_options=options or None).transpose(1, 2),)

    return run


def values(qkv: Tensor) -> Tensor:
    """As in the decoder a view of what the matrix product wrote."""
    return qkv.unflatten(2, (3, -1, 64))[:, :, 2]


def by_documents(ends: Tensor, longest: int, cudnn: bool = False) -> Function:
    """Attention to each document as a sequence of its own; ``ends`` int32 from 0, documents of no length included."""
    modern = "window_size" in inspect.signature(varlen.varlen_attn).parameters
    causal: dict[str, Any] = dict(window_size=(-1, 0)) if modern else dict(is_causal=True)

    def run(query: Tensor, key: Tensor, qkv: Tensor) -> Sequence[Tensor]:
        rows = [x.flatten(0, 1) for x in (query, key, values(qkv))]
        if cudnn:
            out = torch.ops.torch_attn._varlen_attn(*rows, ends, ends, longest, longest, True)[0]
        else:
            out = varlen.varlen_attn(*rows, ends, ends, longest, longest, **causal)
        return (out.view(query.shape),)

    return run


def attention(batch: int = 128, tokens: int = 1024, heads: int = 8) -> None:
    print(f"attention within documents, {batch} x {tokens} tokens, {heads} heads of 64, bf16")
    print(f"  varlen_attn{inspect.signature(varlen.varlen_attn)}")
    query, key = (torch.randn(batch, tokens, heads, 64, device=DEVICE).bfloat16() for _ in range(2))
    qkv = torch.randn(batch, tokens, 3 * heads * 64, device=DEVICE).bfloat16()
    inputs, grad = [tensor.requires_grad_() for tensor in (query, key, qkv)], torch.randn_like(query)
    starts, expected = packed(batch, tokens), []
    line = partial(attend, inputs=inputs, grad=grad, expected=expected)

    def whole(query: Tensor, key: Tensor, qkv: Tensor) -> Sequence[Tensor]:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            rows = [x.transpose(1, 2) for x in (query, key, values(qkv))]
            return (F.scaled_dot_product_attention(*rows, is_causal=True).transpose(1, 2),)

    present = lay_out(
        find_places(torch.zeros_like(starts, dtype=torch.int64), starts, None, None), tokens, 64, 1e4, torch.bfloat16
    )
    assert present.block_mask is not None
    line("flex, as the decoder has it", flex(present.block_mask, **_SMALL_TILES))

    flat = starts.flatten().nonzero().flatten()
    total = torch.tensor([starts.numel()], device=DEVICE)
    exact = torch.cat((flat, total)).int()
    padded = torch.cat((exact, total.int().expand(2048 + 1 - len(exact))))
    print(f"  {len(flat)} documents, the longest {int(exact.diff().max())}")
    line("varlen", by_documents(exact, tokens))
    line("varlen, padded to 2,048 documents", by_documents(padded, tokens))
    line("cuDNN, whole sequences (other results)", whole)

    for name, options in OPTIONS.items():
        line(f"flex, {name}", flex(present.block_mask, **_SMALL_TILES, **options))
    for forward, backward in TILES:
        name = f"flex {'x'.join(map(str, forward))} back {'x'.join(map(str, backward))}"
        line(name, flex(present.block_mask, **tiles(forward, backward)))

    # Last, for an error in this one may leave the device unusable.
    varlen._should_use_cudnn = lambda index: True
    line("varlen by cuDNN", by_documents(exact, tokens, cudnn=True))


OPTIONS: dict[str, dict[str, Any]] = {
    "every row sees itself": dict(ROWS_GUARANTEED_SAFE=True),
    "loads by the tensor copy engine": dict(USE_TMA=True),
    "queries scaled first": dict(PRESCALE_QK=True),
}
# M, N, warps, stages of the way forward, and M1, N1, M2, N2, warps, stages of the way back.
TILES = [
    ((64, 64, 4, 2), (32, 64, 64, 32, 4, 2)),
    ((128, 64, 4, 3), (64, 64, 64, 64, 4, 2)),
    ((128, 64, 8, 3), (64, 64, 64, 64, 8, 2)),
    ((64, 128, 4, 2), (32, 128, 128, 32, 4, 2)),
    ((64, 32, 4, 3), (64, 128, 128, 64, 8, 2)),
]


def tiles(forward: Sequence[int], backward: Sequence[int]) -> dict[str, int]:
    ahead = dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), forward, strict=True))
    names = ("BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2", "num_warps", "num_stages")
    back = dict(zip(names, backward, strict=True))
    return {f"fwd_{name}": value for name, value in ahead.items()} | {f"bwd_{n}": value for n, value in back.items()}


def main() -> None:
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64
    rate = timing.copy_rate()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: copies {rate / 1e9:.2f} TB/s")
    wanted = sys.argv[1:] or ["rotary", "router", "attention"]
    if "rotary" in wanted:
        rotary(128, 1024, 8, 64, rate)
        rotary(16, 4096, 10, 128, rate)
    if "router" in wanted:
        router(131_072, 29, 3, rate)
        router(131_072, 56, 3, rate)
    if "attention" in wanted:
        attention()


if __name__ == "__main__":
    main()
