"""Tables on a terminal, or in a pipe: every cell whole, for a number without its digits says nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_ANY_WIDTH = 10_000


def print_whole(console: Console, table: Table) -> None:
    """Print ``table`` as wide as it must be; a narrower terminal wraps its lines."""
    before, console.width = console.width, _ANY_WIDTH
    console.width = max(before, console.measure(table).maximum)
    console.print(table, crop=False)
    console.width = before
