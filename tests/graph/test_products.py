"""Products of two activations are layers where they are asked for, and nowhere else."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mpsearch
from mpsearch.cost.model import cost_of
from mpsearch.errors import ExportError
from mpsearch.exporters import native, packed
from mpsearch.exporters.fit import HOLD_PRODUCTS, fit
from mpsearch.exporters.targets import TARGETS
from mpsearch.exporters.verify import Verified
from mpsearch.graph.layers import inspect_model
from mpsearch.graph.products import open_products
from mpsearch.precision import LayerPrecision, Precision, PrecisionConfig
from mpsearch.quant.modules import QuantProduct
from mpsearch.quant.prepare import inspect_network, prepare, prepare_for_training, quant_layers
from mpsearch.space.build import build_space
from mpsearch.space.spec import parse_space

HEADS, WIDTH, LENGTH = 2, 8, 5


class Attention(nn.Module):
    """With its projections as layers, and the way that attends left open."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        y: Tensor = self.proj(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return y


class Fused(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Explicit(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        return torch.matmul(scores.softmax(-1), v)


class Summed(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.shape[-1])
        return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)


class Torchs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x, x, x)[0]
        return y


class Encoder(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.embed, self.attn, self.head = nn.Linear(3, WIDTH), attention, nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y: Tensor = self.head((x + self.attn(x)).mean(1))
        return y


FORMS = {"fused": Fused, "explicit": Explicit, "einsum": Summed, "torch": Torchs}
X = torch.randn(6, LENGTH, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=FORMS)
def net(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return Encoder(FORMS[request.param]()).eval()


def names_of(net: nn.Module) -> list[str]:
    place = "attn.inner" if isinstance(net.attn, Torchs) else "attn"
    return [f"{place}.product1", f"{place}.product2"]


def config_of(net: nn.Module, text: str) -> PrecisionConfig:
    names = [layer.name for layer in inspect_model(net, X, products=True).quantizable]
    return PrecisionConfig.uniform(names, LayerPrecision.shorthand(text))


def test_products_are_layers_with_facts_where_they_are_asked_for(net: nn.Module) -> None:
    graph = inspect_network(net, X, products=True)
    products = [layer for layer in graph.quantizable if layer.multiplies_activations]
    assert [layer.name for layer in products] == names_of(net)
    scores, values = products
    depth = WIDTH // HEADS
    assert (scores.input_shape, scores.fan_in) == ((HEADS, LENGTH, depth), depth)
    assert (values.input_shape, values.second_shape) == ((HEADS, LENGTH, LENGTH), (HEADS, LENGTH, depth))
    assert [layer.macs for layer in products] == [HEADS * LENGTH * LENGTH * depth] * 2
    assert (scores.signed_input, scores.signed_second) == (True, True)
    assert (values.signed_input, values.signed_second) == (False, True)  # what a softmax gives is not negative
    assert not graph.other_macs


def test_without_asking_everything_is_as_before(net: nn.Module) -> None:
    graph, freed = inspect_model(net, X), inspect_model(net, X, products=True)
    assert graph.layers == tuple(layer for layer in freed.layers if not layer.multiplies_activations)
    assert graph.macs == freed.macs
    assert sum(graph.other_macs.values()) == 2 * HEADS * LENGTH * LENGTH * (WIDTH // HEADS)


def test_at_float_the_network_is_the_one_that_it_was(net: nn.Module) -> None:
    before = net(X)
    prepared = prepare(net, config_of(net, "w32a32"), X).eval()
    assert isinstance(quant_layers(prepared)[names_of(net)[0]], QuantProduct)
    torch.testing.assert_close(prepared(X), before, rtol=1e-5, atol=1e-6)
    assert net.state_dict().keys() == open_products(net, names_of(net)).state_dict().keys()


def test_both_factors_are_quantized(net: nn.Module) -> None:
    prepared = prepare(net, config_of(net, "w3a4"), X).eval()
    product = prepared.get_submodule(names_of(net)[0])
    seen: list[tuple[Tensor, ...]] = []
    for quantizer in (product.input_quantizer, product.weight_quantizer):
        quantizer.register_forward_hook(lambda _m, _a, y: seen.append(y))  # type: ignore[union-attr, operator]
    prepared(X)
    assert [bits >= len(y.unique()) > 2 for y, bits in zip(seen, (16, 8), strict=True)] == [True, True]


def test_a_training_step_moves_the_steps_of_both_factors(net: nn.Module) -> None:
    prepared = prepare_for_training(net, config_of(net, "w4a4"), X)
    product = prepared.get_submodule(names_of(net)[1])
    steps = [product.input_quantizer.step, product.weight_quantizer.step]  # type: ignore[union-attr]
    before = [step.detach().clone() for step in steps]  # type: ignore[union-attr, operator]
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1)
    F.cross_entropy(prepared(X), torch.arange(6) % 4).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert not any(torch.equal(step, old) for step, old in zip(steps, before, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("form", [native, packed])
def test_an_export_gives_the_network_back(net: nn.Module, form: object, tmp_path: Path) -> None:
    network = network_of(net, config_of(net, "w4a5"))
    name = "native" if form is native else "packed"
    mpsearch.export(network, name, tmp_path / "out")
    loaded = form.load(copy.deepcopy(net), tmp_path / "out")  # type: ignore[attr-defined]
    torch.testing.assert_close(loaded(X), network.model(X), rtol=1e-5, atol=1e-6)


def network_of(net: nn.Module, config: PrecisionConfig) -> mpsearch.QuantizedNetwork:
    layers = inspect_network(net, X, products=True).layers
    prepared = prepare(net, config, X, layers).eval()
    return mpsearch.QuantizedNetwork(prepared, layers, "encoder", "none", example_input=X, samples=X, float_model=net)


def both_ways(net: nn.Module, first: str, second: str) -> PrecisionConfig:
    """A config in which only the products are narrow, so that an answer shows whether they are quantized."""
    factors = LayerPrecision.parse(second, first)
    return config_of(net, "w8a8").replace(**dict.fromkeys(names_of(net), factors))


@pytest.mark.parametrize(
    ("to", "first", "second"),
    [("onnx", "uniform:4", "uniform:3"), ("onnx", "uniform:11", "float"), ("qonnx", "uniform:3", "uniform:5")],
)
def test_a_runtime_answers_as_the_network_with_products(
    net: nn.Module, to: str, first: str, second: str, tmp_path: Path
) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime", *(("qonnx",) if to == "qonnx" else ())):
        pytest.importorskip(package, reason="needs mpsearch[targets]; `make test-all` installs it")
    import onnx

    network = network_of(net, both_ways(net, first, second))
    verified = mpsearch.export(network, to, tmp_path / "out").verified
    assert isinstance(verified, Verified)
    assert verified.same_answers == verified.samples == len(X)
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    made_by = {output: node.op_type for node in graph.node for output in node.output}
    factors = [[made_by.get(x) for x in node.input] for node in graph.node if node.op_type in ("MatMul", "Einsum")]
    quantizer = "IntQuant" if to == "qonnx" else "DequantizeLinear"
    quantized = [pair[0] == quantizer and (pair[1] == quantizer) == (second != "float") for pair in factors]
    assert sum(quantized) >= 2, factors


def test_other_formats_refuse_the_product_by_name_and_say_which_hold_it(tmp_path: Path) -> None:
    net = Encoder(Fused()).eval()
    network = network_of(net, config_of(net, "w8a8"))
    without = [name for name, target in TARGETS.items() if "product" not in target.holds.kinds]
    assert sorted(HOLD_PRODUCTS + tuple(without)) == sorted(TARGETS)
    for name in without:
        with pytest.raises(ExportError, match=r"attn\.product1.*native, packed, qonnx, onnx"):
            fit(network, name, TARGETS[name].holds, allow_lossy=True)


def test_a_second_factor_is_no_constant_and_its_type_is_one_of_activations(tmp_path: Path) -> None:
    net = Encoder(Fused()).eval()
    network = network_of(net, both_ways(net, "uniform:6", "shift:3"))
    with pytest.raises(ExportError, match=r"attn\.product1 \(product\) second factor shift:3/tensor"):
        fit(network, "onnx", TARGETS["onnx"].holds, allow_lossy=False)
    fitted, conversions = fit(network, "onnx", TARGETS["onnx"].holds, allow_lossy=True)
    assert [(c.layer, c.tensor, str(c.after)) for c in conversions] == [
        (name, "second factor", "uniform:3/tensor") for name in names_of(net)
    ]
    before, after = (quant_layers(n.model)["attn.product2"].weight_quantizer for n in (network, fitted))
    assert after.precision.quantizer == "uniform"
    x = torch.linspace(-1, 1, 50)
    most = [float(quantizer.eval()(x).detach().max()) for quantizer in (before, after)]
    assert most[1] == pytest.approx(most[0], rel=0.2)


def test_cost_counts_the_bits_of_both_factors() -> None:
    net = Encoder(Fused()).eval()
    layers = inspect_model(net, X, products=True).layers
    config = config_of(net, "w8a8")
    first, second = Precision.parse("uniform:4", "tensor"), Precision.parse("uniform:2", "tensor")
    config = config.replace(**{"attn.product2": LayerPrecision(second, first)})
    macs = HEADS * LENGTH * LENGTH * (WIDTH // HEADS)
    assert cost_of(layers, config, "bops").per_layer["attn.product2"] == macs * 4 * 2
    read = cost_of(layers, config, "activation_bytes").per_layer["attn.product2"]
    assert read == HEADS * LENGTH * LENGTH * 4 / 8 + HEADS * LENGTH * (WIDTH // HEADS) * 2 / 8
    assert cost_of(layers, config, "weight_bytes").per_layer["attn.product2"] == 0


def test_both_factors_take_the_activation_choices_of_a_rule() -> None:
    net = Encoder(Fused()).eval()
    rule = {"match": "*", "weight": "uniform:2-8", "activation": "uniform:4-6"}
    spec = parse_space({"name": "s", "products": True, "rules": [rule]})
    space = build_space(spec, inspect_model(net, X, products=spec.products).layers)
    choices = {slot.tensor: [str(c) for c in slot.choices] for slot in space.slots if "attn.product1" in slot.layers}
    expected = [f"uniform:{bits}/tensor" for bits in (4, 5, 6)]
    assert choices == {"weight": expected, "activation": expected}


def test_a_product_with_a_weight_is_none_and_still_counts_in_the_names() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.weight = nn.Linear(3, 3), nn.Parameter(torch.randn(3, 3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.fc(x) @ self.weight.t()
            return y @ y.transpose(1, 2)

    net = nn.Sequential(Mixed(), nn.Linear(LENGTH, 2)).eval()
    graph = inspect_network(net, X, products=True)
    assert [layer.name for layer in graph.layers if layer.multiplies_activations] == ["0.product2"]


def test_an_opened_network_can_be_copied_and_pickled() -> None:
    net = Fused().eval()
    x = torch.randn(2, LENGTH, WIDTH)
    opened = open_products(net, ["product1"])
    assert type(pickle.loads(pickle.dumps(opened))) is type(opened) is not Fused
    torch.testing.assert_close(copy.deepcopy(opened)(x), net(x))
