"""A cluster whose nodes share nothing: private mounts hide the run's folder, and from some nodes the data too."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from PIL import Image
from quick import QUICK
from safetensors.torch import load_file

from mpsearch.record import RunFolder, checkpoint_path
from mpsearch.search.cluster import Node, share
from mpsearch.search.front import pareto_front
from mpsearch.study import load_study

COLD = ("warm_start.method=none", "warm_start.ilp=false", "warm_start.combinations=0")

HIDE = 'while [ "$1" != -- ]; do mount -t tmpfs -o size=1m tmpfs "$1" || exit 1; shift; done; shift; exec "$@"'
"""For `unshare -m bash -c`: a command that sees folders as empty."""


@pytest.mark.parametrize(
    ("nodes", "concurrency", "gpus", "shares"),
    [
        ([("a", 8, 0), ("b", 4, 0)], 3, 0.0, {"a": 2, "b": 1}),
        ([("a", 8, 0), ("b", 8, 0), ("c", 8, 0)], 2, 0.0, {"a": 1, "b": 1, "c": 0}),
        ([("a", 2, 0)], 4, 0.0, {"a": 4}),
        ([("a", 64, 0), ("b", 8, 2)], 6, 0.5, {"a": 0, "b": 4}),
        ([("a", 8, 1), ("b", 8, 1)], 3, 2 / 3, {"a": 1, "b": 1}),
        ([], 2, 0.0, {}),
    ],
)
def test_share_gives_workers_to_those_who_have_most(
    nodes: list[tuple[str, float, float]], concurrency: int, gpus: float, shares: dict[str, int]
) -> None:
    assert share([Node(name, name, cpus, cards) for name, cpus, cards in nodes], concurrency, gpus) == shares


def until(done: Callable[[], Any], timeout_s: float = 240) -> None:
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


class Cluster:
    """Nodes on this machine, each in a mount namespace of its own."""

    def __init__(self, folder: Path, hidden: Path) -> None:
        self._hidden, self._temporary = hidden, Path(f"/tmp/mps-{os.getpid()}")
        self._logs = folder / "nodes"
        self._logs.mkdir()
        self._nodes: list[subprocess.Popen[bytes]] = []
        self.drivers: list[subprocess.Popen[str]] = []
        self.environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "d" * 64}
        self.port, self.client = free_port(), free_port()

    def start(self, *hidden: Path) -> int:
        """A node of one CPU that sees `hidden` and the run's folder as empty; its number, from 1."""
        number = len(self._nodes) + 1
        ray = ["ray", "start", "--block", "--num-cpus=1", "--disable-usage-stats", "--object-store-memory=80000000"]
        if number == 1:
            ray += ["--head", f"--temp-dir={self._temporary}", f"--port={self.port}", "--include-dashboard=false"]
            ray += [f"--ray-client-server-port={self.client}"] if find_spec("grpc") else []
        else:
            ray += [f"--address=127.0.0.1:{self.port}", f"--node-ip-address=127.0.0.{number}"]
        ray[0] = str(Path(sys.executable).parent / "ray")
        command = ["unshare", "-m", "bash", "-c", HIDE, "-", *map(str, [self._hidden, *hidden]), "--", *ray]
        log = self._logs / str(number)
        for _ in range(3):  # on a machine that is busy Ray's raylet gives up after 15 s
            with log.open("wb") as file:
                process = subprocess.Popen(command, stdout=file, stderr=file, env=self.environment, cwd="/")
            self._nodes[number - 1 :] = [process]
            while process.poll() is None:
                if b"Ray runtime started" in log.read_bytes():
                    return number
                time.sleep(0.1)
        raise AssertionError(log.read_text())

    def kill(self, number: int) -> None:
        """As a machine that loses its power."""
        with contextlib.suppress(psutil.NoSuchProcess):
            node = psutil.Process(self._nodes[number - 1].pid)
            for process in [*node.children(recursive=True), node]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self._nodes[number - 1].wait()

    def end(self) -> None:
        for driver in self.drivers:
            driver.kill()
            driver.wait()
        for number in reversed(range(len(self._nodes))):
            if self._nodes[number].poll() is None:
                self.kill(number + 1)
        shutil.rmtree(self._temporary, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The folder that no node sees, with a study of images that lie outside of it."""
    random = np.random.default_rng(0)
    for label, colour in enumerate([(200, 60, 60), (60, 200, 60), (60, 60, 200)]):
        folder = tmp_path / "images" / f"class{label}"
        folder.mkdir(parents=True)
        for number in range(40):
            pixels = random.normal(colour, 60, (8, 8, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    home = tmp_path / "home"
    home.mkdir()
    data = {"kind": "imagefolder", "root": str(tmp_path / "images"), "val_fraction": 0.3, "test_fraction": 0.1}
    study = load_study("digits", [*(one for one in QUICK if "task.data" not in one), *COLD]).document()
    study["task"] = {"model": "digits_cnn", "data": data, "float_epochs": 3}
    study["search"] |= {"concurrency": 2}
    study["trial"] |= {"steps": 10, "rungs": [10, 30, 90], "batch_size": 16}
    (home / "study.yaml").write_text(yaml.safe_dump(study))
    return home


@pytest.fixture
def cluster(tmp_path: Path, home: Path) -> Iterator[Cluster]:
    tried = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", str(home)]
    if sys.platform != "linux" or subprocess.run(tried, capture_output=True, check=False).returncode:
        pytest.skip("mounts of one's own take root on Linux")
    cluster = Cluster(tmp_path, home)
    try:
        yield cluster
    finally:
        cluster.end()


def search(home: Path, cluster: Cluster, address: str, trials: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mpsearch", "run", "study.yaml", "--out", "run", "--trials", str(trials)]
    driver = subprocess.Popen(
        [*command, "--set", f"engine.address={address}"],
        cwd=home,
        env=cluster.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    cluster.drivers.append(driver)
    return driver


def started(home: Path) -> list[tuple[int, int, int]]:
    """(trial, rung, node) of all that was started, in order; of the head the node is 1."""
    log = home / "run" / "log.txt"
    lines = re.findall(
        r"trial (\d+), rung (\d+) starts on node \S+ \(([\d.]+)\)", log.read_text() if log.exists() else ""
    )
    return [
        (int(number), int(rung), int(ip.rpartition(".")[2]) if ip.startswith("127.0.0.") else 1)
        for number, rung, ip in lines
    ]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("client", [False, True], ids=["node", "client"])
def test_nodes_that_share_no_folder_run_a_search_that_survives_them(
    home: Path, cluster: Cluster, tmp_path: Path, client: bool
) -> None:
    """D2: one node lacks the data, one is killed in the middle of a trial, and one joins."""
    if client:
        pytest.importorskip("grpc", reason="ray:// needs ray[client]")
    cluster.start()
    doomed = cluster.start()
    without = cluster.start(tmp_path / "images")
    address = f"ray://127.0.0.1:{cluster.client}" if client else f"127.0.0.1:{cluster.port}"
    driver = search(home, cluster, address, trials=60)
    until(lambda: driver.poll() is not None or Counter(node for _, _, node in started(home))[doomed] >= 4)
    assert driver.poll() is None, driver.stderr.read()
    cluster.kill(doomed)
    joined = cluster.start()
    said = driver.communicate(timeout=400)[1]
    assert driver.returncode == 0, said

    folder = RunFolder.open(home / "run")
    records = folder.records()
    assert sorted(record.number for record in records) == list(range(60))
    assert {record.state for record in records} <= {"complete", "stopped"}
    attempts = Counter((number, rung) for number, rung, _ in started(home))
    ended = {(record.number, rung) for record in records for rung in range(max(1, len(record.rungs)))}
    assert set(attempts) == ended
    assert len(folder.trials_jsonl.read_text().splitlines()) == len(ended)  # each ended once
    again = [job for job, count in attempts.items() for _ in range(count - 1)]
    assert len(again) <= 1  # what the killed node was at
    assert all((number, rung, doomed) in started(home) for number, rung in again)
    nodes = Counter(node for _, _, node in started(home))
    assert set(nodes) == {1, doomed, joined}
    assert f"(127.0.0.{without}) is left out: " in said
    assert "images" in said
    assert f"(127.0.0.{doomed}) is gone" in said
    for record in pareto_front(records, folder.metric).trials:
        weights = load_file(checkpoint_path(folder.checkpoints, record.number))
        assert all(value.isfinite().all() for value in weights.values() if value.is_floating_point())


@pytest.mark.ray
@pytest.mark.slow
def test_cluster_that_has_not_the_data_ends_the_search_with_what_to_do(
    home: Path, cluster: Cluster, tmp_path: Path
) -> None:
    cluster.start(tmp_path / "images")
    driver = search(home, cluster, f"127.0.0.1:{cluster.port}", trials=4)
    said = driver.communicate(timeout=200)[1]
    assert driver.returncode == 1, said
    assert "no node of the cluster can run its trials" in said
    assert str(tmp_path / "images") in said
    assert "mpsearch resume run" in said
    assert "Traceback" not in said
    assert RunFolder.open(home / "run").records() == []
