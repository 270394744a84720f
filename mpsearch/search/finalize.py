"""Finalize: train the picked front longer, over several seeds, and score it on the test split.

This is the only stage that sees test data. Beside every picked point stands the uniform config nearest in cost, trained
the same way: a mixed config that does not beat its baseline is then seen not to. The order of the final accuracies says
how far the brief trials could be trusted (`proxies`).
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from safetensors.torch import load_file
from scipy.stats import kendalltau
from torch import Tensor

from mpsearch.errors import RunError
from mpsearch.problem import Problem
from mpsearch.record import FinalRecord, RunFolder, TrialRecord, checkpoint_path, final_path
from mpsearch.search.compare import Difference, paired
from mpsearch.search.front import ParetoFront, pareto_front
from mpsearch.state_dict import save_weights
from mpsearch.warmstart.start import start_weights
from mpsearch.workbench import Workbench


@dataclass(frozen=True, slots=True)
class FinalRow:
    """One config after its final training: mean and standard deviation over seeds, shares in [0, 1]."""

    trial: TrialRecord
    baseline: int | None  # number of the uniform trial nearest in cost; None: it is a uniform one itself
    val_mean: float
    val_std: float | None  # None: a single seed
    test_mean: float
    test_std: float | None
    seeds: int
    correct: tuple[str, ...] = ()  # on test, packed, by seed
    gain: Difference | None = None  # over the baseline, paired by test sample


@dataclass(frozen=True, slots=True)
class Proxies:
    """How well what a study ranks by foretold the finalized test accuracy.

    Attributes:
        tau: Kendall's tau by proxy, `accuracy` and `divergence` of the trials; 1: the same order, 0: none. Only those
            that can be computed.
        misranked: pairs of trials (ranked higher after the trial, in truth lower, its paired difference on test, whose
            interval excludes 0).
    """

    tau: Mapping[str, float]
    misranked: tuple[tuple[TrialRecord, TrialRecord, Difference], ...]

    def lines(self) -> list[str]:
        """In words."""
        lines = []
        if self.tau:
            taus = ", ".join(f"{value:+.2f} of the {name}" for name, value in self.tau.items())
            lines.append(f"Kendall's tau against finalized test accuracy: {taus} after the trials.")
        for above, below, difference in self.misranked:
            lines.append(
                f"trial {above.number} was ranked above trial {below.number}, but is less accurate on test by "
                f"{-100 * difference.mean:.2f} points (95 %: {-100 * difference.high:.2f} to "
                f"{-100 * difference.low:.2f}): brief trials misrank here"
            )
        return lines


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
    trials: Sequence[TrialRecord] | None = None,
) -> list[FinalRow]:
    """Train and score the picked points and their baselines; what was done before an interruption is not done again.

    Args:
        problem: the study.
        folder: its run.
        on_progress: called before each training with (done, total, trial, seed).
        trials: train these instead.

    Returns:
        a row per config by rising cost, baselines included.

    Raises:
        RunError: the run has no front, or its folder cannot be written.
    """
    final = problem.spec.final
    plan = _plan(folder.records(), final.pick) if trials is None else dict.fromkeys(trials)
    if not plan:
        raise RunError(f"{folder.path} has no complete trial: nothing to finalize; see `mpsearch status {folder.path}`")
    steps = round(final.epochs * problem.task.steps_per_epoch(problem.spec.trial.batch_size))
    with folder.driving():
        done = {(f.number, f.seed): f for f in folder.finals() if f.steps == steps}
        jobs = [(trial, seed) for trial in plan for seed in range(1, final.seeds + 1)]
        workbench: Workbench | None = None
        nearest = start_weights(problem.spec, folder.warmstart)
        for position, (trial, seed) in enumerate(jobs):
            if (trial.number, seed) in done:
                continue
            on_progress(position, len(jobs), trial, seed)
            settings = problem.spec.trial.model_copy(update={"steps": steps})
            workbench = workbench or Workbench(problem.task, settings, offers=problem.space.offers)
            kept = checkpoint_path(folder.checkpoints, trial.number)
            start = load_file(kept) if kept.exists() else nearest(trial.cost or 1.0)
            record = _train(workbench, trial, seed, steps, final.lr, start)
            if record.val > max((f.val for f in done.values() if f.number == trial.number), default=-math.inf):
                save_weights(workbench.model, final_path(folder.checkpoints, trial.number))
            folder.append_final(record)
            done[trial.number, seed] = record
    return _rows(plan, list(done.values()))


def final_rows(records: Sequence[TrialRecord], finals: Sequence[FinalRecord], count: int) -> list[FinalRow]:
    """A row for each of `count` picked points and their baselines that has been trained, by rising cost."""
    return _rows(_plan(records, count), finals)


def _rows(plan: Mapping[TrialRecord, TrialRecord | None], finals: Sequence[FinalRecord]) -> list[FinalRow]:
    rows = [_row(trial, baseline, [f for f in finals if f.number == trial.number]) for trial, baseline in plan.items()]
    known = {row.trial.number: row for row in rows if row is not None}
    gained = [_gained(row, known.get(-1 if row.baseline is None else row.baseline)) for row in known.values()]
    return sorted(gained, key=lambda row: row.trial.cost or 0.0)


def final_table(rows: Sequence[FinalRow]) -> list[dict[str, str]]:
    """The rows as they are printed: column -> text; accuracies in percent, mean and standard deviation over seeds.

    A difference is paired by test sample, with its 95 % interval.
    """
    by_number = {row.trial.number: row for row in rows}
    table = []
    for row in rows:
        baseline = by_number.get(-1 if row.baseline is None else row.baseline)
        gain = "" if baseline is None else f"{100 * (row.test_mean - baseline.test_mean):+.2f}"
        table.append(
            {
                "trial": str(row.trial.number),
                "origin": row.trial.origin,
                "cost": f"{row.trial.cost:.4f}",
                "val after trial": f"{100 * (row.trial.accuracy or 0):.2f}",
                "val": _spread(row.val_mean, row.val_std),
                "test": _spread(row.test_mean, row.test_std),
                "seeds": str(row.seeds),
                "test minus baseline": str(row.gain) if row.gain else gain,
                "baseline": f"trial {baseline.trial.number}, cost {baseline.trial.cost:.4f}" if baseline else "",
            }
        )
    return table


def _plan(records: Sequence[TrialRecord], count: int) -> dict[TrialRecord, TrialRecord | None]:
    """The trials to train: each picked point with its baseline, then the baselines (their own baseline is None)."""
    front = pareto_front(records)
    plan: dict[int, tuple[TrialRecord, TrialRecord | None]] = {}
    for trial in picks(front, count) if front.trials else ():
        baseline = front.nearest_uniform(trial.cost or 1.0)
        plan[trial.number] = (trial, None if baseline is trial else baseline)
    for _, baseline in list(plan.values()):
        if baseline is not None:
            plan.setdefault(baseline.number, (baseline, None))
    return dict(plan.values())


def proxies(rows: Sequence[FinalRow]) -> Proxies:
    """Compare the order of the trials with that of their final trainings, baselines included."""
    tau: dict[str, float] = {}
    test = [row.test_mean for row in rows]
    for name, sign in (("accuracy", 1), ("divergence", -1)):
        values = [getattr(row.trial, name) for row in rows]
        if len(rows) >= 3 and None not in values:
            found = float(kendalltau([sign * value for value in values], test).statistic)
            tau |= {name: found} if math.isfinite(found) else {}
    misranked = []
    for above, below in itertools.permutations(rows, 2):
        if (above.trial.accuracy or 0) > (below.trial.accuracy or 0) and above.correct and below.correct:
            difference = paired(above.correct, below.correct)
            if difference.high < 0:
                misranked.append((above.trial, below.trial, difference))
    return Proxies(tau, tuple(sorted(misranked, key=lambda pair: pair[2].mean)))


def _train(
    workbench: Workbench,
    trial: TrialRecord,
    seed: int,
    steps: int,
    lr: float | None,
    start: Mapping[str, Tensor] | None,
) -> FinalRecord:
    """Go on from what the trial ended with, where it was kept; the better of start and end on val counts."""
    workbench.reset(trial.config, start)
    if start is not None:
        workbench.restore(start)  # its ranges too, if it has any
    before, state = workbench.score("val").accuracy, workbench.state()
    workbench.fit(steps, seed, lr)
    workbench.reestimate(seed)
    after = workbench.score("val").accuracy
    if after < before:
        workbench.restore(state)
    test = workbench.score("test")
    return FinalRecord(trial.number, seed, steps, max(before, after), test.accuracy, test.correct)


def _row(trial: TrialRecord, baseline: TrialRecord | None, finals: Sequence[FinalRecord]) -> FinalRow | None:
    if not finals:
        return None
    val, test = [f.val for f in finals], [f.test for f in finals]
    return FinalRow(
        trial=trial,
        baseline=None if baseline is None else baseline.number,
        val_mean=statistics.fmean(val),
        val_std=statistics.stdev(val) if len(val) > 1 else None,
        test_mean=statistics.fmean(test),
        test_std=statistics.stdev(test) if len(test) > 1 else None,
        seeds=len(finals),
        correct=tuple(f.correct for f in finals if f.correct is not None),
    )


def _gained(row: FinalRow, baseline: FinalRow | None) -> FinalRow:
    if baseline is None or not row.correct or not baseline.correct:
        return row
    return replace(row, gain=paired(row.correct, baseline.correct))


def _spread(mean: float, std: float | None) -> str:
    return f"{100 * mean:.2f}" + ("" if std is None else f" ± {100 * std:.2f}")
