"""The facts of the layers of a network, as values: no torch, so that a run can be looked at without it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

KIND_NAMES = (
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "linear",
    "embedding",
    "product",
)
"""The kinds of layers that can be quantized; `kinds.KINDS` says which module classes they are.

A `product` multiplies two activations (`products.py`), and is a layer only where a search space or a config asks for
it: by default its multiply-accumulates are among those outside any layer, which no cost model counts.
"""


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """One layer that multiplies by a weight, or two activations, as seen in one forward pass.

    Shapes are of one sample: no batch dimension. A layer with a `reason` cannot be quantized; it stays float, is
    priced as float, and is named wherever layers are listed.
    """

    name: str
    kind: str  # one of KIND_NAMES, or the module's class
    weight_shape: tuple[int, ...]  # (out, in/groups, *kernel); transposed: (in, out/groups, *kernel); linear: (out, in)
    # however the module holds it; embedding: (entries, features); product: (0,)
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    macs: int  # multiply-accumulates per sample, all calls of the layer together
    params: int  # elements of weight and bias
    fan_in: int  # products summed into one output element
    groups: int = 1
    signed_input: bool = True  # whether the input takes negative values
    batch_norm: str | None = None  # the BatchNorm that can become part of the layer, by name
    input_group: str = ""  # the first layer fed by the same tensor: these share one activation precision
    weight_group: str = ""  # the first layer with the same weight parameter: these share one weight precision
    calls: int = 1  # how often one forward pass runs the layer
    reason: str | None = None  # why it cannot be quantized; None: it can
    second_shape: tuple[int, ...] = ()  # product: of the second factor, which `LayerPrecision.weight` is for
    signed_second: bool = True  # product: whether the second factor takes negative values

    @property
    def sound(self) -> bool:
        """Whether kind, shapes and counts can be of a layer, as they are where it was seen in a network."""
        axes = int(self.kind[-2]) if self.kind.startswith("conv") and self.kind in KIND_NAMES else 0
        least = axes + 2 if axes or self.groups > 1 or self.kind in ("linear", "embedding") else 1
        shapes = (self.weight_shape, self.input_shape, self.output_shape, self.second_shape)
        counts = (
            self.macs,
            self.params,
            self.fan_in,
            self.groups,
            self.calls,
            *map(math.prod, shapes),
            *sum(shapes, ()),
        )
        return (
            (self.reason is not None or (self.kind in KIND_NAMES and self.fan_in > 0))
            and len(self.weight_shape) >= least
            and min(len(self.input_shape), len(self.output_shape)) >= axes
            and all(0 <= count < 2**63 for count in counts)
        )

    @property
    def weights(self) -> int:
        """Elements of the weight."""
        return math.prod(self.weight_shape)

    @property
    def depthwise(self) -> bool:
        """Whether every channel is filtered alone."""
        return self.groups > 1 and self.weight_shape[1] == 1

    @property
    def kernel(self) -> tuple[int, ...]:
        """The kernel's extent along each axis that it is moved along; empty for a linear layer."""
        return () if self.looks_up else self.weight_shape[2:]

    @property
    def pointwise(self) -> bool:
        """Whether each position is computed from that position alone: kernels of 1, and linear layers."""
        return all(extent == 1 for extent in self.kernel)

    @property
    def looks_up(self) -> bool:
        """Whether the layer only looks rows of its weight up: there is no activation to quantize, and no product."""
        return self.kind == "embedding"

    @property
    def multiplies_activations(self) -> bool:
        """Whether the layer has no weight and multiplies two activations: `input_shape` is of the first."""
        return self.kind == "product"


@dataclass(frozen=True, slots=True)
class ModelGraph:
    """The layers of a network and what it computes outside them, per sample."""

    layers: tuple[LayerInfo, ...]  # in execution order, those that cannot be quantized among them
    other_macs: Mapping[str, int] = field(hash=False)  # of operations outside any layer (attention's bmm), by operation
    notes: tuple[str, ...] = ()  # what the reader should know, in words: what is not folded and why, dead inputs, ...

    @property
    def quantizable(self) -> tuple[LayerInfo, ...]:
        """The layers that get a precision."""
        return tuple(layer for layer in self.layers if layer.reason is None)

    @property
    def unhandled(self) -> tuple[LayerInfo, ...]:
        """The layers that stay float, each with its reason."""
        return tuple(layer for layer in self.layers if layer.reason is not None)

    @property
    def macs(self) -> int:
        """All multiply-accumulates of one sample."""
        return sum(layer.macs for layer in self.layers) + sum(self.other_macs.values())
