"""What the descent learns: how far tensors come apart, whether marginals become equal, and whether it repeats.

    python benchmarks/descent.py [--study resnet20-cifar10-jpeg] [--seeds 0,1,2] [--steps 600]
        [--budgets 0.55,0.4,0.3,0.23] [--work .descent] [--threads 2]

One descent a seed, kept under `--work` and not run again. `imbalance` is the deviation of log2 of the marginals (loss
that a bit saves per unit of cost) over the tensors that are not at an end of their range: 0 at an optimum. `rank
correlation`: Spearman's, of the learned bits of all tensors between two seeds, the mean of all pairs.
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

from mpsearch.search.run import open_problem
from mpsearch.search.trial import Workbench
from mpsearch.study import load_study
from mpsearch.warmstart.descent import Descent, descend


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", default="resnet20-cifar10-jpeg")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--budgets", default="0.55,0.4,0.3,0.23")
    parser.add_argument("--work", type=Path, default=Path(".descent"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    spec = load_study(options.study)
    problem = open_problem(spec)
    budgets = [float(budget) for budget in options.budgets.split(",")]
    descents, whole = [], {}
    for seed in map(int, options.seeds.split(",")):
        folder = options.work / f"{options.study}-{options.steps}-{seed}"
        if not (folder / "descent.json").exists():
            print(f"seed {seed}, {time.strftime('%H:%M:%S')}", file=sys.stderr, flush=True)
            began = time.perf_counter()
            torch.manual_seed(seed)
            bench = Workbench(problem.task, spec.trial.model_copy(update={"steps": options.steps}))
            descent = descend(bench, problem.space, problem.cost, budgets, options.steps, seed)
            descent.save(folder)
            whole[seed] = time.perf_counter() - began
        descents.append(Descent.load(folder))

    console = Console(width=140)
    free = {slot.name: slot.tensor for slot in problem.space.free}
    table = Table(title=f"{options.study}, {options.steps} steps, {len(descents)} seeds, {options.threads} threads")
    columns = ("budget", "weight bits, least-mean-most", "activation bits", "imbalance", "loss", "rank correlation")
    for column in columns:
        table.add_column(column, justify="right")
    for index, budget in enumerate(snapshot.budget for snapshot in descents[0].snapshots):
        taken = [descent.snapshots[index] for descent in descents]
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
    for seed, descent in zip(options.seeds.split(","), descents, strict=True):
        first = statistics.fmean(row["imbalance"] for row in descent.log[5:15])
        last = statistics.fmean(row["imbalance"] for row in descent.log[-10:])
        took = f", with set-up {whole[int(seed)]:.0f} s" if int(seed) in whole else ""
        console.print(f"seed {seed}: {descent.seconds:.0f} s{took}; imbalance {first:.2f} early, {last:.2f} at the end")
    print("command: python " + " ".join(sys.argv))


def _range(values: list[float]) -> str:
    return f"{min(values):.1f} {np.mean(values):.1f} {max(values):.1f}"


if __name__ == "__main__":
    main()
