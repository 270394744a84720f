"""The surrogate: its improvement against numerical integration, its model, and what it is worth."""

from __future__ import annotations

import numpy as np
import pytest
from drive import make_space, relative_cost, truth
from scipy.integrate import quad
from scipy.stats import norm

from mpsearch.metric import TOP1
from mpsearch.record import TrialRecord
from mpsearch.search.controller import SearchController
from mpsearch.search.front import ScoreRange, pareto_front
from mpsearch.search.surrogate import Children, Features, expected_improvement
from mpsearch.study import SearchSpec

SHARES = ScoreRange(0.0, 1.0)
FRONT = np.array([[0.5, -3.0], [0.7, -2.0], [0.9, -0.5]])


def dominated_area(front: list[tuple[float, float]]) -> float:
    """The area below the staircase between accuracy 0 and log2 cost 0."""
    points = sorted(front, key=lambda p: p[1])
    area, best = 0.0, 0.0
    for i, (accuracy, cost) in enumerate(points):
        best = max(best, accuracy)
        end = points[i + 1][1] if i + 1 < len(points) else 0.0
        area += best * max(0.0, min(end, 0.0) - min(cost, 0.0))
    return area


@pytest.mark.parametrize("cost", [-4.0, -2.5, -2.0, -0.2])
@pytest.mark.parametrize(("mean", "deviation"), [(0.4, 0.2), (0.8, 0.05), (0.95, 0.01)])
def test_expected_improvement_is_the_integral_of_the_hypervolume_gained(cost: float, mean: float, deviation: float):
    now = dominated_area([(a, c) for a, c in FRONT.tolist()])

    def gain(accuracy: float) -> float:
        gained = dominated_area([*((a, c) for a, c in FRONT.tolist()), (accuracy, cost)]) - now
        return float(gained * norm.pdf(accuracy, mean, deviation))

    # From 0 up: an accuracy below 0 gains nothing.
    expected = quad(gain, 0.0, mean + 8 * deviation, points=[0.5, 0.7, 0.9], limit=400)[0]
    found = expected_improvement(np.array([mean]), np.array([deviation]), np.array([cost]), FRONT)
    assert found[0] == pytest.approx(expected, abs=2e-3 * deviation)


def test_features_are_the_noise_of_each_tensor_and_their_sums():
    space = make_space(2, weights=("uniform:2-3", "shift:3"), activation="uniform:4")
    features = Features(space)
    config = space.config_of({"layer0/weight": "shift:3/channel", "layer1/weight": "uniform:2/channel"})
    row = features(space.params_of(config))
    assert row.tolist() == [0.125, 0.0, 0.0, 0.25, 0.125, 0.25]  # (shift, uniform) of either layer, then the sums


def test_a_child_has_its_parents_slots_but_for_single_steps():
    space = make_space(40)
    mother, father = (space.params_of(space.uniform(bits)) for bits in (3, 7))
    children = Children(space, seed=0, moves=2.0)
    moved = []
    for _ in range(200):
        child = children(mother, father)
        strange = [value for value in child.values() if value not in (3, 7)]
        assert set(strange) <= {2, 4, 6, 8}
        moved.append(len(strange))
    assert np.mean(moved) == pytest.approx(2.0, abs=0.4)


def test_it_finds_a_better_front_than_its_children_alone_would():
    def hypervolume(sampler: str, seed: int) -> float:
        space = make_space(12)
        search = SearchController(space, relative_cost, SearchSpec(sampler=sampler, trials=60, seed=seed), TOP1)  # type: ignore[arg-type]
        records = []
        while (proposal := search.ask()) is not None:
            record = TrialRecord(proposal.config, "complete", score=truth(proposal.config))
            records.append(search.tell(proposal, record))
        return pareto_front(records, TOP1).hypervolume(relative_cost(space.uniform(1)), SHARES)

    ours, theirs = ([hypervolume(sampler, seed) for seed in range(3)] for sampler in ("surrogate", "nsga2"))
    assert np.mean(ours) > np.mean(theirs)
