"""How the commands print: consoles, tables, JSON and durations."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def make_console(stderr: bool = False) -> Console:
    """A console as wide as the terminal; in a file or a pipe nothing is cut."""
    from rich.console import Console

    console = Console(stderr=stderr)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 140
    return console


def make_table(*columns: str) -> Table:
    """A table without a frame, of which nothing is cut; a column whose name starts with > is aligned right."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in columns:
        justify: Literal["left", "right"] = "right" if column.startswith(">") else "left"
        table.add_column(column.removeprefix(">"), justify=justify, overflow="fold")
    return table


def print_lines(lines: Iterable[str], console: Console | None = None, style: str | None = None) -> None:
    """Lines of text as they are: not wrapped, coloured as a whole."""
    console = console or make_console()
    for line in lines:
        console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)


def replace_unprintable() -> None:
    """Let an output that cannot show a character (ASCII has no ±) print `?` for it, where Python would stop."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def print_json(document: Any) -> None:
    """JSON as its standard has it: ValueError for a NaN or an infinity."""
    print(json.dumps(document, indent=1, allow_nan=False))


def duration(seconds: float) -> str:
    """Seconds as people say it: `7.5 s`, `42 s`, `12 min`, `1.6 h`."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
