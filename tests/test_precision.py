"""Precisions and configs: text and JSON both ways, equality, and what is refused."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpsearch.errors import PrecisionError
from mpsearch.precision import BITS, FLOAT, LayerPrecision, Precision, PrecisionConfig


def both(quantizer: object, bits: object) -> dict[str, object]:
    precision = {"quantizer": quantizer, "bits": bits, "granularity": "tensor"}
    return {"a": {"weight": precision, "activation": precision}}


def precisions(*granularities: str) -> st.SearchStrategy[Precision]:
    quantized = st.sampled_from(["uniform", "shift", "apot"]).flatmap(
        lambda q: st.builds(Precision, st.just(q), st.sampled_from(BITS[q]), st.sampled_from(granularities))
    )
    return st.one_of(quantized, st.just(FLOAT))


layers = st.builds(LayerPrecision, precisions("channel", "tensor"), precisions("tensor"))
configs = st.dictionaries(st.text(min_size=1, max_size=8), layers, min_size=1, max_size=6).map(PrecisionConfig)


@given(precisions("channel", "tensor"))
def test_precision_survives_its_text(precision: Precision) -> None:
    assert Precision.parse(str(precision), "channel") == precision


@given(configs)
def test_config_survives_json_in_its_order(config: PrecisionConfig) -> None:
    again = PrecisionConfig.from_json(config.to_json())
    assert again == config
    assert list(again) == list(config)
    assert hash(again) == hash(config)
    assert again.digest == config.digest


@given(configs, configs)
def test_digests_differ_where_configs_do(a: PrecisionConfig, b: PrecisionConfig) -> None:
    assert (a.digest == b.digest) == (a == b)


def test_equal_configs_may_be_written_in_any_order() -> None:
    w4a8, w8a8 = LayerPrecision.shorthand("w4a8"), LayerPrecision.shorthand("w8a8")
    one, other = PrecisionConfig({"a": w4a8, "b": w8a8}), PrecisionConfig({"b": w8a8, "a": w4a8})
    assert one == other
    assert hash(one) == hash(other)
    assert one.digest == other.digest
    assert one != PrecisionConfig({"a": w4a8, "b": w4a8})


def test_digest_is_the_same_in_every_process() -> None:
    config = "PrecisionConfig.uniform('ab', LayerPrecision.shorthand('w4a8'))"
    script = f"from mpsearch.precision import *; print({config}.digest)"
    digests = {
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env={"PYTHONHASHSEED": seed}, check=True
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert digests == {PrecisionConfig.uniform("ab", LayerPrecision.shorthand("w4a8")).digest}


def test_shorthand_is_uniform_per_channel_and_per_tensor() -> None:
    assert str(LayerPrecision.shorthand("W4a8")) == "uniform:4/channel x uniform:8/tensor"
    assert str(LayerPrecision.shorthand("w4a8/tensor")) == "uniform:4/tensor x uniform:8/tensor"
    assert LayerPrecision.shorthand("w32a32") == LayerPrecision(FLOAT, FLOAT)


def test_granularity_is_what_the_caller_says_unless_written() -> None:
    assert Precision.parse("shift:3", "channel").granularity == "channel"
    assert Precision.parse("shift:3/tensor", "channel").granularity == "tensor"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("uniform:17", "uniform has no 17-bit form: give 1 to 16 bits"),
        ("uniform:0", "uniform has no 0-bit form"),
        ("shift:6", "shift has no 6-bit form: give 2 to 5 bits"),
        ("unifrom:4", "unknown quantizer 'unifrom' in 'unifrom:4': did you mean 'uniform'"),
        ("uniform", "'uniform' names no bits: write uniform:4"),
        ("uniform:4/row", "unknown granularity 'row'"),
        ("float:16", "float is 32 bits wide, got 16"),
        ("4", "cannot read precision '4'"),
    ],
)
def test_unknown_precisions_are_refused_with_what_to_write(text: str, message: str) -> None:
    with pytest.raises(PrecisionError, match=message):
        Precision.parse(text, "channel")


@pytest.mark.parametrize("text", ["w4", "4x8", "w17a8", "w4a0", "", "w4a8x", "w4a8/row"])
def test_unknown_shorthands_are_refused(text: str) -> None:
    with pytest.raises(PrecisionError):
        LayerPrecision.shorthand(text)


def test_activations_have_one_scale() -> None:
    with pytest.raises(PrecisionError, match="a layer's input has one scale, write /tensor"):
        LayerPrecision.parse("uniform:4", "uniform:4/channel")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([], "must be an object"),
        ({}, "must be an object"),
        ({"a": {"weight": {}}}, "layer 'a': expected an object with 'weight' and 'activation'"),
        ({"a": {"weight": {}, "activation": {}}}, "layer 'a': expected an object with 'quantizer'"),
        (both("uniform", "4"), "layer 'a': 'bits' must be a whole number, got '4'"),
        (both("uniform", True), "layer 'a': 'bits' must be a whole number, got True"),
        (both("log", 4), "layer 'a': unknown quantizer 'log'"),
    ],
)
def test_json_of_another_form_is_refused_by_layer(document: object, message: str) -> None:
    with pytest.raises(PrecisionError, match=message):
        PrecisionConfig.from_json(document)


def test_replace_changes_the_layers_named_and_no_other() -> None:
    config = PrecisionConfig.uniform(["a.x", "b"], LayerPrecision.shorthand("w8a8"))
    changed = config.replace(**{"a.x": LayerPrecision.shorthand("w2a2")})
    assert str(changed["a.x"].weight) == "uniform:2/channel"
    assert changed["b"] == config["b"]
    with pytest.raises(PrecisionError, match=r"no layer 'a\.y' in this config: did you mean 'a\.x'"):
        config.replace(**{"a.y": LayerPrecision.shorthand("w2a2")})


def test_mean_bits_is_over_layers_and_counts_float_as_32() -> None:
    config = PrecisionConfig({"a": LayerPrecision.shorthand("w2a4"), "b": LayerPrecision.shorthand("w32a8")})
    assert config.mean_bits == (17.0, 6.0)


def test_config_that_was_pickled_is_found_in_another_process() -> None:
    config = PrecisionConfig.uniform(["a", "b"], LayerPrecision.shorthand("w4a4"))
    hash(config)  # texts hash differently in every process
    code = (
        "import pickle, sys; from mpsearch.precision import LayerPrecision, PrecisionConfig; "
        "config = PrecisionConfig.uniform(['a', 'b'], LayerPrecision.shorthand('w4a4')); "
        "assert pickle.load(sys.stdin.buffer) in {config}"
    )
    subprocess.run([sys.executable, "-c", code], input=pickle.dumps(config), check=True)
