"""Layers with a weight quantizer and an input quantizer: y = op(q_a(x), q_w(w)) + bias.

Each is a subclass of the torch layer that it stands for, so the names in its state dict are the original ones with
`weight_quantizer.*` and `input_quantizer.*` beside them. Biases stay float: they are added to the accumulator.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpsearch.precision import LayerPrecision, Offer
from mpsearch.quant.quantizer import Quantizer
from mpsearch.quant.switch import make_quantizer

UNIFORM = Offer()
"""Uniform quantizers only: what a layer gets unless more is asked for, because every further type costs time."""


class QuantLayer(nn.Module):
    """What all quantized layers have in common."""

    weight_quantizer: Quantizer
    input_quantizer: Quantizer
    channel_axis = 0  # of the weight's output channels

    def add_quantizers(self, *, signed_input: bool, input_elements: int, offer: Offer) -> None:
        """Give the layer its quantizers, at float precision.

        Args:
            signed_input: whether the input takes negative values, and thus needs an offset (uniform) or signed levels.
            input_elements: elements of one input sample (N of LSQ's gradient scale).
            offer: the quantizer types that weight and input can have.
        """
        weight = cast(Tensor, self.weight)
        channels = weight.shape[self.channel_axis]
        self.weight_quantizer = make_quantizer(
            offer.weight,
            channels,
            weight.dim(),
            signed=True,
            offset=False,
            elements=weight.numel() // max(1, channels),
            channel_axis=self.channel_axis,
        )
        self.input_quantizer = make_quantizer(
            offer.activation, 1, 0, signed=False, offset=signed_input, elements=input_elements
        )

    @property
    def precision(self) -> LayerPrecision:
        """The precision that the layer has now."""
        return LayerPrecision(self.weight_quantizer.precision, self.input_quantizer.precision)

    def set_precision(self, precision: LayerPrecision) -> None:
        """Take on a precision; ranges have to be set afterwards."""
        self.weight_quantizer.set_precision(precision.weight)
        self.input_quantizer.set_precision(precision.activation)

    def quantized_weight(self) -> Tensor:
        """The weight as the layer uses it."""
        return cast(Tensor, self.weight_quantizer(self.weight))


class QuantConv1d(QuantLayer, nn.Conv1d):
    """`nn.Conv1d` with quantized weight and input."""

    def forward(self, x: Tensor) -> Tensor:
        """op(q_a(x), q_w(w)) + bias."""
        y: Tensor = self._conv_forward(self.input_quantizer(x), self.quantized_weight(), self.bias)
        return y


class QuantConv2d(QuantLayer, nn.Conv2d):
    """`nn.Conv2d` with quantized weight and input."""

    def forward(self, x: Tensor) -> Tensor:
        """op(q_a(x), q_w(w)) + bias."""
        y: Tensor = self._conv_forward(self.input_quantizer(x), self.quantized_weight(), self.bias)
        return y


class QuantConv3d(QuantLayer, nn.Conv3d):
    """`nn.Conv3d` with quantized weight and input."""

    def forward(self, x: Tensor) -> Tensor:
        """op(q_a(x), q_w(w)) + bias."""
        y: Tensor = self._conv_forward(self.input_quantizer(x), self.quantized_weight(), self.bias)
        return y


class _QuantConvTranspose(QuantLayer):
    """The part that transposed convolutions of one to three dimensions share."""

    _transposed: Any  # torch's functional form
    channel_axis = 1

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """op(q_a(x), q_w(w)) + bias."""
        layer: Any = self  # a mixin of torch's transposed convolutions, whose attributes mypy does not see
        spatial = layer.weight.dim() - 2
        padding = layer._output_padding(
            x, output_size, layer.stride, layer.padding, layer.kernel_size, spatial, layer.dilation
        )
        x, weight = self.input_quantizer(x), self.quantized_weight()
        y: Tensor = type(self)._transposed(
            x, weight, layer.bias, layer.stride, layer.padding, padding, layer.groups, layer.dilation
        )
        return y


class QuantConvTranspose1d(_QuantConvTranspose, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` with quantized weight and input."""

    _transposed = staticmethod(F.conv_transpose1d)


class QuantConvTranspose2d(_QuantConvTranspose, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` with quantized weight and input."""

    _transposed = staticmethod(F.conv_transpose2d)


class QuantConvTranspose3d(_QuantConvTranspose, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` with quantized weight and input."""

    _transposed = staticmethod(F.conv_transpose3d)


class QuantLinear(QuantLayer, nn.Linear):
    """`nn.Linear` with quantized weight and input."""

    def forward(self, x: Tensor) -> Tensor:
        """q_a(x) q_w(w)^T + bias."""
        return F.linear(self.input_quantizer(x), self.quantized_weight(), self.bias)


QUANT_LAYERS: dict[type[nn.Module], type[QuantLayer]] = {
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Conv3d: QuantConv3d,
    nn.ConvTranspose1d: QuantConvTranspose1d,
    nn.ConvTranspose2d: QuantConvTranspose2d,
    nn.ConvTranspose3d: QuantConvTranspose3d,
    nn.Linear: QuantLinear,
}
"""What stands for each torch layer. A layer type joins by one entry here and one in the contract tests."""


@torch.no_grad()
def quantized(layer: nn.Module, *, signed_input: bool, input_elements: int, offer: Offer = UNIFORM) -> QuantLayer:
    """A quantized layer, at float precision, that shares the parameters of `layer`."""
    kind = next(QUANT_LAYERS[base] for base in type(layer).__mro__ if base in QUANT_LAYERS)
    twin = kind.__new__(kind)
    twin.__dict__ = {k: (v.copy() if isinstance(v, dict) else v) for k, v in layer.__dict__.items()}
    twin.add_quantizers(signed_input=signed_input, input_elements=input_elements, offer=offer)
    return twin.train(layer.training)  # the quantizers too: a soft one must not score
