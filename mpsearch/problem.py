"""A study made concrete: its task, the layers of its network, the configs there are, and what they cost."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mpsearch.cost.device import cycles_model, function_model, table_model
from mpsearch.cost.model import CostModel, RelativeCost
from mpsearch.errors import CostError, HardwareError, MpsearchError, RunError, TaskError, WriteError
from mpsearch.facts import ProblemFacts, cost_key, price_study, read_facts
from mpsearch.files import write_text
from mpsearch.graph.facts import LayerInfo
from mpsearch.graph.inputs import samples_of, tensors
from mpsearch.hardware.profile import Allowed, Profile, load_profile, profile_path, table_path
from mpsearch.hardware.table import read_table
from mpsearch.precision import LayerPrecision
from mpsearch.private.torch import BatchNormNd
from mpsearch.program import ROUNDING, program_of
from mpsearch.quant.prepare import inspect_network
from mpsearch.record import RunFolder
from mpsearch.space.build import build_space
from mpsearch.space.space import SearchSpace
from mpsearch.space.spec import load_space
from mpsearch.state_dict import digest
from mpsearch.study import StudySpec, comparable, names_function, read_spec
from mpsearch.task.factory import find_function
from mpsearch.task.load import load_task
from mpsearch.task.scoring import comparison_of, evaluate, metric_of
from mpsearch.task.task import Split, Task, Warns
from mpsearch.train import batch_norm_gap
from mpsearch.trust import require_trust
from mpsearch.units import show

logger = logging.getLogger(__name__)

GAP_SAMPLES = 256
"""Samples whose statistics are compared with BatchNorm's, as far as they have no more than `GAP_ELEMENTS` numbers."""

GAP_ELEMENTS = 2**24

WIDE_GAP = 0.15
"""Nats of `batch_norm_gap` from which it is worth a warning.

A ResNet-20: 0.02 with the black margins of its training, 0.45 with mirrored ones, which cost its W8A8 3.9 points.
"""


@dataclass(frozen=True, kw_only=True)
class Problem(ProblemFacts):
    """The facts of a study's problem together with its task, loaded."""

    task: Task

    def warnings(self) -> list[str]:
        """What about the study and its network looks wrong, in words: a forward pass or two."""
        warnings = [*self.graph.notes, *self.space.notes]
        if not self.space.free:
            warnings.append(
                f"space '{self.space.name}' leaves nothing to choose: its one config is trained and scored, and that "
                "is all; to search, give some layer more than one precision"
            )
        warm_start = self.spec.warm_start
        low = [budget for budget in warm_start.budgets if budget < self.cheapest]
        if low and (warm_start.method == "gdnsq" or warm_start.ilp) and self.space.free:
            warnings.append(
                f"warm_start.budgets: {', '.join(f'{budget:g}' for budget in low)} cannot be met, the cheapest config "
                f"of space '{self.space.name}' costs {self.cheapest:.3g}: give higher ones, or allow lower precisions"
                + (
                    "; the descent takes as many, spread over what there is"
                    if len(low) == len(warm_start.budgets)
                    else ""
                )
            )
        if isinstance(self.task, Warns):
            warnings += self.task.warnings()
        return warnings + self._norm_warnings()

    def _norm_warnings(self) -> list[str]:
        model, settings = self.task.float_model(), self.spec.trial
        if not any(isinstance(module, BatchNormNd) for module in model.modules()):
            return []
        warnings = []
        if settings.batch_size == 1 and (settings.steps or settings.bn_batches):
            warnings.append(
                "trial.batch_size is 1, so that BatchNorm normalizes each sample by itself: trials train another "
                "network than the one that is scored; set it to 2 or more (16 is usual)"
            )
        compared = comparison_of(self.task)
        if compared is None or not compared.classes:
            return warnings
        x, _ = next(iter(self.task.train_batches(settings.batch_size, 1, seed=0)))
        largest = max((tensor.numel() for tensor in tensors(x)), default=0) / max(1, samples_of(x))
        if settings.batch_size < GAP_SAMPLES and largest * GAP_SAMPLES <= GAP_ELEMENTS:
            x, _ = next(iter(self.task.train_batches(GAP_SAMPLES, 1, seed=0)))
        try:
            gap = batch_norm_gap(model, x, compared.rows) if samples_of(x) > 1 else 0.0
        except TaskError:  # outputs of no said kind: a trial that distils says so
            return warnings
        if gap >= WIDE_GAP:
            warnings.append(
                "with the BatchNorm statistics of a training batch the float network answers otherwise than with its "
                f"own ({gap:.2f} nats; a few hundredths are usual): it was trained on batches made in another way "
                "(normalization, order of colours, margins), or too briefly; trials are worse at first; see task.data"
            )
        return warnings


MOVED_TOLERANCE = 0.01
"""Relative difference of the float network's score between two processors that is no sign of other data."""


def open_problem(spec: StudySpec) -> Problem:
    """Load the task, inspect its network, build the space and the cost model; nothing is written.

    Raises:
        MpsearchError: whatever in the study cannot be used.
    """
    task = load_task(spec.task)
    model = task.float_model()
    float_digest = digest(model)
    space_spec = load_space(spec.space)
    calibration = task.calibration_input(spec.trial.calibration_samples)
    graph = inspect_network(model, calibration, products=space_spec.products)
    hardware = load_profile(spec.hardware)
    check_reference(spec, hardware, graph.layers)
    models = own_models(spec, hardware)
    main = models.get(cost_key(spec.cost.model, models))
    space = build_space(space_spec, graph.layers, hardware, None if main is None else known_pairs(main))
    cost, costs = price_study(spec, graph.layers, models)
    cheapest, dearest = cost.bounds(space.options)
    if spec.cost.budget is not None and spec.cost.budget < cheapest:
        raise CostError(
            f"cost.budget is {spec.cost.budget:g}, but the cheapest config of space '{space.name}' costs "
            f"{cheapest:.4g} of {spec.cost.reference}: raise the budget, or allow lower precisions in the space"
        )
    check_limits(spec, space, cost)
    return Problem(
        spec=spec,
        task_name=task.name,
        metric=metric_of(task),
        graph=graph,
        space=space,
        cost=cost,
        costs=costs,
        cheapest=cheapest,
        dearest=dearest,
        float_digest=float_digest,
        task=task,
    )


def own_models(spec: StudySpec, hardware: Profile) -> dict[str, CostModel]:
    """The cost models that are no formula: of the hardware, and a function that the study names; by their names.

    Raises:
        MpsearchError: the table or the function cannot be used.
    """
    models: dict[str, CostModel] = {}
    if hardware.cost is not None:
        if hardware.cost.table is not None:
            table = read_table(table_path(profile_path(spec.hardware), hardware))
            models["latency_us"] = table_model(table, hardware.cost)
        else:
            models["latency_cycles"] = cycles_model(hardware.cost)
    for name in dict.fromkeys([spec.cost.model, *spec.cost.limits]):
        if names_function(name):
            models[name] = function_model(name, find_function("cost.model", name))
    return models


def known_pairs(model: CostModel) -> Callable[[LayerInfo, LayerPrecision], bool]:
    """Whether a cost model that knows some pairs alone has a number for a layer at a pair."""

    def known(layer: LayerInfo, pair: LayerPrecision) -> bool:
        try:
            return all(part.of(layer, pair) >= 0 for part in model.parts)
        except CostError:
            return False

    return known


def check_reference(spec: StudySpec, hardware: Profile, layers: Sequence[LayerInfo]) -> None:
    """Whether the hardware runs what costs are relative to, on some layer at least.

    Raises:
        HardwareError: it does not.
    """
    reference = LayerPrecision.shorthand(spec.cost.reference)
    free = [layer for layer in layers if layer.reason is None]
    if not any(Allowed(hardware.allowed(layer), hardware.granularity, layer)(reference) for layer in free):
        raise HardwareError(
            f"cost.reference is {spec.cost.reference}, which hardware '{hardware.name}' does not run: it runs "
            f"{', '.join(hardware.pairs)}; give one of them as cost.reference"
        )


def check_limits(spec: StudySpec, space: SearchSpace, cost: RelativeCost) -> None:
    """Whether some config keeps the study's limits, and its budget.

    Raises:
        CostError: none does; the message says what could be kept instead.
    """
    if not cost.limits:
        return
    for bound in cost.limits:
        if bound.cost.combined_by in (sum, max):
            cheapest, _ = bound.cost.bounds(space.options)
            if cheapest > bound.most:
                unit = bound.cost.reference.unit
                raise CostError(
                    f"cost.limits: no config of space '{space.name}' has {bound}; the least there is is "
                    f"{show(cheapest * bound.cost.reference.total, unit)}: raise the limit, or allow lower precisions "
                    "in the space"
                )
    program = program_of(space, cost)
    if program is None:
        return
    excess, config = program.least_excess(math.inf if spec.cost.budget is None else spec.cost.budget)
    if excess > 1 + ROUNDING:
        nearest = [f"{b.name} <= {show(b.cost.absolute(config).total, b.cost.reference.unit)}" for b in cost.limits] + (
            [] if spec.cost.budget is None else [f"cost.budget {cost(config):.4g}"]
        )
        raise CostError(
            f"cost.limits: each can be kept, but no config of space '{space.name}' keeps all of them"
            + (" and cost.budget" if spec.cost.budget is not None else "")
            + f" ({'; '.join(map(str, cost.limits))}): the nearest config has {', '.join(nearest)}; raise some, or "
            "allow lower precisions in the space"
        )


def reopen(folder: RunFolder, spec: StudySpec | None = None) -> Problem:
    """The problem of a run, opened again; a run folder without its facts (an older one) gets them.

    Args:
        folder: of the run.
        spec: its study, where that has been read (and changed) already.

    Raises:
        RunError: study, space, float network or metric are not those that the run began with, or the study names code
            and the run is not trusted (`mpsearch.trust`).
        StudyError: the task is read from an environment variable that is not set.
        MpsearchError: as `open_problem`.
    """
    spec = spec or read_spec(folder)
    spec.check_variables()
    new = f"or start a new run with `mpsearch run {folder.study_yaml} --out NEW_FOLDER`"
    try:
        facts = read_facts(folder)
    except RunError:  # what can be made again is made again
        facts = None
    if facts is not None and (changes := _changes(facts.began, comparable(spec))):
        raise RunError(
            f"{folder.study_yaml} is not the study that the run began with, and trials of both would not be "
            f"comparable:\n{changes}\nWrite the old values again, {new}"
        )
    require_trust(folder, spec)
    try:
        problem = open_problem(spec)
    except MpsearchError as error:
        copies = (folder.space_yaml, folder.hardware_yaml, folder.hardware_csv)
        if any(str(path.absolute()) in str(error) for path in copies):  # nobody wrote it but us
            raise RunError(f"{error}; restore the file from a copy, {new}") from None
        raise
    was, now = folder.metric, problem.metric
    if (was.name, was.direction) != (now.name, now.direction):
        raise RunError(
            f"the trials of {folder.path} are scored by {was.name} ({was.direction}), its task now by {now.name} "
            f"({now.direction}): they could not be compared. Give the task its metric again, {new}"
        )
    folder.metric = now
    if facts is None:
        problem = replace(problem, notes=tuple(problem.warnings()))
        try:
            write_facts(folder, problem)
        except WriteError as error:  # of a folder that may only be read, a trial can be exported all the same
            logger.warning("%s", error)
        return problem
    if facts.space.pairs != problem.space.pairs and facts.space.slots == problem.space.slots:
        raise RunError(
            f"{folder.hardware_yaml} does not give the pairs that the run began with: restore the file, {new}"
        )
    if facts.space.slots != problem.space.slots:
        slots = [slot.name for slot in (*facts.space.slots, *problem.space.slots)]
        changed = sorted({slot.name for slot in {*facts.space.slots} ^ {*problem.space.slots}}, key=slots.index)
        raise RunError(
            f"{folder.space_yaml} does not give the search space that the run began with: the choices of "
            f"{', '.join(changed[:5])}{', ...' if len(changed) > 5 else ''} differ. Restore the file, {new}"
        )
    if facts.float_digest != problem.float_digest:
        raise RunError(
            f"the float network of {folder.path} is another one than when the run began (its weights' digest was "
            f"{facts.float_digest} and is {problem.float_digest}): trials of both would not be comparable. Give "
            f"{problem.spec.task.checkpoint or 'the network'} its old weights again, {new}"
        )
    return replace(problem, float_scores=facts.float_scores, notes=facts.notes, began=facts.began)


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """A line for each key of a study whose value is another one; keys that only one version has do not count."""
    return "\n".join(
        f"  {key} was {before[key]!r} and is {now[key]!r}" for key in before if key in now and before[key] != now[key]
    )


def check_moved(problem: Problem, folder: RunFolder) -> None:
    """See that a run whose files are looked for elsewhere still has its data: the float network scores as it did.

    Raises:
        RunError: it does not.
    """
    was = problem.float_scores.get("val")
    if was is None:
        return
    now = evaluate(problem.task, problem.task.float_model(), "val")
    if not math.isclose(now, was, rel_tol=MOVED_TOLERANCE):
        show = problem.metric.show
        raise RunError(
            f"the float network of {folder.path} scored {show(was)} on val when the run began and scores {show(now)} "
            "with the data that it is given now: give it the same data"
        )


def with_float_scores(problem: Problem, *splits: Split) -> Problem:
    """The problem with the scores of its float network on these splits, measured where they are not known."""
    missing = [split for split in splits if split not in problem.float_scores]
    if not missing:
        return problem
    model = problem.task.float_model()
    scores: dict[str, float] = {split: evaluate(problem.task, model, split) for split in missing}
    return replace(problem, float_scores={**problem.float_scores, **scores})


def write_facts(folder: RunFolder, facts: ProblemFacts) -> None:
    """Write `problem.json`, whole or not at all. Raises WriteError where it cannot."""
    write_text(folder.problem_json, facts.to_json(), sync=True)
