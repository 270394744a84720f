"""Random networks as values: a program of operations, drawn by hypothesis, and the module that runs it.

A `Program` is what is drawn and what shrinks; its `repr` is what a failure prints, and `Network(program)` makes the
module again. Each operation reads tensors that were made before, by their position; position 0 is the input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

Domain = Literal["image", "sequence", "audio"]
Call = Literal["positional", "keyword", "dict"]
Result = Literal["tensor", "tuple", "dict"]

CLASSES = 5
BATCH = 8
INPUT: dict[Domain, tuple[int, ...]] = {"image": (3, 8, 8), "sequence": (5, 6), "audio": (4, 12)}
"""Shape of one sample: (channels, height, width), (tokens, features), (channels, samples)."""

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "prelu": nn.PReLU,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "celu": nn.CELU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "sigmoid": nn.Sigmoid,
    "logsigmoid": nn.LogSigmoid,
    "tanh": nn.Tanh,
    "hardtanh": nn.Hardtanh,
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "softplus": nn.Softplus,
    "softsign": nn.Softsign,
    "softshrink": nn.Softshrink,
    "hardshrink": nn.Hardshrink,
    "tanhshrink": nn.Tanhshrink,
    "threshold": lambda: nn.Threshold(0.1, -0.2),
    "identity": nn.Identity,
    "dropout": nn.Dropout,
}


@dataclass(frozen=True)
class Op:
    """One operation: what it does, which tensors it reads, and its settings."""

    kind: str
    reads: tuple[int, ...]
    settings: tuple[tuple[str, Any], ...] = ()

    def __getitem__(self, name: str) -> Any:
        return dict(self.settings).get(name)


@dataclass(frozen=True)
class Program:
    """A network: operations in order, how it is called, and what it gives back."""

    domain: Domain
    ops: tuple[Op, ...]
    call: Call = "positional"
    result: Result = "tensor"
    seed: int = 0


class Doubled(nn.Linear):
    """A subclass with the forward of its base and a method that its parent uses."""

    def scale(self) -> float:
        return 2.0


class Attention(nn.Module):
    """Self-attention written out: three projections of one tensor, two products of activations."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(features, 3 * features)
        self.out = nn.Linear(features, features)

    def forward(self, x: Tensor) -> Tensor:
        n, t, c = x.shape
        q, k, v = self.qkv(x).view(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, c))


MIXING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": torch.matmul,
    "operator": lambda a, b: a @ b,
    "bmm": torch.bmm,
    "einsum": lambda a, b: torch.einsum("bij,bjk->bik", a, b),
    "baddbmm": lambda a, b: torch.baddbmm(torch.ones(1), a, b, beta=0.5, alpha=2),
}
"""The ways to write a product of two activations."""


class Mixing(nn.Module):
    """Attention of a tensor to itself without a weight: two products of activations, of which one factor is shared."""

    def __init__(self, written: str) -> None:
        super().__init__()
        self.written = written

    def forward(self, x: Tensor) -> Tensor:
        product = MIXING[self.written]
        return product((product(x, x.transpose(1, 2)) / x.shape[-1]).softmax(-1), x)


class Queries(nn.Module):
    """Learned queries: the input of a layer is a parameter, expanded over the batch."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.q = nn.Parameter(torch.randn(1, 2, features))
        self.lin = nn.Linear(features, features)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.lin(self.q.expand(len(x), -1, -1))], dim=1)


class Tied(nn.Module):
    """An autoencoder whose decoder multiplies by the encoder's weight, transposed, with a bias of its own."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.enc = nn.Linear(features, features)
        self.bias = nn.Parameter(torch.randn(features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.relu(self.enc(x)), self.enc.weight.t(), self.bias)


class Keyword(nn.Module):
    """A layer that is called by keyword."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.fc = nn.Linear(features, features)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(input=x)


class Scaled(nn.Module):
    """A layer whose own method the parent calls."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.fc = Doubled(features, features)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.fc.scale()


class MultiHead(nn.Module):
    """torch's own attention."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(features, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return y


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


class TokenNorm(nn.Module):
    """BatchNorm1d on (N, tokens, features): its channels are tokens, not the features of the layer before it."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(tokens)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x)
        return y


class FeatureNorm(nn.Module):
    """BatchNorm1d over the features of tokens, as (N, features, tokens)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(features)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return y


def module_of(op: Op, shapes: list[tuple[int, ...]]) -> nn.Module | None:
    """The module of an operation on tensors of these shapes (without batch); None where it has none."""
    shape = shapes[op.reads[0]]
    channels = shape[0]
    match op.kind:
        case "conv2d" | "conv1d":
            kind = nn.Conv2d if op.kind == "conv2d" else nn.Conv1d
            return kind(
                channels,
                op["out"],
                op["kernel"],
                stride=op["stride"],
                padding=op["kernel"] // 2,
                groups=op["groups"],
                bias=op["bias"],
                padding_mode=op["padding_mode"],
            )
        case "transposed2d":
            return nn.ConvTranspose2d(channels, op["out"], 2, stride=2, groups=op["groups"], bias=op["bias"])
        case "transposed1d":
            return nn.ConvTranspose1d(channels, op["out"], 2, stride=2, groups=op["groups"], bias=op["bias"])
        case "batch_norm2d":
            return nn.BatchNorm2d(channels)
        case "batch_norm1d":
            return nn.BatchNorm1d(channels)
        case "group_norm":
            return nn.GroupNorm(1, channels)
        case "token_norm":
            return TokenNorm(shape[0])
        case "feature_norm":
            return FeatureNorm(shape[1])
        case "layer_norm":
            return nn.LayerNorm(shape[-1])
        case "linear":
            return nn.Linear(shape[-1], op["out"], bias=op["bias"])
        case "attention":
            return Attention(shape[-1], 2)
        case "multi_head":
            return MultiHead(shape[-1], 2)
        case "mixing":
            return Mixing(op["written"])
        case "queries":
            return Queries(shape[-1])
        case "tied":
            return Tied(shape[-1])
        case "keyword":
            return Keyword(shape[-1])
        case "scaled":
            return Scaled(shape[-1])
        case "gate":
            return Gate(channels)
        case "activation":
            return ACTIVATIONS[op["name"]]()
    return None


def shape_of(op: Op, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of what an operation gives, without batch."""
    shape = shapes[op.reads[0]]
    match op.kind:
        case "conv2d" | "conv1d":
            return (op["out"], *(-(-size // op["stride"]) for size in shape[1:]))
        case "transposed2d" | "transposed1d":
            return (op["out"], *(2 * size for size in shape[1:]))
        case "linear":
            return (*shape[:-1], op["out"])
        case "queries":
            return (shape[0] + 2, shape[1])
        case "max_pool" | "avg_pool":
            return (shape[0], *(size // 2 for size in shape[1:]))
        case "cat":
            axis = op["axis"]
            return (*shape[:axis], shape[axis] + shapes[op.reads[1]][axis], *shape[axis + 1 :])
    return shape


class Network(nn.Module):
    """The module that runs a program, with BatchNorm statistics and affine parameters away from 0 and 1."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        torch.manual_seed(program.seed)
        self.program = program
        shapes = [INPUT[program.domain]]
        self.body = nn.ModuleList()
        self.at: list[int | None] = []  # position in `body` of each operation's module
        for op in program.ops:
            module = None
            if op["shared"] is not None:
                self.at.append(self.at[op["shared"]])
            else:
                module = module_of(op, shapes)
                self.at.append(None if module is None else len(self.body))
                if module is not None:
                    self.body.append(module)
            shapes.append(shape_of(op, shapes))
        last = shapes[-1]
        self.head = nn.Linear(last[-1] if program.domain == "sequence" else last[0], CLASSES)
        for part in self.modules():
            if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
                nn.init.uniform_(part.weight, 0.5, 1.5)
                nn.init.normal_(part.bias, std=0.5)
                nn.init.normal_(part.running_mean, std=0.5)
                nn.init.uniform_(part.running_var, 0.3, 2.0)

    def forward(self, x: Tensor) -> Any:
        values = [x]
        for op, at in zip(self.program.ops, self.at, strict=True):
            read = [values[i] for i in op.reads]
            values.append(self.body[at](read[0]) if at is not None else _apply(op, read))
        y = values[-1]
        y = y.mean(1) if self.program.domain == "sequence" else y.flatten(2).mean(2)
        logits = self.head(y)
        match self.program.result:
            case "tuple":
                return logits, y
            case "dict":
                return {"logits": logits, "features": y}
        return logits


def _apply(op: Op, read: list[Tensor]) -> Tensor:
    match op.kind:
        case "add":
            return read[0] + read[1]
        case "mul":
            return read[0] * torch.sigmoid(read[1])
        case "cat":
            return torch.cat(read, dim=op["axis"] + 1)
        case "gram":  # in the forward of the whole network
            return (read[0] @ read[0].transpose(1, 2)).tanh() @ read[0]
        case "relu_f":
            return F.relu(read[0])
        case "clamp":
            return read[0].clamp(-0.3, 0.6)
        case "max_pool":
            return F.max_pool2d(read[0], 2) if read[0].dim() == 4 else F.max_pool1d(read[0], 2)
        case "avg_pool":
            return F.avg_pool2d(read[0], 2) if read[0].dim() == 4 else F.avg_pool1d(read[0], 2)
    raise AssertionError(op)


class ByKeyword(nn.Module):
    """A network whose input has a name."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *, pixels: Tensor, scale: Tensor | None = None) -> Any:
        return self.net(pixels if scale is None else pixels * scale)


def build(program: Program) -> tuple[nn.Module, Any, Tensor]:
    """The network in eval mode, a batch as it takes it, and the batch's tensor."""
    network = Network(program).eval()
    torch.manual_seed(program.seed + 1)
    x = torch.randn(BATCH, *INPUT[program.domain])
    if program.call == "positional":
        return network, x, x
    return ByKeyword(network).eval(), {"pixels": x}, x


def tensor_of(output: Any) -> Tensor:
    """The logits in what a network gives back."""
    if isinstance(output, dict):
        return output["logits"]
    return output[0] if isinstance(output, tuple) else output


# ------------------------------------------------------------------------------------------------------- drawing


@st.composite
def programs(draw: st.DrawFn, most: int = 7) -> Program:
    """Networks of one to `most` operations; simpler ones first."""
    domain: Domain = draw(st.sampled_from(["image", "sequence", "audio"]))
    shapes = [INPUT[domain]]
    ops: list[Op] = []
    for _ in range(draw(st.integers(1, most))):
        op = draw(_op(domain, shapes, ops))
        ops.append(op)
        shapes.append(shape_of(op, shapes))
    call: Call = draw(st.sampled_from(["positional", "keyword"]))
    result: Result = draw(st.sampled_from(["tensor", "tuple", "dict"]))
    return Program(domain, tuple(ops), call, result, draw(st.integers(0, 3)))


_ANYWHERE = ["activation", "add", "cat", "mul", "relu_f", "clamp", "shared"]
KINDS: dict[Domain, list[str]] = {
    "image": ["conv2d", "batch_norm2d", "max_pool", "avg_pool", "transposed2d", "group_norm", "gate", *_ANYWHERE],
    "audio": ["conv1d", "batch_norm1d", "max_pool", "avg_pool", "transposed1d", "group_norm", *_ANYWHERE],
    "sequence": [
        *("linear", "layer_norm", "attention", "multi_head", "mixing", "gram", "queries", "tied", "keyword", "scaled"),
        *("token_norm", "feature_norm"),
        *_ANYWHERE,
    ],
}


def _settings(**settings: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(settings.items())


@st.composite
def _op(draw: st.DrawFn, domain: Domain, shapes: list[tuple[int, ...]], ops: list[Op]) -> Op:
    at = len(shapes) - 1
    if draw(st.booleans()) and at:
        at = draw(st.integers(0, at))
    shape = shapes[at]

    kind = draw(st.sampled_from(KINDS[domain]))
    match kind:
        case "shared":
            same = [
                i
                for i, op in enumerate(ops)
                if op["shared"] is None and shapes[op.reads[0]] == shape and module_of(op, shapes) is not None
            ]
            if same:
                source = draw(st.sampled_from(same))
                settings = tuple(item for item in ops[source].settings if item[0] != "shared")
                return Op(ops[source].kind, (at,), (*settings, ("shared", source)))
        case "conv2d" | "conv1d":
            groups = draw(st.sampled_from([g for g in (1, 2, shape[0]) if shape[0] % g == 0]))
            out = draw(
                st.sampled_from(
                    [c for c in (4, 6, shape[0], 2 * shape[0]) if c % groups == 0 and c <= 24] or [shape[0]]
                )
            )
            kernel = draw(st.sampled_from([1, 3]))
            small = min(shape[1:]) < 3
            return Op(
                kind,
                (at,),
                _settings(
                    out=out,
                    kernel=kernel,
                    stride=draw(st.sampled_from([1] if small else [1, 2])),
                    groups=groups,
                    bias=draw(st.booleans()),
                    padding_mode=draw(
                        st.sampled_from(["zeros"] if small else ["zeros", "reflect", "replicate", "circular"])
                    ),
                ),
            )
        case "transposed2d" | "transposed1d":
            if math.prod(shape[1:]) <= 64:
                groups = draw(st.sampled_from([g for g in (1, 2) if shape[0] % g == 0]))
                return Op(kind, (at,), _settings(out=2 * groups, groups=groups, bias=draw(st.booleans())))
        case "linear":
            return Op(kind, (at,), _settings(out=draw(st.sampled_from([4, 6, 8])), bias=draw(st.booleans())))
        case "attention" | "multi_head":
            if shape[-1] % 2 == 0:
                return Op(kind, (at,))
        case "mixing":
            return Op(kind, (at,), _settings(written=draw(st.sampled_from(list(MIXING)))))
        case "queries":
            if shape[0] <= 9:
                return Op(kind, (at,))
        case "add" | "mul":
            same = [i for i, other in enumerate(shapes) if other == shape]
            return Op(kind, (at, draw(st.sampled_from(same))))
        case "cat":
            axis = draw(st.sampled_from([0, 1])) if domain == "sequence" else 0
            fits = [
                i
                for i, other in enumerate(shapes)
                if len(other) == len(shape)
                and all(a == b for j, (a, b) in enumerate(zip(other, shape, strict=True)) if j != axis)
                and other[axis] + shape[axis] <= 24
            ]
            if fits:
                return Op(kind, (at, draw(st.sampled_from(fits))), _settings(axis=axis))
        case "max_pool" | "avg_pool":
            if min(shape[1:]) >= 2:
                return Op(kind, (at,))
        case "activation":
            return Op(kind, (at,), _settings(name=draw(st.sampled_from(list(ACTIVATIONS)))))
        case _:
            return Op(kind, (at,))
    return Op("relu_f", (at,))
