"""How the commands print: consoles, tables, lines, errors, logs, JSON, CSV and durations.

Whatever a run, a study or a file name says is data, which goes through `text.visible`: `make_console`, `print_error`
and `LineFormatter` see to that.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from mpsearch.cli.text import indented, visible

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console
    from rich.table import Table


def make_console(stderr: bool = False) -> Console:
    """A console as wide as the terminal, to which strings are data; in a file or a pipe nothing is cut."""
    from mpsearch.cli.console import DataConsole

    console = DataConsole(stderr=stderr)
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


def print_table(table: Table, console: Console | None = None) -> None:
    """A table within the console's width, closer where it must be, of which no word is broken.

    Where the words do not fit even so, it is as wide as it would be.
    """
    from rich.measure import measure_renderables

    console = console or make_console()
    unbounded = console.options.update_width(10_000)
    whole = console.measure(table, options=unbounded)
    if whole.maximum > console.width:
        table.padding = (0, 0)
        whole = console.measure(table, options=unbounded)
    if whole.minimum > console.width:
        console.width = whole.maximum
    room = console.width - whole.minimum
    widths = [(c, measure_renderables(console, unbounded, [c.header, *c.cells])) for c in table.columns]
    for index, (column, words) in enumerate(sorted(widths, key=lambda width: width[1].span)):
        more = min(words.span, room // (len(widths) - index))  # those that need least are served first
        column.width = words.minimum + more
        room -= more
    console.print(table)


def print_lines(lines: Iterable[str], console: Console | None = None, style: str | None = None) -> None:
    """Lines of text as they are: not wrapped, coloured as a whole."""
    console = console or make_console()
    for line in lines:
        console.print(line, style=style, soft_wrap=True)


def print_warnings(warnings: Iterable[str], console: Console) -> None:
    """A line for each warning."""
    for warning in warnings:
        console.print("Warning:", style="yellow", end=" ")
        print_lines([warning], console)


def print_error(message: str) -> None:
    """A message of ours on stderr; lines after its first are indented."""
    print(f"mpsearch: {indented(message)}", file=sys.stderr)


class LineFormatter(logging.Formatter):
    """A format of logs of which each record begins one line; what follows of it is indented."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as it is printed or written."""
        return indented(super().format(record))


def replace_unprintable() -> None:
    """Let an output that cannot show a character (ASCII has no ±) print `?` for it, where Python would stop."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def print_json(document: Any) -> None:
    """JSON as its standard has it: ValueError for a NaN or an infinity."""
    print(json.dumps(document, indent=1, allow_nan=False))


GAIN = re.compile(r"[-+][\d.,]+ \([-+\d.,]+ to [-+\d.,]+\)( at [\d.]+x of trial \d+)?")
"""What begins with a sign and is no formula."""


def print_csv(table: pd.DataFrame) -> None:
    """A table as CSV; a text that a spreadsheet would take for a formula gets a `'` before it."""

    def cell(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        formula = value.startswith(("=", "+", "-", "@")) and not GAIN.fullmatch(value)
        return f"'{visible(value)}" if formula else visible(value)

    print(table.map(cell).rename(columns=cell).to_csv(index=False), end="")


def duration(seconds: float) -> str:
    """Seconds as people say it: `7.5 s`, `42 s`, `12 min`, `1.6 h`."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
