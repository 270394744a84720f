"""What the descent learns: how far tensors come apart, whether marginals become equal, and whether it repeats.

    python benchmarks/descent.py [--study resnet20-cifar10-jpeg] [--seeds 0,1,2] [--steps 600]
        [--budgets 0.55,0.4,0.3,0.23] [--spread 0.02] [--work .descent] [--threads 2]
    python benchmarks/descent.py --runs RUN [RUN ...]

One descent a seed, kept under `--work` and not run again; or the descents that runs began with. `imbalance` is the
deviation of log2 of the marginals (loss that a bit saves per unit of cost) over the tensors that are not at an end of
their range: 0 at an optimum. `rank correlation`: Spearman's, of the learned bits of all tensors between two descents,
the mean of all pairs.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from mpsearch.problem import Problem, open_problem
from mpsearch.record import RunFolder
from mpsearch.study import load_study, read_spec
from mpsearch.warmstart.descent import Descent, descend
from mpsearch.workbench import Workbench


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", default="resnet20-cifar10-jpeg")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--budgets", default="0.55,0.4,0.3,0.23")
    parser.add_argument("--spread", type=float, default=0.02)
    parser.add_argument("--runs", type=Path, nargs="*", default=[])
    parser.add_argument("--work", type=Path, default=Path(".descent"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.runs:
        folders = [RunFolder.open(run) for run in options.runs]
        problem = open_problem(read_spec(folders[0]))
        descents = {str(run): Descent.load(folder.warmstart) for run, folder in zip(options.runs, folders, strict=True)}
    else:
        problem = open_problem(load_study(options.study))
        descents = {f"seed {seed}": descended(problem, int(seed), options) for seed in options.seeds.split(",")}

    console = Console(width=140)
    free = {slot.name: slot.tensor for slot in problem.space.free}
    every = list(descents.values())
    steps = every[0].log[-1]["step"] + 1
    table = Table(title=f"{problem.spec.name}, {steps} steps, {len(every)} descents")
    columns = ("budget", "weight bits, least-mean-most", "activation bits", "imbalance", "loss", "rank correlation")
    for column in columns:
        table.add_column(column, justify="right")
    for index, budget in enumerate(snapshot.budget for snapshot in every[0].snapshots):
        taken = [descent.snapshots[index] for descent in every]
        pairs = itertools.combinations(([s.bits[name] for name in free] for s in taken), 2)
        correlations = [float(spearmanr(a, b).statistic) for a, b in pairs]
        table.add_row(
            f"{budget:g}",
            *(
                _range([s.bits[name] for s in taken for name, kind in free.items() if kind == tensor])
                for tensor in ("weight", "activation")
            ),
            f"{statistics.fmean(s.imbalance for s in taken):.2f}",
            f"{statistics.fmean(s.loss for s in taken):.3f}",
            f"{statistics.fmean(correlations):.2f}" if correlations else "",
        )
    console.print(table)
    for name, descent in descents.items():
        first = statistics.fmean(row["imbalance"] for row in descent.log[5:15])
        last = statistics.fmean(row["imbalance"] for row in descent.log[-10:])
        console.print(f"{name}: {descent.seconds:.0f} s; imbalance {first:.2f} early, {last:.2f} at the end")
    print("command: python " + " ".join(sys.argv))


def descended(problem: Problem, seed: int, options: argparse.Namespace) -> Descent:
    """The descent of a seed, made unless it is there."""
    folder = options.work / f"{options.study}-{options.steps}-{seed}"
    if not (folder / "descent.json").exists():
        print(f"seed {seed}, {time.strftime('%H:%M:%S')}", file=sys.stderr, flush=True)
        torch.manual_seed(seed)
        workbench = Workbench(problem.task, problem.spec.trial.model_copy(update={"steps": options.steps}))
        budgets = [float(budget) for budget in options.budgets.split(",")]
        made = descend(workbench, problem.space, problem.cost, budgets, options.steps, seed, spread=options.spread)
        made.save(folder)
    return Descent.load(folder)


def _range(values: list[float]) -> str:
    return f"{min(values):.1f} {np.mean(values):.1f} {max(values):.1f}"


if __name__ == "__main__":
    main()
