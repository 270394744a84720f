"""One tensor's quantizer that can be of several types, the type being data like the bits."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from mpsearch.precision import FLOAT, Precision
from mpsearch.quant.apot import ApotQuantizer
from mpsearch.quant.cast import BFloat16Quantizer, Float16Quantizer
from mpsearch.quant.quantizer import Quantizer, not_offered
from mpsearch.quant.shift import ShiftQuantizer
from mpsearch.quant.uniform import UniformQuantizer

QUANTIZERS: dict[str, type[Quantizer]] = {
    "uniform": UniformQuantizer,
    "shift": ShiftQuantizer,
    "apot": ApotQuantizer,
    "float16": Float16Quantizer,
    "bfloat16": BFloat16Quantizer,
}
"""Every quantizer type. A type joins by one entry here and one in the contract tests."""


def make_quantizer(
    names: Collection[str],
    channels: int,
    dims: int,
    *,
    signed: bool,
    offset: bool,
    elements: int,
    channel_axis: int = 0,
) -> Quantizer:
    """A quantizer that can be of the types named: the type itself if there is one, else a switch between them.

    Further arguments as for `Quantizer`.
    """
    kinds = {
        name: kind(channels, dims, signed=signed, offset=offset, elements=elements, channel_axis=channel_axis)
        for name, kind in QUANTIZERS.items()
        if name in names
    }
    if not kinds:  # float alone: any type can be that
        return make_quantizer(
            ["uniform"], channels, dims, signed=signed, offset=offset, elements=elements, channel_axis=channel_axis
        )
    return next(iter(kinds.values())) if len(kinds) == 1 else SwitchQuantizer(kinds)


class SwitchQuantizer(Quantizer):
    """A quantizer that is one of several: it takes over `step` and `beta`, and the kinds lend their grids.

    Only the chosen kind runs, but where somebody compiles the whole model: such a graph computes all kinds and selects
    one, as it does for float. A kind that is not chosen has float precision.

    Args:
        kinds: quantizers of the same tensor, by type.
    """

    def __init__(self, kinds: Mapping[str, Quantizer]) -> None:
        first = next(iter(kinds.values()))
        super().__init__(
            first.channels,
            first.dims,
            signed=first.signed,
            offset=first.offset,
            elements=first.elements,
            channel_axis=first.channel_axis,
        )
        for kind in kinds.values():
            kind.register_parameter("step", None)  # the state dict does not tell which kinds there were
            kind.register_parameter("beta", None)
        self.names = tuple(kinds)
        self.kinds = nn.ModuleList(kinds.values())  # by position: `bfloat16` is an attribute of every module

    def _set_grid(self, precision: Precision) -> float:
        if precision.quantizer not in self.names:
            raise not_offered(precision, self.names)
        for kind in self._all():
            kind.set_precision(FLOAT)
        quantizer = self._all()[self.names.index(precision.quantizer)]
        quantizer.set_precision(precision)
        return quantizer._set_grid(precision)

    def quantize(self, x: Tensor, step: Tensor, beta: Tensor | None) -> Tensor:
        """What the chosen kind makes of `x`."""
        if not torch.compiler.is_compiling():
            return self.active().quantize(x, step, beta)
        first, *others = self._all()
        y = first.quantize(x, step, beta)
        for kind in others:
            y = torch.where(kind.is_float, y, kind.quantize(x, step, beta))
        return y

    def codes_of(self, x: Tensor, step: Tensor, beta: Tensor | None) -> Tensor:
        """The codes of the chosen kind."""
        return self.active().codes_of(x, step, beta)

    def active(self) -> Quantizer:
        """The kind that the precision names."""
        return next(kind for kind in self._all() if not kind.precision.is_float)

    def _all(self) -> list[Quantizer]:
        return [cast(Quantizer, kind) for kind in self.kinds]
