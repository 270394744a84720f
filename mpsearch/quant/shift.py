"""The shift quantizer: zero and (signed) powers of two, 2 to 5 bits, trained through a sum of sigmoids.

Hard, which is what is scored and exported:

    q(x) = s * sgn(v) * l_j,   v = x/s,   l in {0, 2^-(L-1), ..., 1/2, 1},   the nearest to |v|

Soft, in training (`gradient="sigmoid"`), with the slope T growing from step to step:

    q_T(x) = s * sum_j d_j * [sigmoid(T_j (v - tau_j)) + sigmoid(T_j (v + tau_j)) - 1],   T_j = T / d_j,
    d_j = l_j - l_(j-1),   tau_j = (l_j + l_(j-1)) / 2

Its derivative is exact: nothing is passed straight through. The second sigmoid makes the sum odd, so that zero stays
zero at any slope. Activations without negative values are clamped at zero first. As T grows, q_T tends to q and the
gradient vanishes except at the thresholds: `soft_phase` reports the gap that is left and who still gets a gradient.

This is a *reconstruction* of "Differentiable, Bit-Shifting, and Scalable Quantization Without Training Neural Networks
from Scratch" (Badar, arXiv 2510.16088) from its abstract; the full text was not to be had. What the abstract states is
kept: values 2^n, full differentiability, any number of bits, weights and activations. The sum of sigmoids, the
thresholds halfway between levels, the zero level and the schedule are ours.

Two other gradients of the hard quantizer are there to compare with, `ste` (straight-through) and `dsq`: tanh per
interval (DSQ, arXiv 1908.05033, eq. 6), of which we keep slope and schedule in common with the sigmoids.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from mpsearch.errors import PrecisionError
from mpsearch.quant.nearest import SMALL, LevelQuantizer, nearest_level
from mpsearch.quant.rounding import with_gradient_of

ShiftGradient = Literal["sigmoid", "ste", "dsq"]
"""What training differentiates: the sum of sigmoids, the identity, or tanh per interval."""

MAX_SLOPE = 200.0
"""Beyond it the fourth roots of `_SigmoidLevels` leave the range of float32."""

LIVE = 0.01
"""A weight gets a gradient if dq/dx is at least this; it is 1 with straight-through."""


@dataclass(frozen=True, slots=True)
class SlopeSchedule:
    """The slope T over a training: geometric from `start` to `end`.

    At 4 the derivative is between 0.8 and 1.1 inside the range; at 64 it is 16 at a threshold and nothing elsewhere.
    The defaults are the best on validation of the ablation in `benchmarks/methods.py`, though by less than its standard
    error: what matters more is not to end much beyond 64, where weights freeze early.
    """

    start: float = 16.0
    end: float = 64.0

    def __post_init__(self) -> None:
        if not 0 < self.start <= self.end <= MAX_SLOPE:
            raise PrecisionError(
                f"the slope cannot go from {self.start} to {self.end}: give 0 < start <= end <= {MAX_SLOPE:g}"
            )

    def at(self, progress: float) -> float:
        """The slope when this share of the training, 0 to 1, is done.

        >>> [SlopeSchedule(4, 64).at(done) for done in (0, 0.5, 1)]
        [4.0, 16.0, 64.0]
        """
        return float(self.start * (self.end / self.start) ** progress)


DEFAULT_SLOPE = SlopeSchedule()


class ShiftQuantizer(LevelQuantizer):
    """One tensor's shift quantizer: learnable `step`, precision and slope in buffers; `gradient` is structure."""

    quantizer = "shift"
    gradient: ShiftGradient = "sigmoid"

    slope: Tensor

    def __init__(
        self, channels: int, dims: int, *, signed: bool, offset: bool, elements: int, channel_axis: int = 0
    ) -> None:
        super().__init__(channels, dims, signed=signed, offset=offset, elements=elements, channel_axis=channel_axis)
        self.register_buffer("slope", torch.tensor(DEFAULT_SLOPE.start), persistent=False)

    def _levelled(self, v: Tensor) -> Tensor:
        if not self.training or self.gradient == "ste":
            return super()._levelled(v)
        if self.gradient == "dsq":
            hard = nearest_level(v, self.levels, self.thresholds)
            return with_gradient_of(tanh_levels(v, self.levels, self.slope), hard)
        # Compiled, all of the buffer: its unused rest has intervals of no height, which add nothing.
        count = len(self.thresholds) if torch.compiler.is_compiling() else self.count
        return sigmoid_levels(v, self.levels[: count + 1], self.slope)


class _SigmoidLevels(torch.autograd.Function):
    """The sum and its derivative in one pass, with one exp and one division for both sigmoids of an interval.

    With a = T_j |v|, c = T_j tau_j, E = e^-a and X = 2 cosh(c) E (both from their fourth roots, which neither overflow
    nor vanish up to MAX_SLOPE; X is cut off where the term is zero anyway):

        sigmoid(a - c) + sigmoid(a + c) - 1 = sinh(a) / (cosh(a) + cosh(c)) = (1 - E^2) / (1 + E^2 + X)
        its derivative by a                                                = (4 E^2 + X (1 + E^2)) / (1 + E^2 + X)^2
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, levels: Tensor, slope: Tensor) -> Tensor:
        magnitude = v.abs()
        if torch.compiler.is_compiling() and v.numel() <= SMALL:
            terms = _sigmoid_terms(magnitude.unsqueeze(-1), levels[:-1], levels[1:], slope)
            value, derivative = (term.sum(dim=-1) for term in terms)
        else:
            value, derivative = torch.zeros_like(v), torch.zeros_like(v)
            for low, high in pairwise(levels.unbind()):
                of_value, of_derivative = _sigmoid_terms(magnitude, low, high, slope)
                value, derivative = value + of_value, derivative + of_derivative
        ctx.save_for_backward(derivative)
        return value * v.sign()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (derivative,) = ctx.saved_tensors
        return grads[0] * derivative, None, None


def _sigmoid_terms(magnitude: Tensor, low: Tensor, high: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """What the interval from `low` to `high` adds to value and derivative."""
    height, tau = high - low, (high + low) / 2
    t = torch.where(height > 0, slope / height, 0.0)
    a, c = t * magnitude, t * tau
    root = torch.exp(a / -4)
    x = (root * torch.exp((c + torch.log1p(torch.exp(-2 * c))) / 4)).clamp_max(1e4).square().square()
    square = root.square().square().square()
    share = 1 / (1 + square + x)
    return height * (1 - square) * share, height * t * (4 * square + x * (1 + square)) * share * share


def sigmoid_levels(v: Tensor, levels: Tensor, slope: Tensor) -> Tensor:
    """The soft levels that stand for `v`: the sum of sigmoids at the module's top, and its exact derivative.

    Args:
        v: any shape.
        levels: `(L + 1,)`, ascending from 0.
        slope: T, shape ().
    """
    soft: Tensor = _SigmoidLevels.apply(v, levels, slope)  # type: ignore[no-untyped-call]
    return soft


def tanh_levels(v: Tensor, levels: Tensor, slope: Tensor) -> Tensor:
    """DSQ's soft levels: in each interval l + d/2 * (1 + tanh(T_j (|v| - tau_j) / 2) / tanh(T/4)), the sign of v.

    Continuous, exact at the levels, constant beyond the largest. Arguments as for `sigmoid_levels`.
    """
    magnitude = torch.where(v < 0, -v, v)  # not abs(), whose derivative at 0 is 0
    magnitude = torch.minimum(magnitude, levels[-1])
    # Among all levels, not levels[1:]: torch 2.11 compiles the search of a slice to one of the whole on a card.
    j = (torch.bucketize(magnitude.detach().contiguous(), levels) - 1).clamp(0, len(levels) - 2)  # NaN is beyond
    low, high = levels[j], levels[j + 1]
    height = high - low
    phi = torch.tanh(slope / height * (magnitude - (high + low) / 2) / 2) / torch.tanh(slope / 4)
    soft = low + height / 2 * (1 + phi)
    return torch.where(v < 0, -soft, soft)


@torch.no_grad()
def set_slope(quantizers: Iterable[ShiftQuantizer], slope: float) -> None:
    """Set T of these quantizers: data, so nothing is recompiled."""
    for quantizer in quantizers:
        quantizer.slope.fill_(slope)


@dataclass(frozen=True, slots=True)
class SoftPhase:
    """How far the soft quantizer of one tensor is from the hard one, and how much of the tensor can still move."""

    gap: float  # root mean square of soft - hard, relative to that of hard
    live: float  # share of elements whose derivative is at least LIVE


def soft_phase(quantizer: ShiftQuantizer, x: Tensor) -> SoftPhase:
    """The state of the soft quantizer of `x` (any shape) at its present slope."""
    with torch.no_grad():
        v = quantizer._steps(x, quantizer.spread(quantizer.current_range()[0], x))
        hard = nearest_level(v, quantizer.levels, quantizer.thresholds)
    with torch.enable_grad():
        v.requires_grad_()
        soft = sigmoid_levels(v, quantizer.levels[: quantizer.count + 1], quantizer.slope)
        (derivative,) = torch.autograd.grad(soft.sum(), v)
    size = hard.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    gap = (soft.detach() - hard).square().mean().sqrt() / size
    return SoftPhase(float(gap), float((derivative >= LIVE).float().mean()))
