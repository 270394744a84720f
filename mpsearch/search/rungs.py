"""Rungs: every config trains briefly, and the promising ones longer. Which go on is decided here, by pure functions.

Asynchronous successive halving (ASHA, Li et al., arXiv 1810.05934): of the n configs that have ended a rung, the best
n / eta go on to the next; whoever looks for work takes one of these that has not gone on yet, from the longest rung
down, and where there is none starts a new config. Nothing waits for a rung to be full.

How we differ: there are two objectives. Configs are compared within a stratum of cost, so that every budget has
candidates on every rung; strata are of equal width in log cost. Within one the order is

    1. by how many configs of the rung are better at no higher cost: none for those that the rung's front is made of
    2. by value (the divergence, or the metric), more is better

because by value alone the dearest of a stratum would always be first. (MO-ASHA, arXiv 2106.12639, sorts all configs by
dominance and spreads them by an epsilon-net; strata say more plainly what each budget gets.)

On a rung of s steps the learning rate falls in the last half (`train.FALLING`), and what is scored is the end of that
fall; the next rung goes on from before it. So rungs of 60, 150 and 400 steps take 60, 120 and 325 steps of training.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpsearch.record import RungScore, TrialRecord, WallTime

STRATA = 4
"""Of cost, in which configs compete for longer rungs."""


@dataclass(frozen=True, slots=True)
class Contender:
    """A config that competes for longer rungs."""

    number: int  # of its trial
    cost: float  # relative
    values: tuple[float, ...]  # by rung that it has ended; more is better; -inf: it was stopped there
    open: bool = True  # whether it can go on: it is not running, did not fail, and has something to gain

    @property
    def rung(self) -> int:
        """The last one that it has ended."""
        return len(self.values) - 1


def promotion(
    contenders: Sequence[Contender], rungs: int, eta: int, edges: Sequence[float], running: Sequence[int] = ()
) -> Contender | None:
    """The config that goes on to its next rung; None: no rung has one to promote.

    The longest rung is looked at first; of several strata with a candidate, the one that has promoted the fewest.

    Args:
        contenders: every config that has ended a rung.
        rungs: how many there are.
        eta: one in so many goes on.
        edges: costs between the strata, rising.
        running: numbers of those that are on their next rung now.
    """
    for rung in reversed(range(rungs - 1)):
        there = [contender for contender in contenders if contender.rung >= rung]
        order = _ranks(there, rung)
        best: tuple[int, int, Contender] | None = None
        for stratum in range(len(edges) + 1):
            ranked = sorted(
                (i for i, c in enumerate(there) if bisect_right(edges, c.cost) == stratum), key=order.__getitem__
            )
            top = [there[i] for i in ranked[: len(ranked) // eta]]
            gone_on = sum(c.rung > rung or c.number in running for c in (there[i] for i in ranked))
            waiting = [c for c in top if c.rung == rung and c.open and c.number not in running]
            if waiting and (best is None or gone_on < best[0]):
                best = (gone_on, stratum, waiting[0])
        if best is not None:
            return best[2]
    return None


def strata(cheapest: float, dearest: float, count: int = STRATA) -> tuple[float, ...]:
    """The costs between `count` strata of equal width in log cost.

    >>> strata(1 / 16, 1)
    (0.125, 0.25, 0.5)
    """
    if not 0 < cheapest < dearest:
        return ()
    width = math.log2(dearest / cheapest) / count
    return tuple(cheapest * 2 ** (width * i) for i in range(1, count))


def _ranks(contenders: Sequence[Contender], rung: int) -> list[tuple[int, float, int]]:
    """What contenders are sorted by at a rung: times beaten at no higher cost, value (best first), number."""
    cost: NDArray[Any] = np.array([c.cost for c in contenders])
    value: NDArray[Any] = np.array([c.values[rung] for c in contenders])
    beaten = ((cost[:, None] <= cost) & (value[:, None] > value)).sum(axis=0)
    return [(int(b), -c.values[rung], c.number) for b, c in zip(beaten, contenders, strict=True)]


def ended_first_rung(record: TrialRecord) -> TrialRecord:
    """A trial that has ended its first rung, with the score of it."""
    steps = record.curve[-1][0] if record.curve else 0
    return replace(record, rungs=(_score_of(record, steps),))


def ended_next_rung(before: TrialRecord, record: TrialRecord, steps: int) -> TrialRecord:
    """One record of a trial and of the longer rung that it has ended, or failed on.

    Args:
        before: of the shorter rungs.
        record: of this rung alone. Where it failed, the config is worth what it was before, and the reason is added.
        steps: of this rung, in all.
    """
    wall = WallTime(
        before.wall.prepare_s + record.wall.prepare_s,
        before.wall.train_s + record.wall.train_s,
        before.wall.evaluate_s + record.wall.evaluate_s,
    )
    rungs = (*before.rungs, _score_of(record, steps))
    if record.state != "complete":
        return replace(before, wall=wall, rungs=rungs, reason=f"the rung of {steps} steps failed: {record.reason}")
    return replace(
        before,
        score=record.score,
        divergence=record.divergence,
        values=record.values,
        end_loss=record.end_loss if record.end_loss is not None else before.end_loss,
        curve=(*before.curve, *record.curve),
        wall=wall,
        peak_memory_bytes=max(before.peak_memory_bytes, record.peak_memory_bytes),
        rungs=rungs,
    )


def _score_of(record: TrialRecord, steps: int) -> RungScore:
    score = record.score if record.state == "complete" else None
    divergence = record.divergence if record.state == "complete" else None
    return RungScore(steps, score, divergence, record.wall.total_s, record.started_s + record.wall.total_s)


def goes_on(record: TrialRecord) -> bool:
    """Whether a config has something to gain from a longer rung: it was trained, and its last rung did not fail."""
    last = record.rungs[-1] if record.rungs else None
    return (
        record.state == "complete"
        and record.origin != "import"
        and last is not None
        and last.score is not None
        and last.steps > 0
    )
