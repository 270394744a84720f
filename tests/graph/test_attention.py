"""Opened attention: the same function and state dict, with projections that are layers."""

from __future__ import annotations

import copy
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.fx
from torch import Tensor, nn
from torchvision.models import swin_transformer as swin

import mpsearch
from mpsearch.exporters import packed
from mpsearch.graph.attention import OpenAttention, open_attention
from mpsearch.precision import LayerPrecision, PrecisionConfig
from mpsearch.quant.prepare import inspect_network, prepare, quant_layers
from mpsearch.study import DataSpec, TaskSpec, TrialSpec
from mpsearch.task import load_task
from mpsearch.workbench import Workbench

N, L, S, E, HEADS = 3, 5, 7, 8, 2
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def attention(**options: object) -> nn.MultiheadAttention:
    module = nn.MultiheadAttention(E, HEADS, batch_first=True, **options)  # type: ignore[arg-type]
    for parameter in module.parameters():  # its own start leaves biases at zero
        nn.init.normal_(parameter, std=0.3)
    return module.eval()


def close(one: Tensor | None, other: Tensor | None) -> None:
    assert (one is None) == (other is None)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"add_bias_kv": True, "add_zero_attn": True},
        {"kdim": 6, "vdim": 4},
        {"kdim": 6, "vdim": 4, "bias": False},
    ],
)
def test_opened_attention_computes_the_same_from_the_same_parameters(options: dict[str, object]) -> None:
    module = attention(**options)
    twin = open_attention(module)
    assert isinstance(twin, OpenAttention)
    q, k, v = torch.randn(N, L, E), torch.randn(N, S, module.kdim), torch.randn(N, S, module.vdim)
    padding = torch.arange(S) >= torch.tensor([[7], [4], [6]])
    causal = torch.ones(L, S).triu(1).bool()
    per_head = torch.randn(N * HEADS, L, S)
    for mask, padded, weights in product((None, causal, causal * -2.0, per_head), (None, padding), (True, False)):
        # One kind of mask at a time: torch deprecates a mixture.
        float_padding = (
            None if padded is None else padded * -3.0 if mask is not None and mask.is_floating_point() else padded
        )
        arguments = {"attn_mask": mask, "key_padding_mask": float_padding, "need_weights": weights}
        for one, other in zip(module(q, k, v, **arguments), twin(q, k, v, **arguments), strict=True):
            close(one, other)
    traced = torch.fx.symbolic_trace(twin)
    close(module(q, k, v)[0], traced(q, k, v)[0])
    assert set(PROJECTIONS) <= {node.name for node in traced.graph.nodes}
    close(module(q, k, v, average_attn_weights=False)[1], twin(q, k, v, average_attn_weights=False)[1])
    for one, other in zip(module(q[0], k[0], v[0]), twin(q[0], k[0], v[0]), strict=True):
        close(one, other)
    module.batch_first = twin.batch_first = False
    for one, other in zip(
        module(*(x.transpose(0, 1) for x in (q, k, v))), twin(*(x.transpose(0, 1) for x in (q, k, v))), strict=True
    ):
        close(one, other)


@pytest.mark.parametrize("options", [{}, {"bias": False, "add_bias_kv": True}, {"kdim": 6, "vdim": 4}])
def test_the_state_dict_is_the_originals_in_both_directions(options: dict[str, object]) -> None:
    module, other = nn.Sequential(attention(**options)), nn.Sequential(attention(**options))
    state, twin = module.state_dict(), open_attention(other)
    assert twin.state_dict().keys() == state.keys()
    assert twin.state_dict(keep_vars=True)["0.q_proj.weight"] is twin[0].q_proj.weight
    twin.load_state_dict(state)
    for name, value in copy.deepcopy(twin).state_dict().items():
        assert torch.equal(value, state[name]), name
    other.load_state_dict(twin.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*0\.q_prjo"):
        twin.load_state_dict({**state, "0.q_prjo.weight": torch.zeros(1)})


def test_opening_leaves_the_model_alone_and_does_not_copy_its_weights() -> None:
    model = nn.Sequential(nn.Linear(E, E), attention())
    model[1].in_proj_weight.requires_grad_(False)
    twin = open_attention(model)
    assert type(model[1]) is nn.MultiheadAttention
    assert twin[0].weight is model[0].weight
    assert twin[1].k_proj.weight.data_ptr() == model[1].in_proj_weight[E:].data_ptr()
    assert not twin[1].k_proj.weight.requires_grad
    assert twin[1].k_proj.bias.requires_grad
    plain = nn.Sequential(nn.Linear(E, E))
    assert open_attention(plain) is plain
    assert open_attention(twin) is twin


def test_attention_with_a_forward_of_its_own_stays() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(*args, **kwargs)[0]  # type: ignore[arg-type]

    model = nn.Sequential(Own(E, HEADS))
    assert open_attention(model) is model


def test_a_transformer_calls_its_projections_also_where_torch_would_fuse_them() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, HEADS, 16, batch_first=True), 2).eval()
    x, padding = torch.randn(N, L, E), torch.arange(L) >= torch.tensor([[5], [3], [4]])
    twin = open_attention(encoder)
    called: list[str] = []
    for name, module in twin.named_modules():
        if name.endswith(PROJECTIONS):
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    with torch.no_grad():
        expected, found = encoder(x, src_key_padding_mask=padding), twin(x, src_key_padding_mask=padding)
    close(expected[~padding], found[~padding])  # fused, torch puts zeros where there is nothing
    assert called == [f"layers.{i}.self_attn.{name}" for i in range(2) for name in PROJECTIONS]


def test_cross_attention_groups_what_reads_the_same_tensor() -> None:
    decoder = nn.TransformerDecoderLayer(E, HEADS, 16, batch_first=True).eval()
    graph = mpsearch.inspect_model(decoder, (torch.randn(N, L, E), torch.randn(N, S, E)))
    groups = {layer.name: layer.input_group for layer in graph.layers}
    assert groups["self_attn.v_proj"] == groups["self_attn.k_proj"] == groups["self_attn.q_proj"] == "self_attn.q_proj"
    assert groups["multihead_attn.q_proj"] == "multihead_attn.q_proj"
    assert groups["multihead_attn.v_proj"] == groups["multihead_attn.k_proj"] == "multihead_attn.k_proj"
    macs = {layer.name: layer.macs for layer in graph.layers}
    assert (macs["multihead_attn.q_proj"], macs["multihead_attn.k_proj"]) == (L * E * E, S * E * E)
    assert not graph.unhandled


@pytest.mark.parametrize("size", [16, 12], ids=["whole windows", "padded"])
@pytest.mark.parametrize("block", [swin.SwinTransformerBlock, swin.SwinTransformerBlockV2])
def test_shifted_windows_compute_the_same(block: type[nn.Module], size: int) -> None:
    merging = swin.PatchMergingV2 if block is swin.SwinTransformerBlockV2 else swin.PatchMerging
    model = swin.SwinTransformer([2, 2], 8, [2, 2], [2, 2], [3, 3], 2.0, 0.0, 0.0, 0.0, 5, None, block, merging).eval()
    for name, parameter in model.named_parameters():  # the second version's key biases too, which have no effect
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 3, size, size)
    twin = open_attention(model)
    close(model(x), twin(x))
    assert twin.state_dict().keys() == model.state_dict().keys()
    traced = torch.fx.symbolic_trace(twin)
    close(model(x), traced(x))
    assert {"features_1_0_attn_qkv", "features_1_0_attn_proj"} <= {node.name for node in traced.graph.nodes}
    graph = mpsearch.inspect_model(model, x)
    assert {"features.1.0.attn.qkv", "features.1.0.attn.proj"} <= {layer.name for layer in graph.quantizable}
    assert not graph.unhandled


class Attends(nn.Module):
    """Rows of an image that attend to each other, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = attention()
        self.classify = nn.Linear(E, 10)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.squeeze(1)
        attended, _ = self.attention(rows, rows, rows, need_weights=False)
        return self.classify((rows + attended).mean(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("to", "load"), [("native", mpsearch.load), ("packed", packed.load)])
def test_quantized_projections_train_and_come_back_from_an_export(to: str, load: Any, tmp_path: Path) -> None:
    model, x = Attends(), torch.randn(16, 1, 8, 8)
    graph = mpsearch.inspect_model(model, x)
    names = [layer.name for layer in graph.quantizable]
    assert names == [*(f"attention.{name}" for name in PROJECTIONS), "classify"]
    choices = [
        ("uniform:4", "uniform:6"),
        ("shift:3", "uniform:6"),
        ("uniform:2", "uniform:6"),
        ("apot:4", "uniform:4"),
    ]
    choices.append(("uniform:8", "uniform:8"))
    config = PrecisionConfig({n: LayerPrecision.parse(*c) for n, c in zip(names, choices, strict=True)})
    quantized = mpsearch.prepare_for_training(model, config, x)
    layers = quant_layers(quantized)
    assert all(torch.unique(layers["attention.v_proj"].quantized_weight()[row]).numel() <= 4 for row in range(E))
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}  # type: ignore[union-attr]
    optimizer = torch.optim.SGD(quantized.parameters(), lr=0.5)
    nn.functional.cross_entropy(quantized(x), torch.arange(16) % 10).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert all(not torch.equal(before[name], layer.weight) for name, layer in layers.items())  # type: ignore[arg-type]
    assert {"attention.in_proj_weight", "attention.out_proj.weight"} <= quantized.state_dict().keys()
    quantized.eval()
    mpsearch.export(mpsearch.QuantizedNetwork(quantized, graph.layers, "attends", "noise"), to, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(load(model, tmp_path / "out")(x), quantized(x))


def test_every_trial_starts_from_the_float_projections() -> None:
    task = load_task(TaskSpec(model="digits_cnn", data=DataSpec(kind="digits"), float_epochs=1))
    model = Attends().eval()
    settings = TrialSpec(steps=2, batch_size=16, lr=0.5, bn_batches=0, calibration_samples=32, precision="fp32")
    workbench = Workbench(task, settings, float_model=model)
    config = PrecisionConfig.uniform([layer.name for layer in workbench.layers], LayerPrecision.shorthand("w4a4"))
    workbench.reset(config)
    workbench.fit(2, 0)
    trained = workbench.model.state_dict()["attention.in_proj_weight"]
    assert not torch.equal(trained, model.attention.in_proj_weight)
    workbench.reset(config)
    assert torch.equal(workbench.model.state_dict()["attention.in_proj_weight"], model.attention.in_proj_weight)


class Stubborn(nn.Module):
    """Does otherwise where its attention is not torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.fc = nn.Module(), nn.Linear(8, 8)
        self.block.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.block.attention(x, x, x)
        return self.fc(y if isinstance(self.block.attention, nn.MultiheadAttention) else 2 * y)


def test_attention_that_answers_otherwise_when_opened_stays_closed_and_is_named() -> None:
    net, x = Stubborn().eval(), torch.randn(3, 5, 8)
    graph = inspect_network(net, x)
    assert [layer.name for layer in graph.quantizable] == ["fc"]
    assert any(note.startswith("block.attention.q_proj stays float") for note in graph.notes)
    prepared = prepare(net, PrecisionConfig({"fc": LayerPrecision.shorthand("w8a8")}), x, graph.layers)
    assert float((prepared(x) - net(x)).detach().norm() / net(x).detach().norm()) < 0.02


def test_an_encoder_layer_is_opened_where_anything_in_it_is_quantized() -> None:
    """Closed, its fused kernel would read the weights past their quantizers."""
    net = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    assert open_attention(net, ["linear1"]) is not net
    assert open_attention(nn.ModuleDict({"a": net, "fc": nn.Linear(8, 8)}), ["fc"])["a"] is net  # type: ignore[index]
