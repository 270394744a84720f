"""Uniform configs after a short fine-tune: the baseline that every search is measured against.

A config `w8a8:0` trains for no step at all. The first and the last layer have what the study's space gives them. Prints
one table: validation accuracy, its difference from the float model, seconds. Never touches the test split.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Annotated

import torch
import typer

from benchmarks.options import RESULTS, Results, Seeds, Set, Study, Threads, several
from benchmarks.printing import print_table, say, spread
from benchmarks.rows import MEASURED, Rows
from mpsearch.precision import LayerPrecision, Precision, PrecisionConfig
from mpsearch.problem import Problem, open_problem
from mpsearch.search.trial import run_trial
from mpsearch.space.space import Slot
from mpsearch.study import load_study
from mpsearch.workbench import Workbench


def uniform_ladder(
    study: Study = "resnet20-cifar10-jpeg",
    set_: Set = None,
    configs: Annotated[Sequence[str], several(str, "configs, with `:STEPS` where they train for another time")] = (
        "w8a8:0",
        "w4a8",
        "w4a4",
        "w3a3",
        "w2a2",
    ),
    steps: Annotated[int, typer.Option(help="training steps of a config", min=0)] = 200,
    seeds: Seeds = (0,),
    threads: Threads = 2,
    results: Results = RESULTS / "uniform_ladder.jsonl",
) -> None:
    torch.set_num_threads(threads)
    rows = Rows(results, key=("study", "set", "config", "steps", "seed", "threads", *MEASURED))
    problem = open_problem(load_study(study, [*(set_ or ()), f"trial.steps={steps}"]))
    float_val = problem.task.evaluate(problem.task.float_model(), "val")
    workbench = Workbench(problem.task, problem.spec.trial)
    about = {"study": study, "set": set_ or [], "threads": threads}
    lines = []
    for text in configs:
        shorthand, _, its_steps = text.partition(":")
        config = config_of(problem, shorthand)
        case = about | {"config": shorthand, "steps": int(its_steps) if its_steps else steps}
        for missing in rows.missing(case | {"seed": seed} for seed in seeds):
            update = {"steps": missing["steps"], "seed": missing["seed"]}
            record = run_trial(problem.task, config, problem.spec.trial.model_copy(update=update), workbench=workbench)
            measured = {
                "cost": problem.cost(config),
                "val": record.score,
                "float_val": float_val,
                "train_s": record.wall.train_s,
                "evaluate_s": record.wall.evaluate_s,
                "peak_memory_bytes": record.peak_memory_bytes,
                "reason": record.reason,
            }
            rows.append(missing | measured)
            say(f"{shorthand}, seed {missing['seed']}: {100 * (record.score or 0):.2f}")
        group = rows.select(case | {"seed": seed} for seed in seeds)
        accuracies = [100 * (row["val"] or 0) for row in group]
        lines.append(
            (
                shorthand,
                str(case["steps"]),
                f"{group[0]['cost']:.4f}",
                spread(accuracies),
                f"{statistics.fmean(accuracies) - 100 * float_val:+.2f}",
                f"{statistics.fmean(row['train_s'] for row in group):.1f}",
                f"{statistics.fmean(row['evaluate_s'] for row in group):.1f}",
                f"{max(row['peak_memory_bytes'] for row in group) / 2**20:.0f}",
            )
        )
    print_table(
        f"{problem.task.name}, float {100 * float_val:.2f} % on val, {threads} threads",
        ("config", "steps", "relative cost", "val %", "minus float", "train s", "evaluate s", "peak MiB"),
        lines,
    )


def config_of(problem: Problem, text: str) -> PrecisionConfig:
    """The config of the space nearest to a shorthand: w4a8 for every slot that has 4 (8) bits."""
    wanted = LayerPrecision.shorthand(text)

    def choice(slot: Slot) -> Precision:
        return slot.nearest(wanted.weight.bits if slot.tensor == "weight" else wanted.activation.bits)

    chosen = {(name, slot.tensor): choice(slot) for slot in problem.space.slots for name in slot.layers}
    return PrecisionConfig(
        (name, LayerPrecision(chosen[name, "weight"], chosen[name, "activation"])) for name in problem.layers
    )
