"""What benchmarks say: progress on stderr, tables on stdout."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Collection, Iterable, Sequence

from rich.console import Console
from rich.table import Table

WIDTH = 200  # at most; a table takes what it needs, also where stdout is a file


def say(text: str) -> None:
    """A line of progress, with the time of day."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[str] | None = None
) -> None:
    """Print one table. The columns named in `left` are of words (by default the first), the others of numbers."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column in (columns[:1] if left is None else left) else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=WIDTH).print(table)


def spread(values: Sequence[float], digits: int = 2, sign: str = "") -> str:
    """Mean and, of several values, standard deviation; nothing where there are no values. `sign`: "+" for differences.

    >>> spread([1.0, 2.0]), spread([0.5], sign="+"), spread([])
    ('1.50 ± 0.71', '+0.50', '')
    """
    if not values:
        return ""
    mean = f"{statistics.fmean(values):{sign}.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"
