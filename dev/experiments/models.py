"""Kernels of the network and the optimiser at real sizes on a GPU: equal to their twins, and how fast.

PYTHONPATH=src python dev/experiments/models.py

Each line names a case, the largest error (relative, in norm) over results and gradients, and medians in milliseconds
of kernel, twin and compiled twin, forward and forward with backward. The floor is what the device's own copy rate
would need to read every input and write every result once. The head's loss has its gradients already on the way there.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from torch_engram.models import hyper_fused, moe_fused, moe_kernels
from torch_engram.models.hyper import read_naive, write_naive
from torch_engram.models.moe import moe_naive, moe_sorted
from torch_engram.train.loss import head_loss, head_loss_naive
from torch_engram.train.muon import Muon, orthogonalise

TOKENS, BRANCHES, TOP_K, VOCAB = 1 << 16, 4, 3, 16_384
TOLERANCE = {torch.bfloat16: 0.02, torch.float32: 1e-3}
Function = Callable[..., Tensor]


def milliseconds(function: Callable[[], object], runs: int = 7) -> float:
    """The median of some runs after two others."""
    times = []
    for run in range(runs + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        if run >= 2:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def copy_rate() -> float:
    """Bytes a millisecond that a copy reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source))


def size(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def error(got: Tensor, expected: Tensor) -> float:
    got, expected = got.detach().double(), expected.detach().double()
    assert got.isfinite().all()
    return float((got - expected).norm() / expected.norm().clamp_min(1e-30))


def both_ways(function: Function, inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    result = function(*inputs)
    return [result, *torch.autograd.grad(result, inputs, grad.to(result.dtype))]


def compare(
    name: str, kernel: Function, twin: Function, exact: Function, inputs: list[Tensor],
    rate: float, floors: list[float], compiled: bool,
) -> None:  # fmt: skip
    """One line: the kernel against ``exact`` in fp32, and against ``twin`` in time. ``floors`` are bytes."""
    kind = inputs[0].dtype
    grad = torch.randn_like(kernel(*inputs))
    precise = [tensor.detach().float().requires_grad_() for tensor in inputs]
    pairs = zip(both_ways(kernel, inputs, grad), both_ways(exact, precise, grad.float()), strict=True)
    worst = max(error(*pair) for pair in pairs)
    del precise
    columns = [f"{worst:8.1e} {'ok' if worst < TOLERANCE[kind] else 'WRONG'}"]
    functions = [kernel, twin, *([torch.compile(twin, dynamic=False)] if compiled else [])]
    for way, floor in zip((lambda f: f(*inputs), lambda f: both_ways(f, inputs, grad)), floors, strict=True):
        times = " ".join(f"{milliseconds(partial(way, function)):8.3f}" for function in functions)
        columns.append(f"{times} (floor {floor / rate:.3f})")
    print(f"{name:34} {str(kind)[6:]:9}", " | ".join(columns), flush=True)
    torch.cuda.empty_cache()


def hyper(width: int, kind: torch.dtype, rate: float, compiled: bool) -> None:
    count = 2 * BRANCHES + BRANCHES**2
    streams = torch.randn(64, TOKENS // 64, BRANCHES, width, device="cuda").to(kind)
    output = torch.randn(64, TOKENS // 64, width, device="cuda").to(kind)
    weight = torch.randn(count, BRANCHES * width, device="cuda") * (BRANCHES * width) ** -0.5
    inputs = [streams, output, weight, torch.rand(3, device="cuda"), torch.randn(count, device="cuda")]
    inputs = [tensor.requires_grad_() for tensor in inputs]

    def connect(read: Callable[..., tuple[Tensor, ...]], write: Function) -> Function:
        def connected(streams: Tensor, output: Tensor, *parameters: Tensor) -> Tensor:
            got, h_res, h_post, *through = read(streams, *parameters, 20, 1e-6)
            return write(*(through or [streams]), got * output, h_res, h_post)

        return connected

    kernel, twin = connect(hyper_fused.read_fused, hyper_fused.write_fused), connect(read_naive, write_naive)
    floor = 3 * size(streams) + 5 * size(output)
    floors = [floor, floor + 5 * size(streams) + 7 * size(output)]
    compare(f"hyper-connection d={width}", kernel, twin, twin, inputs, rate, floors, compiled)


def experts(number: int, width: int, rate: float, compiled: bool) -> None:
    inner = 384
    chosen = (torch.rand(TOKENS, number, device="cuda") * torch.linspace(1, 0.6, number, device="cuda")).topk(TOP_K)[1]
    x, shared = (torch.randn(TOKENS, width, device="cuda").bfloat16() for _ in range(2))
    gate_up = torch.randn(number, width, 2 * inner, device="cuda") * width**-0.5
    down = torch.randn(number, inner, width, device="cuda") * inner**-0.5
    inputs = [x, torch.rand(TOKENS, TOP_K, device="cuda"), gate_up, down, shared]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    rows, wide = TOP_K * size(x), TOP_K * TOKENS * inner * 2
    # Products read and write their rows once as well: their time is above this where they compute.
    floor = 2 * size(x) + 4 * rows + 6 * wide + size(gate_up, down)
    compare(
        f"{number} experts d={width}",
        lambda x, *rest: moe_fused.moe_fused(x, chosen, *rest),
        lambda x, *rest: moe_sorted(x, chosen, *rest),
        lambda x, gates, up, down, shared: moe_naive(x, chosen, gates, up, down) + shared,
        inputs, rate, [floor, 3 * floor], compiled,
    )  # fmt: skip
    order, inverse, _ = moe_kernels.order_triton(chosen, number)
    assert torch.equal(order.long(), chosen.flatten().sort(stable=True).indices)
    hidden = torch.randn(TOP_K * TOKENS, 2 * inner, device="cuda").bfloat16()
    spread = moe_kernels.spread_triton(x.detach(), inverse)
    grad, gates = hidden[:, :inner].contiguous(), inputs[1].detach()
    parts: dict[str, tuple[Callable[[], object], float]] = {
        "order": (lambda: moe_kernels.order_triton(chosen, number), size(chosen, order, inverse)),
        "sort": (lambda: chosen.flatten().sort(stable=True), size(chosen, order, inverse)),
        "spread": (lambda: moe_kernels.spread_triton(x.detach(), inverse), size(x, spread)),
        "collect": (lambda: moe_kernels.collect_triton(spread, inverse, shared.detach()), size(spread, x, shared)),
        "activate": (lambda: moe_kernels.activate_triton(hidden, gates, order), size(hidden, grad)),
        "and back": (
            lambda: moe_kernels.activate_backward_triton(grad, hidden, gates, order), size(grad, hidden, hidden)
        ),
    }  # fmt: skip
    for name, (function, touched) in parts.items():
        print(f"    {name:10} {milliseconds(function):8.3f} (floor {touched / rate:.3f})", flush=True)


def head(width: int, rate: float, compiled: bool) -> None:
    hidden = torch.randn(TOKENS, width, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(VOCAB, width, device="cuda") * width**-0.5).requires_grad_()
    targets = torch.randint(VOCAB, (TOKENS,), device="cuda")

    def short(function: Function) -> Function:
        def run(hidden: Tensor, weight: Tensor) -> Tensor:
            with torch.autocast("cuda", torch.bfloat16):
                return function(hidden, weight, targets)

        return run

    logits = TOKENS * VOCAB * 2
    floors = [3 * logits + 2 * size(hidden, weight), 5 * logits + 4 * size(hidden, weight)]
    before = torch.cuda.memory_allocated()
    for name, function in (("chunks", head_loss), ("whole", head_loss_naive)):
        torch.cuda.reset_peak_memory_stats()
        short(function)(hidden, weight).backward()
        hidden.grad = weight.grad = None
        print(f"    {name}: {(torch.cuda.max_memory_allocated() - before) / 2**30:.2f} GiB", flush=True)
    exact = partial(head_loss_naive, targets=targets)
    kernel, twin = short(head_loss), short(head_loss_naive)
    compare(f"head and loss d={width}", kernel, twin, exact, [hidden, weight], rate, floors, compiled)


def muon(number: int, layers: int = 8, width: int = 512, inner: int = 384) -> None:
    shapes = [(3 * width, width), (width, width), (2 * inner, width), (width, inner)]
    shapes += [(number, width, 2 * inner), (number, inner, width)]
    weights = [torch.nn.Parameter(torch.randn(shape, device="cuda")) for _ in range(layers) for shape in shapes]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    start = [weight.detach().clone() for weight in weights]
    optimizer = Muon(weights, lr=0.01, momentum=0.0)
    optimizer.step()
    worst = 0.0
    for weight, old in zip(weights, start, strict=True):
        moved = (weight.detach() - old) / (-0.01 * 0.2 * max(old.shape[-2:]) ** 0.5)
        worst = max(worst, error(moved, orthogonalise(weight.grad)))

    def one_by_one() -> None:
        for weight in weights:
            weight.data.add_(orthogonalise(weight.grad).to(weight.dtype), alpha=-0.01)

    products = sum(5 * (4 * min(s) ** 2 * max(s) + 2 * min(s) ** 3) * n for n, s in (
        (old.numel() // (old.shape[-1] * old.shape[-2]), old.shape[-2:]) for old in start
    ))  # fmt: skip
    print(
        f"Muon, {number} experts, {layers} layers: {worst:.1e} {'ok' if worst < 0.1 else 'WRONG'} "
        f"batched {milliseconds(optimizer.step):.2f} one by one {milliseconds(one_by_one):.2f} "
        f"(800 TFLOP/s would be {products / 8e11:.2f})",
        flush=True,
    )


def main() -> None:
    torch.manual_seed(0)
    rate = copy_rate()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: copies {rate / 1e9:.2f} TB/s")
    print("case, error | forward: kernel, twin, compiled | with backward: the same")
    for width, kind, compiled in (
        (512, torch.bfloat16, True),
        (512, torch.float32, False),
        (1024, torch.bfloat16, False),
    ):
        hyper(width, kind, rate, compiled)
    experts(29, 512, rate, compiled=True)
    experts(64, 1024, rate, compiled=False)
    head(512, rate, compiled=True)
    head(1024, rate, compiled=False)
    muon(29)
    muon(64)


if __name__ == "__main__":
    main()
