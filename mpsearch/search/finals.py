"""Final trainings as rows: each picked point of the front beside its uniform baseline, and what follows from them.

The order of the final scores says how far the brief trials could be trusted (`proxies`). No torch is needed here:
the trainings are `finalize`'s.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mpsearch.metric import Metric
from mpsearch.record import FinalRecord, TrialRecord
from mpsearch.search.compare import Difference, paired
from mpsearch.search.front import ParetoFront, pareto_front


@dataclass(frozen=True, slots=True)
class FinalRow:
    """One config after its final training: mean and standard deviation of its scores over seeds."""

    trial: TrialRecord
    baseline: int | None  # number of the uniform trial nearest in cost; None: it is a uniform one itself
    val_mean: float
    val_std: float | None  # None: a single seed
    test_mean: float
    test_std: float | None
    seeds: int
    values: tuple[str, ...] = ()  # by sample of test, packed, by seed
    gain: Difference | None = None  # over the baseline, paired by test sample


@dataclass(frozen=True, slots=True)
class Proxies:
    """How well what a study ranks by foretold the finalized test score.

    Attributes:
        tau: Kendall's tau by proxy, `score` and `divergence` of the trials; 1: the same order, 0: none. Only those
            that can be computed.
        misranked: pairs of trials (ranked higher after the trial, in truth lower, its paired difference on test, whose
            interval excludes 0).
        metric: of the scores.
    """

    tau: Mapping[str, float]
    misranked: tuple[tuple[TrialRecord, TrialRecord, Difference], ...]
    metric: Metric

    def lines(self) -> list[str]:
        """In words."""
        lines = []
        if self.tau:
            taus = ", ".join(f"{value:+.2f} of the {name}" for name, value in self.tau.items())
            lines.append(f"Kendall's tau against {self.metric.name} on test after final training: {taus} after trials.")
        for above, below, difference in self.misranked:
            lines.append(
                f"trial {above.number} was ranked above trial {below.number}, but is worse on test: {self.metric.name} "
                f"{self.metric.show_difference(difference.mean)} (95 %: {self.metric.difference(difference.low)} to "
                f"{self.metric.difference(difference.high)}): brief trials misrank here"
            )
        return lines


def picks(front: ParetoFront, count: int) -> list[TrialRecord]:
    """Up to `count` points of the front: both ends, the knee, and others evenly spread in log cost."""
    trials = list(front.trials)
    if len(trials) <= count:
        return trials
    indices = {0, len(trials) - 1, trials.index(front.knee)} if count >= 3 else {trials.index(front.knee)}
    costs = [math.log2(trial.cost or 1.0) for trial in trials]
    while len(indices) < count:  # the point farthest from all that are chosen
        rest = [i for i in range(len(trials)) if i not in indices]
        indices.add(max(rest, key=lambda i: min(abs(costs[i] - costs[j]) for j in indices)))
    return [trials[i] for i in sorted(indices)]


def final_rows(
    records: Sequence[TrialRecord], finals: Sequence[FinalRecord], count: int, metric: Metric
) -> list[FinalRow]:
    """A row for each of `count` picked points and their baselines that has been trained, by rising cost."""
    return planned_rows(plan_finals(records, count, metric), finals, metric)


def planned_rows(
    plan: Mapping[TrialRecord, TrialRecord | None], finals: Sequence[FinalRecord], metric: Metric
) -> list[FinalRow]:
    """A row for each trial of a plan (trial -> its baseline) that has been trained, by rising cost."""
    rows = [_row(trial, baseline, [f for f in finals if f.number == trial.number]) for trial, baseline in plan.items()]
    known = {row.trial.number: row for row in rows if row is not None}
    gained = [_gained(row, known.get(-1 if row.baseline is None else row.baseline), metric) for row in known.values()]
    return sorted(gained, key=lambda row: row.trial.cost or 0.0)


def final_table(rows: Sequence[FinalRow], metric: Metric) -> list[dict[str, str]]:
    """The rows as they are printed: column -> text; scores are means and standard deviations over seeds.

    A difference is paired by test sample, with its 95 % interval. The heads say the metric and its unit.
    """
    minus = f"test minus baseline, {metric.difference_unit}" if metric.difference_unit else "test minus baseline"
    by_number = {row.trial.number: row for row in rows}
    table = []
    for row in rows:
        baseline = by_number.get(-1 if row.baseline is None else row.baseline)
        gain = "" if baseline is None else metric.difference(row.test_mean - baseline.test_mean)
        table.append(
            {
                "trial": str(row.trial.number),
                "origin": row.trial.origin,
                "cost": f"{row.trial.cost:.4f}",
                f"{metric.label}: val after trial": metric.number(row.trial.score or 0.0),
                "val": _spread(metric, row.val_mean, row.val_std),
                "test": _spread(metric, row.test_mean, row.test_std),
                "seeds": str(row.seeds),
                minus: row.gain.show(metric) if row.gain else gain,
                "baseline": f"trial {baseline.trial.number}, cost {baseline.trial.cost:.4f}" if baseline else "",
            }
        )
    return table


def plan_finals(records: Sequence[TrialRecord], count: int, metric: Metric) -> dict[TrialRecord, TrialRecord | None]:
    """The trials to train: each picked point with its baseline, then the baselines (their own baseline is None)."""
    front = pareto_front(records, metric)
    plan: dict[int, tuple[TrialRecord, TrialRecord | None]] = {}
    for trial in picks(front, count) if front.trials else ():
        baseline = front.nearest_uniform(trial.cost or 1.0)
        plan[trial.number] = (trial, None if baseline is trial else baseline)
    for _, baseline in list(plan.values()):
        if baseline is not None:
            plan.setdefault(baseline.number, (baseline, None))
    return dict(plan.values())


def proxies(rows: Sequence[FinalRow], metric: Metric) -> Proxies:
    """Compare the order of the trials with that of their final trainings, baselines included."""
    from scipy.stats import kendalltau  # here, because most runs that are looked at have no rows

    tau: dict[str, float] = {}
    test = [metric.quality(row.test_mean) for row in rows]
    for name, more_is_better in (("score", metric.maximize), ("divergence", False)):
        values = [getattr(row.trial, name) for row in rows]
        if len(rows) >= 3 and None not in values:
            correlation = float(kendalltau([value if more_is_better else -value for value in values], test).statistic)
            tau |= {name: correlation} if math.isfinite(correlation) else {}
    misranked = []
    for above, below in itertools.permutations(rows, 2):
        if above.trial.score is None or below.trial.score is None or not (above.values and below.values):
            continue
        if metric.better(above.trial.score, than=below.trial.score):
            difference = paired(above.values, below.values, metric)
            if metric.quality(difference.high) < 0 and metric.quality(difference.low) < 0:
                misranked.append((above.trial, below.trial, difference))
    return Proxies(tau, tuple(sorted(misranked, key=lambda pair: metric.quality(pair[2].mean))), metric)


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
        values=tuple(f.values for f in finals if f.values is not None),
    )


def _gained(row: FinalRow, baseline: FinalRow | None, metric: Metric) -> FinalRow:
    if baseline is None or not row.values or not baseline.values:
        return row
    return replace(row, gain=paired(row.values, baseline.values, metric))


def _spread(metric: Metric, mean: float, std: float | None) -> str:
    return metric.number(mean) + ("" if std is None else f" ± {metric.number(std)}")
