"""Proposals of the additive model: the best config within a budget under a table of effects."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Container, Sequence

import numpy as np

from mpsearch.cost.model import affordable
from mpsearch.precision import PrecisionConfig
from mpsearch.program import Program
from mpsearch.space.space import SearchSpace
from mpsearch.warmstart.additive import Effects
from mpsearch.warmstart.table import SensitivityTable

GAP = 0.01  # share by which a proposal may miss the best value of its draw
RANDOM = 200  # configs that are drawn where there is no program
NEIGHBOURS = 64  # of a known config, that are looked at


def propose(
    effects: Effects,
    space: SearchSpace,
    cost: Callable[[PrecisionConfig], float],
    table: SensitivityTable | None,
    program: Program | None,
    budget: float,
    random: np.random.Generator,
    known: Collection[PrecisionConfig] = (),
) -> PrecisionConfig | None:
    """The best config within a budget under a table of effects; None where there is none.

    Without a program, for a cost that is no sum over layers, the best of some random ones and of neighbours of the best
    known one, that are not known.
    """
    if program is not None:
        values = usable(effects.of_slots(space), space, table)
        allocations = program.solve(values, budget, gap=GAP)
        return allocations[0].config if allocations else None
    drawn = [space.sample(random) for _ in range(RANDOM)]
    best = min((config for config in known if affordable(cost, config, budget)), key=effects, default=None)
    if best is not None:
        neighbours = space.neighbours(best)
        drawn += [neighbours[int(i)] for i in random.permutation(len(neighbours))[:NEIGHBOURS]]
    drawn = [config for config in dict.fromkeys(drawn) if config not in known and affordable(cost, config, budget)]
    return min(drawn, key=effects, default=None)


def usable(values: Sequence[Sequence[float]], space: SearchSpace, table: SensitivityTable | None) -> list[list[float]]:
    """Effects with infinity at the choices that break the network, by what the sensitivities say."""
    if table is None:
        return [list(of_slot) for of_slot in values]
    return [
        [
            value if all(math.isfinite(table.of(layer, slot.tensor, c)) for layer in slot.layers) else math.inf
            for value, c in zip(of_slot, slot.choices, strict=True)
        ]
        for of_slot, slot in zip(values, space.slots, strict=True)
    ]


def variant(
    space: SearchSpace,
    cost: Callable[[PrecisionConfig], float],
    config: PrecisionConfig | None,
    known: Container[PrecisionConfig],
    budget: float,
    random: np.random.Generator,
    effects: Effects | None = None,
) -> PrecisionConfig | None:
    """An unknown neighbour of a config within the budget, the best under `effects`; None where there is none."""
    if config is None:
        return None
    neighbours = space.neighbours(config)
    drawn = [neighbours[int(i)] for i in random.permutation(len(neighbours))[:NEIGHBOURS]]
    new = [other for other in drawn if other not in known and affordable(cost, other, budget)]
    return min(new, key=effects, default=None) if effects is not None else next(iter(new), None)
