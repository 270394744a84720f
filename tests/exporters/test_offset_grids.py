"""Offset grids in every export target: held exactly by the four that can add a real number, refused by the others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mpsearch
from mpsearch.errors import ExportError
from mpsearch.exporters import native, packed
from mpsearch.exporters.fit import HOLD_OFFSET_GRIDS, fit
from mpsearch.exporters.targets import TARGETS
from mpsearch.exporters.verify import Verified
from mpsearch.graph.layers import inspect_model
from mpsearch.precision import LayerPrecision, PrecisionConfig
from mpsearch.quant.prepare import quant_layers

IMAGES = torch.randn(64, 3, 10, 10, generator=torch.Generator().manual_seed(1))


class Branches(nn.Module):
    """Convolutions with and without norms and bias, a depthwise and a transposed one, a sum, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.hidden = nn.Linear(6, 16)
        self.last = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = torch.relu(x + self.norm(self.depthwise(x)))
        return self.last(torch.relu(self.hidden(self.up(x).mean((2, 3)))))


def float_network() -> nn.Module:
    torch.manual_seed(0)
    model = Branches()
    for norm in (model.first[1], model.norm):
        norm.weight.data = torch.randn(8)
        norm.running_mean = torch.randn(8)
    return model.eval()


def on_offset_grids(bits: int, inputs: str = "offset") -> mpsearch.QuantizedNetwork:
    """Weights from their smallest value on; inputs from a real value on, and up to a code that is not the last."""
    model = float_network()
    layers = inspect_model(model, IMAGES).layers
    activation = "float" if inputs == "float" else f"uniform:{max(bits, 2)}"
    config = PrecisionConfig.uniform([la.name for la in layers], LayerPrecision.parse(f"uniform:{bits}", activation))
    quantized = mpsearch.prepare(model, config, IMAGES, layers).eval()
    for number, layer in enumerate(quant_layers(quantized).values()):
        rows = layer.weight.detach().movedim(layer.channel_axis, 0).flatten(1)  # type: ignore[operator, union-attr]
        low, high = rows.amin(1), rows.amax(1)
        layer.weight_quantizer.set_offset_grid((high - low) / (2**bits - 1), low, 2**bits - 1)
        if inputs == "offset":
            quantizer = layer.input_quantizer
            step, beta = quantizer.step.detach().clone(), quantizer.beta
            lower = torch.tensor(0.0123) - 0.01 * number if beta is None else beta.detach().clone()
            quantizer.set_offset_grid(step, lower, 2 ** max(bits, 2) - 2)
    return mpsearch.QuantizedNetwork(
        quantized, layers, "branches", "noise", example_input=IMAGES[:2], samples=IMAGES, float_model=float_network()
    )


@pytest.mark.parametrize(
    ("bits", "inputs"), [(1, "offset"), (3, "offset"), (8, "offset"), (3, "uniform"), (3, "float")]
)
@pytest.mark.parametrize("to", HOLD_OFFSET_GRIDS)
def test_a_target_that_holds_offset_grids_answers_as_the_network(
    to: str, bits: int, inputs: str, tmp_path: Path
) -> None:
    if to in ("onnx", "qonnx"):
        pytest.importorskip("onnxscript")
        pytest.importorskip("qonnx" if to == "qonnx" else "onnxruntime")
    exported = mpsearch.export(on_offset_grids(bits, inputs), to, tmp_path / "out")
    assert isinstance(exported.verified, Verified)
    assert exported.verified.same_answers == 64
    assert exported.verified.max_difference < 1e-5
    assert exported.conversions == ()


def test_native_gives_every_bit_back_and_says_the_same_bits(tmp_path: Path) -> None:
    network = on_offset_grids(3)
    folder = mpsearch.export(network, "native", tmp_path / "out").path
    loaded = native.load(float_network(), folder)
    assert torch.equal(loaded(IMAGES), network.model(IMAGES))
    document = json.loads((folder / "precision.json").read_text())
    assert document["layers"]["hidden"]["weight"] == {"quantizer": "uniform", "bits": 3, "granularity": "channel"}


def test_packed_codes_have_the_bits_and_the_lower_ends_a_number_a_channel(tmp_path: Path) -> None:
    network = on_offset_grids(3)
    folder = mpsearch.export(network, "packed", tmp_path / "out").path
    entry = json.loads((folder / "export.json").read_text())["packed"]["hidden"]
    assert entry["codes"][1] == 6 * 16 * 3 // 8
    assert entry["scales"][1] == entry["lower"][1] == 16
    torch.testing.assert_close(packed.load(float_network(), folder)(IMAGES), network.model(IMAGES))


@pytest.mark.parametrize("to", sorted(set(TARGETS) - set(HOLD_OFFSET_GRIDS) - {"mhaq"}))
def test_others_refuse_by_layer_and_name_who_holds_them(to: str) -> None:
    network = on_offset_grids(3)
    with pytest.raises(ExportError) as refused:
        fit(network, to, TARGETS[to].holds, allow_lossy=False)
    message = str(refused.value)
    assert (
        "hidden (linear) weight uniform:3/channel on an offset grid: uniform:3/channel would hold it, with" in message
    )
    assert "held by native, packed, qonnx, onnx" in message


def test_what_is_converted_keeps_the_range_and_is_listed() -> None:
    network = on_offset_grids(4)
    holds = TARGETS["modelopt"].holds
    fitted, conversions = fit(network, "modelopt", holds, allow_lossy=True)
    assert all(not conversion.same_values and conversion.from_offset_grid for conversion in conversions)
    assert len(conversions) == 2 * len(network.config)
    assert fitted.config == network.config
    assert all("top" not in name for name in fitted.model.state_dict())
    ours, theirs = network.model(IMAGES), fitted.model(IMAGES)
    assert 0 < (ours - theirs).abs().mean().item() < 0.3 * ours.std().item()


def test_the_message_names_the_targets_that_hold_them() -> None:
    holding = {name for name, target in TARGETS.items() if target.holds.offset_grids}
    assert holding - {"mhaq"} == set(HOLD_OFFSET_GRIDS)  # MHAQ is given bits alone
