"""What is shown while a command works: observers that draw in a terminal, or print lines elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mpsearch.cli.base import end_if_terminated
from mpsearch.cli.printing import LineFormatter, duration, make_console, print_lines, print_warnings
from mpsearch.observer import Observer

if TYPE_CHECKING:
    from mpsearch.problem import Problem
    from mpsearch.record import RunFolder, RunningTrial, TrialRecord


class RunProgress(Observer):
    """Progress of a run: a bar in a terminal, a line per trial elsewhere."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn

        from mpsearch.cli.console import WordsColumn
        from mpsearch.report.terminal import FrontProgress

        self.folder: RunFolder | None = None
        self._console = make_console(stderr=True)
        self._progress = FrontProgress(
            WordsColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            WordsColumn("{task.fields[best]}"),
            WordsColumn("{task.fields[eta]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._ended: dict[int, TrialRecord] = {}  # by number
        self._earlier = 0
        self._began = self._stage_began = time.monotonic()

    def on_ready(self, problem: Problem, folder: RunFolder) -> None:
        """The run starts."""
        self.folder = folder
        self._metric = problem.metric
        self._name, self._trials = problem.spec.name, problem.spec.search.trials
        _log_to(folder)
        self._ended = {record.number: record for record in folder.records()}
        self._earlier = len(self._ended)
        self._began = time.monotonic()
        print_lines(problem.summary(), self._console, style="dim")
        print_warnings(problem.notes, self._console)
        self._bar = self._progress.add_task(self._name, total=self._trials, completed=self._earlier, best="", eta="")
        self._progress.start()

    def on_stage(self, stage: str, done: int, total: int) -> None:
        """The warm start goes on."""
        end_if_terminated()
        if not done:
            self._stage_began = time.monotonic()
        self._progress.update(self._bar, description=f"warm start: {stage}", completed=done, total=total)
        if done == total:
            took_s = time.monotonic() - self._stage_began
            print_lines([f"{stage} took {duration(took_s)}"], self._console, style="dim")
            self._began += took_s  # it is no part of what a trial takes
            self._progress.update(self._bar, description=self._name, completed=len(self._ended), total=self._trials)

    def on_trial_started(self, trial: RunningTrial) -> None:
        """A trial starts."""
        end_if_terminated()

    def on_trial_ended(self, record: TrialRecord) -> None:
        """A trial has ended."""
        from mpsearch.report.terminal import sketch
        from mpsearch.search.front import pareto_front

        self._ended[record.number] = record
        records = list(self._ended.values())
        done = len(records)
        left_s = (time.monotonic() - self._began) / max(1, done - self._earlier) * (self._trials - done)
        front = pareto_front(records, self._metric)
        best = f"best {self._metric.show(front.best.score)}, {len(front)} on the front" if front.trials else ""
        self._progress.sketch = sketch(records, self._metric)
        self._progress.update(self._bar, completed=done, best=best, eta=f"{duration(left_s)} left")
        if self._progress.disable or record.state == "failed":
            outcome = (
                f"failed: {record.reason}"
                if record.state == "failed"
                else f"{self._metric.show(record.score)} at cost {record.cost:.4f}"
                + (f" after {record.steps} steps" if record.rungs else "")
                + (", stopped" if record.state == "stopped" else "")
                + (f"; {record.reason}" if record.state == "complete" and record.reason else "")
            )
            took_s = record.rungs[-1].wall_s if record.rungs else record.wall.total_s
            line = f"[{done}/{self._trials}] trial {record.number} ({record.origin}): {outcome}, {took_s:.1f} s"
            print_lines([line], self._console, style="yellow" if record.state == "failed" else None)

    def stop(self) -> None:
        """Leave the terminal as it was."""
        self._progress.stop()


class FinalProgress(Observer):
    """A line per final training."""

    def on_final_started(self, trial: TrialRecord, seed: int, done: int, total: int) -> None:
        """A training starts."""
        end_if_terminated()
        trained = f", {trial.steps} steps so far" if trial.rungs else ""
        line = f"[{done + 1}/{total}] trial {trial.number} (cost {trial.cost:.3f}{trained}), seed {seed}"
        print_lines([line], make_console(stderr=True))


class StageProgress(Observer):
    """A line per stage."""

    def on_stage(self, stage: str, done: int, total: int) -> None:
        """A stage starts or goes on."""
        if done == 0:
            parts = f" ({total})" if total > 1 else ""
            print_lines([f"{stage}{parts}"], make_console(stderr=True), style="dim")


@contextmanager
def training_progress(name: str) -> Iterator[Observer]:
    """Progress of one training: steps and loss in a terminal, silence elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    from mpsearch.cli.console import WordsColumn

    console = make_console(stderr=True)
    columns = (
        WordsColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        WordsColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task(name, total=None, loss=float("nan"))

        class Steps(Observer):
            def on_step(self, step: int, steps: int, loss: float) -> None:
                end_if_terminated()
                progress.update(bar, completed=step, total=steps, loss=loss)

        yield Steps()


class _LogFile(logging.FileHandler):
    """A log that loses lines where the disk is full: that is said by whoever writes what matters."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


def _log_to(folder: RunFolder) -> None:
    handler = _LogFile(folder.log_txt, encoding="utf-8")
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("mpsearch")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
