"""What a study starts from: configs to try first, and weights that trials start from.

Both come from one descent (`descent.py`) and, as control, from one sensitivity table (`sensitivity.py`, `allocate.py`).
All of it is kept in the run folder's `warmstart/`, so that a resumed run finds it there and pays once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from mpsearch.cost.model import RelativeCost
from mpsearch.graph.layers import ModelGraph
from mpsearch.precision import PrecisionConfig
from mpsearch.record import Origin
from mpsearch.search.trial import Workbench
from mpsearch.space import SearchSpace
from mpsearch.study import StudySpec
from mpsearch.task.task import Task
from mpsearch.warmstart.allocate import ilp_ladder, round_bits
from mpsearch.warmstart.descent import Descent, Snapshot, descend
from mpsearch.warmstart.sensitivity import SensitivityTable, measure

logger = logging.getLogger(__name__)

Anchor = tuple[Origin, PrecisionConfig]

SENSITIVITY_SAMPLES = 512
REACH = 1.0
"""Bits that rounding moves a tensor at most: to one of the two whole numbers beside what was learned."""
DISTANCE = 2
"""Slots in which two roundings of one snapshot differ at least: those that differ in one hardly differ in accuracy."""


def warm_start(
    spec: StudySpec,
    task: Task,
    graph: ModelGraph,
    space: SearchSpace,
    cost: RelativeCost,
    folder: Path,
    on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> list[Anchor]:
    """Configs to try after the uniform ladder, the most telling first; descends and measures where `folder` has not.

    Args:
        spec: the study.
        task: its task.
        graph: the layers of its network.
        space: the configs that there are.
        cost: prices them.
        folder: of the warm start, made where it is missing.
        on_progress: called with (stage, done, total).

    Raises:
        MpsearchError: the space or the cost model cannot be descended.
        FloatingPointError: the descent diverged.
    """
    settings = spec.warm_start
    descended: list[list[PrecisionConfig]] = []
    if settings.method == "gdnsq":
        descent = _descent(spec, task, space, cost, folder, on_progress)
        descended = [rounded(snapshot, space, cost, settings.neighbours) for snapshot in descent.snapshots]
    allocated: list[PrecisionConfig] = []
    if settings.ilp:
        table = _table(task, graph, space, folder, on_progress)
        cheapest = min(map(cost, space.ladder()))
        allocated = [a.config for a in ilp_ladder(space, cost, table, [b for b in settings.budgets if b >= cheapest])]
    first: list[Anchor] = [("descent", configs[0]) for configs in descended]
    control: list[Anchor] = [("ilp", config) for config in allocated]
    by_rank = zip_longest(*(configs[1:] for configs in descended))
    others: list[Anchor] = [("descent", config) for rank in by_rank for config in rank if config is not None]
    return [*first, *control, *others]


def rounded(snapshot: Snapshot, space: SearchSpace, cost: RelativeCost, count: int) -> list[PrecisionConfig]:
    """The `count` best whole-bit configs near a snapshot, exactly within its budget, best first."""
    members = [(slot, name) for slot in space.slots for name in slot.layers]
    bits = {(name, slot.tensor): snapshot.bits[slot.name] for slot, name in members}
    marginals = {(name, slot.tensor): -snapshot.slopes[slot.name] / len(slot.layers) for slot, name in members}
    found = round_bits(space, cost, bits, marginals, snapshot.budget, count, reach=REACH, distance=DISTANCE)
    return [allocation.config for allocation in found]


class StartWeights:
    """The weights that a trial starts from: those of the snapshot nearest in cost; None without a descent."""

    def __init__(self, folder: Path) -> None:
        self._descent = Descent.load(folder) if (folder / "descent.json").exists() else None

    def at(self, cost: float) -> Mapping[str, Tensor] | None:
        """For a config of this relative cost."""
        return None if self._descent is None else self._descent.nearest(cost).weights


def _descent(
    spec: StudySpec,
    task: Task,
    space: SearchSpace,
    cost: RelativeCost,
    folder: Path,
    on_progress: Callable[[str, int, int], None],
) -> Descent:
    if (folder / "descent.json").exists():
        return Descent.load(folder)
    settings = spec.warm_start
    torch.manual_seed(settings.seed)
    bench = Workbench(task, spec.trial.model_copy(update={"steps": settings.steps}))
    descent = descend(
        bench,
        space,
        cost,
        settings.budgets,
        settings.steps,
        settings.seed,
        on_step=lambda step, _loss: on_progress("descent", step + 1, settings.steps),
    )
    descent.save(folder)
    logger.info("descent: %d snapshots in %.0f s", len(descent.snapshots), descent.seconds)
    return descent


def _table(
    task: Task, graph: ModelGraph, space: SearchSpace, folder: Path, on_progress: Callable[[str, int, int], None]
) -> SensitivityTable:
    path = folder / "sensitivity.json"
    if path.exists():
        return SensitivityTable.load(path)
    on_progress("sensitivity", 0, 1)
    x = task.calibration_input(SENSITIVITY_SAMPLES)
    table = measure("kl", task.float_model(), graph.layers, space, x, task.logits)
    folder.mkdir(parents=True, exist_ok=True)
    table.save(path)
    on_progress("sensitivity", 1, 1)
    logger.info("sensitivity: %d entries in %.0f s", len(table), table.seconds)
    return table
