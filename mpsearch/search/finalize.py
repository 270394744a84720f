"""Finalize: train the picked front longer, over several seeds, and score it on the test split.

This is the only stage that sees test data. Beside every picked point stands the uniform config nearest in cost, trained
the same way: a mixed config that does not beat its baseline is then seen not to. What came of it is in `finals.py`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from mpsearch.errors import DivergedError, RunError
from mpsearch.metric import Metric
from mpsearch.observer import SILENT, Observer
from mpsearch.problem import Problem, with_float_scores, write_facts
from mpsearch.record import FinalRecord, RunFolder, TrialRecord, checkpoint_path, final_path
from mpsearch.search.finals import FinalRow, plan_finals, planned_rows
from mpsearch.search.front import pareto_front
from mpsearch.search.kept import train_again, trial_weights
from mpsearch.search.knee import keep_values
from mpsearch.state_dict import read_tensors, save_weights, state
from mpsearch.workbench import Workbench

progress = logging.getLogger("mpsearch.progress")


def finalize(
    problem: Problem,
    folder: RunFolder,
    observer: Observer = SILENT,
    trials: Sequence[TrialRecord] | None = None,
) -> list[FinalRow]:
    """Train and score the picked points and their baselines; what was done before an interruption is not done again.

    Args:
        problem: the study.
        folder: its run.
        observer: told before each training.
        trials: train these instead.

    Returns:
        a row per config by rising cost, baselines included.

    Raises:
        RunError: the run has no front, or its folder cannot be written.
    """
    final = problem.spec.final
    plan = plan_finals(folder.records(), final.pick, problem.metric) if trials is None else dict.fromkeys(trials)
    if not plan:
        raise RunError(f"{folder.path} has no complete trial: nothing to finalize; see `mpsearch status {folder.path}`")
    steps = round(final.epochs * problem.task.steps_per_epoch(problem.spec.trial.batch_size))
    with folder.driving():
        done = {(f.number, f.seed): f for f in folder.finals() if f.steps == steps}
        lost = {(best.number, best.seed) for best in _without_weights(folder, problem.metric, done.values())}
        jobs = [(trial, seed) for trial in plan for seed in range(1, final.seeds + 1)]
        workbench: Workbench | None = None
        for position, (trial, seed) in enumerate(jobs):
            if (trial.number, seed) in done.keys() - lost:
                continue
            observer.on_final_started(trial, seed, position, len(jobs))
            settings = problem.spec.trial.of_one_length(steps)
            workbench = workbench or Workbench(problem.task, settings, offers=problem.space.offers, graph=problem.graph)
            start = trial_weights(folder, trial)
            if start is None:
                brief = Workbench(problem.task, problem.spec.trial, offers=trial.config.offers, graph=problem.graph)
                train_again(problem, folder, trial, brief)
                save_weights(brief.model, checkpoint_path(folder.checkpoints, trial.number))
                start = state(brief.model)
            record = _train(workbench, trial, seed, steps, final.lr, start)
            if (trial.number, seed) in lost:  # its record is there, and stays as it is
                save_weights(workbench.model, final_path(folder.checkpoints, trial.number))
                continue
            others = [f.val for f in done.values() if f.number == trial.number]
            if not others or problem.metric.better(record.val, than=problem.metric.best_of(*others)):
                save_weights(workbench.model, final_path(folder.checkpoints, trial.number))
            folder.append_final(record)
            done[trial.number, seed] = record
        keep_values(problem, folder, pareto_front(folder.records(), problem.metric), anew=True)
    return planned_rows(plan, list(done.values()), problem.metric)


def float_scores(problem: Problem, folder: RunFolder) -> Mapping[str, float]:
    """The scores of the float network on val and on test: measured once, and among the facts of the run from then on.

    Raises:
        WriteError: the run folder cannot be written.
    """
    scored = with_float_scores(problem, "val", "test")
    if scored is not problem and all(map(math.isfinite, scored.float_scores.values())):
        write_facts(folder, scored)
    return scored.float_scores


def _without_weights(folder: RunFolder, metric: Metric, finals: Iterable[FinalRecord]) -> Iterator[FinalRecord]:
    """Of each trial the final training whose weights should be there and are not, or cannot be read."""
    best: dict[int, FinalRecord] = {}
    for final in finals:
        if final.number not in best or metric.better(final.val, than=best[final.number].val):
            best[final.number] = final
    for final in best.values():
        try:
            read_tensors(final_path(folder.checkpoints, final.number), "its final training is done again")
        except RunError as error:
            progress.warning("%s", error)
            yield final


def _train(
    workbench: Workbench,
    trial: TrialRecord,
    seed: int,
    steps: int,
    lr: float | None,
    start: Mapping[str, Tensor],
) -> FinalRecord:
    """Go on from what the trial ended its longest rung with; the better of start and end on val counts."""
    workbench.reset(trial.config)
    workbench.restore(start)  # its ranges too
    before, began = workbench.score("val").value, workbench.state()
    workbench.fit(steps, seed, lr)
    workbench.reestimate(seed)
    after = workbench.score("val").value
    if workbench.metric.better(before, than=after):
        workbench.restore(began)
    test = workbench.score("test")
    if not all(map(math.isfinite, (before, after, test.value))):
        raise DivergedError(
            f"the final training of trial {trial.number} with seed {seed} came from {before} to {after} on val and "
            f"{test.value} on test: lower final.lr in the study, and finalize again; what has ended is kept"
        )
    return FinalRecord(trial.number, seed, steps, workbench.metric.best_of(before, after), test.value, test.values)
