"""Whether a network that was rewritten still computes what it did: compared on a batch, at the rounding of its type.

The measure is ||y - y0|| / ||y0|| of each output. The tolerance is sqrt(eps) of the type of the numbers, half of their
digits: 3.5e-4 in float32. Another order of the same sums moves the outputs of networks of tens of layers by 1e-7 to
1e-5; a BatchNorm that was folded wrongly moves them by 1e-2 and more.

A detector sorts and drops boxes by score: float noise moves its outputs as far as an error does. Such a network is
compared where its layers give their results, in so far as noise leaves these alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mpsearch.graph.facts import LayerInfo
from mpsearch.graph.inputs import call, evaluating, first_samples, map_tensors, tensors

SAMPLES = 32
"""Of a calibration batch, those that two networks are compared on."""

NOISE = 2.0**-21
"""Of a sum of floats in another order, against the largest of its tensor."""

T = TypeVar("T")


class Original:
    """A network that is about to be rewritten, and what it computes on a batch.

    Args:
        model: the network.
        x: a batch of its input.
        points: modules, by name, after which the rewritten network has to have the values that the network has.
    """

    def __init__(self, model: nn.Module, x: Any, points: Sequence[str]) -> None:
        self._model, self._x, self._points = model, x, points
        self._outputs = outputs(model, x)

    def holds(self, rewritten: nn.Module) -> bool:
        """Whether a rewritten model runs, and gives what the network gives."""
        if holds(rewritten, self._x, self._outputs):
            return True
        try:
            return bool(self._steady) and _agree(values_at(rewritten, self._x, list(self._steady)), self._steady)
        except Exception:  # as in `holds`
            return False

    @cached_property
    def _steady(self) -> dict[str, list[Tensor]]:
        """Where noise moves the outputs: the points that it does not move, with their values; else none."""
        generator = torch.Generator().manual_seed(0)

        def disturbed(x: Tensor) -> Tensor:
            if not x.is_floating_point() or not x.numel():
                return x
            return x + NOISE * x.abs().amax() * torch.randn(x.shape, generator=generator).to(x)

        noisy = map_tensors(disturbed, self._x)
        if holds(self._model, noisy, self._outputs):
            return {}
        before, after = (values_at(self._model, x, self._points) for x in (self._x, noisy))
        return {name: values for name, values in before.items() if difference(after.get(name, []), values) <= 1.0}


def result_points(layers: Sequence[LayerInfo]) -> list[str]:
    """Where layers give their results: behind the BatchNorm that can become part of them, if there is one."""
    return [layer.batch_norm or layer.name for layer in layers]


def outputs(model: nn.Module, x: Any) -> list[Tensor]:
    """The floating-point tensors that a model gives for the first samples of a batch, in eval mode."""
    x = map_tensors(torch.clone, first_samples(x, SAMPLES))  # a model may write into its input
    with evaluating(model):
        return [y.detach() for y in tensors(call(model, x)) if y.is_floating_point()]


def values_at(model: nn.Module, x: Any, points: Sequence[str]) -> dict[str, list[Tensor]]:
    """What modules, by name, give for the first samples of a batch, call by call; not of those that do not run."""
    values: dict[str, list[Tensor]] = {}
    modules = dict(model.named_modules())

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            given = [y.detach().clone() for y in tensors(output) if y.is_floating_point()]
            values.setdefault(name, []).extend(given)

        return hook

    handles = [modules[name].register_forward_hook(keep(name)) for name in points if name in modules]
    try:
        outputs(model, x)
    finally:
        for handle in handles:
            handle.remove()
    return values


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


def _agree(ours: Mapping[str, Sequence[Tensor]], theirs: Mapping[str, Sequence[Tensor]]) -> bool:
    return all(difference(ours.get(name, []), values) <= 1.0 for name, values in theirs.items())


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
