"""The fronts of the studies on other tasks than classification of images, as docs/results/tasks.md shows them.

`mpsearch run NAME --out RUN` makes a run and `mpsearch finalize RUN` its test scores; this keeps the fronts of the runs
that are named as rows, a row a line of what `mpsearch front RUN` prints, what exports to RUN-native and RUN-onnx were
verified, and the lines that finalizing printed. Rows of an earlier run of a study are replaced, those of other studies
stay.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.digits_front import COLUMNS, finals_of, front_rows
from benchmarks.options import RESULTS, Results
from benchmarks.rows import Row, Rows
from mpsearch.record import RunFolder


def task_fronts(
    runs: Annotated[list[Path], typer.Argument(help="folders of runs that have ended")],
    commit: Annotated[str | None, typer.Option(help="of the code that made the runs (default: this one)")] = None,
    results: Results = RESULTS / "task_fronts.jsonl",
    finals: Annotated[Path, typer.Option(help="file of the rows of test scores")] = RESULTS / "task_finals.jsonl",
) -> None:
    for run in runs:
        folder = RunFolder.open(run)
        metric = folder.metric
        facts = {
            "metric": metric.name,
            "direction": metric.direction,
            "unit": metric.difference_unit,
            "verified": verified(run),
        }
        made_by = {"commit": commit} if commit else {}
        rows = [row | facts | made_by for row in front_rows(run)]
        study = rows[0]["study"]
        replace_rows(results, study, rows)
        if scored := finals_of(folder):
            replace_rows(finals, study, [{"study": study} | row | made_by for row in scored])
        print(study)
        for row in rows:
            print("  ".join(f"{row[name]!s}" for name in COLUMNS))


def replace_rows(path: Path, study: str, rows: Sequence[Row]) -> None:
    """Put the rows of a study where its earlier ones were, behind those of the others."""
    stored = Rows(path, key=("study", "trial"))
    others = [row for row in stored.read() if row["study"] != study]
    path.unlink(missing_ok=True)
    stored.append_bare(*others)
    stored.append(*rows)


def verified(run: Path) -> dict[str, Any]:
    """Of each target that the knee was exported to beside its run: in how many samples its runtime answers alike."""
    alike = {}
    for to in ("native", "onnx"):
        for manifest in sorted(run.parent.glob(f"{run.name}-{to}/*.json")):
            said = json.loads(manifest.read_text(encoding="utf-8")).get("verified", {})
            if "runtime" in said:
                alike[to] = f"{said['same_answers']} of {said['samples']}"
    return alike
