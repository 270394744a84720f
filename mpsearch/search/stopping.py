"""When a trial may stop, because whatever it can still reach is dominated.

    at the start    D > SLACK * least D of the trials that cost no more
    halfway         quality < best quality at no higher cost - OPTIMISM * largest gain of the finished trials nearest
                              in cost

D: divergence from the float network before any training, with BatchNorm re-estimated, from the weights that the warm
start has for this cost. It is the same in every run and costs a sixth of a trial, where the score after a brief
training differs from run to run by as much as configs of one cost do. Gain: quality at the end minus quality halfway,
at least 0; quality is the score, or its negative where less is better (`Metric.quality`). A trial is told its
thresholds when it starts; both only tighten meanwhile, so they err on the side of going on. Trials that stop give no
gains, which errs on the same side. `replay` says what stopping would have saved, and lost, in a study that ran without
it.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from mpsearch.metric import Metric
from mpsearch.pareto import non_dominated
from mpsearch.record import TrialRecord
from mpsearch.search.front import pareto_front

SLACK = 3.0
OPTIMISM = 2.0
"""Replayed on 70 trials of the digits study, no point of the front is lost with these two; a slack of 2 to 2.5 loses
one, of 1.5 three; an optimism of 1.5 loses one, of 1 (with a slack of 2) three. On a ResNet-20 configs of one cost that
began 1.15 to 1.8 times as far from float as the nearest ended at 0.166 to 0.253 nats, that one at 0.155 +- 0.009.
"""
NEAREST = 8  # finished trials whose largest gain is the optimism
LEAST = 4  # of these before any trial is stopped halfway
MEMORY = 512
BASELINES = ("uniform", "ilp")  # always run to their end: what the others are compared with


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What a trial must pass to go on; None: nothing is asked."""

    start: float | None = None  # the largest divergence at the start
    halfway: float | None = None  # the worst score halfway
    watched: bool = True  # whether a score is taken halfway: it costs time, and nothing but stopping needs it


NO_THRESHOLDS = Thresholds()
UNWATCHED = Thresholds(watched=False)


class Stopping:
    """What the trials that have ended say of those to come."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric
        self._gains: deque[tuple[float, float, float | None]] = deque(maxlen=MEMORY)  # log2 cost, from start, halfway
        self._ratios: deque[tuple[float, float]] = deque(maxlen=MEMORY)  # log2 cost, divergence at the end over start
        self._starts: list[tuple[float, float]] = []  # (cost, divergence) that nothing cheaper undercuts, by cost

    def learn(self, record: TrialRecord) -> None:
        """Take in a trial that has ended."""
        if record.cost is None or record.score is None:
            return
        if record.start_divergence is not None:
            self._learn_start(record.cost, record.start_divergence)
            if record.divergence is not None and record.start_divergence > 0:
                self._ratios.append((math.log2(record.cost), record.divergence / record.start_divergence))
        halfway = score_halfway(record)
        if record.state == "complete" and len(record.curve) > 1:
            whole, half = (
                None if before is None else max(0.0, self._metric.gain(record.score, before))
                for before in (record.curve[0][1], halfway)
            )
            self._gains.append((math.log2(record.cost), whole or 0.0, half))

    def thresholds(self, cost: float, best: float | None) -> Thresholds:
        """What a trial must pass.

        Args:
            cost: relative, of the trial.
            best: the best score known at no higher cost; None: there is none.
        """
        start = min((divergence for its_cost, divergence in self._starts if its_cost <= cost), default=None)
        gains = [half for _, half in self._nearest(cost, watched=True) if half is not None]
        halfway = None
        if best is not None and len(gains) >= LEAST:
            halfway = self._metric.improved(best, by=-OPTIMISM * max(gains))
        return Thresholds(None if start is None else SLACK * start, halfway)

    def foreseen(self, record: TrialRecord) -> float | None:
        """The score that a stopped trial might have reached: what it had, and the usual gain at its cost."""
        if record.cost is None or record.state != "stopped":
            return record.score
        at_start = len(record.curve) == 1
        nearest = self._nearest(record.cost, watched=not at_start)
        if record.score is None or not nearest:
            return record.score
        gain = statistics.median(whole if at_start or half is None else half for whole, half in nearest)
        return self._metric.clamped(self._metric.improved(record.score, by=gain))

    def foreseen_divergence(self, record: TrialRecord) -> float | None:
        """The divergence of a trial; of a stopped one what it might have reached, by the usual ratio at its cost."""
        if record.state != "stopped" or record.start_divergence is None or record.cost is None:
            return record.divergence
        octaves = math.log2(record.cost)
        nearest = sorted(self._ratios, key=lambda item: abs(item[0] - octaves))[:NEAREST]
        return record.start_divergence * (statistics.median(ratio for _, ratio in nearest) if nearest else 1.0)

    def _nearest(self, cost: float, watched: bool) -> list[tuple[float, float | None]]:
        """Gains of the trials nearest in cost, of those with a score halfway if `watched`."""
        known = [item for item in self._gains if item[2] is not None] if watched else self._gains
        by_distance = sorted(known, key=lambda item: abs(item[0] - math.log2(cost)))
        return [(whole, half) for _, whole, half in by_distance[:NEAREST]]

    def _learn_start(self, cost: float, divergence: float) -> None:
        starts = [*self._starts, (cost, divergence)]
        self._starts = [starts[i] for i in non_dominated(starts, (False, False))]


def score_halfway(record: TrialRecord) -> float | None:
    """The score of a trial at the middle of its fine-tune, if it was taken."""
    return record.curve[1][1] if len(record.curve) == 3 else None


@dataclass(frozen=True, slots=True)
class Replay:
    """What stopping would have done to a study."""

    stopped: tuple[int, ...]  # numbers of the trials
    lost: tuple[int, ...]  # those of them that are on the front
    saved_s: float  # wall time of the trials that they would not have used
    total_s: float


def replay(records: Sequence[TrialRecord], metric: Metric) -> Replay:
    """Go through the trials of a study that ran without stopping, in the order of their numbers."""
    known, finished = Stopping(metric), list[TrialRecord]()
    stopped: list[TrialRecord] = []
    saved_s = 0.0
    for record in sorted(records, key=lambda r: r.number):
        halfway = score_halfway(record)
        if record.state != "complete" or record.cost is None or record.score is None:
            continue
        cheaper = [r.score for r in finished if r.cost <= record.cost]  # type: ignore[operator]
        best = metric.best_of(*cheaper) if cheaper else None  # type: ignore[arg-type]
        thresholds = known.thresholds(record.cost, best)
        free = record.origin not in BASELINES
        if free and thresholds.start is not None and (record.start_divergence or 0.0) > thresholds.start:
            saved_s += record.wall.train_s
        elif (
            free
            and thresholds.halfway is not None
            and halfway is not None
            and metric.better(thresholds.halfway, than=halfway)
        ):
            saved_s += record.wall.train_s / 2
        else:
            finished.append(record)
            known.learn(record)
            continue
        stopped.append(record)
    front = {trial.number for trial in pareto_front(records, metric)}
    return Replay(
        tuple(r.number for r in stopped),
        tuple(r.number for r in stopped if r.number in front),
        saved_s,
        sum(r.wall.total_s for r in records),
    )
