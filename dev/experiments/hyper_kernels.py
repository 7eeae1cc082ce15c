"""Milliseconds of each kernel of a hyper-connection on a GPU, forward and backward, beside one pass over its streams.

PYTHONPATH=src python dev/experiments/hyper_kernels.py
"""

from __future__ import annotations

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from torch_engram.bench.timing import copy_rate
from torch_engram.models.hyper import HyperConnection

SIZES = [(65_536, 4, 1024), (16_384, 4, 2560), (16_384, 2, 2560)]
"""Tokens, branches and hidden."""
REPEATS = 10


def measure(tokens: int, branches: int, hidden: int, rate: float) -> None:
    torch.manual_seed(0)
    sequences, bf16 = (64, tokens // 64), {"device": "cuda", "dtype": torch.bfloat16}
    streams = torch.randn(*sequences, branches, hidden, **bf16).requires_grad_()
    output = torch.randn(*sequences, hidden, **bf16).requires_grad_()
    module = HyperConnection(branches, hidden, 0, iterations=20, eps=1e-6).cuda()
    for parameter in module.parameters():  # away from their start, where nothing depends on the streams
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 1.0)
    grad = torch.randn_like(streams)

    def run() -> None:
        read, mixing = module.read(streams)
        written = module.write(streams, read * output, mixing)
        torch.autograd.grad(written, [streams, output, *module.parameters()], grad)

    for _ in range(3):
        run()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(REPEATS):
            run()
        torch.cuda.synchronize()
    one_pass = streams.numel() * streams.element_size() / rate
    print(f"{tokens} tokens, {branches} branches, hidden {hidden}: streams read or written once {one_pass:.3f} ms")
    for event in sorted(profiler.key_averages(), key=lambda event: -event.device_time_total)[:12]:
        print(f"  {event.device_time_total / 1e3 / REPEATS:.3f} ms  {event.key[:90]}")


def main() -> None:
    rate = copy_rate()
    print(f"copies move {rate / 1e9:.2f} TB/s")
    for sizes in SIZES:
        measure(*sizes, rate)


if __name__ == "__main__":
    main()
