"""Finalize: train the picked front longer, over several seeds, and score it on the test split.

This is the only stage that sees test data. Beside every picked point stands the rung of the uniform ladder nearest in
cost, trained the same way: a mixed config that does not beat its control is then seen not to.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mpsearch.errors import RunError
from mpsearch.export.native import save_weights
from mpsearch.record import FinalRecord, RunFolder, TrialRecord
from mpsearch.search.front import ParetoFront, pareto_front
from mpsearch.search.run import Problem, final_path
from mpsearch.search.trial import Workbench


@dataclass(frozen=True, slots=True)
class FinalRow:
    """One config after its final training: mean and standard deviation over seeds, shares in [0, 1]."""

    trial: TrialRecord
    picked: bool  # False: a rung of the uniform ladder, here as control
    val_mean: float
    val_std: float
    test_mean: float
    test_std: float
    seeds: int
    beside: int | None  # number of the control nearest in cost


def picks(front: ParetoFront, count: int) -> list[TrialRecord]:
    """Up to `count` points of the front: both ends, the knee, and others evenly spread in log cost."""
    trials = list(front.trials)
    if len(trials) <= count:
        return trials
    chosen = {0, len(trials) - 1, trials.index(front.knee)} if count >= 3 else {trials.index(front.knee)}
    costs = [math.log2(trial.cost or 1.0) for trial in trials]
    while len(chosen) < count:  # the point farthest from all that are chosen
        rest = [i for i in range(len(trials)) if i not in chosen]
        chosen.add(max(rest, key=lambda i: min(abs(costs[i] - costs[j]) for j in chosen)))
    return [trials[i] for i in sorted(chosen)]


def finalize(
    problem: Problem,
    folder: RunFolder,
    on_progress: Callable[[int, int, TrialRecord, int], None] = lambda done, total, trial, seed: None,
) -> list[FinalRow]:
    """Train and score the picked points and their controls; what was done before an interruption is not done again.

    Args:
        problem: the study.
        folder: its run.
        on_progress: called before each training with (done, total, trial, seed).

    Returns:
        a row per config by rising cost, controls included.

    Raises:
        RunError: the run has no front, or its folder cannot be written.
    """
    records = folder.records()
    front = pareto_front(records)
    if not front.trials:
        raise RunError(f"{folder.path} has no complete trial: nothing to finalize; see `mpsearch status {folder.path}`")
    final = problem.spec.final
    chosen = picks(front, final.pick)
    controls = {t.number: c for t in chosen if (c := front.nearest_uniform(t.cost or 1.0)) is not None}
    trials = list({t.number: t for t in (*chosen, *controls.values())}.values())
    steps = round(final.epochs * problem.task.steps_per_epoch(problem.spec.trial.batch_size))
    with folder.driving():
        done = {(f.number, f.seed): f for f in folder.finals() if f.steps == steps}
        jobs = [(t, seed) for t in trials for seed in range(1, final.seeds + 1)]
        bench: Workbench | None = None
        for position, (trial, seed) in enumerate(jobs):
            if (trial.number, seed) in done:
                continue
            on_progress(position, len(jobs), trial, seed)
            bench = bench or Workbench(problem.task, problem.spec.trial.model_copy(update={"steps": steps}))
            record = _train(bench, trial, seed, steps, final.lr)
            best = max((f.val for f in done.values() if f.number == trial.number), default=-math.inf)
            if record.val > best:
                save_weights(bench.model, final_path(folder.checkpoints, trial.number))
            folder.append_final(record)
            done[trial.number, seed] = record
    numbers = {trial.number for trial in chosen}
    rows = [_row(t, t.number in numbers, controls.get(t.number), list(done.values())) for t in trials]
    return sorted(rows, key=lambda row: row.trial.cost or 0.0)


def _train(bench: Workbench, trial: TrialRecord, seed: int, steps: int, lr: float | None) -> FinalRecord:
    bench.reset(trial.config)
    bench.fit(steps, seed, lr)
    bench.reestimate(seed)
    return FinalRecord(trial.number, seed, steps, bench.evaluate("val"), bench.evaluate("test"))


def _row(trial: TrialRecord, picked: bool, control: TrialRecord | None, finals: Sequence[FinalRecord]) -> FinalRow:
    of_trial = [f for f in finals if f.number == trial.number]
    val, test = [f.val for f in of_trial], [f.test for f in of_trial]

    def spread(values: list[float]) -> float:
        return statistics.stdev(values) if len(values) > 1 else math.nan

    return FinalRow(
        trial=trial,
        picked=picked,
        val_mean=statistics.fmean(val),
        val_std=spread(val),
        test_mean=statistics.fmean(test),
        test_std=spread(test),
        seeds=len(of_trial),
        beside=control.number if picked and control is not None else None,
    )
