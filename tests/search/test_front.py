"""The front: known optima, brute force, and what each pick means."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpsearch.errors import CostError, RunError
from mpsearch.metric import TOP1
from mpsearch.precision import LayerPrecision, PrecisionConfig
from mpsearch.record import Origin, TrialRecord, TrialState, WallTime, pack
from mpsearch.search.compare import paired
from mpsearch.search.front import (
    Progress,
    ScoreRange,
    gains_over_baselines,
    hypervolume_over_time,
    objectives,
    pareto_front,
    pick,
)

SHARES = ScoreRange(0.0, 1.0)
CONFIG = PrecisionConfig({"fc": LayerPrecision.shorthand("w4a4")})


def trial(
    number: int, cost: float, accuracy: float, origin: Origin = "sampler", ended_s: float | None = None
) -> TrialRecord:
    """A complete trial that ran for one second."""
    started_s = 100.0 + (number if ended_s is None else ended_s - 1)
    wall = WallTime(train_s=1.0)
    return TrialRecord(CONFIG, "complete", accuracy, cost, number=number, origin=origin, wall=wall, started_s=started_s)


def broken(number: int, state: TrialState = "failed", reason: str = "out of memory") -> TrialRecord:
    return TrialRecord(CONFIG, state, number=number, reason=reason, started_s=100.0)


def numbers(trials: object) -> list[int]:
    return [trial.number for trial in trials]  # type: ignore[attr-defined]


STUDY = [
    trial(0, 1.0, 0.90, "uniform"),
    trial(1, 0.25, 0.80, "uniform"),
    trial(2, 0.5, 0.88),
    trial(3, 0.5, 0.85),  # dominated by 2
    trial(4, 0.125, 0.50),
    broken(5),
    trial(6, 0.25, 0.80),  # equals 1, later
    trial(7, 0.3, 0.79),  # dominated by 1
]

points = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12)), max_size=25)


def test_front_holds_the_nondominated_by_rising_cost() -> None:
    assert numbers(pareto_front(STUDY, TOP1)) == [4, 1, 2, 0]


def test_front_keeps_the_earliest_of_equal_trials() -> None:
    assert numbers(pareto_front([trial(3, 0.5, 0.8), trial(1, 0.5, 0.8)], TOP1)) == [3]


def test_front_ignores_what_did_not_complete_or_is_no_number() -> None:
    records = [broken(0), broken(1, "stopped"), trial(2, 0.5, float("nan")), trial(3, 0.5, 0.1)]
    assert numbers(pareto_front(records, TOP1)) == [3]


@given(points)
def test_front_agrees_with_brute_force(values: list[tuple[int, int]]) -> None:
    records = [trial(i, cost / 10, accuracy / 12) for i, (cost, accuracy) in enumerate(values)]
    expected = {
        (cost, accuracy)
        for cost, accuracy in values
        if not any(c <= cost and a >= accuracy and (c, a) != (cost, accuracy) for c, a in values)
    }
    front = pareto_front(records, TOP1)
    assert numbers(front) == [values.index(point) for point in sorted(expected)]


def test_hypervolume_is_the_dominated_share_of_the_square() -> None:
    # cheapest 1/16: log2 cost 0, -1, -2, -3 lie at 1, 3/4, 1/2, 1/4 of the axis
    expected = 0.50 * (2 / 4 - 1 / 4) + 0.80 * (3 / 4 - 2 / 4) + 0.88 * (1 - 3 / 4)
    assert pareto_front(STUDY, TOP1).hypervolume(1 / 16, SHARES) == pytest.approx(expected)


def test_hypervolume_is_1_for_no_error_at_the_cheapest_and_0_at_the_reference() -> None:
    assert pareto_front([trial(0, 1 / 16, 1.0)], TOP1).hypervolume(1 / 16, SHARES) == pytest.approx(1.0)
    assert pareto_front([trial(0, 1.0, 1.0), trial(1, 2.0, 1.0)], TOP1).hypervolume(1 / 16, SHARES) == 0.0
    assert pareto_front([], TOP1).hypervolume(1 / 16, SHARES) == 0.0
    assert pareto_front([trial(0, 1.5, 1.0)], TOP1).hypervolume(1.2, SHARES) == 0.0


def test_hypervolume_refuses_what_is_no_cost() -> None:
    with pytest.raises(CostError, match="relative cost above 0, got 0"):
        pareto_front(STUDY, TOP1).hypervolume(0.0, SHARES)


@given(points)
def test_hypervolume_agrees_with_counting_cells(values: list[tuple[int, int]]) -> None:
    """Costs 2^-12 .. 2^-1 and accuracies in twelfths: the square is a 12 x 12 grid of equal cells."""
    records = [trial(i, 2.0**-cost, accuracy / 12) for i, (cost, accuracy) in enumerate(values)]
    cells = sum(any(accuracy > y and cost > x for cost, accuracy in values) for x in range(12) for y in range(12))
    assert pareto_front(records, TOP1).hypervolume(2.0**-12, SHARES) == pytest.approx(cells / 144)


def test_hypervolume_over_time_follows_the_order_of_ending() -> None:
    records = [
        trial(0, 1 / 4, 0.8, ended_s=9.0),
        trial(1, 1 / 2, 0.6, ended_s=3.0),
        trial(2, 1 / 2, 0.5, ended_s=5.0),
        broken(3),
    ]
    assert hypervolume_over_time(records, 1 / 16, TOP1, SHARES) == [
        Progress(1, 3.0, pytest.approx(0.6 * 1 / 4), "sampler", 0),
        Progress(2, 5.0, pytest.approx(0.6 * 1 / 4), "sampler", 0),
        Progress(3, 9.0, pytest.approx(0.8 * 2 / 4), "sampler", 0),
    ]


@given(points)
def test_hypervolume_over_time_never_falls_and_ends_at_the_front(values: list[tuple[int, int]]) -> None:
    records = [trial(i, 2.0**-cost, accuracy / 12) for i, (cost, accuracy) in enumerate(values)]
    progress = [step.hypervolume for step in hypervolume_over_time(records, 2.0**-12, TOP1, SHARES)]
    assert progress == sorted(progress)
    assert [0.0, *progress][-1] == pytest.approx(pareto_front(records, TOP1).hypervolume(2.0**-12, SHARES))


def test_knee_is_farthest_above_the_chord_in_log_cost() -> None:
    # chord from (1/16, 0.1) to (1, 0.9): on it lies 0.5 at 1/4. On a linear cost axis trial 3 would win.
    records = [trial(0, 1 / 16, 0.1), trial(1, 1.0, 0.9), trial(2, 1 / 4, 0.70), trial(3, 1 / 8, 0.45)]
    assert pareto_front(records, TOP1).knee.number == 2
    assert pareto_front([*records, trial(4, 1 / 8, 0.55)], TOP1).knee.number == 4


@pytest.mark.parametrize("count", [1, 2])
def test_knee_of_one_or_two_trials_is_the_best(count: int) -> None:
    front = pareto_front([trial(0, 0.5, 0.9), trial(1, 0.25, 0.4)][:count], TOP1)
    assert front.knee.number == front.best.number == 0


def test_knee_is_never_a_trial_below_the_chord() -> None:
    assert pareto_front([trial(0, 1 / 4, 0.1), trial(1, 1 / 2, 0.2), trial(2, 1.0, 0.9)], TOP1).knee.number == 2


@pytest.mark.parametrize(("cost", "expected"), [(2.0, 0), (0.6, 0), (0.45, 1), (0.01, 1), (0.5, 1)])
def test_nearest_uniform_is_nearest_in_log_cost_and_the_cheaper_of_two(cost: float, expected: int) -> None:
    uniform = pareto_front(STUDY, TOP1).nearest_uniform(cost)
    assert uniform is not None
    assert uniform.number == expected


def test_nearest_uniform_of_no_ladder_is_none() -> None:
    assert pareto_front([trial(0, 0.5, 0.9)], TOP1).nearest_uniform(0.5) is None


def test_ladder_keeps_dominated_uniform_trials() -> None:
    assert numbers(pareto_front([trial(0, 0.5, 0.5, "uniform"), trial(1, 0.4, 0.6)], TOP1).ladder) == [0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("best", 0),
        ("knee", 1),
        ("trial:3", 3),  # not on the front
        ("3", 3),
        ("cost<=0.5", 2),
        ("cost <= .49", 1),
        ("cost<=1e3", 0),
        ("accuracy>=0.8", 1),
        ("top1>=0.8", 1),
        ("score>=0.81", 2),
        ("accuracy>=0.81", 2),
        ("accuracy>=-3.5", 4),
        ("accuracy >= - 3.5", 4),
        ("accuracy>=+.81", 2),
        ("accuracy>=-1E+1", 4),
        ("cost<=inf", 0),
    ],
)
def test_pick_finds(text: str, expected: int) -> None:
    assert pick(STUDY, text, TOP1).number == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "cost<0.5",
            r"cannot pick 'cost<0.5': write knee, best, trial:7, cost<=0.5 or top1>=X: more of top1 is better",
        ),
        ("cost<=much", r"cannot pick 'cost<=much': write"),
        ("cost<=nan", r"cannot pick 'cost<=nan': write"),
        ("accuracy>=87%", r"cannot pick 'accuracy>=87%': write"),
        ("accuracy>=", r"cannot pick 'accuracy>=': write"),
        ("knees", r"cannot pick 'knees'"),
        ("trial:9", r"no trial 9: the trials are 0 to 7"),
        ("trial:5", r"trial 5 is failed: out of memory; it has no score and cost: pick a complete one"),
        ("cost<=0.1", r"no trial costs 0.1 or less: the cheapest costs 0.125"),
        ("accuracy>=87", r"no trial has top1>=87: the best has 90.00 % \(0.87 is 87 %\)"),
    ],
)
def test_pick_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(RunError, match=message):
        pick(STUDY, text, TOP1)


@pytest.mark.parametrize("text", ["best", "knee", "cost<=1", "accuracy>=0"])
def test_pick_from_an_empty_front_is_refused(text: str) -> None:
    with pytest.raises(RunError, match="no trial is complete"):
        pick([broken(0)], text, TOP1)


def test_objectives_are_score_and_cost() -> None:
    assert objectives(trial(0, 0.5, 0.9)) == (0.9, 0.5)


def test_gain_over_the_control_is_on_the_same_samples_and_says_at_which_cost():
    random = np.random.default_rng(0)
    hard = random.random(4000)
    answers = {share: pack(share > hard) for share in (0.80, 0.84)}
    baseline = replace(trial(0, 0.5, 0.80), origin="uniform", values=answers[0.80])
    mixed = replace(trial(1, 0.4, 0.84), values=answers[0.84])
    expected = paired([answers[0.84]], [answers[0.80]], TOP1)
    assert expected.low > 0
    assert gains_over_baselines(pareto_front([baseline, mixed], TOP1)) == {
        1: f"{expected.show(TOP1)} at 0.80x of trial 0"
    }
    assert gains_over_baselines(pareto_front([baseline, replace(mixed, values=None)], TOP1)) == {}
