"""Whether a network that was rewritten still computes what it did: compared on a batch, at the rounding of its type.

The measure is ||y - y0|| / ||y0|| of each output. The tolerance is sqrt(eps) of the type of the numbers, half of their
digits: 3.5e-4 in float32. Another order of the same sums moves the outputs of networks of tens of layers by 1e-7 to
1e-5; a BatchNorm that was folded wrongly moves them by 1e-2 and more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mpsearch.graph.inputs import call, evaluating, first_samples, map_tensors, tensors

SAMPLES = 32
"""Of a calibration batch, those that two networks are compared on."""

T = TypeVar("T")


def outputs(model: nn.Module, x: Any) -> list[Tensor]:
    """The floating-point tensors that a model gives for the first samples of a batch, in eval mode."""
    x = map_tensors(torch.clone, first_samples(x, SAMPLES))  # a model may write into its input
    with evaluating(model):
        return [y.detach() for y in tensors(call(model, x)) if y.is_floating_point()]


def difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest relative difference of two lists of outputs, in units of the tolerance: above 1 they disagree."""
    return _largest(lambda a, b: _relative(a, b) / float(torch.finfo(b.dtype).eps) ** 0.5, ours, theirs)


def relative(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """The largest ||y - y0|| / ||y0|| of two lists of outputs."""
    return _largest(_relative, ours, theirs)


def holds(rewritten: nn.Module, x: Any, reference: Sequence[Tensor]) -> bool:
    """Whether a rewritten model runs, and gives what the model that it was made from gives."""
    try:
        return difference(outputs(rewritten, x), reference) <= 1.0
    except Exception:  # a forward that asks for what is not there any more
        return False


def largest_subset(items: Sequence[T], good: Callable[[Sequence[T]], bool]) -> list[T]:
    """The items that can be taken together, in their order, found by halving: `good` says whether a set holds."""
    if good(items):
        return list(items)

    def added(base: list[T], rest: Sequence[T]) -> list[T]:
        if not rest or good([*base, *rest]):
            return [*base, *rest]
        if len(rest) == 1:
            return base
        middle = len(rest) // 2
        return added(added(base, rest[:middle]), rest[middle:])

    return added([], items)


def _largest(measure: Callable[[Tensor, Tensor], float], ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    if [y.shape for y in ours] != [y.shape for y in theirs]:
        return float("inf")
    return max((measure(a, b) for a, b in zip(ours, theirs, strict=True)), default=0.0)


def _relative(ours: Tensor, theirs: Tensor) -> float:
    a, b = ours.double(), theirs.double()
    if not torch.equal(a.isfinite(), b.isfinite()):
        return float("inf")
    a, b = a.nan_to_num(0.0, 0.0, 0.0), b.nan_to_num(0.0, 0.0, 0.0)
    return float((a - b).norm() / b.norm().clamp_min(1e-30)) if a.numel() else 0.0
