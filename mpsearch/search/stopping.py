"""When a trial that is halfway may stop: even its optimistic accuracy would be dominated.

    optimistic accuracy = accuracy halfway + largest gain of the finished trials nearest in cost
    bar(cost)           = best accuracy at no higher cost - that gain

gain: accuracy at the end minus accuracy halfway, at least 0. A trial below its bar stops. It is told its bar when it
starts; the front only rises meanwhile, so the bar errs on the side of going on. Trials that stop give no gains, which
errs on the same side. `replay` says what stopping would have saved, and lost, in a study that ran without it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from mpsearch.record import TrialRecord

NEAREST = 8  # finished trials whose largest gain is the optimism
LEAST = 4  # of these before any trial is stopped
MEMORY = 512
CONTROLS = ("uniform", "ilp")  # always run to their end: what the others are compared with


class Gains:
    """What finished trials gained in their second half."""

    def __init__(self) -> None:
        self._gains: deque[tuple[float, float]] = deque(maxlen=MEMORY)  # log2 cost, gain

    def learn(self, record: TrialRecord) -> None:
        """Take in a trial that has ended; only complete ones that were scored halfway say anything."""
        halfway = accuracy_halfway(record)
        if record.state == "complete" and record.accuracy is not None and record.cost and halfway is not None:
            self._gains.append((math.log2(record.cost), max(0.0, record.accuracy - halfway)))

    def bar(self, cost: float, best: float | None) -> float | None:
        """The halfway accuracy below which a trial is dominated; None: too little is known.

        Args:
            cost: relative, of the trial.
            best: the best accuracy known at no higher cost; None: there is none.
        """
        if best is None or len(self._gains) < LEAST:
            return None
        nearest = sorted(self._gains, key=lambda item: abs(item[0] - math.log2(cost)))[:NEAREST]
        return best - max(gain for _, gain in nearest)


def accuracy_halfway(record: TrialRecord) -> float | None:
    """The accuracy of a trial at the middle of its fine-tune, if it was taken."""
    return record.curve[1][1] if len(record.curve) == 3 else None


@dataclass(frozen=True, slots=True)
class Replay:
    """What stopping would have done to a study."""

    stopped: tuple[int, ...]  # numbers of the trials
    lost: tuple[int, ...]  # those of them that are on the front
    saved_s: float  # wall time of the trials that they would not have used
    total_s: float


def replay(records: Sequence[TrialRecord]) -> Replay:
    """Go through the trials of a study that ran without stopping, in the order of their numbers."""
    from mpsearch.search.front import pareto_front

    gains, known = Gains(), list[TrialRecord]()
    stopped: list[TrialRecord] = []
    for record in sorted(records, key=lambda r: r.number):
        halfway = accuracy_halfway(record)
        if record.state != "complete" or record.cost is None or record.accuracy is None:
            continue
        best = max((r.accuracy for r in known if r.cost <= record.cost), default=None)  # type: ignore[type-var,operator]
        bar = gains.bar(record.cost, best)
        if record.origin not in CONTROLS and bar is not None and halfway is not None and halfway < bar:
            stopped.append(record)
            continue
        known.append(record)
        gains.learn(record)
    front = {trial.number for trial in pareto_front(records)}
    return Replay(
        tuple(r.number for r in stopped),
        tuple(r.number for r in stopped if r.number in front),
        sum(r.wall.train_s / 2 for r in stopped),
        sum(r.wall.total_s for r in records),
    )
