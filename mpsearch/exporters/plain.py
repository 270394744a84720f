"""Other modules in the place of quantized layers: plain torch layers, or those of the library that is exported to."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from mpsearch.quant.modules import QUANT_LAYERS, QuantLayer
from mpsearch.quant.prepare import places, quant_layers

PLAIN: Mapping[type[nn.Module], type[nn.Module]] = {quant: plain for plain, quant in QUANT_LAYERS.items()}
"""The torch layer that each quantized layer stands for."""


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
    twin.weight = nn.Parameter(layer.quantized_weight().detach().clone())
    return twin


def without_quantizers(layer: QuantLayer) -> nn.Module:
    """The torch layer that a quantized layer stands for; it shares the unquantized parameters."""
    kind = PLAIN[type(layer)]
    twin = kind.__new__(kind)
    twin.__dict__ = {k: (v.copy() if isinstance(v, dict) else v) for k, v in layer.__dict__.items()}
    del twin._modules["weight_quantizer"], twin._modules["input_quantizer"]
    return twin


def per_channel(values: Tensor, like: Tensor, axis: int = 0) -> Tensor:
    """`(channels,)` or `(1,)`, reshaped to broadcast against `like` along `axis`."""
    shape = [1] * like.dim()
    if shape:
        shape[axis] = values.numel()
    return values.reshape(shape)
