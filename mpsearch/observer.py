"""Following a run: one object that the long commands tell what happens, for progress bars, logs and notebooks.

Subclass `Observer`, override what is of interest, and pass it on:

    class Print(mpsearch.Observer):
        def on_trial_ended(self, record):
            print(record.number, record.state, record.score, record.cost)

    mpsearch.run("digits", observer=Print())

Every method is called in the process and thread that started the command, so a slow one delays the command. What a
method raises ends the command as Ctrl-C does: trials that had ended stay on the disk.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpsearch.problem import Problem
    from mpsearch.record import RunFolder, RunningTrial, TrialRecord


class Observer:
    """Is told what happens; every method does nothing here.

    - `on_ready`, `on_trial_started`, `on_trial_ended`: by `run` and `resume`
    - `on_stage`: by `run` and `resume` (warm start), and by `debug`
    - `on_final_started`: by `finalize`
    - `on_step`: by `train`
    - `on_report`: by `report`

    >>> class Count(Observer):
    ...     steps = 0
    ...     def on_step(self, step, steps, loss):
    ...         self.steps += 1
    >>> count = Count()  # mpsearch.train("digits", "w4a4", observer=count)
    >>> count.on_step(1, 10, 0.5)
    >>> count.steps
    1
    """

    def on_ready(self, problem: Problem, folder: RunFolder) -> None:
        """A study has been loaded and checked, and its run folder is open; trials follow."""

    def on_stage(self, stage: str, done: int, total: int) -> None:
        """Of a stage that is not a trial, `done` of `total` parts are done; 0 when it starts, `total` at its end."""

    def on_trial_started(self, trial: RunningTrial) -> None:
        """A trial has been proposed and starts."""

    def on_trial_ended(self, record: TrialRecord) -> None:
        """A trial has ended, whatever became of it, and is on the disk."""

    def on_final_started(self, trial: TrialRecord, seed: int, done: int, total: int) -> None:
        """A final training of `trial` starts; `done` of `total` trainings came before it, earlier calls' included."""

    def on_step(self, step: int, steps: int, loss: float) -> None:
        """A training has done `step` of `steps` steps; `loss` is that of the last one."""

    def on_report(self, path: Path) -> None:
        """A report has been written, once or, with `watch`, again."""


SILENT = Observer()
"""The default: no observer."""
