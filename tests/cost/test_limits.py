"""Limits: several bounds at once, each in its unit, kept by whoever proposes configs."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch

from mpsearch.cost.model import Bound, RelativeCost, affordable
from mpsearch.errors import CostError, RunError
from mpsearch.facts import price_study
from mpsearch.graph.facts import LayerInfo
from mpsearch.metric import TOP1
from mpsearch.precision import PrecisionConfig
from mpsearch.problem import check_limits
from mpsearch.program import Program
from mpsearch.record import TrialRecord
from mpsearch.search.controller import SearchController
from mpsearch.search.front import pick
from mpsearch.space.build import build_space
from mpsearch.space.space import SearchSpace
from mpsearch.space.spec import parse_space
from mpsearch.study import SearchSpec, parse_study
from mpsearch.warmstart.descent import BitCost, _limits, within_bounds
from mpsearch.warmstart.start import least_cost


def layer(i: int, macs: int) -> LayerInfo:
    shape = (8, 4 + i, 3, 3)
    return LayerInfo(
        f"l{i}", "conv2d", shape, (4 + i, 6, 6), (8, 6, 6), macs, 36 * (4 + i), 9 * (4 + i), False,
        input_group=f"l{i}", weight_group=f"l{i}",
    )  # fmt: skip


LAYERS = [layer(i, macs) for i, macs in enumerate((40_000, 3_000, 12_000))]


def space_for(*choices: str, activation: tuple[str, ...] = ()) -> SearchSpace:
    rule = {"match": "*", "weight": list(choices), "activation": list(activation or choices)}
    document = {"name": "test", "rules": [rule], "first": "search", "last": "search"}
    return build_space(parse_space(document), LAYERS)


def every_config(space: SearchSpace) -> list[PrecisionConfig]:
    values = [[slot.value(choice) for choice in slot.choices] for slot in space.free]
    names = [slot.parameter for slot in space.free]
    return [space.config_of(dict(zip(names, chosen, strict=True))) for chosen in product(*values)]


def study(**cost: object):
    return parse_study(
        {"name": "s", "task": {"factory": "m:f"}, "space": "uniform", "cost": {"model": "shift_energy", **cost}}
    )


def limited(**limits: object) -> RelativeCost:
    return price_study(study(limits=limits), LAYERS)[0]


def middle(space: SearchSpace, model: str) -> float:
    """A bound in the middle of what a cost can be, relative."""
    low, high = RelativeCost(LAYERS, model).bounds(space.options)
    return (low * high) ** 0.5


@pytest.mark.parametrize(
    "others", [("weight_bytes",), ("activation_bytes_peak",), ("weight_bytes", "activation_bytes")]
)
def test_the_program_keeps_all_limits_and_is_exact(others: tuple[str, ...]) -> None:
    space = space_for("uniform:2", "uniform:5", "shift:3")
    cost = limited(**{name: f"{100 * middle(space, name)} %" for name in others})
    random = np.random.default_rng(3)
    values = [list(random.lognormal(size=len(slot.choices))) for slot in space.slots]

    def value(config: PrecisionConfig) -> float:
        return sum(
            values[i][slot.choices.index(getattr(config[slot.layers[0]], slot.tensor))]
            for i, slot in enumerate(space.slots)
        )

    configs = every_config(space)
    within = [config for config in configs if cost.within_limits(config)]
    assert 0 < len(within) < len(configs)
    budget = sorted(map(cost, within))[len(within) // 3]
    best = sorted(value(config) for config in within if cost(config) <= budget)[:3]
    found = Program(space, cost).solve(values, budget, count=3)
    assert [value(a.config) for a in found] == pytest.approx(best)
    assert all(cost.within_limits(a.config) and a.cost <= budget for a in found)
    assert least_cost(space, cost) == pytest.approx(min(map(cost, within)))


def test_limits_that_cannot_be_kept_together_are_refused_with_the_nearest_config() -> None:
    space = space_for("shift:5", "uniform:6", activation=("uniform:4",))  # fewer bytes against less energy
    configs, models = every_config(space), ("weight_bytes", "activation_bytes", "shift_energy")
    costs = {name: RelativeCost(LAYERS, name) for name in models}
    pairs = [(costs["weight_bytes"](c), costs["shift_energy"](c)) for c in configs]
    weight = min(w for w, _ in pairs)
    energy = min(e for w, e in pairs if w == weight)  # of what has the fewest bytes of weights
    cheapest = min(e for _, e in pairs)
    assert cheapest < energy, "otherwise the two do not conflict"
    check_limits(
        study(limits={"weight_bytes": f"{100.001 * weight} %"}), space, limited(weight_bytes=f"{100.001 * weight} %")
    )
    both = {"weight_bytes": f"{100.001 * weight} %", "shift_energy": (cheapest + energy) / 2}
    with pytest.raises(
        CostError, match=r"each can be kept, but no config .* keeps all .* nearest config has weight_bytes"
    ):
        check_limits(study(limits=both), space, limited(**both))
    alone = {"weight_bytes": "3 B"}
    with pytest.raises(CostError, match=r"no config .* has weight_bytes <= 3 B; the least there is is \d+ B"):
        check_limits(study(limits=alone), space, limited(**alone))
    excess, config = Program(space, limited(**both)).least_excess()
    bounds = limited(**both).limits
    assert excess == pytest.approx(min(max(b.cost(c) / b.most for b in bounds) for c in configs))
    assert excess == pytest.approx(max(b.cost(config) / b.most for b in bounds))


def test_a_limit_in_the_unit_of_another_cost_is_refused() -> None:
    with pytest.raises(CostError, match=r"weight_bytes is 3 pJ, but weight_bytes is counted in bytes"):
        limited(weight_bytes="3 pJ")


@pytest.mark.parametrize("sampler", ["additive", "surrogate", "nsga2", "random"])
def test_the_controller_proposes_nothing_above_a_limit(sampler: str) -> None:
    space = space_for("uniform:1-8")
    cost = limited(weight_bytes=f"{100 * middle(space, 'weight_bytes')} %", activation_bytes_peak="70 %")
    search = SearchController(
        space, cost, SearchSpec(sampler=sampler, trials=30), TOP1, priced=lambda c: {"shift_energy": cost(c)}
    )
    count = 0
    while (proposal := search.ask()) is not None:
        assert affordable(cost, proposal.config, math.inf)
        record = search.tell(proposal, TrialRecord(proposal.config, "complete", score=min(1.0, proposal.cost)))
        assert record.costs == {"shift_energy": proposal.cost}
        count += 1
    assert count == 30
    assert search.over_budget > 0


def test_the_descent_keeps_limits_that_are_sums() -> None:
    space = space_for("uniform:1-8")
    cost = limited(weight_bytes="50 %", activation_bytes="90 %")
    price = BitCost(cost, space)
    low, high = (torch.tensor([bits] * len(space.slots), dtype=torch.float64) for bits in (1, 8))
    limits = _limits(cost, space, high)
    bits, binding = within_bounds(price, limits, high, low, high, 0.35, 1.0)
    assert float(price(bits)) == pytest.approx(0.35, rel=0.01)
    for limit in limits:
        assert float(limit.price(bits)) <= limit.most * (1 + 1e-6)
    assert binding[0][0] is limits[0]
    weights = torch.tensor([slot.tensor == "weight" for slot in space.slots])
    assert bits[weights].max() < bits[~weights].min()  # only what the tight limit prices goes down for it


def record(number: int, score: float, cost: float, weights: float) -> TrialRecord:
    config = PrecisionConfig({})
    return TrialRecord(config, "complete", score, cost, number=number, costs={"weight_bytes": weights})


def test_a_pick_takes_any_cost() -> None:
    trials = [record(0, 0.9, 0.5, 3000), record(1, 0.8, 0.3, 900), record(2, 0.7, 0.4, 500), record(3, 0.8, 0.2, 950)]
    references = {"weight_bytes": RelativeCost(LAYERS, "weight_bytes").reference}
    total = references["weight_bytes"].total
    assert pick(trials, "weight_bytes<=1KiB", TOP1, references).number == 3
    assert pick(trials, f"weight_bytes <= {100 * 600 / total}%", TOP1, references).number == 2
    with pytest.raises(RunError, match=r"no trial has weight_bytes<=3B: the least of each is weight_bytes 500 B"):
        pick(trials, "weight_bytes<=3B", TOP1, references)
    with pytest.raises(RunError, match="there is no unit 'KiX'"):
        pick(trials, "weight_bytes<=3KiX", TOP1, references)
    with pytest.raises(RunError, match="a cost is one of weight_bytes"):
        pick(trials, "weigh_bytes<=3KiB", TOP1, references)


def test_octaves_are_at_most_0_within() -> None:
    space = space_for("uniform:1-8")
    bound = Bound("bops", RelativeCost(LAYERS, "bops"), 0.25, "0.25")
    assert bound.octaves(space.uniform(4)) == 0.0
    assert bound.octaves(space.uniform(8)) == 2.0
