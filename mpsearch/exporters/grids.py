"""The grid that a quantizer rounds to now, as plain numbers: what the export targets write down.

uniform        value = step * (code + shift),   low <= code <= high
offset grid    value = step * code + lower,      0 <= code <= high
shift, apot    value = step * sgn(code) * levels[|code|]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from mpsearch.precision import Precision
from mpsearch.quant.modules import QuantLayer
from mpsearch.quant.nearest import magnitudes
from mpsearch.quant.quantizer import Quantizer
from mpsearch.quant.uniform import code_range, grid_shift


@dataclass(frozen=True)
class UniformGrid:
    """A uniform grid: `step` and `lower` `(channels,)`, `(1,)`, or `(channels * groups,)`; the others are shared."""

    step: Tensor
    shift: float  # whole steps, or 1/2 for binary weights; 0 for an offset grid
    low: int
    high: int
    lower: Tensor | None = None  # of an offset grid: the value of code 0, which no whole zero point stands for

    @property
    def zero_point(self) -> float:
        """The code that means zero: whole, except for binary weights, which have no zero."""
        return -self.shift


@torch.no_grad()
def uniform_grid(quantizer: Quantizer) -> UniformGrid:
    """The grid of a quantizer whose precision is uniform."""
    bits, signed = quantizer.precision.bits, quantizer.signed
    _, beta = quantizer.current_range()
    step = steps(quantizer)
    if quantizer.top is not None and beta is not None:
        return UniformGrid(step, 0.0, 0, int(quantizer.top), _once(quantizer, beta))
    shift = grid_shift(bits, signed) + (0.0 if beta is None else float(torch.round(beta.flatten()[0] / step[0])))
    return UniformGrid(step, shift, *code_range(bits, signed))


@torch.no_grad()
def steps(quantizer: Quantizer) -> Tensor:
    """The steps that hold now: `(channels,)`, `(1,)` where the whole tensor has one, or `(channels * groups,)`."""
    return _once(quantizer, quantizer.current_range()[0])


def _once(quantizer: Quantizer, values: Tensor) -> Tensor:
    flat = values.detach().flatten()
    return (flat[:1] if quantizer.precision.granularity == "tensor" else flat).clone()


@torch.no_grad()
def weight_codes(layer: QuantLayer) -> Tensor:
    """The codes of a layer's weight, in the weight's shape, int32."""
    return layer.weight_quantizer.codes(cast(Tensor, layer.weight))


def integer_levels(precision: Precision, signed: bool) -> tuple[tuple[int, ...], float]:
    """The levels of a `shift` or `apot` quantizer as whole multiples of the smallest, and that smallest level.

    >>> integer_levels(Precision("shift", 3, "tensor"), signed=True)
    ((0, 1, 2, 4), 0.25)
    """
    levels = magnitudes(precision, signed)
    unit = levels[1]
    return tuple(int(level / unit) for level in levels), unit
