"""What flows between the layers of a network, read off its torch.fx graph: no data is needed.

Two questions are answered for the pipelines of the white paper (arXiv 2106.08295): which layers form a chain whose
channels can be rescaled (`chains`), and how the input of each layer is distributed (`input_distributions`). The second
follows data-free quantization (Nagel et al., arXiv 1906.04721, §4.2): behind a BatchNorm each channel is normal with
mean beta and standard deviation |gamma|; an activation clips it; sums add means and variances as if independent.

A model that torch.fx cannot trace has no graph here: what needs one is then left out, and says so.
"""

from __future__ import annotations

import copy
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
from mpsearch.graph.kinds import BATCH_NORMS, foldable_norm, is_transposed_linear, kind_of, known_class, weight_of
from mpsearch.graph.layers import reason_to_stay_float
from mpsearch.graph.observe import Usage
from mpsearch.private.torch import BatchNormNd

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
    weight = weight_of(layer)
    groups = cast(int, getattr(layer, "groups", 1))
    if is_transposed_linear(layer):  # (in, out)
        return weight.t()[None, :, :, None]
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):  # (in, out/groups, *kernel)
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


class _LayerTracer(fx.Tracer):
    """Sees each layer and each BatchNorm as one operation, also those of classes derived from torch's."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = known_class(m) is not None or isinstance(m, BatchNormNd)
        return known or super().is_leaf_module(m, module_qualified_name)


@dataclass(frozen=True)
class Layout:
    """How a tensor lies, as far as it is known."""

    dims: int | None = None
    axis: int | None = None  # of the channels, from the left


class Flow:
    """The torch.fx graph of a model in eval mode, with its modules.

    Raises:
        Exception: whatever torch.fx raises on a model that it cannot trace; `trace` turns that into None.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.graph: fx.Graph = _LayerTracer().trace(model)
        self._calls = Counter(str(n.target) for n in self.graph.nodes if n.op == "call_module")
        self._holders = Counter(p for m in self.modules.values() for p in m.parameters(recurse=False))
        self._read = {str(n.target).rpartition(".")[0] for n in self.graph.nodes if n.op == "get_attr"}
        self._layouts: dict[fx.Node, Layout] = {}
        for node in self.graph.nodes:
            self._layouts[node] = self._layout(node)

    def operation(self, node: fx.Node) -> str:
        """What a node does: `layer`, `batch_norm`, a value of _OPERATIONS, or `unknown`."""
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            if kind_of(module) is not None:
                return "layer" if self._reason(str(node.target)) is None else "unknown"
            if isinstance(module, BATCH_NORMS):
                return "batch_norm" if foldable_norm(module) else "unknown"
            return _OPERATIONS.get(type(module), "unknown")
        return _OPERATIONS.get(node.target, "unknown") if node.op in ("call_function", "call_method") else node.op

    def layers(self) -> tuple[LayerInfo, ...]:
        """The layers with the facts that need no data: no shapes of inputs, no MACs, no groups."""
        infos: dict[str, LayerInfo] = {}
        called = [str(node.target) for node in self.graph.nodes if node.op == "call_module"]
        norms = {}
        for node in self.graph.nodes:
            if self.operation(node) == "layer" and (norm := self._follower(node)) is not None:
                norms[str(node.target)] = norm
        for name in dict.fromkeys([*called, *self.modules]):
            module = self.modules[name]
            if (kind := kind_of(module)) is None:
                continue
            shape = tuple(weight_of(module).shape)
            infos[name] = LayerInfo(
                name,
                kind,
                shape[::-1] if is_transposed_linear(module) else shape,
                (),
                (),
                macs=0,
                params=sum(parameter.numel() for parameter in module.parameters()),
                fan_in=0,
                groups=cast(int, getattr(module, "groups", 1)),
                batch_norm=norms.get(name),
                input_group=name,
                weight_group=name,
                calls=max(self._calls[name], 1),
                reason=self._reason(name),
            )
        return tuple(infos.values())

    def notes(self) -> tuple[str, ...]:
        """In words: the BatchNorms that read a layer and stay, because without data it is not known what they read."""
        return tuple(
            f"{reader.target} is not folded into {node.target}: without data it is not known whether it normalizes "
            "its features; give calibration data"
            for node in self.graph.nodes
            if self.operation(node) == "layer"
            and (reader := self._only_reader(node)) is not None
            and self.operation(reader) == "batch_norm"
            and self._follower(node) is None
        )

    def chains(self) -> list[Chain]:
        """The pairs of layers that cross-layer equalization can treat, in execution order."""
        chains = []
        for node in self.graph.nodes:
            if self.operation(node) != "layer" or not self._alone(node):
                continue
            between: list[str] = []
            relu6: list[str] = []
            reader = self._only_reader(node)
            while reader is not None and self.operation(reader) in ("relu", "relu6", "same", "pool", "mean", "flatten"):
                if self._layouts[reader].axis is None:  # the channels are no longer told apart
                    break
                if self.operation(reader) == "relu6":
                    name = str(reader.target)
                    relu6.append(name if reader.op == "call_module" and self._calls[name] == 1 else "")
                between.append(self.operation(reader))
                reader = self._only_reader(reader)
            if reader is None or self.operation(reader) != "layer" or not self._alone(reader):
                continue
            first, second = str(node.target), str(reader.target)
            same_axis = self._reads_channels(reader)
            if same_axis and out_channels(self.modules[first]) == in_channels(self.modules[second]):
                chains.append(Chain(first, second, tuple(between), tuple(relu6)))
        return chains

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
                told = x is not None and (len(x.mean) == 1 or self._reads_channels(node))
                x = _spread(x, in_channels(self.modules[name])) if x is not None and told else None
                first_call = name not in inputs
                inputs[name] = x if first_call else None  # called again: two distributions, none that holds
                known[node] = outputs.get(name) or (None if x is None else _through(self.modules[name], x))
            elif operation in _RULES and args and all(a is not None for a in args):
                known[node] = _RULES[operation](node, cast(Sequence[Normal], args))
        return {name: x for name, x in inputs.items() if x is not None}

    def _reason(self, name: str) -> str | None:
        module = self.modules[name]
        usage = Usage(calls=self._calls[name], bypassed=name in self._read)
        frozen = not any(parameter.requires_grad for root in (self.modules[""],) for parameter in root.parameters())
        reason = reason_to_stay_float(name, module, usage, frozen)
        embeds = kind_of(module) == "embedding"
        return "without data nothing is done to what only looks up" if reason is None and embeds else reason

    def _alone(self, node: fx.Node) -> bool:
        """Whether a layer is used once, and has its parameters for itself."""
        name = str(node.target)
        parameters = self.modules[name].parameters(recurse=False)
        return self._calls[name] == 1 and all(self._holders[p] == 1 for p in parameters)

    def _follower(self, node: fx.Node) -> str | None:
        """The BatchNorm that can become part of a layer: see `graph.layers`."""
        reader = self._only_reader(node)
        if reader is None or reader.op != "call_module" or self._calls[str(reader.target)] > 1 or not self._alone(node):
            return None
        norm = self.modules[str(reader.target)]
        if not foldable_norm(norm) or str(reader.target) in self._read or self._layouts[node].axis != 1:
            return None
        hooks = (m._forward_hooks or m._forward_pre_hooks for m in (norm, self.modules[str(node.target)]))
        return None if any(hooks) else str(reader.target)

    def _reads_channels(self, node: fx.Node) -> bool:
        """Whether the channels of what a layer reads are what the layer takes for its own."""
        layout, kind = self._layouts[node.all_input_nodes[0]], str(kind_of(self.modules[str(node.target)]))
        if layout.axis is None:
            return False
        if kind == "linear":
            return layout.axis == -1 or (layout.dims is not None and layout.axis == layout.dims - 1)
        return layout.axis == 1 and layout.dims == int(kind[-2]) + 2

    def _layout(self, node: fx.Node) -> Layout:
        """The layout of what a node gives: batches of images come channels first, and a linear layer is on the last."""
        inputs = [self._layouts[n] for n in node.all_input_nodes]
        x = inputs[0] if inputs else Layout()
        match self.operation(node):
            case "layer":
                kind = str(kind_of(self.modules[str(node.target)]))
                if kind != "linear":
                    return Layout(int(kind[-2]) + 2, 1)
                return Layout(x.dims, -1 if x.dims is None else x.dims - 1)
            case "flatten":
                return Layout(2, 1) if _flattened(node, self.modules) == (1, -1) and x.axis == 1 else Layout()
            case "mean":
                return _averaged(node, x)
            case "pool":
                return x if x.axis == 1 and x.dims is not None and x.dims > 2 else Layout()
            case "relu" | "relu6" | "same" | "batch_norm":
                return x
            case "add":
                return x if all(other in (x, Layout()) for other in inputs) else Layout()
            case "cat" | "pad" | "getitem":  # their rules say where the channels stay
                return x if x.axis == 1 else Layout()
        return Layout()

    def _only_reader(self, node: fx.Node) -> fx.Node | None:
        readers = list(node.users)
        return readers[0] if len(readers) == 1 and readers[0].all_input_nodes == [node] else None


def trace(model: nn.Module) -> Flow | None:
    """The flow of a model, or None where torch.fx cannot trace it (control flow that depends on data, say)."""
    try:
        return Flow(copy.deepcopy(model))  # a forward may keep what it computes, which here are proxies
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
    axes = _axes(node)
    return axes is not None and all(axis in (2, 3, 4, -1, -2) for axis in axes)


def _averaged(node: fx.Node, x: Layout) -> Layout:
    """The layout behind a mean over places."""
    axes = _axes(node)
    if axes is None or x.axis != 1 or x.dims is None or any(axis % x.dims < 2 for axis in axes):
        return Layout()
    keeps = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    return x if keeps else Layout(x.dims - len(axes), 1)


def _axes(node: fx.Node) -> tuple[int, ...] | None:
    axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    axes = (axes,) if isinstance(axes, int) else axes
    whole = isinstance(axes, (tuple, list)) and all(isinstance(axis, int) for axis in axes)
    return tuple(cast(Sequence[int], axes)) if whole else None


def _flattened(node: fx.Node, modules: Mapping[str, nn.Module]) -> tuple[Any, Any]:
    """The first and the last axis that are made one."""
    if node.op == "call_module":
        module = cast(nn.Flatten, modules[str(node.target)])
        return module.start_dim, module.end_dim
    arguments = dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)) | dict(node.kwargs)
    return arguments.get("start_dim", 0), arguments.get("end_dim", -1)


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
