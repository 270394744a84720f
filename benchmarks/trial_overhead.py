"""What share of worker time do trials spend on training and scoring?

Runs a study whose trials last about `--seconds` each under Ray, `--concurrency` at a time, and prints one table. On a
machine that is busy with other things steps are better given than guessed by their time (`--seconds 0`). Worker
time is the time from the start of the first trial on a worker to the end of its last one, so it holds whatever lies
between trials (ask, record, storage, Ray) but not Ray's own start, which is printed beside it.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.options import RESULTS, Results, Set, Study
from benchmarks.printing import print_table
from benchmarks.rows import MEASURED, Row, Rows
from mpsearch.problem import open_problem
from mpsearch.record import RunFolder
from mpsearch.search.run import estimate_trial_s, run_study
from mpsearch.study import load_study


def trial_overhead(
    study: Study = "digits",
    set_: Set = None,
    trials: Annotated[int, typer.Option(help="number of trials", min=1)] = 12,
    concurrency: Annotated[int, typer.Option(help="trials at a time", min=1)] = 2,
    seconds: Annotated[float, typer.Option(help="seconds that a trial should take; 0: the study's own steps")] = 10,
    results: Results = RESULTS / "trial_overhead.jsonl",
) -> None:
    rows = Rows(results, key=("study", "set", "trials", "concurrency", "seconds", *MEASURED))
    case = {"study": study, "set": set_ or [], "trials": trials, "concurrency": concurrency, "seconds": seconds}
    for missing in rows.missing([case]):
        rows.append(missing | measure(study, set_ or [], trials, concurrency, seconds))
    for row in rows.select([case]):
        show(row)


def measure(study: str, set_: list[str], trials: int, concurrency: int, seconds: float) -> Row:
    """Run the study; seconds by what they were spent on, of all workers together."""
    overrides = [*set_, f"search.trials={trials}", f"search.concurrency={concurrency}"]
    spec = load_study(study, overrides)
    if seconds:
        probe = open_problem(load_study(study, [*overrides, "trial.steps=100"]))
        steps = max(1, round(100 * seconds / estimate_trial_s(probe)))
        spec = load_study(study, [*overrides, f"trial.steps={steps}"])

    with tempfile.TemporaryDirectory() as temporary:
        began = time.time()
        run_study(spec, Path(temporary) / "run")
        ended = time.time()
        records = RunFolder.open(Path(temporary) / "run").records()
    first = min(record.started_s for record in records)
    ends = sorted(record.started_s + record.wall.total_s for record in records)
    # At the end a worker may idle while another finishes its last trial: that is not overhead between trials.
    idle_s = sum(ends[-1] - end for end in ends[-concurrency:])
    return {
        "steps": spec.trial.lengths[0],
        "records": len(records),
        "train_s": sum(record.wall.train_s for record in records),
        "evaluate_s": sum(record.wall.evaluate_s for record in records),
        "prepare_s": sum(record.wall.prepare_s for record in records),
        "worker_s": (ends[-1] - first) * concurrency - idle_s,
        "before_s": first - began,
        "after_s": ended - ends[-1],
    }


def show(row: Row) -> None:
    """The table of one run."""
    inside = row["train_s"] + row["evaluate_s"]
    parts = {
        "train": row["train_s"],
        "evaluate": row["evaluate_s"],
        "prepare": row["prepare_s"],
        "between trials": row["worker_s"] - inside - row["prepare_s"],
        "training or evaluation": inside,
    }
    print_table(
        f"{row['study']}: {row['records']} trials of {row['steps']} steps, {row['concurrency']} at a time",
        ("", "seconds", "share of worker time"),
        [
            *((name, f"{seconds:.1f}", f"{seconds / row['worker_s']:.1%}") for name, seconds in parts.items()),
            ("before the first trial (task, Ray)", f"{row['before_s']:.1f}", ""),
            ("after the last trial", f"{row['after_s']:.1f}", ""),
        ],
    )
