"""Other modules in the place of quantized layers: plain torch layers, or those of the library that is exported to."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mpsearch.quant.groups import spread_groups
from mpsearch.quant.modules import QuantLayer, without_quantizers
from mpsearch.quant.prepare import places, quant_layers


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy of a quantized model in torch's own layers, each with the weight that it used; inputs stay float."""
    return with_layers(model, lambda _name, layer: plain_layer(layer))


def with_layers(model: nn.Module, make: Callable[[str, QuantLayer], nn.Module]) -> nn.Module:
    """A copy of a quantized model with `make(name, layer)` in the place of each quantized layer."""
    model = copy.deepcopy(model)
    for name, layer in quant_layers(model).items():
        new = make(name, layer)
        for parent, attribute in places(model, layer):
            setattr(parent, attribute, new)
    return model


@torch.no_grad()
def plain_layer(layer: QuantLayer) -> nn.Module:
    """The torch layer that a quantized layer stands for, with the weight as it was used."""
    twin = without_quantizers(layer)
    if not layer.has_weight:
        return twin
    twin.weight = nn.Parameter(layer.quantized_weight().detach().clone())
    return twin


def per_channel(values: Tensor, like: Tensor, axis: int = 0, group: int | None = None) -> Tensor:
    """`(channels,)` or `(1,)`, reshaped to broadcast against `like` along `axis`; `(channels * groups,)`, spread."""
    if group is not None:
        return spread_groups(values, like, axis, group)
    shape = [1] * like.dim()
    if shape:
        shape[axis] = values.numel()
    return values.reshape(shape)
