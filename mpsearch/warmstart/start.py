"""What a study starts from: configs to try first.

They come from one descent (`descent.py`); a sensitivity table (`sensitivity.py`, `allocate.py`) gives the baseline.
All of it is kept in the run folder's `warmstart/`, so that a resumed run finds it there and pays once.
"""

from __future__ import annotations

import logging
import math
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch

from mpsearch.cost.model import RelativeCost
from mpsearch.errors import DivergedError, RunError
from mpsearch.files import make_folder
from mpsearch.graph.facts import ModelGraph
from mpsearch.graph.inputs import map_tensors
from mpsearch.observer import SILENT, Observer
from mpsearch.pareto import non_dominated
from mpsearch.precision import PrecisionConfig
from mpsearch.program import Allocation, program_of
from mpsearch.record import InitialConfig
from mpsearch.space.order import ends_first
from mpsearch.space.space import SearchSpace
from mpsearch.study import StudySpec
from mpsearch.task.scoring import comparison_of
from mpsearch.task.task import Task
from mpsearch.train import usual_device
from mpsearch.warmstart.allocate import equivalent_bits, ilp_ladder, round_bits
from mpsearch.warmstart.descent import BitCost, Descent, Snapshot, descend, reachable_budgets
from mpsearch.warmstart.sensitivity import measure
from mpsearch.warmstart.table import SensitivityTable
from mpsearch.workbench import Workbench, channels_last

logger = logging.getLogger(__name__)
progress = logging.getLogger("mpsearch.progress")

SENSITIVITY_SAMPLES = 128
"""On a ResNet-20 the ILP ladder of another 128 images disturbs the network no more than that of another 256."""
REACH = 1.0
"""Bits that rounding moves a tensor at most: to one of the two whole numbers beside what was learned."""
DISTANCE = 2
"""Slots in which two roundings of one snapshot differ at least: those that differ in one hardly differ in score."""


def warm_start(
    spec: StudySpec,
    task: Task,
    graph: ModelGraph,
    space: SearchSpace,
    cost: RelativeCost,
    folder: Path,
    observer: Observer = SILENT,
) -> list[InitialConfig]:
    """Configs to try after the uniform ladder, the most telling first; descends and measures where `folder` has not.

    Args:
        spec: the study.
        task: its task.
        graph: the layers of its network.
        space: the configs that there are.
        cost: prices them.
        folder: of the warm start, made where it is missing.
        observer: told of its stages, `sensitivity` and `descent`.

    Raises:
        MpsearchError: the space or the cost model cannot be descended.
    """
    settings = spec.warm_start
    descended: list[list[PrecisionConfig]] = []
    allocated: list[PrecisionConfig] = []
    combined: list[PrecisionConfig] = []
    table: SensitivityTable | None = None
    descends = settings.method == "gdnsq"
    check_descent(spec, space, cost)  # before anything is measured
    if settings.ilp or settings.combinations or (descends and space.several_types):
        observer.on_stage("sensitivity", 0, 1)
        table = sensitivity_table("kl", task, graph, space, folder)
        observer.on_stage("sensitivity", 1, 1)
        combined = global_combinations(space, cost, table, settings.combinations)
    if descends:
        try:
            descent = _descent(spec, task, graph, space, cost, folder, observer)
        except DivergedError as error:  # its configs would be a help, and no more
            progress.warning("the search goes on without its descent: %s", error)
            descent = None
        if descent is not None and (count := settings.neighbours):
            least = least_cost(space, cost) if cost.limits else 0.0
            descended = [
                rounded(descent, s.budget, space, cost, count, table) for s in descent.snapshots if s.budget >= least
            ]
    if settings.ilp and table is not None:
        cheapest = least_cost(space, cost) if cost.limits else min(map(cost, space.ladder()))
        allocated = [a.config for a in ilp_ladder(space, cost, table, [b for b in settings.budgets if b >= cheapest])]
    grid: list[InitialConfig] = [("uniform", config) for config in ends_first(combined)]
    known: list[list[PrecisionConfig] | None] = [
        None,
        *descended,
    ]  # the dear end is uniform, and tried before
    first: list[InitialConfig] = [("descent", configs[0]) for configs in ends_first(known) if configs]
    # With several types the cheap end is none of the ladder's.
    cheap_end: list[InitialConfig] = [("uniform", cheapest_combination(space, cost, table))] if first else []
    baseline: list[InitialConfig] = [("ilp", config) for config in allocated]
    by_rank = zip_longest(*(configs[1:] for configs in descended))
    others: list[InitialConfig] = [("descent", config) for rank in by_rank for config in rank if config is not None]
    return [*first, *cheap_end, *baseline, *grid, *others]


def warms(spec: StudySpec) -> bool:
    """Whether a study has a warm start; one without is a cold search."""
    warm = spec.warm_start
    return warm.method != "none" or warm.ilp or warm.combinations > 0


def check_descent(spec: StudySpec, space: SearchSpace, cost: RelativeCost) -> None:
    """Whether a study's descent can begin, if it has one.

    Raises:
        MpsearchError: the space or the cost model cannot be descended, or no budget can be met.
    """
    if spec.warm_start.method == "gdnsq":
        reachable_budgets(BitCost(cost, space), space, spec.warm_start.budgets)


def rounded(
    descent: Descent,
    budget: float,
    space: SearchSpace,
    cost: RelativeCost,
    count: int,
    table: SensitivityTable | None = None,
) -> list[PrecisionConfig]:
    """The `count` best configs within a budget, best first: near the snapshot from which least loss is foreseen.

    With uniform quantizers alone that is the snapshot at this budget. What other types are worth is read from `table`;
    being cheaper, they can bring a dearer snapshot's bits within the budget. Without a table they are left out.
    """
    members = [(slot, name) for slot in space.slots for name in slot.layers]
    equivalent = None if table is None else equivalent_bits(table)

    def near(snapshot: Snapshot, count: int) -> list[Allocation]:
        bits = {(name, slot.tensor): snapshot.bits[slot.name] for slot, name in members}
        marginals = {(name, slot.tensor): -snapshot.slopes[slot.name] / len(slot.layers) for slot, name in members}
        return round_bits(
            space, cost, bits, marginals, budget, count, reach=REACH, distance=DISTANCE, equivalent=equivalent
        )

    snapshots = [s for s in descent.snapshots if s.budget == budget or (s.budget > budget and space.several_types)]
    best = min(snapshots, key=lambda snapshot: snapshot.loss + near(snapshot, 1)[0].value)
    return [allocation.config for allocation in near(best, count)]


def least_cost(space: SearchSpace, cost: RelativeCost) -> float:
    """Relative cost of the cheapest config that keeps the study's limits, as far as a program can tell."""
    cheapest, _ = cost.bounds(space.options)
    if not cost.limits or (program := program_of(space, cost)) is None:
        return cheapest
    return cost(program.cheapest())


def cheapest_combination(space: SearchSpace, cost: RelativeCost, table: SensitivityTable | None) -> PrecisionConfig:
    """The global combination that costs least; of those that cost the same, the least sensitive one."""
    return min(space.combinations(), key=lambda c: (cost(c), 0.0 if table is None else _known(table.total(c))))


def global_combinations(
    space: SearchSpace, cost: RelativeCost, table: SensitivityTable, count: int
) -> list[PrecisionConfig]:
    """Up to `count` global combinations beside the ladder that nothing global beats in cost and sensitivity at once.

    They are spread evenly in log cost, dear ones first. A combination that costs more than another one and disturbs the
    network more, as w8a2 does, is no baseline that anybody needs.
    """
    totals = ((i, c, _known(table.total(c))) for i, c in enumerate(space.combinations()))
    priced = sorted((cost(c), harm, i, c) for i, c, harm in totals if math.isfinite(harm))
    ladder = set(space.ladder())
    best = [priced[i] for i in non_dominated([(price, harm) for price, harm, _, _ in priced], (False, False))]
    candidates = [(math.log2(price), config) for price, _, _, config in best if config not in ladder]
    if len(candidates) > count:
        places = np.linspace(candidates[0][0], candidates[-1][0], count)
        nearest = {min(range(len(candidates)), key=lambda i: abs(candidates[i][0] - at)) for at in places}
        candidates = [candidates[i] for i in sorted(nearest)]
    return [config for _, config in reversed(candidates)]


def _known(sensitivity: float) -> float:
    return math.inf if math.isnan(sensitivity) else sensitivity


def _descent(
    spec: StudySpec,
    task: Task,
    graph: ModelGraph,
    space: SearchSpace,
    cost: RelativeCost,
    folder: Path,
    observer: Observer,
) -> Descent:
    if (folder / "descent.json").exists():
        try:
            return Descent.load(folder)
        except RunError as error:
            progress.warning("%s: that is done now", error)
    settings = spec.warm_start
    torch.manual_seed(settings.seed)
    observer.on_stage("descent", 0, settings.steps)
    workbench = Workbench(task, spec.trial.of_one_length(settings.steps), graph=graph)
    descent = descend(
        workbench,
        space,
        cost,
        settings.budgets,
        settings.steps,
        settings.seed,
        spread=settings.spread,
        on_step=lambda step, _loss: observer.on_stage("descent", step + 1, settings.steps),
    )
    descent.save(folder)
    logger.info("descent: %d snapshots in %.0f s", len(descent.snapshots), descent.seconds)
    return descent


def sensitivity_table(proxy: str, task: Task, graph: ModelGraph, space: SearchSpace, folder: Path) -> SensitivityTable:
    """The table of a proxy: from the warm start's folder, or measured and put there.

    Raises:
        MpsearchError: no such proxy.
    """
    path = folder / ("sensitivity.json" if proxy == "kl" else f"sensitivity-{proxy}.json")
    if path.exists():
        try:
            return SensitivityTable.load(path)
        except RunError as error:
            progress.warning("%s: that is done now", error)
    device = usual_device()
    x = map_tensors(lambda tensor: tensor.to(device), task.calibration_input(SENSITIVITY_SAMPLES))
    model = channels_last(task.float_model()).to(device)
    table = measure(proxy, model, graph.layers, space, x, comparison_of(task))
    make_folder(folder)
    table.save(path)
    logger.info("sensitivity (%s): %d entries in %.0f s", proxy, len(table), table.seconds)
    return table
