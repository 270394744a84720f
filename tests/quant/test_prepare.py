"""Quantized layers compute what is stated, and preparing a model leaves the original alone."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpsearch.errors import PrecisionError
from mpsearch.graph import kinds
from mpsearch.graph.inputs import call
from mpsearch.graph.layers import inspect_model
from mpsearch.precision import FLOAT, LayerPrecision, Offer, PrecisionConfig
from mpsearch.ptq.pipeline import PtqMethod, ptq
from mpsearch.quant.modules import QUANT_LAYERS, QuantConv2d, QuantLayer, quantized, without_quantizers
from mpsearch.quant.prepare import (
    RangeSetter,
    insert_quantizers,
    inspect_network,
    prepare,
    prepare_for_training,
    quant_layers,
    set_precision,
)
from mpsearch.train import FitSettings, fit

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
"""All but `nn.Embedding`, which reads no numbers: see below."""


def test_every_quantized_layer_is_tested() -> None:
    assert {*LAYERS, nn.Embedding} == set(QUANT_LAYERS)


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
    with pytest.raises(PrecisionError, match="has no precision for 2 of the model's 3 layers, 'conv2' first"):
        prepare(model, PrecisionConfig({"conv1": W4A4}), batch)


def test_a_module_used_under_two_names_stays_one(batch: Tensor) -> None:
    layer = nn.Conv2d(1, 1, 3, padding=1)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    prepared = prepare(model, PrecisionConfig({"0": W4A4}), batch)
    assert isinstance(prepared[0], QuantLayer)  # type: ignore[index]
    assert prepared[0] is prepared[2]  # type: ignore[index]


@pytest.mark.compile
@pytest.mark.slow  # tests/quant/test_contracts.py has one compiled switch for all types and widths
def test_one_compiled_model_serves_every_config(model: nn.Module, batch: Tensor) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    layers = inspect_model(model, batch).layers
    ranges = RangeSetter(model, layers, batch)
    prepared = insert_quantizers(model, layers)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")  # code is generated in tests/quant/test_contracts.py
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


@pytest.mark.slow
def test_trains_under_ddp(tmp_path: Path) -> None:
    command = [sys.executable, "-c", DDP, str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == "trained\n", done.stderr


def test_float_checkpoint_loads_under_the_original_names(model: nn.Module, batch: Tensor) -> None:
    trained = prepare_for_training(model, config_for(model, batch, W4A4), batch)
    missing, unexpected = trained.load_state_dict(model.state_dict(), strict=False)
    assert unexpected == []
    assert all("_quantizer." in name for name in missing)


# ------------------------------------------------------------------------------------------------ classes of others


class Scaled(nn.Linear):
    """As YOLO's and others' own linear layers: torch's forward, and more beside it."""

    gain = 3.0

    def out_scale(self) -> float:
        return self.gain * self.out_features


class UsesIt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = Scaled(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fc(input=x) * self.fc.out_scale())


@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_layer_of_a_class_of_its_own_keeps_its_methods_and_can_be_copied(copied) -> None:
    """B7, and B6: it is called by name."""
    torch.manual_seed(0)
    net, x = UsesIt().eval(), torch.randn(32, 6)
    prepared = copied(prepare(net, config_for(net, x, LayerPrecision.shorthand("w8a8")), x))
    twin = prepared.get_submodule("fc")
    assert isinstance(twin, QuantLayer)
    assert isinstance(twin, Scaled)
    assert twin.out_scale() == 12
    assert float((prepared(x) - net(x)).norm() / net(x).norm()) < 0.02
    assert torch.equal(prepare(net, config_for(net, x, LayerPrecision(FLOAT, FLOAT)), x)(x), net(x))
    assert type(without_quantizers(twin)) is Scaled


def test_a_class_with_a_name_of_ours_stays_float_with_that_reason() -> None:
    class Named(nn.Linear):
        precision = "fp16"

    graph = inspect_model(nn.Sequential(Named(4, 4), nn.Linear(4, 2)), torch.randn(3, 4))
    assert [layer.name for layer in graph.quantizable] == ["1"]
    assert "has a 'precision' of its own" in str(graph.unhandled[0].reason)


def test_the_reserved_names_are_those_of_a_quantized_layer() -> None:
    own = {name for name in {*vars(QuantLayer), *QuantLayer.__annotations__} if not name.startswith("_")}
    assert own == kinds.RESERVED


class Conv1D(nn.Module):
    """As transformers' `Conv1D`: a linear layer with its weight as `(in, out)`."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.nf = outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


@pytest.fixture
def known_conv1d(monkeypatch: pytest.MonkeyPatch) -> None:
    path = (Conv1D.__module__, Conv1D.__qualname__)
    monkeypatch.setattr(kinds, "FOREIGN_KINDS", {path: "linear"})
    monkeypatch.setattr(kinds, "TRANSPOSED_LINEAR", path)


@pytest.mark.usefixtures("known_conv1d")
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_a_linear_layer_with_a_transposed_weight_is_quantized_along_its_outputs(granularity: str) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(Conv1D(5, 6), nn.ReLU(), Conv1D(3, 5)).eval(), torch.randn(16, 7, 6)
    (first, _) = inspect_model(net, x).quantizable
    assert (first.kind, first.weight_shape, first.fan_in, first.macs) == ("linear", (5, 6), 6, 7 * 30)
    twin = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()  # the same, as torch has it
    for i in (0, 2):
        twin[i].weight.data, twin[i].bias.data = net[i].weight.data.t().clone(), net[i].bias.data.clone()  # type: ignore[union-attr]
    precision = LayerPrecision.parse(f"uniform:4/{granularity}", "uniform:6")
    ours, torchs = (prepare(m, config_for(m, x, precision), x) for m in (net, twin))
    torch.testing.assert_close(ours(x), torchs(x))
    for method in (PtqMethod(adaround_steps=50), PtqMethod(rounding="nearest", bias_correction="empirical")):
        torch.testing.assert_close(*(ptq(m, precision, x, method).model(x) for m in (net, twin)))


def test_the_foreign_classes_are_those_of_their_libraries() -> None:
    timm, transformers = pytest.importorskip("timm.layers"), pytest.importorskip("transformers.pytorch_utils")
    paths = {(kind.__module__, kind.__qualname__) for kind in (timm.Linear, transformers.Conv1D)}
    assert paths == set(kinds.FOREIGN_KINDS)
    layer, x = timm.Linear(4, 3), torch.randn(2, 5, 4)
    assert torch.equal(quantized(layer, signed_input=True, input_elements=1)(x), layer(x))
    layer = transformers.Conv1D(3, 4)
    assert torch.equal(quantized(layer, signed_input=True, input_elements=1)(x), layer(x))


def test_an_embedding_is_a_weight_to_quantize_and_nothing_else() -> None:
    torch.manual_seed(0)
    net, tokens = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 3)).eval(), torch.randint(0, 20, (16, 5))
    table, _ = inspect_model(net, tokens).quantizable
    assert (table.kind, table.weight_shape, table.macs, table.looks_up) == ("embedding", (20, 8), 0, True)
    prepared = prepare(net, config_for(net, tokens, W4A4), tokens)
    assert str(quant_layers(prepared)["0"].precision) == str(LayerPrecision(W4A4.weight, FLOAT))
    assert all(len(row.unique()) <= 16 for row in prepared[0](torch.arange(20)))  # type: ignore[index]
    trained = prepare_for_training(net, config_for(net, tokens, W4A4), tokens)
    trained(tokens).square().sum().backward()
    assert [name for name, p in trained.named_parameters() if p.requires_grad and p.grad is None] == []


class Shifted(nn.Embedding):
    """Positions: the entries begin at the second row, and are scaled."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input + 1) * self.scale

    scale = 3.0


class ReadsItsWeight(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + self.weight[0]


class LooksUpAlone(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return torch.index_select(self.weight, 0, input.flatten()).view(*input.shape, -1)


def test_an_embedding_that_adds_to_the_forward_of_its_base_is_quantized_and_no_other() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(0, 19, (16, 5))
    net = nn.Sequential(Shifted(20, 8), nn.Linear(8, 3)).eval()
    config = config_for(net, tokens, W4A4)
    prepared = prepare(net, config, tokens)
    table = quant_layers(prepared)["0"]
    assert torch.equal(prepared[0](tokens), 3.0 * table.quantized_weight()[tokens + 1])  # type: ignore[index]
    assert not torch.equal(prepared[0](tokens), net[0](tokens))  # type: ignore[index]
    again = copy.deepcopy(prepared)
    assert torch.equal(again(tokens), prepared(tokens))
    assert type(without_quantizers(table)) is Shifted
    for kind in (ReadsItsWeight, LooksUpAlone):
        net = nn.Sequential(kind(20, 8), nn.Linear(8, 3)).eval()
        assert [layer.reason for layer in inspect_model(net, tokens).unhandled] == [
            f"its class {kind.__name__} has a forward of its own"
        ]


# ------------------------------------------------------------------------------------------------ ways of calling


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, other: Tensor | None = None, *, scale: Tensor | None = None) -> dict[str, Tensor]:
        y = self.a(input=x) if other is None else self.a(x) + other
        return {"logits": self.b(y if scale is None else y * scale), "hidden": y}


X = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "batch",
    [X, (X,), (X, X), {"x": X}, {"x": X, "other": X, "scale": X}, ((X,), {"scale": X}), ((), {"x": X, "other": X})],
)
def test_batches_of_any_form_are_inspected_prepared_quantized_and_trained_on(batch: Any) -> None:
    net = TwoInputs().eval()
    graph = inspect_network(net, batch)
    assert [(layer.name, layer.macs, layer.input_shape) for layer in graph.layers] == [("a", 16, (4,)), ("b", 8, (4,))]
    config = config_for(net, batch, LayerPrecision.shorthand("w8a8"))
    wanted = call(net, batch)["logits"]
    for model in (prepare(net, config, batch), ptq(net, config, batch, PtqMethod(adaround_steps=20)).model):
        assert float((call(model, batch)["logits"] - wanted).norm() / wanted.norm()) < 0.03
    trained = prepare(net, config, batch)
    before = trained.b.weight.detach().clone()  # type: ignore[union-attr]
    fit(trained, [(batch, X)] * 2, lambda _i, _x, out, _y: out["logits"].square().sum(), FitSettings(2, 0.01))
    assert not torch.equal(trained.b.weight, before)  # type: ignore[union-attr]


# ---------------------------------------------------------------------------------------------------- self-checks


class Suspicious(nn.Module):
    """Does otherwise where one of its layers is not torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(self.b(self.a(x)))
        return y if type(self.b) is nn.Linear else 2 * y


def test_a_layer_whose_quantized_form_changes_the_answers_stays_float_and_is_named() -> None:
    graph = inspect_network(Suspicious().eval(), X)
    assert [layer.name for layer in graph.quantizable] == ["a", "c"]
    assert "does not answer as before" in str(graph.unhandled[0].reason)
    assert any(note.startswith("b stays float") for note in graph.notes)
