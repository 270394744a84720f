"""run_study: from a study to its Pareto front. Each line of `run_study` is one stage of the system."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mpsearch.errors import DivergedError, GaveUpError, RunError, SpaceError, TaskError
from mpsearch.files import make_folder, write_text
from mpsearch.hardware.profile import profile_copy
from mpsearch.observer import SILENT, Observer
from mpsearch.precision import PrecisionConfig
from mpsearch.problem import Problem, check_moved, open_problem, reopen, with_float_scores, write_facts
from mpsearch.record import InitialConfig, RunFolder, RunningTrial, TrialRecord, WallTime, checkpoint_path
from mpsearch.search.additive import Knowledge
from mpsearch.search.controller import SearchController
from mpsearch.search.engine import run_trials
from mpsearch.search.front import ParetoFront, front_rows, pareto_front, score_range
from mpsearch.search.kept import FrontWeights
from mpsearch.search.knee import keep_values
from mpsearch.search.trial import peak_memory_bytes, run_trial
from mpsearch.search.view import open_view
from mpsearch.search.worker import DataCheck, TrialRunner, TrialSetup
from mpsearch.shipped import shipped
from mpsearch.state_dict import read_tensors, save_weights, state
from mpsearch.study import REUSED, StudySpec, read_spec, reuses_weights
from mpsearch.task.scoring import evaluate
from mpsearch.train import FitSettings, threads
from mpsearch.trust import trust, trust_database
from mpsearch.warmstart.additive import start_scores
from mpsearch.warmstart.prescreen import prescreen, prescreens
from mpsearch.warmstart.start import check_descent, warm_start, warms
from mpsearch.warmstart.table import SensitivityTable, read_descent
from mpsearch.workbench import Workbench, channels_last, in_bf16

logger = logging.getLogger(__name__)


def run_study(spec: StudySpec, out: str | Path | None = None, observer: Observer = SILENT) -> ParetoFront:
    """Run a study in a new run folder and return its front.

    Args:
        spec: the study.
        out: the run folder; default `runs/<name>`.
        observer: told when everything is loaded and checked, of the warm start, and of every trial.

    Raises:
        MpsearchError: the study cannot be used, or the search had to be given up.
    """
    spec = spec.absolute()
    problem = open_problem(spec)
    problem = replace(problem, notes=tuple(problem.warnings()))
    spec = _in_one_arithmetic(problem)
    problem = replace(problem, spec=spec)
    space_yaml = shipped("search_spaces", spec.space, SpaceError).read_text(encoding="utf-8")
    folder = RunFolder.create(
        out or Path("runs") / spec.name,
        spec.to_yaml(),
        space_yaml,
        metric=problem.metric,
        hardware=profile_copy(spec.hardware),
    )
    trust(folder, spec)
    return _search(problem, folder, observer)


def resume_study(
    run: str | Path, trials: int | None = None, observer: Observer = SILENT, overrides: Sequence[str] = ()
) -> ParetoFront:
    """Go on with a run, whatever ended it.

    Args:
        run: its folder.
        trials: the number of trials in all, earlier ones included; default: the study's.
        observer: as for `run_study`.
        overrides: `key.path=value`: where files are, how much is searched and where; kept in the run's study.

    Raises:
        MpsearchError: as `run_study`, or trials of the changed study could not be compared with those that there are.
    """
    folder = RunFolder.open(run)
    spec = read_spec(folder, overrides).absolute()
    if any(override.lstrip().startswith("storage") for override in overrides):
        trust_database(folder, spec)  # who named it sits here
    problem = reopen(folder, spec)
    if overrides:
        if any(override.lstrip().startswith("task") for override in overrides):
            check_moved(problem, folder)
        with folder.driving():
            write_text(folder.study_yaml, spec.to_yaml(), sync=True)
        trust(folder, spec)
    if trials is not None:
        spec = spec.model_copy(update={"search": spec.search.model_copy(update={"trials": trials})})
    if reuses_weights(folder) and len(folder.records()) < spec.search.trials:
        raise RunError(
            f"the trials of {folder.path} began with the weights of its descent (warm_start.{REUSED}), which is no "
            "more, so that further ones could not be compared with them: look at it with status, front and report, "
            "or start a new run"
        )
    return _search(replace(problem, spec=spec), folder, observer)


def _search(problem: Problem, folder: RunFolder, observer: Observer) -> ParetoFront:
    spec = problem.spec
    problem = with_float_scores(problem, "val")
    if not math.isfinite(score := problem.float_scores["val"]):
        raise TaskError(
            f"the float network's {problem.metric.name} on val is {score}, so that no trial can be compared with it: "
            "look for values that are not finite in its outputs, in val and in the metric"
        )
    with folder.driving(), contextlib.ExitStack() as at_the_end:
        records = folder.records()
        write_facts(folder, problem)
        view = open_view(
            spec.storage,
            folder,
            spec.name,
            problem.space,
            problem.metric,
            spec.cost.budget,
            records,
            problem.cost,
            on_trouble=functools.partial(setattr, folder, "trouble"),
        )
        if view is not None:
            at_the_end.callback(view.close)
        make_folder(folder.checkpoints)
        observer.on_ready(problem, folder)
        check_descent(spec, problem.space, problem.cost)  # before the first trial
        began = time.monotonic()

        @functools.cache
        def warm_up() -> tuple[Sequence[InitialConfig], Knowledge]:
            initial_configs = warm_start(
                spec, problem.task, problem.graph, problem.space, problem.cost, folder.warmstart, observer
            )
            if prescreens(spec):
                initial_configs = prescreen(problem, folder, initial_configs, observer)
            return initial_configs, _knowledge(folder)

        if warms(spec) and _warm_start_damaged(folder):  # the report reads it, though no trial may be left to need it
            warm_up()
        controller = SearchController(
            problem.space,
            problem.cost,
            spec.search,
            problem.metric,
            spec.cost.budget,
            records=records,
            started=began,
            rungs=spec.trial.lengths,
            priced=problem.priced,
            warm_start=warm_up if warms(spec) else None,
        )
        front = _FrontKeeper(problem, folder, records, observer)
        make_runner, check = _for_workers(problem)
        try:
            run_trials(controller, folder, view, make_runner, spec.engine, spec.search.concurrency, front, check)
        finally:
            if folder.records():
                folder.write_parquet()
    if controller.broken:
        raise GaveUpError(f"the search was given up: {controller.stop_reason}")
    return pareto_front(folder.records(), problem.metric)


def _in_one_arithmetic(problem: Problem) -> StudySpec:
    """The study with the arithmetic that is faster here, where it leaves that open: one for all trials of the run.

    The nodes of a cluster, which may have cards that this machine has not, find out for themselves.
    """
    spec = problem.spec
    if spec.trial.precision != "auto" or spec.engine.address not in ("none", "local"):
        return spec
    with threads(_threads_of_a_worker(spec)):
        bf16 = in_bf16(spec.trial, problem.task, channels_last(problem.task.float_model()))
    return spec.model_copy(update={"trial": spec.trial.model_copy(update={"precision": "bf16" if bf16 else "fp32"})})


def _threads_of_a_worker(spec: StudySpec) -> int:
    if spec.engine.address == "none":
        return torch.get_num_threads()
    return max(1, (os.cpu_count() or 1) // spec.search.concurrency)


def _for_workers(problem: Problem) -> tuple[Callable[[], TrialRunner], DataCheck | None]:
    """What workers make their runners with, and what shows that the data of another machine are those of this one."""
    spec = problem.spec
    if spec.engine.address == "none":
        graph, offers = problem.graph, problem.space.offers
        return functools.partial(TrialRunner, problem.task, spec.trial, graph, offers), None
    return TrialSetup.of(problem).runner, None if spec.engine.address == "local" else DataCheck.of(problem.task)


def _warm_start_damaged(folder: RunFolder) -> bool:
    """Whether the warm start has left a file that cannot be read."""
    try:
        folder.prescreened()
        if (table := folder.warmstart / "sensitivity.json").exists():
            SensitivityTable.load(table)
        if (folder.warmstart / "descent.json").exists():
            read_descent(folder.warmstart)
    except RunError:
        return True
    return False


def _knowledge(folder: RunFolder) -> Knowledge:
    """What the warm start has learned for the sampler."""
    table = folder.warmstart / "sensitivity.json"
    return Knowledge(start_scores(folder.prescreened()), SensitivityTable.load(table) if table.exists() else None)


class _FrontKeeper(Observer):
    """Keeps weights and `front.json` current after every trial, and then tells the observer."""

    def __init__(self, problem: Problem, folder: RunFolder, records: Sequence[TrialRecord], observer: Observer) -> None:
        self._problem, self._folder, self._observer = problem, folder, observer
        self._weights = FrontWeights(folder, records, len(problem.spec.trial.lengths))
        self._ended = {record.number for record in records}
        self._write()

    def on_trial_started(self, trial: RunningTrial) -> None:
        self._observer.on_trial_started(trial)

    def on_trial_ended(self, record: TrialRecord) -> None:
        self._weights.keep(record)
        self._ended.add(record.number)
        self._write()
        self._observer.on_trial_ended(record)

    def _write(self) -> None:
        front = self._weights.front
        if self._ended:
            write_front(self._problem, self._folder, front, self._weights.scores, len(self._ended))
        keep_values(self._problem, self._folder, front)


def score_config(problem: Problem, folder: RunFolder, config: PrecisionConfig) -> TrialRecord:
    """Run a config that the search did not propose as a trial of a run, and record it; a known one is not run again.

    Raises:
        MpsearchError: the run is being driven by another process, or the config does not fit the network.
    """
    with folder.driving():
        records = folder.records()
        if known := [r for r in records if r.config == config and r.state == "complete"]:
            return known[0]
        workbench = Workbench(problem.task, problem.spec.trial, offers=config.offers, graph=problem.graph)
        record = run_trial(problem.task, config, problem.spec.trial, workbench=workbench, cost=problem.cost)
        return _put_on_record(problem, folder, records, record, workbench)


def score_network(
    problem: Problem, folder: RunFolder, config: PrecisionConfig, fill: Callable[[Workbench], None]
) -> TrialRecord:
    """Score a network that was trained elsewhere, as it is, as a trial of a run; one that is there is not put in again.

    Args:
        problem: of the run.
        folder: the run.
        config: the network's.
        fill: give the workbench's model, which can have the types of `config`, its precisions, weights and ranges.

    Raises:
        MpsearchError: the run is being driven by another process, or the network does not fit the run's.
        FloatingPointError: its score is NaN or infinite.
    """
    with folder.driving():
        started, clock = time.time(), time.perf_counter()
        records = folder.records()
        workbench = Workbench(problem.task, problem.spec.trial, offers=config.offers, graph=problem.graph)
        fill(workbench)
        for known in (r for r in records if r.origin == "import" and r.config == config):
            if _same_weights(checkpoint_path(folder.checkpoints, known.number), state(workbench.model)):
                return known
        prepared = time.perf_counter()
        score = workbench.score("val")
        if not math.isfinite(score.value):
            raise DivergedError(f"{problem.metric.name} on val is {score.value}: look at the network's weights")
        record = TrialRecord(
            config=config,
            state="complete",
            score=score.value,
            cost=problem.cost(config),
            origin="import",
            curve=((0, score.value),),
            divergence=score.divergence,
            values=score.values,
            wall=WallTime(prepare_s=prepared - clock, evaluate_s=time.perf_counter() - prepared),
            started_s=started,
            peak_memory_bytes=peak_memory_bytes(),
        )
        return _put_on_record(problem, folder, records, record, workbench)


def _same_weights(path: Path, tensors: Mapping[str, Tensor]) -> bool:
    if not path.exists():
        return False
    there = read_tensors(path, "delete it, and import the network again")
    return there.keys() == tensors.keys() and all(torch.equal(there[name], value) for name, value in tensors.items())


def _put_on_record(
    problem: Problem, folder: RunFolder, records: Sequence[TrialRecord], record: TrialRecord, workbench: Workbench
) -> TrialRecord:
    """Give a trial that the search did not propose the next number; put it and its weights into the driven run."""
    number = max((r.number for r in records), default=-1) + 1
    record = replace(record, number=number, costs=problem.priced(record.config))
    make_folder(folder.checkpoints)
    front = _FrontKeeper(problem, folder, records, SILENT)
    save_weights(workbench.model, checkpoint_path(folder.checkpoints, record.number))
    folder.append(record)
    front.on_trial_ended(record)
    folder.write_parquet()
    return record


def write_front(
    problem: Problem, folder: RunFolder, front: ParetoFront, complete: Sequence[float], trials: int
) -> None:
    """Write `front.json`: current after every trial.

    Args:
        problem: the study.
        folder: its run.
        front: of its trials.
        complete: the scores of all that are complete.
        trials: that have ended, of any state.
    """
    scores = score_range(complete, problem.metric, problem.float_scores.get("val"))
    folder.write_front(
        {
            "schema": "mpsearch/front/2",
            "study": problem.spec.name,
            "trials": trials,
            "metric": problem.metric.to_json(),
            "cost": {"model": problem.spec.cost.model, "reference": problem.spec.cost.reference},
            "hypervolume": front.hypervolume(problem.cheapest, scores),
            "hypervolume_scores": {"worst": scores.worst, "best": scores.best, "best_is_float": scores.best_is_float},
            "front": front_rows(front),
        }
    )


def estimate_trial_s(problem: Problem, steps: int = 6) -> float:
    """Seconds that one trial should take in a process of its own: measured on a few eager steps, scoring included.

    Where trials train by rungs, with its share of the longer ones.

    With as many threads as a worker has, and by the quickest step: on a machine that is busy with other things the mean
    of a few steps says more of these, above all where threads wait for each other.
    """
    spec = problem.spec
    settings = spec.trial.model_copy(update={"compile": False, "bn_batches": 0})
    with threads(_threads_of_a_worker(spec)):
        workbench = Workbench(problem.task, settings, offers=problem.space.offers, graph=problem.graph)
        workbench.reset(problem.space.ladder()[0])
        ended: list[float] = []
        workbench.fit(steps, seed=0, on_step=lambda step, loss: ended.append(time.perf_counter()))
        step_s = min(after - before for before, after in itertools.pairwise(ended))
        evaluate_s = min(_evaluation_s(problem, workbench) for _ in range(2))
    return step_s * (steps_a_config(spec) + spec.trial.bn_batches / 3) + 3 * evaluate_s


def steps_a_config(spec: StudySpec) -> float:
    """Training steps that a config takes on average: all of them to the first rung, one in `search.eta` to the next.

    >>> from mpsearch.study import load_study
    >>> round(steps_a_config(load_study("digits", ["trial.rungs=[60, 150, 400]"])), 3)  # 60 + 120/3 + 325/9
    136.111
    """
    lengths, steps, done = spec.trial.lengths, 0.0, 0
    for rung, length in enumerate(lengths):
        steps += (length - done) / spec.search.eta**rung
        done = FitSettings(length, spec.trial.lr, lengths=lengths).fall
    return steps


def _evaluation_s(problem: Problem, workbench: Workbench) -> float:
    clock = time.perf_counter()
    evaluate(problem.task, workbench.model, "val")
    return time.perf_counter() - clock
