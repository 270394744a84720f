"""What a worker makes of a study: all it needs comes to it as values, but for the data, which it reads where it is.

The engine in this process and the workers of a cluster run the same `TrialRunner`. A worker elsewhere makes its own
from a `TrialSetup`, in which the float network's weights travel; of the data it can only be seen that they are the same
(`DataCheck`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mpsearch.errors import TaskError
from mpsearch.graph.facts import ModelGraph
from mpsearch.graph.inputs import tensors
from mpsearch.precision import Offer
from mpsearch.problem import MOVED_TOLERANCE, Problem
from mpsearch.search.job import Job, Outcome
from mpsearch.search.trial import run_trial
from mpsearch.state_dict import digest, state
from mpsearch.study import TaskSpec, TrialSpec
from mpsearch.task.load import load_task_with
from mpsearch.task.scoring import evaluate
from mpsearch.task.task import Sampling, Task
from mpsearch.train import TrainingState, usual_device
from mpsearch.workbench import QUICK_SCORE_SAMPLES, Workbench

CHECKED_SAMPLES = 64
"""Training samples whose content is compared between nodes."""


class TrialRunner:
    """Runs one trial after another on a workbench of its own."""

    def __init__(self, task: Task, settings: TrialSpec, graph: ModelGraph, offers: Mapping[str, Offer]) -> None:
        self.task, self._settings = task, settings
        self._workbench = Workbench(task, settings, offers=offers, graph=graph)

    def __call__(self, job: Job) -> Outcome:
        """Run a trial; raises what `run_trial` does."""
        proposal, left = job.proposal, list[TrainingState]()
        record = run_trial(
            self.task,
            proposal.config,
            self._settings,
            workbench=self._workbench,
            thresholds=proposal.thresholds,
            rung=proposal.rung,
            before=proposal.before,
            begun=job.begun,
            on_state=left.append,
        )
        weights = state(self._workbench.model) if record.state == "complete" else None
        return Outcome(record, weights, left[0].on_cpu() if left else None)


@dataclass(frozen=True)
class TrialSetup:
    """All that a worker needs of a study and has not: values, and no path into the run folder."""

    task: TaskSpec
    trial: TrialSpec
    graph: ModelGraph
    offers: Mapping[str, Offer]
    weights: Mapping[str, Tensor]  # of the float network
    float_digest: str  # of these

    @classmethod
    def of(cls, problem: Problem) -> TrialSetup:
        """That of a study."""
        model = problem.task.float_model()
        weights = {name: value.detach() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
        offers = dict(problem.space.offers)
        return cls(problem.spec.task, problem.spec.trial, problem.graph, offers, weights, problem.float_digest)

    def runner(self) -> TrialRunner:
        """Load the task and set up a workbench.

        Raises:
            TaskError: model or data cannot be used here, or the float network is another one.
        """
        task = load_task_with(self.task, self.weights)
        if (here := digest(task.float_model())) != self.float_digest:
            raise TaskError(
                f"the float network is another one here: its weights' digest is {here}, and {self.float_digest} where "
                "the search was started; a task that loads its own weights must find the same file on every node"
            )
        return TrialRunner(task, self.trial, self.graph, self.offers)


@dataclass(frozen=True)
class DataCheck:
    """What says whether two nodes have the same data: the content of samples of train, and the float score on val."""

    train: str | None  # digest of samples of train; None: they are read otherwise every time
    steps: int  # batches of one sample that make an epoch of train
    val: float  # the float network's score on samples of val

    @classmethod
    def of(cls, task: Task) -> DataCheck:
        """That of the data which a task reads."""
        once, twice = _content(task), _content(task)
        sample = task.sampled(QUICK_SCORE_SAMPLES) if isinstance(task, Sampling) else task
        val = float(evaluate(sample, task.float_model().to(usual_device()), "val"))
        return cls(once if once == twice else None, task.steps_per_epoch(1), val)

    def __call__(self, runner: TrialRunner) -> None:
        """Compare with the data that a worker reads. Raises TaskError: they are others."""
        here = DataCheck.of(runner.task)
        differs = None
        if here.steps != self.steps:
            differs = f"train has {here.steps} samples, and {self.steps} where the search was started"
        elif None not in (self.train, here.train) and self.train != here.train:
            differs = "samples of train are not those that they are where the search was started"
        elif not math.isclose(here.val, self.val, rel_tol=MOVED_TOLERANCE):
            differs = f"the float network scores {here.val:.6g} on val, and {self.val:.6g} where the search was started"
        if differs is not None:
            raise TaskError(f"its data are others: {differs}; put the same data there, under the same path")


def _content(task: Task) -> str:
    sha256 = hashlib.sha256()
    for value in tensors(task.calibration_input(CHECKED_SAMPLES)):
        sha256.update(f"{value.dtype} {list(value.shape)}\n".encode())
        sha256.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()[:16]
