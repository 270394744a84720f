"""Allocation: one precision for every slot, exactly, so that a sum over tensors is least within a budget of cost.

    minimize    sum over slots s, choices i of   x_si * v_si
    subject to  sum_i x_si = 1 for each slot,   x in {0, 1}
                sum over layers l, pairs (i, j) of   y_lij * c_l(i, j)  <=  budget
                sum_j y_lij = x_wi,   sum_i y_lij = x_aj,   y >= 0,   w and a the slots of layer l's weight and input

`v` is a sensitivity summed over the slot's layers (`allocate`), or what a local model says of the loss (`round_bits`).
A layer costs what the *pair* of its precisions costs, c_l(i, j), as a share of the reference. With x integral, y is
the pair that was chosen, also where slots span several layers, so the program is exact. Where a cost model takes the
maximum over layers instead of the sum, the second line is y_lij = 0 for every pair above the budget. Solved by HiGHS
(scipy.optimize.milp) without a gap; ILP over a sensitivity table is the method of HAWQ-V3 (arXiv 2011.10680).

More than one solution: each one found is cut off (sum of its x <= slots - 1), which leaves the next best.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, lil_array

from mpsearch.cost.model import RelativeCost
from mpsearch.errors import CostError, PrecisionError, SpaceError
from mpsearch.pareto import non_dominated
from mpsearch.precision import FLOAT_BITS, LayerPrecision, Precision, PrecisionConfig
from mpsearch.space.choices import TensorName
from mpsearch.space.space import SearchSpace, Slot
from mpsearch.warmstart.table import SensitivityTable

logger = logging.getLogger(__name__)

Floats = NDArray[np.float64]
Tensors = Mapping[tuple[str, TensorName], float]
"""(layer, tensor) -> number."""
Change = Callable[[float, float], float]
"""(marginal, change in bits) -> change of the loss."""

Equivalent = Callable[[Slot, Precision], float]
"""(slot, one of its choices) -> bits of a uniform quantizer; NaN: not known."""

ROUNDING = 1e-9
"""A cost that differs by less, relative to itself, was added up in another order."""
_INFEASIBLE = 2  # a status of scipy's milp
_VALUE_SCALE, _COST_SCALE = 1e6, 1e2
"""The largest value and the budget are scaled to these, because HiGHS' tolerances (1e-6) are absolute."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """A config that is optimal within its budget, or the next best after others."""

    config: PrecisionConfig
    budget: float
    cost: float  # relative, at most the budget
    value: float  # the sum that was minimized


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
        PrecisionError: the table says nothing of some choice.
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


class Program:
    """The mixed-integer program of the module's top for one space and cost model; values, budgets and cuts vary.

    Variables: the x of all slots, then the y of each pair of slots that some layer has. Layers with the same two slots
    share their y.
    """

    def __init__(self, space: SearchSpace, cost: RelativeCost) -> None:
        self._space, self._cost = space, cost
        if cost.combined_by not in (sum, max):
            raise CostError(
                "this cost model is neither a sum nor a maximum over layers, so no integer program can keep its "
                "budget: use another one, or let the search's samplers propose"
            )
        slots = space.slots
        self._x = np.cumsum([0, *(len(slot.choices) for slot in slots)])  # where each slot's variables begin, and end
        slot_of = {(layer, slot.tensor): i for i, slot in enumerate(slots) for layer in slot.layers}
        pairs: dict[tuple[int, int], list[str]] = {}
        for layer in space.layers:
            pairs.setdefault((slot_of[layer, "weight"], slot_of[layer, "activation"]), []).append(layer)
        prices: list[float] = []
        entries: list[tuple[int, int, float]] = [
            (i, j, 1.0) for i, (a, b) in enumerate(pairwise(self._x)) for j in range(a, b)
        ]
        rows = len(slots)
        self._alone: list[tuple[int, int, int]] = []  # slots that meet no third one, and where their y begin
        for (w, a), layers in pairs.items():
            if sum(w in pair or a in pair for pair in pairs) == 1:
                self._alone.append((w, a, len(prices)))
            weights, activations = slots[w].choices, slots[a].choices
            for i, j in product(range(len(weights)), range(len(activations))):
                y = self._x[-1] + len(prices)
                entries += [(rows + i, y, 1.0), (rows + len(weights) + j, y, 1.0)]
                pair = LayerPrecision(weights[i], activations[j])
                prices.append(cost.combined_by([cost.addend(layer, pair) for layer in layers]))
            columns = [*range(self._x[w], self._x[w + 1]), *range(self._x[a], self._x[a + 1])]
            entries += [(rows + k, x, -1.0) for k, x in enumerate(columns)]
            rows += len(columns)
        self._prices = np.array(prices)
        row, column, entry = zip(*entries, strict=True)
        matrix = csr_array((entry, (row, column)), shape=(rows, self._x[-1] + len(prices)))
        right = np.where(np.arange(rows) < len(slots), 1.0, 0.0)
        self._agree = LinearConstraint(matrix, right, right)

    def solve(
        self, values: Sequence[Sequence[float]], budget: float, count: int = 1, distance: int = 1, gap: float = 0.0
    ) -> list[Allocation]:
        """The `count` best configs within a budget, none if there is none.

        Args:
            values: for each slot, the value of each of its choices; NaN and infinity: not to be taken.
            budget: relative cost.
            count: how many.
            distance: in how many slots they differ at least.
            gap: how far, as a share, a value may be above the least possible one; more than 0 is faster.

        Raises:
            SpaceError: a slot has no choice that may be taken.
        """
        flat = np.concatenate([np.asarray(value, dtype=float) for value in values])
        for slot, (a, b) in zip(self._space.slots, pairwise(self._x), strict=True):
            if not np.isfinite(flat[a:b]).any():
                raise SpaceError(
                    f"slot '{slot.name}' has no choice with a finite sensitivity: the network breaks whatever it "
                    "takes; offer more bits there"
                )
        allocations: list[Allocation] = []
        cuts: list[tuple[list[int], int]] = []  # x that were chosen together, and how many of them still may be
        too_dear = 0
        while len(allocations) < count:
            # A budget that is passed by less than the solver's tolerance again and again is made smaller.
            columns = self._optimum(flat, budget * (1 - ROUNDING * (too_dear // 20)), cuts, gap)
            if columns is None:
                break
            config = self._config(columns)
            price = self._cost(config)
            self._check(config, price)
            within = price <= budget
            cuts.append((columns, len(columns) - (distance if within else 1)))
            if within:
                allocations.append(Allocation(config, budget, price, math.fsum(flat[columns])))
            else:
                too_dear += 1
        return allocations

    def refuse(self, budget: float) -> NoReturn:
        """Raise the error of a budget that no config is within."""
        choices: dict[str, dict[str, Sequence[Precision]]] = {name: {} for name in self._space.layers}
        for slot in self._space.slots:
            for name in slot.layers:
                choices[name][slot.tensor] = slot.choices
        cheapest, _ = self._cost.bounds({name: (c["weight"], c["activation"]) for name, c in choices.items()})
        raise CostError(
            f"no config of space '{self._space.name}' that may be taken has a relative cost of {budget:g} or less, and "
            f"none at all is cheaper than {cheapest:.4g}: raise the budget, or allow lower precisions in the space"
        )

    def _optimum(
        self, flat: Floats, budget: float, cuts: Sequence[tuple[list[int], int]], gap: float
    ) -> list[int] | None:
        """The x that are 1, one for each slot; None if nothing is feasible."""
        count, size = self._x[-1], self._x[-1] + len(self._prices)
        finite = np.isfinite(flat)
        upper = np.concatenate([finite.astype(float), np.ones(len(self._prices))])
        weights = np.where(finite, flat, np.inf)
        # Differences within a slot are all that matters.
        weights = np.concatenate([weights[a:b] - weights[a:b].min() for a, b in pairwise(self._x)])
        weights[~finite] = 0.0
        objective = np.zeros(size)
        objective[:count] = weights * (_VALUE_SCALE / (weights.max() or 1.0))
        constraints = [self._agree]
        if self._cost.combined_by is max:
            upper[count:][self._prices > budget] = 0.0
            feasible = self._cost.of_float_layers <= budget
        else:
            room = budget - self._cost.of_float_layers
            feasible = room > 0
            if not cuts:
                upper[count:][self._dominated(flat)] = 0.0
                if feasible and 2 * len(self._alone) == len(self._space.slots):
                    upper[count:][self._beaten(flat, room)] = 0.0
            row = np.concatenate([np.zeros(count), self._prices * (_COST_SCALE / room if feasible else 0.0)])
            constraints.append(LinearConstraint(csr_array(row[None]), -np.inf, _COST_SCALE))
        if not feasible:  # or NaN
            return None
        if cuts:
            matrix = lil_array((len(cuts), size))
            for row_index, (columns, _) in enumerate(cuts):
                matrix[row_index, columns] = 1.0
            constraints.append(LinearConstraint(matrix.tocsr(), -np.inf, [most for _, most in cuts]))
        integral = np.concatenate([np.ones(count), np.zeros(len(self._prices))])
        with _silent():
            result = milp(
                objective,
                integrality=integral,
                bounds=Bounds(0, upper),
                constraints=constraints,
                options={"mip_rel_gap": gap},
            )
        if result.status == _INFEASIBLE:
            return None
        if result.x is None:
            raise CostError(f"the integer program was not solved: {result.message}")
        return [int(a + np.argmax(result.x[a:b])) for a, b in pairwise(self._x)]

    def _dominated(self, flat: Floats) -> NDArray[np.bool_]:
        """The y that a best config can do without: another pair for the same layers costs and loses no more."""
        dominated = np.zeros(len(self._prices), dtype=bool)
        for w, a, first in self._alone:
            sums = flat[self._x[w] : self._x[w + 1], None] + flat[None, self._x[a] : self._x[a + 1]]
            prices = self._prices[first : first + sums.size]
            usable = np.flatnonzero(np.isfinite(sums.ravel()))
            best = usable[non_dominated(np.stack([prices, sums.ravel()], axis=1)[usable], (False, False))]
            dominated[first : first + sums.size] = True
            dominated[first + best] = False
        return dominated

    def _beaten(self, flat: Floats, room: float) -> NDArray[np.bool_]:
        """The y of no config that is better than one that is at hand; for slots that all meet just one other.

        Lagrange relaxation: with a price L on cost, no config within the budget has less than
        b(L) = sum over layers of min (value + L cost) - L room, nor less than b(L) + r with a pair whose own
        value + L cost is r above its layer's least. Where that is above the value of a known config, it is out.
        """
        sizes = [len(self._space.slots[w].choices) * len(self._space.slots[a].choices) for w, a, _ in self._alone]
        value = np.full((len(sizes), max(sizes)), np.inf)
        cost = np.zeros_like(value)
        for row, (w, a, first) in enumerate(self._alone):
            sums = flat[self._x[w] : self._x[w + 1], None] + flat[None, self._x[a] : self._x[a + 1]]
            value[row, : sums.size] = np.where(np.isfinite(sums), sums, np.inf).ravel()
            cost[row, : sums.size] = self._prices[first : first + sums.size]
        rows = np.arange(len(sizes))
        low, high = 0.0, (np.ptp(value[np.isfinite(value)]) + 1e-12) / max(room, 1e-12)
        beaten = np.zeros(len(self._prices), dtype=bool)

        def within(price: float) -> NDArray[np.intp] | None:
            chosen = np.argmin(value + price * cost, axis=1)
            return chosen if cost[rows, chosen].sum() <= room else None

        for _ in range(60):  # a price so high that the cheapest pairs are taken
            if within(high) is not None:
                break
            high *= 2
        else:
            return beaten
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if within(middle) is not None else (middle, high)
        chosen = within(high)
        assert chosen is not None
        left = room - cost[rows, chosen].sum()
        while True:  # what is left of the budget goes where it does most good
            gain = np.where(cost - cost[rows, chosen][:, None] <= left, value[rows, chosen][:, None] - value, -np.inf)
            row, column = divmod(int(np.argmax(gain)), gain.shape[1])
            if not gain[row, column] > 0:
                break
            left -= cost[row, column] - cost[row, chosen[row]]
            chosen[row] = column
        known = value[rows, chosen].sum()
        reduced = value + high * cost
        least = reduced.min(axis=1)
        above = least.sum() - high * room + (reduced - least[:, None])
        out = above > known + 1e-9 * (abs(known) + np.abs(value[rows, chosen]).sum())
        for row, (_, _, first) in enumerate(self._alone):
            beaten[first : first + sizes[row]] = out[row, : sizes[row]]
        return beaten

    def _config(self, columns: Sequence[int]) -> PrecisionConfig:
        slots = zip(self._space.slots, columns, self._x, strict=False)
        choices = [(slot, slot.choices[x - first]) for slot, x, first in slots]
        return self._space.config_of({slot.parameter: slot.value(c) for slot, c in choices if len(slot.choices) > 1})

    def _check(self, config: PrecisionConfig, price: float) -> None:
        """Raise CostError if the addends of the layers do not make up the cost."""
        addends = [self._cost.addend(layer, precision) for layer, precision in config.items()]
        total = self._cost.combined_by([*addends, self._cost.of_float_layers])
        if not abs(total - price) <= ROUNDING * price:
            raise CostError(
                f"this cost model is not made of its layers' costs: they give {total:g}, the model {price:g}; no "
                "integer program can keep its budget, so use another one, or let the search's samplers propose"
            )


def program_of(space: SearchSpace, cost: RelativeCost) -> Program | None:
    """The program of a space and cost model; None, and the log says why, where no program can keep such a budget."""
    try:
        return Program(space, cost)
    except CostError as reason:
        logger.info("proposals are drawn at random: %s", reason)
        return None


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Discard what C code prints meanwhile: HiGHS leaves a debugging line on stdout, where `--json` prints JSON."""
    sys.stdout.flush()
    c = ctypes.CDLL(None)
    c.fflush(None)
    stdout, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    try:
        yield
    finally:
        c.fflush(None)
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(nothing)


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
