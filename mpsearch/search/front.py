"""The Pareto front of a study: the trials that no other beats in accuracy and cost at once, and how good they are.

Two objectives: accuracy (more is better) and relative cost (less is better). Cost is always seen on a log scale,
because half the cost is the same gain everywhere. Only complete trials take part.

**Hypervolume**, one convention for every study: the share of the unit square that the front dominates, where one axis
is the error 1 - accuracy and the other log2 cost, 0 at the cheapest config that the space has and 1 at the reference
config (relative cost 1). The reference point is (1, 1): nothing right, at full cost. So a front is worth 0 if no trial
is cheaper than the reference, and 1 if the cheapest config makes no error. Accuracy must be a share in [0, 1].
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite, isnan, log2
from typing import Any

from mpsearch.errors import CostError, RunError
from mpsearch.pareto import non_dominated
from mpsearch.record import TrialRecord
from mpsearch.search.compare import paired

BETTER = (True, False)  # more accuracy, less cost
_REFERENCE_POINT = (1.0, 1.0)  # error, normalised log2 cost


@dataclass(frozen=True, slots=True)
class ParetoFront:
    """The non-dominated trials by rising cost (and so by rising accuracy), and the uniform ladder to compare with."""

    trials: tuple[TrialRecord, ...]
    ladder: tuple[TrialRecord, ...]  # complete trials of uniform configs by rising cost, on the front or not

    def __len__(self) -> int:
        return len(self.trials)

    def __iter__(self) -> Iterator[TrialRecord]:
        return iter(self.trials)

    @property
    def best(self) -> TrialRecord:
        """The most accurate trial. Raises RunError if the front is empty."""
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
            accuracy, cost = objectives(trial)
            return (accuracy - low) / (high - low) - (log2(cost) - cost_low) / (cost_high - cost_low)

        inner = max(self.trials[1:-1], key=above_chord, default=self.best)
        return inner if inner is not self.best and above_chord(inner) > 0 else self.best

    def at_most(self, cost: float) -> TrialRecord:
        """The most accurate trial that costs no more. Raises RunError if none does."""
        self._require_trials()
        affordable = [trial for trial in self.trials if objectives(trial)[1] <= cost]
        if not affordable:
            raise RunError(f"no trial costs {cost:g} or less: the cheapest costs {objectives(self.trials[0])[1]:.4g}")
        return affordable[-1]

    def at_least(self, accuracy: float) -> TrialRecord:
        """The cheapest trial that is no less accurate. Raises RunError if none is."""
        self._require_trials()
        accurate = [trial for trial in self.trials if objectives(trial)[0] >= accuracy]
        if not accurate:
            reached = objectives(self.best)[0]
            raise RunError(
                f"no trial has an accuracy of {accuracy:g} or more: the best has {reached:.4g} (0.87 is 87 %)"
            )
        return accurate[0]

    def nearest_uniform(self, cost: float) -> TrialRecord | None:
        """The best uniform baseline at about this cost; None without any.

        Of the uniform trials that no other uniform one beats, the nearest in log cost, the cheaper of two.
        """
        baselines = _non_dominated(self.ladder)
        return min(baselines, key=lambda trial: abs(log2(objectives(trial)[1] / cost)), default=None)

    def hypervolume(self, cheapest: float) -> float:
        """The share of the unit square that the front dominates: see the module's convention.

        Args:
            cheapest: relative cost of the cheapest config of the space (`RelativeCost.bounds`).

        Raises:
            CostError: `cheapest` is no cost.
        """
        return share_dominated([objectives(trial) for trial in self.trials], cheapest)

    def _require_trials(self) -> None:
        if not self.trials:
            raise RunError("the front is empty: no trial is complete; see why with `mpsearch status RUN`")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a study was when a trial had ended."""

    trials: int  # complete, this one included
    elapsed_s: float  # since the first trial of any state started
    hypervolume: float


def objectives(trial: TrialRecord) -> tuple[float, float]:
    """Accuracy and relative cost of a complete trial. Raises RunError if it has not both."""
    if trial.state != "complete" or trial.accuracy is None or trial.cost is None:
        why = f": {trial.reason}" if trial.reason else ""
        raise RunError(f"trial {trial.number} is {trial.state}{why}; it has no accuracy and cost: pick a complete one")
    return trial.accuracy, trial.cost


def pareto_front(records: Sequence[TrialRecord]) -> ParetoFront:
    """The front of the complete trials; of trials with equal accuracy and cost, the first in `records`."""
    complete = sorted(_complete(records), key=lambda trial: (objectives(trial)[1], -objectives(trial)[0]))
    return ParetoFront(_non_dominated(complete), tuple(trial for trial in complete if trial.origin == "uniform"))


def front_rows(front: ParetoFront) -> list[dict[str, Any]]:
    """The front as plain values, by rising cost: number, origin, accuracy, cost and the config of each trial."""
    return [
        {
            "number": trial.number,
            "origin": trial.origin,
            "accuracy": trial.accuracy,
            "cost": trial.cost,
            "knee": trial is front.knee,
            "layers": trial.config.to_json(),
        }
        for trial in front
    ]


def gains_over_baselines(records: Sequence[TrialRecord]) -> dict[int, str]:
    """Front trial -> its gain over the uniform baseline nearest in cost, on the same samples, and at which cost ratio.

    Trials that are baselines themselves, and those of runs that kept no correctness, are left out.
    """
    front = pareto_front(records)
    gains = {}
    for trial in front:
        _, cost = objectives(trial)
        baseline = front.nearest_uniform(cost)
        if baseline is None or baseline is trial or baseline.correct is None or trial.correct is None:
            continue
        ratio = cost / objectives(baseline)[1]
        gains[trial.number] = (
            f"{paired([trial.correct], [baseline.correct])} at {ratio:.2f}x of trial {baseline.number}"
        )
    return gains


def _non_dominated(by_cost: Sequence[TrialRecord]) -> tuple[TrialRecord, ...]:
    """Of complete trials by rising cost, those that no other beats."""
    return tuple(by_cost[i] for i in non_dominated([objectives(trial) for trial in by_cost], BETTER))


def hypervolume_over_time(records: Sequence[TrialRecord], cheapest: float) -> list[Progress]:
    """The hypervolume after every complete trial, in the order in which they ended.

    Raises:
        CostError: `cheapest` is no cost.
    """
    started_s = min((trial.started_s for trial in records), default=0.0)
    points: list[tuple[float, float]] = []
    progress: list[Progress] = []
    hypervolume = share_dominated([], cheapest)
    for trial in sorted(_complete(records), key=_ended_s):
        points.append(objectives(trial))
        on_front = non_dominated(points, BETTER)
        reached = on_front[-1] == len(points) - 1
        points = [points[i] for i in on_front]
        if reached:
            hypervolume = share_dominated(points, cheapest)
        progress.append(Progress(len(progress) + 1, _ended_s(trial) - started_s, hypervolume))
    return progress


_PICK = re.compile(r"(?P<property>knee|best)|trial:(?P<number>\d+)|(?P<bound>cost<=|accuracy>=)(?P<value>.+)")


def pick(records: Sequence[TrialRecord], text: str) -> TrialRecord:
    """The trial that a text names: `knee`, `best`, `trial:7`, `cost<=0.5`, `accuracy>=0.87`.

    A bound picks from the front: the most accurate trial within a cost, the cheapest with an accuracy. A number picks
    any complete trial.

    Raises:
        RunError: the text has another form, or there is no such trial.
    """
    match = _PICK.fullmatch("".join(text.split()))
    value = _number(match["value"]) if match is not None and match["bound"] else 0.0
    if match is None or value is None:
        raise RunError(f"cannot pick '{text}': write knee, best, trial:7, cost<=0.5 or accuracy>=0.87")
    if match["number"] is not None:
        number = int(match["number"])
        named = next((trial for trial in records if trial.number == number), None)
        if named is None:
            numbers = [trial.number for trial in records]
            have = f"the trials are {min(numbers)} to {max(numbers)}" if numbers else "there is none yet"
            raise RunError(f"no trial {number}: {have}")
        objectives(named)
        return named
    front = pareto_front(records)
    if match["bound"] == "cost<=":
        return front.at_most(value)
    if match["bound"] == "accuracy>=":
        return front.at_least(value)
    return front.knee if match["property"] == "knee" else front.best


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


def _ended_s(trial: TrialRecord) -> float:
    return trial.started_s + trial.wall.total_s


def share_dominated(points: Sequence[tuple[float, float]], cheapest: float) -> float:
    """The hypervolume, by the module's convention, of points (accuracy, relative cost).

    Raises:
        CostError: `cheapest` is no cost.
    """
    import moocore  # here, because a front without a hypervolume needs nothing beyond Python

    if not cheapest > 0:
        raise CostError(f"the cheapest config must have a relative cost above 0, got {cheapest:g}")
    if cheapest >= 1 or not points:  # nothing is cheaper than the reference
        return 0.0
    unit = [(1 - accuracy, max(0.0, 1 - log2(cost) / log2(cheapest))) for accuracy, cost in points]
    return float(moocore.hypervolume(unit, ref=_REFERENCE_POINT))
