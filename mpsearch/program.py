"""The integer program: one precision for every slot, exactly, so that a sum is least within a budget and all limits.

    minimize    sum over slots s, choices i of   x_si * v_si
    subject to  sum_i x_si = 1 for each slot,   x in {0, 1}
                sum over layers l, pairs (i, j) of   y_lij * c_l(i, j)  <=  budget
                the same with every other cost that has a limit (`RelativeCost.limits`)
                sum_j y_lij = x_wi,   sum_i y_lij = x_aj,   y >= 0,   w and a the slots of layer l's weight and input

`v` is a sensitivity summed over the slot's layers, or what a local model says of the loss (`warmstart/allocate.py`).
A layer costs what the *pair* of its precisions costs, c_l(i, j), as a share of the reference. With x integral, y is
the pair that was chosen, also where slots span several layers, so the program is exact. Where a cost model takes the
maximum over layers instead of the sum, its line is y_lij = 0 for every pair above the bound. Solved by HiGHS
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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product, starmap
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, lil_array

from mpsearch.cost.model import RelativeCost
from mpsearch.errors import CostError, SpaceError
from mpsearch.pareto import non_dominated
from mpsearch.precision import LayerPrecision, PrecisionConfig
from mpsearch.space.space import SearchSpace

logger = logging.getLogger(__name__)

Floats = NDArray[np.float64]

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


@dataclass(frozen=True)
class _Row:
    """One cost as the program sees it."""

    cost: RelativeCost
    prices: Floats  # of each y; 0 for a pair that is not allowed
    most: float  # relative; NaN for the cost that a budget bounds
    text: str

    @property
    def room(self) -> float:
        """What the bound leaves once the float layers are paid for."""
        return self.most - self.cost.of_float_layers


class Program:
    """The mixed-integer program of the module's top for one space and cost model; values, budgets and cuts vary.

    Variables: the x of all slots, then the y of each pair of slots that some layer has, then, where a change of
    precision between neighbours costs something, a z for each two neighbours. Layers with the same two slots share
    their y. Pairs that a layer may not have (`SearchSpace.allows`) have y = 0.

    Raises:
        CostError: a cost that is bounded is neither a sum nor a maximum over layers.
    """

    def __init__(self, space: SearchSpace, cost: RelativeCost) -> None:
        self._space, self._cost = space, cost
        for name, bounded in [("this cost model", cost), *((bound.name, bound.cost) for bound in cost.limits)]:
            if bounded.combined_by not in (sum, max):
                raise CostError(
                    f"{name} is neither a sum nor a maximum over layers, so no integer program can keep its "
                    "budget: use another one, or let the search's samplers propose"
                )
        slots = space.slots
        self._x = np.cumsum([0, *(len(slot.choices) for slot in slots)])  # where each slot's variables begin, and end
        slot_of = {(layer, slot.tensor): i for i, slot in enumerate(slots) for layer in slot.layers}
        self._pairs: dict[tuple[int, int], list[str]] = {}
        for layer in space.layers:
            self._pairs.setdefault((slot_of[layer, "weight"], slot_of[layer, "activation"]), []).append(layer)
        usable: list[bool] = []
        entries: list[tuple[int, int, float]] = [
            (i, j, 1.0) for i, (a, b) in enumerate(pairwise(self._x)) for j in range(a, b)
        ]
        rows = len(slots)
        self._alone: list[tuple[int, int, int]] = []  # slots that meet no third one, and where their y begin
        for (w, a), layers in self._pairs.items():
            if sum(w in pair or a in pair for pair in self._pairs) == 1:
                self._alone.append((w, a, len(usable)))
            weights, activations = slots[w].choices, slots[a].choices
            for i, j in product(range(len(weights)), range(len(activations))):
                y = self._x[-1] + len(usable)
                entries += [(rows + i, y, 1.0), (rows + len(weights) + j, y, 1.0)]
                pair = LayerPrecision(weights[i], activations[j])
                usable.append(all(space.allows(layer, pair) for layer in layers))
            columns = [*range(self._x[w], self._x[w + 1]), *range(self._x[a], self._x[a + 1])]
            entries += [(rows + k, x, -1.0) for k, x in enumerate(columns)]
            rows += len(columns)
        self._usable = np.array(usable, dtype=bool)
        self._main = self._row(cost, math.nan, "the budget")
        self._limits = [self._row(bound.cost, bound.most, str(bound)) for bound in cost.limits]
        self._neighbours = self._changing([slot_of[layer, "activation"] for layer in space.layers])
        self._size = int(self._x[-1]) + len(usable) + len(self._neighbours)
        row, column, entry = zip(*entries, strict=True)
        matrix = csr_array((entry, (row, column)), shape=(rows, self._size))
        right = np.where(np.arange(rows) < len(slots), 1.0, 0.0)
        self._agree = [(matrix, right, right), *self._counted()]

    def _row(self, cost: RelativeCost, most: float, text: str) -> _Row:
        slots, prices = self._space.slots, list[float]()
        for (w, a), layers in self._pairs.items():
            for pair in starmap(LayerPrecision, product(slots[w].choices, slots[a].choices)):
                usable = self._usable[len(prices)]
                prices.append(cost.combined_by([cost.addend(layer, pair) for layer in layers]) if usable else 0.0)
        return _Row(cost, np.array(prices), most, text)

    def _changing(self, activations: Sequence[int]) -> list[tuple[int, int]]:
        """The activation slots of neighbours between which a change of precision costs something."""
        if not any(row.cost.change for row in (self._main, *self._limits)):
            return []
        return [(a, b) for a, b in pairwise(activations) if a != b]

    def _counted(self) -> list[tuple[csr_array, Floats, Floats]]:
        """z = 1 at least where two neighbours differ: z >= x_ac - x_bc for every precision c."""
        entries: list[tuple[int, int, float]] = []
        rows = 0
        for k, (a, b) in enumerate(self._neighbours):
            columns = {c: self._x[b] + i for i, c in enumerate(self._space.slots[b].choices)}
            for i, c in enumerate(self._space.slots[a].choices):
                entries += [(rows, self._size - len(self._neighbours) + k, 1.0), (rows, self._x[a] + i, -1.0)]
                entries += [(rows, columns[c], 1.0)] if c in columns else []
                rows += 1
        if not entries:
            return []
        row, column, entry = zip(*entries, strict=True)
        matrix = csr_array((entry, (row, column)), shape=(rows, self._size))
        return [(matrix, np.zeros(rows), np.full(rows, np.inf))]

    def least_excess(self, budget: float = math.inf) -> tuple[float, PrecisionConfig]:
        """The config whose costs pass their bounds by the smallest factor, and that factor: at most 1 is within all.

            minimize t   subject to   every bounded cost <= t * its bound

        Raises:
            CostError: the space has no config at all, because of pairs that are not allowed.
        """
        bounds = [*self._limits, *([replace(self._main, most=budget)] if budget < math.inf else [])]
        config = self._least(bounds)
        return max((row.cost(config) / row.most for row in bounds), default=0.0), config

    def cheapest(self) -> PrecisionConfig:
        """The config that costs least within the limits. Raises CostError if none is within them."""
        return self._least([replace(self._main, most=1.0)], self._limits)

    def _least(self, scaled: Sequence[_Row], kept: Sequence[_Row] = ()) -> PrecisionConfig:
        """The config of least t, where the bounds in `scaled` are multiplied by t and those in `kept` hold."""
        x, y, size = int(self._x[-1]), int(self._x[-1]) + len(self._usable), self._size + 1
        constraints = [
            LinearConstraint(csr_array((a.data, a.indices, a.indptr), shape=(a.shape[0], size)), low, high)
            for a, low, high in self._agree
        ]
        for row in (*scaled, *kept):
            peak = row.cost.combined_by is max
            lines = np.diag(row.prices) if peak else row.prices[None]
            matrix = np.zeros((len(lines) + peak, size))  # a peak: each layer, and the float layers, are below it
            matrix[: len(lines), x:y] = lines
            matrix[:, y:-1] = 0.0 if peak else row.cost.change
            right = np.zeros(len(matrix))
            right[-1] = -row.cost.of_float_layers
            if any(row is other for other in scaled):
                matrix[:, -1] = -row.most
            else:
                right += row.most
            constraints.append(LinearConstraint(csr_array(matrix / row.most), -np.inf, right / row.most))
        upper = np.concatenate([np.ones(x), self._usable.astype(float), np.ones(len(self._neighbours)), [np.inf]])
        with _silent():
            result = milp(
                np.eye(size)[-1],
                integrality=np.concatenate([np.ones(x), np.zeros(size - x)]),
                bounds=Bounds(0, upper),
                constraints=constraints,
            )
        if result.x is None:
            raise CostError(
                f"space '{self._space.name}' has no config within the limits, of pairs that its layers may have"
            )
        return self._config([int(a + np.argmax(result.x[a:b])) for a, b in pairwise(self._x)])

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
            # Bounds that are passed by less than the solver's tolerance again and again are made smaller.
            columns = self._optimum(flat, budget, 1 - ROUNDING * (too_dear // 20), cuts, gap)
            if columns is None:
                break
            config = self._config(columns)
            price = self._cost(config)
            self._check(config, price)
            within = price <= budget and self._cost.within_limits(config)
            cuts.append((columns, len(columns) - (distance if within else 1)))
            if within:
                allocations.append(Allocation(config, budget, price, math.fsum(flat[columns])))
            else:
                too_dear += 1
        return allocations

    def refuse(self, budget: float) -> NoReturn:
        """Raise the error of a budget that no config is within."""
        cheapest, _ = self._cost.bounds(self._space.options)
        limits = ", or of the limits" if self._limits else ""
        raise CostError(
            f"no config of space '{self._space.name}' that may be taken has a relative cost of {budget:g} or less, and "
            f"none at all is cheaper than {cheapest:.4g}: raise the budget{limits}, or allow lower precisions in the "
            "space"
        )

    def _optimum(
        self, flat: Floats, budget: float, share: float, cuts: Sequence[tuple[list[int], int]], gap: float
    ) -> list[int] | None:
        """The x that are 1, one for each slot; None if nothing is feasible."""
        count, size = self._x[-1], self._size
        finite = np.isfinite(flat)
        upper = np.concatenate([finite, self._usable, np.ones(len(self._neighbours))]).astype(float)
        of_pairs = upper[count : count + len(self._usable)]  # a view
        weights = np.where(finite, flat, np.inf)
        # Differences within a slot are all that matters.
        weights = np.concatenate([weights[a:b] - weights[a:b].min() for a, b in pairwise(self._x)])
        weights[~finite] = 0.0
        objective = np.zeros(size)
        objective[:count] = weights * (_VALUE_SCALE / (weights.max() or 1.0))
        constraints = [LinearConstraint(*lines) for lines in self._agree]
        for bounded in (replace(self._main, most=budget), *self._limits):
            row = replace(bounded, most=bounded.most * share)
            if row.cost.combined_by is max:
                of_pairs[row.prices > row.most] = 0.0
                if not row.cost.of_float_layers <= row.most:
                    return None
                continue
            if not row.room > 0:  # or NaN
                return None
            changes = np.full(len(self._neighbours), row.cost.change)
            line = np.concatenate([np.zeros(count), row.prices, changes]) * (_COST_SCALE / row.room)
            constraints.append(LinearConstraint(csr_array(line[None]), -np.inf, _COST_SCALE))
        if self._main.cost.combined_by is sum and not (cuts or self._limits or self._neighbours):
            of_pairs[self._dominated(flat)] = 0.0
            if 2 * len(self._alone) == len(self._space.slots):
                of_pairs[self._beaten(flat, budget * share - self._cost.of_float_layers)] = 0.0
        if cuts:
            matrix = lil_array((len(cuts), size))
            for row_index, (columns, _) in enumerate(cuts):
                matrix[row_index, columns] = 1.0
            constraints.append(LinearConstraint(matrix.tocsr(), -np.inf, [most for _, most in cuts]))
        integral = np.concatenate([np.ones(count), np.zeros(size - count)])
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

    def _sums(self, flat: Floats, w: int, a: int, first: int) -> Floats:
        """The values of the pairs of two slots, (weights, activations); infinite where a pair is not allowed."""
        sums = flat[self._x[w] : self._x[w + 1], None] + flat[None, self._x[a] : self._x[a + 1]]
        usable = self._usable[first : first + sums.size].reshape(sums.shape)
        return np.where(usable & np.isfinite(sums), sums, np.inf)

    def _dominated(self, flat: Floats) -> NDArray[np.bool_]:
        """The y that a best config can do without: another pair for the same layers costs and loses no more."""
        dominated = np.zeros(len(self._usable), dtype=bool)
        for w, a, first in self._alone:
            sums = self._sums(flat, w, a, first)
            prices = self._main.prices[first : first + sums.size]
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
            sums = self._sums(flat, w, a, first)
            value[row, : sums.size] = sums.ravel()
            cost[row, : sums.size] = self._main.prices[first : first + sums.size]
        rows = np.arange(len(sizes))
        low, high = 0.0, (np.ptp(value[np.isfinite(value)]) + 1e-12) / max(room, 1e-12)
        beaten = np.zeros(len(self._usable), dtype=bool)
        if np.isinf(value.min(axis=1)).any() or not np.isfinite(room):
            return beaten

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
        total = self._cost.combined_by([*addends, self._cost.of_float_layers]) + self._cost.of_changes(config)
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
