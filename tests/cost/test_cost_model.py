"""Cost models over whole networks: published BOPs, shared tensors, float layers, bounds, and what is refused."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models import resnet18

from mpsearch.cost.model import COST_MODELS, RelativeCost, _LayerPrices, cost_of
from mpsearch.errors import CostError, PrecisionError
from mpsearch.graph.facts import LayerInfo
from mpsearch.precision import LayerPrecision, Precision, PrecisionConfig
from mpsearch.study import COST_NAMES

A = LayerInfo("a", "conv2d", (4, 2, 3, 3), (2, 8, 8), (4, 8, 8), 4608, 72, 18)
B = LayerInfo("b", "linear", (10, 256), (256,), (10,), 2560, 2570, 256, signed_input=False)
PAIR = (A, B)


def uniform(text: str, *layers: LayerInfo) -> PrecisionConfig:
    names = [layer.name for layer in layers if layer.reason is None]
    return PrecisionConfig.uniform(names, LayerPrecision.shorthand(text))


def layers_of(model: nn.Module, shape: tuple[int, ...]) -> list[LayerInfo]:
    """Convolutions and linear layers of a network, measured in one forward pass."""
    found: list[LayerInfo] = []

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def measure(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            weight = module.get_parameter("weight")
            fan_in = prod(weight.shape[1:])
            params = sum(parameter.numel() for parameter in module.parameters())
            macs = output[0].numel() * fan_in
            shapes = tuple(weight.shape), tuple(inputs[0].shape[1:]), tuple(output.shape[1:])
            kind = "linear" if isinstance(module, nn.Linear) else "conv2d"
            found.append(LayerInfo(name, kind, *shapes, macs, params, fan_in))

        return measure

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(hook(name))
    with torch.no_grad():
        model.eval()(torch.zeros(1, *shape))
    return found


@pytest.fixture(scope="module")
def resnet() -> list[LayerInfo]:
    return layers_of(resnet18(), (3, 224, 224))


@pytest.mark.parametrize(("bits", "giga"), [("w32a32", 1858), ("w8a8", 116)])
def test_resnet18_has_the_bops_of_hawq_v3(resnet: list[LayerInfo], bits: str, giga: int) -> None:
    assert sum(layer.macs for layer in resnet) == pytest.approx(1.814e9, rel=1e-3)
    assert round(cost_of(resnet, uniform(bits, *resnet), "bops").total / 1e9) == giga


def test_first_and_last_layer_count_at_the_width_they_have(resnet: list[LayerInfo]) -> None:
    first, last = resnet[0], resnet[-1]
    config = uniform("w4a4", *resnet).replace(
        **{layer.name: LayerPrecision.shorthand("w8a8") for layer in (first, last)}
    )
    inner = sum(layer.macs for layer in resnet[1:-1])
    assert cost_of(resnet, config, "bops").total == inner * 16 + (first.macs + last.macs) * 64


def test_every_named_model_is_there_and_no_other() -> None:
    assert set(COST_MODELS) == set(COST_NAMES)


@pytest.mark.parametrize(
    ("model", "unit", "total"),
    [
        ("bops", "BOPs", 16 * (4608 + 2560)),
        # mult(4, 4) = 0.0520836; accumulators of 8 + 5 and 8 + 8 bits
        ("shift_energy", "pJ", 4608 * (0.0520836 + 13 * 0.003125) + 2560 * (0.0520836 + 16 * 0.003125)),
        ("shift_energy_acc32", "pJ", (4608 + 2560) * (0.0520836 + 32 * 0.003125)),
        ("weight_bytes", "bytes", (36 + 16) + (1280 + 40 + 40)),  # codes + scales, and the bias of b
        ("activation_bytes", "bytes", 64 + 128),
        ("activation_bytes_peak", "bytes", 64 + 128),  # a: 128 in, 256 out; b: 256 in, 10 out
        ("memory_energy", "pJ", 1412 * 162.5 + 2 * 192 * 12.5),
    ],
)
def test_total_equals_hand_arithmetic(model: str, unit: str, total: float) -> None:
    cost = cost_of(PAIR, uniform("w4a4", *PAIR), model)
    assert (cost.total, cost.unit) == (pytest.approx(total, rel=1e-6), unit)
    assert list(cost.per_layer) == ["a", "b"]


@pytest.mark.parametrize("model", COST_MODELS)
def test_total_is_the_sum_of_the_layers_or_their_peak(model: str) -> None:
    cost = cost_of(PAIR, uniform("w4a8", *PAIR), model)
    combine = max if model == "activation_bytes_peak" else sum
    assert cost.total == pytest.approx(combine(cost.per_layer.values()))


def test_layer_that_cannot_be_quantized_is_priced_as_float_and_named() -> None:
    odd = replace(B, name="odd", reason="its weight is computed")
    cost = cost_of((A, odd), uniform("w8a8", A), "bops")
    assert cost.float_layers == ("odd",)
    assert cost.per_layer == {"a": 64 * 4608, "odd": 1024 * 2560}


def test_shared_weight_is_stored_once_at_its_widest_and_each_bias_on_its_own() -> None:
    tied = replace(B, name="c", weight_group="b")
    config = uniform("w4a8", A, B, tied).replace(c=LayerPrecision.shorthand("w8a8"))
    cost = cost_of((A, replace(B, weight_group="b"), tied), config, "weight_bytes")
    assert cost.per_layer == {"a": 52, "b": 40, "c": 2560 + 40 + 40}


def test_shared_input_is_held_once_but_read_by_each() -> None:
    twin = replace(A, name="twin", input_group="a")
    layers = (replace(A, input_group="a"), twin)
    config = uniform("w8a8", *layers)
    assert cost_of(layers, config, "activation_bytes").per_layer == {"a": 128, "twin": 0}
    weights = 2 * (72 + 16) * 162.5
    assert cost_of(layers, config, "memory_energy").total == pytest.approx(weights + (1 + 2) * 128 * 12.5)


@pytest.mark.parametrize("model", COST_MODELS)
def test_relative_cost_is_1_at_the_reference_and_agrees_with_cost_of(model: str) -> None:
    relative = RelativeCost(PAIR, model, reference="w8a8")
    config = uniform("w3a5", *PAIR)
    assert relative(uniform("w8a8", *PAIR)) == 1.0
    assert relative.absolute(config) == cost_of(PAIR, config, model)
    assert relative(config) == pytest.approx(cost_of(PAIR, config, model).total / relative.reference.total)


def test_reference_keeps_unquantizable_layers_float() -> None:
    odd = replace(B, name="odd", reason="its weight is computed")
    relative = RelativeCost((A, odd), "bops", reference="w4a4")
    assert relative.reference.total == 16 * 4608 + 1024 * 2560


@given(st.data())
@pytest.mark.parametrize("model", COST_MODELS)
def test_bounds_are_those_of_all_configs(model: str, data: st.DataObject) -> None:
    """Among them shift:5, which is dearer than uniform:5 and than shift:4."""
    sides = st.lists(st.sampled_from(["shift:5", "shift:3", "uniform:5", "apot:4", "float"]), min_size=1, unique=True)

    def side(granularity: str) -> list[Precision]:
        return [Precision.parse(text, "tensor" if granularity == "tensor" else "channel") for text in data.draw(sides)]

    choices = {
        layer.name: [LayerPrecision(*pair) for pair in product(side("channel"), side("tensor"))] for layer in PAIR
    }
    relative = RelativeCost(PAIR, model)
    costs = [relative(PrecisionConfig({"a": a, "b": b})) for a, b in product(choices["a"], choices["b"])]
    assert relative.bounds(choices) == (min(costs), max(costs))


def test_cheapest_is_not_the_fewest_bits_where_shift_is_dearer() -> None:
    relative = RelativeCost((B,), "shift_energy")
    pairs = [LayerPrecision.parse(weight, "uniform:4") for weight in ("shift:5", "uniform:6")]
    low, _ = relative.bounds({"b": pairs})
    assert low == relative(PrecisionConfig({"b": LayerPrecision.parse("uniform:6", "uniform:4")}))


def test_each_layer_is_priced_once_at_each_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [replace(A, name=f"layer{i}") for i in range(200)]
    widths = [LayerPrecision.shorthand(f"w{w}a{a}") for w in range(1, 9) for a in range(1, 9)]
    relative = RelativeCost(layers, "memory_energy")
    configs = [
        PrecisionConfig((layer.name, widths[(i * k) % 64]) for i, layer in enumerate(layers)) for k in range(500)
    ]
    priced: list[LayerPrecision] = []
    compute = _LayerPrices.__missing__
    monkeypatch.setattr(_LayerPrices, "__missing__", lambda self, pair: priced.append(pair) or compute(self, pair))
    for config in configs:
        relative(config)
    assert len(priced) <= 200 * 64 < 200 * len(configs)


def test_relative_cost_survives_pickling() -> None:
    relative = RelativeCost(PAIR)
    config = uniform("w4a4", *PAIR)
    assert pickle.loads(pickle.dumps(relative))(config) == relative(config)


def test_refused() -> None:
    odd = replace(B, name="odd", reason="its weight is computed")
    with pytest.raises(CostError, match=r"unknown cost model 'bobs'.*did you mean 'bops'"):
        cost_of(PAIR, uniform("w4a4", *PAIR), "bobs")
    with pytest.raises(CostError, match="layer 'b' has no precision: give every quantizable layer one"):
        cost_of(PAIR, uniform("w4a4", A))
    with pytest.raises(CostError, match=r"no quantizable layer 'c' in this network: valid: a, b"):
        cost_of(PAIR, uniform("w4a4", A, B, replace(A, name="c")))
    with pytest.raises(CostError, match=r"layer 'odd' stays float \(its weight is computed\): leave it out"):
        cost_of((A, odd), uniform("w4a4", A, replace(odd, reason=None)))
    with pytest.raises(PrecisionError, match="cannot read '8x8'"):
        RelativeCost(PAIR, reference="8x8")
    with pytest.raises(CostError, match="the network costs nothing under bops"):
        RelativeCost((), "bops")
    with pytest.raises(CostError, match="layer 'b' has no precision to choose"):
        RelativeCost(PAIR).bounds({"a": [LayerPrecision.shorthand("w8a8")], "b": []})
