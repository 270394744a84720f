"""The front of a run of the digits study, as the README shows it, and its test scores, as the tutorial does.

`mpsearch run digits --out RUN` (or `make demo`) makes the run and `mpsearch finalize RUN` its test scores. This keeps
both as rows: a row a line of what `mpsearch front RUN` prints, with the seconds that the whole run took, and one a line
of what finalizing printed. Rows of an earlier run are replaced.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

import mpsearch
from benchmarks.options import RESULTS, Results
from benchmarks.rows import Rows
from mpsearch.facts import read_facts
from mpsearch.record import RunFolder
from mpsearch.search.finals import final_rows, final_table

COLUMNS = ("trial", "origin", "score", "cost", "weight_bits", "activation_bits", "place", "over_uniform")


def digits_front(
    run: Annotated[Path, typer.Argument(help="folder of a run that has ended")],
    results: Results = RESULTS / "digits_front.jsonl",
    finals: Annotated[Path, typer.Option(help="file of the rows of test scores")] = RESULTS / "digits_finals.jsonl",
) -> None:
    rows = front_rows(run)
    results.unlink(missing_ok=True)
    Rows(results, key=("trial",)).append(*rows)
    finals.unlink(missing_ok=True)
    Rows(finals, key=("trial",)).append(*finals_of(RunFolder.open(run)))
    for row in rows:
        print("  ".join(f"{row[name]!s}" for name in COLUMNS))


def finals_of(folder: RunFolder) -> list[dict[str, str]]:
    """A row for each line of what `mpsearch finalize` prints; none of a run that has not been finalized."""
    scored = final_rows(folder.records(), folder.finals(), read_facts(folder).spec.final.pick, folder.metric)
    return final_table(scored, folder.metric)


def front_rows(run: Path) -> list[dict[str, Any]]:
    """A row for each line of what `mpsearch front` prints, with the seconds that the whole run took."""
    folder = RunFolder.open(run)
    front = mpsearch.front(run)
    created_s = json.loads((run / "run.json").read_text(encoding="utf-8"))["created_s"]
    ended_s = max(record.started_s + record.wall.total_s for record in folder.records())
    about = {"study": mpsearch.status(run).study, "trials": len(folder.records()), "run_s": round(ended_s - created_s)}
    return [
        about
        | {
            "trial": int(row["number"]),
            "origin": row["origin"],
            "score": folder.metric.show(row["score"]),
            "cost": round(row["relative_cost"], 4),
            "weight_bits": round(row["weight_bits"], 1),
            "activation_bits": round(row["activation_bits"], 1),
            "place": "knee" if row["knee"] else "" if row["on_front"] else "dominated",
            "over_uniform": row["gain"],
        }
        for row in front.table.to_dict("records")
    ]
