"""Layers with a weight quantizer and an input quantizer: y = op(q_a(x), q_w(w)) + bias.

Each is a subclass of the torch layer that it stands for, so the names in its state dict are the original ones with
`weight_quantizer.*` and `input_quantizer.*` beside them. Biases stay float: they are added to the accumulator.

A layer of a class derived from torch's gets a class of its own, derived from both: what else its class has, it keeps.
"""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpsearch.graph.products import Function, Product
from mpsearch.precision import FLOAT, LayerPrecision, Offer, per_tensor
from mpsearch.quant.quantizer import Quantizer
from mpsearch.quant.switch import make_quantizer

UNIFORM = Offer()
"""Uniform quantizers only: what a layer gets unless more is asked for, because every further type costs time."""


class QuantLayer(nn.Module):
    """What all quantized layers have in common."""

    weight_quantizer: Quantizer
    input_quantizer: Quantizer
    channel_axis = 0  # of the weight's output channels
    has_weight = True  # else `weight_quantizer` is of a second input

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

    def forward(self, input: Tensor) -> Tensor:
        """op(q_a(x), q_w(w)) + bias."""
        y: Tensor = self._conv_forward(self.input_quantizer(input), self.quantized_weight(), self.bias)
        return y


class QuantConv2d(QuantLayer, nn.Conv2d):
    """`nn.Conv2d` with quantized weight and input."""

    def forward(self, input: Tensor) -> Tensor:
        """op(q_a(x), q_w(w)) + bias."""
        y: Tensor = self._conv_forward(self.input_quantizer(input), self.quantized_weight(), self.bias)
        return y


class QuantConv3d(QuantLayer, nn.Conv3d):
    """`nn.Conv3d` with quantized weight and input."""

    def forward(self, input: Tensor) -> Tensor:
        """op(q_a(x), q_w(w)) + bias."""
        y: Tensor = self._conv_forward(self.input_quantizer(input), self.quantized_weight(), self.bias)
        return y


class _QuantConvTranspose(QuantLayer):
    """The part that transposed convolutions of one to three dimensions share."""

    _transposed: Any  # torch's functional form
    channel_axis = 1

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """op(q_a(x), q_w(w)) + bias."""
        layer: Any = self  # a mixin of torch's transposed convolutions, whose attributes mypy does not see
        spatial = layer.weight.dim() - 2
        padding = layer._output_padding(
            input, output_size, layer.stride, layer.padding, layer.kernel_size, spatial, layer.dilation
        )
        x, weight = self.input_quantizer(input), self.quantized_weight()
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

    def forward(self, input: Tensor) -> Tensor:
        """q_a(x) q_w(w)^T + bias."""
        return F.linear(self.input_quantizer(input), self.quantized_weight(), self.bias)


class QuantTransposedLinear(QuantLayer):
    """transformers' `Conv1D`, a linear layer that holds its weight as `(in, out)`, with quantized weight and input."""

    channel_axis = 1
    bias: nn.Parameter
    weight: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        """q_a(x) q_w(w) + bias."""
        rows = self.input_quantizer(x).reshape(-1, x.shape[-1])
        return torch.addmm(self.bias, rows, self.quantized_weight()).view(*x.shape[:-1], -1)


class QuantEmbedding(QuantLayer, nn.Embedding):
    """`nn.Embedding` with a quantized weight, a channel for each entry; what it looks up by are no activations."""

    bias = None  # as of a layer that has none

    def forward(self, input: Tensor) -> Tensor:
        """The rows of q_w(w)."""
        return F.embedding(
            input, self.quantized_weight(), self.padding_idx, None, 2.0, self.scale_grad_by_freq, self.sparse
        )

    def set_precision(self, precision: LayerPrecision) -> None:
        """Take on a precision: of the weight alone."""
        super().set_precision(LayerPrecision(precision.weight, FLOAT))


class QuantProduct(QuantLayer, Product):
    """A product of two activations, both quantized per tensor: the second by `weight_quantizer`, which is one of
    activations."""

    weight = None
    bias = None
    has_weight = False

    def add_quantizers(
        self,
        *,
        signed_input: bool,
        input_elements: int,
        offer: Offer,
        signed_second: bool = True,
        second_elements: int = 1,
    ) -> None:
        """Give the product its quantizers, at float precision; `second`: the same of its second factor."""
        self.input_quantizer, self.weight_quantizer = (
            make_quantizer(names, 1, 0, signed=False, offset=signed, elements=elements)
            for names, signed, elements in (
                (offer.activation, signed_input, input_elements),
                (offer.weight, signed_second, second_elements),
            )
        )

    def set_precision(self, precision: LayerPrecision) -> None:
        """Take on a precision; the second factor has one scale, whatever a weight would have."""
        super().set_precision(LayerPrecision(per_tensor(precision.weight), precision.activation))

    def quantized_weight(self) -> Tensor:
        """There is none."""
        raise TypeError("a product of two activations has no weight")

    def forward(self, first: Tensor, second: Tensor, function: Function = torch.matmul) -> Tensor:
        """q_a(x) q_b(y)."""
        return function(self.input_quantizer(first), self.weight_quantizer(second))


QUANT_LAYERS: dict[type[nn.Module], type[QuantLayer]] = {
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Conv3d: QuantConv3d,
    nn.ConvTranspose1d: QuantConvTranspose1d,
    nn.ConvTranspose2d: QuantConvTranspose2d,
    nn.ConvTranspose3d: QuantConvTranspose3d,
    nn.Linear: QuantLinear,
    nn.Embedding: QuantEmbedding,
}
"""What stands for each torch layer. A layer type joins by one entry here and one in the contract tests."""


@torch.no_grad()
def quantized(
    layer: nn.Module,
    *,
    signed_input: bool,
    input_elements: int,
    offer: Offer = UNIFORM,
    signed_second: bool = True,
    second_elements: int = 1,
) -> QuantLayer:
    """A quantized layer, at float precision, that shares the parameters of `layer`; `second`: of a product."""
    twin = _empty(_quant_class(type(layer)), layer)
    if isinstance(twin, QuantProduct):
        twin.add_quantizers(
            signed_input=signed_input,
            input_elements=input_elements,
            offer=offer,
            signed_second=signed_second,
            second_elements=second_elements,
        )
    else:
        twin.add_quantizers(signed_input=signed_input, input_elements=input_elements, offer=offer)
    return twin.train(layer.training)  # the quantizers too: a soft one must not score


def without_quantizers(layer: QuantLayer) -> nn.Module:
    """The layer, of its original class, that a quantized layer stands for; it shares the unquantized parameters."""
    twin = _empty(plain_class(layer), layer)
    del twin._modules["weight_quantizer"], twin._modules["input_quantizer"]
    return twin


def plain_class(layer: QuantLayer) -> type[nn.Module]:
    """The class of the layer that a quantized layer stands for."""
    return _PLAIN.get(type(layer)) or cast(Any, type(layer))._plain_class


_MADE: dict[type[nn.Module], type[QuantLayer]] = {**QUANT_LAYERS, Product: QuantProduct}

_PLAIN = {quant: plain for plain, quant in _MADE.items()}


def _quant_class(kind: type[nn.Module]) -> type[QuantLayer]:
    """The class that stands for a class of layers: ours, or one derived from ours and from that class."""
    if kind in _MADE:
        return _MADE[kind]
    ours = next((QUANT_LAYERS[base] for base in kind.__mro__ if base in QUANT_LAYERS), QuantTransposedLinear)
    members = {"__module__": __name__, "__doc__": kind.__doc__, "__reduce_ex__": _reduce, "_plain_class": kind}
    # The own forward of an embedding calls its base's, which is then ours.
    bases = (kind, ours) if ours is QuantEmbedding else (ours, kind)
    _MADE[kind] = cast(type[QuantLayer], type(f"Quant{kind.__name__}", bases, members))
    return _MADE[kind]


def _reduce(layer: QuantLayer, _protocol: object) -> tuple[Any, ...]:
    """How to copy or pickle a layer whose class was made here: by the class that it was made for."""
    return _unpickled, (plain_class(layer),), layer.__getstate__()  # type: ignore[no-untyped-call]


def _unpickled(kind: type[nn.Module]) -> QuantLayer:
    made = _quant_class(kind)
    return made.__new__(made)


_M = TypeVar("_M", bound=nn.Module)


def _empty(kind: type[_M], like: nn.Module) -> _M:
    """A module of a class with everything that another module has."""
    twin = kind.__new__(kind)
    twin.__dict__ = {k: (v.copy() if isinstance(v, dict) else v) for k, v in like.__dict__.items()}
    return twin
