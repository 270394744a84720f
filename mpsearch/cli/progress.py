"""What is shown while a command works: trials of a run, steps of a training."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mpsearch.cli.printing import duration, make_console, percent

if TYPE_CHECKING:
    from mpsearch.problem import Problem
    from mpsearch.record import RunFolder, TrialRecord
    from mpsearch.search.engine import Event


class RunProgress:
    """Progress of a run: a bar in a terminal, a line per trial elsewhere."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn

        from mpsearch.report.terminal import FrontProgress

        self.console = make_console(stderr=True)
        self.progress = FrontProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[best]}"),
            TextColumn("{task.fields[eta]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.problem: Problem | None = None
        self.folder: RunFolder | None = None
        self.ended: list[TrialRecord] = []
        self.earlier = 0
        self.began = time.monotonic()

    def on_ready(self, problem: Problem, folder: RunFolder) -> None:
        """The run starts."""
        self.problem, self.folder = problem, folder
        _log_to(folder)
        self.ended = folder.records()
        self.earlier = len(self.ended)
        self.began = time.monotonic()
        for line in problem.summary():
            self.console.print(line, style="dim", soft_wrap=True, highlight=False)
        for warning in problem.notes:
            self.console.print(f"[yellow]Warning:[/] {warning}", soft_wrap=True, highlight=False)
        self.task = self.progress.add_task(
            problem.spec.name, total=problem.spec.search.trials, completed=self.earlier, best="", eta=""
        )
        self.progress.start()

    def on_progress(self, stage: str, done: int, total: int) -> None:
        """The warm start goes on."""
        self.progress.update(self.task, description=f"warm start: {stage}", completed=done, total=total)
        if done == total:
            took = f"{stage} took {duration(time.monotonic() - self.began)}"
            self.console.print(took, style="dim", highlight=False)
            self.began = time.monotonic()
            assert self.problem is not None
            name, trials = self.problem.spec.name, self.problem.spec.search.trials
            self.progress.update(self.task, description=name, completed=self.earlier, total=trials)

    def on_event(self, event: Event) -> None:
        """A trial has started or ended."""
        from mpsearch.search.engine import Finished

        if not isinstance(event, Finished) or self.problem is None:
            return
        from mpsearch.report.terminal import sketch
        from mpsearch.search.front import pareto_front

        record = event.record
        self.ended.append(record)
        done, total = len(self.ended), self.problem.spec.search.trials
        new = done - self.earlier
        left_s = (time.monotonic() - self.began) / new * (total - done)
        front = pareto_front(self.ended)
        best = f"best {percent(front.best.accuracy)}, {len(front)} on the front" if front.trials else ""
        self.progress.sketch = sketch(self.ended)
        self.progress.update(self.task, completed=done, best=best, eta=f"{duration(left_s)} left")
        if self.progress.disable or record.state == "failed":
            outcome = (
                f"failed: {record.reason}"
                if record.state == "failed"
                else f"{percent(record.accuracy)} at cost {record.cost:.4f}"
                + (", stopped" if record.state == "stopped" else "")
            )
            self.console.print(
                f"[{done}/{total}] trial {record.number} ({record.origin}): {outcome}, {record.wall.total_s:.1f} s",
                style="yellow" if record.state == "failed" else None,
                highlight=False,
                markup=False,
                soft_wrap=True,
            )


@contextmanager
def training_progress(name: str) -> Iterator[Callable[[int, int, float], None]]:
    """Progress of one training: (step, steps, loss) in a terminal, silence elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = make_console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        job = progress.add_task(name, total=None, loss=float("nan"))
        yield lambda step, steps, loss: progress.update(job, completed=step + 1, total=steps, loss=loss)


def _log_to(folder: RunFolder) -> None:
    handler = logging.FileHandler(folder.log_txt, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("mpsearch")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
