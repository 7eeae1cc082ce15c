"""Hot spots of the network and its optimiser: fusion, loss, experts, hyper-connections, Muon."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from torch_engram.bench.ops import TOLERANCE, Op, Sizes, Work, Wrap, nbytes, op
from torch_engram.bench.timing import Shape
from torch_engram.config import EngramConfig
from torch_engram.fusion import Engram
from torch_engram.models.hyper import HyperConnection, read_naive, write_naive
from torch_engram.models.moe import moe_grouped, moe_naive, moe_sorted
from torch_engram.train.loss import head_loss, head_loss_naive
from torch_engram.train.muon import Muon, orthogonalise

TOP_K = 3
_LAYERS = 4
"""Whose matrices Muon's step updates."""
Function = Callable[..., Tensor]


def both_ways(function: Function, inputs: Sequence[Tensor], leaves: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """A function's result, and the gradients of ``leaves`` when the result's is ``grad``."""
    result = function(*inputs)
    return [result, *torch.autograd.grad(result, leaves, grad.to(result.dtype))]


def _network_op(
    sizes: Sizes, ours: Function, twin: Function, exact: Function, inputs: Sequence[Tensor], moved: float,
    products: Sequence[Shape], *, parameters: Sequence[Tensor] = (), exact_parameters: Sequence[Tensor] = (),
) -> Op:  # fmt: skip
    """An op of tensors, forward and backward. ``exact`` is the twin for inputs in fp32; ``parameters`` are those that
    ours and the twin read, and ``exact_parameters`` those of ``exact``, besides the inputs."""
    leaves = [*inputs, *parameters]
    with torch.no_grad():
        grad = torch.randn_like(ours(*inputs))

    def results() -> Iterator[tuple[Tensor, Tensor]]:
        precise = [tensor.detach().float().requires_grad_() for tensor in inputs]
        expected = both_ways(exact, precise, [*precise, *exact_parameters], grad)
        return zip(both_ways(ours, inputs, leaves, grad), expected, strict=True)

    return Op(
        lambda: both_ways(ours, inputs, leaves, grad),
        lambda wrap: partial(both_ways, wrap(twin), inputs, leaves, grad),
        results, moved, products, TOLERANCE[sizes.dtype], sizes.dtype,
    )  # fmt: skip


class _Fusion:
    """The Engram module, its twin, and its twin in fp32, on embeddings and streams."""

    def __init__(self, sizes: Sizes):
        config = EngramConfig(
            layers=(0,), hidden=sizes.hidden, vocab_size=sizes.vocab, heads=8, row_dim=sizes.hidden // 16,
            branches=sizes.branches,
        )  # fmt: skip
        self.module = Engram(config).to(sizes.device, sizes.dtype)
        assert self.module.convolution is not None
        nn.init.normal_(self.module.convolution.weight, std=0.3)  # away from its start at zero
        self.precise = Engram(config).to(sizes.device)
        self.precise.load_state_dict(self.module.state_dict())
        sequences = (64, sizes.tokens // 64)
        streams = torch.randn(*sequences, sizes.branches, sizes.hidden, device=sizes.device).to(sizes.dtype)
        embeddings = torch.randn(*sequences, config.embedding_dim, device=sizes.device).to(sizes.dtype)
        self.inputs = [streams.requires_grad_(), embeddings.requires_grad_()]
        n, e, wide = sizes.tokens, config.embedding_dim, (sizes.branches + 1) * sizes.hidden
        self.products: list[Shape] = [(1, n, e, wide), (1, n, wide, e), (1, wide, n, e)]
        self.keys_value = n * wide * streams.element_size()

    def twin(self, streams: Tensor, embeddings: Tensor) -> Tensor:
        return self.module.fuse_naive(streams, self.module.wkv(embeddings))[0]

    def exact(self, streams: Tensor, embeddings: Tensor) -> Tensor:
        """In fp32 but for keys and values, which have our rounding: a gate near its root's steep middle shows it."""
        keys_value = self.precise.wkv(embeddings)
        with torch.no_grad():
            rounding = self.module.wkv(self.inputs[1]) - keys_value
        return self.precise.fuse_naive(streams, keys_value + rounding)[0]


@op
def fusion_forward(sizes: Sizes) -> Op:
    """The Engram module forward. Moved: streams read and written, keys and values read; its product."""
    made = _Fusion(sizes)

    def ours() -> Tensor:
        with torch.no_grad():
            out: Tensor = made.module(*made.inputs)
            return out

    def exact() -> Tensor:
        with torch.no_grad():
            return made.exact(*(tensor.float() for tensor in made.inputs))

    moved = 2 * nbytes(made.inputs[0]) + made.keys_value
    return Op(
        ours, lambda wrap: torch.no_grad()(partial(wrap(made.twin), *made.inputs)), lambda: [(ours(), exact())],
        moved, made.products[:1], TOLERANCE[sizes.dtype], sizes.dtype,
    )  # fmt: skip


@op
def fusion(sizes: Sizes) -> Op:
    """The Engram module forward and backward. Moved: streams, output, their gradients, the keys and values that are
    kept for the backward, each once; its three products."""
    made = _Fusion(sizes)
    return _network_op(
        sizes, made.module, made.twin, made.exact, made.inputs, 4 * nbytes(made.inputs[0]) + made.keys_value,
        made.products, parameters=list(made.module.parameters()), exact_parameters=list(made.precise.parameters()),
    )  # fmt: skip


@op
def loss(sizes: Sizes) -> Op:
    """The head and its loss with their gradients. Moved: logits, read and turned into gradients; three products."""
    hidden = torch.randn(sizes.tokens, sizes.hidden, device=sizes.device).to(sizes.dtype).requires_grad_()
    weight = (torch.randn(sizes.vocab, sizes.hidden, device=sizes.device) * sizes.hidden**-0.5).requires_grad_()
    targets = torch.randint(sizes.vocab, (sizes.tokens,), device=sizes.device)

    def short(function: Function) -> Function:
        def run(hidden: Tensor, weight: Tensor) -> Tensor:
            with torch.autocast(sizes.device, torch.bfloat16, enabled=sizes.dtype == torch.bfloat16):
                return function(hidden, weight, targets)

        return run

    def exact(hidden: Tensor, weight: Tensor) -> Tensor:
        return head_loss_naive(hidden, weight, targets)

    n, d, v = sizes.tokens, sizes.hidden, sizes.vocab
    products = [(1, n, d, v), (1, n, v, d), (1, v, n, d)]
    moved = 2 * n * v * hidden.element_size()
    return _network_op(sizes, short(head_loss), short(head_loss_naive), exact, [hidden, weight], moved, products)


@op
def experts(sizes: Sizes) -> Op:
    """The expert layer after its router, forward and backward. Moved: rows in and out, shared experts' rows and all
    their gradients once; inner activations read and written, forward and backward; the six products, each as one."""
    n, d, f = sizes.tokens, sizes.hidden, 3 * sizes.hidden // 4
    number, top_k = sizes.experts, min(TOP_K, sizes.experts)
    load = torch.linspace(1, 0.6, number, device=sizes.device)  # the first are chosen most
    chosen = (torch.rand(n, number, device=sizes.device) * load).topk(top_k)[1]
    x, shared = (torch.randn(n, d, device=sizes.device).to(sizes.dtype) for _ in range(2))
    gate_up = torch.randn(number, d, 2 * f, device=sizes.device) * d**-0.5
    down = torch.randn(number, f, d, device=sizes.device) * f**-0.5
    inputs = [x, torch.rand(n, top_k, device=sizes.device), gate_up, down, shared]

    def ours(x: Tensor, *rest: Tensor) -> Tensor:
        return moe_grouped(x, chosen, *rest)

    def twin(x: Tensor, *rest: Tensor) -> Tensor:
        return moe_sorted(x, chosen, *rest)

    def exact(x: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor, shared: Tensor) -> Tensor:
        return moe_naive(x, chosen, gates, gate_up, down) + shared

    rows = top_k * n
    products = [
        (1, rows, d, 2 * f), (1, rows, f, d),
        (1, rows, d, f), (1, f, rows, d), (1, rows, 2 * f, d), (1, d, rows, 2 * f),
    ]  # fmt: skip
    moved = 5 * nbytes(x) + 8 * rows * f * x.element_size()
    inputs = [tensor.requires_grad_() for tensor in inputs]
    return _network_op(sizes, ours, twin, exact, inputs, moved, products)


@op
def hyper_connections(sizes: Sizes) -> Op:
    """Reading from branches and writing back around a layer, forward and backward. Moved: forward the streams read
    for their coefficients, mixed, and written; backward these and their gradients; the layer's rows likewise."""
    sequences = (64, sizes.tokens // 64)
    streams = torch.randn(*sequences, sizes.branches, sizes.hidden, device=sizes.device).to(sizes.dtype)
    output = torch.randn(*sequences, sizes.hidden, device=sizes.device).to(sizes.dtype)
    module = HyperConnection(sizes.branches, sizes.hidden, 0, iterations=20, eps=1e-6).to(sizes.device)
    for parameter in module.parameters():  # away from their start, where nothing depends on the streams
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 1.0)

    def ours(streams: Tensor, output: Tensor) -> Tensor:
        read, mixing = module.read(streams)
        return module.write(streams, read * output, mixing)

    def twin(streams: Tensor, output: Tensor) -> Tensor:
        read, *mixing = read_naive(streams, module.dynamic.weight, module.strength, module.static, 20, 1e-6)
        return write_naive(streams, read * output, *mixing)

    inputs, parameters = [streams.requires_grad_(), output.requires_grad_()], list(module.parameters())
    moved = 8 * nbytes(streams) + 12 * nbytes(output)
    return _network_op(sizes, ours, twin, twin, inputs, moved, (), parameters=parameters, exact_parameters=parameters)


@op
def muon(sizes: Sizes) -> Op:
    """Muon's step for four layers with experts. Moved: weights and momenta read and written, gradients read; products
    of five iterations, those of one shape as a batch."""
    d, inner = sizes.hidden, 3 * sizes.hidden // 4
    shapes = [(3 * d, d), (d, d), (2 * inner, d), (d, inner)]
    shapes_of_experts = [(sizes.experts, d, 2 * inner), (sizes.experts, inner, d)]
    weights = [
        nn.Parameter(torch.randn(shape, device=sizes.device))
        for _ in range(_LAYERS) for shape in (*shapes, *shapes_of_experts)
    ]  # fmt: skip
    grads = [torch.randn_like(weight) for weight in weights]
    for weight, grad in zip(weights, grads, strict=True):
        weight.grad = grad
    rate = 0.01
    optimizer = Muon(weights, lr=rate, momentum=0.0)  # so that a step's direction is its gradient

    def results() -> Iterator[tuple[Tensor, Tensor]]:
        start = [weight.detach().clone() for weight in weights]
        optimizer.step()
        for weight, old, grad in zip(weights, start, grads, strict=True):
            yield (weight.detach() - old) / (-rate * 0.2 * max(old.shape[-2:]) ** 0.5), orthogonalise(grad)

    def twin_work(wrap: Wrap) -> Work:
        function, momenta = wrap(orthogonalise), [torch.zeros_like(weight) for weight in weights]

        @torch.no_grad()
        def step() -> None:
            for weight, grad, momentum in zip(weights, grads, momenta, strict=True):
                momentum.lerp_(grad, 1.0)
                scale = 0.2 * max(weight.shape[-2:]) ** 0.5
                weight.add_(function(grad.lerp(momentum, 0.0)).to(weight.dtype), alpha=-rate * scale)

        return step

    counts: dict[tuple[int, int], int] = {}
    for weight in weights:
        m, n = sorted(weight.shape[-2:])
        counts[m, n] = counts.get((m, n), 0) + weight.numel() // (m * n)
    products = [
        shape
        for (m, n), count in counts.items()
        for shape in 5 * [(count, m, n, m), (count, m, m, m), (count, m, m, n)]
    ]
    moved = 5 * nbytes(*weights)
    return Op(optimizer.step, twin_work, results, moved, products, tolerance=0.1)
