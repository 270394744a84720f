"""Stopping: thresholds from starts and gains, and the replay of a study."""

from __future__ import annotations

from dataclasses import replace

import pytest
from drive import make_space

from mpsearch.metric import TOP1
from mpsearch.record import TrialRecord, WallTime
from mpsearch.search.stopping import LEAST, NEAREST, OPTIMISM, SLACK, Stopping, replay, score_halfway

CONFIGS = make_space().neighbours(make_space().ladder()[3])


def ended(number: int, cost: float, halfway: float, accuracy: float, **changes: object) -> TrialRecord:
    record = TrialRecord(
        CONFIGS[number % len(CONFIGS)],
        "complete",
        score=accuracy,
        cost=cost,
        number=number,
        origin="sampler",
        curve=((0, 0.1), (75, halfway), (150, accuracy)),
        wall=WallTime(1.0, 8.0, 1.0),
    )
    return replace(record, **changes)  # type: ignore[arg-type]


def learned(*records: TrialRecord) -> Stopping:
    stopping = Stopping(TOP1)
    for record in records:
        stopping.learn(record)
    return stopping


def test_no_bar_before_enough_is_known() -> None:
    few = [ended(i, 0.5, 0.6, 0.7) for i in range(LEAST - 1)]
    assert learned(*few).thresholds(0.5, 0.8).halfway is None
    assert learned(*few, ended(9, 0.5, 0.6, 0.7)).thresholds(0.5, None).halfway is None
    assert learned(*few, ended(9, 0.5, 0.6, 0.7)).thresholds(0.5, 0.8).halfway == pytest.approx(0.8 - OPTIMISM * 0.1)


def test_bar_is_the_best_accuracy_less_the_largest_gain_of_the_nearest_in_cost() -> None:
    near = [ended(i, 0.5, 0.6, 0.6 + 0.01 * i) for i in range(NEAREST)]
    far = ended(20, 0.05, 0.2, 0.9)
    assert learned(*near, far).thresholds(0.5, 0.8).halfway == pytest.approx(0.8 - OPTIMISM * 0.01 * (NEAREST - 1))
    assert learned(*near, far).thresholds(0.05, 0.8).halfway == pytest.approx(0.8 - OPTIMISM * 0.7)


def test_losses_are_no_optimism_and_stopped_trials_teach_nothing() -> None:
    falling = [ended(i, 0.5, 0.9, 0.8) for i in range(LEAST)]
    assert learned(*falling).thresholds(0.5, 0.85).halfway == pytest.approx(0.85)
    stopped = [ended(i, 0.5, 0.1, 0.1, state="stopped", curve=((0, 0.1), (75, 0.1))) for i in range(LEAST)]
    assert learned(*stopped).thresholds(0.5, 0.85).halfway is None
    assert score_halfway(stopped[0]) is None


def test_replay_stops_what_is_hopeless_and_says_what_it_saved() -> None:
    good = [ended(i, 0.5, 0.80, 0.85 + i / 1000) for i in range(6)]
    hopeless, baseline = ended(6, 0.6, 0.30, 0.40), ended(7, 0.6, 0.30, 0.40, origin="uniform")
    cheap = ended(8, 0.1, 0.30, 0.40)  # nothing is known at its cost
    found = replay([*good, hopeless, baseline, cheap], TOP1)
    assert found.stopped == (6,)
    assert found.lost == ()
    assert (found.saved_s, found.total_s) == (4.0, 90.0)


def test_replay_admits_a_front_point_that_stopping_would_have_lost() -> None:
    good = [ended(i, 0.5, 0.80, 0.85) for i in range(6)]
    late = ended(6, 0.6, 0.60, 0.95)
    assert replay([*good, late], TOP1).lost == (6,)


def test_a_start_is_held_against_the_nearest_to_float_at_no_higher_cost() -> None:
    dear, cheap = ended(0, 0.5, 0.8, 0.9, start_divergence=0.1), ended(1, 0.3, 0.7, 0.8, start_divergence=0.4)
    worse = ended(2, 0.4, 0.7, 0.8, start_divergence=0.6)
    known = learned(dear, cheap, worse)
    assert known.thresholds(0.2, None).start is None
    assert known.thresholds(0.3, None).start == known.thresholds(0.49, None).start == pytest.approx(SLACK * 0.4)
    assert known.thresholds(0.6, None).start == pytest.approx(SLACK * 0.1)


def test_a_stopped_trial_is_foreseen_to_gain_what_others_of_its_cost_did() -> None:
    finished = [ended(i, 0.5, 0.6, 0.6 + 0.01 * i) for i in range(5)]  # from 0.1 at the start
    known = learned(*finished)
    at_start = ended(9, 0.5, 0.0, 0.3, state="stopped", curve=((0, 0.3),))
    halfway = ended(9, 0.5, 0.0, 0.3, state="stopped", curve=((0, 0.1), (75, 0.3)))
    assert known.foreseen(at_start) == pytest.approx(0.3 + 0.52)
    assert known.foreseen(halfway) == pytest.approx(0.3 + 0.02)
    assert known.foreseen(finished[0]) == 0.6
    assert Stopping(TOP1).foreseen(at_start) == 0.3
    assert known.foreseen(replace(at_start, score=0.7)) == 1.0


def test_gains_from_the_start_are_learned_without_scores_halfway() -> None:
    unwatched = [replace(r, curve=(r.curve[0], r.curve[2])) for r in (ended(i, 0.5, 0.6, 0.7) for i in range(LEAST))]
    known = learned(*unwatched)
    assert known.thresholds(0.5, 0.8).halfway is None
    assert known.foreseen(ended(9, 0.5, 0.0, 0.3, state="stopped", curve=((0, 0.3),))) == pytest.approx(0.3 + 0.6)


def test_replay_saves_the_whole_training_of_what_starts_too_far_from_float() -> None:
    near = ended(0, 0.5, 0.8, 0.9, start_divergence=0.2)
    far = ended(1, 0.6, 0.8, 0.85, start_divergence=0.7)
    baseline = ended(2, 0.6, 0.8, 0.85, start_divergence=0.7, origin="uniform")
    found = replay([near, far, baseline], TOP1)
    assert (found.stopped, found.lost, found.saved_s) == ((1,), (), 8.0)
