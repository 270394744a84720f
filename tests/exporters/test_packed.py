"""A packed export is as small as the cost model says, and its unpacker gives the same outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import mpsearch
from mpsearch.errors import ExportError
from mpsearch.exporters import packed
from mpsearch.graph.facts import ModelGraph
from mpsearch.graph.layers import inspect_model
from mpsearch.precision import BITS, LayerPrecision, Precision, PrecisionConfig
from mpsearch.quant.prepare import quant_layers

WEIGHTS = [f"{name}:{bits}" for name in ("uniform", "shift", "apot") for bits in BITS[name]]


@given(st.integers(1, 8), st.lists(st.integers(0, 255), max_size=40))
def test_packing_restores_every_number_without_gaps(bits: int, numbers: list[int]) -> None:
    codes = torch.tensor([number % 2**bits for number in numbers], dtype=torch.int32)
    stored = packed.pack_bits(codes, bits)
    assert stored.numel() == -(-len(numbers) * bits // 8)
    assert packed.unpack_bits(stored, bits, len(numbers)).tolist() == codes.tolist()


def test_first_code_is_in_the_lowest_bits() -> None:
    assert packed.pack_bits(torch.tensor([5, 2]), 4).tolist() == [0x25]


@pytest.mark.parametrize("weight", WEIGHTS)
def test_codes_stand_for_the_values_that_the_layer_uses(weight: str) -> None:
    torch.manual_seed(0)
    precision = Precision.parse(weight, "channel")
    model = nn.Sequential(nn.Linear(200, 3))
    config = PrecisionConfig({"0": LayerPrecision.parse(weight, "float")})
    (layer,) = quant_layers(mpsearch.prepare(model, config, torch.randn(4, 200)).eval()).values()
    unsigned = packed.unsigned_codes(layer.weight_quantizer.codes(layer.weight), precision)  # type: ignore[arg-type]
    assert int(unsigned.min()) >= 0
    assert int(unsigned.max()) < 2**precision.bits
    step = layer.weight_quantizer.current_range()[0]
    assert torch.equal(step * packed.values_of(unsigned, precision), layer.quantized_weight())


def test_shift_code_is_sign_and_exponent() -> None:
    """-1/4 of a 4-bit shift weight: exponents -6..0, of which -2 is the fifth."""
    precision = Precision.parse("shift:4", "channel")
    assert packed.values_of(torch.tensor([0b1101]), precision).tolist() == [-0.25]
    assert packed.unsigned_codes(torch.tensor([-5]), precision).tolist() == [0b1101]


def without_norms() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3, groups=2, bias=False), nn.Tanh(),
        nn.ConvTranspose2d(64, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 64), nn.Linear(64, 10),
    ).eval()  # fmt: skip


def test_unpacked_network_gives_identical_outputs(tmp_path: Path) -> None:
    model, x = without_norms(), torch.randn(16, 1, 8, 8)
    layers = inspect_model(model, x).layers
    weights = ["shift:4", "apot:3", "uniform:1", "uniform:5/tensor", "float"]
    names = [layer.name for layer in layers]
    config = PrecisionConfig({n: LayerPrecision.parse(w, "uniform:6") for n, w in zip(names, weights, strict=True)})
    quantized = mpsearch.prepare(model, config, x, layers).eval()
    mpsearch.export(mpsearch.QuantizedNetwork(quantized, layers, "net", "noise"), "packed", tmp_path / "out")
    assert torch.equal(packed.load(without_norms(), tmp_path / "out")(x), quantized(x))


def test_tied_layers_share_codes_and_load_untied(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    model[2].weight = model[0].weight
    x = torch.randn(8, 64)
    layers = inspect_model(model, x).layers
    config = PrecisionConfig.uniform(["0", "2"], LayerPrecision.shorthand("w4a8"))
    quantized = mpsearch.prepare(model, config, x, layers).eval()
    mpsearch.export(mpsearch.QuantizedNetwork(quantized, layers, "net", "noise"), "packed", tmp_path / "out")
    table = json.loads((tmp_path / "out" / "export.json").read_text())["packed"]
    assert table["0"]["codes"] == table["2"]["codes"] == [0, 64 * 64 // 2]
    assert torch.equal(packed.load(model, tmp_path / "out")(x), quantized(x))


def test_file_is_as_large_as_the_cost_model_says(tmp_path: Path) -> None:
    from mpsearch.task.networks import CifarResNet

    torch.manual_seed(0)
    model, x = CifarResNet(20).eval(), torch.randn(4, 3, 32, 32)
    layers = inspect_model(model, x).layers
    pairs = zip([layer.name for layer in layers], (WEIGHTS * 2)[: len(layers)], strict=True)
    config = PrecisionConfig({name: LayerPrecision.parse(weight, "float") for name, weight in pairs})
    quantized = mpsearch.prepare(model, config, x, layers).eval()
    mpsearch.export(mpsearch.QuantizedNetwork(quantized, layers, "resnet20", "noise"), "packed", tmp_path / "out")
    said = mpsearch.cost_of(layers, config, "weight_bytes").total
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert abs(size / said - 1) < 0.01
    # Folding a BatchNorm reorders two multiplications, and nothing else.
    torch.testing.assert_close(packed.load(model, tmp_path / "out")(x), quantized(x), rtol=1e-5, atol=1e-5)


def test_folding_norms_keeps_every_answer_on_digits(
    quantize, digits: tuple[nn.Module, Tensor, ModelGraph], tmp_path: Path
) -> None:
    network = quantize(WEIGHTS, ["uniform:8", "shift:4", "uniform:5"])
    mpsearch.export(network, "packed", tmp_path / "out")
    model, images, _ = digits
    ours, theirs = network.model(images), packed.load(model, tmp_path / "out")(images)
    # The reordered multiplications turn a few roundings of activations over.
    assert (ours - theirs).abs().median() < 1e-5
    assert (ours.argmax(1) == theirs.argmax(1)).float().mean() >= 0.999


def test_negative_norm_factor_turns_the_scale_and_no_code(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).eval()
    model[1].weight.data = torch.tensor([-2.0, 0.0, 1.5])
    model[1].running_mean = torch.randn(3)
    x = torch.randn(4, 2, 8, 8)
    layers = inspect_model(model, x).layers
    quantized = mpsearch.prepare(model, PrecisionConfig({"0": LayerPrecision.shorthand("w3a32")}), x, layers).eval()
    mpsearch.export(mpsearch.QuantizedNetwork(quantized, layers, "net", "noise"), "packed", tmp_path / "out")
    loaded = packed.load(model, tmp_path / "out")
    torch.testing.assert_close(loaded(x), quantized(x))
    assert isinstance(loaded[1], nn.Identity)  # type: ignore[index]


def test_damaged_and_foreign_exports_are_refused(quantize, digits, tmp_path: Path) -> None:
    folder = mpsearch.export(quantize(["uniform:4"], ["float"]), "packed", tmp_path / "out").path
    with pytest.raises(ExportError, match="does not fit the model given"):
        packed.load(nn.Sequential(nn.Linear(3, 3)), folder)
    with pytest.raises(ExportError, match="holds no export"):
        packed.load(digits[0], tmp_path)
    document = json.loads((folder / "export.json").read_text())
    document["packed"]["conv1"]["codes"] = [0, 10**9]
    (folder / "export.json").write_text(json.dumps(document))
    with pytest.raises(ExportError, match="damaged"):
        packed.load(digits[0], folder)
    with pytest.raises(ExportError, match="is not empty"):
        mpsearch.export(quantize(["uniform:4"], ["float"]), "packed", folder)
