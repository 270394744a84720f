"""run_trials: take proposals from the controller, run them, put what became of them on the disk.

Here, or on the workers of a Ray cluster (`cluster.py`): `engine.address` says which, and the trials are the same. What
goes to a trial and comes from it are values (`job.py`); the run folder is this process's alone. Nothing that a worker
keeps is needed to go on after a crash: the folder holds every trial that has ended, and those that had not are proposed
anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from mpsearch.errors import GaveUpError, WriteError
from mpsearch.observer import SILENT, Observer
from mpsearch.record import RunFolder
from mpsearch.search.book import Book, MemoryRanOutError, attempt
from mpsearch.search.cluster import LOST_IN_A_ROW, run_on_ray
from mpsearch.search.controller import SearchController
from mpsearch.search.job import Runner
from mpsearch.search.view import OptunaView
from mpsearch.study import EngineSpec


def run_trials(
    controller: SearchController,
    folder: RunFolder,
    view: OptunaView | None,
    make_runner: Callable[[], Runner],
    engine: EngineSpec,
    concurrency: int = 1,
    observer: Observer = SILENT,
    check: Callable[[Any], None] | None = None,
) -> None:
    """Run trials until the controller has no more; then `controller.stop_reason` says why.

    A trial that raises is recorded as failed with the reason, and the search goes on. A broken set-up (`make_runner`
    raises) ends it, since no trial could do better; on a cluster it leaves out the node where that happens.

    Args:
        controller: proposes configs, and has been given the records of `folder`.
        folder: of the run, inside its `driving`.
        view: the Optuna study that shows the run, if there is one.
        make_runner: called once in each worker process; what it returns runs one job after another there. Must be
            picklable where Ray is used.
        engine: `address: none` runs one trial at a time in this process and ignores `concurrency`.
        concurrency: workers at a time, each with its share of the CPUs (and GPUs).
        observer: told in this process when a trial starts and when it has ended.
        check: given a runner once on each node of a cluster, before its first trial; raises where the node cannot run
            trials.

    Raises:
        RunError: a trial could not be recorded, or Ray cannot be started or reached.
        GaveUpError: no node of the cluster can run trials, workers died one after another, or no trial found memory.
        WriteError: weights could not be written; the trial is on no record, and is proposed again by a resumed run.
        KeyboardInterrupt: as given; the trials that ran are dropped, those that had ended are on the disk.
    """
    book = Book(controller, folder, view, observer)
    try:
        if engine.address == "none":
            _run_here(book, make_runner)
        else:
            run_on_ray(book, folder, make_runner, engine.address, concurrency, check)
    finally:
        with contextlib.suppress(WriteError):  # why the disk is full is being said already
            folder.running = ()
        if view is not None:
            view.flush()


def _run_here(book: Book, make_runner: Callable[[], Runner]) -> None:
    runner: Runner | None = None
    in_a_row = 0
    while (job := book.start()) is not None:
        runner = runner or make_runner()
        try:
            outcome = attempt(runner, job)
        except MemoryRanOutError as error:
            runner, in_a_row = None, in_a_row + 1  # a new one, without whatever this one holds
            book.abandon(job.proposal, f"memory ran out ({error})")
            if in_a_row >= LOST_IN_A_ROW:
                raise GaveUpError(
                    f"the search was given up: {LOST_IN_A_ROW} trials one after another found no memory, the last one "
                    f"like this: {error}; end what else uses it, or take smaller batches in a new run, then go on with "
                    "`mpsearch resume`"
                ) from None
        else:
            in_a_row = 0
            book.finish(job.proposal, outcome)
