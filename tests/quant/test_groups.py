"""Groups of input features that share a scale: as text, in the quantizer, in costs, and in exports."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mpsearch
from mpsearch.cost.energy import FP32_ADD_PJ, FP32_MULTIPLY_PJ, mac_pj
from mpsearch.cost.memory import weight_bytes
from mpsearch.errors import ExportError, PrecisionError
from mpsearch.exporters import packed
from mpsearch.exporters.fit import HOLD_GROUPS, fit
from mpsearch.exporters.targets import TARGETS
from mpsearch.exporters.verify import Verified
from mpsearch.graph.facts import LayerInfo
from mpsearch.precision import LayerPrecision, Precision, PrecisionConfig
from mpsearch.ptq.pipeline import PtqMethod, ptq
from mpsearch.quant.fused import fuse
from mpsearch.quant.groups import from_groups, spread_groups, to_groups
from mpsearch.quant.prepare import inspect_network, prepare, quant_layers
from mpsearch.quant.quantizer import Quantizer
from mpsearch.quant.ranges import weight_step
from mpsearch.quant.switch import make_quantizer
from mpsearch.space.build import build_space
from mpsearch.space.choices import parse_choices
from mpsearch.space.spec import parse_space

KINDS = ("uniform:4", "uniform:1", "shift:3", "apot:4")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def quantizer_of(w: Tensor, precision: Precision, axis: int = 0) -> Quantizer:
    channels = w.shape[axis]
    quantizer = make_quantizer(
        [precision.quantizer],
        channels,
        w.dim(),
        signed=True,
        offset=False,
        elements=w.numel() // channels,
        channel_axis=axis,
    )
    quantizer.set_precision(precision)
    quantizer.set_range(weight_step(w.movedim(axis, 0).flatten(1), precision))
    return quantizer


class Kinds(nn.Module):
    """An embedding, a convolution, a transposed one along the other axis, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 12)
        self.conv = nn.Conv1d(12, 8, 3)
        self.norm = nn.BatchNorm1d(8)
        self.up = nn.ConvTranspose1d(8, 6, 2, stride=2)
        self.head = nn.Linear(6, 5)
        nn.init.uniform_(self.norm.weight, 0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(self.table(x).transpose(1, 2))).relu()
        z: Tensor = self.head(self.up(y).relu().mean(2))
        return z


def network(weight: str, activation: str = "uniform:8") -> tuple[nn.Module, Tensor, mpsearch.QuantizedNetwork]:
    model, x = Kinds().eval(), torch.randint(11, (16, 9))
    graph = inspect_network(model, x)
    config = PrecisionConfig.uniform(
        [layer.name for layer in graph.quantizable], LayerPrecision.parse(weight, activation)
    )
    prepared = prepare(model, config, x, graph.layers).eval()
    return model, x, mpsearch.QuantizedNetwork(prepared, graph.layers, "net", "none", example_input=x, samples=x)


def test_a_group_is_written_behind_the_bits_and_read_again() -> None:
    precision = Precision.parse("uniform:4/group128", "channel")
    assert (precision.granularity, precision.group, str(precision)) == ("group128", 128, "uniform:4/group128")
    assert Precision.parse("uniform:4", "channel").group is None
    assert LayerPrecision.shorthand("w4a8/group32").weight.group == 32
    ranged = parse_choices(["uniform:2-3/group64", "uniform:8"], "weight")
    assert [str(choice) for choice in ranged] == ["uniform:2/group64", "uniform:3/group64", "uniform:8/channel"]


@pytest.mark.parametrize("granularity", ["group", "group0", "group-1", "groups4", "group4x"])
def test_what_is_no_group_is_refused(granularity: str) -> None:
    with pytest.raises(PrecisionError, match=r"cannot read|unknown granularity.*group128"):
        Precision.parse(f"uniform:4/{granularity}", "channel")
    with pytest.raises(PrecisionError, match="unknown granularity"):
        Precision("uniform", 4, granularity)


def test_an_activation_has_no_groups() -> None:
    with pytest.raises(PrecisionError, match="per group: a layer's input has one scale"):
        LayerPrecision.parse("uniform:4", "uniform:4/group8")


def test_a_config_with_groups_is_of_the_schema_and_comes_back() -> None:
    config = PrecisionConfig({"fc": LayerPrecision.parse("uniform:4/group64", "uniform:8")})
    document = json.loads(json.dumps(config.to_json()))
    assert document["fc"]["weight"] == {"quantizer": "uniform", "bits": 4, "granularity": "group64"}
    assert PrecisionConfig.from_json(document) == config
    schema = json.loads((files("mpsearch") / "schema" / "precision-config-1.json").read_text())
    pattern = schema["$defs"]["precision"]["properties"]["granularity"]["pattern"]
    for text in ("channel", "tensor", "group64"):
        assert re.search(pattern, text), text
    assert not re.search(pattern, "group0")


@pytest.mark.parametrize(("shape", "axis"), [((4, 10), 0), ((10, 4), 1), ((4, 3, 3, 2), 0), ((5, 4, 3), 1)])
@pytest.mark.parametrize("size", [1, 4, 7, 100])
def test_groups_are_consecutive_features_of_a_channel(shape: tuple[int, ...], axis: int, size: int) -> None:
    w = torch.randn(shape)
    rows = w.movedim(axis, 0).flatten(1)
    groups = to_groups(w, axis, size)
    assert torch.equal(groups[0], rows[0, :size])
    assert torch.equal(from_groups(groups, w, axis), w)
    count = len(groups) // len(rows)
    values = torch.arange(float(len(groups))).view(len(rows), count)
    spread = spread_groups(values, w, axis, size).movedim(axis, 0).flatten(1)
    expected = values.repeat_interleave(min(size, rows.shape[1]), dim=1)[:, : rows.shape[1]]
    assert torch.equal(spread, expected)


@pytest.mark.parametrize("text", KINDS)
@pytest.mark.parametrize("axis", [0, 1])
def test_each_group_is_quantized_as_if_it_were_a_weight_of_its_own(text: str, axis: int) -> None:
    w = torch.randn(3, 10) * torch.logspace(-2, 1, 10)
    size = 4
    whole = (w if axis == 0 else w.t()).clone(memory_format=torch.contiguous_format).requires_grad_()
    together = quantizer_of(whole.detach(), Precision.parse(f"{text}/group{size}", "channel"), axis).eval()
    y = together(whole)
    assert together.step.shape == (3, 3)
    target = torch.randn_like(w)
    ((y if axis == 0 else y.t()) * target).sum().backward()
    assert whole.grad is not None
    assert together.step.grad is not None
    for channel in range(3):
        for group in range(3):
            part = (slice(channel, channel + 1), slice(group * size, (group + 1) * size))
            alone = w[part].clone().requires_grad_()
            one = quantizer_of(alone.detach(), Precision.parse(text, "channel")).eval()
            found = y if axis == 0 else y.t()
            assert torch.equal(one(alone), found[part])
            assert torch.equal(
                one.codes(alone), (together.codes(whole) if axis == 0 else together.codes(whole).t())[part]
            )
            (one(alone) * target[part]).sum().backward()
            gradient = whole.grad if axis == 0 else whole.grad.t()
            assert torch.equal(alone.grad, gradient[part])
            # The short last group counts as a full one in LSQ's gradient scale 1 / sqrt(N p).
            shorter = (alone.numel() / size) ** 0.5
            torch.testing.assert_close(one.step.grad.flatten()[0] * shorter, together.step.grad[channel, group])


def test_smaller_groups_have_smaller_errors() -> None:
    w = torch.randn(8, 256) * torch.rand(8, 256).exp() ** 3
    errors = []
    for granularity in ("tensor", "channel", "group64", "group16", "group4"):
        quantizer = quantizer_of(w, Precision("uniform", 3, granularity)).eval()
        errors.append(float((quantizer(w) - w).detach().square().sum()))
    assert errors == sorted(errors, reverse=True)


def test_one_quantizer_goes_from_groups_to_channels_and_back() -> None:
    w = torch.randn(6, 20)
    quantizer = make_quantizer(["uniform", "shift"], 6, 2, signed=True, offset=False, elements=20)
    for text in ("uniform:4/group8", "shift:3", "shift:3/group16", "float", "uniform:2/tensor", "uniform:4/group8"):
        precision = Precision.parse(text, "channel")
        quantizer.set_precision(precision)
        if not precision.is_float:
            quantizer.set_range(weight_step(w, precision))
        fresh = w if precision.is_float else quantizer_of(w, precision).eval()(w)
        assert torch.equal(quantizer.eval()(w), fresh), text
        assert quantizer.step.shape == ((6, -(-20 // precision.group)) if precision.group else (6, 1))


@pytest.mark.slow
@pytest.mark.compile
def test_compiled_groups_are_the_same() -> None:
    for text in ("uniform:4/group8", "uniform:3/group7"):
        w = torch.randn(6, 5, 3, 3).contiguous(memory_format=torch.channels_last)
        quantizer = quantizer_of(w, Precision.parse(text, "channel"))
        y = quantizer(w)
        torch.testing.assert_close(fuse(quantizer)(w), y)


def test_ptq_with_groups_rounds_better_than_to_the_nearest() -> None:
    model = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 6)).eval()
    x = torch.randn(256, 24)
    config = LayerPrecision.parse("uniform:2/group8", "float")
    found = {}
    for rounding in ("adaround", "nearest"):
        method = PtqMethod(rounding=rounding, bias_correction="none", adaround_steps=500, equalize=False)
        result = ptq(model, config, x, method)
        assert {layer.weight.group for layer in result.config.values()} == {8}
        found[rounding] = float((result.model(x) - model(x)).detach().square().mean())
    assert found["adaround"] < 0.8 * found["nearest"]


def test_a_space_lists_groups_beside_channels() -> None:
    model, x = Kinds().eval(), torch.randint(11, (4, 9))
    graph = inspect_network(model, x)
    rule = {"match": "*", "weight": ["uniform:4/group64", "uniform:8"], "activation": ["uniform:8"]}
    space = build_space(
        parse_space({"name": "groups", "rules": [rule], "first": "search", "last": "search"}), graph.layers
    )
    assert {str(c) for slot in space.free for c in slot.choices} == {"uniform:4/group64", "uniform:8/channel"}
    config = space.uniform(4)
    assert {layer.weight.group for layer in config.values()} == {64}
    assert space.config_of(space.params_of(config)) == config
    assert len(space.neighbours(config)) == len(space.free)


LINEAR = LayerInfo("fc", "linear", (10, 300), (300,), (10,), 3000, 3000, 300)


def test_the_scales_of_groups_are_bytes_of_the_weight() -> None:
    assert weight_bytes(LINEAR, LayerPrecision.parse("uniform:4/group128", "uniform:8")) == 1500 + 4 * 10 * 3
    assert weight_bytes(LINEAR, LayerPrecision.parse("uniform:4/group300", "uniform:8")) == 1500 + 4 * 10
    transposed = LayerInfo("up", "conv_transpose1d", (6, 4, 3), (), (), 0, 72, 0)  # 4 rows of 18
    assert weight_bytes(transposed, LayerPrecision.parse("uniform:8/group5", "uniform:8")) == 72 + 4 * 4 * 4


def test_the_sum_of_every_group_but_one_is_scaled_and_added_in_float() -> None:
    channel, whole, groups = (
        mac_pj(LayerPrecision.parse(f"uniform:4/{g}", "uniform:8"), 256, True)
        for g in ("channel", "group256", "group64")
    )
    assert channel == whole
    narrower = 2 * 0.1 / 32  # bits of the accumulator: log2 64 instead of log2 256
    assert groups == pytest.approx(channel - narrower + 3 * (FP32_MULTIPLY_PJ + FP32_ADD_PJ) / 256)


@pytest.mark.parametrize("weight", ["uniform:4/group5", "uniform:1/group4", "shift:3/group7", "apot:4/group100"])
def test_native_and_packed_give_networks_with_groups_back(weight: str, tmp_path: Path) -> None:
    model, x, quantized = network(weight)
    expected = quantized.model(x)
    mpsearch.export(quantized, "native", tmp_path / "native", verify=False)
    loaded = mpsearch.load(model, tmp_path / "native")
    assert torch.equal(loaded(x), expected)
    assert {str(layer.precision.weight) for layer in quant_layers(loaded).values()} == {weight}
    mpsearch.export(quantized, "packed", tmp_path / "packed", verify=False)
    torch.testing.assert_close(packed.load(model, tmp_path / "packed")(x), expected, rtol=1e-5, atol=1e-6)


def test_a_target_without_groups_refuses_them_by_layer_and_names_one_that_has() -> None:
    _, _, quantized = network("uniform:4/group4")
    without = [name for name, target in TARGETS.items() if not target.holds.groups]
    assert sorted(HOLD_GROUPS + tuple(without)) == sorted(TARGETS)
    for name in without:
        with pytest.raises(ExportError, match=r"weight uniform:4/group4") as refused:
            fit(quantized, name, TARGETS[name].holds, allow_lossy=False)
        assert "held by native, packed, onnx" in str(refused.value)
    with pytest.raises(ExportError) as refused:
        fit(quantized, "qonnx", TARGETS["qonnx"].holds, allow_lossy=False)
    text = str(refused.value)
    assert "head (linear) weight uniform:4/group4: uniform:4/channel would hold it, with other values" in text
    fitted, conversions = fit(quantized, "qonnx", TARGETS["qonnx"].holds, allow_lossy=True)
    assert {str(layer.weight) for layer in fitted.config.values()} == {"uniform:4/channel"}
    assert not any(conversion.same_values for conversion in conversions)


@pytest.mark.parametrize("weight", ["uniform:4/group5", "uniform:1/group4", "uniform:8/group3", "shift:3/group7"])
def test_onnxruntime_answers_as_the_network_with_groups(weight: str, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="needs mpsearch[targets]; `make test-all` installs it")
    _, _, quantized = network(weight)
    verified = mpsearch.export(quantized, "onnx", tmp_path / "onnx").verified
    assert isinstance(verified, Verified)
    assert verified.same_answers == verified.samples
