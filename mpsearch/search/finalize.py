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
from mpsearch.exporters.native import save_weights
from mpsearch.record import FinalRecord, RunFolder, TrialRecord
from mpsearch.search.front import ParetoFront, pareto_front
from mpsearch.search.run import Problem, final_path
from mpsearch.search.trial import Workbench


@dataclass(frozen=True, slots=True)
class FinalRow:
    """One config after its final training: mean and standard deviation over seeds, shares in [0, 1]."""

    trial: TrialRecord
    control: int | None  # number of the uniform trial nearest in cost; None: it is a uniform one itself
    val_mean: float
    val_std: float | None  # None: a single seed
    test_mean: float
    test_std: float | None
    seeds: int


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
    plan = _plan(folder.records(), problem.spec.final.pick)
    if not plan:
        raise RunError(f"{folder.path} has no complete trial: nothing to finalize; see `mpsearch status {folder.path}`")
    final = problem.spec.final
    steps = round(final.epochs * problem.task.steps_per_epoch(problem.spec.trial.batch_size))
    with folder.driving():
        done = {(f.number, f.seed): f for f in folder.finals() if f.steps == steps}
        jobs = [(trial, seed) for trial in plan for seed in range(1, final.seeds + 1)]
        bench: Workbench | None = None
        for position, (trial, seed) in enumerate(jobs):
            if (trial.number, seed) in done:
                continue
            on_progress(position, len(jobs), trial, seed)
            settings = problem.spec.trial.model_copy(update={"steps": steps})
            bench = bench or Workbench(problem.task, settings, offers=problem.space.offers)
            record = _train(bench, trial, seed, steps, final.lr)
            if record.val > max((f.val for f in done.values() if f.number == trial.number), default=-math.inf):
                save_weights(bench.model, final_path(folder.checkpoints, trial.number))
            folder.append_final(record)
            done[trial.number, seed] = record
    return final_rows(folder.records(), list(done.values()), final.pick)


def final_rows(records: Sequence[TrialRecord], finals: Sequence[FinalRecord], count: int) -> list[FinalRow]:
    """A row for each of `count` picked points and their controls that has been trained, by rising cost."""
    plan = _plan(records, count)
    rows = [_row(trial, control, [f for f in finals if f.number == trial.number]) for trial, control in plan.items()]
    return sorted((row for row in rows if row is not None), key=lambda row: row.trial.cost or 0.0)


def final_table(rows: Sequence[FinalRow]) -> list[dict[str, str]]:
    """The rows as they are printed: column -> text; accuracies in percent, mean and standard deviation over seeds."""
    by_number = {row.trial.number: row for row in rows}
    table = []
    for row in rows:
        control = by_number.get(row.control) if row.control is not None else None
        table.append(
            {
                "trial": str(row.trial.number),
                "origin": row.trial.origin,
                "cost": f"{row.trial.cost:.4f}",
                "val after trial": f"{100 * (row.trial.accuracy or 0):.2f}",
                "val": _spread(row.val_mean, row.val_std),
                "test": _spread(row.test_mean, row.test_std),
                "seeds": str(row.seeds),
                "test minus control": f"{100 * (row.test_mean - control.test_mean):+.2f}" if control else "",
                "control": f"trial {control.trial.number}, cost {control.trial.cost:.4f}" if control else "",
            }
        )
    return table


def _plan(records: Sequence[TrialRecord], count: int) -> dict[TrialRecord, TrialRecord | None]:
    """The trials to train: each picked point with its control, then the controls (their own control is None)."""
    front = pareto_front(records)
    plan: dict[int, tuple[TrialRecord, TrialRecord | None]] = {}
    for trial in picks(front, count) if front.trials else ():
        control = front.nearest_uniform(trial.cost or 1.0)
        plan[trial.number] = (trial, None if control is trial else control)
    for _, control in list(plan.values()):
        if control is not None:
            plan.setdefault(control.number, (control, None))
    return dict(plan.values())


def _train(bench: Workbench, trial: TrialRecord, seed: int, steps: int, lr: float | None) -> FinalRecord:
    bench.reset(trial.config)
    bench.fit(steps, seed, lr)
    bench.reestimate(seed)
    test = bench.score("test")
    return FinalRecord(trial.number, seed, steps, bench.score("val").accuracy, test.accuracy, test.correct)


def _row(trial: TrialRecord, control: TrialRecord | None, finals: Sequence[FinalRecord]) -> FinalRow | None:
    if not finals:
        return None
    val, test = [f.val for f in finals], [f.test for f in finals]
    return FinalRow(
        trial=trial,
        control=None if control is None else control.number,
        val_mean=statistics.fmean(val),
        val_std=statistics.stdev(val) if len(val) > 1 else None,
        test_mean=statistics.fmean(test),
        test_std=statistics.stdev(test) if len(test) > 1 else None,
        seeds=len(finals),
    )


def _spread(mean: float, std: float | None) -> str:
    return f"{100 * mean:.2f}" + ("" if std is None else f" ± {100 * std:.2f}")
