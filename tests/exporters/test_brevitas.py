"""A Brevitas model made from ours has our bits, gives our outputs, and trains."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mpsearch
from mpsearch.errors import ExportError
from mpsearch.exporters.brevitas import load, to_brevitas
from mpsearch.exporters.verify import Verified
from mpsearch.graph.facts import ModelGraph
from mpsearch.graph.layers import inspect_model
from mpsearch.precision import LayerPrecision, PrecisionConfig
from mpsearch.quant.prepare import quant_layers

pytest.importorskip("brevitas", reason="needs mpsearch[brevitas]; `make test-all` installs it")

WIDTHS = [f"uniform:{bits}" for bits in range(1, 9)]


def test_outputs_and_bits_agree_on_digits(
    quantize, digits: tuple[nn.Module, Tensor, ModelGraph], tmp_path: Path
) -> None:
    network = quantize(WIDTHS, WIDTHS[::-1])
    model, images, _ = digits
    mpsearch.export(network, "brevitas", tmp_path / "out")
    theirs = load(model, tmp_path / "out")
    with torch.no_grad():
        assert (theirs(images) - network.model(images)).abs().max() < 1e-5
    for name, precision in network.config.items():
        layer = theirs.get_submodule(name)
        assert int(layer.weight_quant.bit_width()) == precision.weight.bits
        assert int(layer.input_quant.bit_width()) == precision.activation.bits
        binary = "BinaryQuant" in type(layer.weight_quant.tensor_quant).__name__
        assert binary == (precision.weight.bits == 1)


def every_kind() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv1d(3, 8, 3), nn.ConvTranspose1d(8, 4, 3, stride=2, output_padding=1), nn.Unflatten(1, (4, 1)),
        nn.Conv2d(4, 8, (1, 3), groups=2), nn.ConvTranspose2d(8, 4, (1, 3), bias=False), nn.Unflatten(2, (1, 1)),
        nn.Conv3d(4, 4, (1, 1, 3), padding_mode="zeros"), nn.ConvTranspose3d(4, 2, (1, 1, 3)), nn.Flatten(),
        nn.Linear(34 * 2, 5),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_every_kind_of_layer_agrees_and_trains(granularity: str) -> None:
    model = every_kind()
    x = torch.randn(8, 3, 18)
    layers = inspect_model(model, x).layers
    bits = cycle([1, 2, 3, 8])
    config = PrecisionConfig(
        {layer.name: LayerPrecision.parse(f"uniform:{next(bits)}/{granularity}", "uniform:6") for layer in layers}
    )
    ours = mpsearch.prepare(model, config, x, layers).eval()
    theirs = to_brevitas(ours)
    torch.testing.assert_close(theirs(x), ours(x), rtol=0, atol=1e-5)
    learned = dict(theirs.named_parameters())
    assert sum("scaling_impl" in name for name in learned) == 2 * len(layers)
    before = {name: value.detach().clone() for name, value in learned.items()}
    optimizer = torch.optim.SGD(theirs.train().parameters(), lr=0.01)
    loss = F.cross_entropy(theirs(x), torch.arange(8) % 5)
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    for name, value in learned.items():
        if name.endswith((".weight", "scaling_impl.value")):
            assert not torch.equal(value, before[name]), name


def test_what_brevitas_cannot_hold_is_refused_by_name(quantize, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"conv1 \(conv2d\) weight shift:4/channel: uniform:8/channel would hold it"):
        mpsearch.export(quantize(["shift:4"], ["uniform:8"]), "brevitas", tmp_path / "out")
    exported = mpsearch.export(quantize(["shift:4"], ["uniform:8"]), "brevitas", tmp_path / "out", allow_lossy=True)
    assert all(conversion.same_values for conversion in exported.conversions)


def test_positive_offset_is_refused(quantize) -> None:
    model = quantize(["uniform:4"], ["uniform:4"]).model
    layer = next(layer for layer in quant_layers(model).values() if layer.input_quantizer.beta is not None)
    layer.input_quantizer.beta.data.fill_(1.0)
    with pytest.raises(ExportError, match="offset of its input is 1, Brevitas has none above zero"):
        to_brevitas(model)


class Gained(nn.Linear):
    """A layer with a parameter, an attribute and a method that its parent uses."""

    def __init__(self, features: int) -> None:
        super().__init__(features, features)
        self.gain, self.power = nn.Parameter(torch.tensor(2.0)), 3

    def scale(self) -> Tensor:
        return self.gain**self.power


class Uses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(8, 8), Gained(8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(self.first(x)) * self.layer.scale()
        return y


@pytest.mark.parametrize(("weight", "activation"), [("uniform:4", "uniform:4"), ("float", "uniform:2")])
def test_a_layer_keeps_what_its_class_has(weight: str, activation: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Uses().eval(), torch.randn(64, 8)
    layers = inspect_model(net, x).layers
    config = PrecisionConfig.uniform(["first", "layer"], LayerPrecision.parse(weight, activation))
    prepared = mpsearch.prepare(net, config, x, layers).eval()
    facts = {"example_input": x[:2], "samples": x, "float_model": net}
    exported = mpsearch.export(
        mpsearch.QuantizedNetwork(prepared, layers, "uses", "noise", **facts), "brevitas", tmp_path / "out"
    )
    assert isinstance(exported.verified, Verified)
    theirs = load(net, exported.path)
    assert isinstance(theirs.layer, Gained)
    theirs(x).square().mean().backward()
    assert theirs.layer.gain.grad is not None


@pytest.mark.parametrize("bits", [1, 4])
def test_a_grouped_transposed_convolution_needs_one_scale(bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.ConvTranspose2d(4, 4, 2, groups=2), nn.ReLU()).eval(), torch.randn(8, 4, 5, 5)
    layers = inspect_model(net, x).layers

    def quantized(weight: str) -> mpsearch.QuantizedNetwork:
        config = PrecisionConfig.uniform(["0"], LayerPrecision.parse(weight, "float"))
        prepared = mpsearch.prepare(net, config, x, layers).eval()
        return mpsearch.QuantizedNetwork(prepared, layers, "net", "noise", example_input=x, float_model=net)

    with pytest.raises(ExportError, match=r"layer '0': Brevitas wants a scale for each of its 4 outputs"):
        mpsearch.export(quantized(f"uniform:{bits}"), "brevitas", tmp_path / "out")
    exported = mpsearch.export(quantized(f"uniform:{bits}/tensor"), "brevitas", tmp_path / "out")
    assert isinstance(exported.verified, Verified)
