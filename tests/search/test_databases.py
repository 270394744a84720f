"""Servers of databases that hold the Optuna study of a run: started here on loopback, killed and started in its middle.

Skipped where the server's programs, or Python's driver of it, are not installed.
"""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import drive
import optuna
import pytest

from mpsearch.observer import Observer
from mpsearch.record import RunFolder, TrialRecord
from mpsearch.search import view

pytestmark = [pytest.mark.study, pytest.mark.slow]


class Server:
    """A database server of this test run. As root it runs as an account of its own: PostgreSQL demands it."""

    account = ""
    driver = ""
    programs: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.bin = self._bin()
        if self.bin is None or not find_spec(self.driver):
            pytest.skip(f"{' and '.join(self.programs)}, or Python's {self.driver}, are not installed")
        self.folder = Path(tempfile.mkdtemp(prefix="mpdb-"))  # its sockets want a short path
        self.user = None
        if os.geteuid() == 0:
            self.user = pwd.getpwnam(self.account).pw_name
            shutil.chown(self.folder, self.user)
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            self.port = listening.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    def _bin(self) -> Path | None:
        """The folder that has all programs."""
        first = shutil.which(self.programs[0])
        folders = [Path(first).parent, Path(first).resolve().parent] if first else []
        folders += Path("/usr/lib/postgresql").glob("*/bin")  # which Debian keeps off the path
        return next((path for path in folders if all((path / name).exists() for name in self.programs)), None)

    def call(self, program: str, *arguments: object) -> None:
        assert self.bin is not None
        command = [str(self.bin / program), *map(str, arguments)]
        subprocess.run(command, check=True, capture_output=True, user=self.user, cwd=self.folder, timeout=240)

    def serve(self, program: str, *arguments: object) -> None:
        assert self.bin is not None
        command = [str(self.bin / program), *map(str, arguments)]
        log = (self.folder / "log").open("ab")
        self._process = subprocess.Popen(command, stdout=log, stderr=log, user=self.user, cwd=self.folder)
        deadline = time.monotonic() + 120
        while not self._listens():
            assert self._process.poll() is None, (self.folder / "log").read_text(errors="replace")[-2000:]
            assert time.monotonic() < deadline, "the server does not listen"
            time.sleep(0.1)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def start(self) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        """At once, as a crash does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class PostgreSQL(Server):
    account, driver, programs = "postgres", "psycopg", ("postgres", "initdb", "createdb", "pg_isready")

    def __init__(self) -> None:
        super().__init__()
        self.url = f"postgresql+psycopg://me@127.0.0.1:{self.port}/studies"
        self.call("initdb", "-D", self.folder / "data", "-U", "me", "-A", "trust", "--no-sync")
        self.start()
        self.call("createdb", "-h", "127.0.0.1", "-p", self.port, "-U", "me", "studies")

    def start(self) -> None:
        (self.folder / "data" / "postmaster.pid").unlink(missing_ok=True)  # of one that was killed
        self.serve("postgres", "-D", self.folder / "data", "-p", self.port, "-h", "127.0.0.1", "-k", self.folder)
        deadline = time.monotonic() + 120
        while subprocess.run(
            [str(self.bin / "pg_isready"), "-h", "127.0.0.1", "-p", str(self.port)], capture_output=True, check=False
        ).returncode:
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.1)


class MariaDB(Server):
    """MySQL's protocol and dialect."""

    account, driver, programs = "mysql", "pymysql", ("mariadb-install-db", "mariadb")

    def __init__(self) -> None:
        super().__init__()
        self.url = f"mysql+pymysql://me@127.0.0.1:{self.port}/studies"
        self.call("mariadb-install-db", "--no-defaults", f"--datadir={self.folder / 'data'}", "--skip-test-db")
        (self.folder / "init.sql").write_text(
            "CREATE DATABASE IF NOT EXISTS studies;\n"
            "CREATE USER IF NOT EXISTS me@'127.0.0.1';\n"
            "GRANT ALL ON studies.* TO me@'127.0.0.1';\n"
        )
        self.start()

    def start(self) -> None:
        server = shutil.which("mariadbd") or "/usr/sbin/mariadbd"
        self.serve(
            server,
            "--no-defaults",
            f"--datadir={self.folder / 'data'}",
            f"--port={self.port}",
            "--bind-address=127.0.0.1",
            f"--socket={self.folder / 'socket'}",
            f"--pid-file={self.folder / 'pid'}",
            f"--init-file={self.folder / 'init.sql'}",
            "--skip-name-resolve",
        )


@pytest.fixture(params=[PostgreSQL, MariaDB], ids=["postgresql", "mysql"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    started = request.param()
    try:
        yield started
    finally:
        started.stop()
        shutil.rmtree(started.folder, ignore_errors=True)


def test_database_that_is_gone_for_a_while_is_said_and_gets_what_it_missed(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """D8."""
    monkeypatch.setattr(view, "RETRY_S", 0.0)
    folder_path = tmp_path / "run"
    troubles: list[str | None] = []

    class Fate(Observer):
        def on_trial_ended(self, record: TrialRecord) -> None:
            if record.number == 2:
                server.stop()
            elif record.number == 5:
                server.start()
            troubles.append(RunFolder.open(folder_path).trouble)

    with caplog.at_level("INFO", logger="mpsearch.progress"):
        drive.drive(folder_path, trials=10, storage=server.url, observer=Fate())
    records = RunFolder.open(folder_path).records()
    assert [record.number for record in records] == list(range(10))
    study = optuna.load_study(study_name=f"toy-{RunFolder.open(folder_path).id}", storage=server.url)
    assert sorted(trial.user_attrs["number"] for trial in study.trials) == list(range(10))
    assert all(trouble is None for trouble in troubles[:3])
    assert all("the Optuna study is not updated" in str(trouble) for trouble in troubles[3:6])
    assert troubles[-1] is None
    said = [record.getMessage() for record in caplog.records if record.name == "mpsearch.progress"]
    assert len([text for text in said if "is not updated" in text]) == 1
    assert len([text for text in said if "is up to date again" in text]) == 1
    again = drive.drive(folder_path, trials=12, storage=server.url)
    assert again.stop_reason is not None
    study = optuna.load_study(study_name=f"toy-{RunFolder.open(folder_path).id}", storage=server.url)
    assert sorted(trial.user_attrs["number"] for trial in study.trials) == list(range(12))
