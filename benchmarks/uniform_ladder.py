"""Uniform configs after a short fine-tune: the baseline that every search is measured against.

    python benchmarks/uniform_ladder.py [--study resnet20-cifar10-jpeg] [--set KEY=VALUE ...]
        [--configs w8a8:0,w4a8,w4a4,w3a3,w2a2] [--steps 200] [--seeds 0] [--threads 2]

`w8a8:0` trains for no step at all. The first and the last layer have what the study's space gives them. Prints one
table: validation accuracy, its difference from the float model, seconds. Never touches the test split.
"""

from __future__ import annotations

import argparse
import statistics
import sys

import torch
from rich.console import Console
from rich.table import Table

from mpsearch.precision import LayerPrecision, Precision, PrecisionConfig
from mpsearch.problem import Problem, open_problem
from mpsearch.search.trial import run_trial
from mpsearch.space.space import Slot
from mpsearch.study import load_study
from mpsearch.workbench import Workbench


def config_of(problem: Problem, text: str) -> PrecisionConfig:
    """The config of the space nearest to a shorthand: w4a8 for every slot that has 4 (8) bits."""
    wanted = LayerPrecision.shorthand(text)

    def choice(slot: Slot) -> Precision:
        return slot.nearest(wanted.weight.bits if slot.tensor == "weight" else wanted.activation.bits)

    chosen = {(name, slot.tensor): choice(slot) for slot in problem.space.slots for name in slot.layers}
    return PrecisionConfig(
        (name, LayerPrecision(chosen[name, "weight"], chosen[name, "activation"])) for name in problem.layers
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", default="resnet20-cifar10-jpeg")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--configs", default="w8a8:0,w4a8,w4a4,w3a3,w2a2")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    problem = open_problem(load_study(options.study, [*options.overrides, f"trial.steps={options.steps}"]))
    float_val = problem.task.evaluate(problem.task.float_model(), "val")
    workbench = Workbench(problem.task, problem.spec.trial)
    table = Table(title=f"{problem.task.name}, float {100 * float_val:.2f} % on val, {options.threads} threads")
    for column in ("config", "steps", "relative cost", "val %", "minus float", "train s", "evaluate s", "peak MiB"):
        table.add_column(column, justify="right")
    for text in options.configs.split(","):
        shorthand, _, own_steps = text.partition(":")
        steps = int(own_steps) if own_steps else options.steps
        config = config_of(problem, shorthand)
        records = [
            run_trial(
                problem.task,
                config,
                problem.spec.trial.model_copy(update={"steps": steps, "seed": int(seed)}),
                workbench=workbench,
            )
            for seed in options.seeds.split(",")
        ]
        accuracies = [100 * (record.accuracy or 0) for record in records]
        mean = statistics.fmean(accuracies)
        spread = f" ± {statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
        table.add_row(
            shorthand,
            str(steps),
            f"{problem.cost(config):.4f}",
            f"{mean:.2f}{spread}",
            f"{mean - 100 * float_val:+.2f}",
            f"{statistics.fmean(r.wall.train_s for r in records):.1f}",
            f"{statistics.fmean(r.wall.evaluate_s for r in records):.1f}",
            f"{max(r.peak_memory_bytes for r in records) / 2**20:.0f}",
        )
        print(f"{shorthand}: {mean:.2f}", file=sys.stderr, flush=True)
    Console(width=120).print(table)
    print("command: python " + " ".join(sys.argv))


if __name__ == "__main__":
    main()
