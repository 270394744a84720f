"""Quantizers whose grid is a list of levels, symmetric around zero: what `shift` and `apot` share.

    q(x) = s * sgn(v) * l_j,   v = x/s,   l_j the magnitude nearest to |v|   (0 = l_0 < l_1 < ... < l_L)

Halfway values go to the smaller magnitude. Tensors that take negative values, activations too, have signed levels, for
which they pay one bit; the others have none below zero. Zero is always a level, so zero padding is exact.

The gradient here is straight-through, dq/dx = 1 for |v| <= l_L and 0 beyond, and the step's follows by the product
rule: sgn(v) l_j - v inside, +-l_L beyond (LSQ, arXiv 1902.08153, eq. 3, on a grid that is not uniform).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from mpsearch.precision import BITS, Precision, QuantizerName
from mpsearch.quant.levels import apot_magnitudes, shift_magnitudes
from mpsearch.quant.quantizer import Quantizer, not_offered
from mpsearch.quant.rounding import with_gradient_of

FAR = 2.0**40
"""Steps beyond this are taken as this, so that no infinity meets a zero; no level is beyond 2."""

SMALL = 2**16
"""Elements up to which a compiled sum over levels is one reduction instead of a chain of terms.

The chain is faster to run, but its many operations are slow to compile: for the weights of a ResNet-20 with all types,
194 seconds of one core against 62 (with a training step of 0.37 against 0.38 seconds).
"""


def magnitudes(precision: Precision, signed: bool) -> tuple[float, ...]:
    """The magnitudes l_0 = 0 < ... < l_L of a precision of type `shift` or `apot`."""
    by_name = {"shift": shift_magnitudes, "apot": apot_magnitudes}
    return by_name[precision.quantizer](precision.bits, signed)


def midpoints(levels: Tensor) -> Tensor:
    """The thresholds between neighbouring levels: `(L + 1,)` -> `(L,)`."""
    return (levels[:-1] + levels[1:]) / 2


def nearest_level(v: Tensor, levels: Tensor, thresholds: Tensor) -> Tensor:
    """sgn(v) * l_j for each element of `v`; NaN stays NaN.

    Args:
        v: any shape.
        levels: `(L + 1,)`, ascending from 0.
        thresholds: `(L,)`, the midpoints.
    """
    magnitude = v.abs()
    if torch.compiler.is_compiling() and v.numel() <= SMALL:
        level = (torch.diff(levels) * (magnitude.unsqueeze(-1) > thresholds)).sum(dim=-1)
    elif torch.compiler.is_compiling():  # fused, and vectors where a search and a gather are not
        level = torch.zeros_like(v)
        for j, height in enumerate(torch.diff(levels).unbind()):
            level = level + height * (magnitude > thresholds[j])
    else:
        level = levels[torch.bucketize(magnitude.contiguous(), thresholds)]  # else it copies with a warning
    return torch.where(v.isnan(), v, level * v.sign())


class LevelQuantizer(Quantizer):
    """One tensor's quantizer to a list of levels, with straight-through gradients.

    The buffers are as long as the widest precision needs; what a narrower one leaves over is never reached.
    """

    quantizer: ClassVar[QuantizerName]

    levels: Tensor
    thresholds: Tensor

    def __init__(
        self, channels: int, dims: int, *, signed: bool, offset: bool, elements: int, channel_axis: int = 0
    ) -> None:
        super().__init__(channels, dims, signed=signed, offset=offset, elements=elements, channel_axis=channel_axis)
        self.two_sided = signed or offset  # levels carry a sign, which stands in for the offset
        self.count = 0  # L, what is in use of the buffers
        longest = 2 ** (BITS[self.quantizer].stop - 1 - self.two_sided)
        self.register_buffer("levels", torch.zeros(longest), persistent=False)
        self.register_buffer("thresholds", torch.full((longest - 1,), torch.inf), persistent=False)
        self._set_grid(Precision(self.quantizer, BITS[self.quantizer].start, "tensor"))  # never without intervals

    def _set_grid(self, precision: Precision) -> float:
        if precision.quantizer != self.quantizer:
            raise not_offered(precision, [self.quantizer])
        levels = self.levels.new_tensor(magnitudes(precision, self.two_sided))
        self.count = len(levels) - 1
        self.levels.fill_(levels[-1])[: len(levels)] = levels
        self.thresholds.fill_(torch.inf)[: self.count] = midpoints(levels)
        return float(levels[-1])

    def quantize(self, x: Tensor, step: Tensor, beta: Tensor | None) -> Tensor:
        """The formula at the module's top; there is no offset."""
        return (step * self._levelled(self._steps(x, step))).to(x.dtype)

    def _steps(self, x: Tensor, step: Tensor) -> Tensor:
        """v, `x` in steps, in float32 at least: bfloat16 cannot tell neighbouring levels apart."""
        v = torch.clamp(x.to(torch.promote_types(x.dtype, torch.float32)) / step, -FAR, FAR)
        return v if self.two_sided else v.clamp_min(0)

    def _levelled(self, v: Tensor) -> Tensor:
        """The levels that stand for `v`."""
        largest = self.levels[-1]
        return with_gradient_of(torch.clamp(v, -largest, largest), nearest_level(v, self.levels, self.thresholds))

    def codes_of(self, x: Tensor, step: Tensor, beta: Tensor | None) -> Tensor:
        """sgn(v) * j as int32: which level each element of `x` gets."""
        v = self._steps(x, step)
        return (torch.bucketize(v.abs(), self.thresholds) * v.sign()).to(torch.int32)
