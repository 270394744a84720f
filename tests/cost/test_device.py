"""Costs of devices: measured rows, MACs per cycle, a user's function; what they do not know is not allowed."""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

import pytest

from mpsearch.cost.device import cycles_model, function_model, table_model, written_model
from mpsearch.cost.model import RelativeCost
from mpsearch.errors import CostError, HardwareError, SpaceError, TaskError
from mpsearch.facts import price_study
from mpsearch.graph.facts import LayerInfo
from mpsearch.hardware.profile import PriceSpec, Profile, load_profile
from mpsearch.hardware.table import COLUMNS, key_of, pair_of, parse_table, write_table
from mpsearch.precision import FLOAT, LayerPrecision, PrecisionConfig
from mpsearch.problem import known_pairs, own_models
from mpsearch.program import Program
from mpsearch.space.build import build_space
from mpsearch.space.space import SearchSpace
from mpsearch.space.spec import parse_space
from mpsearch.study import parse_study


def layer(name: str, out: int, **more) -> LayerInfo:
    facts = {"input_group": name, "weight_group": name, "signed_input": False} | more
    return LayerInfo(name, "conv2d", (8, 4, 3, 3), (4, 6, 6), (8, out, out), 72 * out * out, 288, 36, **facts)


LAYERS = [layer("a", 6), layer("b", 6, batch_norm="bn"), layer("c", 3), layer("d", 6)]  # a and d have one key
W8A8, W4A8, HALF = (LayerPrecision.shorthand(text) for text in ("w8a8", "w4a8", "float16"))
FLOAT32 = LayerPrecision(FLOAT, FLOAT)
PROFILE = Profile(name="p", about="a", source="s", pairs=("w8a8", "w4a8", "float16"))


def text(*rows: tuple[LayerInfo, LayerPrecision, object]) -> str:
    lines = [",".join(COLUMNS)]
    lines += [",".join([*key_of(info), *pair_of(pair), str(us), "0.1", "50"]) for info, pair, us in rows]
    return "# device: a test\n" + "\n".join(lines) + "\n"


ROWS = [
    (LAYERS[0], W8A8, 10.0),
    (LAYERS[0], HALF, 25.0),
    (LAYERS[1], W8A8, 12.0),
    (LAYERS[1], W4A8, 7.0),
    (LAYERS[2], W8A8, 4.0),
    (LAYERS[2], HALF, 9.0),
]
REST = "rest,,,,,,,uniform:8,uniform:8,3.5,0.1,50\n"


def space_for(model, hardware: Profile = PROFILE) -> SearchSpace:
    rule = {"match": "*", "weight": ["uniform:4", "uniform:8", "float16"], "activation": ["uniform:8", "float16"]}
    document = {"name": "test", "rules": [rule], "first": "search", "last": "search"}
    return build_space(parse_space(document), LAYERS, hardware, known_pairs(model))


def every_config(space: SearchSpace) -> list[PrecisionConfig]:
    values = [[slot.value(choice) for choice in slot.choices] for slot in space.free]
    names = [slot.parameter for slot in space.free]
    return list(dict.fromkeys(space.config_of(dict(zip(names, chosen, strict=True))) for chosen in product(*values)))


def test_a_table_prices_layers_by_their_key_and_adds_what_comes_beside() -> None:
    table = parse_table(text(*ROWS) + REST)
    assert table.header == {"device": "a test"}
    assert parse_table(write_table(table)).rows == table.rows
    cost = RelativeCost(LAYERS, table_model(table, PriceSpec(table="t.csv", layer=0.5)))
    assert cost.reference.total == 10 + 12 + 4 + 10 + 4 * 0.5 + 4 * 3.5
    config = PrecisionConfig({"a": HALF, "b": W4A8, "c": W8A8, "d": W8A8})
    assert cost.absolute(config).total == 25 + 7 + 4 + 10 + 2 + 2 * 3.5  # beside c and d
    assert cost.absolute(config).unit == "us"
    with pytest.raises(CostError, match=r"no row for layer 'a' \(conv2d, 4x6x6, .*\) at uniform:4.*measure it"):
        cost(PrecisionConfig.uniform("abcd", W4A8))


def test_a_pair_without_a_row_is_not_in_the_space() -> None:
    model = table_model(parse_table(text(*ROWS)), PriceSpec(table="t.csv"))
    space = space_for(model)
    assert {name: set(pairs) for name, pairs in space.options.items()} == {
        "a": {W8A8, HALF},
        "b": {W8A8, W4A8},
        "c": {W8A8, HALF},
        "d": {W8A8, HALF},
    }
    assert space.size == 16 == len(every_config(space))
    missing = table_model(parse_table(text(*ROWS[:4])), PriceSpec(table="t.csv"))
    with pytest.raises(SpaceError, match=r"knows no pair of layer 'c' \(conv2d\).*mpsearch measure"):
        space_for(missing)


def test_changes_between_neighbours_are_counted_and_the_program_is_exact() -> None:
    model = table_model(parse_table(text(*ROWS) + REST), PriceSpec(table="t.csv", change=6.0))
    space, cost = space_for(model), RelativeCost(LAYERS, model)
    config = PrecisionConfig({"a": HALF, "b": W4A8, "c": HALF, "d": HALF})
    assert cost.absolute(config).total == 25 + 7 + 9 + 25 + 2 * 6
    values = [[-choice.bits * (i + 1.0) for choice in slot.choices] for i, slot in enumerate(space.slots)]

    def value(config: PrecisionConfig) -> float:
        return sum(
            values[i][slot.choices.index(getattr(config[slot.layers[0]], slot.tensor))]
            for i, slot in enumerate(space.slots)
        )

    configs = every_config(space)
    for budget in sorted(map(cost, configs))[1::3]:
        (found,) = Program(space, cost).solve(values, budget)
        assert found.value == pytest.approx(min(value(config) for config in configs if cost(config) <= budget))
        assert found.cost <= budget
    low, high = cost.bounds(space.options)
    assert low <= min(map(cost, configs))
    assert high >= max(map(cost, configs))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.replace("10.0", "-1"), r"line 3: median_us is '-1': write a number that is not negative"),
        (lambda t: t.replace("10.0", "nan"), r"line 3: median_us is 'nan'"),
        (lambda t: t.replace("10.0", "soon"), r"line 3: median_us is 'soon'"),
        (lambda t: t.replace("10.0", "0"), r"line 3: median_us is 0"),
        (lambda t: t.replace("median_us,", ""), r"no column median_us"),
        (lambda t: t.replace("uniform:8", "uniform:88", 1), r"line 3: uniform has no 88-bit form"),
        (lambda t: t + t.splitlines()[2] + "\n", r"line \d+ has a key that an earlier line has"),
        (lambda t: t + "conv2d,1\n", r"has 2 values for 12 columns"),
        (lambda t: "", r"no column op"),
        (lambda t: t + "x" * 200_000 + "\n", r"line \d+ is no CSV: field larger than field limit"),
        (lambda t: "x" * 200_000, r"line 1 is no CSV"),
    ],
)
def test_a_wrong_table_is_refused_by_line(change, words: str) -> None:
    with pytest.raises(HardwareError, match=words):
        parse_table(change(text(*ROWS)))


def test_cycles_are_macs_over_the_speed_of_the_pair() -> None:
    profile = load_profile("mpic")
    assert profile.cost is not None
    cost = RelativeCost(LAYERS, cycles_model(profile.cost))
    macs = sum(info.macs for info in LAYERS)
    assert cost.reference.total == pytest.approx(macs / 2.1)
    for pair, speed in {"w2a8": 2.5, "w8a2": 2.2, "w4a2": 4.0, "w2a4": 3.9}.items():  # weight bits first
        config = PrecisionConfig.uniform("abcd", LayerPrecision.shorthand(pair))
        assert cost.absolute(config).total == pytest.approx(macs / speed)
    with pytest.raises(CostError, match="says nothing of layer 'a' at uniform:3"):
        cost(PrecisionConfig.uniform("abcd", LayerPrecision.shorthand("w3a8")))


def study(hardware: str = "generic", **cost: object):
    return parse_study({"name": "s", "task": {"factory": "m:f"}, "space": "full", "hardware": hardware, "cost": cost})


def test_a_function_of_the_users_is_a_cost_and_its_mistakes_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_costs.py").write_text(
        "def cost(layer, pair):\n"
        "    if layer.name == 'c' and pair.weight.bits == 4:\n        return None\n"
        "    return layer.macs * pair.weight.bits\n"
        "def broken(layer, pair):\n    return float('nan')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    spec = study(model="my_costs:cost", limits={"weight_bytes": "50 %"})
    models = own_models(spec, load_profile("generic"))
    main, costs = price_study(spec, LAYERS, models)
    assert costs["my_costs:cost"] is main
    assert main(PrecisionConfig.uniform("abcd", LayerPrecision.shorthand("w2a8"))) == pytest.approx(0.25)
    assert main.limits[0].name == "weight_bytes"
    assert W4A8 not in space_for(models["my_costs:cost"]).options["c"]
    assert W4A8 in space_for(models["my_costs:cost"]).options["a"]
    broken = study(model="my_costs:broken")
    with pytest.raises(CostError, match=r"my_costs:broken returned nan for layer 'a'.*return a number"):
        price_study(broken, LAYERS, own_models(broken, load_profile("generic")))
    with pytest.raises(TaskError, match="has no function 'cosy'"):
        own_models(study(model="my_costs:cosy"), load_profile("generic"))


def test_what_looks_at_a_run_has_the_prices_without_the_function() -> None:
    ours = function_model("m:f", lambda info, pair: float(info.macs * pair.weight.bits))
    prices = {info.name: {str(pair): info.macs * float(pair.weight.bits) for pair in (W8A8, W4A8)} for info in LAYERS}
    theirs = written_model("units", prices, 0.0, 0.0)
    config = PrecisionConfig({"a": W8A8, "b": W4A8, "c": W8A8, "d": W4A8})
    assert RelativeCost(LAYERS, theirs)(config) == RelativeCost(LAYERS, ours)(config)
    with pytest.raises(CostError, match="nothing is known of the cost of layer 'a' at float16"):
        RelativeCost(LAYERS, theirs)(PrecisionConfig.uniform("abcd", HALF))


def test_a_limit_on_latency_needs_hardware_with_a_cost() -> None:
    spec = study("mpic", model="shift_energy", limits={"latency_cycles": 4000})
    main, costs = price_study(spec, LAYERS, own_models(spec, load_profile("mpic")))
    assert main.limits[0].most * costs["latency_cycles"].reference.total == pytest.approx(4000)
    assert main.limits[0].text == "4000 cycles"
    wrong = study("generic", limits={"latency_ms": 5})
    with pytest.raises(CostError, match="latency_ms: there is no such cost of this network on this hardware"):
        price_study(wrong, LAYERS, own_models(wrong, load_profile("generic")))
    with pytest.raises(CostError, match=r"cost\.model is table, and hardware 'generic' has no cost"):
        price_study(study(model="table"), LAYERS, {})
    unit = study("mpic", limits={"latency_ms": 5})
    with pytest.raises(CostError, match="is counted in cycles"):
        price_study(unit, LAYERS, own_models(unit, load_profile("mpic")))
