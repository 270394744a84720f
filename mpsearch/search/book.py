"""What every engine does with a trial: how it is begun, what is made of its end, and what is put on the disk."""

from __future__ import annotations

import logging
import textwrap
import time
import traceback
from dataclasses import replace
from pathlib import Path

from mpsearch.errors import WriteError, hidden
from mpsearch.files import no_room
from mpsearch.observer import Observer
from mpsearch.record import (
    RunFolder,
    RunningTrial,
    TrialRecord,
    WallTime,
    checkpoint_path,
    rung_path,
    state_path,
)
from mpsearch.search.controller import Proposal, SearchController
from mpsearch.search.job import Job, Outcome, Runner
from mpsearch.search.view import OptunaView

logger = logging.getLogger(__name__)


class MemoryRanOutError(Exception):
    """A trial found no memory: no fault of its config, for all take as much, and other processes took it."""


def attempt(runner: Runner, job: Job) -> Outcome:
    """What came of a job, failed with its reason if `runner` raises.

    Raises:
        WriteError: a disk is full.
        MemoryRanOutError: memory is, of the machine or of its card.
    """
    started_s, clock = time.time(), time.perf_counter()
    try:
        return runner(job)
    except WriteError:  # not the fault of the config: the run ends, and a resumed one tries it again
        raise
    except Exception as error:  # of any kind: a failed trial is a result, and the search goes on
        if no_room(error):  # of the task's own files, or of a compiler's
            raise WriteError(f"{explain(error)}: make room on that disk, then go on with `mpsearch resume`") from None
        if _ran_out_of_memory(error):
            raise MemoryRanOutError(explain(error)) from None
        wall = WallTime(train_s=time.perf_counter() - clock)  # where it went is not known; most of it, usually
        config = job.proposal.config
        return Outcome(TrialRecord(config, "failed", reason=explain(error), wall=wall, started_s=started_s))


def _ran_out_of_memory(error: Exception) -> bool:
    """Whether Python, a card (`torch.OutOfMemoryError`, `torch.AcceleratorError`) or torch on the CPU found none."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    said = str(error).lower()
    return bool(kinds & {"MemoryError", "OutOfMemoryError"}) or (
        isinstance(error, RuntimeError) and any(words in said for words in NO_MEMORY)
    )


NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "cublas_status_alloc_failed")
"""What torch says where it raises a plain RuntimeError."""


def explain(error: BaseException) -> str:
    """`Type: message (file.py, line 7, in function)`, of the innermost frame, on one line."""
    message = textwrap.shorten(str(error), 500, placeholder=" ...") or "no message"
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno}, in {frames[-1].name})" if frames else ""
    return f"{type(error).__name__}: {message}{where}"


class Book:
    """Keeps controller, disk, view and progress in step: the same for every engine."""

    def __init__(
        self,
        controller: SearchController,
        folder: RunFolder,
        view: OptunaView | None,
        observer: Observer,
    ) -> None:
        self._controller = controller
        self._folder = folder
        self._view = view
        self._observer = observer
        self._running: dict[int, RunningTrial] = {}

    def start(self) -> Job | None:
        """The next trial, noted as running; None: there is no more, or none before one that runs has ended."""
        proposal = self._controller.ask()
        if proposal is None:
            return None
        trial = RunningTrial(proposal.number, proposal.origin, proposal.cost, time.time(), proposal.rung)
        self._running[proposal.number] = trial
        self._folder.running = tuple(self._running.values())
        self._observer.on_trial_started(trial)
        return self._job(proposal)

    @property
    def over(self) -> bool:
        """Whether no trial starts any more."""
        return self._controller.stop_reason is not None

    def finish(self, proposal: Proposal, outcome: Outcome) -> None:
        """Record what became of a trial; when this returns, it is on the disk, weights and record."""
        self._keep(proposal, outcome)
        self._put(proposal, self._controller.tell(proposal, outcome.record))

    def abandon(self, proposal: Proposal, reason: str) -> None:
        """Record that a trial could not be run, through no fault of its config."""
        self._put(proposal, self._controller.abandon(proposal, reason))

    def _put(self, proposal: Proposal, record: TrialRecord | None) -> None:
        if record is not None:
            record = replace(record, reason=record.reason and hidden(record.reason))
            self._folder.append(record)
            said = record.reason or f"{record.score} at cost {record.cost}"
            logger.info(
                "trial %d, rung %d (%s) is %s: %s", proposal.number, proposal.rung, proposal.origin, record.state, said
            )
        del self._running[proposal.number]
        self._folder.running = tuple(self._running.values())
        if record is not None:
            if self._view is not None:
                self._view.add(record)
            self._observer.on_trial_ended(record)

    def _job(self, proposal: Proposal) -> Job:
        """With the state that the shorter rung left, where the trial is to go on."""
        path = state_path(self._folder.checkpoints, proposal.number, proposal.rung - 1)
        if not proposal.rung or not path.exists():
            return Job(proposal)
        from mpsearch.train import TrainingState  # here, because torch takes seconds to import

        return Job(proposal, TrainingState.load(path, proposal.config.digest))

    def _keep(self, proposal: Proposal, outcome: Outcome) -> None:
        """Write the weights of a trial and the training that a longer rung may go on with.

        What the record has is not overwritten before the record has this: `FrontWeights` takes it over then.
        """
        folder, number, rung = self._folder.checkpoints, proposal.number, proposal.rung
        if outcome.state is not None:
            outcome.state.save(state_path(folder, number, rung), proposal.config.digest)
        if outcome.weights is not None:
            from mpsearch.state_dict import save_tensors

            path = rung_path(folder, number, rung) if rung else checkpoint_path(folder, number)
            save_tensors(outcome.weights, path)
