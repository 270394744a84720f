"""Search spaces: what the YAML may say, what it means for a network, and the way to Optuna and back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mpsearch.cost.model import RelativeCost
from mpsearch.errors import PrecisionError, SpaceError
from mpsearch.graph.facts import LayerInfo
from mpsearch.precision import FLOAT, LayerPrecision, Precision, PrecisionConfig
from mpsearch.quant.levels import apot_magnitudes, shift_magnitudes
from mpsearch.space.build import build_space
from mpsearch.space.choices import parse_choices
from mpsearch.space.space import SearchSpace, Slot
from mpsearch.space.spec import load_space, parse_space, space_names


def layer(name: str, **facts: Any) -> LayerInfo:
    defaults: dict[str, Any] = {
        "kind": "conv2d",
        "weight_shape": (8, 4, 3, 3),
        "input_shape": (4, 8, 8),
        "output_shape": (8, 8, 8),
        "macs": 1,
        "params": 1,
        "fan_in": 36,
        "input_group": name,
        "weight_group": name,
    }
    return LayerInfo(name=name, **(defaults | facts))


STEM, A, B, C, HEAD = (
    layer("conv1"),
    layer("layer1.0.conv1"),
    layer("layer1.0.conv2", groups=8, weight_shape=(8, 1, 3, 3)),
    layer("layer2.0.conv1"),
    layer("fc", kind="linear", weight_shape=(10, 8)),
)
LAYERS = (STEM, A, B, C, HEAD)
ANY = {"match": "*", "weight": ["uniform:2-8"], "activation": ["uniform:2-8"]}


def space(*layers: LayerInfo, **document: Any) -> SearchSpace:
    return build_space(parse_space({"name": "test", "rules": [ANY]} | document), layers or LAYERS)


def texts(space: SearchSpace, name: str) -> list[str]:
    (slot,) = [slot for slot in space.slots if slot.name == name]
    return [str(choice) for choice in slot.choices]


def w(bits: int) -> str:
    return f"uniform:{bits}/channel"


def a(bits: int) -> str:
    return f"uniform:{bits}/tensor"


# ------------------------------------------------------------------------------------------------ precision texts


def test_a_range_stands_for_each_of_its_bits_and_choices_come_in_order_without_repeats():
    choices = parse_choices(["shift:3-4", "float", "uniform:3-4", "uniform:4"], "weight")
    assert [str(choice) for choice in choices] == [
        "shift:3/channel",
        "uniform:3/channel",
        "shift:4/channel",
        "uniform:4/channel",
        "float",
    ]


def test_a_named_granularity_holds_for_the_whole_range():
    assert {choice.granularity for choice in parse_choices(["uniform:2-4/tensor"], "weight")} == {"tensor"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("uniform:0-4", "uniform has no 0-bit form: give 1 to 16 bits"),
        ("uniform:4-17", "uniform has no 17-bit form"),
        ("uniform:17", "uniform has no 17-bit form"),
        ("shift:1-4", "shift has no 1-bit form: give 2 to 5 bits"),
        ("uniform:8-2", "write the smaller first"),
        ("unifrom:2-4", "did you mean 'uniform'"),
        ("uniform", "names no bits"),
        ("w4", "cannot read"),
    ],
)
def test_bits_and_quantizers_that_do_not_exist_are_refused(text: str, message: str):
    with pytest.raises(PrecisionError, match=message):
        parse_choices([text], "weight")
    with pytest.raises(SpaceError, match=message):
        parse_space({"name": "test", "rules": [{"match": "*", "weight": [text]}]})


def test_an_activation_has_no_scale_per_channel():
    with pytest.raises(PrecisionError, match="per channel"):
        parse_choices(["uniform:4/channel"], "activation")


# ------------------------------------------------------------------------------------------------------ the file


@pytest.mark.parametrize("name", space_names())
def test_every_shipped_space_loads_under_its_own_name_and_fits_a_resnet(name: str):
    spec = load_space(name)
    assert spec.name == name
    built = build_space(spec, LAYERS)
    assert built.size > 1
    assert built.layers == tuple(layer.name for layer in LAYERS)


def test_the_digits_space_goes_from_8_bits_to_1_in_every_layer():
    ladder = build_space(load_space("digits"), LAYERS).ladder()
    assert ladder == [
        PrecisionConfig.uniform([layer.name for layer in LAYERS], LayerPrecision.shorthand(f"w{bits}a{bits}"))
        for bits in range(8, 0, -1)
    ]


def test_a_space_is_read_from_a_path(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nrules: [{match: '*', weight: uniform:4, activation: [uniform:2-4, float]}]\n")
    assert texts(build_space(load_space(path), LAYERS), "layer2.0.conv1/activation") == [a(2), a(3), a(4), "float"]


def test_an_unknown_name_is_refused_with_the_shipped_ones():
    with pytest.raises(SpaceError, match="did you mean 'uniform'"):
        load_space("unifrm")


@pytest.mark.parametrize("content", ["name: [", "- 1", "", b"\xff\xfe\x00"])
def test_a_file_that_is_not_keys_and_values_is_refused(tmp_path: Path, content: str | bytes):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SpaceError, match=r"bad\.yaml (is not YAML|must hold keys and values)"):
        load_space(path)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"rule": []}, "rule: no such key; did you mean 'rules'"),
        ({"rules": [{"match": "*", "weights": ["float"]}]}, r"rules\.0\.weights: no such key; did you mean 'weight'"),
        ({"rules": [{"weight": ["float"]}]}, r"rules\.0\.match: missing"),
        ({"rules": [{"match": "*"}]}, r"rules\.0: gives no precision"),
        ({"rules": [{"match": "*", "weight": []}]}, "no precision to choose from"),
        ({"rules": [{"match": "*", "weight": [4]}]}, r"rules\.0\.weight\.0: .*string.*got 4"),
        ({"rules": [ANY | {"kind": "conv"}]}, r"rules\.0\.kind: did you mean 'conv\dd'"),
        ({"first": "free"}, "first: write `search`"),
        ({"first": None}, "first: write `search`"),
        ({"last": {"wieght": ["float"]}}, r"last\.wieght: no such key; did you mean 'weight'"),
        ({"fixed": {"fc": {"weight": ["uniform:2-4"]}}}, r"fixed\.fc: `weight` has 3 precisions"),
        ({"fixed": {"fc": {"weight": ["uniform:4"], "bits": 4}}}, r"fixed\.fc\.bits: no such key"),
        ({"tied": ["fc"]}, r"tied\.0"),
    ],
)
def test_what_does_not_belong_is_refused_by_key(document: dict[str, Any], message: str):
    with pytest.raises(SpaceError, match=message):
        parse_space({"name": "test"} | document)


def test_every_mistake_is_named_at_once():
    with pytest.raises(SpaceError, match=r"(?s)name: missing.*rule: no such key"):
        parse_space({"rule": []})


def test_a_spec_survives_being_written_and_read_again():
    document = {
        "name": "test",
        "rules": [ANY, {"match": "fc", "kind": "linear", "weight": "float"}],
        "first": {"weight": "uniform:4"},
        "fixed": {"fc": {"activation": "float"}},
        "tied": [["layer1.*"]],
    }
    spec = parse_space(document)
    assert parse_space(yaml.safe_load(yaml.safe_dump(spec.model_dump(mode="json")))) == spec


# ------------------------------------------------------------------------------------------- rules, ends, fixed


def test_a_later_rule_overrides_the_keys_that_it_gives_and_no_others():
    built = space(rules=[ANY, {"match": "layer1.*", "weight": ["uniform:4"]}])
    assert texts(built, "layer1.0.conv1/weight") == [w(4)]
    assert texts(built, "layer1.0.conv1/activation") == [a(bits) for bits in range(2, 9)]
    assert texts(built, "layer2.0.conv1/weight") == [w(bits) for bits in range(2, 9)]


@pytest.mark.parametrize(
    ("given", "changed"),
    [
        ({"kind": "linear"}, ["fc"]),
        ({"depthwise": True}, ["layer1.0.conv2"]),
        ({"depthwise": False}, ["conv1", "layer1.0.conv1", "layer2.0.conv1", "fc"]),
        ({"kind": "conv2d", "depthwise": True}, ["layer1.0.conv2"]),
        ({"pointwise": True}, ["fc"]),
        ({"pointwise": False, "depthwise": False}, ["conv1", "layer1.0.conv1", "layer2.0.conv1"]),
    ],
)
def test_a_rule_can_be_about_kinds_depthwise_and_pointwise_layers_only(given: dict[str, Any], changed: list[str]):
    rule = {"match": "*", "weight": ["uniform:1"]} | given
    built = space(rules=[ANY, rule], first="search", last="search")
    assert [slot.layers[0] for slot in built.slots if slot.tensor == "weight" and len(slot.choices) == 1] == changed


def test_first_and_last_layer_have_8_bits_unless_the_space_says_otherwise():
    for name in ("conv1", "fc"):
        assert texts(space(), f"{name}/weight") == [w(8)]
        assert texts(space(), f"{name}/activation") == [a(8)]
    searched = space(first="search", last={"weight": ["uniform:4-5"]})
    assert len(texts(searched, "conv1/weight")) == 7
    assert texts(searched, "fc/weight") == [w(4), w(5)]
    assert texts(searched, "fc/activation") == [a(8)]


def test_first_is_the_first_layer_that_can_be_quantized():
    odd = layer("stem", reason="no quantized form")
    built = space(odd, A, C, HEAD)
    assert built.layers == (A.name, C.name, HEAD.name)
    assert texts(built, "layer1.0.conv1/weight") == [w(8)]


def test_a_rule_that_names_the_first_layer_is_refused_while_first_holds():
    rules = [ANY, {"match": "conv1", "weight": ["uniform:4"]}]
    with pytest.raises(SpaceError, match="write `first: search`"):
        space(rules=rules)
    assert texts(space(rules=rules, first="search"), "conv1/weight") == [w(4)]


def test_fixed_overrides_rules_and_ends():
    built = space(fixed={"conv1": {"weight": "uniform:2"}, "layer1.*": {"activation": "float"}})
    assert texts(built, "conv1/weight") == [w(2)]
    assert texts(built, "conv1/activation") == [a(8)]
    assert texts(built, "layer1.0.conv2/activation") == ["float"]


@pytest.mark.parametrize(
    "document",
    [
        {"rules": [ANY, {"match": "layer3.*", "weight": ["float"]}]},
        {"fixed": {"layer3.*": {"weight": "float"}}},
        {"tied": [["layer1.*", "layer3.*"]]},
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_near_names(document: dict[str, Any]):
    with pytest.raises(SpaceError, match=r"pattern 'layer3\.\*' .* matches none of the 5 layers: near: .*layer"):
        space(**document)


def test_a_pattern_that_matches_only_layers_that_cannot_be_quantized_is_refused_with_the_reason():
    odd = layer("attention", reason="the model multiplies by its weight without calling it")
    with pytest.raises(SpaceError, match="'attention', because the model multiplies"):
        space(*LAYERS, odd, rules=[ANY, {"match": "attention", "weight": ["float"]}])


def test_a_layer_without_a_rule_is_refused_by_name():
    with pytest.raises(SpaceError, match=r"no weight rule for 1 of 5 layers: layer2\.0\.conv1;"):
        space(rules=[{"match": "layer1*", "weight": ["float"], "activation": ["float"]}])
    with pytest.raises(SpaceError, match="no activation rule for 3 of 5 layers"):
        space(rules=[{"match": "*", "weight": ["float"]}])


def test_a_network_without_quantizable_layers_is_refused():
    with pytest.raises(SpaceError, match="none that can be quantized"):
        space(layer("odd", reason="no quantized form"))


# ------------------------------------------------------------------------------------------------------- groups


def fed_alike(one: LayerInfo, other: LayerInfo) -> LayerInfo:
    return dataclasses.replace(other, input_group=one.input_group)


def test_layers_fed_by_the_same_tensor_share_the_activation_choice_only():
    built = space(STEM, A, fed_alike(A, C), HEAD)
    shared = [slot.layers for slot in built.slots if len(slot.layers) > 1]
    assert shared == [(A.name, C.name)]
    assert texts(built, "layer2.0.conv1/weight") == texts(built, "layer1.0.conv1/weight")
    assert "layer2.0.conv1/activation" not in [slot.name for slot in built.slots]


def test_layers_with_the_same_weight_share_the_weight_choice_only():
    built = space(STEM, A, dataclasses.replace(C, weight_group=A.name), HEAD)
    assert [slot.name for slot in built.slots if len(slot.layers) > 1] == ["layer1.0.conv1/weight"]


def test_tied_layers_share_both_choices_and_ties_join_groups():
    built = space(STEM, A, B, fed_alike(B, C), HEAD, tied=[["layer1.*"]])
    assert [(slot.name, slot.layers) for slot in built.slots if len(slot.layers) > 1] == [
        ("layer1.0.conv1/weight", (A.name, B.name)),
        ("layer1.0.conv1/activation", (A.name, B.name, C.name)),
    ]


def test_layers_that_share_a_choice_may_take_what_all_of_them_may():
    built = space(
        STEM, A, fed_alike(A, C), HEAD, rules=[ANY, {"match": "layer2.*", "activation": ["uniform:4", "float"]}]
    )
    assert texts(built, "layer1.0.conv1/activation") == [a(4)]


def test_what_a_tie_takes_from_layers_is_noted_by_name():
    free = space(STEM, A, B, C, HEAD, tied=[["layer1.*"]])
    assert free.notes == ()  # tied layers with the same choices lose none
    fixed = {"layer1.0.conv2": {"weight": "uniform:8", "activation": "uniform:8"}}
    (weight, activation) = space(STEM, A, B, C, HEAD, tied=[["layer1.*"]], fixed=fixed).notes
    assert weight == (
        "2 layers must share one weight precision (`tied`) and have uniform:8/channel left, as 'layer1.0.conv2' has "
        "uniform:8/channel; by the rules alone there is more for 'layer1.0.conv1' (7 choices): give 'layer1.0.conv2' "
        "more choices, or take it out of `tied`"
    )
    assert "one activation precision (`tied`)" in activation


def test_what_a_shared_tensor_takes_from_layers_is_noted_by_name():
    rules = [ANY, {"match": "layer2.*", "activation": ["uniform:4-5", "float"]}]
    (note,) = space(STEM, A, fed_alike(A, C), HEAD, rules=rules).notes
    assert "(the same input tensor) and have 2 choices left, as 'layer2.0.conv1' has 3 choices" in note
    assert "'layer1.0.conv1' (7 choices), 'layer2.0.conv1' (3 choices)" in note  # it loses float


def test_layers_that_share_a_choice_but_have_none_in_common_are_refused_by_name():
    with pytest.raises(SpaceError, match=r"the same input tensor.*'layer1\.0\.conv1': .*; 'layer2\.0\.conv1': float"):
        space(STEM, A, fed_alike(A, C), HEAD, fixed={"layer2.*": {"activation": "float"}})


# ---------------------------------------------------------------------------------------- Optuna, there and back

MIXED = space(
    STEM,
    A,
    B,
    fed_alike(A, C),
    HEAD,
    rules=[
        {"match": "*", "weight": ["uniform:2-8"], "activation": ["uniform:2-4"]},
        {"match": "layer1.0.conv2", "weight": ["uniform:4", "shift:3-4", "float"]},
        {"match": "layer1.0.conv2", "activation": ["uniform:2", "uniform:8"]},
    ],
)


def test_contiguous_bits_of_one_quantizer_are_an_integer_and_anything_else_a_category():
    assert MIXED.distributions() == {
        "layer1.0.conv1/weight_bits": optuna.distributions.IntDistribution(2, 8),
        "layer1.0.conv1/activation_bits": optuna.distributions.IntDistribution(2, 4),
        "layer1.0.conv2/weight": optuna.distributions.CategoricalDistribution(
            ["shift:3/channel", "shift:4/channel", w(4), "float"]
        ),
        "layer1.0.conv2/activation": optuna.distributions.CategoricalDistribution([a(2), a(8)]),
        "layer2.0.conv1/weight_bits": optuna.distributions.IntDistribution(2, 8),
    }


@pytest.mark.parametrize(
    ("choices", "parameter"),
    [
        (["uniform:2-4"], "conv/weight_bits"),
        (["uniform:2", "uniform:4"], "conv/weight"),
        (["uniform:2", "shift:3"], "conv/weight"),
        (["uniform:2", "uniform:3/tensor"], "conv/weight"),
    ],
)
def test_a_parameter_is_named_for_bits_only_where_bits_say_all(choices: list[str], parameter: str):
    assert Slot("weight", ("conv",), parse_choices(choices, "weight")).parameter == parameter


def test_size_counts_the_configs_and_free_the_slots_with_something_to_choose():
    assert MIXED.size == 7 * 3 * 4 * 2 * 7
    assert len(MIXED.free) == 5
    assert len(MIXED.slots) == 9


@given(seed=st.integers(0, 2**32 - 1))
def test_configs_and_parameters_are_exact_inverses(seed: int):
    config = MIXED.sample(np.random.default_rng(seed))
    params = MIXED.params_of(config)
    assert MIXED.config_of(params) == config
    assert MIXED.params_of(MIXED.config_of(params)) == params
    assert MIXED.contains(config)
    assert set(params) == set(MIXED.distributions())
    for name, distribution in MIXED.distributions().items():
        assert distribution._contains(distribution.to_internal_repr(params[name]))


def test_what_optuna_suggests_is_a_config_and_comes_back_from_it():
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    trial = study.ask(MIXED.distributions())
    assert MIXED.params_of(MIXED.config_of(trial.params)) == trial.params


def test_the_same_seed_samples_the_same_configs():
    one, other = np.random.default_rng(3), np.random.default_rng(3)
    drawn = [MIXED.sample(one) for _ in range(5)]
    assert drawn == [MIXED.sample(other) for _ in range(5)]
    assert len(set(drawn)) > 1


def test_samples_take_every_choice_of_every_slot():
    rng = np.random.default_rng(0)
    configs = [MIXED.sample(rng) for _ in range(300)]
    for slot in MIXED.slots:
        for name in slot.layers:
            assert {getattr(config[name], slot.tensor) for config in configs} == set(slot.choices)


def params(**changes: Any) -> dict[str, Any]:
    return MIXED.params_of(MIXED.uniform(8)) | changes


@pytest.mark.parametrize(
    ("given_params", "message"),
    [
        (params(**{"layer1.0.conv1/weight_bits": 9}), r"'layer1\.0\.conv1/weight_bits' is 9: choose from 2, 3"),
        (params(**{"layer1.0.conv2/weight": "shift:5/channel"}), "choose from shift:3/channel"),
        (params(**{"layer1.0.conv2/wieght": 4}), r"no parameter .*near: layer1\.0\.conv2/weight"),
        ({"layer1.0.conv1/weight_bits": 4}, "is missing: give a value for each of 5"),
    ],
)
def test_parameters_of_another_space_are_refused(given_params: dict[str, Any], message: str):
    with pytest.raises(SpaceError, match=message):
        MIXED.config_of(given_params)


def outside() -> dict[str, tuple[PrecisionConfig, str]]:
    config = MIXED.uniform(4)
    seven = LayerPrecision.parse("uniform:4", "uniform:7")
    three = LayerPrecision.parse("uniform:4", "uniform:3")
    layers = dict(config)
    return {
        "a precision": (config.replace(**{A.name: seven}), f"layer '{A.name}' has activation uniform:7/tensor"),
        "a group": (config.replace(**{C.name: three}), f"'{A.name}' and '{C.name}' share one activation precision"),
        "a missing layer": (PrecisionConfig(list(layers.items())[1:]), "no precision for layer 'conv1'"),
        "a foreign layer": (PrecisionConfig(layers | {"conv9": three}), "has no layer 'conv9': near: conv1"),
    }


@pytest.mark.parametrize("case", outside())
def test_a_config_outside_the_space_is_refused_by_layer(case: str):
    config, message = outside()[case]
    assert not MIXED.contains(config)
    with pytest.raises(SpaceError, match=message):
        MIXED.params_of(config)


# ---------------------------------------------------------------------------------------- ladder and neighbours


def test_the_ladder_goes_from_high_to_low_bits_with_the_ends_where_they_must_be():
    ladder = space().ladder()
    assert [config[A.name].weight.bits for config in ladder] == [8, 7, 6, 5, 4, 3, 2]
    assert [config[C.name].activation.bits for config in ladder] == [8, 7, 6, 5, 4, 3, 2]
    assert {config["conv1"].weight.bits for config in ladder} == {8}


def test_a_slot_takes_the_nearest_uniform_choice_and_the_higher_of_two():
    choices = {"match": "*", "weight": ["uniform:2", "uniform:6", "shift:4"], "activation": ["uniform:1-8"]}
    ladder = space(rules=[choices]).ladder()
    assert [str(config[A.name].weight) for config in ladder] == [w(6)] * 5 + [w(2)] * 3


def test_widths_that_lead_to_the_same_config_give_one():
    # The ends offer 8 bits, but nothing else changes between 8 and 4.
    ladder = space(rules=[{"match": "*", "weight": ["uniform:3-4"], "activation": ["uniform:4"]}]).ladder()
    assert [config[A.name].weight.bits for config in ladder] == [4, 3]


def test_a_space_without_uniform_quantizers_has_a_ladder_of_what_it_has():
    rule = {"match": "*", "weight": ["shift:3-4"], "activation": ["float"]}
    ladder = space(rules=[rule], first="search", last="search").ladder()
    assert [str(config[A.name].weight) for config in ladder] == ["shift:4/channel", "shift:3/channel"]
    assert {config[A.name].activation for config in ladder} == {FLOAT}


def test_every_config_of_the_ladder_is_in_the_space():
    assert all(MIXED.contains(config) for config in MIXED.ladder())


def test_combinations_are_every_pair_of_global_precisions_and_hold_the_ladder():
    rules = [{"match": "*", "weight": ["uniform:2-4", "shift:4"], "activation": ["uniform:3-4"]}]
    mixed = space(rules=rules)
    found = mixed.combinations()
    assert len(found) == len(set(found)) == 4 * 2
    assert set(mixed.ladder()) <= set(found)
    assert {(str(c[A.name].weight), c[A.name].activation.bits) for c in found} == {
        (weight, bits) for weight in (w(2), w(3), w(4), "shift:4/channel") for bits in (3, 4)
    }
    assert {c["conv1"].weight.bits for c in found} == {8}


def test_a_step_is_one_bit_or_another_type_at_the_nearest_bits():
    slot = Slot("weight", ("a",), parse_choices(["uniform:2-8", "shift:2-4", "apot:5"], "weight"))
    steps = {str(c): [str(step) for step in slot.steps(c)] for c in slot.choices}
    assert steps["uniform:6/channel"] == ["uniform:5/channel", "uniform:7/channel", "shift:4/channel", "apot:5/channel"]
    assert steps["uniform:2/channel"] == ["uniform:3/channel", "shift:2/channel", "apot:5/channel"]
    assert steps["apot:5/channel"] == ["shift:4/channel", "uniform:5/channel"]


def test_neighbours_differ_in_one_slot_by_one_step():
    config = MIXED.uniform(2)
    found = MIXED.neighbours(config)
    here = MIXED.params_of(config)
    changes = [set(MIXED.params_of(other).items()) - set(here.items()) for other in found]
    assert changes == [
        {("layer1.0.conv1/weight_bits", 3)},
        {("layer1.0.conv1/activation_bits", 3)},
        {("layer1.0.conv2/weight", "shift:4/channel")},
        {("layer1.0.conv2/weight", "float")},
        {("layer1.0.conv2/activation", a(8))},
        {("layer2.0.conv1/weight_bits", 3)},
    ]


def test_a_group_moves_together():
    moved = [config for config in MIXED.neighbours(MIXED.uniform(2)) if config[A.name].activation.bits == 3]
    assert [config[C.name].activation for config in moved] == [Precision("uniform", 3, "tensor")]


def test_a_quantizer_under_two_names_is_offered_once():
    """APoT of one term has the levels of a shift quantizer: 2 and 3 bits with a sign, 2 bits without one."""
    rule = {"match": "*", "weight": ["shift:2-4", "apot:2-5"], "activation": ["shift:2-4", "apot:2-5"]}
    built = space(rules=[rule], first="search", last="search")
    for slot in built.slots:
        offered = [f"{c.quantizer}:{c.bits}" for c in slot.choices]
        signed = slot.tensor == "weight" or any(layer.signed_input for layer in LAYERS if layer.name in slot.layers)
        doubled = {"apot:2", "apot:3"} if signed else {"apot:2"}
        everything = {f"shift:{b}" for b in (2, 3, 4)} | {f"apot:{b}" for b in (2, 3, 4, 5)}
        assert set(offered) == everything - doubled
    alone = space(rules=[rule | {"weight": ["uniform:4", "apot:2-4"]}], first="search", last="search")
    weight = next(slot for slot in alone.slots if slot.tensor == "weight")
    expected = ["apot:2", "apot:3", "apot:4", "uniform:4"]
    assert [str(c).removesuffix("/channel") for c in weight.choices] == expected


@pytest.mark.parametrize(("bits", "signed"), [(2, True), (3, True), (2, False)])
def test_what_is_left_out_has_the_levels_of_what_is_kept(bits: int, signed: bool):
    apot, shift = apot_magnitudes(bits, signed), shift_magnitudes(bits, signed)
    assert [level / apot[-1] for level in apot] == list(shift)
    layer = LayerPrecision.parse(f"apot:{bits}", "uniform:4")
    twin = LayerPrecision.parse(f"shift:{bits}", "uniform:4")
    if signed:
        prices = [RelativeCost(LAYERS, "shift_energy", "w8a8").addend("conv1", each) for each in (layer, twin)]
        assert prices[0] == prices[1]
