"""Quantized layers compute what is stated, and preparing a model leaves the original alone."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpsearch.compiler import compiler_missing
from mpsearch.errors import PrecisionError
from mpsearch.graph.layers import inspect_model
from mpsearch.precision import FLOAT, LayerPrecision, Offer, PrecisionConfig
from mpsearch.quant.modules import QUANT_LAYERS, QuantConv2d, QuantLayer, quantized
from mpsearch.quant.prepare import (
    RangeSetter,
    insert_quantizers,
    prepare,
    prepare_for_training,
    quant_layers,
    set_precision,
)

W4A4 = LayerPrecision.shorthand("w4a4")
EVERYTHING = Offer(frozenset({"uniform", "shift", "apot"}), frozenset({"uniform", "shift", "apot"}))
MIXED = [("shift:4", "uniform:8"), ("apot:4/tensor", "apot:3"), ("uniform:2", "shift:4"), ("float", "apot:5")]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv1(x)))
        x = F.relu(self.conv2(x)) + x
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture
def batch() -> Tensor:
    return torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def config_for(model: nn.Module, batch: Tensor, precision: LayerPrecision) -> PrecisionConfig:
    return PrecisionConfig.uniform([layer.name for layer in inspect_model(model, batch).quantizable], precision)


LAYERS = {
    nn.Conv1d: (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9)),
    nn.Conv2d: (lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=2, padding_mode="circular"), (2, 4, 9, 9)),
    nn.Conv3d: (lambda: nn.Conv3d(4, 6, 3, padding="same", bias=False), (2, 4, 5, 5, 5)),
    nn.ConvTranspose1d: (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), (2, 4, 9)),
    nn.ConvTranspose2d: (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    nn.ConvTranspose3d: (lambda: nn.ConvTranspose3d(4, 6, 2, bias=False), (2, 4, 3, 3, 3)),
    nn.Linear: (lambda: nn.Linear(4, 6), (2, 7, 4)),
}


def test_every_quantized_layer_is_tested() -> None:
    assert set(LAYERS) == set(QUANT_LAYERS)


@pytest.mark.parametrize("kind", LAYERS)
def test_quantized_layer_at_float_precision_computes_what_the_layer_did(kind: type[nn.Module]) -> None:
    make, shape = LAYERS[kind]
    layer, x = make(), torch.randn(shape)
    twin = quantized(layer, signed_input=True, input_elements=1)
    assert torch.equal(twin(x), layer(x))
    assert set(layer.state_dict()) < set(twin.state_dict())


@pytest.mark.parametrize("kind", LAYERS)
def test_quantized_layer_applies_the_layer_to_quantized_weight_and_input(kind: type[nn.Module]) -> None:
    make, shape = LAYERS[kind]
    layer, x = make(), torch.randn(shape)
    model = nn.Sequential(layer)
    prepared = prepare(model, PrecisionConfig({"0": LayerPrecision.shorthand("w3a5")}), x)
    twin = prepared[0]  # type: ignore[index]
    assert isinstance(twin, QuantLayer)
    reference = copy.deepcopy(layer)
    channels = twin.weight_quantizer.channel_axis
    with torch.no_grad():
        reference.weight.copy_(twin.weight_quantizer(layer.weight))  # type: ignore[operator, union-attr]
    for channel in reference.weight.movedim(channels, 0):  # type: ignore[union-attr, operator]
        assert len(channel.unique()) <= 8
    assert len(twin.input_quantizer(x).unique()) <= 32
    torch.testing.assert_close(prepared(x), reference(twin.input_quantizer(x)))


def test_prepare_leaves_the_original_untouched(model: nn.Module, batch: Tensor) -> None:
    before = copy.deepcopy(model.state_dict())
    prepared = prepare(model, config_for(model, batch, W4A4), batch)
    with torch.no_grad():
        for parameter in prepared.parameters():
            parameter.add_(1)
    assert not any(isinstance(module, QuantLayer) for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_subclass_that_computes_the_same_is_quantized_as_its_base(batch: Tensor) -> None:
    class Named(nn.Conv2d):
        """Only a name, as torch's NonDynamicallyQuantizableLinear."""

    net = nn.Sequential(Named(batch.shape[1], 4, 3)).eval()
    names = [layer.name for layer in inspect_model(net, batch).layers if layer.reason is None]
    assert names == ["0"]
    config = PrecisionConfig.uniform(names, LayerPrecision.shorthand("w8a8"))
    assert isinstance(prepare(net, config, batch)[0], QuantConv2d)  # type: ignore[index]


def test_prepare_at_float_computes_what_the_model_did(model: nn.Module, batch: Tensor) -> None:
    prepared = prepare(model, config_for(model, batch, LayerPrecision(FLOAT, FLOAT)), batch)
    assert torch.equal(prepared(batch), model(batch))


def test_more_bits_come_closer_to_the_float_model(model: nn.Module, batch: Tensor) -> None:
    errors = []
    for bits in (8, 6, 4, 2):
        prepared = prepare(model, config_for(model, batch, LayerPrecision.shorthand(f"w{bits}a{bits}")), batch)
        errors.append((prepared(batch) - model(batch)).square().mean().item())
    assert errors == sorted(errors)
    assert errors[0] < 1e-3 * errors[-1]


def test_setting_a_config_twice_gives_the_same_as_setting_it_on_a_fresh_model(model: nn.Module, batch: Tensor) -> None:
    layers = inspect_model(model, batch).layers
    ranges = RangeSetter(model, layers, batch)
    reused = insert_quantizers(model, layers, {layer.name: EVERYTHING for layer in layers}).eval()
    configs = [config_for(model, batch, LayerPrecision.shorthand(text)) for text in ("w2a8", "w8a2", "w1a1", "w4a4")]
    configs += [config_for(model, batch, LayerPrecision.parse(w, a)) for w, a in MIXED]
    for config in configs:
        set_precision(reused, config, ranges)
        assert torch.equal(reused(batch), prepare(model, config, batch)(batch))


def test_a_type_that_is_not_offered_is_refused_with_the_layer(model: nn.Module, batch: Tensor) -> None:
    layers = inspect_model(model, batch).layers
    config = config_for(model, batch, W4A4).replace(conv2=LayerPrecision.parse("shift:4", "uniform:4"))
    with pytest.raises(PrecisionError, match=r"layer 'conv2': shift:4/channel is not on offer.*offer shift too"):
        set_precision(insert_quantizers(model, layers), config, RangeSetter(model, layers, batch))


def test_prepare_names_layers_that_do_not_fit(model: nn.Module, batch: Tensor) -> None:
    with pytest.raises(PrecisionError, match=r"conv9.*did you mean 'conv"):
        prepare(model, PrecisionConfig({"conv9": W4A4}), batch)
    with pytest.raises(PrecisionError, match="says nothing of 2 of the model's 3 layers, 'conv2' first"):
        prepare(model, PrecisionConfig({"conv1": W4A4}), batch)


def test_a_module_used_under_two_names_stays_one(batch: Tensor) -> None:
    layer = nn.Conv2d(1, 1, 3, padding=1)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    prepared = prepare(model, PrecisionConfig({"0": W4A4}), batch)
    assert isinstance(prepared[0], QuantLayer)  # type: ignore[index]
    assert prepared[0] is prepared[2]  # type: ignore[index]


@pytest.mark.skipif(compiler_missing() is not None, reason=str(compiler_missing()))
def test_one_compiled_model_serves_every_config(model: nn.Module, batch: Tensor) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    layers = inspect_model(model, batch).layers
    ranges = RangeSetter(model, layers, batch)
    prepared = insert_quantizers(model, layers)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(prepared, backend=counter, dynamic=False)
    for text in ("w8a8", "w4a2", "w1a1", "w32a32", "w2a32"):
        set_precision(prepared, config_for(model, batch, LayerPrecision.shorthand(text)), ranges)
        torch.testing.assert_close(compiled(batch), prepared(batch), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_quant_layers_go_by_the_same_names_when_compiled(model: nn.Module, batch: Tensor) -> None:
    prepared = prepare(model, config_for(model, batch, W4A4), batch)
    assert list(quant_layers(torch.compile(prepared))) == list(quant_layers(prepared)) == ["conv1", "conv2", "fc"]  # type: ignore[arg-type]


def test_every_parameter_to_train_gets_a_gradient(model: nn.Module, batch: Tensor) -> None:
    """What DistributedDataParallel waits for: steps of float tensors and offsets of levels would never come."""
    names = [layer.name for layer in inspect_model(model, batch - 1).quantizable]
    pairs = [("uniform:4", "shift:3"), ("float", "uniform:4"), ("shift:3", "float")]
    config = PrecisionConfig({n: LayerPrecision.parse(*pair) for n, pair in zip(names, pairs, strict=True)})
    trained = prepare_for_training(model, config, batch)
    assert trained.training
    trained(batch).square().sum().backward()
    waiting = [name for name, p in trained.named_parameters() if p.requires_grad and p.grad is None]
    assert waiting == []
    assert not quant_layers(trained)["conv1"].input_quantizer.beta.requires_grad  # type: ignore[union-attr]
    assert not quant_layers(trained)["fc"].input_quantizer.step.requires_grad


DDP = """
import os, sys, torch
from mpsearch.graph.layers import inspect_model
from mpsearch.precision import LayerPrecision, PrecisionConfig
from mpsearch.quant.prepare import prepare_for_training
from mpsearch.task.models import DigitsCNN

model, batch = DigitsCNN().eval(), torch.randn(16, 1, 8, 8)
layers = [layer.name for layer in inspect_model(model, batch).quantizable]
config = PrecisionConfig.uniform(layers, LayerPrecision.parse("shift:3", "float"))
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
replica = torch.nn.parallel.DistributedDataParallel(prepare_for_training(model, config, batch))
for _ in range(3):  # the second step is the one that complains of parameters without a gradient
    replica(batch).square().sum().backward()
print("trained", flush=True)
os._exit(0)  # gloo's group waits for its threads in its destructor, which holds the GIL that they may need
"""


def test_trains_under_ddp(tmp_path: Path) -> None:
    command = [sys.executable, "-c", DDP, str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == "trained\n", done.stderr


def test_float_checkpoint_loads_under_the_original_names(model: nn.Module, batch: Tensor) -> None:
    trained = prepare_for_training(model, config_for(model, batch, W4A4), batch)
    missing, unexpected = trained.load_state_dict(model.state_dict(), strict=False)
    assert unexpected == []
    assert all("_quantizer." in name for name in missing)
