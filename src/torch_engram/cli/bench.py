"""``engram bench``: what kernels and training steps reach on this machine, against what it could do; lookups are in
:mod:`torch_engram.cli.bench_lookup`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from torch_engram.cli.tables import print_whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from torch_engram.bench.ops import Timed
    from torch_engram.bench.steps import StepTimes

bench = typer.Typer(
    name="bench", help="Time kernels, training steps or lookups against this machine's own limits.",
    no_args_is_help=True,
)  # fmt: skip

Against = Annotated[
    str | None, typer.Option(help="Compare with the plain PyTorch form (naive), or with it compiled (compile).")
]
Out = Annotated[Path, typer.Option(help="Folder for the CSV and the page; those of an earlier run are replaced.")]


@bench.command()
def ops(
    against: Against = None,
    only: Annotated[list[str] | None, typer.Option("--only", metavar="OP", help="Time this op; repeatable.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; by default cuda where there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16 or fp32; by default bf16 on a GPU.")] = None,
    tokens: Annotated[int | None, typer.Option(max=1 << 32, help="Tokens of a step, a multiple of 64.")] = None,
    hidden: Annotated[
        int | None, typer.Option(max=1 << 20, help="Width, a multiple of 128; a row has a sixteenth.")
    ] = None,
    branches: Annotated[int | None, typer.Option(min=2, max=8, help="Residual branches.")] = None,
    rows: Annotated[int | None, typer.Option(min=32, max=1 << 40, help="Rows of a layer's table.")] = None,
    vocab: Annotated[int | None, typer.Option(min=3, max=1 << 24, help="Token ids.")] = None,
    experts: Annotated[int | None, typer.Option(min=1, max=1 << 16, help="Experts, 3 of them a token.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed calls of each.")] = 30,
    out: Out = Path("engram-bench"),
) -> None:
    """Check every kernel against its plain form, then time it: milliseconds, its limit here, and how far it is off.

    For example: engram bench ops --against compile --only merge --only fusion
    """
    import torch
    from rich.console import Console

    from torch_engram.bench.ops import Stand, choose_ops, with_sizes
    from torch_engram.bench.page import ops_page
    from torch_engram.bench.results import require_writable, write_csv
    from torch_engram.durable import replacing
    from torch_engram.train.build import require_device

    console = Console()
    names = choose_ops(only or [])
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    require_device(device)
    sizes = with_sizes(
        device, dtype, tokens=tokens, hidden=hidden, branches=branches, rows=rows, vocab=vocab, experts=experts
    )
    require_writable(out)  # now, and not after all was timed
    with console.status("Measuring copies") as status:
        stand, timed = Stand(sizes, against, repeats), []
        for name in names:
            status.update(f"Timing {name}")
            timed.append(stand.time(name))
    print_whole(console, _ops_table(timed, against))
    console.print(f"Milliseconds. {sizes.describe()}; copies move {stand.copy_rate / 1e9:.3g} TB/s.", soft_wrap=True)
    if device == "cpu":
        console.print("Without a GPU no kernel runs: most ops are plain PyTorch in both forms.", soft_wrap=True)
    found = [(one.name, measured) for one in timed for measured in one.measurements(against)]
    write_csv(out / "ops.csv", ("op", "sizes"), (((name, sizes.describe()), one) for name, one in found), device)
    with replacing(out / "ops.html") as file:
        file.write(ops_page(timed, sizes, against).encode())
    console.print(f"Wrote {out / 'ops.csv'} and {out / 'ops.html'}.", soft_wrap=True)


@bench.command()
def step(
    recipes: Annotated[
        list[str] | None,
        typer.Argument(help="Recipes; by default small-dense, small-moe and small-engram, or tiny without a GPU."),
    ] = None,
    against: Against = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a field of every recipe; may be repeated."),
    ] = None,
    turns: Annotated[int, typer.Option(min=1, help="Samples of each.")] = 6,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of a sample.")] = 4,
    out: Out = Path("engram-bench"),
) -> None:
    """Train recipes in turns: tokens a second, share of the device's matrix-product rate, what lookups add to a step.

    For example: engram bench step small-moe small-engram --against compile --set batch_size=32
    """
    import tempfile

    import torch
    from rich.console import Console

    from torch_engram.bench.page import steps_page
    from torch_engram.bench.results import require_writable, write_csv
    from torch_engram.bench.steps import Runs, measurements, over_experts, time_steps
    from torch_engram.bench.timing import median
    from torch_engram.durable import replacing
    from torch_engram.train import change, get_recipe

    console = Console()
    on_gpu = torch.cuda.is_available()
    names = recipes or (["small-dense", "small-moe", "small-engram"] if on_gpu else ["tiny"])
    for setting in settings or []:
        if setting.partition("=")[0].strip() in ("steps", "name", "out"):
            raise ValueError(
                f"--set {setting} has no meaning here: --turns and --steps say what is timed, and --out where it goes."
            )
    chosen = [change(get_recipe(name), settings or []) for name in names]
    require_writable(out)  # now, and not after all was timed
    with tempfile.TemporaryDirectory() as folder, console.status("Reading the corpus, then training in turns"):
        timed = time_steps(Runs(folder), chosen, against, turns, steps)
    print_whole(console, _step_table(timed, against))
    rates = {one.recipe.dtype: one.flops_per_ms / 1e9 for one in timed}
    peak = ", ".join(f"{rate:,.3g} TFLOP/s in {dtype}" for dtype, rate in rates.items())
    console.print(
        f"Milliseconds. MFU is of one large matrix product, here {peak}; lookups are what they add to a "
        "step, less than nothing by chance."
    )
    for one, other, ratios in over_experts(timed):
        times = f"{median(ratios):.3f} times"
        console.print(f"A step of {one.recipe.name} takes {times} that of {other.recipe.name}.", soft_wrap=True)
    changed = " ".join(settings or [])
    rows = (((name, changed), measured) for name, measured in measurements(timed, against))
    write_csv(out / "step.csv", ("recipe", "settings"), rows, chosen[0].device)
    with replacing(out / "step.html") as file:
        file.write(steps_page(timed, changed, against).encode())
    console.print(f"Wrote {out / 'step.csv'} and {out / 'step.html'}.", soft_wrap=True)


def _ops_table(timed: Sequence[Timed], against: str | None) -> Table:
    from torch_engram.bench.page import OPS_HEAD, op_cells

    return text_table(["op", *OPS_HEAD, *([against, "speed-up"] if against else [])], [
        [one.name, *op_cells(one, against)] for one in timed
    ])  # fmt: skip


def _step_table(timed: Sequence[StepTimes], against: str | None) -> Table:
    from torch_engram.bench.page import STEP_HEAD, step_cells

    return text_table(["recipe", *STEP_HEAD, *([against, "speed-up"] if against else [])], [
        [one.recipe.name, *step_cells(one, against)] for one in timed
    ])  # fmt: skip


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table for the console: names on the left, the rest on the right."""
    from rich import box
    from rich.table import Column, Table

    columns = (Column(name, justify="right", no_wrap=True) for name in head[1:])
    table = Table(Column(head[0], no_wrap=True), *columns, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    return table
