"""What stopping dominated trials saves, and whether it costs a point of the front: a replay of studies without it.

    mpsearch run STUDY --set search.stop_dominated=false --out RUN
    python benchmarks/stopping.py RUN [RUN ...]

Prints one table. `lost`: trials of the front that would have been stopped; there should be none.
"""

from __future__ import annotations

import argparse
import sys

from rich.console import Console
from rich.table import Table

from mpsearch.record import RunFolder
from mpsearch.search.front import pareto_front
from mpsearch.search.stopping import replay


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    options = parser.parse_args()
    table = Table(title="stopping, replayed")
    for column in ("run", "trials", "stopped", "trial time, s", "saved, s", "saved", "front", "lost"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for run in options.runs:
        records = RunFolder.open(run).records()
        if any(record.state == "stopped" for record in records):
            sys.exit(f"{run} was run with stopping: run it again with --set search.stop_dominated=false")
        found = replay(records)
        table.add_row(
            run,
            str(len(records)),
            str(len(found.stopped)),
            f"{found.total_s:.0f}",
            f"{found.saved_s:.0f}",
            f"{found.saved_s / found.total_s:.0%}",
            str(len(pareto_front(records))),
            ", ".join(map(str, found.lost)) or "none",
        )
    Console(width=140).print(table)
    print("command: python " + " ".join(sys.argv))


if __name__ == "__main__":
    main()
