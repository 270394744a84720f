"""Trials on the workers of a Ray cluster, of one's own or of many machines: the only file that imports ray.

A worker is a process (a Ray actor) on one node. It makes a runner once, gets jobs and answers with outcomes; it reads
the data where it is and no file of the run. What this process keeps in mind is which node can run trials, who runs
what, and what is to be run again because a worker was lost. Nodes that join get workers, nodes that go lose theirs, and
`share` says how many each should have.

Whatever takes a worker away (its node, the killer of processes that use too much memory, whoever preempts it) is no
fault of the config: the job goes to another node, `TRIES` times in all.

Ray's actors alone are used, not Ray Tune: Tune asks for a folder that all nodes see, places trials where it likes, and
keeps a record of its own that would have to agree with the run's.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import secrets
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mpsearch.errors import GaveUpError, MpsearchError, RunError, WriteError
from mpsearch.private.ray import files_in, handler_of_sigterm_kept, mute_workers, watched
from mpsearch.record import RunFolder, TrialRecord, alive, this_process
from mpsearch.search.book import Book, explain
from mpsearch.search.job import Job, Outcome, Runner

logger = logging.getLogger(__name__)
progress = logging.getLogger("mpsearch.progress")

TRIES = 3
"""Workers that a trial may lose before it is recorded as one that could not be run."""

LOST_IN_A_ROW = 5
"""Trials that could not be run, one after another, before the search is given up."""

SETUPS = 3
"""Workers that may die while they are set up on a node, one after another, before the node is left out."""

PATIENCE_S = 300.0
"""How long a search waits for a node to join where none is there."""

LOOK_S = 1.0
"""How often it looks which nodes there are."""

CLIENT_TRIES = 3
"""How often a cluster at `ray://` is asked to serve a client; Ray gives each try half a minute."""

LONGEST_FOLDER = 107 - len("/session_2026-11-27_10-46-23_376328_4194304/sockets/plasma_store")
"""Bytes of the path of the folder in which Ray makes its sockets, whose own may have 107."""

THREADS = 200
"""Without so many, the processes of a Ray cluster of one's own do not start, and do not end either."""

SAID_AFTER_S = 10.0
"""Time after which it is said that Ray is waited for."""

HALF_MADE_S = 3600.0
"""Age from which a file that was begun and never filled is of a driver that was killed."""

VERSIONS = ("mpsearch", "torch")
"""What is named where a node has it in another version; of Ray and Python the cluster itself asks for the same."""


def run_on_ray(
    book: Book,
    folder: RunFolder,
    make_runner: Callable[[], Runner],
    address: str,
    concurrency: int,
    check: Callable[[Any], None] | None = None,
) -> None:
    """Run the trials of `book` on the cluster at `address`, or on one that is started for it; see `run_trials`."""
    with _ray(address, folder.id) as (ray, own):
        crew = Crew(ray, book, folder, make_runner, concurrency, None if own else check, own)
        try:
            crew.work()
        finally:
            crew.dismiss()


@dataclass(eq=False)
class Node:
    """A machine of the cluster, as far as this search is concerned."""

    id: str
    name: str
    cpus: float
    gpus: float = 0.0
    fit: bool = False  # it has been seen to have what trials need
    refusal: Exception | None = None  # why it is left out
    deaths: int = 0  # workers that died while they were set up, since the last one that did not


def share(nodes: Sequence[Node], concurrency: int, gpus: float = 0.0) -> dict[str, int]:
    """How many of `concurrency` workers each node should have: whoever has most CPUs a worker gets the next one.

    Args:
        nodes: that can run trials.
        concurrency: workers in all.
        gpus: that each worker needs, or a fraction of one; a node has no more workers than it has room for.

    >>> share([Node("a", "a", 8), Node("b", "b", 4)], 3)
    {'a': 2, 'b': 1}
    """
    counts = {node.id: 0 for node in nodes}
    room = {node.id: math.floor(node.gpus / gpus + 1e-6) if gpus else concurrency for node in nodes}
    for _ in range(concurrency):
        free = [node for node in nodes if counts[node.id] < room[node.id]]
        if not free:
            break
        counts[max(free, key=lambda node: node.cpus / (counts[node.id] + 1)).id] += 1
    return counts


@dataclass(eq=False)
class _Worker:
    """An actor, and what it does now."""

    actor: Any
    node: Node
    ref: Any  # of what it does: its set-up or a job
    ready: bool = False
    job: Job | None = None
    retired: bool = False  # it ends with what it does


@dataclass(eq=False)
class _Lost:
    """A job whose worker was lost."""

    job: Job
    nodes: list[str] = field(default_factory=list)  # where that was


class Crew:
    """The workers of a search."""

    def __init__(
        self,
        ray: Any,
        book: Book,
        folder: RunFolder,
        make_runner: Callable[[], Runner],
        concurrency: int,
        check: Callable[[Any], None] | None,
        own: bool,
    ) -> None:
        self._ray, self._book, self._folder, self._concurrency, self._own = ray, book, folder, concurrency, own
        self._check = check is not None
        # Unpickled by a worker when it can import what this process can, a factory from the working directory, say.
        self._setup = ray.put((ray.cloudpickle.dumps(make_runner), ray.cloudpickle.dumps(check), sys.path, os.getcwd()))
        self._class = ray.remote(_worker_class())
        self._nodes: dict[str, Node] = {}
        self._left: set[str] = set()  # names of nodes that are gone
        self._workers: list[_Worker] = []
        self._again: list[_Lost] = []
        self._lost: dict[int, _Lost] = {}  # by number of the trial
        self._lost_in_a_row = 0
        self._looked_s = -math.inf
        self._alone_s: float | None = None  # since when no node is there
        self._look()
        total = sum(node.gpus for node in self._nodes.values())
        self._gpus = min(1.0, total / concurrency)

    def work(self) -> None:
        """Run trials until there are no more."""
        while True:
            self._look()
            self._staff()
            self._hand_out()
            busy = any(worker.job for worker in self._workers)
            if self._book.over and not busy and not self._again:
                return
            self._wait_for_nodes()
            refs = [worker.ref for worker in self._workers if worker.ref is not None]
            if not refs:
                time.sleep(LOOK_S / 4)
                continue
            for ref in self._ray.wait(refs, timeout=LOOK_S)[0]:
                self._take(next(worker for worker in self._workers if worker.ref == ref))

    def dismiss(self) -> None:
        """End all workers."""
        for worker in [*self._workers]:
            self._end(worker)

    # ---------------------------------------------------------------------------------------------------- nodes

    def _look(self) -> None:
        """See which nodes there are."""
        if time.monotonic() - self._looked_s < LOOK_S or (self._own and self._nodes):
            return
        self._looked_s = time.monotonic()
        there = {about["NodeID"]: about for about in self._ray.nodes() if about["Alive"]}
        for id, about in there.items():
            has = about["Resources"]
            if id not in self._nodes and has.get("CPU", 0) > 0:
                node = Node(id, _name(about), has["CPU"], has.get("GPU", 0.0), fit=not self._check)
                self._nodes[id] = node
                if not self._own:
                    logger.info("node %s joins, with %g CPUs and %g GPUs", node.name, node.cpus, node.gpus)
        for id in self._nodes.keys() - there.keys():
            node = self._nodes.pop(id)
            self._folder.note_trouble(id, None)
            if node.refusal is None:
                progress.warning("node %s is gone; what it ran is run elsewhere", node.name)

    @property
    def _able(self) -> list[Node]:
        return [node for node in self._nodes.values() if node.refusal is None]

    def _wait_for_nodes(self) -> None:
        """Raises what ends the search where no node can run trials, or none has come for long."""
        if self._able or any(worker.job for worker in self._workers):
            self._alone_s = None
            return
        refusals = [node for node in self._nodes.values() if node.refusal is not None]
        if refusals and self._own:
            assert refusals[0].refusal is not None
            raise refusals[0].refusal
        if refusals:
            raise GaveUpError(
                "the search was given up, because no node of the cluster can run its trials:\n"
                + "".join(f"  node {node.name}: {node.refusal}\n" for node in refusals)
                + "Every node needs mpsearch, the modules that the study names, and the data under the path that it "
                f"gives: see to that, and go on with `mpsearch resume {self._folder.path}`"
            )
        if self._alone_s is None:
            self._alone_s = time.monotonic()
            progress.warning("no node of the cluster has CPUs for trials: waiting for one to join")
        if time.monotonic() - self._alone_s > PATIENCE_S:
            raise GaveUpError(
                f"the search was given up: for {PATIENCE_S:g} s no node of the cluster had CPUs for trials; start "
                f"nodes, then go on with `mpsearch resume {self._folder.path}`"
            )

    def _leave_out(self, node: Node, why: Exception) -> None:
        """No more trials on this node."""
        if node.refusal is not None:
            return
        node.refusal = why
        if not self._own:
            progress.warning("node %s is left out: %s", node.name, why)
            self._folder.note_trouble(node.id, f"node {node.name} is left out: {why}")
        for worker in [worker for worker in self._workers if worker.node is node]:
            if worker.job is None:
                self._end(worker)
            else:
                worker.retired = True

    # -------------------------------------------------------------------------------------------------- workers

    def _staff(self) -> None:
        """Start the workers that nodes should have, and let go of those that are too many."""
        if self._book.over and not self._again:
            return
        plan = share(self._able, self._concurrency, self._gpus)
        for node in self._able:
            here = [worker for worker in self._workers if worker.node is node and not worker.retired]
            wanted = plan[node.id] if node.fit else min(1, plan[node.id])  # the first one finds out
            for worker in sorted(here, key=lambda worker: worker.job is not None)[: max(0, len(here) - wanted)]:
                if worker.job is None:
                    self._end(worker)
                else:
                    worker.retired = True
            for _ in range(wanted - len(here)):
                self._start(node)

    def _start(self, node: Node) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        actor = self._class.options(
            # We say where workers are and how many; a small share tells others on the cluster that they are there.
            num_cpus=min(1.0, node.cpus / self._concurrency),
            num_gpus=self._gpus,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
            max_restarts=0,
        ).remote()
        ref = actor.set_up.remote(self._setup, VERSIONS, check=not node.fit)
        self._workers.append(_Worker(actor, node, ref))

    def _end(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        with contextlib.suppress(Exception):  # it may be gone, or the cluster
            self._ray.kill(worker.actor)

    # ----------------------------------------------------------------------------------------------------- jobs

    def _hand_out(self) -> None:
        """Give every idle worker a job: one that was lost elsewhere, else a new one."""
        at = Counter(worker.node.id for worker in self._workers)
        for worker in [worker for worker in self._workers if worker.ready and worker.job is None]:
            job = self._lost_job(worker.node)
            if job is None and not self._book.over:
                job = self._book.start()
            if job is None:
                continue
            number = job.proposal.number
            threads = max(1, math.floor(worker.node.cpus / at[worker.node.id]))
            logger.info("trial %d, rung %d starts on node %s", number, job.proposal.rung, worker.node.name)
            worker.job, worker.ref = job, worker.actor.run.remote(job, threads)

    def _lost_job(self, node: Node) -> Job | None:
        """A lost job for this node: one that was not lost there, if another node may still take those that were."""
        others = {worker.node.id for worker in self._workers if worker.node.fit and not worker.retired}
        for lost in self._again:
            if node.id not in lost.nodes or others <= set(lost.nodes):
                self._again.remove(lost)
                return lost.job
        return None

    def _take(self, worker: _Worker) -> None:
        """What a worker has answered to its set-up or its job; or that it is lost."""
        ref, worker.ref = worker.ref, None
        try:
            answer = _Answer(**self._ray.get(ref))
        except self._ray.exceptions.RayTaskError as error:  # what our own code there did not catch
            cause = error.cause if isinstance(error.cause, Exception) else error
            answer = _Answer(refused=RunError(f"no worker can be set up: {explain(cause)}"))
            if worker.job is not None:
                config = worker.job.proposal.config
                answer = _Answer(Outcome(TrialRecord(config, "failed", reason=explain(cause), started_s=time.time())))
        except self._ray.exceptions.RayError as error:
            self._bury(worker, error)
            return
        for level, line in answer.log:
            said = progress if level >= logging.WARNING else logger
            said.log(level, "node %s: %s", worker.node.name, line)
        if worker.job is None:
            self._set_up(worker, answer)
            return
        if answer.no_memory is not None:
            self._end(worker)  # and whatever memory it holds
            self._lose(worker.job, worker.node, f"memory ran out: {answer.no_memory}")
            return
        job, worker.job = worker.job, None
        if answer.outcome is None:
            assert answer.refused is not None
            if isinstance(answer.refused, WriteError) and self._own:
                raise answer.refused
            self._leave_out(worker.node, answer.refused)
            self._again.append(_Lost(job, [*self._lost.get(job.proposal.number, _Lost(job)).nodes, worker.node.id]))
        else:
            self._lost.pop(job.proposal.number, None)
            self._lost_in_a_row = 0
            self._book.finish(job.proposal, answer.outcome)
        if worker.retired and worker in self._workers:
            self._end(worker)

    def _set_up(self, worker: _Worker, answer: _Answer) -> None:
        node, refused = worker.node, answer.refused
        if refused is not None:
            known = isinstance(refused, MpsearchError)
            self._leave_out(node, refused if known else RunError(f"no worker can be set up: {explain(refused)}"))
            return
        here = {name: version(name) for name in VERSIONS}
        others = [
            f"{name} {there} (here: {here[name]})" for name, there in answer.versions.items() if there != here[name]
        ]
        if others and not node.fit:
            progress.warning("node %s has %s: its trials may come out otherwise", node.name, ", ".join(others))
        node.fit, node.deaths, worker.ready = True, 0, True

    def _bury(self, worker: _Worker, error: Exception) -> None:
        """A worker is lost, and what it did is to be done elsewhere."""
        job, node, said = worker.job, worker.node, str(error)
        self._end(worker)
        self._looked_s = -math.inf
        self._look()
        logger.info("Ray says of a worker on node %s: %s", node.name, said)
        gone = node.id not in self._nodes
        cause = "its node is gone" if gone else "killed, or out of memory"
        cause = "memory ran low" if "low on memory" in said else cause
        if job is None:
            node.deaths += not gone
            if node.deaths >= SETUPS:
                why = (
                    f"no worker can be set up: {node.deaths} died of it ({cause}); each needs memory: go on with fewer "
                    f"at a time, `mpsearch resume {self._folder.path} --set search.concurrency=1`, or in this process, "
                    "`--set engine.address=none`"
                )
                self._leave_out(node, GaveUpError(why))
            return
        self._lose(job, node, cause)

    def _lose(self, job: Job, node: Node, cause: str) -> None:
        """Have a job that was lost on a node run on another one, `TRIES` times in all."""
        number = job.proposal.number
        lost = self._lost.setdefault(number, _Lost(job))
        lost.nodes.append(node.id)
        if len(lost.nodes) < TRIES:
            logger.info("trial %d lost its worker on node %s (%s) and is run again", number, node.name, cause)
            self._again.append(lost)
            return
        del self._lost[number]
        self._lost_in_a_row += 1
        reason = f"its worker died {TRIES} times ({cause})"
        progress.warning("trial %d could not be run, %s", number, reason)
        self._book.abandon(job.proposal, reason)
        if self._lost_in_a_row >= LOST_IN_A_ROW:
            raise GaveUpError(
                f"the search was given up: {LOST_IN_A_ROW} trials one after another lost their workers {TRIES} times "
                f"each, the last one like this: {cause}; give workers more memory (fewer at a time: "
                f"search.concurrency), then go on with `mpsearch resume {self._folder.path}`"
            )


@dataclass(frozen=True)
class _Answer:
    """What a worker says of its set-up, or of a job."""

    outcome: Outcome | None = None
    refused: Exception | None = None  # why this node cannot go on
    no_memory: str | None = None  # that the trial found none: the worker is of no more use
    log: tuple[tuple[int, str], ...] = ()  # what was logged there, with its level
    versions: dict[str, str] = field(default_factory=dict)


def _name(about: dict[str, Any]) -> str:
    return f"{about['NodeManagerHostname']} ({about['NodeManagerAddress']})"


def _worker_class() -> type:
    """The class of the actors. It is sent as it is, so that a node without mpsearch can say so."""

    class Worker:
        """One process: the runner is made once and kept, jobs come and go."""

        def set_up(
            self, setup: tuple[bytes, bytes, list[str], str], packages: tuple[str, ...], check: bool
        ) -> dict[str, Any]:
            """Make the runner and, if `check`, see that this node has the data; what hinders it is returned."""
            import contextlib
            import importlib.metadata
            import logging
            import os
            import pickle
            import sys

            maker, checker, search_path, here = setup
            self.lines: list[tuple[int, str]] = []
            lines = self.lines

            class Lines(logging.Handler):
                def emit(self, record: logging.LogRecord) -> None:
                    lines.append((record.levelno, record.getMessage()))

            logging.getLogger("mpsearch").addHandler(Lines(logging.INFO))
            logging.getLogger("mpsearch").setLevel(logging.INFO)
            refused = None
            with contextlib.suppress(OSError):  # another machine may not have it
                os.chdir(here)
            sys.path += [path for path in search_path if path not in sys.path]
            try:
                self.runner = pickle.loads(maker)()
                if check:
                    pickle.loads(checker)(self.runner)
            except Exception as error:
                refused = error
            versions = {}
            for name in packages:
                with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                    versions[name] = importlib.metadata.version(name)
            return {"refused": refused, "versions": versions, "log": self.said()}

        def run(self, job: Any, threads: int) -> dict[str, Any]:
            """Run a job on so many threads."""
            import torch

            from mpsearch.errors import WriteError
            from mpsearch.search.book import MemoryRanOutError, attempt

            torch.set_num_threads(threads)
            try:
                return {"outcome": attempt(self.runner, job), "log": self.said()}
            except WriteError as error:
                return {"refused": error, "log": self.said()}
            except MemoryRanOutError as error:
                return {"no_memory": str(error), "log": self.said()}

        def said(self) -> tuple[tuple[int, str], ...]:
            """What was logged since the last time."""
            said = tuple(self.lines)
            self.lines.clear()
            return said

    return Worker


_WITHOUT_RAY = "or run the trials in this process with `--set engine.address=none`"

_QUIET = {"RAY_USAGE_STATS_ENABLED": "0"}

_BOUND = {"RAY_NUM_REDIS_GET_RETRIES": "3"}
"""Tries, of up to 40 s, to reach the head of a cluster of one's own; Ray's default is 20."""

_OWNER = "driver.json"
"""In the temporary folder of a run under a Ray of its own: the process that it belongs to."""


@contextlib.contextmanager
def _ray(address: str, run: str) -> Iterator[tuple[Any, bool]]:
    """Ray, started or reached for the time of the block, and whether it is this run's own.

    Where the process already has it, it stays as it is.
    """
    own = address == "local"
    for name, value in (_QUIET | (_BOUND if own else {})).items():
        os.environ.setdefault(name, value)
    if sys.flags.optimize > 1:
        raise RunError(f"Ray needs docstrings: leave out python's -OO (PYTHONOPTIMIZE=2), {_WITHOUT_RAY}")
    import ray

    if ray.is_initialized():
        yield ray, False
        return
    mute_workers(ray)
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    if own:
        options |= {"include_dashboard": False, "object_store_memory": 2**27}
        # A cluster listens on the network: it gets a secret of its own, and so needs no home to keep one in.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    with contextlib.ExitStack() as at_the_end:
        try:
            if own:
                _check_here()
                temporary = at_the_end.enter_context(_temporary_folder(run))
                options |= files_in(temporary, shared_memory=os.access("/dev/shm", os.W_OK))
                at_the_end.enter_context(watched(temporary))
            at_the_end.callback(ray.shutdown)
            _knock(address)
            _connect(ray, options)
        except RunError:
            raise
        except Exception as error:  # Ray has many
            doing, check = f"reach a Ray cluster at '{address}'", "engine.address"
            if own:
                doing, check = "start Ray", "the limit of processes (`ulimit -u`) and the free memory"
            raise RunError(f"cannot {doing} ({explain(error)}): check {check}, {_WITHOUT_RAY}") from None
        yield ray, own


def _check_here() -> None:
    """See that 127.0.0.1 can be reached and threads can be started: Ray waits in vain for either. Raises RunError."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            socket.create_connection(listening.getsockname(), timeout=10).close()
    except OSError as error:
        raise RunError(
            f"Ray cannot be started: 127.0.0.1 cannot be reached ({error.strerror or error}): bring the loopback "
            f"interface up (`ip link set lo up`), {_WITHOUT_RAY}"
        ) from None
    at_the_end, threads = threading.Event(), []
    try:
        for _ in range(THREADS):
            threads.append(threading.Thread(target=at_the_end.wait))
            threads[-1].start()
    except RuntimeError:
        raise RunError(
            f"Ray cannot be started: it needs {THREADS} threads and more, and this user may start {len(threads) - 1}: "
            f"raise the limit (`ulimit -u`, a container's `--pids-limit`), {_WITHOUT_RAY}"
        ) from None
    finally:
        at_the_end.set()


@contextlib.contextmanager
def _temporary_folder(run: str) -> Iterator[Path]:
    """A folder for Ray's sockets and logs: the run's own, so that what a killed driver left is found and removed.

    Raises:
        RunError: none can be made whose path is short enough for sockets.
    """
    places, refusals = ["/tmp"], []
    with contextlib.suppress(OSError):
        places.append(tempfile.gettempdir())
    for place in dict.fromkeys(places):
        folder = Path(place, f"mpsearch-{run}")
        if len(os.fsencode(folder)) > LONGEST_FOLDER:
            refusals.append(f"{place} is too long a path for sockets")
            continue
        remove_leftovers(folder.parent)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.mkdir(mode=0o700)
            (folder / _OWNER).write_text(json.dumps(this_process()), encoding="utf-8")
            break
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            refusals.append(f"{place}: {error.strerror}")
    else:
        raise RunError(
            f"Ray cannot be started: it has no folder for sockets and logs ({'; '.join(refusals)}): set TMPDIR to one "
            f"that can be written, of at most {LONGEST_FOLDER - len(f'/mpsearch-{run}')} bytes, {_WITHOUT_RAY}"
        )
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _connect(ray: Any, options: dict[str, Any]) -> None:
    """Start or reach Ray. A busy head may take longer to serve a client than Ray waits: it is asked again."""
    for left in reversed(range(CLIENT_TRIES)):
        try:
            with handler_of_sigterm_kept(), _said_if_long("Ray is starting; it may take two minutes"):
                ray.init(**options)
            return
        except ConnectionError as error:
            if not left or not options["address"].startswith("ray://"):
                raise
            progress.warning("the cluster does not serve us yet (%s): asking again", type(error).__name__)


@contextlib.contextmanager
def _said_if_long(message: str) -> Iterator[None]:
    """Print a message if the block takes `SAID_AFTER_S`."""
    timer = threading.Timer(SAID_AFTER_S, progress.warning, [message])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def remove_leftovers(place: Path) -> None:
    """Remove the temporary folders of drivers that were killed; those of other users and of living drivers stay."""
    for owner in place.glob(f"mpsearch-*/{_OWNER}"):
        try:
            about = owner.stat()
            dead = not alive(json.loads(owner.read_text(encoding="utf-8")))
        except OSError:  # another user's
            continue
        except ValueError:
            dead = about.st_uid == os.getuid() and time.time() - about.st_mtime > HALF_MADE_S
        if dead:
            shutil.rmtree(owner.parent, ignore_errors=True)


def _knock(address: str) -> None:
    """See whether anybody listens at HOST:PORT: Ray takes minutes to give up. Raises OSError."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if separator:
        socket.create_connection((host, int(port)), timeout=10).close()
