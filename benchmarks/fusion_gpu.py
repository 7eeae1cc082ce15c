"""fusion-vs-limit, -compile, -peft: forward and backward of one Engram module, given embeddings and residual streams.

Hidden 2560, M = 4, E 1280, 16 k tokens, bf16 throughout. The limit is the time of cuBLAS for the three matrix products
plus, at the copy rate of the card, the bytes of everything else: streams, their gradient, output and its gradient, and
the keys and values that are saved for the backward, each counted once (the embeddings, their gradient and W are inputs
and outputs of the products, and in cuBLAS's time). The naive form is this library's own, all of it under
``torch.compile``. The third form is ContextAwareGating and ShortConv of engram-peft 1.2.7 and the residual addition,
as written and under ``torch.compile``; only its file layer.py is loaded (`peft_files.py`).

    python benchmarks/fusion_gpu.py [FOLDER OF THE UNPACKED engram-peft WHEEL]
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path

import torch
from peft_files import load
from record import record
from torch import Tensor, nn

from torch_engram.bench.timing import copy_rate, median, milliseconds
from torch_engram.config import EngramConfig
from torch_engram.fusion import Engram

HIDDEN, BRANCHES, SHAPE = 2560, 4, (4, 4096)
CONFIG = EngramConfig(layers=(0,), hidden=HIDDEN, vocab_size=1000, heads=8, row_dim=80, branches=BRANCHES)
TOLERANCE = 2e-2


def engram() -> Engram:
    """The module, its convolution away from its start at zero."""
    module = Engram(CONFIG)
    assert module.convolution is not None
    nn.init.normal_(module.convolution.weight, std=0.3)
    return module.cuda().bfloat16()


def naive(module: Engram) -> Callable[[Tensor, Tensor], Tensor]:
    """The module's forward in its naive form."""
    return lambda streams, embeddings: module.fuse_naive(streams, module.wkv(embeddings))[0]


def peft(folder: Path) -> tuple[nn.ModuleList, Callable[[Tensor, Tensor], Tensor]]:
    """The other library's module for the same sizes."""
    layer = load(folder, "layer.py")
    config = types.SimpleNamespace(enable_telemetry=False)
    gating = layer.ContextAwareGating(config, CONFIG.embedding_dim, HIDDEN, BRANCHES, zero_init=False)
    conv = layer.ShortConv(HIDDEN, CONFIG.conv_kernel, CONFIG.conv_dilation, hc_mult=BRANCHES, zero_init=False)
    parts = nn.ModuleList((gating, conv)).cuda().bfloat16()
    return parts, lambda streams, embeddings: streams + conv(gating(embeddings, streams))


def training(
    forward: Callable[[Tensor, Tensor], Tensor], module: nn.Module, inputs: tuple[Tensor, Tensor], grad: Tensor
) -> Callable[[], None]:
    """One forward and backward, all gradients made anew."""
    leaves = [*inputs, *module.parameters()]

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        forward(*inputs).backward(grad)

    return step


def cublas(module: Engram, embeddings: Tensor) -> list[float]:
    """Milliseconds of the three matrix products alone."""
    weight, rows = module.wkv.weight.detach(), embeddings.detach().flatten(0, 1)
    grad = torch.randn(len(rows), len(weight), device="cuda", dtype=torch.bfloat16)

    def products() -> None:
        torch.mm(rows, weight.t())
        torch.mm(grad, weight)
        torch.mm(grad.t(), rows)

    return milliseconds(products)


def check(module: Engram, inputs: tuple[Tensor, Tensor], grad: Tensor) -> None:
    """Output and gradients within tolerance of the naive form in fp32 on the same numbers: else there is nothing to
    time."""
    found = []
    keys_value = module.wkv(inputs[1][:1]).detach()
    for form, dtype in ((module.fuse_triton, torch.bfloat16), (module.fuse_naive, torch.float32)):
        module.to(dtype).zero_grad()
        given = [tensor.detach().to(dtype).requires_grad_() for tensor in (inputs[0][:1], keys_value)]
        out, _ = form(*given)
        out.backward(grad[:1].to(dtype))
        found.append([out, *(x.grad for x in [*given, *module.parameters()] if x.grad is not None)])
    module.to(torch.bfloat16).zero_grad()
    for mine, theirs in zip(*found, strict=True):
        error = (mine.float() - theirs.float()).norm() / theirs.float().norm()
        assert error < TOLERANCE, f"{tuple(mine.shape)}: {error:.3g}"


def main() -> None:
    torch.manual_seed(0)
    module = engram()
    streams = torch.randn(*SHAPE, BRANCHES, HIDDEN, device="cuda").bfloat16().requires_grad_()
    embeddings = torch.randn(*SHAPE, CONFIG.embedding_dim, device="cuda").bfloat16().requires_grad_()
    inputs, grad = (streams, embeddings), torch.randn_like(streams)
    check(module, inputs, grad)
    ours = milliseconds(training(module, module, inputs, grad))
    products, rate = cublas(module, embeddings), copy_rate()
    saved = streams.shape[0] * streams.shape[1] * (BRANCHES + 1) * HIDDEN * 2
    limit = median(products) + (4 * streams.numel() * 2 + saved) / rate

    def claim(name: str, case: str, samples: list[float]) -> None:
        record(name, case, samples, "ms", reference=limit, ratio=median(samples) / limit, device="cuda")

    claim("fusion-vs-limit", "milliseconds", ours)
    claim("fusion-vs-limit", "products-milliseconds", products)
    record("fusion-vs-limit", "copy-rate", [rate / 1e9], "TB/s", device="cuda")
    record("fusion-vs-limit", "over-limit", [x / limit for x in ours], "times", reference=1.0, device="cuda")
    others = {"fusion-vs-compile": {"compiled": torch.compile(naive(module))}}
    owner: dict[str, nn.Module] = {"fusion-vs-compile": module}
    if len(sys.argv) > 1:
        owner["fusion-vs-peft"], forward = peft(Path(sys.argv[1]))
        others["fusion-vs-peft"] = {"as-written": forward, "compiled": torch.compile(forward)}
    for name, forms in others.items():
        for case, forward in forms.items():
            theirs = milliseconds(training(forward, owner[name], inputs, grad), repeats=15)
            claim(name, f"{case}-milliseconds", theirs)
            speeds = [x / median(ours) for x in theirs]
            record(name, f"{case}-over-ours", speeds, "times", reference=1.0, device="cuda")


if __name__ == "__main__":
    main()
