"""Allocation: what enumeration finds, within the budget to the last bit, under every cost model."""

from __future__ import annotations

import dataclasses
import math
from itertools import product

import numpy as np
import pytest

from mpsearch.cost import model as cost_model
from mpsearch.cost.model import COST_MODELS, RelativeCost
from mpsearch.errors import CostError, PrecisionError, SpaceError
from mpsearch.graph.facts import LayerInfo
from mpsearch.precision import PrecisionConfig
from mpsearch.program import Program
from mpsearch.space.build import build_space
from mpsearch.space.space import SearchSpace
from mpsearch.space.spec import parse_space
from mpsearch.warmstart.allocate import (
    allocate,
    equivalent_bits,
    ilp_ladder,
    linear_change,
    noise_change,
    round_bits,
)
from mpsearch.warmstart.start import global_combinations
from mpsearch.warmstart.table import SensitivityTable


def layer(i: int, macs: int, **more) -> LayerInfo:
    shape = (8, 4 + i, 3, 3)
    facts = {"input_group": f"l{i}", "weight_group": f"l{i}"} | more
    return LayerInfo(f"l{i}", "conv2d", shape, (4 + i, 6, 6), (8, 6, 6), macs, 288, fan_in=9 * (4 + i), **facts)


def network(count: int = 3, seed: int = 0) -> list[LayerInfo]:
    """Layers of different cost; the second and third are fed by one tensor; one stays float."""
    random = np.random.default_rng(seed)
    layers = [layer(i, int(random.integers(1_000, 50_000))) for i in range(count)]
    layers[2] = dataclasses.replace(layers[2], input_group="l1", input_shape=layers[1].input_shape)
    return [*layers, layer(9, 300, reason="there is no quantized form of it")]


def space_for(layers, *choices: str, **more) -> SearchSpace:
    rule = {"match": "l[0-8]", "weight": list(choices), "activation": list(choices)}
    return build_space(
        parse_space({"name": "test", "rules": [rule], "first": "search", "last": "search", **more}), layers
    )


def random_table(space: SearchSpace, seed: int) -> SensitivityTable:
    random = np.random.default_rng(seed)
    entries = {
        (name, slot.tensor, choice): float(random.lognormal() * 4.0**-choice.bits)
        for slot in space.slots
        for name in slot.layers
        for choice in slot.choices
    }
    return SensitivityTable("kl", entries, 1, 0.0)


def every_config(space: SearchSpace) -> list[PrecisionConfig]:
    values = [[slot.value(choice) for choice in slot.choices] for slot in space.free]
    names = [slot.parameter for slot in space.free]
    return [space.config_of(dict(zip(names, chosen, strict=True))) for chosen in product(*values)]


@pytest.mark.parametrize("model", COST_MODELS)
def test_allocate_equals_enumeration_under_every_cost_model(model: str) -> None:
    layers = network()
    space = space_for(layers, "uniform:2", "uniform:5", "shift:3")
    cost = RelativeCost(layers, model)
    configs = every_config(space)
    costs = sorted(cost(config) for config in configs)
    for seed, share in enumerate((0.03, 0.3, 0.5, 0.8, 1.0)):
        table = random_table(space, seed)
        budget = costs[round(share * (len(costs) - 1))]  # the cost of some config, to the bit
        best = min(table.total(config) for config in configs if cost(config) <= budget)
        (found,) = allocate(space, cost, table, budget)
        assert found.value == pytest.approx(best, rel=1e-9)
        assert table.total(found.config) == pytest.approx(best, rel=1e-9)
        assert cost(found.config) == found.cost <= budget
        assert space.contains(found.config)


@pytest.mark.parametrize("tied", [[], [["l0", "l2"]], [["l0", "l1", "l2"]]])
def test_allocate_keeps_ties_and_is_still_exact(tied: list[list[str]]) -> None:
    layers = network(seed=1)
    space = space_for(layers, "uniform:2", "uniform:3", "uniform:6", tied=tied)
    cost, table = RelativeCost(layers), random_table(space, 7)
    configs = every_config(space)
    budget = float(np.median([cost(config) for config in configs]))
    (found,) = allocate(space, cost, table, budget)
    assert found.config["l1"].activation == found.config["l2"].activation  # fed by the same tensor
    for names in tied:
        assert len({found.config[name] for name in names}) == 1
    assert found.value == pytest.approx(min(table.total(c) for c in configs if cost(c) <= budget))


def test_allocate_gives_the_next_best_in_order_and_none_twice() -> None:
    layers = network(seed=2)
    space = space_for(layers, "uniform:2", "uniform:4", "uniform:8")
    cost, table = RelativeCost(layers), random_table(space, 3)
    configs = every_config(space)
    budget = float(np.quantile([cost(config) for config in configs], 0.4))
    best = sorted(table.total(c) for c in configs if cost(c) <= budget)
    found = allocate(space, cost, table, budget, count=12)
    assert [f.value for f in found] == pytest.approx(best[:12], rel=1e-9)
    assert len({f.config for f in found}) == 12
    within = sum(cost(c) <= cost(space.uniform(2)) * 1.05 for c in configs)
    assert len(allocate(space, cost, table, cost(space.uniform(2)) * 1.05, count=99)) == within < 99


def test_allocate_keeps_the_distance_between_solutions() -> None:
    layers = network(seed=2)
    space = space_for(layers, "uniform:2", "uniform:4", "uniform:8")
    params = [
        space.params_of(f.config) for f in allocate(space, RelativeCost(layers), random_table(space, 3), 0.4, 5, 3)
    ]
    assert len(params) == 5
    for i, one in enumerate(params):
        for other in params[:i]:
            assert sum(one[name] != other[name] for name in one) >= 3


def test_budget_is_never_passed_by_the_solver_tolerance() -> None:
    layers = [layer(i, 10_000) for i in range(8)]  # many configs whose costs lie close together
    space = space_for(layers, "uniform:2-8")
    cost = RelativeCost(layers)
    for seed in range(4):
        table = random_table(space, seed)
        for budget in (cost(space.uniform(4)), math.nextafter(cost(space.uniform(4)), 0), 0.3 + seed * 1e-8):
            (found,) = allocate(space, cost, table, budget)
            assert found.cost <= budget


def test_budget_that_a_uniform_config_meets_exactly_admits_it() -> None:
    layers = network(seed=4)
    space = space_for(layers, "uniform:2-8")
    cost = RelativeCost(layers)
    for bits in (2, 4, 8):
        uniform = space.uniform(bits)
        table = random_table(space, 0)
        entries = {key: 0.0 if getattr(uniform[key[0]], key[1]) == key[2] else value for key, value in table.items()}
        (found,) = allocate(space, cost, SensitivityTable("kl", entries, 1, 0.0), cost(uniform))
        assert found.config == uniform


def test_nan_is_never_chosen_and_a_slot_of_nothing_else_is_named() -> None:
    layers = network()
    space = space_for(layers, "uniform:2", "uniform:5")
    table = random_table(space, 0)
    broken = {key: math.nan if key[2].bits == 5 and key[0] == "l1" else value for key, value in table.items()}
    (found,) = allocate(space, RelativeCost(layers), SensitivityTable("kl", broken, 1, 0.0), 1.0)
    assert found.config["l1"].weight.bits == found.config["l1"].activation.bits == 2
    nothing = {key: math.inf if key[0] == "l1" and key[1] == "weight" else value for key, value in table.items()}
    with pytest.raises(SpaceError, match="slot 'l1/weight' has no choice with a finite"):
        allocate(space, RelativeCost(layers), SensitivityTable("kl", nothing, 1, 0.0), 1.0)


@pytest.mark.parametrize("budget", [1e-4, 0.0, -1.0, math.nan])
def test_a_budget_below_every_config_is_refused(budget: float) -> None:
    layers = network()
    space = space_for(layers, "uniform:3", "uniform:5")
    for model in ("shift_energy", "activation_bytes_peak"):
        with pytest.raises(CostError, match="none at all is cheaper than"):
            allocate(space, RelativeCost(layers, model), random_table(space, 0), budget)


def test_a_table_of_another_space_is_refused() -> None:
    layers = network()
    table = random_table(space_for(layers, "uniform:3"), 0)
    with pytest.raises(PrecisionError, match="layer 'l0' with weight uniform:4/channel"):
        allocate(space_for(layers, "uniform:3-4"), RelativeCost(layers), table, 1.0)


def test_a_cost_model_that_no_program_can_keep_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def largest_two(costs) -> float:
        return sum(sorted(costs)[-2:])

    odd = dataclasses.replace(COST_MODELS["bops"], total=largest_two)
    monkeypatch.setitem(cost_model.COST_MODELS, "odd", odd)
    layers = network()
    space = space_for(layers, "uniform:3")
    with pytest.raises(CostError, match="neither a sum nor a maximum"):
        allocate(space, RelativeCost(layers, "odd"), random_table(space, 0), 1.0)


def test_ilp_ladder_falls_in_sensitivity_as_the_budget_rises() -> None:
    layers = network(5)
    space = space_for(layers, "uniform:2-8")
    cost, table = RelativeCost(layers), random_table(space, 0)
    budgets = [cost(space.uniform(2)), 0.3, 0.3000001, 0.5, 0.8, 5.0, 6.0]
    ladder = ilp_ladder(space, cost, table, budgets)
    values = [step.value for step in ladder]
    assert values == sorted(values, reverse=True)
    assert len({step.config for step in ladder}) == 5  # of seven: two budgets buy no more than the one before
    assert all(step.cost <= step.budget == budget for step, budget in zip(ladder, budgets, strict=True))
    with pytest.raises(CostError, match=r"of 0\.001 or less"):
        ilp_ladder(space, cost, table, [0.5, 0.001])


def test_the_solver_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    layers = network(8)
    space = space_for(layers, "uniform:2-8")
    for seed in range(3):
        ilp_ladder(space, RelativeCost(layers), random_table(space, seed), [0.2, 0.4, 0.6])
    print("heard")
    assert capfd.readouterr().out == "heard\n"


def learned(space: SearchSpace, seed: int):
    random = np.random.default_rng(seed)
    tensors = [(name, slot.tensor) for slot in space.slots for name in slot.layers]
    bits = {tensor: float(random.uniform(2.2, 5.5)) for tensor in tensors}
    return bits, {tensor: -float(random.lognormal()) for tensor in tensors}


@pytest.mark.parametrize("change", [noise_change, linear_change])
def test_rounding_equals_enumeration(change) -> None:
    layers = [layer(i, 1_000 * (i + 1)) for i in range(2)]
    space = space_for(layers, "uniform:2-6")
    cost = RelativeCost(layers)

    def loss(config: PrecisionConfig, bits, marginals) -> float:
        moves = {(name, tensor): getattr(config[name], tensor).bits - b for (name, tensor), b in bits.items()}
        far = any(abs(d) >= 2 for d in moves.values())
        return math.inf if far else sum(change(marginals[tensor], d) for tensor, d in moves.items())

    for seed in range(3):
        bits, marginals = learned(space, seed)
        floor = space.config_of({f"{name}/{tensor}_bits": math.floor(b) for (name, tensor), b in bits.items()})
        budget = 1.2 * cost(floor)
        best = sorted(loss(config, bits, marginals) for config in every_config(space) if cost(config) <= budget)
        found = round_bits(space, cost, bits, marginals, budget, 5, change=change)
        assert [f.value for f in found] == pytest.approx(best[:5], rel=1e-9)
        assert all(f.cost <= budget for f in found)


def test_noise_change_is_the_linear_one_near_by_and_bounded_far_off() -> None:
    assert noise_change(-2.0, 1e-6) == pytest.approx(linear_change(-2.0, 1e-6), rel=1e-5)
    assert noise_change(-2.0, 1.0) == pytest.approx(-2 / math.log(4) * 0.75)
    assert noise_change(-2.0, 40.0) == pytest.approx(-2 / math.log(4))
    second = (noise_change(-2.0, 1e-3) - 2 * noise_change(-2.0, 0.0) + noise_change(-2.0, -1e-3)) / 1e-6
    assert second == pytest.approx(2 * math.log(4), rel=1e-3)


def test_rounding_gives_bits_to_whom_they_help_and_none_to_noise() -> None:
    layers = [layer(i, 10_000) for i in range(3)]
    space = space_for(layers, "uniform:2-8")
    cost = RelativeCost(layers, "bops")
    tensors = [(name, tensor) for name in space.layers for tensor in ("weight", "activation")]
    bits = dict.fromkeys(tensors, 4.5)
    marginals = {(n, t): {"l0": -5.0, "l1": -1.0, "l2": 0.3}[n] for n, t in tensors}
    (found,) = round_bits(space, cost, bits, marginals, cost(space.uniform(4)) * 1.1)
    l0, l1, l2 = (found.config[name].weight.bits + found.config[name].activation.bits for name in ("l0", "l1", "l2"))
    assert l0 > l1 > l2


def test_rounding_reaches_farther_when_the_budget_asks_for_it() -> None:
    layers = network(seed=4)
    space = space_for(layers, "uniform:2-8")
    cost = RelativeCost(layers)
    tensors = [(slot_layer, slot.tensor) for slot in space.slots for slot_layer in slot.layers]
    bits, marginals = dict.fromkeys(tensors, 7.5), dict.fromkeys(tensors, -1.0)
    (found,) = round_bits(space, cost, bits, marginals, cost(space.uniform(2)))
    assert found.config == space.uniform(2)
    with pytest.raises(CostError, match="raise the budget"):
        round_bits(space, cost, bits, marginals, cost(space.uniform(2)) * 0.9)


def test_rounding_stays_with_uniform_and_needs_every_number() -> None:
    layers = network()
    space = space_for(layers, "uniform:2-5", "shift:3", "apot:4")
    bits, marginals = learned(space, 0)
    (found,) = round_bits(space, RelativeCost(layers), bits, marginals, 0.5)
    assert {p.quantizer for pair in found.config.values() for p in (pair.weight, pair.activation)} == {"uniform"}
    for numbers, what in ((bits, "bits"), (marginals, "marginal")):
        kept = numbers["l1", "weight"]
        for bad in (math.nan, math.inf):
            numbers["l1", "weight"] = bad
            with pytest.raises(PrecisionError, match=f"the {what} of layer 'l1', weight"):
                round_bits(space, RelativeCost(layers), bits, marginals, 0.5)
        numbers["l1", "weight"] = kept


def table_of(space: SearchSpace, worth: dict[str, float]) -> SensitivityTable:
    """A table in which a uniform choice of b bits does 4^-b harm, and another one what `worth` says in bits."""
    entries = {
        (name, slot.tensor, choice): 4.0 ** -(choice.bits if choice.quantizer == "uniform" else worth[str(choice)])
        for slot in space.slots
        for name in slot.layers
        for choice in slot.choices
    }
    return SensitivityTable("kl", entries, 1, 0.0)


def test_a_choice_is_worth_the_bits_at_which_the_uniform_quantizer_does_as_much_harm() -> None:
    layers = [layer(i, 10_000) for i in range(3)]
    rule = {"match": "*", "weight": ["uniform:2-5", "shift:3", "apot:4", "apot:2"], "activation": ["uniform:2-5"]}
    space = build_space(parse_space({"name": "t", "rules": [rule], "first": "search", "last": "search"}), layers)
    table = table_of(space, {"shift:3/channel": 2.5, "apot:4/channel": 4.8, "apot:2/channel": 1.2})
    slot = next(slot for slot in space.slots if slot.tensor == "weight")
    worth = {str(choice): equivalent_bits(table)(slot, choice) for choice in slot.choices}
    assert worth["shift:3/channel"] == pytest.approx(2.5)
    assert worth["apot:4/channel"] == pytest.approx(4.8)
    assert math.isnan(worth["apot:2/channel"])  # less than any uniform choice
    noisy = dict(table.entries)
    for name in slot.layers:  # five bits measured as doing more harm than four: taken as doing as much
        noisy[name, "weight", next(c for c in slot.choices if str(c) == "uniform:5/channel")] = 4.0**-3.9
    again = equivalent_bits(dataclasses.replace(table, entries=noisy))
    assert again(slot, next(c for c in slot.choices if str(c) == "shift:3/channel")) == pytest.approx(2.5)


def test_rounding_takes_a_cheaper_type_that_is_worth_as_many_bits() -> None:
    layers = [layer(i, 10_000) for i in range(3)]
    rule = {"match": "*", "weight": ["uniform:2-5", "shift:3"], "activation": ["uniform:2-5"]}
    space = build_space(parse_space({"name": "t", "rules": [rule], "first": "search", "last": "search"}), layers)
    cost = RelativeCost(layers, "shift_energy")
    tensors = [(name, tensor) for name in space.layers for tensor in ("weight", "activation")]
    bits, marginals = dict.fromkeys(tensors, 3.0), dict.fromkeys(tensors, -1.0)
    types: dict[float, set[str]] = {}
    for worth in (2.9, 2.1):
        equivalent = equivalent_bits(table_of(space, {"shift:3/channel": worth}))
        (found,) = round_bits(space, cost, bits, marginals, cost(space.uniform(3)), equivalent=equivalent)
        types[worth] = {pair.weight.quantizer for pair in found.config.values()}
        assert found.cost <= cost(space.uniform(3))
    assert "shift" in types[2.9]
    assert types[2.1] == {"uniform"}


def test_two_hundred_layers_are_allocated() -> None:
    random = np.random.default_rng(0)
    layers = [layer(i, int(random.integers(1_000, 100_000))) for i in range(9)]
    layers = [
        dataclasses.replace(layers[i % 9], name=f"n{i}", input_group=f"n{i}", weight_group=f"n{i}") for i in range(200)
    ]
    rule = {"match": "*", "weight": ["uniform:2-5"], "activation": ["uniform:2-5"]}
    space = build_space(parse_space({"name": "t", "rules": [rule], "first": "search", "last": "search"}), layers)
    cost, table = RelativeCost(layers, "bops"), random_table(space, 0)
    (best,) = allocate(space, cost, table, cost(space.uniform(3)))
    assert cost(best.config) <= cost(space.uniform(3))
    assert best.value < table.total(space.uniform(3))


def test_global_combinations_are_those_that_nothing_global_beats() -> None:
    layers = network(3)
    space = space_for(layers, "uniform:2-4", "shift:3")
    cost = RelativeCost(layers, "shift_energy", "w8a8")
    table = random_table(space, 0)
    found = global_combinations(space, cost, table, 100)
    points = {config: (cost(config), table.total(config)) for config in space.combinations()}
    beaten = {
        config
        for config, (price, harm) in points.items()
        if any(p <= price and h <= harm and (p, h) != (price, harm) for p, h in points.values())
    }
    assert set(found) == set(points) - beaten - set(space.ladder())
    assert [cost(config) for config in found] == sorted((cost(config) for config in found), reverse=True)
    few = global_combinations(space, cost, table, 2)
    assert few == [found[0], found[-1]]
    assert global_combinations(space, cost, table, 0) == []


@pytest.mark.parametrize("seed", range(5))
def test_leaving_out_what_relaxation_rules_out_changes_no_optimum(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(seed)
    layers = [layer(i, int(random.integers(1_000, 50_000))) for i in range(8)]
    space = space_for(layers, "uniform:1-8", "shift:2-4")
    table, cost = random_table(space, seed), RelativeCost(layers)
    budgets = (0.15, 0.22, 0.4, 0.9)
    ours = [allocate(space, cost, table, budget)[0].value for budget in budgets]
    left_out: list[int] = []
    beaten = Program._beaten

    def counted(program: Program, flat: np.ndarray, room: float) -> np.ndarray:
        left_out.append(int(beaten(program, flat, room).sum()))
        return np.zeros(len(program._usable), dtype=bool)

    monkeypatch.setattr(Program, "_beaten", counted)
    assert [allocate(space, cost, table, budget)[0].value for budget in budgets] == pytest.approx(ours, rel=1e-9)
    assert min(left_out) > 0
