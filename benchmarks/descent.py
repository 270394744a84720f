"""What the descent learns: how far tensors come apart, whether marginals become equal, and whether it repeats.

One descent a seed, kept under `--work` and not run again; or, with `--runs`, the descents that runs began with.
`imbalance` is the deviation of log2 of the marginals (loss that a bit saves per unit of cost) over the tensors that are
not at an end of their range: 0 at an optimum. `rank correlation`: Spearman's, of the learned bits of all tensors
between two descents, the mean of all pairs.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from scipy.stats import spearmanr

from benchmarks.options import RESULTS, Results, Seeds, Set, Study, Threads, several
from benchmarks.printing import print_table, say
from benchmarks.rows import MEASURED, Row, Rows, provenance
from mpsearch.cache import content_key
from mpsearch.problem import Problem, open_problem
from mpsearch.record import RunFolder
from mpsearch.study import load_study, read_spec
from mpsearch.warmstart.descent import Descent, descend
from mpsearch.workbench import Workbench


def descent(
    study: Study = "resnet20-cifar10-jpeg",
    set_: Set = None,
    seeds: Seeds = (0, 1, 2),
    steps: Annotated[int, typer.Option(help="training steps of a descent", min=1)] = 600,
    budgets: Annotated[Sequence[float], several(float, "relative costs at which bits are read off")] = (
        0.55,
        0.4,
        0.3,
        0.23,
    ),
    spread: Annotated[
        float, typer.Option(help="update size: bits per step per doubling of the marginal; 0 moves all tensors alike")
    ] = 0.02,
    runs: Annotated[Sequence[Path], several(Path, "run folders: look at the descents they began with instead")] = (),
    work: Annotated[Path, typer.Option(help="folder that keeps the descents")] = Path(".descent"),
    threads: Threads = 2,
    results: Results = RESULTS / "descent.jsonl",
) -> None:
    torch.set_num_threads(threads)
    folders = [RunFolder.open(run) for run in runs]
    settings = {"study": study, "set": set_ or [], "seeds": list(seeds), "steps": steps}
    settings |= {"budgets": list(budgets), "spread": spread, "threads": threads}
    case = {"runs": [folder.id for folder in folders]} if folders else settings
    rows = Rows(results, key=(*case, *MEASURED))
    for missing in rows.missing([case]):
        if folders:
            problem = open_problem(read_spec(folders[0]))
            descents = {str(folder.path): Descent.load(folder.warmstart) for folder in folders}
        else:
            problem = open_problem(load_study(study, set_ or ()))
            descents = {}
            for seed in seeds:
                key = content_key(settings | {"seeds": seed}, *(provenance()[name] for name in MEASURED))
                descents[f"seed {seed}"] = descended(problem, seed, steps, budgets, spread, work / key)
        rows.append(missing | {"name": problem.spec.name} | summary(problem, descents))
    for row in rows.select([case]):
        show(row)


def descended(
    problem: Problem, seed: int, steps: int, budgets: Sequence[float], spread: float, folder: Path
) -> Descent:
    """The descent of a seed, made unless it is there."""
    if not (folder / "descent.json").exists():
        say(f"seed {seed}")
        torch.manual_seed(seed)
        workbench = Workbench(problem.task, problem.spec.trial.of_one_length(steps))
        descend(workbench, problem.space, problem.cost, list(budgets), steps, seed, spread=spread).save(folder)
    return Descent.load(folder)


def summary(problem: Problem, descents: dict[str, Descent]) -> Row:
    """Bits, imbalance, loss and agreement of the descents at each budget; seconds and imbalance of each descent."""
    free = {slot.name: slot.tensor for slot in problem.space.free}
    every = list(descents.values())
    snapshots = []
    for index, budget in enumerate(snapshot.budget for snapshot in every[0].snapshots):
        taken = [one.snapshots[index] for one in every]
        pairs = itertools.combinations(([s.bits[name] for name in free] for s in taken), 2)
        correlations = [float(spearmanr(a, b).statistic) for a, b in pairs]
        bits = {
            tensor: [s.bits[name] for s in taken for name, kind in free.items() if kind == tensor]
            for tensor in ("weight", "activation")
        }
        snapshots.append(
            {
                "budget": budget,
                **{f"{tensor}_bits": [min(b), statistics.fmean(b), max(b)] for tensor, b in bits.items()},
                "imbalance": statistics.fmean(s.imbalance for s in taken),
                "loss": statistics.fmean(s.loss for s in taken),
                "rank_correlation": statistics.fmean(correlations) if correlations else None,
            }
        )
    ends = {
        name: {
            "seconds": one.seconds,
            "early_imbalance": statistics.fmean(step["imbalance"] for step in one.log[5:15]),
            "late_imbalance": statistics.fmean(step["imbalance"] for step in one.log[-10:]),
        }
        for name, one in descents.items()
    }
    return {"log_steps": every[0].log[-1]["step"] + 1, "snapshots": snapshots, "descents": ends}


def show(row: Row) -> None:
    """The table of one set of descents."""
    columns = ("budget", "weight bits, least-mean-most", "activation bits", "imbalance", "loss", "rank correlation")
    print_table(
        f"{row['name']}, {row['log_steps']} steps, {len(row['descents'])} descents",
        columns,
        (
            (
                f"{at['budget']:g}",
                *(" ".join(f"{bits:.1f}" for bits in at[f"{tensor}_bits"]) for tensor in ("weight", "activation")),
                f"{at['imbalance']:.2f}",
                f"{at['loss']:.3f}",
                "" if at["rank_correlation"] is None else f"{at['rank_correlation']:.2f}",
            )
            for at in row["snapshots"]
        ),
        left=(),
    )
    for name, end in row["descents"].items():
        change = f"imbalance {end['early_imbalance']:.2f} early, {end['late_imbalance']:.2f} at the end"
        print(f"{name}: {end['seconds']:.0f} s; {change}")
