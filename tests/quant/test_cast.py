"""float16, bfloat16 and 16-bit uniform activations: what they round to, what they cost, that exports hold them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mpsearch.cost.energy import mac_pj
from mpsearch.cost.model import RelativeCost
from mpsearch.errors import ExportError, PrecisionError
from mpsearch.exporters.export import export
from mpsearch.exporters.packed import load as load_packed
from mpsearch.graph.layers import inspect_model
from mpsearch.precision import LayerPrecision, Precision, PrecisionConfig
from mpsearch.quant.cast import FORMATS
from mpsearch.quant.network import QuantizedNetwork
from mpsearch.quant.prepare import prepare
from mpsearch.quant.ranges import activation_range
from mpsearch.quant.switch import make_quantizer

every_format = pytest.mark.parametrize("name", FORMATS)


def quantizer(*names: str, chosen: str):
    made = make_quantizer(names, 1, 0, signed=False, offset=True, elements=10)
    made.set_precision(Precision.parse(chosen, "tensor"))
    return made


def hard_cases() -> Tensor:
    """Ties, subnormals, both ends, and 100,000 random numbers of every size."""
    grid = torch.arange(0, 0x7C00, 7, dtype=torch.int16).view(torch.float16).float()
    between = (grid[:-1] + grid[1:]) / 2
    random = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 5, 100_000)
    edges = torch.tensor([0.0, 1e-8, 2.0**-25, 3 * 2.0**-25, 65504.0, 65519.9])
    values = torch.cat([grid, between, random, edges])
    return torch.cat([values, -values])


@every_format
def test_a_cast_is_that_of_the_format_and_saturates(name: str) -> None:
    x, dtype = hard_cases(), FORMATS[name]
    largest = torch.finfo(dtype).max
    q = quantizer(name, chosen=name)
    assert torch.equal(q(x), x.clamp(-largest, largest).to(dtype).float())
    assert torch.equal(q(torch.tensor([1e39, -1e39])), torch.tensor([largest, -largest]))
    assert q(torch.tensor([float("nan")])).isnan().all()
    assert torch.equal(q(q(x)), q(x))


@pytest.mark.compile
@pytest.mark.slow
@every_format
def test_a_compiler_does_not_leave_the_rounding_out(name: str) -> None:
    x, q = hard_cases(), quantizer(name, "uniform", chosen=name)
    before = q(x)
    q.fused = True
    assert torch.equal(q(x), before)
    assert not torch.equal(before, x)


def test_the_gradient_passes_through_and_is_0_beyond_the_largest() -> None:
    x = torch.tensor([0.3, -7.0, 1e6], requires_grad=True)
    quantizer("float16", chosen="float16")(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 1.0, 0.0]


def test_texts_of_precisions_without_a_scale() -> None:
    for text in ("float16", "bfloat16"):
        precision = Precision.parse(text, "channel")
        assert (str(precision), precision.bits, precision.granularity) == (text, 16, "tensor")
        assert not precision.is_float
        assert not precision.has_scale
    assert LayerPrecision.shorthand("float16") == LayerPrecision.parse("float16", "float16")
    assert LayerPrecision.shorthand("w16a16").weight.bits == 16
    with pytest.raises(PrecisionError, match="float16 is 16 bits wide, got 8: leave the bits out"):
        Precision.parse("float16:8", "tensor")
    with pytest.raises(PrecisionError, match="give 1 to 16 bits"):
        Precision.parse("uniform:17", "tensor")


def test_half_precision_costs_half_the_bytes_and_the_published_energy() -> None:
    layers = inspect_model(nn.Sequential(nn.Conv2d(3, 8, 3)), torch.zeros(1, 3, 6, 6)).layers
    names = [layer.name for layer in layers]
    half, whole = (
        PrecisionConfig.uniform(names, LayerPrecision.shorthand(text)) for text in ("float16", "float")
    )  # fmt: skip
    bits = RelativeCost(layers, "bops").absolute
    assert bits(whole).total == 4 * bits(half).total
    weights = RelativeCost(layers, "weight_bytes").absolute
    assert weights(whole).total - weights(half).total == 2 * 8 * 27  # and the bias
    assert mac_pj(LayerPrecision.shorthand("float16"), 27, True) == pytest.approx(1.1 + 0.4)
    assert mac_pj(LayerPrecision.parse("uniform:8", "float16"), 27, True) == pytest.approx(1.1 + 0.4)


def test_sixteen_bit_activations_keep_outliers_that_eight_bits_lose() -> None:
    x = torch.cat([torch.randn(10_000, generator=torch.Generator().manual_seed(0)), torch.tensor([900.0, -700.0])])
    errors = {}
    for bits in (8, 16):
        precision = Precision("uniform", bits, "tensor")
        q = quantizer("uniform", chosen=f"uniform:{bits}")
        q.set_range(*activation_range(x, precision, signed=True))
        errors[bits] = float((q(x) - x).square().mean())
    assert errors[16] < errors[8] / 1000


PAIRS = ("w8a16", "float16", "bfloat16", "w16a16")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.mix = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        return self.head(self.mix(x).relu().mean((2, 3)))


def network(*texts: str) -> QuantizedNetwork:
    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(16, 3, 8, 8)
    graph = inspect_model(net, x)
    names = [layer.name for layer in graph.layers]
    config = PrecisionConfig(zip(names, map(LayerPrecision.shorthand, texts), strict=True))
    return QuantizedNetwork(
        prepare(net, config, x, graph.layers).eval(), graph.layers, name="net", task="test", example_input=x,
        samples=x, float_model=net,
    )  # fmt: skip


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("to", ["native", "packed"])
def test_native_and_packed_hold_sixteen_bits(pair: str, to: str, tmp_path: Path) -> None:
    quantized = network(pair, pair, "w8a8")
    exported = export(quantized, to, tmp_path / "out")
    assert exported.verified.to_json()["same_answers"] == 16  # type: ignore[index]
    assert not exported.conversions
    if to == "packed" and "float" in pair:
        loaded = load_packed(Net(), tmp_path / "out")
        held = dict(loaded.named_modules())["mix"].weight
        assert torch.equal(held, held.to(FORMATS[pair]).float())


@pytest.mark.parametrize("pair", ["w8a16", "w4a12", "float16"])
def test_onnx_holds_sixteen_bit_activations_and_float16(pair: str, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    exported = export(network("w8a8", pair, pair), "onnx", tmp_path / "out")
    verified = exported.verified.to_json()
    assert verified["same_answers"] == 16, verified
    assert verified["max_difference"] < 1e-4


def test_what_a_target_cannot_hold_is_refused_by_layer_name(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    with pytest.raises(ExportError, match=r"mix \(conv2d\) weight bfloat16: float would hold it, the same values"):
        export(network("w8a8", "bfloat16", "w8a8"), "onnx", tmp_path / "out")
