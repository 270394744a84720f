"""Range setting for PTQ (white paper, arXiv 2106.08295, §3.1), beside the MSE search of `mpsearch.quant.ranges`.

- min-max: the grid spans the tensor;
- from BatchNorm, without data: the grid spans beta -+ 6 gamma of all channels, cut where an activation clips;
- cross-entropy, for the layer that makes the logits: argmin over ranges of H(softmax(z), softmax(z_q)).

We differ in the last: the paper quantizes the logits themselves; our quantizers are on inputs and weights, so it is the
*input* range of the last layer that is chosen by what it does to the logits.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mpsearch.precision import Precision
from mpsearch.ptq.flow import Normal
from mpsearch.quant.groups import steps_of_groups
from mpsearch.quant.modules import QuantLayer
from mpsearch.quant.quantizer import MIN_STEP
from mpsearch.quant.ranges import unit_step
from mpsearch.quant.uniform import code_range

CANDIDATES = 32
"""Shares of the min-max range that the cross-entropy search tries."""
SIGMAS = 6.0
"""Standard deviations on each side of the mean that a range from BatchNorm spans."""


def min_max_step(rows: Tensor, precision: Precision) -> Tensor:
    """The smallest step of a signed symmetric grid that clips nothing: max|w| / p.

    Args:
        rows: `(channels, n)`.
        precision: a uniform precision; per tensor, all rows share the largest step.

    Returns:
        `(channels,)`, or `(channels, groups)`.
    """
    if precision.group is not None:
        by_row = replace(precision, granularity="channel")
        return steps_of_groups(rows, precision.group, lambda some: min_max_step(some, by_row))
    if not rows.any():
        return unit_step(precision, signed=True).to(rows).expand(len(rows)).clone()
    _, high = code_range(precision.bits, signed=True)
    largest = rows.abs().amax(dim=1) if precision.granularity == "channel" else rows.abs().amax().expand(len(rows))
    largest = torch.where(largest > 0, largest, largest[largest > 0].median())  # of zeros: like the others
    # One bit has the levels -s/2 and s/2.
    return (2 * largest if precision.bits == 1 else largest / high).clamp_min(MIN_STEP).clone()


def range_to_grid(low: float, high: float, precision: Precision) -> tuple[Tensor, Tensor]:
    """Step and offset, both of shape (), of the unsigned grid that spans [low, high] and zero."""
    low, high = min(low, 0.0), max(high, 0.0)
    high = high if high > low else 1.0  # nothing but zeros: a range of one
    _, top = code_range(precision.bits, signed=False)
    return torch.tensor((high - low) / top).clamp_min(MIN_STEP), torch.tensor(low)


def normal_range(x: Normal, precision: Precision) -> tuple[Tensor, Tensor]:
    """Step and offset from a distribution alone: mean -+ 6 standard deviations, over all channels."""
    return range_to_grid(*x.extent(SIGMAS), precision)


@torch.no_grad()
def cross_entropy_range(layer: QuantLayer, x: Tensor, precision: Precision) -> tuple[Tensor, Tensor]:
    """The input range of a linear layer under which its logits stay closest to the float input's.

    Args:
        layer: the layer that makes the logits; its input quantizer is left at the range found.
        x: its input, `(n, in)`.
        precision: a uniform precision for the input.

    Returns:
        Step and offset, both of shape (): of all shares of the min-max range, the one of least cross-entropy.
    """
    quantizer = layer.input_quantizer
    before = quantizer.precision
    quantizer.set_precision(Precision("float", 32, "tensor"))
    answers = layer(x).flatten(0, -2).softmax(dim=-1)
    quantizer.set_precision(precision)
    best, least = range_to_grid(0.0, 0.0, precision), float("inf")
    for k in range(CANDIDATES, 0, -1):
        share = k / CANDIDATES
        candidate = range_to_grid(share * float(x.min()), share * float(x.max()), precision)
        quantizer.set_range(*candidate)
        loss = float(-(answers * layer(x).flatten(0, -2).log_softmax(dim=-1)).sum(dim=-1).mean())
        if loss < least:
            best, least = candidate, loss
    quantizer.set_precision(before)
    return best
