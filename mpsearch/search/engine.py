"""run_trials: take proposals from the controller, run them, put what became of them on the disk.

Here, or under Ray Tune: `engine.address` says which, and the trials are the same. This is the only file that imports
ray, and it does so only where Ray is asked for. Nothing that Ray keeps is needed to go on after a crash: the run
folder holds every trial that has ended, and those that had not are proposed anew.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import pickle
import secrets
import shutil
import socket
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mpsearch.errors import MpsearchError, RunError, WriteError
from mpsearch.files import no_room
from mpsearch.observer import SILENT, Observer
from mpsearch.private.ray import (
    TUNE_HERE,
    files_in,
    handler_of_sigterm_kept,
    mute_workers,
    session_of_client,
    watched,
)
from mpsearch.record import RunFolder, RunningTrial, TrialRecord, WallTime, alive, this_process
from mpsearch.search.controller import Proposal, SearchController
from mpsearch.search.view import OptunaView
from mpsearch.study import EngineSpec

logger = logging.getLogger(__name__)

Runner = Callable[[Proposal], TrialRecord]


def run_trials(
    controller: SearchController,
    folder: RunFolder,
    view: OptunaView | None,
    make_runner: Callable[[], Runner],
    engine: EngineSpec,
    concurrency: int = 1,
    observer: Observer = SILENT,
) -> None:
    """Run trials until the controller has no more; then `controller.stop_reason` says why.

    A trial that raises, or whose worker process dies twice, is recorded as failed with the reason, and the search goes
    on. A broken set-up (`make_runner` raises) ends it, since no trial could do better.

    Args:
        controller: proposes configs, and has been given the records of `folder`.
        folder: of the run, inside its `driving`.
        view: the Optuna study that shows the run, if there is one.
        make_runner: called once in each worker process; what it returns runs one proposal after another there. Must be
            picklable where Ray is used.
        engine: `address: none` runs one trial at a time in this process and ignores `concurrency`.
        concurrency: workers, each with its share of the CPUs (and GPUs).
        observer: told in this process when a trial starts and when it has ended.

    Raises:
        RunError: a trial could not be recorded, or Ray cannot be started or reached.
        WriteError: weights could not be written; the trial is on no record, and is proposed again by a resumed run.
        KeyboardInterrupt: as given; the trials that ran are dropped, those that had ended are on the disk.
    """
    book = _Book(controller, folder, view, observer)
    try:
        if engine.address == "none":
            _run_here(book, make_runner)
        else:
            _run_on_ray(book, folder, make_runner, engine.address, concurrency)
    finally:
        with contextlib.suppress(WriteError):  # why the disk is full is being said already
            folder.running = ()
        if view is not None:
            view.flush()


def attempt(runner: Runner, proposal: Proposal) -> TrialRecord:
    """The record of a trial, failed with its reason if `runner` raises. Raises WriteError where a disk is full."""
    started_s, clock = time.time(), time.perf_counter()
    try:
        return runner(proposal)
    except WriteError:  # not the fault of the config: the run ends, and a resumed one tries it again
        raise
    except Exception as error:  # of any kind: a failed trial is a result, and the search goes on
        if no_room(error):  # of the task's own files, or of a compiler's
            raise WriteError(f"{explain(error)}: make room on that disk, then go on with `mpsearch resume`") from None
        wall = WallTime(train_s=time.perf_counter() - clock)  # where it went is not known; most of it, usually
        return TrialRecord(proposal.config, "failed", reason=explain(error), wall=wall, started_s=started_s)


def explain(error: BaseException) -> str:
    """`Type: message (file.py, line 7, in function)`, of the innermost frame, on one line."""
    message = textwrap.shorten(str(error), 500, placeholder=" ...") or "no message"
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno}, in {frames[-1].name})" if frames else ""
    return f"{type(error).__name__}: {message}{where}"


class _Book:
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

    def start(self) -> Proposal | None:
        """The next trial, noted as running; None: there is no more, or none before one that runs has ended."""
        proposal = self._controller.ask()
        if proposal is not None:
            trial = RunningTrial(proposal.number, proposal.origin, proposal.cost, time.time(), proposal.rung)
            self._running[proposal.number] = trial
            self._folder.running = tuple(self._running.values())
            self._observer.on_trial_started(trial)
        return proposal

    @property
    def over(self) -> bool:
        """Whether no trial starts any more."""
        return self._controller.stop_reason is not None

    def finish(self, proposal: Proposal, record: TrialRecord) -> None:
        """Record what became of a trial; when this returns, it is on the disk."""
        record = self._controller.tell(proposal, record)
        self._folder.append(record)
        del self._running[proposal.number]
        self._folder.running = tuple(self._running.values())
        if self._view is not None:
            self._view.add(record)
        self._observer.on_trial_ended(record)


def _run_here(book: _Book, make_runner: Callable[[], Runner]) -> None:
    runner: Runner | None = None
    while (proposal := book.start()) is not None:
        runner = runner or make_runner()
        book.finish(proposal, attempt(runner, proposal))


# ------------------------------------------------------------------------------------------------------------- Ray

_QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths of a factory's arguments mean what they mean here
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C is ours: Tune would swallow it
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": str(10**9),  # the run folder is the record; Tune's own is never read
}


def _run_on_ray(
    book: _Book, folder: RunFolder, make_runner: Callable[[], Runner], address: str, concurrency: int
) -> None:
    with _ray(address, folder) as ray, _tune_folder(folder) as storage:
        from ray import tune
        from ray.tune.search import Searcher

        cpus = ray.cluster_resources().get("CPU", 1.0) / concurrency
        gpus = min(1.0, ray.cluster_resources().get("GPU", 0.0) / concurrency)
        threads = max(1, math.floor(cpus))
        # Unpickled by the worker when it can import what this process can, a factory from the working directory, say.
        maker, search_path, here = ray.cloudpickle.dumps(make_runner), sys.path, os.getcwd()
        failure: list[Exception] = []  # what ends the run: Tune would log and swallow it
        asked: dict[str, Proposal] = {}  # by Tune's trial id

        @contextlib.contextmanager
        def failure_noted() -> Iterator[None]:
            try:
                yield
            except Exception as error:
                failure.append(error)

        class Search(Searcher):
            """Our ask and tell as Tune calls them."""

            def suggest(self, trial_id: str) -> Any:
                proposal = None
                with failure_noted():
                    proposal = None if failure else book.start()
                if proposal is None:
                    return Searcher.FINISHED if failure or book.over else None  # None: ask again later
                asked[trial_id] = proposal
                return {"proposal": proposal}

            def on_trial_complete(
                self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
            ) -> None:
                if failure or error or not result:  # an error comes again below, with what is known of it
                    return
                with failure_noted():
                    if result["refused"] is not None:
                        raise result["refused"]
                    book.finish(asked.pop(trial_id), result["record"])

        class Died(tune.Callback):
            """Trials that took their worker process with them, twice."""

            def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
                with failure_noted():
                    said = Path(trial.error_file).read_text(encoding="utf-8").strip() if trial.error_file else "nothing"
                    logger.info("Ray says of trial %d: %s", asked[trial.trial_id].number, said)
                    killed = "killed, or out of memory" if "worker process has died" in said else said.splitlines()[-1]
                    cause = "memory ran low" if "low on memory" in said else killed
                    reason = f"its worker process died twice ({cause})"
                    proposal = asked.pop(trial.trial_id)
                    book.finish(proposal, TrialRecord(proposal.config, "failed", reason=reason, started_s=time.time()))

        class Stop(tune.Stopper):
            def __call__(self, *_: object) -> bool:
                return False

            def stop_all(self) -> bool:
                return bool(failure)

        class Trial(tune.Trainable):
            """One worker process: the runner is made once and kept, proposals come and go."""

            def setup(self, config: dict[str, Any]) -> None:
                self.runner: Runner | None = None
                self.refused: Exception | None = None
                self.reset_config(config)
                try:
                    import torch

                    torch.set_num_threads(threads)
                    with contextlib.suppress(OSError):  # a node of a cluster may not have it
                        os.chdir(here)
                    sys.path += [path for path in search_path if path not in sys.path]
                    self.runner = pickle.loads(maker)()
                except Exception as error:
                    unknown = RunError(f"no worker can be set up: {explain(error)}")
                    self.refused = error if isinstance(error, MpsearchError) else unknown

            def reset_config(self, new_config: dict[str, Any]) -> bool:
                self.proposal: Proposal = new_config["proposal"]
                return True

            def step(self) -> dict[str, Any]:
                record = None
                try:
                    record = None if self.runner is None else attempt(self.runner, self.proposal)
                except WriteError as error:
                    self.refused = error
                return {"record": record, "refused": self.refused, "done": True}

        tune.run(
            Trial,
            name="trials",
            search_alg=Search(),
            num_samples=-1,
            max_concurrent_trials=concurrency,
            reuse_actors=True,
            max_failures=1,
            raise_on_failed_trial=False,
            resources_per_trial={"cpu": threads if cpus >= 1 else cpus, "gpu": gpus},
            storage_path=str(storage),
            trial_dirname_creator=lambda trial: str(trial.trial_id),
            callbacks=[Died()],
            stop=Stop(),
            verbose=0,
            **TUNE_HERE,
        )
        if failure:
            raise failure[0]


_OWNER = "driver.json"
"""In the temporary folder of a run under a Ray of its own: the process that it belongs to."""


@contextlib.contextmanager
def _tune_folder(folder: RunFolder) -> Iterator[Path]:
    """Where Tune keeps files of its own: beside the run, because all nodes of a cluster must see them."""
    path = folder.path.resolve() / "ray"
    shutil.rmtree(path, ignore_errors=True)  # of a driver that was killed
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _ray(address: str, folder: RunFolder) -> Iterator[Any]:
    """Ray, started or reached for the time of the block; where the process already has it, it stays as it is."""
    os.environ.update({name: value for name, value in _QUIET.items() if name not in os.environ})
    import ray

    for name in ("ray.tune", "ray.tune.tune", "ray.tune.execution.tune_controller"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if ray.is_initialized():
        yield ray
        return
    mute_workers(ray)
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    temporary = None
    watch: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if address == "local":
        # Short, because sockets live there; the run's own, so that what a killed driver left is found and removed.
        temporary = Path("/tmp" if os.path.isdir("/tmp") else tempfile.gettempdir(), f"mpsearch-{folder.id}")
        remove_leftovers(temporary.parent)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(mode=0o700)
        (temporary / _OWNER).write_text(json.dumps(this_process()), encoding="utf-8")
        watch = watched(temporary)
        options |= {"include_dashboard": False, **files_in(temporary), "object_store_memory": 2**27}
        # A cluster listens on the network: it gets a secret of its own, and so needs no home to keep one in.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    with watch:
        try:
            try:
                _knock(address)
                with handler_of_sigterm_kept():
                    ray.init(**options)
            except Exception as error:  # Ray has many
                doing = "start Ray" if address == "local" else f"reach a Ray cluster at '{address}'"
                raise RunError(
                    f"cannot {doing} ({explain(error)}): check engine.address, or run the trials in this process with "
                    "`--set engine.address=none`"
                ) from None
            with session_of_client(ray):
                yield ray
        finally:
            ray.shutdown()
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(place: Path) -> None:
    """Remove the temporary folders of drivers that were killed; those of other users and of living drivers stay."""
    for owner in place.glob(f"mpsearch-*/{_OWNER}"):
        try:
            dead = not alive(json.loads(owner.read_text(encoding="utf-8")))
        except (OSError, ValueError):  # another user's, or being written
            continue
        if dead:
            shutil.rmtree(owner.parent, ignore_errors=True)


def _knock(address: str) -> None:
    """See whether anybody listens at HOST:PORT: Ray takes minutes to give up. Raises OSError."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if separator:
        socket.create_connection((host, int(port)), timeout=10).close()
