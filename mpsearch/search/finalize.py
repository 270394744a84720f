"""Finalize: train the picked front longer, over several seeds, and score it on the test split.

This is the only stage that sees test data. Beside every picked point stands the uniform config nearest in cost, trained
the same way: a mixed config that does not beat its baseline is then seen not to. What came of it is in `finals.py`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

from safetensors.torch import load_file
from torch import Tensor

from mpsearch.errors import RunError
from mpsearch.observer import SILENT, Observer
from mpsearch.problem import Problem, with_float_scores, write_facts
from mpsearch.record import FinalRecord, RunFolder, TrialRecord, checkpoint_path, final_path
from mpsearch.search.finals import FinalRow, plan_finals, planned_rows
from mpsearch.search.front import pareto_front
from mpsearch.search.knee import keep_values
from mpsearch.state_dict import save_weights
from mpsearch.workbench import Workbench

logger = logging.getLogger(__name__)


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
        jobs = [(trial, seed) for trial in plan for seed in range(1, final.seeds + 1)]
        workbench: Workbench | None = None
        for position, (trial, seed) in enumerate(jobs):
            if (trial.number, seed) in done:
                continue
            observer.on_final_started(trial, seed, position, len(jobs))
            settings = problem.spec.trial.of_one_length(steps)
            workbench = workbench or Workbench(problem.task, settings, offers=problem.space.offers, graph=problem.graph)
            checkpoint = checkpoint_path(folder.checkpoints, trial.number)
            start = load_file(checkpoint) if checkpoint.exists() else None
            if start is None:
                logger.warning(
                    "the weights of trial %d were not kept: its final training begins anew, with the float network's",
                    trial.number,
                )
            record = _train(workbench, trial, seed, steps, final.lr, start)
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


def _train(
    workbench: Workbench,
    trial: TrialRecord,
    seed: int,
    steps: int,
    lr: float | None,
    start: Mapping[str, Tensor] | None,
) -> FinalRecord:
    """Go on from what the trial ended its longest rung with, where it was kept; the better of start and end on val
    counts.
    """
    workbench.reset(trial.config)
    if start is not None:
        workbench.restore(start)  # its ranges too
    before, state = workbench.score("val").value, workbench.state()
    workbench.fit(steps, seed, lr)
    workbench.reestimate(seed)
    after = workbench.score("val").value
    if workbench.metric.better(before, than=after):
        workbench.restore(state)
    test = workbench.score("test")
    return FinalRecord(trial.number, seed, steps, workbench.metric.best_of(before, after), test.value, test.values)
