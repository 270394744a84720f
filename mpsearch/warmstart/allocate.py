"""Allocation: the configs of least sensitivity, or of least modelled loss, within a budget of cost.

Both are a table of values by slot and choice, handed to the integer program (`mpsearch/program.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mpsearch.cost.model import RelativeCost
from mpsearch.errors import PrecisionError
from mpsearch.precision import FLOAT_BITS, Precision
from mpsearch.program import Allocation, Program
from mpsearch.space.choices import TensorName
from mpsearch.space.space import SearchSpace, Slot
from mpsearch.warmstart.table import SensitivityTable

Tensors = Mapping[tuple[str, TensorName], float]
"""(layer, tensor) -> number."""
Change = Callable[[float, float], float]
"""(marginal, change in bits) -> change of the loss."""

Equivalent = Callable[[Slot, Precision], float]
"""(slot, one of its choices) -> bits of a uniform quantizer; NaN: not known."""


def allocate(
    space: SearchSpace, cost: RelativeCost, table: SensitivityTable, budget: float, count: int = 1, distance: int = 1
) -> list[Allocation]:
    """The configs of least summed sensitivity with relative cost <= budget, best first.

    Choices whose sensitivity is NaN or infinite are never taken.

    Args:
        space: the configs that there are.
        cost: prices them.
        table: a sensitivity for every choice of every tensor.
        budget: relative cost.
        count: how many configs; fewer are returned where there are no more.
        distance: in how many slots any two of them differ at least.

    Raises:
        CostError: no config is within the budget, or the cost model is neither a sum nor a maximum over layers.
        PrecisionError: the table has no entry for some choice.
        SpaceError: a slot has no choice with a finite sensitivity.
    """
    program = Program(space, cost)
    return program.solve(_summed(space, table), budget, count, distance) or program.refuse(budget)


def ilp_ladder(
    space: SearchSpace, cost: RelativeCost, table: SensitivityTable, budgets: Sequence[float]
) -> list[Allocation]:
    """The best config within each budget, in the order of `budgets`; one may be the best within several.

    Raises:
        MpsearchError: as `allocate`; of budgets that cannot be met, the first is named.
    """
    program, values = Program(space, cost), _summed(space, table)
    return [(program.solve(values, budget) or program.refuse(budget))[0] for budget in budgets]


def round_bits(
    space: SearchSpace,
    cost: RelativeCost,
    bits: Tensors,
    marginals: Tensors,
    budget: float,
    count: int = 1,
    *,
    reach: float = 2.0,
    change: Change | None = None,
    distance: int = 1,
    equivalent: Equivalent | None = None,
) -> list[Allocation]:
    """Whole bits for learned real ones: the configs of least modelled loss with relative cost <= budget, best first.

    The model is local and separable. Around the learned bits b_t of tensor t, with marginals g_t = dLoss/db_t,

        Loss(n) - Loss(b) = sum over t of  change(g_t, n_t - b_t),   change(g, d) = -g / ln 4 * (4^-d - 1)

    which is g d - (ln 4 / 2) g d^2 + ...: the measured slope, with the curvature of quantization noise, whose power
    falls to a quarter with every bit. Unlike the parabola it never turns round. A marginal that is not negative (more
    bits would do harm: noise) is taken as a thousandth of the mean of the others, so that such a tensor gives its bits
    to others first.

    Only choices within `reach` bits of the learned ones count, and always the nearest; where they leave no config
    within the budget, `reach` is doubled. Learned bits are those of uniform quantizers. A choice of another type takes
    part if `equivalent` knows how many bits it is worth, or if the slot has no uniform choices.

    Args:
        space: the configs that there are.
        cost: prices them.
        bits: learned bits of each tensor; a slot of several layers has their mean.
        marginals: dLoss/dbit of each tensor; a slot of several layers has their sum.
        budget: relative cost.
        count: how many configs; fewer are returned where there are no more.
        reach: how far, in bits, the local model is trusted.
        change: the model; default `noise_change`. `linear_change` is its first term.
        distance: in how many slots any two configs differ at least.
        equivalent: (slot, choice) -> the bits of the uniform quantizer that does as much harm; NaN: not known.

    Raises:
        CostError: no config is within the budget, or the cost model is neither a sum nor a maximum over layers.
        PrecisionError: the bits or the marginal of a tensor are missing or not finite.
    """
    program = Program(space, cost)
    learned = [sum(_numbers(bits, slot, "bits")) / len(slot.layers) for slot in space.slots]
    slopes = [sum(_numbers(marginals, slot, "marginal")) for slot in space.slots]
    falling = [slope for slope in slopes if slope < 0]
    weakest = 1e-3 * sum(falling) / len(falling) if falling else -1.0
    model = change or noise_change
    while True:
        values = [
            [
                model(min(slope, weakest), worth - b) if near else math.inf
                for worth, near in _near(slot, b, reach, equivalent)
            ]
            for slot, b, slope in zip(space.slots, learned, slopes, strict=True)
        ]
        if allocations := program.solve(values, budget, count, distance):
            return allocations
        if reach > FLOAT_BITS:
            program.refuse(budget)
        reach *= 2


def noise_change(marginal: float, bits: float) -> float:
    """-g / ln 4 * (4^-d - 1): how the loss changes with d bits if it grows with the power of the noise."""
    return -marginal / math.log(4) * (math.pow(4, -bits) - 1)


def linear_change(marginal: float, bits: float) -> float:
    """g d."""
    return marginal * bits


def _summed(space: SearchSpace, table: SensitivityTable) -> list[list[float]]:
    """For each slot and choice, the sensitivity of the slot's tensors together."""
    return [
        [sum(table.of(layer, slot.tensor, choice) for layer in slot.layers) for choice in slot.choices]
        for slot in space.slots
    ]


def _numbers(of: Tensors, slot: Slot, what: str) -> list[float]:
    """The numbers of a slot's tensors. Raises PrecisionError if one is missing or not finite."""
    numbers = []
    for layer in slot.layers:
        number = of.get((layer, slot.tensor), math.nan)
        if not math.isfinite(number):
            raise PrecisionError(
                f"the {what} of layer '{layer}', {slot.tensor}, is missing or not finite: give one for every tensor"
            )
        numbers.append(number)
    return numbers


def equivalent_bits(table: SensitivityTable) -> Equivalent:
    """What a choice of any type is worth in bits of the uniform quantizer, by what a table says of the slot's tensors.

    Between whole numbers of bits the logarithm of the uniform quantizer's sensitivity is taken as a straight line;
    beyond its ends, and where the table has no number, nothing is known.
    """

    def equivalent(slot: Slot, choice: Precision) -> float:
        def harm(precision: Precision) -> float:
            return sum(table.of(layer, slot.tensor, precision) for layer in slot.layers)

        uniform = sorted((c for c in slot.choices if c.quantizer == "uniform"), key=lambda c: c.bits)
        if len(uniform) < 2 or choice.is_float:
            return math.nan
        harms = np.maximum.accumulate([harm(c) for c in reversed(uniform)])  # more bits never count as doing more harm
        harm_of_choice = harm(choice)
        if not harms[0] <= harm_of_choice <= harms[-1] or not harms[0] > 0:
            return math.nan
        return float(np.interp(math.log(harm_of_choice), np.log(harms), [c.bits for c in reversed(uniform)]))

    return equivalent


def _near(slot: Slot, bits: float, reach: float, equivalent: Equivalent | None) -> list[tuple[float, bool]]:
    """What each choice of a slot is worth in bits, and whether that is near enough to the learned ones."""
    uniform = any(choice.quantizer == "uniform" for choice in slot.choices)
    worth = [
        float(choice.bits)
        if choice.quantizer == "uniform" or not uniform
        else math.nan
        if equivalent is None
        else equivalent(slot, choice)
        for choice in slot.choices
    ]
    least = min(abs(w - bits) for w in worth if not math.isnan(w))
    return [(w, abs(w - bits) < reach or abs(w - bits) == least) for w in worth]
