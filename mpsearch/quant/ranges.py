"""Range setting: the step (and offset) that a tensor starts from.

MSE range setting, argmin_s ||x - q(x)||^2 (white paper, arXiv 2106.08295, §3.1): a grid over the whole range, then a
finer grid around the best. Rows are channels, or groups of their input features; all rows and all candidates of a row
are searched at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from mpsearch.precision import Precision
from mpsearch.quant.groups import steps_of_groups
from mpsearch.quant.nearest import magnitudes, midpoints, nearest_level
from mpsearch.quant.quantizer import MIN_STEP
from mpsearch.quant.uniform import code_range, fake_quantize, grid_shift

COARSE = 48
"""Candidates over the whole range, as shares of the min-max step."""
FINE = 16
"""Candidates between the two neighbours of the best coarse one."""
ENDS = 16
"""Candidates for each end of an activation with an offset; all pairs are tried."""

AT_ONCE = 2**18
"""Values that are quantized at once: more do not fit a core's cache, fewer are a call to torch for each candidate."""

OCTAVES = 6
"""How far down, in powers of two, the largest level of a power-of-two quantizer is searched."""


@torch.no_grad()
def weight_step(rows: Tensor, precision: Precision) -> Tensor:
    """The step of least squared error for a weight; 1 where the precision has no scale.

    Args:
        rows: `(channels, n)`; per-tensor precision is searched over all rows together.
        precision: of any quantizer.

    Returns:
        `(channels,)`, the same value in each entry for per-tensor precision; `(channels, groups)` for one of groups.
    """
    if not precision.has_scale:
        return rows.new_ones(rows.shape[0])
    if precision.group is not None:
        by_row = replace(precision, granularity="channel")
        return steps_of_groups(rows, precision.group, lambda some: weight_step(some, by_row))
    channels = rows.shape[0]
    if not rows.any():
        return unit_step(precision, signed=True).to(rows).expand(channels).clone()
    if not (alive := rows.any(dim=1)).all() and precision.granularity != "tensor":
        # A channel of zeros has no range of its own: if training revives it, it will be like the others.
        steps = weight_step(rows[alive], precision)
        return steps.new_full((channels,), float(steps.median())).masked_scatter(alive, steps)
    if precision.granularity == "tensor":
        rows = rows.reshape(1, -1)
    if precision.quantizer != "uniform":
        return _level_step(rows, precision, signed=True).expand(channels).clone()
    low, high = code_range(precision.bits, signed=True)
    shift = grid_shift(precision.bits, signed=True)
    if precision.bits == 1:  # levels -s/2 and +s/2: the optimum is known, s/2 = mean |w|
        step = 2 * rows.abs().mean(dim=1)
    else:
        largest = rows.abs().amax(dim=1) / -low
        step = _search(rows, largest, rows.new_tensor(shift), low, high)
    return step.clamp_min(MIN_STEP).expand(channels).clone()


def unit_step(precision: Precision, *, signed: bool) -> Tensor:
    """The step, of shape (), whose grid spans one: for a tensor of zeros, of which nothing is known."""
    if precision.quantizer != "uniform":
        return torch.tensor(1.0 / magnitudes(precision, signed)[-1])
    low, high = code_range(precision.bits, signed)
    return torch.tensor(1.0 / max(-low, high))


@torch.no_grad()
def activation_range(samples: Tensor, precision: Precision, *, signed: bool) -> tuple[Tensor, Tensor]:
    """The step and offset of least squared error for an activation; 1 and 0 where the precision has no scale.

    Args:
        samples: values that the activation takes, any shape.
        precision: of any quantizer.
        signed: whether the tensor takes negative values: an offset (uniform) or signed levels are used.

    Returns:
        step and beta, both of shape (); beta is 0 without an offset.
    """
    x = samples.reshape(1, -1).float()
    if not precision.has_scale:
        return x.new_ones(()), x.new_zeros(())
    if not x.any():  # dead in these samples: a range of one
        if precision.quantizer != "uniform":
            return unit_step(precision, signed=signed).to(x), x.new_zeros(())
        x = x.new_tensor([[-1.0, 1.0]] if signed else [[0.0, 1.0]])
    if precision.quantizer != "uniform":
        return _level_step(x if signed else x.clamp_min(0), precision, signed)[0], x.new_zeros(())
    _, high = code_range(precision.bits, signed=False)
    if not signed:
        step = _search(x, x.amax(dim=1).clamp_min(0) / high, x.new_zeros(()), 0, high)
        return step[0].clamp_min(MIN_STEP), x.new_zeros(())
    least, most = x.amin().clamp_max(0), x.amax().clamp_min(0)
    shares = torch.linspace(1 / ENDS, 1, ENDS)
    best = (1.0, 1.0)
    for width in (1.0, 1 / ENDS):  # all pairs of ends, then all pairs around the best pair
        pairs = [(a, b) for a in shares.tolist() for b in shares.tolist()] if width == 1.0 else _around(best, width)
        lows = torch.stack([least * a for a, _ in pairs])
        highs = torch.stack([most * b for _, b in pairs])
        steps = ((highs - lows) / high).clamp_min(MIN_STEP)
        best = pairs[int(_errors(x, steps, torch.round(lows / steps), 0, high).argmin())]
    beta = least * best[0]
    return ((most * best[1] - beta) / high).clamp_min(MIN_STEP), beta


def _level_step(rows: Tensor, precision: Precision, signed: bool) -> Tensor:
    """The step `(rows,)` of least squared error for levels that are no uniform grid.

    The candidates for the largest level are geometric, because a step twice as large gives powers of two the same
    levels again: coarse ones over OCTAVES below twice the largest input (the levels are sparse at the top, which may
    be left out of reach), then fine ones between the neighbours of the best.
    """
    levels = rows.new_tensor(magnitudes(precision, signed))
    thresholds = midpoints(levels)

    def quantize(x: Tensor, step: Tensor) -> Tensor:
        return step * nearest_level(x / step, levels, thresholds)

    top = rows.abs().amax(dim=1) * 2 / levels[-1]
    octaves = torch.arange(COARSE, device=rows.device) * (-OCTAVES / COARSE)
    centre = _best(rows, top * torch.exp2(octaves)[:, None], quantize)
    return _best(rows, torch.cat([centre[None], centre * torch.exp2(_around_zero(rows) * OCTAVES / COARSE)]), quantize)


def _around(pair: tuple[float, float], width: float) -> list[tuple[float, float]]:
    offsets = [width * (k / 3 - 1) for k in range(7)]
    return [(max(pair[0] + a, 0.0), max(pair[1] + b, 0.0)) for a in offsets for b in offsets]


def _search(rows: Tensor, largest: Tensor, shift: Tensor, low: int, high: int) -> Tensor:
    """The step of least squared error for each row, between 0 and `largest`, all `(rows,)`."""

    def quantize(x: Tensor, step: Tensor) -> Tensor:
        return fake_quantize(x, step, shift, *ends)

    ends = rows.new_tensor(low), rows.new_tensor(high)
    shares = torch.arange(COARSE, 0, -1, device=rows.device) / COARSE
    centre = _best(rows, largest * shares[:, None], quantize)
    return _best(rows, torch.cat([centre[None], centre + largest * (_around_zero(rows) / COARSE)]), quantize)


def _around_zero(rows: Tensor) -> Tensor:
    """Where the fine candidates for `rows` lie, `(FINE, 1)`, in units of the distance between coarse ones."""
    return torch.linspace(-1, 1, FINE + 2)[1:-1, None].to(rows.device)


def _best(rows: Tensor, steps: Tensor, quantize: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The step of least squared error for each row among candidates `(k, rows)`; the first of equals."""
    steps = steps.clamp_min(MIN_STEP)
    few = max(1, AT_ONCE // rows.numel())
    errors = [
        (quantize(rows, some[..., None]) - rows).square_().sum(dim=-1)
        for some in torch.split(steps, few)  # a few candidates at a time
    ]
    return steps.gather(0, torch.cat(errors).argmin(dim=0, keepdim=True))[0]


def _errors(x: Tensor, steps: Tensor, shifts: Tensor, low: int, high: int) -> Tensor:
    """The squared error of `x` `(1, n)` under each candidate `(k,)`."""
    few = max(1, AT_ONCE // x.shape[1])
    chunks = [slice(start, start + few) for start in range(0, len(steps), few)]
    ends = x.new_tensor(low), x.new_tensor(high)
    return torch.cat(
        [(fake_quantize(x, steps[c, None], shifts[c, None], *ends) - x).square_().sum(dim=1) for c in chunks]
    )
