"""Tables that are printed lose no digit and break no name, however narrow the terminal."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table

from torch_engram.cli.tables import print_whole


def test_every_cell_is_whole() -> None:
    table, out = Table("name", "number"), io.StringIO()
    table.add_row("layers.1.engram.embed.weight", "1,234,567")
    console = Console(file=out, width=20)
    print_whole(console, table)
    assert "layers.1.engram.embed.weight" in out.getvalue() and "1,234,567" in out.getvalue()
    assert console.width == 20
