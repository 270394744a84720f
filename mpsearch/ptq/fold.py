"""BatchNorm folding (white paper, arXiv 2106.08295, §2.3.1): a normalization becomes part of the layer before it.

y = gamma (W x + b - mu) / sqrt(var + eps) + beta = W' x + b'
W' = W gamma / sqrt(var + eps),   b' = (b - mu) gamma / sqrt(var + eps) + beta
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from mpsearch.graph.agreement import Original, largest_subset, result_points
from mpsearch.graph.attention import open_attention
from mpsearch.graph.facts import LayerInfo
from mpsearch.graph.kinds import foldable_norm, rest_of_norm
from mpsearch.ptq.flow import Normal, blocks, out_channels
from mpsearch.quant.prepare import places, quant_layers


@dataclass(frozen=True)
class FloatNet:
    """A float model on its way to quantization, and what is known of it without data."""

    model: nn.Module
    outputs: Mapping[str, Normal] = field(default_factory=dict)  # of the layers that had a BatchNorm behind them
    folded: Mapping[str, str] = field(default_factory=dict)  # layer -> the BatchNorm that is now part of it
    relu6: tuple[str, ...] = ()  # the ReLU6 modules that have become ReLU
    notes: tuple[str, ...] = ()  # what was left out and why, in words


def fold_batch_norms(model: nn.Module, layers: Sequence[LayerInfo], calibration_input: Any | None = None) -> FloatNet:
    """A copy of `model` in eval mode without the BatchNorms that the layers name: it computes the same.

    With data this is checked, and what does not hold is left as it was, with a note. The statistics of what was folded
    stay: behind it each channel has mean beta and deviation |gamma|.
    """
    opened = open_attention(model, [layer.name for layer in layers if layer.reason is None])
    pairs = list(foldable(dict(opened.named_modules()), layers).items())

    def folded(some: Sequence[tuple[str, str]]) -> nn.Module:
        copied = copy.deepcopy(opened).eval()
        for layer, norm in some:
            fold(copied, layer, norm)
        return copied

    foldable_pairs = pairs
    if calibration_input is not None and pairs:
        original = Original(model, calibration_input, result_points(layers))
        foldable_pairs = largest_subset(pairs, lambda some: original.holds(folded(some)))
    modules = dict(opened.named_modules())
    notes = tuple(
        f"{norm} is not folded into {layer}: the network then answers otherwise"
        for layer, norm in pairs
        if (layer, norm) not in foldable_pairs
    )
    normal = {layer: Normal(*_affine(cast(nn.BatchNorm2d, modules[norm]))) for layer, norm in foldable_pairs}
    return FloatNet(folded(foldable_pairs), normal, dict(foldable_pairs), notes=notes)


def foldable(modules: Mapping[str, nn.Module], layers: Sequence[LayerInfo]) -> dict[str, str]:
    """Layer -> the BatchNorm that can become part of it, as inspection found, and is still there."""
    return {
        layer.name: layer.batch_norm
        for layer in layers
        if layer.batch_norm is not None
        and layer.reason is None
        and foldable_norm(norm := modules.get(layer.batch_norm, nn.Identity()))
        and norm.num_features == out_channels(modules[layer.name])
    }


@torch.no_grad()
def fold(model: nn.Module, layer_name: str, norm_name: str) -> None:
    """Fold one BatchNorm into the layer before it, in place; what else its class does takes its place."""
    layer, norm = model.get_submodule(layer_name), cast(nn.BatchNorm2d, model.get_submodule(norm_name))
    factor, offset = affine(norm)
    weight = blocks(layer)
    weight.mul_(factor.view(weight.shape[0], -1, 1, 1))
    bias = bias_of(layer)
    bias.copy_(bias * factor + offset)
    replace_module(model, norm, rest_of_norm(norm))


@torch.no_grad()
def affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """A BatchNorm in eval mode as x * factor + offset, both `(channels,)`."""
    beta, gamma = _affine(norm, signed=True)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = gamma / torch.sqrt(norm.running_var + norm.eps)
    return factor, beta - norm.running_mean * factor


def bias_of(layer: nn.Module) -> Tensor:
    """The bias of a layer `(out,)`; zeros are put in where it had none."""
    bias = cast(Tensor | None, layer.bias)
    if bias is None:
        weight = cast(Tensor, layer.weight)
        bias = nn.Parameter(weight.new_zeros(out_channels(layer)))
        layer.register_parameter("bias", bias)
    return bias


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever `old` hangs in `model`."""
    for parent, name in places(model, old):
        setattr(parent, name, new)


def structure_of(net: FloatNet, model: nn.Module) -> dict[str, Any]:
    """How `model`, quantized from `net`, differs in structure from the original network: arguments of `restructure`."""
    biased = [name for name, layer in quant_layers(model).items() if layer.bias is not None]
    return {"folded": dict(net.folded), "relu6": list(net.relu6), "biased": biased}


def restructure(model: nn.Module, folded: Mapping[str, str], relu6: Iterable[str], biased: Iterable[str]) -> nn.Module:
    """A copy of a network with the structure that PTQ gave it: its weights can then be loaded.

    Args:
        model: the original float network.
        folded: layer -> BatchNorm.
        relu6: the ReLU6 modules that became ReLU.
        biased: the layers that have a bias.
    """
    biased = list(biased)
    model = copy.deepcopy(open_attention(model, [*folded, *biased]))
    for layer, norm in folded.items():
        fold(model, layer, norm)
    for name in relu6:
        replace_module(model, model.get_submodule(name), nn.ReLU())
    for name in biased:
        bias_of(model.get_submodule(name))
    return model


def _affine(norm: nn.BatchNorm2d, signed: bool = False) -> tuple[Tensor, Tensor]:
    """beta, and gamma (or |gamma|), of a BatchNorm, `(channels,)`; copies."""
    assert norm.running_mean is not None
    ones = torch.ones_like(norm.running_mean)
    beta = 0 * ones if norm.bias is None else norm.bias.detach().clone()
    gamma = ones if norm.weight is None else norm.weight.detach().clone()
    return beta, gamma if signed else gamma.abs()
