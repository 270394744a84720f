"""Does a trial's start foretell its end? Configs of about one cost, scored at the start and trained, some repeatedly.

    mpsearch run resnet20-cifar10-jpeg --trials 1 --out RUN
    python benchmarks/starts.py RUN [--budget 0.307] [--configs 12] [--repeats 4]

The configs are the roundings of the run's descent at a budget and random moves from them, up to a tenth cheaper. The
first is trained `--repeats` times with the same seed: what these differ by is what threads' order of summation does,
and no proxy can foretell. Prints the configs, and Kendall's tau of each proxy against both ends.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from mpsearch.precision import PrecisionConfig
from mpsearch.problem import Problem, open_problem
from mpsearch.record import RunFolder
from mpsearch.search.trial import run_trial
from mpsearch.study import read_spec
from mpsearch.warmstart.descent import Descent
from mpsearch.warmstart.start import StartWeights, rounded, sensitivity_table
from mpsearch.workbench import Workbench

SHOWN = {
    "cost": "cost",
    "kl": "KL table",
    "start": "start, nats",
    "start_accuracy": "start, %",
    "end": "end, nats",
    "accuracy": "end, %",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--budget", type=float, default=0.307)
    parser.add_argument("--configs", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=4)
    options = parser.parse_args()
    folder = RunFolder.open(options.run)
    problem = open_problem(read_spec(folder))
    table = sensitivity_table("kl", problem.task, problem.graph, problem.space, folder.warmstart)
    near = rounded(Descent.load(folder.warmstart), options.budget, problem.space, problem.cost, 4, table)
    configs = moved(problem, near, options.budget, options.configs)
    weights = StartWeights(folder.warmstart).at(options.budget)
    workbench = Workbench(problem.task, problem.spec.trial, offers=problem.space.offers)
    rows = []
    for config in [*configs[:1] * (options.repeats - 1), *configs]:
        began = time.perf_counter()
        record = run_trial(problem.task, config, problem.spec.trial, weights, workbench=workbench)
        rows.append(
            {
                "config": configs.index(config),
                "cost": problem.cost(config),
                "kl": table.total(config),
                "start": record.start_divergence,
                "start_accuracy": 100 * record.curve[0][1],
                "end": record.divergence,
                "accuracy": 100 * (record.accuracy or 0.0),
            }
        )
        print(rows[-1], f"{time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    show(pd.DataFrame(rows))
    print("command: python " + " ".join(sys.argv))


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
    table = Table(title="configs of about one cost")
    for column in ("config", *SHOWN.values()):
        table.add_column(column, justify="right")
    for row in rows.itertuples():
        table.add_row(str(row.config), *(f"{getattr(row, name):.4g}" for name in SHOWN))
    Console(width=120).print(table)
    same = rows[rows.config == 0]
    others = rows[rows.config > 0]
    for name, group in ((f"the same config, {len(same)} times", same), (f"the {len(others)} others", others)):
        ends = f"{group.end.mean():.3f} ± {group.end.std():.3f} nats"
        print(f"{name}: {ends}, {group.accuracy.mean():.2f} ± {group.accuracy.std():.2f} %")
    once = rows.groupby("config").mean()
    for end, better in (("end", 1), ("accuracy", -1)):
        taus = {
            SHOWN[proxy]: better * sign * once[proxy].corr(once[end], "kendall")
            for proxy, sign in (("kl", 1), ("start", 1), ("start_accuracy", -1))
        }
        print(f"Kendall's tau against {SHOWN[end]}: " + ", ".join(f"{name} {tau:+.2f}" for name, tau in taus.items()))


if __name__ == "__main__":
    main()
