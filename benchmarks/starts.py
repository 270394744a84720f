"""Does a trial's start foretell its end?

Configs of about one cost are scored at the start and trained, some repeatedly. Make the run by `mpsearch run
resnet20-cifar10-jpeg --trials 1 --out RUN`. The configs are the roundings of its descent at a budget and random moves
from them, up to a tenth cheaper. The first is trained `--repeats` times with the same seed: what these differ by is
what threads' order of summation does, and no proxy can foretell. Prints the configs, and Kendall's tau of each proxy
against both ends.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer

from benchmarks.options import RESULTS, Results
from benchmarks.printing import print_table, say, spread
from benchmarks.rows import MEASURED, Rows
from mpsearch.precision import PrecisionConfig
from mpsearch.problem import Problem, open_problem
from mpsearch.record import RunFolder
from mpsearch.search.trial import run_trial
from mpsearch.study import read_spec
from mpsearch.warmstart.descent import Descent
from mpsearch.warmstart.start import rounded, sensitivity_table
from mpsearch.workbench import Workbench

SHOWN = {
    "cost": "cost",
    "kl": "KL table",
    "start": "start, nats",
    "start_accuracy": "start, %",
    "end": "end, nats",
    "accuracy": "end, %",
}


def starts(
    run: Annotated[Path, typer.Argument(help="run folder with a descent")],
    budget: Annotated[float, typer.Option(help="relative cost of the configs, a budget of the descent")] = 0.307,
    configs: Annotated[int, typer.Option(help="number of configs", min=1)] = 12,
    repeats: Annotated[int, typer.Option(help="trainings of the first config", min=1)] = 4,
    results: Results = RESULTS / "starts.jsonl",
) -> None:
    folder = RunFolder.open(run)
    problem = open_problem(read_spec(folder))
    table = sensitivity_table("kl", problem.task, problem.graph, problem.space, folder.warmstart)
    near = rounded(Descent.load(folder.warmstart), budget, problem.space, problem.cost, 4, table)
    picked = moved(problem, near, budget, configs)
    workbench = Workbench(problem.task, problem.spec.trial, offers=problem.space.offers)
    rows = Rows(results, key=("run", "budget", "digest", "repeat", *MEASURED))
    cases = [
        {"run": folder.id, "budget": budget, "config": index, "digest": config.digest, "repeat": repeat}
        for index, config in enumerate(picked)
        for repeat in range(1 if index else repeats)
    ]
    for case in rows.missing(cases):
        config = picked[case["config"]]
        began = time.perf_counter()
        record = run_trial(problem.task, config, problem.spec.trial, workbench=workbench)
        row = {
            "cost": problem.cost(config),
            "kl": table.total(config),
            "start": record.start_divergence,
            "start_accuracy": 100 * record.curve[0][1],
            "end": record.divergence,
            "accuracy": 100 * (record.score or 0.0),
        }
        rows.append(case | row)
        say(f"config {case['config']}: {row}, {time.perf_counter() - began:.0f} s")
    show(pd.DataFrame(rows.select(cases)))


def moved(problem: Problem, near: list[PrecisionConfig], budget: float, count: int) -> list[PrecisionConfig]:
    """`near`, and up to `count` with configs that are two to eight steps from one of them."""
    random = np.random.default_rng(0)
    found = dict.fromkeys(near)
    while len(found) < count:
        config = near[random.integers(len(near))]
        for _ in range(int(random.integers(2, 9))):
            neighbours = problem.space.neighbours(config)
            config = neighbours[random.integers(len(neighbours))]
        if 0.9 * budget <= problem.cost(config) <= budget:
            found[config] = None
    return list(found)


def show(rows: pd.DataFrame) -> None:
    """The configs, and the taus."""
    print_table(
        "configs of about one cost",
        ("config", *SHOWN.values()),
        ((str(row.config), *(f"{getattr(row, name):.4g}" for name in SHOWN)) for row in rows.itertuples()),
    )
    same = rows[rows.config == 0]
    others = rows[rows.config > 0]
    for name, group in ((f"the same config, {len(same)} times", same), (f"the {len(others)} others", others)):
        print(f"{name}: {spread(list(group.end), 3)} nats, {spread(list(group.accuracy))} %")
    once = rows.groupby("config")[list(SHOWN)].mean()
    for end, better in (("end", 1), ("accuracy", -1)):
        taus = {
            SHOWN[proxy]: better * sign * once[proxy].corr(once[end], "kendall")
            for proxy, sign in (("kl", 1), ("start", 1), ("start_accuracy", -1))
        }
        print(f"Kendall's tau against {SHOWN[end]}: " + ", ".join(f"{name} {tau:+.2f}" for name, tau in taus.items()))
