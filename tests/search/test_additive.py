"""The sampler that asks an integer program, on a landscape whose best front is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from drive import make_space, relative_cost, truth

from mpsearch.cost.model import RelativeCost
from mpsearch.graph.facts import LayerInfo
from mpsearch.metric import TOP1
from mpsearch.precision import PrecisionConfig
from mpsearch.program import Program
from mpsearch.record import TrialRecord
from mpsearch.search.additive import AdditiveSampler, Knowledge, fall
from mpsearch.search.controller import SearchController
from mpsearch.search.front import ScoreRange, pareto_front
from mpsearch.space.build import build_space
from mpsearch.space.space import SearchSpace
from mpsearch.space.spec import parse_space
from mpsearch.study import SearchSpec

pytestmark = pytest.mark.study

LAYERS = 10
BUDGETS = (0.6, 0.4, 0.3, 0.2)


class Landscape:
    """Divergence is the square of a sum over slots; cost is that of multiply-accumulates."""

    def __init__(self, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        layers = [
            LayerInfo(
                f"l{i}", "conv2d", (8, 4, 3, 3), (4, 6, 6), (8, 6, 6), int(random.integers(10_000, 90_000)), 288, 36,
                input_group=f"l{i}", weight_group=f"l{i}",
            )
            for i in range(LAYERS)
        ]  # fmt: skip
        rule = {"match": "*", "weight": ["uniform:2-8"], "activation": ["uniform:2-8"]}
        spec = parse_space({"name": "known", "rules": [rule], "first": "search", "last": "search"})
        self.space: SearchSpace = build_space(spec, tuple(layers))
        self.cost = RelativeCost(layers)
        self.factors = random.lognormal(sigma=1.0, size=len(self.space.slots)) / LAYERS
        self.effects = [
            [f * 2.0**-c.bits for c in slot.choices] for slot, f in zip(self.space.slots, self.factors, strict=True)
        ]

    def divergence(self, config: PrecisionConfig) -> float:
        slots = zip(self.space.slots, self.effects, strict=True)
        return (
            math.fsum(
                effects[slot.choices.index(getattr(config[slot.layers[0]], slot.tensor))] for slot, effects in slots
            )
            ** 2
        )

    def best(self, budget: float) -> float:
        """The least divergence that there is within a budget."""
        return self.divergence(Program(self.space, self.cost).solve(self.effects, budget)[0].config)

    def search(self, sampler: str, trials: int, knowledge: Knowledge, program: bool = True) -> list[TrialRecord]:
        spec = SearchSpec(sampler=sampler, trials=trials)  # type: ignore[arg-type]
        cost = self.cost if program else lambda config: self.cost(config)
        search = SearchController(self.space, cost, spec, TOP1, knowledge=knowledge)
        records = []
        while (proposal := search.ask()) is not None:
            divergence = self.divergence(proposal.config)
            record = TrialRecord(proposal.config, "complete", score=math.exp(-divergence), divergence=divergence)
            records.append(search.tell(proposal, record))
        return records

    def excess(self, records: Sequence[TrialRecord]) -> float:
        """How many times as far from float as the best possible, in nats over all budgets."""
        within = [min(r.divergence or 0.0 for r in records if (r.cost or 0.0) <= b) for b in BUDGETS]
        return sum(within) / sum(map(self.best, BUDGETS))


def test_it_finds_the_best_front_where_random_does_not() -> None:
    known = Landscape()
    random = np.random.default_rng(5)
    starts = [(config, 3 * known.divergence(config)) for config in (known.space.sample(random) for _ in range(60))]
    ours = known.excess(known.search("additive", 40, Knowledge(starts)))
    theirs = known.excess(known.search("random", 100, Knowledge()))
    assert ours < 1.15
    assert theirs > 2


@pytest.mark.slow
def test_without_start_scores_it_learns_from_trials_alone() -> None:
    known = Landscape(seed=1)
    ours = known.excess(known.search("additive", 40, Knowledge()))
    theirs = known.excess(known.search("surrogate", 40, Knowledge()))
    assert ours < theirs


def test_without_a_program_children_of_the_front_are_searched() -> None:
    known = Landscape()
    ours = known.excess(known.search("additive", 60, Knowledge(), program=False))
    theirs = known.excess(known.search("surrogate", 60, Knowledge(), program=False))
    assert ours < 1.6 < theirs


def test_a_cost_that_no_program_can_keep_and_scores_without_divergence_are_searched_too() -> None:
    def hypervolume(sampler: str) -> float:
        space = make_space(12)
        search = SearchController(space, relative_cost, SearchSpec(sampler=sampler, trials=25), TOP1)  # type: ignore[arg-type]
        records = []
        while (proposal := search.ask()) is not None:
            records.append(search.tell(proposal, TrialRecord(proposal.config, "complete", truth(proposal.config))))
        return pareto_front(records, TOP1).hypervolume(relative_cost(space.uniform(1)), ScoreRange(0.0, 1.0))

    assert hypervolume("additive") > hypervolume("random")


def test_the_metric_is_improved_where_it_is_the_objective_whatever_divergences_say() -> None:
    known, other = Landscape(), Landscape(seed=7)  # whose divergences mislead

    def found(objective: str) -> float:
        spec = SearchSpec(sampler="additive", trials=40, objective=objective)  # type: ignore[arg-type]
        random = np.random.default_rng(5)
        starts = [(config, other.divergence(config)) for config in (known.space.sample(random) for _ in range(60))]
        search = SearchController(known.space, known.cost, spec, TOP1, knowledge=Knowledge(starts))
        records, truths = [], []
        while (proposal := search.ask()) is not None:
            truth, misleading = (each.divergence(proposal.config) for each in (known, other))
            record = TrialRecord(proposal.config, "complete", score=math.exp(-truth), divergence=misleading)
            records.append(search.tell(proposal, record))
            truths.append(replace(records[-1], divergence=truth))
        return known.excess(truths)

    assert found("metric") < 1.6 < found("divergence")


def test_no_proposal_is_above_the_budget() -> None:
    known = Landscape()
    spec = SearchSpec(sampler="additive", trials=12)
    search = SearchController(known.space, known.cost, spec, TOP1, budget=0.3)
    while (proposal := search.ask()) is not None:
        assert proposal.cost <= 0.3
        divergence = known.divergence(proposal.config)
        search.tell(proposal, TrialRecord(proposal.config, "complete", math.exp(-divergence), divergence=divergence))


def test_fall_of_a_front_counts_octaves_of_cost_times_harm() -> None:
    known = [(-2.0, 1.0), (-1.0, 0.5)]  # and 0.5 up to the reference, at 0
    assert fall(known, -1.5, 0.6) == pytest.approx(0.5 * 0.4)
    assert fall(known, -1.5, 0.1) == pytest.approx(0.5 * 0.9 + 1.0 * 0.4)
    assert fall(known, -1.0, 0.5) == 0.0
    assert fall(known, -3.0, 1.2) == pytest.approx(1.0 * 0.3)  # left of all: harm counts as 1.5 there
    assert fall(known, 0.5, 0.1) == 0.0


def test_gaps_begin_at_the_cheapest_config_there_is() -> None:
    known = Landscape()
    cheapest = math.log2(known.cost.bounds(known.space.options)[0])
    sampler = AdditiveSampler(known.space, known.cost, Knowledge(), seed=0)
    assert sorted(sampler._gaps([(-0.5, 1.0), (-0.2, 0.1)])) == [(cheapest, -0.5), (-0.5, -0.2), (-0.2, 0.0)]
