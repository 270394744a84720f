"""Every width, kind of layer and activation in ONNX: a default onnxruntime session answers as the network does.

Agreement is meant sharply. Sums of floats in another order differ by `NOISE` of the largest value, no more. Where a
value lies that close to the boundary of two codes it may be rounded the other way: a *flip*, which moves the outputs
that see it by one step times a weight. Flips are counted and bounded: in number (`FLIPPED` of all outputs) and in size.
Without optimizations a session computes what the file says, so the two sessions show where a fusion changes answers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mpsearch
from mpsearch.graph.layers import inspect_model
from mpsearch.precision import LayerPrecision, PrecisionConfig
from mpsearch.quant.prepare import quant_layers

MISSING = "needs mpsearch[targets]; `make test-all` installs it"
onnx = pytest.importorskip("onnx", reason=MISSING)
pytest.importorskip("onnxscript", reason=MISSING)
ort = pytest.importorskip("onnxruntime", reason=MISSING)

NOISE = 2e-6
FLIPPED = 3e-3  # one code of an 8-bit input in 50,000 or so, and up to 144 outputs that see it
C = 16
BITS = range(1, 9)

KINDS: dict[str, tuple[Callable[[bool], nn.Module], tuple[int, ...]]] = {
    "conv": (lambda bias: nn.Conv2d(C, C, 3, padding=1, bias=bias), (C, 6, 6)),
    "depthwise": (lambda bias: nn.Conv2d(C, C, 3, padding=1, groups=C, bias=bias), (C, 6, 6)),
    "transposed": (lambda bias: nn.ConvTranspose2d(C, C, 3, padding=1, bias=bias), (C, 6, 6)),
    "linear": (lambda bias: nn.Linear(C, C, bias=bias), (C,)),
    "matmul": (lambda bias: nn.Linear(C, C, bias=bias), (5, C)),
}


class Branches(nn.Module):
    """Chains of layers beside each other on one input, so that one file holds many widths."""

    def __init__(self, chains: list[nn.Module]) -> None:
        super().__init__()
        self.chains = nn.ModuleList(chains)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([chain(x) for chain in self.chains], dim=1)


def quantized(
    model: nn.Module, x: Tensor, precisions: Iterable[tuple[str, str]]
) -> tuple[mpsearch.QuantizedNetwork, Tensor]:
    """The network, its layers given the precisions (weight, input) in order, and its own answers."""
    graph = inspect_model(model, x)
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    names = sorted((layer.name for layer in graph.quantizable), key=order.__getitem__)
    config = PrecisionConfig({n: LayerPrecision.parse(*p) for n, p in zip(names, precisions, strict=True)})
    prepared = mpsearch.prepare(model, config, x, graph.layers).eval()
    network = mpsearch.QuantizedNetwork(prepared, graph.layers, "table", "noise", example_input=x[:2])
    with torch.no_grad():
        return network, prepared(x)


def sessions(file: Path) -> dict[str, object]:
    plain = ort.SessionOptions()
    plain.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return {
        "default": ort.InferenceSession(str(file), providers=["CPUExecutionProvider"]),
        "no optimizations": ort.InferenceSession(str(file), plain, providers=["CPUExecutionProvider"]),
    }


def answers(session: object, x: Tensor) -> Tensor:
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])  # type: ignore[attr-defined]


def one_flip(chain: nn.Module) -> float:
    """The most that one flipped code at the input of a chain of two layers, or between them, moves an output."""
    first, second = quant_layers(chain).values()
    steps = [0.0 if q.precision.is_float else float(q.step) for q in (first.input_quantizer, second.input_quantizer)]
    moved = 1.2 * steps[0] * float(first.quantized_weight().abs().max()) + steps[1]  # 1.2: the steepest activation
    return moved * float(second.quantized_weight().abs().movedim(second.channel_axis, 0).flatten(1).sum(1).max())


@torch.no_grad()
def assert_same_answers(network: mpsearch.QuantizedNetwork, x: Tensor, ours: Tensor, folder: Path) -> Path:
    """Of a network of `Branches`, (N, chains, ...): flips are counted over all chains, and measured in each."""
    file = mpsearch.export(network, "onnx", folder, verify=False).path / "model.onnx"
    given = {kind: answers(session, x) for kind, session in sessions(file).items()}
    for what, a, b in (
        *((f"{kind} session", theirs, ours) for kind, theirs in given.items()),
        ("default session against no optimizations", *given.values()),
    ):
        assert a.shape == b.shape
        flips = []
        for i, chain in enumerate(network.model.chains):  # type: ignore[arg-type]
            difference = (a[:, i] - b[:, i]).abs()
            noise = NOISE * float(b[:, i].abs().max())
            precisions = [str(layer.precision) for layer in quant_layers(chain).values()]
            assert difference.max() <= noise + one_flip(chain), f"{what}, chain {i}, {precisions}: no flip"
            flips.append((difference > noise).float().mean())
        where = {i: float(share) for i, share in enumerate(flips) if share}
        assert torch.stack(flips).mean() <= FLIPPED, f"{what}: {where}"
    return file


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_pair_of_widths_answers_the_same_in_a_default_session(kind: str, bias: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, shape = KINDS[kind]
    pairs = [(f"uniform:{a}", f"uniform:{b}") for a in BITS for b in BITS if a >= b]
    model = Branches([nn.Sequential(make(bias), nn.ReLU(), make(bias)) for _ in pairs]).eval()
    x = torch.randn(16, *shape)
    precisions = itertools.chain.from_iterable(((a, b), (b, a)) for a, b in pairs)  # all 64 are among them
    assert_same_answers(*with_input(quantized(model, x, precisions), x), tmp_path / "out")


def with_input(
    quantized: tuple[mpsearch.QuantizedNetwork, Tensor], x: Tensor
) -> tuple[mpsearch.QuantizedNetwork, Tensor, Tensor]:
    return quantized[0], x, quantized[1]


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU, "relu6": nn.ReLU6, "hardtanh": nn.Hardtanh, "hardtanh-narrow": lambda: nn.Hardtanh(-0.1, 0.2),
    "hardswish": nn.Hardswish, "hardsigmoid": nn.Hardsigmoid, "leaky_relu": nn.LeakyReLU, "prelu": nn.PReLU,
    "prelu-channels": lambda: nn.PReLU(C), "rrelu": nn.RReLU, "elu": nn.ELU, "selu": nn.SELU, "celu": nn.CELU,
    "gelu": nn.GELU, "gelu-tanh": lambda: nn.GELU(approximate="tanh"), "silu": nn.SiLU, "mish": nn.Mish,
    "sigmoid": nn.Sigmoid, "logsigmoid": nn.LogSigmoid, "tanh": nn.Tanh, "tanhshrink": nn.Tanhshrink,
    "softplus": nn.Softplus, "softsign": nn.Softsign, "softshrink": nn.Softshrink, "hardshrink": nn.Hardshrink,
    "threshold": lambda: nn.Threshold(0.1, -0.2), "softmax": lambda: nn.Softmax(dim=1), "clamp": lambda: Clamp(),
    "max_pool": lambda: nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 1, 1)),
    "avg_pool": lambda: nn.AvgPool2d(3, 1, 1), "batch_norm": lambda: nn.BatchNorm2d(C),
}  # fmt: skip


class Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.clamp(x, 0.05, 0.4)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_activation_answers_the_same_in_a_default_session(bits: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, shape = KINDS["conv"]
    model = Branches([nn.Sequential(make(True), activation(), make(True)) for activation in ACTIVATIONS.values()])
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.uniform_(-0.5, 0.5)
            norm.running_var.uniform_(0.5, 2.0)
    x = torch.randn(16, *shape)
    precisions = [("uniform:8", "uniform:8"), (f"uniform:{bits}", f"uniform:{bits}")] * len(ACTIVATIONS)
    assert_same_answers(*with_input(quantized(model.eval(), x, precisions), x), tmp_path / "out")


@pytest.mark.parametrize("kind", ["conv", "transposed", "linear", "matmul"])
def test_weights_of_any_type_and_float_inputs_answer_the_same(kind: str, tmp_path: Path) -> None:
    """onnxruntime rounds float weights of quantized inputs to 8 bits, and float inputs of quantized weights."""
    torch.manual_seed(0)
    make, shape = KINDS[kind]
    weights = ["float", "shift:4", "apot:5", "uniform:4/tensor", "uniform:2", "uniform:8"]
    precisions = [(w, a) for w in weights for a in ("uniform:8", "uniform:4", "float")]
    model = Branches([nn.Sequential(make(bias), nn.ReLU(), make(bias)) for _ in precisions for bias in (True, False)])
    x = torch.randn(16, *shape)
    given = itertools.chain.from_iterable([p] * 4 for p in precisions)
    assert_same_answers(*with_input(quantized(model.eval(), x, given), x), tmp_path / "out")


GROUPS = [f"{weight}/group{size}" for weight in ("uniform:2", "uniform:8", "apot:4") for size in (4, 5, 99)]
"""Sizes that divide the 16 or 144 features of a weight, that leave a rest, and that are longer than some."""


@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_groups_answer_the_same_in_a_default_session(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, shape = KINDS[kind]
    precisions = [(w, a) for w in GROUPS for a in ("uniform:8", "float")]
    model = Branches([nn.Sequential(make(True), nn.ReLU(), make(False)) for _ in precisions])
    x = torch.randn(16, *shape)
    given = itertools.chain.from_iterable([p] * 2 for p in precisions)
    network, ours = quantized(model.eval(), x, given)
    layers = quant_layers(network.model).values()
    assert max(layer.weight_quantizer.step.numel() for layer in layers) > 2 * C, "no layer has several groups a channel"
    assert_same_answers(network, x, ours, tmp_path / "out")
