"""The Pareto front of a study: the trials that no other beats in score and cost at once, and how good they are.

Two objectives: the score (its metric says which way is better) and relative cost (less is better). Cost is always seen
on a log scale, because half the cost is the same gain everywhere. Only complete trials take part.

**Hypervolume**, one convention for every metric: the area that the front dominates, where one axis is the score, 0 at
the worst score that was observed and 1 at the float network's (`ScoreRange`), and the other is log2 cost, 1 at the
cheapest config that the space has and 0 at the reference config (relative cost 1). So a front is worth 0 if no trial is
cheaper than the reference, 1 if the cheapest config is as good as the float network, and more than 1 only where
quantized networks are better than the float one. It depends on the range, which is said wherever it is shown; fronts
are compared over one range.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, isnan, log2
from typing import Any

from mpsearch.cost.model import Cost
from mpsearch.errors import CostError, RunError
from mpsearch.metric import TOP1, TOP5, Metric
from mpsearch.pareto import non_dominated
from mpsearch.record import Origin, TrialRecord
from mpsearch.search.compare import paired
from mpsearch.units import SHARE, parse_amount, show

BETTER = (True, False)  # more quality, less cost


@dataclass(frozen=True, slots=True)
class ScoreRange:
    """The score axis of a hypervolume: 0 at `worst`, 1 at `best`; where both are one, nothing is dominated."""

    worst: float
    best: float
    best_is_float: bool = False  # else it is the best trial's, of a run that has not scored its float network

    def share(self, score: float) -> float:
        """Where a score lies on the axis; below 0 where it is worse than the worst."""
        return (score - self.worst) / (self.best - self.worst) if self.best != self.worst else 0.0

    def said(self, metric: Metric) -> str:
        """The range in words, to stand beside a hypervolume."""
        best = "the float network" if self.best_is_float else "the best trial"
        return (
            f"0: {metric.show(self.worst)} (the worst trial) at the reference's cost; "
            f"1: {metric.show(self.best)} ({best}) at the cheapest config's"
        )


@dataclass(frozen=True, slots=True)
class ParetoFront:
    """The non-dominated trials by rising cost (and so by better scores), and the uniform ladder to compare with."""

    trials: tuple[TrialRecord, ...]
    ladder: tuple[TrialRecord, ...]  # complete trials of uniform configs by rising cost, on the front or not
    metric: Metric  # of the scores

    def __len__(self) -> int:
        return len(self.trials)

    def __iter__(self) -> Iterator[TrialRecord]:
        return iter(self.trials)

    @property
    def best(self) -> TrialRecord:
        """The trial with the best score. Raises RunError if the front is empty."""
        self._require_trials()
        return self.trials[-1]

    @property
    def knee(self) -> TrialRecord:
        """The trial farthest above the chord between the ends of the front, both axes scaled to [0, 1].

        Cost is on its log scale. Where no trial is above the chord, and so with one trial or two, it is the best one.

        Raises:
            RunError: the front is empty.
        """
        self._require_trials()
        cost_low, cost_high = (log2(objectives(end)[1]) for end in (self.trials[0], self.trials[-1]))
        low, high = (objectives(end)[0] for end in (self.trials[0], self.trials[-1]))

        def above_chord(trial: TrialRecord) -> float:
            score, cost = objectives(trial)
            return (score - low) / (high - low) - (log2(cost) - cost_low) / (cost_high - cost_low)

        inner = max(self.trials[1:-1], key=above_chord, default=self.best)
        return inner if inner is not self.best and above_chord(inner) > 0 else self.best

    def at_most(self, cost: float) -> TrialRecord:
        """The best trial that costs no more. Raises RunError if none does."""
        self._require_trials()
        affordable = [trial for trial in self.trials if objectives(trial)[1] <= cost]
        if not affordable:
            raise RunError(f"no trial costs {cost:g} or less: the cheapest costs {objectives(self.trials[0])[1]:.4g}")
        return affordable[-1]

    def at_least(self, score: float) -> TrialRecord:
        """The cheapest trial whose score is no worse. Raises RunError if none is."""
        self._require_trials()
        reaching = [trial for trial in self.trials if self.metric.reaches(objectives(trial)[0], score)]
        if not reaching:
            metric, reached = self.metric, objectives(self.best)[0]
            share = " (0.87 is 87 %)" if metric.unit == "%" else ""
            raise RunError(
                f"no trial has {metric.name}{metric.sign}{score:g}: the best has {metric.show(reached)}{share}"
            )
        return reaching[0]

    def dominates(self, trial: TrialRecord) -> bool:
        """Whether one of the front is better than a complete trial in score or cost, and no worse in the other."""
        score, cost = objectives(trial)
        return any(
            (price <= cost and self.metric.better(its, than=score))
            or (price < cost and self.metric.reaches(its, score))
            for its, price in map(objectives, self.trials)
        )

    def nearest_uniform(self, cost: float) -> TrialRecord | None:
        """The best uniform baseline at about this cost; None without any.

        Of the uniform trials that no other uniform one beats, the nearest in log cost, the cheaper of two.
        """
        baselines = _non_dominated(self.ladder, self.metric)
        return min(baselines, key=lambda trial: abs(log2(objectives(trial)[1] / cost)), default=None)

    def hypervolume(self, cheapest: float, scores: ScoreRange) -> float:
        """The area that the front dominates: see the module's convention.

        Args:
            cheapest: relative cost of the cheapest config of the space (`RelativeCost.bounds`).
            scores: the score axis.

        Raises:
            CostError: `cheapest` is no cost.
        """
        return share_dominated([objectives(trial) for trial in self.trials], cheapest, scores)

    def _require_trials(self) -> None:
        if not self.trials:
            raise RunError("the front is empty: no trial is complete; see why with `mpsearch status RUN`")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a study was when a trial, or a longer rung of one, had ended."""

    trials: int  # complete, this one included
    elapsed_s: float  # since the first trial of any state started
    hypervolume: float
    origin: Origin  # of the trial
    rung: int  # that ended


def objectives(trial: TrialRecord) -> tuple[float, float]:
    """Score and relative cost of a complete trial. Raises RunError if it has not both."""
    if trial.state != "complete" or trial.score is None or trial.cost is None:
        why = f": {trial.reason}" if trial.reason else ""
        raise RunError(f"trial {trial.number} is {trial.state}{why}; it has no score and cost: pick a complete one")
    return trial.score, trial.cost


def pareto_front(records: Sequence[TrialRecord], metric: Metric) -> ParetoFront:
    """The front of the complete trials; of trials with equal score and cost, the first in `records`."""
    complete = sorted(
        _complete(records), key=lambda trial: (objectives(trial)[1], -metric.quality(objectives(trial)[0]))
    )
    ladder = tuple(trial for trial in complete if trial.origin == "uniform")
    return ParetoFront(_non_dominated(complete, metric), ladder, metric)


def scores_of(records: Sequence[TrialRecord]) -> list[float]:
    """The scores of the complete trials."""
    return [objectives(trial)[0] for trial in _complete(records)]


def score_range(scores: Sequence[float], metric: Metric, float_score: float | None) -> ScoreRange:
    """From the worst of the trials' scores to the float network's.

    To the best trial's where the float network has not been scored, or is no better than the worst trial.
    """
    if not scores:
        return ScoreRange(0.0, 0.0)
    worst = min(scores, key=metric.quality)
    if float_score is not None and metric.better(float_score, than=worst):
        return ScoreRange(worst, float_score, best_is_float=True)
    return ScoreRange(worst, metric.best_of(*scores))


def front_rows(front: ParetoFront) -> list[dict[str, Any]]:
    """The front as plain values, by rising cost: number, origin, score, cost, steps and config of each trial."""
    return [
        {
            "number": trial.number,
            "origin": trial.origin,
            "score": trial.score,
            "cost": trial.cost,
            "steps": trial.steps,
            "costs": dict(trial.costs),
            "knee": trial is front.knee,
            "layers": trial.config.to_json(),
        }
        for trial in front
    ]


def gains_over_baselines(front: ParetoFront) -> dict[int, str]:
    """Front trial -> its score minus that of the uniform baseline nearest in cost, on the same samples, and the ratio
    of their costs; where they were trained for different numbers of steps, these, because that is another matter.

    Trials that are baselines themselves, and those without values by sample, are left out.
    """
    gains = {}
    for trial in front:
        _, cost = objectives(trial)
        baseline = front.nearest_uniform(cost)
        if baseline is None or baseline is trial or baseline.values is None or trial.values is None:
            continue
        ratio = cost / objectives(baseline)[1]
        if baseline.steps != trial.steps and min(baseline.steps, trial.steps) > 0:  # 0: it is as good as float
            gains[trial.number] = (
                f"none: {trial.steps} steps, and {baseline.steps} of trial {baseline.number} at {ratio:.2f}x"
            )
            continue
        difference = paired([trial.values], [baseline.values], front.metric)
        gains[trial.number] = f"{difference.show(front.metric)} at {ratio:.2f}x of trial {baseline.number}"
    return gains


def _non_dominated(by_cost: Sequence[TrialRecord], metric: Metric) -> tuple[TrialRecord, ...]:
    """Of complete trials by rising cost, those that no other beats."""
    points = [objectives(trial) for trial in by_cost]
    return tuple(by_cost[i] for i in non_dominated(points, (metric.maximize, False)))


def hypervolume_over_time(
    records: Sequence[TrialRecord], cheapest: float, metric: Metric, scores: ScoreRange
) -> list[Progress]:
    """The hypervolume over the score axis `scores` after every complete trial, in the order in which they ended.

    A longer rung of a trial is an end of its own; its score takes the place of the shorter one's.

    Raises:
        CostError: `cheapest` is no cost.
    """
    started_s = min((trial.started_s for trial in records), default=0.0)
    points: dict[int, tuple[float, float]] = {}  # non-dominated ones, by place in `ends`
    known: dict[int, tuple[float, float]] = {}  # of trials that have ended longer rungs, all of them are needed
    progress: list[Progress] = []
    hypervolume = share_dominated([], cheapest, scores)
    several = any(len(trial.rungs) > 1 for trial in records)
    ends = sorted(
        ((end.ended_s, i, rung, end) for i, trial in enumerate(_complete(records)) for rung, end in _ends(trial)),
        key=lambda end: end[:3],
    )
    for ended_s, i, rung, trial in ends:
        known[i] = objectives(trial)
        points = {**(known if several else points), i: known[i]}
        numbers = list(points)
        on_front = [numbers[j] for j in non_dominated([points[n] for n in numbers], (metric.maximize, False))]
        points = {n: points[n] for n in on_front}
        if several or i in points:
            hypervolume = share_dominated(list(points.values()), cheapest, scores)
        progress.append(Progress(len(known), ended_s - started_s, hypervolume, trial.origin, rung))
    return progress


def _ends(trial: TrialRecord) -> list[tuple[int, TrialRecord]]:
    """The rungs that a trial ended well, and what it was then."""
    if not trial.rungs:
        return [(0, trial)]
    return [(i, trial.at_rung(i)) for i, rung in enumerate(trial.rungs) if rung.score is not None]


_PICK = re.compile(
    r"(?P<property>knee|best)|(?:trial:)?(?P<number>\d+)|(?P<what>[\w.:-]+?)(?P<sign><=|>=)(?P<value>[^<>=]+)"
)


def pick(
    records: Sequence[TrialRecord], text: str, metric: Metric, references: Mapping[str, Cost] | None = None
) -> TrialRecord:
    """The trial that a text names: `knee`, `best`, `trial:7`, `cost<=0.5`, and by the metric `top1>=0.87`, `bpc<=1.2`.

    A bound picks from the front: the best trial within a cost, the cheapest one with a score; the metric may also be
    called `score`. A number, with `trial:` or without, picks any complete trial. `weight_bytes<=100KiB`, or several
    such with commas, picks the best of all complete trials within these costs, the cheapest of several, on the front or
    not.

    Args:
        records: the trials.
        text: what is picked.
        metric: what scores are.
        references: the reference's cost under every cost model, by its name.

    Raises:
        RunError: the text has another form, or there is no such trial.
    """
    text = "".join(text.split())
    match = _PICK.fullmatch(text)
    costs = references or {}
    bounds_on = [(part, _PICK.fullmatch(part)) for part in text.split(",")]
    if all(m is not None and m["what"] in costs and m["sign"] == "<=" for _, m in bounds_on):
        return _within(records, {m["what"]: m["value"] for _, m in bounds_on if m is not None}, metric, costs)
    value = _number(match["value"]) if match is not None and match["what"] else 0.0
    names = {metric.name, "score"} | ({"accuracy"} if metric in (TOP1, TOP5) else set())
    bounds = {"cost": "<="} | dict.fromkeys(names, metric.sign)
    if match is None or value is None or (match["what"] and bounds.get(match["what"]) != match["sign"]):
        way = "more" if metric.maximize else "less"
        others = f"; a cost is one of {', '.join(costs)}, as {next(iter(costs))}<=50%" if costs else ""
        raise RunError(
            f"cannot pick '{text}': write knee, best, trial:7, cost<=0.5 or {metric.name}{metric.sign}X: {way} of "
            f"{metric.name} is better{others}"
        )
    if match["number"] is not None:
        number = int(match["number"])
        named = next((trial for trial in records if trial.number == number), None)
        if named is None:
            numbers = [trial.number for trial in records]
            have = f"the trials are {min(numbers)} to {max(numbers)}" if numbers else "there is none yet"
            raise RunError(f"no trial {number}: {have}")
        objectives(named)
        return named
    front = pareto_front(records, metric)
    if match["what"]:
        return front.at_most(value) if match["what"] == "cost" else front.at_least(value)
    return front.knee if match["property"] == "knee" else front.best


def _within(
    records: Sequence[TrialRecord], most: Mapping[str, str], metric: Metric, references: Mapping[str, Cost]
) -> TrialRecord:
    """The best complete trial whose costs are within bounds; of several as good, the one that costs least."""
    bounds = {}
    for name, text in most.items():
        try:
            amount = parse_amount(name, text)
        except ValueError as error:
            raise RunError(f"cannot pick: {error}") from None
        reference = references[name]
        if amount.unit not in (SHARE, reference.unit):
            raise RunError(f"cannot pick {name}<={text}: {name} is counted in {reference.unit}, or as a share: 50%")
        bounds[name] = amount.value * (reference.total if amount.unit == SHARE else 1.0)
    trials = [trial for trial in _complete(records) if all(name in trial.costs for name in bounds)]
    affordable = [trial for trial in trials if all(trial.costs[name] <= bound for name, bound in bounds.items())]
    if not affordable:
        least = ", ".join(
            f"{name} {show(min(trial.costs[name] for trial in trials), references[name].unit)}"
            for name in bounds
            if trials
        )
        asked = ", ".join(f"{name}<={text}" for name, text in most.items())
        raise RunError(f"no trial has {asked}: the least of each is {least or 'not known, as no trial is complete'}")
    return max(affordable, key=lambda trial: (metric.quality(objectives(trial)[0]), -objectives(trial)[1]))


def _number(text: str) -> float | None:
    """A number as Python reads it, of either sign; None where it is none, or NaN."""
    try:
        value = float(text)
    except ValueError:
        return None
    return None if isnan(value) else value


def _complete(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    complete = [trial for trial in records if trial.state == "complete"]
    return [trial for trial in complete if all(isfinite(value) for value in objectives(trial))]


def share_dominated(points: Sequence[tuple[float, float]], cheapest: float, scores: ScoreRange) -> float:
    """The hypervolume, by the module's convention, of points (score, relative cost).

    Raises:
        CostError: `cheapest` is no cost.
    """
    import moocore  # here, because a front without a hypervolume needs nothing beyond Python

    if not cheapest > 0:
        raise CostError(f"the cheapest config must have a relative cost above 0, got {cheapest:g}")
    if cheapest >= 1 or not points:  # nothing is cheaper than the reference
        return 0.0
    unit = [(1 - scores.share(score), max(0.0, 1 - log2(cost) / log2(cheapest))) for score, cost in points]
    return float(moocore.hypervolume(unit, ref=(1.0, 1.0)))  # the worst score, at the reference's cost
