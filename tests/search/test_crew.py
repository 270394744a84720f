"""Which worker gets which job, and what befalls a search whose workers are lost: with a stand-in for Ray."""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from drive import make_space, relative_cost, truth

from mpsearch.errors import GaveUpError, RunError, TaskError, WriteError, hide
from mpsearch.metric import TOP1
from mpsearch.observer import SILENT
from mpsearch.record import RunFolder, TrialRecord
from mpsearch.search import cluster
from mpsearch.search.book import Book
from mpsearch.search.cluster import Crew
from mpsearch.search.controller import SearchController
from mpsearch.search.job import Job, Outcome
from mpsearch.study import SearchSpec


class RayError(Exception):
    pass


class RayTaskError(RayError):
    cause: Exception | None = None


class Fake:
    """Ray as far as a crew uses it: what an actor does is done when it is waited for, the oldest first.

    `fate(node, number)` is asked of each set-up (number None) and each job: what it returns is the answer, and what it
    raises befalls the worker.
    """

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)
    cloudpickle = SimpleNamespace(dumps=lambda thing: thing)

    def __init__(self, fate: Callable[[str, int | None], Any], *nodes: str) -> None:
        self.there, self._fate = list(nodes), fate
        self.began: list[tuple[str, int | None]] = []
        self._ages = itertools.count()

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {
                "NodeID": f"{ord(name):056x}",
                "Alive": True,
                "Resources": {"CPU": 2.0},
                "NodeManagerHostname": name,
                "NodeManagerAddress": "::",
            }
            for name in self.there
        ]

    def put(self, thing: object) -> object:
        return thing

    def remote(self, kind: type) -> Any:
        def options(scheduling_strategy: Any, **_: Any) -> Any:
            node = chr(int(scheduling_strategy.node_id, 16))
            set_up = SimpleNamespace(remote=lambda *_, check: (next(self._ages), node, None))
            run = SimpleNamespace(remote=lambda job, threads: (next(self._ages), node, job))
            return SimpleNamespace(remote=lambda: SimpleNamespace(set_up=set_up, run=run))

        return SimpleNamespace(options=options)

    def wait(self, refs: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        return [min(refs, key=lambda ref: ref[0])], []

    def get(self, ref: tuple[int, str, Job | None]) -> dict[str, Any]:
        _, node, job = ref
        self.began.append((node, None if job is None else job.proposal.number))
        if node not in self.there:
            raise RayError("the node is dead")
        answer = self._fate(*self.began[-1])
        if answer is not None or job is None:
            return answer or {}
        record = TrialRecord(job.proposal.config, "complete", score=truth(job.proposal.config), curve=((100, 0.5),))
        return {"outcome": Outcome(record)}

    def kill(self, actor: object) -> None:
        pass

    def at(self, number: int | None) -> list[str]:
        return [node for node, n in self.began if n == number]


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "LOOK_S", 0.0)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    folder = RunFolder.create(tmp_path / "run", "", metric=TOP1)
    with folder.driving():
        yield folder


def work(ray: Fake, folder: RunFolder, rungs: tuple[int, ...] = (0,), own: bool = False) -> SearchController:
    search = SearchSpec(trials=12, max_failures_in_row=1)
    records = folder.records()
    controller = SearchController(make_space(), relative_cost, search, TOP1, records=records, rungs=rungs)
    crew = Crew(ray, Book(controller, folder, None, SILENT), folder, lambda: None, 2, lambda _: None, own)  # type: ignore[arg-type,return-value]
    try:
        crew.work()
    finally:
        crew.dismiss()
    return controller


def numbers(folder: RunFolder, state: str = "complete") -> list[int]:
    return [record.number for record in folder.records() if record.state == state]


def test_job_whose_worker_is_lost_runs_again_on_another_node(folder: RunFolder) -> None:
    def fate(node: str, number: int | None) -> None:
        if (node, number) == ("a", 4) or (node, number) == ("b", 5):
            raise RayError("the worker has died")

    ray = Fake(fate, "a", "b")
    work(ray, folder)
    assert sorted(numbers(folder)) == list(range(12))
    assert ray.at(4) in (["a", "b"], ["b"])
    assert ray.at(5) in (["b", "a"], ["a"])
    assert len(ray.at(4) + ray.at(5)) > 2  # one was lost at least


def test_trial_that_takes_three_workers_along_is_no_failure_in_a_row_and_is_tried_again(folder: RunFolder) -> None:
    def fate(node: str, number: int | None) -> None:
        if number in (3, 4):
            raise RayError("killed: the node was low on memory")

    ray = Fake(fate, "a", "b")
    assert not work(ray, folder).broken
    assert sorted(numbers(folder)) == [n for n in range(12) if n not in (3, 4)]
    assert {record.reason for record in folder.records() if record.state == "failed"} == {
        "its worker died 3 times (memory ran low)"
    }
    assert len(ray.at(3)) == len(ray.at(4)) == 3
    assert set(ray.at(3)) == {"a", "b"}
    work(Fake(lambda *_: None, "a"), folder)
    assert sorted(numbers(folder)) == list(range(12))


def test_secret_that_a_worker_says_is_not_recorded(folder: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    hide("s3cr et", "${TOKEN}")  # this process has read the study, the workers have not

    def fate(node: str, number: int | None) -> Any:
        failed = TrialRecord(make_space().ladder()[0], "failed", reason="ValueError: no s3cr et here")
        return {"outcome": Outcome(failed)} if number == 3 else None

    with caplog.at_level(logging.INFO):
        work(Fake(fate, "a"), folder)
    assert "no ${TOKEN} here" in folder.trials_jsonl.read_text()
    assert "s3cr et" not in folder.trials_jsonl.read_text() + caplog.text


def test_trial_that_finds_no_memory_runs_elsewhere_and_is_no_failure(folder: RunFolder) -> None:
    def fate(node: str, number: int | None) -> Any:
        gone = node == "a" and number is not None
        return {"no_memory": "OutOfMemoryError: CUDA out of memory"} if gone else None

    ray = Fake(fate, "a", "b")
    assert not work(ray, folder).broken
    assert sorted(numbers(folder)) == list(range(12))
    again = [number for number in range(12) if len(ray.at(number)) > 1]
    assert again
    assert all(ray.at(number)[-1] == "b" for number in again)


def test_search_whose_trials_find_no_memory_anywhere_is_given_up(folder: RunFolder) -> None:
    def fate(node: str, number: int | None) -> Any:
        return {"no_memory": "MemoryError: no message"} if number is not None and number >= 2 else None

    with pytest.raises(GaveUpError, match=r"the last one like this: memory ran out: MemoryError"):
        work(Fake(fate, "a"), folder)
    assert numbers(folder) == [0, 1]
    assert all("memory ran out" in str(record.reason) for record in folder.records()[2:])


def test_longer_rung_that_takes_workers_along_leaves_its_trial_as_it_was(folder: RunFolder) -> None:
    begun: list[int] = []

    def fate(node: str, number: int | None) -> None:
        if number is not None and number in begun:
            raise RayError("the worker has died")
        if number is not None:
            begun.append(number)

    work(Fake(fate, "a", "b"), folder, rungs=(100, 200, 300))
    before = folder.records()
    assert all(len(record.rungs) == 1 and record.reason is None for record in before)
    work(Fake(lambda *_: None, "a", "b"), folder, rungs=(100, 200, 300))
    assert any(len(record.rungs) > 1 for record in folder.records()[: len(before)])


def test_search_whose_workers_all_die_is_given_up(folder: RunFolder) -> None:
    def fate(node: str, number: int | None) -> None:
        if number is not None and number >= 2:
            raise RayError("the worker has died")

    with pytest.raises(GaveUpError, match=r"5 trials .* lost their workers 3 times each.*mpsearch resume"):
        work(Fake(fate, "a", "b"), folder)
    assert numbers(folder) == [0, 1]


def test_node_that_lacks_the_data_is_named_and_left_out(folder: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    def fate(node: str, number: int | None) -> Any:
        return {"refused": TaskError("no folder '/data'")} if node == "b" else None

    ray = Fake(fate, "a", "b")
    with caplog.at_level(logging.INFO, "mpsearch"):
        work(ray, folder)
    assert "node b (::) is left out: no folder '/data'" in caplog.text
    assert [number for node, number in ray.began if node == "b"] == [None]
    assert sorted(numbers(folder)) == list(range(12))


def test_trouble_of_a_node_is_told_until_the_node_is_gone(folder: RunFolder) -> None:
    troubles: list[str | None] = []

    def fate(node: str, number: int | None) -> Any:
        troubles.append(RunFolder.open(folder.path).trouble)
        if number == 8 and "b" in ray.there:
            ray.there.remove("b")
        return {"refused": TaskError("no folder '/data'")} if node == "b" else None

    ray = Fake(fate, "a", "b")
    work(ray, folder)
    assert troubles[0] is None
    assert "node b (::) is left out: no folder '/data'" in troubles
    assert troubles[-1] is None


def test_search_ends_where_no_node_has_what_it_needs(folder: RunFolder) -> None:
    def fate(node: str, number: int | None) -> Any:
        return {"refused": TaskError(f"no folder '/data/{node}'")}

    with pytest.raises(GaveUpError, match=r"(?s)node a \(::\): no folder '/data/a'.*node b .*mpsearch resume"):
        work(Fake(fate, "a", "b"), folder)
    with pytest.raises(TaskError, match="no folder '/data/a'"):  # with a Ray of its own there is no other node
        work(Fake(fate, "a"), folder, own=True)


def test_node_whose_disk_is_full_is_left_out_and_its_trial_runs_elsewhere(folder: RunFolder) -> None:
    def fate(node: str, number: int | None) -> Any:
        return {"refused": WriteError("no room")} if number is not None and node == "a" else None

    work(Fake(fate, "a", "b"), folder)
    assert sorted(numbers(folder)) == list(range(12))


def test_full_disk_of_this_machine_ends_the_search(folder: RunFolder) -> None:
    def fate(node: str, number: int | None) -> Any:
        return {"refused": WriteError("no room")} if number == 2 else None

    with pytest.raises(WriteError, match="no room"):
        work(Fake(fate, "a"), folder, own=True)
    assert numbers(folder) == [0, 1]


def test_node_on_which_workers_die_while_they_are_set_up_is_left_out(folder: RunFolder) -> None:
    def fate(node: str, number: int | None) -> None:
        if node == "b":
            raise RayError("the worker has died")

    ray = Fake(fate, "a", "b")
    work(ray, folder)
    assert [node for node, number in ray.began if node == "b"] == ["b"] * 3
    assert sorted(numbers(folder)) == list(range(12))


def test_search_whose_workers_die_while_they_are_set_up_says_that_fewer_need_less_memory(folder: RunFolder) -> None:
    def fate(node: str, number: int | None) -> None:
        raise RayError("the worker has died")

    with pytest.raises(GaveUpError, match=r"3 died of it.*mpsearch resume .*search.concurrency=1.*engine.address=none"):
        work(Fake(fate, "a"), folder, own=True)


def test_nodes_that_join_are_used_and_those_that_go_are_survived(folder: RunFolder) -> None:
    def fate(node: str, number: int | None) -> None:
        if number == 3:
            ray.there = ["b"]
        if number == 8 and "c" not in ray.there:
            ray.there.append("c")

    ray = Fake(fate, "a")
    work(ray, folder)
    assert sorted(numbers(folder)) == list(range(12))
    assert {node for node, number in ray.began if number is not None} == {"a", "b", "c"}
    assert [n for n in range(12) if len(ray.at(n)) > 1 and ray.at(n)[0] != "a"] == []


def test_search_waits_for_a_node_and_not_for_ever(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cluster, "PATIENCE_S", 0.05)
    with pytest.raises(GaveUpError, match="no node of the cluster had CPUs"):
        work(Fake(lambda *_: None), folder)
    assert "waiting for one to join" in caplog.text


@pytest.mark.parametrize(("address", "busy", "asked"), [("ray://here:1", 2, 3), ("ray://here:1", 9, 3), ("auto", 9, 1)])
def test_cluster_that_is_too_busy_for_a_client_is_asked_again(address: str, busy: int, asked: int) -> None:
    calls: list[str] = []

    def init(address: str) -> None:
        calls.append(address)
        if len(calls) <= busy:
            raise ConnectionAbortedError("Starting Ray client server failed")

    with contextlib.nullcontext() if busy < asked else pytest.raises(ConnectionError):
        cluster._connect(SimpleNamespace(init=init), {"address": address})
    assert calls == [address] * asked


# ------------------------------------------------------------------------------------------------------- Ray of our own


@pytest.fixture
def tmp_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """TMPDIR, of the usual length, beside a /tmp that cannot be written."""

    def mkdir(path: Path, mode: int = 0o777) -> None:
        if path.parent == Path("/tmp"):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        os.mkdir(path, mode)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(cluster, "LONGEST_FOLDER", len(f"{tmp_path}/mpsearch-{'0' * 8}"))
    return tmp_path


def test_ray_has_its_files_in_tmpdir_where_tmp_cannot_be_written(tmp_read_only: Path) -> None:
    with cluster._temporary_folder("0" * 8) as folder:
        assert folder.parent == tmp_read_only
        assert folder.stat().st_mode & 0o777 == 0o700
        assert (folder / "driver.json").exists()
    assert list(tmp_read_only.iterdir()) == []


def test_ray_without_a_place_for_its_files_is_refused_with_what_to_do(tmp_read_only: Path) -> None:
    with pytest.raises(RunError, match=r"(?s)/tmp: Read-only.*too long.*TMPDIR.*engine.address=none"):
        cluster._temporary_folder("0" * 9).__enter__()


def test_full_disk_leaves_no_half_made_folder_of_ray(tmp_read_only: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(RunError, match="No space left"):
        cluster._temporary_folder("0" * 8).__enter__()
    assert list(tmp_read_only.iterdir()) == []


def test_sockets_of_ray_have_room_in_the_longest_folder() -> None:
    longest, session = "/" + "x" * (cluster.LONGEST_FOLDER - 1), "session_2026-11-27_10-46-23_376328_4194304"
    with socket.socket(socket.AF_UNIX) as it, pytest.raises(OSError, match="No such file"):  # and not "too long"
        it.connect(f"{longest}/{session}/sockets/plasma_store")


@pytest.mark.parametrize("lacking", ["loopback", "threads", "docstrings"])
def test_machine_that_ray_would_wait_for_in_vain_is_refused(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if lacking == "loopback":

        def refuse(*_: object) -> None:
            raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))

        monkeypatch.setattr(socket, "create_server", refuse)
    elif lacking == "threads":
        start = threading.Thread.start

        def limited(thread: threading.Thread) -> None:
            if threading.active_count() > 40:
                raise RuntimeError("can't start new thread")
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", limited)
    else:
        monkeypatch.setattr(cluster.sys, "flags", SimpleNamespace(optimize=2))
    said = {"loopback": "ip link set lo up", "threads": "this user may start .*ulimit -u", "docstrings": "-OO"}[lacking]
    with pytest.raises(RunError, match=f"{said}.*engine.address=none"), cluster._ray("local", "0" * 8):
        pass


def test_long_wait_for_ray_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(cluster, "SAID_AFTER_S", 0.0)
    cluster._connect(SimpleNamespace(init=lambda address: threading.Event().wait(0.2)), {"address": "local"})
    assert "Ray is starting" in caplog.text
