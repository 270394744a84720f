"""The uniform quantizer, 1 to 8 bits, with learnable step and offset.

    q(x) = s * (clamp(round(x/s - o), n, p) + o)

| tensor                | n        | p          | o (grid shift, in steps)                           |
|-----------------------|----------|------------|----------------------------------------------------|
| signed, b >= 2        | -2^(b-1) | 2^(b-1)-1  | 0                                                  |
| signed, b = 1         | -1       | 0          | 1/2: the levels are -s/2 and +s/2                  |
| unsigned              | 0        | 2^b - 1    | round(beta/s): minus the zero point, 0 without beta |

Signed and symmetric is for weights; unsigned is for activations, with an offset `beta` where the input takes negative
values. The shift is a whole number of steps, so zero stays on the grid and zero padding is exact in integer arithmetic.
`Quantizer.set_offset_grid` makes a grid of it that begins at any real value (`offset_grid.py`): same bits, same cost.

White paper (arXiv 2106.08295) §2.2-2.3; the gradients of step and offset are those of LSQ (arXiv 1902.08153) and LSQ+
(arXiv 2004.09576), which follow from straight-through rounding alone. We differ in one point: binary weights are the
same formula with a shifted grid instead of a special case.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpsearch.precision import Precision
from mpsearch.quant.quantizer import Quantizer, not_offered
from mpsearch.quant.rounding import round_ste


def fake_quantize(x: Tensor, step: Tensor, shift: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Map `x` to the grid step * (k + shift), low <= k <= high; all arguments broadcast against `x`.

    Computed in float32 at least, because bfloat16 cannot tell neighbouring codes apart; the result has the type of `x`.
    """
    v = x.to(torch.promote_types(x.dtype, torch.float32)) / step - shift
    code = torch.clamp(round_ste(v), low, high)
    return (step * (code + shift)).to(x.dtype)


def code_range(bits: int, signed: bool) -> tuple[int, int]:
    """The smallest and the largest integer code (n, p)."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def grid_shift(bits: int, signed: bool) -> float:
    """The grid shift o without an offset: half a step for binary signed tensors, else none."""
    return 0.5 if signed and bits == 1 else 0.0


class UniformQuantizer(Quantizer):
    """One tensor's uniform quantizer: learnable `step` (and `beta`), precision in buffers."""

    low: Tensor
    high: Tensor
    shift: Tensor

    def __init__(
        self, channels: int, dims: int, *, signed: bool, offset: bool, elements: int, channel_axis: int = 0
    ) -> None:
        super().__init__(channels, dims, signed=signed, offset=offset, elements=elements, channel_axis=channel_axis)
        for name in ("low", "high", "shift"):
            self.register_buffer(name, torch.zeros(()), persistent=False)

    def _set_grid(self, precision: Precision) -> float:
        if precision.quantizer != "uniform":
            raise not_offered(precision, ["uniform"])
        low, high = code_range(precision.bits, self.signed)
        self.low.fill_(low)
        self.high.fill_(high)
        self.shift.fill_(grid_shift(precision.bits, self.signed))
        return high

    def quantize(self, x: Tensor, step: Tensor, beta: Tensor | None) -> Tensor:
        """The formula at the module's top; the offset is rounded to whole steps."""
        return fake_quantize(x, step, self._shift(step, beta), self.low, self.high)

    def grid(self) -> tuple[Tensor, Tensor]:
        """The step s > 0 and the shift o that hold now, with LSQ's gradient scale attached."""
        step, beta = self.current_range()
        return step, self._shift(step, beta)

    def codes_of(self, x: Tensor, step: Tensor, beta: Tensor | None) -> Tensor:
        """The integer codes of `x` (int32), between n and p."""
        shift = self._shift(step, beta)
        return torch.clamp(torch.round(x / step - shift), self.low, self.high).to(torch.int32)

    def _shift(self, step: Tensor, beta: Tensor | None) -> Tensor:
        return self.shift if beta is None else self.shift + round_ste(beta / step)


def take_grid(quantizer: Quantizer, step: Tensor, lower: Tensor, top: int) -> None:
    """Give a uniform quantizer the grid lower + step * code, in place: the uniform one where that is the same.

    A grid of more codes than the quantizer has bits for keeps its range and gets a wider step.
    """
    most = 2**quantizer.precision.bits - 1
    if top > most:
        step, top = step * (top / most), most
    if top == most and not quantizer.signed and not lower.any():
        quantizer.set_range(step, lower)
    else:
        quantizer.set_offset_grid(step, lower, top)
