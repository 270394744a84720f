"""What share of worker time do trials spend on training and scoring?

    python benchmarks/trial_overhead.py [--study digits] [--trials 12] [--concurrency 2] [--seconds 10]

Runs a study whose trials last about `--seconds` each under Ray, `--concurrency` at a time, and prints one table. Worker
time is the time from the start of the first trial on a worker to the end of its last one, so it holds whatever lies
between trials (ask, record, storage, Ray) but not Ray's own start, which is printed beside it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mpsearch.problem import open_problem
from mpsearch.record import RunFolder
from mpsearch.search.run import estimate_trial_s, run_study
from mpsearch.study import load_study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", default="digits")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--concurrency", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10)
    options = parser.parse_args()

    wanted = [f"search.trials={options.trials}", f"search.concurrency={options.concurrency}"]
    probe = open_problem(load_study(options.study, [*wanted, "trial.steps=100"]))
    step_s = estimate_trial_s(probe) / 100
    steps = max(1, round(options.seconds / step_s))
    spec = load_study(options.study, [*wanted, f"trial.steps={steps}"])

    with tempfile.TemporaryDirectory() as temporary:
        began = time.time()
        run_study(spec, Path(temporary) / "run")
        ended = time.time()
        records = RunFolder.open(Path(temporary) / "run").records()
    first = min(record.started_s for record in records)
    last = max(record.started_s + record.wall.total_s for record in records)
    worker_s = (last - first) * options.concurrency
    # At the end a worker may idle while another finishes its last trial: that is not overhead between trials.
    starts = sorted(record.started_s for record in records)
    idle_s = sum(last - end for end in sorted(r.started_s + r.wall.total_s for r in records)[-options.concurrency :])
    prepare, train, evaluate = (
        sum(getattr(record.wall, part) for record in records) for part in ("prepare_s", "train_s", "evaluate_s")
    )
    table = Table(title=f"{options.study}: {len(records)} trials of {steps} steps, {options.concurrency} at a time")
    table.add_column("")
    table.add_column("seconds", justify="right")
    table.add_column("share of worker time", justify="right")
    for name, seconds in (
        ("train", train),
        ("evaluate", evaluate),
        ("prepare", prepare),
        ("between trials", worker_s - idle_s - train - evaluate - prepare),
    ):
        table.add_row(name, f"{seconds:.1f}", f"{seconds / (worker_s - idle_s):.1%}")
    table.add_row(
        "training or evaluation", f"{train + evaluate:.1f}", f"{(train + evaluate) / (worker_s - idle_s):.1%}"
    )
    table.add_row("before the first trial (task, Ray)", f"{starts[0] - began:.1f}", "")
    table.add_row("after the last trial", f"{ended - last:.1f}", "")
    Console(width=120).print(table)
    print("command: python " + " ".join(sys.argv))


if __name__ == "__main__":
    main()
