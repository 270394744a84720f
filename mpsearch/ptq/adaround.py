"""AdaRound: learned rounding (Nagel et al., arXiv 2004.10568; white paper, arXiv 2106.08295, §3.5).

    W~ = s clip(floor(W/s) + h(V), n, p),    h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1)
    min over V of E||W x - W~ x~||^2 + lambda sum(1 - |2 h(V) - 1|^beta)

x is the layer's input in the float network and x~ in the network quantized so far (asymmetric reconstruction). beta
falls from 20 to 2 along a cosine; in the first 20 % of the steps the regularizer is off. Afterwards each weight is put
on the grid point that h chose, so that the layer's own quantizer, whose grid this is, keeps it.

We differ in how the expectation is taken. The papers draw batches of 32 images; but the error is quadratic in W~,

    E||W x - W~ x~||^2 = tr(W~ G W~^T) - 2 tr(W~ (W C)^T) + const,    G = E[x~ x~^T],   C = E[x x~^T],

so two matrices of size (fan-in)^2 hold all that the calibration set has to say, and every step uses all of it. The
price is that the activation function behind the layer is not taken into account. Layers are linear, conv1d and conv2d;
others keep the nearest rounding and are named.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpsearch.graph.inputs import call, layer_input
from mpsearch.graph.kinds import is_transposed_linear, kind_of, weight_of
from mpsearch.private.torch import padding_for_pad
from mpsearch.ptq.flow import blocks
from mpsearch.quant.modules import QuantLayer
from mpsearch.quant.prepare import quant_layers
from mpsearch.quant.uniform import UniformQuantizer

ZETA, GAMMA = 1.1, -0.1
LAMBDA = 0.01
BETA_START, BETA_END = 20.0, 2.0
WARM_START = 0.2
LEARNING_RATE = 0.01
STEPS = 1000
CHUNK = 32
"""Samples unfolded into patches at a time."""


@torch.no_grad()
def adaround(model: nn.Module, float_model: nn.Module, calibration_input: Any, steps: int = STEPS) -> list[str]:
    """Round the weights of a quantized model, in place: afterwards they are on the grid.

    Each layer is rounded the moment the quantized model reaches it, with the input that it then gets.

    Args:
        model: weight ranges set, in eval mode.
        float_model: the model that it was made from.
        calibration_input: a batch of model input, a few hundred samples.
        steps: of Adam, for each layer.

    Returns:
        The names of the layers that keep the nearest rounding.
    """
    layers = {name: layer for name, layer in quant_layers(model).items() if layer.has_weight}
    waiting = set(layers)
    left = []

    def rounding(name: str, layer: QuantLayer) -> Any:
        def hook(_layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            if name not in waiting or layer.weight_quantizer.precision.is_float:
                return
            waiting.remove(name)
            if kind_of(layer) not in ("linear", "conv1d", "conv2d"):
                left.append(name)
                return
            exact = input_of(float_model, name, calibration_input)
            gram, cross = input_products(layer, layer_input(args, kwargs), exact)
            up = learned_rounding(layer, gram, cross, steps)
            weight_of(layer).copy_(on_grid(layer, up))

        return hook

    handles = [
        layer.register_forward_pre_hook(rounding(name, layer), with_kwargs=True) for name, layer in layers.items()
    ]
    try:
        call(model, calibration_input)
    finally:
        for handle in handles:
            handle.remove()
    return left


def rectified_sigmoid(v: Tensor) -> Tensor:
    """h(V) in [0, 1]; it reaches both ends."""
    return (torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def beta_at(step: int, steps: int) -> float | None:
    """The regularizer's exponent at a step: None during the warm start, then from 20 to 2 along a cosine."""
    begin = int(WARM_START * steps)
    if step < begin:
        return None
    share = (step - begin) / max(1, steps - 1 - begin)
    return BETA_END + (BETA_START - BETA_END) * (1 + math.cos(math.pi * share)) / 2


def learned_rounding(layer: QuantLayer, gram: Tensor, cross: Tensor, steps: int = STEPS) -> Tensor:
    """Which weights are rounded up, a bool of the weight's shape.

    Args:
        layer: weight range set.
        gram: G = E[x~ x~^T], `(groups, fan_in, fan_in)`.
        cross: C = E[x x~^T], the same shape.
        steps: of Adam.
    """
    quantizer = cast(UniformQuantizer, layer.weight_quantizer)  # PTQ has no other
    weight = cast(Tensor, layer.weight).detach()
    step, shift = (tensor.detach() for tensor in quantizer.grid())
    step = quantizer.spread(step, weight)
    low, high = quantizer.low, quantizer.high
    scaled = weight / step - shift
    floor = torch.floor(scaled)
    rest = (scaled - floor).clamp(1e-4, 1 - 1e-4)
    target = _rows(layer, weight) @ cross  # W C
    with torch.enable_grad():
        v = nn.Parameter(-torch.log((ZETA - GAMMA) / (rest - GAMMA) - 1))  # h(v) = rest: nothing is rounded yet
        optimizer = torch.optim.Adam([v], lr=LEARNING_RATE)
        for i in range(steps):
            h = rectified_sigmoid(v)
            rounded = _rows(layer, step * ((floor + h).clamp(low, high) + shift))
            gradient = 2 * (rounded.detach() @ gram - target)  # of the squared error, by hand: one product, not two
            loss = (gradient * rounded).sum()
            if (beta := beta_at(i, steps)) is not None:
                loss = loss + LAMBDA * (1 - (2 * h - 1).abs().pow(beta)).sum()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return rectified_sigmoid(v.detach()) >= 0.5


@torch.no_grad()
def on_grid(layer: QuantLayer, up: Tensor) -> Tensor:
    """The weight rounded up where `up` holds and down elsewhere: s (clip(floor(W/s - o) + up, n, p) + o)."""
    quantizer = cast(UniformQuantizer, layer.weight_quantizer)  # PTQ has no other
    step, shift = quantizer.grid()
    step = quantizer.spread(step, cast(Tensor, layer.weight))
    codes = torch.floor(cast(Tensor, layer.weight) / step - shift) + up
    return step * (codes.clamp(quantizer.low, quantizer.high) + shift)


@torch.no_grad()
def input_products(layer: nn.Module, quantized: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    """G = E[x~ x~^T] and C = E[x x~^T] over samples and output positions, `(groups, fan_in, fan_in)`.

    Args:
        layer: what reads the inputs.
        quantized: x~, its input in the quantized network.
        exact: x, its input in the float network.
    """
    gram: Tensor | float = 0.0
    cross: Tensor | float = 0.0
    count = 0
    for a, b in zip(torch.split(quantized, CHUNK), torch.split(exact, CHUNK), strict=True):
        x, y = _patches(layer, a), _patches(layer, b)
        gram, cross, count = gram + x.mT @ x, cross + y.mT @ x, count + x.shape[1]
    return cast(Tensor, gram) / count, cast(Tensor, cross) / count


@torch.no_grad()
def input_of(model: nn.Module, name: str, model_input: Any) -> Tensor:
    """The input of one layer at its first call; the model runs no further."""
    seen: list[Tensor] = []

    def stop(_layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        seen.append(layer_input(args, kwargs))
        raise _ReachedError

    handle = model.get_submodule(name).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        call(model, model_input)
    except _ReachedError:
        pass
    finally:
        handle.remove()
    return seen[0]


class _ReachedError(Exception):
    """The layer that was waited for has been reached."""


def _rows(layer: QuantLayer, weight: Tensor) -> Tensor:
    """A tensor of the weight's shape as `(groups, out/groups, fan_in)`."""
    if is_transposed_linear(layer):
        return weight.t()[None]
    groups = blocks(layer).shape[0]
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def _patches(layer: nn.Module, x: Tensor) -> Tensor:
    """What each output position sees of the input, `(groups, samples * positions, fan_in)`."""
    if kind_of(layer) == "linear":
        return x.reshape(1, -1, x.shape[-1])
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d))
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, padding_for_pad(layer), mode=mode)
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    if isinstance(layer, nn.Conv1d):  # an image one pixel high
        x, kernel, stride, dilation = x.unsqueeze(2), (1, *kernel), (1, *stride), (1, *dilation)
    columns = F.unfold(x, cast(Any, kernel), cast(Any, dilation), 0, cast(Any, stride))  # (n, channels * taps, places)
    n, _, places = columns.shape
    columns = columns.view(n, layer.groups, -1, places)
    return columns.permute(1, 0, 3, 2).reshape(layer.groups, n * places, -1)
