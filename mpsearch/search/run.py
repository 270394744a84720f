"""run_study: from a study to its Pareto front. Each line of `run_study` is one stage of the system."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

from mpsearch.cost.model import RelativeCost
from mpsearch.errors import CostError, RunError, SpaceError
from mpsearch.exporters.native import load_tensors, save_weights
from mpsearch.graph.layers import ModelGraph, inspect_model
from mpsearch.precision import PrecisionConfig
from mpsearch.record import RunFolder, TrialRecord
from mpsearch.search.controller import Proposal, SearchController
from mpsearch.search.engine import Event, Finished, run_trials
from mpsearch.search.front import ParetoFront, pareto_front
from mpsearch.search.trial import Workbench, run_trial
from mpsearch.search.view import open_view
from mpsearch.shipped import shipped
from mpsearch.space import SearchSpace, build_space, load_space
from mpsearch.study import StudySpec, parse_study
from mpsearch.task.load import load_task
from mpsearch.task.task import Task
from mpsearch.train import batch_norm_gap
from mpsearch.warmstart.start import StartWeights, warm_start

logger = logging.getLogger(__name__)

WIDE_GAP = 0.15
"""Nats of `batch_norm_gap` from which it is worth a warning.

A ResNet-20: 0.02 with the black margins of its training, 0.45 with mirrored ones, which cost its W8A8 3.9 points.
"""

OnProgress = Callable[[str, int, int], None]
"""(stage, done, total) -> None."""


@dataclass(frozen=True)
class Problem:
    """A study made concrete: its task, the layers of its network, the configs there are, and what they cost."""

    spec: StudySpec
    task: Task
    graph: ModelGraph
    space: SearchSpace
    cost: RelativeCost
    cheapest: float  # relative cost of the cheapest config
    dearest: float

    @property
    def layers(self) -> tuple[str, ...]:
        """The quantizable layers in execution order."""
        return self.space.layers

    def summary(self) -> list[str]:
        """What is optimised, in words and units."""
        spec, costs = self.spec, self.cost
        quantizable, unhandled = self.graph.quantizable, self.graph.unhandled
        macs = self.graph.macs
        lines = [
            f"Maximize {spec.task.metric} on the validation split and minimize {spec.cost.model} of {self.task.name}.",
            f"Cost 1 is {costs.reference.total:.4g} {costs.reference.unit} a sample: the network at "
            f"{spec.cost.reference} everywhere. Configs of the space '{self.space.name}' cost {self.cheapest:.3g} to "
            f"{self.dearest:.3g}"
            + (f"; only those up to {spec.cost.budget:g} are tried." if spec.cost.budget else "."),
            f"{len(quantizable)} layers, {macs / 1e6:.3g} million MACs a sample; {len(self.space.free)} free choices, "
            f"{scientific(self.space.size)} configs; the uniform ladder of {len(self.space.ladder())} is the control.",
        ]
        if unhandled:
            names = ", ".join(layer.name for layer in unhandled[:5]) + (", ..." if len(unhandled) > 5 else "")
            lines.append(
                f"{len(unhandled)} layers stay float and are priced as float: {names} (see `mpsearch inspect`)."
            )
        if other := sum(self.graph.other_macs.values()):
            lines.append(f"{other / macs:.1%} of the MACs are outside layers (attention products, say) and not priced.")
        return lines

    def doubts(self) -> list[str]:
        """What about the task looks wrong, in words: a forward pass or two."""
        x, _ = next(iter(self.task.train_batches(256, 1, seed=0)))
        gap = batch_norm_gap(self.task.float_model(), x, self.task.logits)
        if gap < WIDE_GAP:
            return []
        return [
            "with the BatchNorm statistics of a training batch the float network answers otherwise than with its own "
            f"({gap:.2f} nats; a few hundredths are usual): it was trained on batches made in another way "
            "(normalization, order of colours, margins), and trials will do harm before they do good; see task.data"
        ]


def open_problem(spec: StudySpec) -> Problem:
    """Load the task, inspect its network, build the space and the cost model; nothing is written.

    Raises:
        MpsearchError: whatever in the study cannot be used.
    """
    task = load_task(spec.task)
    graph = inspect_model(task.float_model(), task.calibration_input(min(32, spec.trial.calibration_samples)))
    space = build_space(load_space(spec.space), graph.layers)
    cost = RelativeCost(graph.layers, spec.cost.model, spec.cost.reference)
    choices: dict[str, dict[str, Sequence[Any]]] = {name: {} for name in space.layers}
    for slot in space.slots:
        for name in slot.layers:
            choices[name][slot.tensor] = slot.choices
    cheapest, dearest = cost.bounds({name: (c["weight"], c["activation"]) for name, c in choices.items()})
    if spec.cost.budget is not None and spec.cost.budget < cheapest:
        raise CostError(
            f"cost.budget is {spec.cost.budget:g}, but the cheapest config of space '{space.name}' costs "
            f"{cheapest:.4g} of {spec.cost.reference}: raise the budget, or allow lower precisions in the space"
        )
    return Problem(spec, task, graph, space, cost, cheapest, dearest)


def run_study(
    spec: StudySpec,
    out: str | Path | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    on_ready: Callable[[Problem, RunFolder], None] = lambda problem, folder: None,
    on_progress: OnProgress = lambda stage, done, total: None,
) -> ParetoFront:
    """Run a study in a new run folder and return its front.

    Args:
        spec: the study.
        out: the run folder; default `runs/<name>`.
        on_event: called when a trial starts or has ended.
        on_ready: called once when everything is loaded and checked.
        on_progress: called during the warm start with (stage, done, total).

    Raises:
        MpsearchError: the study cannot be used, or the search had to be given up.
    """
    problem = open_problem(spec)
    space_yaml = shipped("search_spaces", spec.space, SpaceError).read_text(encoding="utf-8")
    folder = RunFolder.create(out or Path("runs") / spec.name, spec.to_yaml(), space_yaml)
    return _search(problem, folder, on_event, on_ready, on_progress)


def resume_study(
    run: str | Path,
    on_event: Callable[[Event], None] = lambda event: None,
    on_ready: Callable[[Problem, RunFolder], None] = lambda problem, folder: None,
    trials: int | None = None,
    on_progress: OnProgress = lambda stage, done, total: None,
) -> ParetoFront:
    """Go on with a run, whatever ended it; `trials` changes how many are wanted in all.

    Raises:
        MpsearchError: as `run_study`.
    """
    folder = RunFolder.open(run)
    spec = read_spec(folder)
    if trials is not None:
        spec = spec.model_copy(update={"search": spec.search.model_copy(update={"trials": trials})})
    return _search(open_problem(spec), folder, on_event, on_ready, on_progress)


def read_spec(folder: RunFolder) -> StudySpec:
    """The resolved study of a run, with its own copy of the search space.

    Raises:
        RunError: it cannot be read.
        StudyError: it is no study.
    """
    try:
        document = yaml.safe_load(folder.study_yaml.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunError(f"cannot read {folder.study_yaml}: {error}") from None
    spec = parse_study(document, source=str(folder.study_yaml))
    return spec.model_copy(update={"space": str(folder.space_yaml)}) if folder.space_yaml.exists() else spec


def _search(
    problem: Problem,
    folder: RunFolder,
    on_event: Callable[[Event], None],
    on_ready: Callable[[Problem, RunFolder], None],
    on_progress: OnProgress,
) -> ParetoFront:
    spec = problem.spec
    with folder.driving():
        records = folder.records()
        view = open_view(spec.storage, folder, spec.name, problem.space, spec.cost.budget, records, problem.cost)
        folder.checkpoints.mkdir(exist_ok=True)
        on_ready(problem, folder)
        began = time.monotonic()
        anchors = warm_start(
            spec, problem.task, problem.graph, problem.space, problem.cost, folder.warmstart, on_progress
        )
        controller = SearchController(
            problem.space,
            problem.cost,
            spec.search,
            spec.cost.budget,
            anchors,
            records,
            started=began,
        )
        weights = _FrontWeights(folder, records)

        def ended(event: Event) -> None:
            if isinstance(event, Finished):
                weights.keep(event.record)
                write_front(problem, folder, weights.front)
            on_event(event)

        make_runner = functools.partial(
            trial_runner, spec, str(folder.checkpoints.resolve()), str(folder.warmstart.resolve())
        )
        try:
            run_trials(controller, folder, view, make_runner, spec.engine, spec.search.concurrency, ended)
        finally:
            if folder.records():
                folder.write_parquet()
    if controller.broken:
        raise RunError(f"the search was given up: {controller.stop_reason}")
    return pareto_front(folder.records())


def trial_runner(spec: StudySpec, checkpoints: str, warmstart: str) -> Callable[[Proposal], TrialRecord]:
    """What a worker process does with proposals: called once there, it loads the task and sets up a workbench."""
    problem = open_problem(spec)
    task = problem.task
    bench = Workbench(task, spec.trial, offers=problem.space.offers)

    start = start_weights(spec, Path(warmstart))

    def run(proposal: Proposal) -> TrialRecord:
        record = run_trial(task, proposal.config, spec.trial, start(proposal.cost), bench=bench, bars=proposal.bars)
        if record.state == "complete":
            save_weights(bench.model, checkpoint_path(Path(checkpoints), proposal.number))
        return record

    return run


def start_weights(spec: StudySpec, warmstart: Path) -> Callable[[float], Mapping[str, Tensor] | None]:
    """Relative cost -> the weights that a trial of this study starts from; None: the float model's."""
    if not spec.warm_start.reuse_weights:
        return lambda cost: None
    return StartWeights(warmstart).at


def score_config(problem: Problem, folder: RunFolder, config: PrecisionConfig) -> TrialRecord:
    """Run a config that nobody proposed as a trial of a run, and put it on the record; known configs are not run again.

    Raises:
        MpsearchError: the run is being driven by another process, or the config does not fit the network.
    """
    with folder.driving():
        records = folder.records()
        if known := [r for r in records if r.config == config and r.state == "complete"]:
            return known[0]
        bench = Workbench(problem.task, problem.spec.trial, offers=config.offers)
        start = start_weights(problem.spec, folder.warmstart)(problem.cost(config))
        record = run_trial(problem.task, config, problem.spec.trial, start, bench=bench, cost=problem.cost)
        record = replace(record, number=max((r.number for r in records), default=-1) + 1)
        folder.checkpoints.mkdir(exist_ok=True)
        weights = _FrontWeights(folder, records)
        save_weights(bench.model, checkpoint_path(folder.checkpoints, record.number))
        folder.append(record)
        weights.keep(record)
        write_front(problem, folder, weights.front)
        folder.write_parquet()
    return record


def checkpoint_path(folder: Path, number: int) -> Path:
    """Where the weights and scales of a trial are, as long as it is on the front."""
    return folder / f"trial-{number}.safetensors"


def final_path(folder: Path, number: int) -> Path:
    """Where the finally trained weights and scales of a trial are: those of the seed that is best on val."""
    return folder / f"final-{number}.safetensors"


class _FrontWeights:
    """Keeps the weights of front trials and of the uniform ladder, and deletes those of dominated trials."""

    def __init__(self, folder: RunFolder, records: Sequence[TrialRecord]) -> None:
        self._folder = folder.checkpoints
        self.front = pareto_front(records)

    def keep(self, record: TrialRecord) -> None:
        """Take a record in; whatever is now dominated loses its weights."""
        known = {trial.number: trial for trial in (*self.front.trials, *self.front.ladder, record)}
        self.front = pareto_front(list(known.values()))
        for number in known.keys() - {trial.number for trial in (*self.front.trials, *self.front.ladder)}:
            checkpoint_path(self._folder, number).unlink(missing_ok=True)


def front_rows(front: ParetoFront) -> list[dict[str, Any]]:
    """The front as plain values, by rising cost: number, origin, accuracy, cost and the config of each trial."""
    return [
        {
            "number": trial.number,
            "origin": trial.origin,
            "accuracy": trial.accuracy,
            "cost": trial.cost,
            "knee": trial is front.knee,
            "layers": trial.config.to_json(),
        }
        for trial in front
    ]


def write_front(problem: Problem, folder: RunFolder, front: ParetoFront) -> None:
    """Write `front.json`: current after every trial."""
    folder.write_front(
        {
            "schema": "mpsearch/front/1",
            "study": problem.spec.name,
            "metric": problem.task.metric,
            "cost": {"model": problem.spec.cost.model, "reference": problem.spec.cost.reference},
            "hypervolume": front.hypervolume(problem.cheapest),
            "front": front_rows(front),
        }
    )


def trained_model(
    problem: Problem, folder: RunFolder, record: TrialRecord
) -> tuple[nn.Module, dict[str, float | None]]:
    """The quantized model of a finished trial, in eval mode, and what was measured of it by split.

    Weights are those of its final training, else of the trial; where these were not kept, the trial is run again.
    """
    from safetensors.torch import load_file

    bench = Workbench(problem.task, problem.spec.trial, offers=record.config.offers)
    finals = [f for f in folder.finals() if f.number == record.number]
    final, brief = final_path(folder.checkpoints, record.number), checkpoint_path(folder.checkpoints, record.number)
    measured: dict[str, float | None] = {"val": record.accuracy}
    if finals and final.exists():
        best = max(finals, key=lambda f: f.val)
        brief, measured = final, {"val": best.val, "test": best.test}
    if brief.exists():
        bench.reset(record.config)
        load_tensors(bench.model, load_file(brief))
        return bench.model.eval(), measured
    logger.warning("the weights of trial %d were not kept (it is not on the front): it is trained again", record.number)
    start = start_weights(problem.spec, folder.warmstart)(record.cost or 1.0)
    again = run_trial(problem.task, record.config, problem.spec.trial, start, bench=bench)
    return bench.model.eval(), {"val": again.accuracy}


def estimate_trial_s(problem: Problem, steps: int = 4) -> float:
    """Seconds that one trial should take in a process of its own: measured on a few eager steps, scoring included."""
    settings = problem.spec.trial.model_copy(update={"compile": False, "bn_batches": 0})
    bench = Workbench(problem.task, settings, offers=problem.space.offers)
    bench.reset(problem.space.ladder()[0])
    bench.fit(1, seed=0)
    clock = time.perf_counter()
    bench.fit(steps, seed=0)
    step_s = (time.perf_counter() - clock) / steps
    clock = time.perf_counter()
    problem.task.evaluate(bench.model, "val")
    evaluate_s = time.perf_counter() - clock
    return step_s * (problem.spec.trial.steps + problem.spec.trial.bn_batches / 3) + 3 * evaluate_s


def scientific(count: int) -> str:
    """A count that may be astronomical, for people: 1,234 or about 10^57.

    >>> scientific(7**20)
    'about 10^16.9'
    """
    return f"{count:,}" if count < 10**7 else f"about 10^{math.log10(count):.1f}"
