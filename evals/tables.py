"""Tables on a terminal and in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, num_left: int) -> None:
    """A rich table on a terminal, aligned columns elsewhere; all but `num_left` right-aligned."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table()
        for i, head in enumerate(heads):
            table.add_column(head, justify="left" if i < num_left else "right")
        for row in rows:
            table.add_row(*row)
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in (heads, *rows):
        cells = [
            cell.ljust(width) if i < num_left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        typer.echo("  ".join(cells).rstrip())
