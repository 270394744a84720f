"""What flows between the layers of a network, read off its torch.fx graph: no data is needed.

Two questions are answered for the pipelines of the white paper (arXiv 2106.08295): which layers form a chain whose
channels can be rescaled (`chains`), and how the input of each layer is distributed (`input_distributions`). The second
follows data-free quantization (Nagel et al., arXiv 1906.04721, §4.2): behind a BatchNorm each channel is normal with
mean beta and standard deviation |gamma|; an activation clips it; sums add means and variances as if independent.

A model that torch.fx cannot trace has no graph here: what needs one is then left out, and says so.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from mpsearch.graph.facts import LayerInfo
from mpsearch.graph.layers import KINDS
from mpsearch.graph.observe import BATCH_NORMS

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

_OPERATIONS: Mapping[Any, str] = {
    **dict.fromkeys((nn.ReLU, F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), "relu"),
    **dict.fromkeys((nn.ReLU6, F.relu6), "relu6"),
    **dict.fromkeys((nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, F.dropout, "contiguous"), "same"),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d), "pool"),
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d), "pool"),
    **dict.fromkeys((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), "pool"),
    **dict.fromkeys((F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d), "pool"),
    **dict.fromkeys((nn.Flatten, torch.flatten, "flatten"), "flatten"),
    **dict.fromkeys((torch.mean, "mean"), "mean"),
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), "add"),
    **dict.fromkeys((torch.cat, torch.concat), "cat"),
    F.pad: "pad",
    operator.getitem: "getitem",
}
"""Module class, function or method name -> what it does, as far as channels are concerned."""


def blocks(layer: nn.Module) -> Tensor:
    """The weight as a view `(groups, out/groups, in/groups, taps)`, alike for all kinds of layers."""
    weight = cast(Tensor, layer.weight)
    groups = cast(int, getattr(layer, "groups", 1))
    if isinstance(layer, _TRANSPOSED):  # (in, out/groups, *kernel)
        return weight.view(groups, weight.shape[0] // groups, weight.shape[1], -1).transpose(1, 2)
    return weight.view(groups, weight.shape[0] // groups, weight.shape[1], -1)


def out_channels(layer: nn.Module) -> int:
    """Output channels (features of a linear layer)."""
    groups, out, _, _ = blocks(layer).shape
    return groups * out


def in_channels(layer: nn.Module) -> int:
    """Input channels (features of a linear layer)."""
    groups, _, inner, _ = blocks(layer).shape
    return groups * inner


@dataclass(frozen=True)
class Normal:
    """For each channel a normal distribution, clipped to [low, high]."""

    mean: Tensor  # (channels,), before clipping
    std: Tensor  # (channels,), before clipping
    low: float = -math.inf
    high: float = math.inf

    def clip(self, low: float, high: float = math.inf) -> Normal:
        """The distribution behind an activation that clips."""
        return Normal(self.mean, self.std, max(self.low, low), min(self.high, high))

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance `(channels,)` after clipping (arXiv 1906.04721, appendix C).

        With a = (low - mean)/std, b = (high - mean)/std, density phi and distribution Phi, for finite bounds:

            E[x]   = low Phi(a) + high (1 - Phi(b)) + mean (Phi(b) - Phi(a)) + std (phi(a) - phi(b))
            E[x^2] = low^2 Phi(a) + high^2 (1 - Phi(b)) + (mean^2 + std^2) (Phi(b) - Phi(a))
                     + std ((mean + low) phi(a) - (mean + high) phi(b))
        """
        mean, std = self.mean.double(), self.std.double().clamp_min(1e-12)
        # A bound 40 standard deviations away clips nothing; it stands for infinity, which would give inf * 0.
        low = (mean - 40 * std).clamp_min(self.low)
        high = (mean + 40 * std).clamp_max(self.high)
        low, high = low.clamp_max(self.high), high.clamp_min(self.low)
        a, b = (low - mean) / std, (high - mean) / std
        below, above, inside = _distribution(a), _distribution(-b), _distribution(b) - _distribution(a)
        first = low * below + high * above + mean * inside + std * (_density(a) - _density(b))
        second = low**2 * below + high**2 * above + (mean**2 + std**2) * inside
        second = second + std * ((mean + low) * _density(a) - (mean + high) * _density(b))
        variance = (second - first**2).clamp_min(0)
        return first.to(self.mean.dtype), variance.to(self.mean.dtype)

    def extent(self, sigmas: float = 6.0) -> tuple[float, float]:
        """The range over all channels, mean -+ `sigmas` standard deviations within the clipping bounds."""
        low = float((self.mean - sigmas * self.std).min())
        high = float((self.mean + sigmas * self.std).max())
        return min(max(low, self.low), self.high), max(min(high, self.high), self.low)


@dataclass(frozen=True)
class Chain:
    """Two layers with nothing between them but what commutes with a positive factor per channel."""

    first: str
    second: str
    between: tuple[str, ...]  # relu, relu6, same, pool, mean, flatten
    relu6: tuple[str, ...] = ()  # the ReLU6 modules between them; "" for a ReLU6 that is no module of its own


class Flow:
    """The torch.fx graph of a model in eval mode, with its modules.

    Raises:
        Exception: whatever torch.fx raises on a model that it cannot trace; `trace` turns that into None.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.graph: fx.Graph = fx.Tracer().trace(model)
        self._calls = Counter(str(n.target) for n in self.graph.nodes if n.op == "call_module")

    def operation(self, node: fx.Node) -> str:
        """What a node does: `layer`, `batch_norm`, a value of _OPERATIONS, or `unknown`."""
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            if type(module) in KINDS:
                return "layer"
            if isinstance(module, BATCH_NORMS):
                return "batch_norm"
            return _OPERATIONS.get(type(module), "unknown")
        return _OPERATIONS.get(node.target, "unknown") if node.op in ("call_function", "call_method") else node.op

    def layers(self) -> tuple[LayerInfo, ...]:
        """The quantizable layers with the facts that need no data: no shapes of inputs, no MACs, no groups."""
        infos: dict[str, LayerInfo] = {}
        for node in self.graph.nodes:
            name = str(node.target)
            if self.operation(node) != "layer" or name in infos:
                continue
            module, reader = self.modules[name], self._only_reader(node)
            norm = str(reader.target) if reader is not None and self.operation(reader) == "batch_norm" else None
            weight = cast(Tensor, module.weight)
            infos[name] = LayerInfo(
                name,
                KINDS[type(module)],
                tuple(weight.shape),
                (),
                (),
                macs=0,
                params=sum(parameter.numel() for parameter in module.parameters()),
                fan_in=0,
                groups=cast(int, getattr(module, "groups", 1)),
                batch_norm=norm if self._calls[name] == 1 else None,
                input_group=name,
                weight_group=name,
                calls=self._calls[name],
            )
        return tuple(infos.values())

    def chains(self) -> list[Chain]:
        """The pairs of layers that cross-layer equalization can treat, in execution order."""
        weights = Counter(id(m.weight) for m in self.modules.values() if type(m) in KINDS)

        def usable(node: fx.Node) -> bool:
            name = str(node.target)
            return self._calls[name] == 1 and weights[id(self.modules[name].weight)] == 1

        found = []
        for node in self.graph.nodes:
            if self.operation(node) != "layer" or not usable(node):
                continue
            between: list[str] = []
            relu6: list[str] = []
            reader = self._only_reader(node)
            while reader is not None and self.operation(reader) in ("relu", "relu6", "same", "pool", "mean", "flatten"):
                if self.operation(reader) == "mean" and not _keeps_channels(reader):
                    break
                if self.operation(reader) == "relu6":
                    name = str(reader.target)
                    relu6.append(name if reader.op == "call_module" and self._calls[name] == 1 else "")
                between.append(self.operation(reader))
                reader = self._only_reader(reader)
            if reader is None or self.operation(reader) != "layer" or not usable(reader):
                continue
            first, second = str(node.target), str(reader.target)
            if out_channels(self.modules[first]) == in_channels(self.modules[second]):
                found.append(Chain(first, second, tuple(between), tuple(relu6)))
        return found

    def input_distributions(
        self, outputs: Mapping[str, Normal], model_input: tuple[float, float] | None = None
    ) -> dict[str, Normal]:
        """How the input of each layer is distributed, where that can be told.

        Args:
            outputs: the distribution of the outputs of layers that had a BatchNorm behind them; other layers' outputs
                follow from their input, mean W E[x] + b and variance W^2 Var[x].
            model_input: mean and standard deviation of the model's input, the same in all channels; None: unknown.
        """
        known: dict[fx.Node, Normal | None] = {}
        inputs: dict[str, Normal | None] = {}
        for node in self.graph.nodes:
            operation, args = self.operation(node), [known.get(a) for a in node.all_input_nodes]
            x = args[0] if args else None
            if operation == "placeholder" and model_input is not None:
                known[node] = Normal(torch.tensor([model_input[0]]), torch.tensor([model_input[1]]))
            elif operation == "layer":
                name = str(node.target)
                x = None if x is None else _spread(x, in_channels(self.modules[name]))
                first_call = name not in inputs
                inputs[name] = x if first_call else None  # called again: two distributions, none that holds
                known[node] = outputs.get(name) or (None if x is None else _through(self.modules[name], x))
            elif operation in _RULES and args and all(a is not None for a in args):
                known[node] = _RULES[operation](node, cast(Sequence[Normal], args))
        return {name: x for name, x in inputs.items() if x is not None}

    def _only_reader(self, node: fx.Node) -> fx.Node | None:
        readers = list(node.users)
        return readers[0] if len(readers) == 1 and readers[0].all_input_nodes == [node] else None


def trace(model: nn.Module) -> Flow | None:
    """The flow of a model, or None where torch.fx cannot trace it (control flow that depends on data, say)."""
    try:
        return Flow(model)
    except Exception:  # whatever a foreign forward does with a proxy
        return None


_Rule = Callable[[fx.Node, Sequence[Normal]], Normal | None]


def _add(_node: fx.Node, args: Sequence[Normal]) -> Normal | None:
    channels = {len(x.mean) for x in args} - {1}  # one entry holds for all channels
    if len(args) != 2 or len(channels) > 1:
        return None
    (mean, var), (mean2, var2) = args[0].moments(), args[1].moments()
    return Normal(mean + mean2, (var + var2).sqrt(), args[0].low + args[1].low, args[0].high + args[1].high)


def _cat(node: fx.Node, args: Sequence[Normal]) -> Normal | None:
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if axis != 1:
        return None
    means, stds = torch.cat([a.mean for a in args]), torch.cat([a.std for a in args])
    return Normal(means, stds, min(a.low for a in args), max(a.high for a in args))


def _pad(node: fx.Node, args: Sequence[Normal]) -> Normal | None:
    (x,), widths = args, node.args[1]
    zeros = node.kwargs.get("mode", "constant") == "constant" and not node.kwargs.get("value")
    if not isinstance(widths, (tuple, list)) or len(node.args) > 2 or not zeros:
        return None
    if len(widths) <= 4:  # around the image
        return x
    before, after = cast(int, widths[4]), cast(int, widths[5])
    pad = (before, after)
    return Normal(F.pad(x.mean, pad), F.pad(x.std, pad), min(x.low, 0.0), max(x.high, 0.0))


def _getitem(node: fx.Node, args: Sequence[Normal]) -> Normal | None:
    index = node.args[1]
    whole = isinstance(index, tuple) and len(index) > 1 and all(i == slice(None) for i in index[:2])
    return args[0] if whole else None


_RULES: Mapping[str, _Rule] = {
    "relu": lambda _node, args: args[0].clip(0.0),
    "relu6": lambda _node, args: args[0].clip(0.0, 6.0),
    "same": lambda _node, args: args[0],
    "pool": lambda _node, args: args[0],  # right for the mean of an average; a range that holds for a maximum
    "flatten": lambda _node, args: args[0],
    "mean": lambda node, args: args[0] if _keeps_channels(node) else None,
    "add": _add,
    "cat": _cat,
    "pad": _pad,
    "getitem": _getitem,
}


def _keeps_channels(node: fx.Node) -> bool:
    """Whether a mean is over the places of an image, not over its channels."""
    axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    axes = (axes,) if isinstance(axes, int) else axes
    return isinstance(axes, (tuple, list)) and all(axis in (2, 3, 4, -1, -2) for axis in axes)


def _spread(x: Normal, channels: int) -> Normal | None:
    """`x` for a layer of so many input channels: a flattened image repeats each channel's distribution."""
    repeats, rest = divmod(channels, len(x.mean))
    if rest:
        return None
    return Normal(x.mean.repeat_interleave(repeats), x.std.repeat_interleave(repeats), x.low, x.high)


def _through(layer: nn.Module, x: Normal) -> Normal:
    """The output of a layer without BatchNorm: mean W E[x] + b, variance W^2 Var[x]."""
    mean, var = x.moments()
    weight = blocks(layer).detach()
    out = times(weight.sum(dim=3), mean)
    bias = cast(Tensor | None, layer.bias)
    return Normal(out if bias is None else out + bias.detach(), times(weight.square().sum(dim=3), var).sqrt())


def times(matrix: Tensor, x: Tensor) -> Tensor:
    """`(groups, out/groups, in/groups)` times `(in,)` -> `(out,)`."""
    return (matrix @ x.to(matrix).view(matrix.shape[0], -1, 1)).flatten()


def _density(z: Tensor) -> Tensor:
    return torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)


def _distribution(z: Tensor) -> Tensor:
    return cast(Tensor, torch.special.ndtr(z))
