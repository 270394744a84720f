"""What a target cannot hold is refused by layer name, or converted and listed; never in silence."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import mpsearch
from mpsearch.errors import ExportError
from mpsearch.exporters.fit import Holds, fit
from mpsearch.exporters.packages import PACKAGES, need
from mpsearch.exporters.plain import plain_copy
from mpsearch.exporters.targets import EVERY_KIND, TARGETS
from mpsearch.graph.layers import inspect_model
from mpsearch.precision import BITS, LayerPrecision, PrecisionConfig
from mpsearch.quant.prepare import quant_layers

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
FOUR_TO_EIGHT = Holds({"uniform": range(4, 9)}, {"uniform": range(4, 9)}, EVERY_KIND)


def network(*precisions: tuple[str, str]) -> mpsearch.QuantizedNetwork:
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for _ in precisions:
        parts += [nn.Linear(6, 6), nn.ReLU()]
    model = nn.Sequential(*parts).eval()
    layers = inspect_model(model, X).layers
    config = PrecisionConfig(
        {layer.name: LayerPrecision.parse(*pair) for layer, pair in zip(layers, precisions, strict=True)}
    )
    return mpsearch.QuantizedNetwork(mpsearch.prepare(model, config, X, layers).eval(), layers, "net", "noise")


def test_what_is_held_passes_untouched() -> None:
    given = network(("uniform:4", "uniform:8"), ("float", "float"))
    assert fit(given, "here", FOUR_TO_EIGHT, allow_lossy=False) == (given, ())


def test_refusal_names_each_layer_and_its_alternative() -> None:
    given = network(("uniform:3", "uniform:8"), ("shift:5", "shift:2"), ("uniform:8", "uniform:8"))
    with pytest.raises(ExportError) as refused:
        fit(given, "here", FOUR_TO_EIGHT, allow_lossy=False)
    message = str(refused.value)
    assert "0 (linear) weight uniform:3/channel: uniform:4/channel would hold it, the same values" in message
    assert "2 (linear) weight shift:5/channel: uniform:8/channel would hold it, with other values" in message
    assert "2 (linear) activation shift:2/tensor: uniform:4/tensor would hold it, with other values" in message
    assert "\n  4 " not in message
    assert "--allow-lossy" in message
    assert "activations uniform:4-8 or float" in message


WEIGHTS = [f"{name}:{bits}" for name in ("uniform", "shift", "apot") for bits in BITS[name] if bits <= 8]


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_same_values_means_the_same_values(weight: str, granularity: str) -> None:
    given = network((f"{weight}/{granularity}", "float"))
    fitted, conversions = fit(given, "here", Holds({"uniform": range(8, 9)}, {}, EVERY_KIND), allow_lossy=True)
    same = torch.equal(fitted.model(X), given.model(X))
    assert all(conversion.same_values for conversion in conversions) == same
    assert same == (weight != "shift:5")  # 2^14 is the only one beyond 8 bits
    assert str(fitted.config["0"].weight) == f"uniform:8/{granularity}"
    assert len(conversions) == (weight != "uniform:8")


def test_activations_keep_their_range() -> None:
    given = network(("float", "uniform:2"), ("float", "shift:3"), ("float", "apot:2"))
    fitted, conversions = fit(given, "here", FOUR_TO_EIGHT, allow_lossy=True)
    assert [str(c.after) for c in conversions] == ["uniform:4/tensor", "uniform:4/tensor", "uniform:4/tensor"]
    for name, old in quant_layers(given.model).items():
        new = quant_layers(fitted.model)[name].input_quantizer
        far = torch.tensor([-1e6, 1e6])
        torch.testing.assert_close(new(far), old.input_quantizer(far), rtol=0, atol=new.step.item() / 2 + 1e-6)


def test_layer_kind_that_is_not_held_becomes_float() -> None:
    given = network(("uniform:4", "uniform:4"))
    fitted, conversions = fit(given, "here", replace(FOUR_TO_EIGHT, kinds=frozenset({"conv2d"})), allow_lossy=True)
    assert [str(c) for c in conversions] == [
        "0 weight: uniform:4/channel becomes float, same values",
        "0 activation: uniform:4/tensor becomes float, values change",
    ]
    assert torch.equal(fitted.model[0].weight, quant_layers(given.model)["0"].quantized_weight())  # type: ignore[index]


def test_tied_layers_are_converted_each_on_its_own_grid() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)).eval()
    model[2].weight = model[0].weight
    layers = inspect_model(model, X).layers
    quantized = mpsearch.prepare(
        model, PrecisionConfig.uniform(["0", "2"], LayerPrecision.parse("shift:3", "float")), X, layers
    ).eval()
    quant_layers(quantized)["2"].weight_quantizer.step.data.mul_(1.5)
    given = mpsearch.QuantizedNetwork(quantized, layers, "net", "noise")
    fitted, _ = fit(given, "here", FOUR_TO_EIGHT, allow_lossy=True)
    assert torch.equal(fitted.model(X), given.model(X))


def test_network_that_is_given_stays_as_it_is() -> None:
    given = network(("shift:3", "uniform:2"))
    before = given.model(X)
    fit(given, "here", FOUR_TO_EIGHT, allow_lossy=True)
    plain_copy(given.model)
    assert torch.equal(given.model(X), before)


def test_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGES, "brevitas", ("no_such_thing",))
    with pytest.raises(ExportError, match=r"the package no_such_thing: pip install 'mpsearch\[brevitas\]'"):
        need("brevitas")


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_says_what_it_holds_in_known_words(name: str) -> None:
    holds = TARGETS[name].holds
    assert holds.kinds <= EVERY_KIND
    for widths in (holds.weight, holds.activation):
        for quantizer, bits in widths.items():
            assert set(bits) <= set(BITS[quantizer])
