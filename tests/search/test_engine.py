"""Running trials: whatever befalls a trial, a worker or the driver, what had ended is there and counted once."""

import errno
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import drive
import optuna
import psutil
import pytest
import torch
from drive import make_space, relative_cost, truth

from mpsearch.errors import GaveUpError, RunError, TaskError, WriteError
from mpsearch.metric import TOP1
from mpsearch.observer import Observer
from mpsearch.record import RunFolder, TrialRecord
from mpsearch.search.book import explain
from mpsearch.search.controller import SearchController
from mpsearch.search.engine import run_trials
from mpsearch.search.job import Outcome
from mpsearch.search.view import open_view
from mpsearch.study import EngineSpec, SearchSpec

pytestmark = pytest.mark.study

HERE = EngineSpec(address="none")


def fates(path: Path, *names: str) -> None:
    (path / "fate").mkdir(parents=True, exist_ok=True)
    for name in names:
        (path / "fate" / name).touch()


def start(
    path: Path, address: str, trials: int, sleep_s: float, rungs: str = "0", **environment: str
) -> subprocess.Popen:
    """A driver of its own, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, drive.__file__, str(path), address, str(trials), str(sleep_s), rungs],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | environment,
    )


def wait_for_records(path: Path, count: int, driver: subprocess.Popen, timeout_s: float = 240) -> None:
    until(lambda: driver.poll() is not None or recorded(path) >= count, timeout_s)
    assert driver.poll() is None, driver.stderr.read()


def recorded(path: Path) -> int:
    return len(RunFolder.open(path).records()) if (path / "run.json").exists() else 0


def worker_pids(path: Path) -> list[int]:
    """Of every process that made a runner, once for each that it made."""
    return [int(file.name.split("-")[1]) for file in path.glob("worker-*")]


def until(done: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def assert_whole(path: Path, trials: int) -> list[TrialRecord]:
    """Nothing lost, nothing twice, and the Optuna study shows the same; of what was tried again, the failure too."""
    records = RunFolder.open(path).records()
    assert sorted(r.number for r in records) == list(range(trials))
    assert len({r.config for r in records}) == trials
    study = optuna.load_study(study_name="toy", storage=f"sqlite:///{path / 'study.db'}")
    shown = [(t.user_attrs["number"], t.user_attrs["rung"], t.state.name) for t in study.trials]
    ended_well = [one for one in shown if one[2] != "FAIL"]
    assert len(set(ended_well)) == len(ended_well)
    for record in records:
        state = "COMPLETE" if record.state == "complete" else "FAIL"
        assert {(record.number, rung, state) for rung in range(max(1, len(record.rungs)))} <= set(shown)
    assert {(number, rung) for number, rung, _ in shown} == {
        (record.number, rung) for record in records for rung in range(max(1, len(record.rungs)))
    }
    assert {t.state.name for t in study.trials} <= {"COMPLETE", "FAIL"}
    assert RunFolder.open(path).running == []
    return records


def test_trials_run_here_without_ray(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "ray"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)  # whoever imports it raises an ImportError
    drive.drive(tmp_path / "run", trials=10)
    records = assert_whole(tmp_path / "run", 10)
    assert [r.score for r in records] == [truth(r.config) for r in records]
    assert [r.cost for r in records] == [relative_cost(r.config) for r in records]
    assert len(worker_pids(tmp_path / "run")) == 1  # the runner is made once


def test_observer_is_told_of_every_trial_once_it_is_on_the_disk(tmp_path):
    events = []

    def note(event, number):
        folder = RunFolder.open(tmp_path)
        events.append((event, number, len(folder.records()), [t.number for t in folder.running]))

    class Noted(Observer):
        def on_trial_started(self, trial):
            note("started", trial.number)

        def on_trial_ended(self, record):
            note("ended", record.number)

    drive.drive(tmp_path, trials=2, observer=Noted())
    assert events == [("started", 0, 0, [0]), ("ended", 0, 1, []), ("started", 1, 1, [1]), ("ended", 1, 2, [])]


def test_failed_trials_are_recorded_with_their_reason_and_the_search_goes_on(tmp_path):
    fates(tmp_path, "nan-2", "raise-3")
    drive.drive(tmp_path, trials=8)
    records = assert_whole(tmp_path, 8)
    failed = {r.number: r for r in records if r.state == "failed"}
    assert sorted(failed) == [2, 3]
    assert failed[2].reason == "top1 is nan"
    assert failed[3].reason.startswith("ValueError: trial 3 will not do (drive.py, line ")
    assert failed[3].started_s > 1e9


def test_failed_trials_are_tried_again_by_a_resumed_run(tmp_path):
    """D7: what they lacked, room or memory, may be there now."""
    fates(tmp_path, "raise-2", "raise-3")
    drive.drive(tmp_path, trials=6)
    first = {r.number: r for r in assert_whole(tmp_path, 6)}
    (tmp_path / "fate" / "raise-2").unlink()
    drive.drive(tmp_path, trials=6)
    again = {r.number: r for r in assert_whole(tmp_path, 6)}
    assert {number for number, r in again.items() if r.state == "failed"} == {3}
    assert (again[2].config, again[2].origin, again[2].score) == (
        first[2].config,
        first[2].origin,
        truth(first[2].config),
    )
    assert {number: r for number, r in again.items() if number not in (2, 3)} == {
        number: r for number, r in first.items() if number not in (2, 3)
    }


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EDQUOT])
def test_trial_that_finds_no_room_for_its_own_files_is_on_no_record(tmp_path, monkeypatch, reason):
    def full(path, sleep_s):
        def run(job):
            raise OSError(reason, os.strerror(reason), "/data/cache")

        return run

    with monkeypatch.context() as patch:
        patch.setattr(drive, "make_runner", full)
        with pytest.raises(WriteError, match=r"OSError.*/data/cache.*make room .*mpsearch resume"):
            drive.drive(tmp_path, trials=3)
    assert recorded(tmp_path) == 0
    drive.drive(tmp_path, trials=3)
    assert_whole(tmp_path, 3)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["python", "card", "cpu", "cublas"],
)
def test_trials_that_find_no_memory_are_no_failures_in_a_row_and_are_tried_again(tmp_path, monkeypatch, error):
    left = [error] * 6  # five trials find none, and one of those that are tried again

    def short(path, sleep_s):
        def run(job):
            if job.proposal.number >= 2 and left:
                raise left.pop()
            return Outcome(TrialRecord(job.proposal.config, "complete", score=truth(job.proposal.config)))

        (path / f"worker-{os.getpid()}-{time.time_ns()}").touch()
        return run

    monkeypatch.setattr(drive, "make_runner", short)
    with pytest.raises(GaveUpError, match=r"5 trials one after another found no memory.*mpsearch resume"):
        drive.drive(tmp_path, trials=9, storage="none")
    assert len(worker_pids(tmp_path)) == 5  # a new one each time
    failed = [record for record in RunFolder.open(tmp_path).records() if record.state == "failed"]
    assert [record.number for record in failed] == [2, 3, 4, 5, 6]
    assert all(record.reason.startswith(f"memory ran out ({type(error).__name__}: ") for record in failed)
    controller = drive.drive(tmp_path, trials=9, storage="none")
    assert not controller.broken
    states = {record.number: record.state for record in RunFolder.open(tmp_path).records()}
    assert states == {number: "failed" if number == 2 else "complete" for number in range(9)}


def test_reason_is_one_line_that_is_not_endless():
    try:
        raise MemoryError("a\n  b" + " c" * 1000)
    except MemoryError as error:
        reason = explain(error)
    assert reason.startswith("MemoryError: a b c c")
    assert reason.endswith(
        f"... ({Path(__file__).name}, line {reason.split('line ')[1].split(',')[0]}, "
        "in test_reason_is_one_line_that_is_not_endless)"
    )
    assert len(reason) < 700
    assert explain(ValueError()) == "ValueError: no message"


def test_five_failures_in_a_row_stop_the_search(tmp_path):
    fates(tmp_path, "raise-0", *(f"raise-{n}" for n in range(2, 7)))
    controller = drive.drive(tmp_path, trials=30)
    assert controller.broken
    assert "5 trials failed in a row, the last one because of: ValueError: trial 6" in controller.stop_reason
    assert_whole(tmp_path, 7)
    for fate in (tmp_path / "fate").iterdir():
        fate.unlink()
    assert not drive.drive(tmp_path, trials=12).broken
    assert_whole(tmp_path, 12)


def test_set_up_that_is_broken_ends_the_search_with_its_error(tmp_path):
    folder = RunFolder.create(tmp_path / "run", "", metric=TOP1)
    controller = SearchController(make_space(), relative_cost, SearchSpec(trials=5), TOP1)
    with folder.driving(), pytest.raises(TaskError, match="no such checkpoint"):
        run_trials(controller, folder, None, drive.refuse, HERE)
    assert folder.records() == []


def test_disk_that_is_full_ends_the_search_and_resume_repeats_nothing(tmp_path, monkeypatch):
    append = RunFolder.append

    def full(self, record):
        if record.number == 4:
            raise RunError("no room")
        append(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append", full)
        with pytest.raises(RunError, match="no room"):
            drive.drive(tmp_path, trials=9)
    assert recorded(tmp_path) == 4
    drive.drive(tmp_path, trials=9)
    assert_whole(tmp_path, 9)


@pytest.mark.parametrize("storage", ["journal", "none"])
def test_every_storage_gives_the_same_trials(tmp_path, storage):
    drive.drive(tmp_path / "a", trials=12)
    drive.drive(tmp_path / "b", trials=12, storage=storage)
    first, second = (RunFolder.open(tmp_path / name).records() for name in "ab")
    assert [(r.number, r.config, r.score) for r in first] == [(r.number, r.config, r.score) for r in second]


@pytest.mark.parametrize(
    "ends",
    [  # in the ladder, and while the sampler proposes
        [(3, signal.SIGKILL)],
        pytest.param([(3, signal.SIGINT), (9, signal.SIGKILL)], marks=pytest.mark.slow),
    ],
)
def test_driver_ended_at_any_time_is_resumed_with_nothing_lost_and_a_second_one_is_refused(tmp_path, ends):
    path = tmp_path / "run"
    for count, how in ends:
        driver = start(path, "none", trials=14, sleep_s=0.1, rungs="100,200,300")
        wait_for_records(path, count, driver)
        with pytest.raises(RunError, match=f"driven by process {driver.pid} "):
            drive.drive(path, trials=14)
        os.kill(driver.pid, how)
        _, errors = driver.communicate()
        assert driver.returncode == -how
        assert ("KeyboardInterrupt" in errors) == (how == signal.SIGINT)
        assert count <= recorded(path) < 14
        assert RunFolder.open(path).running == []
    drive.drive(path, trials=14, rungs=(100, 200, 300))
    assert any(len(record.rungs) > 1 for record in assert_whole(path, 14))


def test_time_limit_lets_running_trials_end(tmp_path):
    folder = RunFolder.create(tmp_path / "run", "", metric=TOP1)
    space = make_space()
    controller = SearchController(space, relative_cost, SearchSpec(trials=100, time_limit_s=0.5), TOP1)
    with folder.driving():
        view = open_view("none", folder, "toy", space, TOP1)
        run_trials(controller, folder, view, functools.partial(drive.make_runner, folder.path, 0.2), HERE)
    assert 1 <= len(folder.records()) <= 3
    assert all(r.state == "complete" for r in folder.records())


# Ray takes some ten seconds to start, most of them waiting: one test, with two drivers at a time.


@pytest.mark.ray
@pytest.mark.slow
def test_ray_takes_its_workers_along_when_its_driver_is_killed(tmp_path):
    killed = tmp_path / "killed"
    victim = start(killed, "local", trials=500, sleep_s=0.1, HOME="/proc/nowhere")  # a home that nobody can write
    wait_for_records(killed, 3, victim)
    workers = worker_pids(killed)
    assert any(map(psutil.pid_exists, workers))
    family = psutil.Process(victim.pid).children(recursive=True)
    assert {psutil.Process(pid) for pid in workers if psutil.pid_exists(pid)} <= set(family)
    os.kill(victim.pid, signal.SIGKILL)
    victim.communicate()
    cluster = f"/tmp/mpsearch-{RunFolder.open(killed).id}"
    # Ray's agents would live for a minute more; the watchdog, which removes the folder, ends last.
    assert psutil.wait_procs(family, timeout=45)[1] == []
    assert not os.path.exists(cluster)
    before = recorded(killed)
    drive.drive(killed, trials=before + 5)
    assert_whole(killed, before + 5)


@pytest.mark.ray
def test_ray_runs_the_same_trials_and_survives_its_workers(tmp_path):
    path = tmp_path / "run"
    fates(path, "nan-2", "raise-3", "die_once-5")
    driver = start(path, "local", trials=12, sleep_s=0.05, rungs="100,200,300")
    output, errors = driver.communicate(timeout=300)
    assert driver.returncode == 0, errors
    records = {r.number: r for r in assert_whole(path, 12)}
    assert {n: r.reason for n, r in records.items() if r.state == "failed"} == {
        2: "top1 is nan",
        3: records[3].reason,
    }
    assert records[3].reason.startswith("ValueError: trial 3 will not do")
    assert all(r.score == truth(r.config) for r in records.values() if r.state == "complete")
    assert any(len(record.rungs) > 1 for record in records.values())
    assert len(worker_pids(path)) <= 5  # two, and some for the death: workers keep their runner
    assert {line.partition(" ")[0] for line in output.splitlines()} == {"started", "ended"}  # and no word of Ray's
    assert errors == ""
    assert not (path / "ray").exists()
    assert not Path("/tmp", f"mpsearch-{RunFolder.open(path).id}").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_ray_trial_that_kills_every_worker_is_recorded_as_one_that_could_not_be_run(tmp_path):
    fates(tmp_path, "die-4")
    driver = start(tmp_path, "local", trials=8, sleep_s=0.05)
    _, errors = driver.communicate(timeout=300)
    assert driver.returncode == 0, errors
    failed = [(r.number, r.reason) for r in assert_whole(tmp_path, 8) if r.state == "failed"]
    assert failed == [(4, "its worker died 3 times (killed, or out of memory)")]


@pytest.mark.ray
@pytest.mark.slow
def test_ray_driver_interrupted_ends_in_good_order(tmp_path):
    path = tmp_path / "run"
    driver = start(path, "local", trials=500, sleep_s=0.1)
    wait_for_records(path, 3, driver)
    os.killpg(driver.pid, signal.SIGINT)  # as a terminal does: to all processes of the group
    _, errors = driver.communicate(timeout=60)
    assert driver.returncode == -signal.SIGINT
    assert errors.strip().endswith("KeyboardInterrupt")
    assert RunFolder.open(path).running == []
    assert not (path / "ray").exists()
    before = recorded(path)
    drive.drive(path, trials=before + 5)
    assert_whole(path, before + 5)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("make_runner", "error", "message"),
    [
        (drive.refuse, TaskError, "no such checkpoint"),
        (drive.crash, RunError, "no worker can be set up: KeyError: 'x'"),
    ],
)
def test_ray_set_up_that_is_broken_ends_the_search_with_its_error(tmp_path, make_runner, error, message):
    folder = RunFolder.create(tmp_path / "run", "", metric=TOP1)
    controller = SearchController(make_space(), relative_cost, SearchSpec(trials=5), TOP1)
    with folder.driving(), pytest.raises(error, match=message):
        run_trials(controller, folder, None, make_runner, EngineSpec(), concurrency=2)
    assert folder.records() == []


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster of one node: its port, and that for clients."""
    ports = [free_port(), free_port()]
    os.environ["RAY_AUTH_TOKEN"] = "c" * 64
    command = [
        Path(sys.executable).parent / "ray",
        "start",
        "--head",
        "--block",
        "--num-cpus=2",
        "--temp-dir=/tmp/mps-test",
    ]
    command += [f"--port={ports[0]}", "--include-dashboard=false", "--disable-usage-stats"]
    if find_spec("grpc"):
        command.append(f"--ray-client-server-port={ports[1]}")
    head = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | {"RAY_AUTH_MODE": "token"})
    try:
        until(lambda: not is_free(ports[0]) and (not find_spec("grpc") or not is_free(ports[1])), 60)
        yield ports
    finally:
        head.terminate()
        head.wait(60)
        del os.environ["RAY_AUTH_TOKEN"]
        shutil.rmtree("/tmp/mps-test", ignore_errors=True)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("client", [False, True], ids=["node", "client"])
def test_ray_cluster_runs_trials_while_disk_and_controller_stay_here(tmp_path, cluster, client):
    if client:
        pytest.importorskip("grpc", reason="ray:// needs ray[client]")
    address = f"ray://127.0.0.1:{cluster[1]}" if client else f"127.0.0.1:{cluster[0]}"
    path = tmp_path / "run"
    for trials in (6, 10):  # the cluster outlives the first
        driver = start(path, address, trials, sleep_s=0.05, RAY_AUTH_MODE="token")
        _, errors = driver.communicate(timeout=200)
        assert driver.returncode == 0, errors
        assert_whole(path, trials)
    assert driver.pid not in worker_pids(path)


@pytest.mark.ray
@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}"])
def test_ray_that_is_not_there_is_refused(tmp_path, address):
    folder = RunFolder.create(tmp_path / "run", "", metric=TOP1)
    address = address.format(port=free_port())
    controller = SearchController(make_space(), relative_cost, SearchSpec(trials=5), TOP1)
    with folder.driving(), pytest.raises(RunError, match=rf"cannot reach a Ray cluster at '{address}'.*address=none"):
        run_trials(controller, folder, None, lambda: None, EngineSpec(address=address))
