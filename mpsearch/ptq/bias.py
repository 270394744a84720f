"""Bias correction (Nagel et al., arXiv 1906.04721, §4.2; white paper, arXiv 2106.08295, §3.4).

Rounded weights shift the mean of a layer's output, E[W_q x] - E[W x] = dW E[x] per channel; the bias takes it back:

- analytic, without data: b - dW E[x], with E[x] from the BatchNorm before, as a normal clipped by the activation;
- empirical, from calibration data: b - (E[y_q] - E[y]), measured, layer after layer.

Never together with AdaRound, whose rounding already minimizes the error of the output, its mean included.
Zero padding is left out of the analytic mean, as in the papers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.graph.inputs import call
from mpsearch.graph.kinds import channel_axis, kind_of
from mpsearch.ptq.flow import Normal, blocks, times
from mpsearch.ptq.fold import bias_of
from mpsearch.quant.modules import QuantLayer
from mpsearch.quant.prepare import quant_layers


@torch.no_grad()
def correct_bias_analytically(model: nn.Module, inputs: Mapping[str, Normal]) -> list[str]:
    """Correct the biases of a quantized model, in place, from how its layers' inputs are distributed.

    Args:
        model: weights quantized, ranges set.
        inputs: by layer; layers that are not named are left alone.

    Returns:
        The names of the layers left alone.
    """
    left = []
    for name, layer in quant_layers(model).items():
        if kind_of(layer) in ("embedding", "product"):
            continue
        if name in inputs:
            expected, _ = inputs[name].moments()
            bias_of(layer).sub_(times(_weight_error(layer).sum(dim=3), expected))
        else:
            left.append(name)
    return left


@torch.no_grad()
def correct_bias_empirically(model: nn.Module, float_model: nn.Module, calibration_input: Any) -> None:
    """Correct the biases of a quantized model, in place, until each channel's mean output is the float model's.

    One pass over each model: a layer is corrected the moment it has computed its output, so that the layers behind it
    see what they will see later on.

    Args:
        model: weights quantized, ranges set, in eval mode.
        float_model: the model that it was made from.
        calibration_input: a batch of model input.
    """
    means: dict[str, Tensor] = {}
    float_modules = dict(float_model.named_modules())
    layers = {
        name: layer for name, layer in quant_layers(model).items() if kind_of(layer) not in ("embedding", "product")
    }

    def measure(name: str) -> Any:
        def hook(layer: nn.Module, _args: Any, y: Tensor) -> None:
            means.setdefault(name, _channel_mean(layer, y))

        return hook

    def correct(name: str) -> Any:
        def hook(layer: nn.Module, _args: Any, y: Tensor) -> Tensor | None:
            if name not in means:  # a layer's second call: corrected already
                return None
            shift = _channel_mean(layer, y) - means.pop(name)
            bias_of(layer).sub_(shift)
            return y - shift.view(_along_channels(layer, y))

        return hook

    handles = [float_modules[name].register_forward_hook(measure(name)) for name in layers]
    handles += [layer.register_forward_hook(correct(name)) for name, layer in layers.items()]
    try:
        call(float_model, calibration_input)
        call(model, calibration_input)
    finally:
        for handle in handles:
            handle.remove()


def _weight_error(layer: QuantLayer) -> Tensor:
    """dW = W_q - W as `(groups, out/groups, in/groups, taps)`."""
    exact = blocks(layer).clone()
    weight = layer.weight
    layer.weight = nn.Parameter(layer.quantized_weight(), requires_grad=False)
    error = blocks(layer) - exact
    layer.weight = weight
    return error


def _channel_mean(layer: nn.Module, y: Tensor) -> Tensor:
    shape = _along_channels(layer, y)
    return y.mean(dim=[axis for axis, size in enumerate(shape) if size == 1])


def _along_channels(layer: nn.Module, y: Tensor) -> list[int]:
    """The shape that lets a value per channel broadcast against the layer's output: -1 on the channel axis, else 1."""
    axis = channel_axis(str(kind_of(layer)), y.dim())
    return [-1 if i == axis else 1 for i in range(y.dim())]
