"""What stopping dominated trials saves, and whether it costs a point of the front: a replay of studies without it.

Make the runs by `mpsearch run STUDY --set search.stop_dominated=false --out RUN`. Prints one table. `lost`: trials of
the front that would have been stopped; there should be none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.options import RESULTS, Results
from benchmarks.printing import print_table
from benchmarks.rows import Rows
from mpsearch.errors import RunError
from mpsearch.record import RunFolder
from mpsearch.search.front import pareto_front
from mpsearch.search.stopping import replay


def stopping(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run folders, made without stopping")],
    results: Results = RESULTS / "stopping.jsonl",
) -> None:
    rows = Rows(results, key=("run", "trials", "commit"))
    folders = [RunFolder.open(run) for run in runs]
    cases = [{"run": folder.id, "trials": len(folder.records())} for folder in folders]
    for folder, case in zip(folders, cases, strict=True):
        for missing in rows.missing([case]):
            records = folder.records()
            if any(record.state == "stopped" for record in records):
                raise RunError(
                    f"{folder.path} was run with stopping: run it again with --set search.stop_dominated=false"
                )
            found = replay(records, folder.metric)
            rows.append(
                missing
                | {
                    "folder": str(folder.path),
                    "stopped": len(found.stopped),
                    "total_s": found.total_s,
                    "saved_s": found.saved_s,
                    "front": len(pareto_front(records, folder.metric)),
                    "lost": list(found.lost),
                }
            )
    columns = ("run", "trials", "stopped", "trial time, s", "saved, s", "saved", "front", "lost")
    print_table(
        "stopping, replayed",
        columns,
        (
            (
                row["folder"],
                str(row["trials"]),
                str(row["stopped"]),
                f"{row['total_s']:.0f}",
                f"{row['saved_s']:.0f}",
                f"{row['saved_s'] / row['total_s']:.0%}",
                str(row["front"]),
                ", ".join(map(str, row["lost"])) or "none",
            )
            for row in rows.select(cases)
        ),
    )
