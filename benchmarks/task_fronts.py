"""The fronts of the studies on other tasks than classification of images, as docs/results/tasks.md shows them.

`mpsearch run NAME --out RUN` makes a run; this keeps the fronts of the runs that are named as rows, a row a line of
what `mpsearch front RUN` prints, and what exports to RUN-native and RUN-onnx were verified. Rows of an earlier run of a
study are replaced, those of other studies stay.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.digits_front import COLUMNS, front_rows
from benchmarks.options import RESULTS, Results
from benchmarks.rows import Rows
from mpsearch.record import RunFolder


def task_fronts(
    runs: Annotated[list[Path], typer.Argument(help="folders of runs that have ended")],
    commit: Annotated[str | None, typer.Option(help="of the code that made the runs (default: this one)")] = None,
    results: Results = RESULTS / "task_fronts.jsonl",
) -> None:
    for run in runs:
        metric = RunFolder.open(run).metric
        facts = {
            "metric": metric.name,
            "direction": metric.direction,
            "unit": metric.difference_unit,
            "verified": verified(run),
        }
        rows = [row | facts | ({"commit": commit} if commit else {}) for row in front_rows(run)]
        stored = Rows(results, key=("study", "trial"))
        others = [row for row in stored.read() if row["study"] != rows[0]["study"]]
        results.unlink(missing_ok=True)
        stored.append_bare(*others)
        stored.append(*rows)
        print(rows[0]["study"])
        for row in rows:
            print("  ".join(f"{row[name]!s}" for name in COLUMNS))


def verified(run: Path) -> dict[str, Any]:
    """Of each target that the knee was exported to beside its run: in how many samples its runtime answers alike."""
    alike = {}
    for to in ("native", "onnx"):
        for manifest in sorted(run.parent.glob(f"{run.name}-{to}/*.json")):
            said = json.loads(manifest.read_text(encoding="utf-8")).get("verified", {})
            if "runtime" in said:
                alike[to] = f"{said['same_answers']} of {said['samples']}"
    return alike
