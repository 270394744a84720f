"""How much the memory of a worker grows over hundreds of trials: by the peaks that their records have.

Runs a study of short trials in this process, which is their one worker and drives them too, and prints its largest
resident size after some of them. What the first trials take (libraries, the data, caches of torch) is no growth: it is
counted from trial `--settled` on.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.options import RESULTS, Results, Set, Study
from benchmarks.printing import print_table
from benchmarks.rows import MEASURED, Row, Rows
from mpsearch.record import RunFolder
from mpsearch.search.run import run_study
from mpsearch.study import load_study

LINES = 10  # of the table


def worker_memory(
    study: Study = "digits",
    set_: Set = None,
    trials: Annotated[int, typer.Option(help="number of trials", min=2)] = 500,
    steps: Annotated[int, typer.Option(help="training steps of a trial", min=0)] = 10,
    settled: Annotated[int, typer.Option(help="trials after which growth is counted", min=1)] = 50,
    results: Results = RESULTS / "worker_memory.jsonl",
) -> None:
    rows = Rows(results, key=("study", "set", "trials", "steps", "settled", *MEASURED))
    case = {"study": study, "set": set_ or [], "trials": trials, "steps": steps, "settled": settled}
    for missing in rows.missing([case]):
        rows.append(missing | measure(study, set_ or [], trials, steps, settled))
    for row in rows.select([case]):
        show(row)


def measure(study: str, set_: list[str], trials: int, steps: int, settled: int) -> Row:
    """Run the study; MiB of its worker as trials have ended."""
    overrides = [f"search.trials={trials}", f"trial.steps={steps}", "engine.address=none"]
    with tempfile.TemporaryDirectory() as temporary:
        run_study(load_study(study, [*overrides, *set_]), Path(temporary) / "run")
        records = RunFolder.open(Path(temporary) / "run").records()
    records = sorted((r for r in records if r.peak_memory_bytes), key=lambda record: record.started_s)
    peaks = [record.peak_memory_bytes / 2**20 for record in records]
    every = max(1, len(peaks) // LINES)
    return {
        "ended": len(peaks),
        "failed": trials - len(peaks),
        "peak_mib": [{"trials": at, "mib": peaks[at - 1]} for at in range(every, len(peaks) + 1, every)],
        "grown_mib": peaks[-1] - peaks[min(settled, len(peaks)) - 1],
    }


def show(row: Row) -> None:
    """The table of one run."""
    print_table(
        f"{row['study']}: one worker, trials of {row['steps']} steps",
        ("trials", "peak memory, MiB"),
        ((f"{at['trials']:,}", f"{at['mib']:.0f}") for at in row["peak_mib"]),
        left=(),
    )
    print(f"grown by {row['grown_mib']:.1f} MiB from trial {row['settled']} to {row['ended']}; failed: {row['failed']}")
