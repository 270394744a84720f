"""Rounding to a floating-point format of 16 bits: float16 (IEEE 754 binary16) and bfloat16.

    q(x) = the value of the format nearest to x, half to even; beyond the largest finite one, that one

There is no range to set and nothing to learn: `step` and `beta` are there, as in every quantizer, and have no say. The
gradient passes straight through, and is zero beyond the largest value. Formats saturate because accelerators do; a cast
of the framework's gives an infinity there.

The rounding is done on the bits of float32 and not by a cast there and back, which compilers leave out as two casts
that undo each other.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from mpsearch.precision import Precision, QuantizerName
from mpsearch.quant.quantizer import Quantizer, not_offered
from mpsearch.quant.rounding import with_gradient_of


def round_to_mantissa(x: Tensor, dropped: int) -> Tensor:
    """Float32 `x` of any shape without its last `dropped` bits, rounded half to even; NaN stays NaN."""
    bits = x.view(torch.int32)
    last = (bits >> dropped) & 1
    rounded = (bits + ((1 << (dropped - 1)) - 1) + last) & ~((1 << dropped) - 1)
    return torch.where(x.isnan(), x, rounded.view(torch.float32))


class CastQuantizer(Quantizer):
    """One tensor's rounding to a floating-point format."""

    quantizer: ClassVar[QuantizerName]
    dtype: ClassVar[torch.dtype]
    dropped: ClassVar[int]  # bits of float32's mantissa that the format has not
    least: ClassVar[float]  # below it values are whole multiples of `unit`
    unit: ClassVar[float]

    def _set_grid(self, precision: Precision) -> float:
        if precision.quantizer != self.quantizer:
            raise not_offered(precision, [self.quantizer])
        return 1.0

    def quantize(self, x: Tensor, step: Tensor, beta: Tensor | None) -> Tensor:
        """The formula at the module's top; `step` and `beta` have no say."""
        largest = torch.finfo(self.dtype).max
        inside = torch.clamp(x.to(torch.float32), -largest, largest)
        held = inside.detach()
        small = torch.round(held / self.unit) * self.unit
        rounded = torch.where(held.abs() < self.least, small, round_to_mantissa(held, self.dropped))
        return with_gradient_of(inside, rounded).to(x.dtype)

    def codes_of(self, x: Tensor, step: Tensor, beta: Tensor | None) -> Tensor:
        """The 16 bits of each value, as a number from 0 to 65535, int32."""
        values = self.quantize(x.float(), step, beta).to(self.dtype).contiguous()
        return values.view(torch.int16).to(torch.int32) & 0xFFFF


class Float16Quantizer(CastQuantizer):
    """Rounding to float16: 5 bits of exponent, 11 of significance."""

    quantizer = "float16"
    dtype = torch.float16
    dropped = 13
    least = 2.0**-14
    unit = 2.0**-24


class BFloat16Quantizer(CastQuantizer):
    """Rounding to bfloat16: the exponents of float32, 8 bits of significance."""

    quantizer = "bfloat16"
    dtype = torch.bfloat16
    dropped = 16
    least = 0.0  # the same exponents: what is subnormal in one is so in the other
    unit = 2.0**-126


FORMATS: dict[str, torch.dtype] = {"float16": torch.float16, "bfloat16": torch.bfloat16}
"""The floating-point formats, by the name of their quantizer."""
