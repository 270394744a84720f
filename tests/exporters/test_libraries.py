"""torchao, ModelOpt and AIMET load what is exported for them, with our bits, and answer as the network does."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mpsearch
from mpsearch.errors import ExportError
from mpsearch.exporters import aimet, modelopt, torchao
from mpsearch.graph.facts import ModelGraph
from mpsearch.graph.layers import inspect_model
from mpsearch.precision import LayerPrecision, PrecisionConfig
from mpsearch.quant.prepare import quant_layers

MISSING = "needs mpsearch[targets]; `make test-all` installs it"
TWO_UP = [f"uniform:{bits}" for bits in range(2, 9)]
FOUR_UP = [f"uniform:{bits}" for bits in range(4, 9)]


def vision_transformer() -> tuple[nn.Module, Tensor]:
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10).eval(), torch.randn(64, 3, 32, 32)


def quantized(
    model: nn.Module, x: Tensor, weights: list[str], activations: list[str], kinds: str = ""
) -> mpsearch.QuantizedNetwork:
    """Weights and activations round robin; float where a layer is not of `kinds`."""
    layers = inspect_model(model, x).layers
    named = [layer for layer in layers if layer.reason is None]
    pairs = zip(named, cycle(weights), cycle(activations), strict=False)
    config = {
        layer.name: LayerPrecision.parse(*(("float", "float") if kinds and layer.kind != kinds else pair))
        for layer, *pair in pairs
    }
    prepared = mpsearch.prepare(model, PrecisionConfig(config), x, layers).eval()
    return mpsearch.QuantizedNetwork(prepared, layers, "vit", "noise")


def test_torchao_has_our_codes_and_outputs(tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason=MISSING)
    model, x = vision_transformer()
    weights = [*TWO_UP, "uniform:3/tensor"]
    network = quantized(model, x, weights, ["float"], kinds="linear")
    theirs = torchao.load(model, mpsearch.export(network, "torchao", tmp_path / "out").path)
    with torch.no_grad():
        assert (theirs(x) - network.model(x)).abs().max() < 1e-5
    for name, layer in quant_layers(network.model).items():
        if not layer.precision.weight.is_float:
            weight = theirs.get_submodule(name).weight
            assert str(weight.target_dtype) == f"torch.int{layer.precision.weight.bits}"
            assert torch.equal(weight.qdata.int(), layer.weight_quantizer.codes(layer.weight))


def test_torchao_own_function_takes_the_config(tmp_path: Path) -> None:
    import json

    pytest.importorskip("torchao", reason=MISSING)
    from torchao.core.config import config_from_dict
    from torchao.quantization import quantize_

    model, x = vision_transformer()
    model = mpsearch.open_attention(model)  # a config names the projections, which are layers there
    network = quantized(model, x, ["uniform:4", "uniform:8"], ["float"], kinds="linear")
    folder = mpsearch.export(network, "torchao", tmp_path / "out").path
    quantize_(model, config_from_dict(json.loads((folder / "torchao.json").read_text())), filter_fn=None)
    wanted = {name: p.weight.bits for name, p in network.config.items() if not p.weight.is_float}
    assert set(wanted.values()) == {4, 8}
    assert sum(name.endswith(("q_proj", "k_proj", "v_proj", "out_proj")) for name in wanted) == 2 * 4
    for name, bits in wanted.items():
        assert str(model.get_submodule(name).weight.target_dtype) == f"torch.int{bits}"


def test_torchao_refuses_activations_and_convolutions(tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason=MISSING)
    model, x = vision_transformer()
    with pytest.raises(ExportError, match=r"conv_proj \(conv2d\) weight uniform:4/channel: float would hold it"):
        mpsearch.export(quantized(model, x, ["uniform:4"], ["float"]), "torchao", tmp_path / "a")
    with pytest.raises(ExportError, match=r"heads.head \(linear\) activation uniform:8/tensor: float would hold it"):
        mpsearch.export(quantized(model, x, ["uniform:4"], ["uniform:8"], kinds="linear"), "torchao", tmp_path / "b")


LOAD: dict[str, tuple[str, Callable[[nn.Module, Path, Tensor], nn.Module]]] = {
    "modelopt": ("modelopt", lambda model, folder, _: modelopt.load(model, folder)),
    "aimet": ("aimet_torch", lambda model, folder, x: aimet.load(model, folder, x).model),
}


@pytest.mark.parametrize("to", LOAD)
def test_thousand_digits_get_the_same_answers(
    to: str, quantize, digits: tuple[nn.Module, Tensor, ModelGraph], tmp_path: Path
) -> None:
    package, load = LOAD[to]
    pytest.importorskip(package, reason=MISSING)
    model, images, _ = digits
    network = quantize([*TWO_UP, "uniform:4/tensor"], FOUR_UP)
    theirs = load(model, mpsearch.export(network, to, tmp_path / "out").path, images[:2])
    with torch.no_grad():
        a, b = network.model(images), theirs(images)
    assert torch.equal(a.argmax(1), b.argmax(1))
    assert (a - b).abs().median() < 1e-5
    for name, precision in network.config.items():
        layer = theirs.get_submodule(name)
        if to == "modelopt":
            assert layer.weight_quantizer.num_bits == precision.weight.bits
            assert layer.input_quantizer.num_bits == precision.activation.bits
        else:
            assert layer.param_quantizers["weight"].bitwidth == precision.weight.bits
            assert layer.input_quantizers[0].bitwidth == precision.activation.bits


def one_layer(model: nn.Module, x: Tensor, weight: str, activation: str) -> mpsearch.QuantizedNetwork:
    return quantized(model, x, [weight], [activation])


@pytest.mark.parametrize("to", LOAD)
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width_is_exact_in_a_single_layer(to: str, bits: int, tmp_path: Path) -> None:
    package, load = LOAD[to]
    pytest.importorskip(package, reason=MISSING)
    torch.manual_seed(0)
    for case, (kind, x) in enumerate(
        [(nn.Linear(16, 8), torch.randn(64, 16)), (nn.ConvTranspose2d(2, 3, 3), torch.rand(8, 2, 6, 6))]
    ):
        model = nn.Sequential(kind).eval()
        network = one_layer(model, x, f"uniform:{bits}", f"uniform:{10 - bits}")
        theirs = load(model, mpsearch.export(network, to, tmp_path / str(case)).path, x)
        torch.testing.assert_close(theirs(x), network.model(x), rtol=0, atol=2e-6)


@pytest.mark.parametrize("to", LOAD)
def test_binary_weights_are_refused(to: str, tmp_path: Path) -> None:
    pytest.importorskip(LOAD[to][0], reason=MISSING)
    model, x = nn.Sequential(nn.Linear(16, 8)).eval(), torch.randn(64, 16)
    with pytest.raises(ExportError, match="weight uniform:1/channel: uniform:2/channel would hold it, the same values"):
        mpsearch.export(one_layer(model, x, "uniform:1", "uniform:8"), to, tmp_path / "out")
    folder = mpsearch.export(
        network := one_layer(model, x, "uniform:1", "uniform:8"), to, tmp_path / "out2", allow_lossy=True
    ).path
    torch.testing.assert_close(LOAD[to][1](model, folder, x)(x), network.model(x), rtol=0, atol=2e-6)
