"""Milliseconds of each kernel of the fusion on a GPU, for some shapes of its tiles, beside what its bytes alone take.

    python dev/experiments/fusion_kernels.py

Sizes are those of ``benchmarks/fusion_gpu.py``, without the matrix product. Every shape is first held against the naive
form in fp32, on two sequences of many documents. Bytes are counted once each, at the rate at which the card copies.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from torch_engram.bench.timing import copy_rate
from torch_engram.config import EngramConfig
from torch_engram.fusion import Engram, fused

HIDDEN, BRANCHES, SHAPE, REPEATS = 2560, 4, (4, 4096), 12
WALKS = {  # steps, rows times branches, channels, warps and stages of the kernels that walk
    "a warp": (128, 4, 64, 1, 3),
    "a warp that loads less far ahead": (128, 4, 64, 1, 2),
    "longer rows": (164, 4, 64, 1, 3),
    "rows twice as long": (256, 4, 64, 1, 3),
    "a warp of half as many numbers": (128, 4, 32, 1, 3),
}
MEASURES = [(8, 512, 8), (8, 512, 4), (8, 256, 8), (16, 256, 16), (4, 512, 4)]
"""Tokens, channels and warps of ``_measure``, one for each of the walks."""
NUMBERS = 2 * SHAPE[0] * SHAPE[1] * HIDDEN
"""Bytes of one branch of the streams."""
TOLERANCE = 5e-3
"""Where a score is near zero its root is so steep that the order of a sum shows, up to 1e-3 of a gradient's size."""
BYTES = {  # in branches: what each kernel reads and writes
    "_measure": 2 * BRANCHES + 1,  # streams, keys, value
    "_add": 2 * BRANCHES + 1,  # streams, value, output
    "_value_gradients": BRANCHES + 2,  # gradient of the output, value and its gradient
    "_key_gradients": 5 * BRANCHES,  # streams, keys, the gradients of both and of the output
    "_add_through_norm": 3,  # value, its gradient twice
}


def engram(fusion: str) -> Engram:
    torch.manual_seed(0)
    config = EngramConfig(
        layers=(0,), hidden=HIDDEN, vocab_size=1000, heads=8, row_dim=80, branches=BRANCHES, fusion=fusion
    )
    module = Engram(config).cuda()
    assert module.convolution is not None
    for parameter in (*module.convolution.parameters(), module.query_weight, module.key_weight):
        nn.init.normal_(parameter, mean=0.3, std=0.3)
    return module


def results(module: Engram, form: str, inputs: list[Tensor], doc_start: Tensor | None) -> list[Tensor]:
    """The streams, and gradients of inputs and parameters."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    module.zero_grad()
    out, _ = getattr(module, form)(*inputs, None, doc_start)
    out.backward(torch.ones_like(out).cumsum(1).remainder(7) - 3)
    return [out.detach(), *(x.grad for x in [*inputs, *module.parameters()] if x.grad is not None)]


def worst(module: Engram) -> float:
    """The largest error of the kernels in fp32, as a share of the size of the twin's result."""
    tokens = (2, 500)
    doc_start = torch.rand(tokens, device="cuda") < 0.1
    widths = ((BRANCHES, HIDDEN), ((BRANCHES + 1) * HIDDEN,))
    inputs = [torch.randn(*tokens, *width, device="cuda") for width in widths]
    found, expected = (results(module, form, inputs, doc_start) for form in ("fuse_triton", "fuse_naive"))
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


def times(module: Engram, inputs: list[Tensor]) -> dict[str, float]:
    """Milliseconds a call of each kernel of forward and backward."""
    for _ in range(3):
        results(module, "fuse_triton", inputs, None)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(REPEATS):
            results(module, "fuse_triton", inputs, None)
        torch.cuda.synchronize()
    spent: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        spent[event.key] += event.device_time_total / 1e3 / REPEATS
    return spent


def main() -> None:
    rate = copy_rate()
    print(f"copies move {rate / 1e9:.2f} TB/s")
    module = engram("paper").bfloat16()
    widths = ((BRANCHES, HIDDEN), ((BRANCHES + 1) * HIDDEN,))
    inputs = [torch.randn(*SHAPE, *width, device="cuda", dtype=torch.bfloat16) for width in widths]
    for (name, walk), measure in zip(WALKS.items(), MEASURES, strict=True):
        fused._STEPS, fused._WALKERS, fused._WALK_CHUNK, fused._WALK_WARPS, fused._STAGES = walk
        fused._ROWS, fused._ROW_CHUNK, fused._ROW_WARPS = measure
        error = worst(engram("paper"))
        print(f"\n{name} {walk}, measure {measure}: {'OK' if error < TOLERANCE else 'WRONG'}, {error:.1e} off")
        spent = times(module, inputs)
        for kernel, sizes in BYTES.items():
            print(f"  {kernel:20} {spent[kernel]:.3f} ms, bytes {sizes * NUMBERS / rate:.3f}")
        print(f"  {'_gate_slopes':20} {spent['_gate_slopes']:.3f} ms")
        sums = sum(time for kernel, time in spent.items() if "reduce_kernel" in kernel)
        print(f"  {'sums of parts':20} {sums:.3f} ms")


if __name__ == "__main__":
    main()
