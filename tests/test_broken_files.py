"""Every file of a run folder, damaged in every way, and every command that reads it: refused by name, or made again.

A command either gives what it gives of the whole run, or ends with 2 and names the file and what to do. So a number
that is printed is right.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import pytest
from commands import Done, mpsearch
from filelock import FileLock
from quick import QUICK

from mpsearch.errors import RunError
from mpsearch.facts import ProblemFacts, read_facts
from mpsearch.files import write_text
from mpsearch.record import RunFolder
from mpsearch.report import write
from mpsearch.search.values import read_values
from mpsearch.search.view import OptunaView, open_view
from mpsearch.study import LAST_SECTION, StudySpec
from mpsearch.warmstart.table import SensitivityTable, read_descent

pytestmark = pytest.mark.study

SMALL = (
    *(override for override in QUICK if not override.startswith(("storage", "search"))),
    *("storage=sqlite", "search.prescreen=4", "search.trials=4", "search.concurrency=1"),
    *("warm_start.steps=2", "warm_start.budgets=[0.4]", "warm_start.neighbours=1", "warm_start.combinations=0"),
    *("final.pick=1", "final.seeds=1", "final.epochs=0.02"),
)

FILES = (
    *(
        "run.json",
        "study.yaml",
        "space.yaml",
        "hardware.yaml",
        "problem.json",
        "trials.jsonl",
        "prescreen.jsonl",
        "finals.jsonl",
    ),
    *("front.json", "knee.json", "trials.parquet", "study.db", "report.html", "driver.lock"),
    *("warmstart/descent.json", "warmstart/sensitivity.json"),
    *("checkpoints/KNEE.safetensors", "checkpoints/FINAL.safetensors"),
)
"""KNEE and FINAL stand for the trial that is the front's knee."""


def doubled(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    middle = len(lines) // 2
    path.write_bytes(b"".join([*lines[: middle + 1], *lines[middle:]]))


def deleted(path: Path) -> None:
    path.unlink()


def unreadable(path: Path) -> None:
    """As a file without permissions is, for whoever runs the tests."""
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "null": lambda path: path.write_text("null\n"),
    "list": lambda path: path.write_text("[]\n"),
    "garbage": lambda path: path.write_bytes(bytes(range(128, 256)) * 4 + b"\n" + bytes(100)),
    "doubled": doubled,
    "deleted": deleted,
    "unreadable": unreadable,
}


QUICK_ONES = ("truncated", "list", "deleted")


@pytest.fixture(scope="module")
def whole(shared: Path) -> Path:
    """A folder with a run that has every file that a run can have."""
    home = shared / "broken-files"
    with FileLock(shared / "broken-files.lock"):
        if not (home / "run" / "report.html").exists():
            shutil.rmtree(home, ignore_errors=True)
            home.mkdir()
            typed = [part for override in SMALL for part in ("--set", override)]
            for command in (["run", "digits", "--out", "run", *typed], ["finalize", "run", "--json"]):
                with drawn_quickly():
                    done = mpsearch(*command, cwd=home)
                assert done.returncode == 0, done.stderr
            (home / "finals.json").write_text(done.stdout)
    return home


@contextlib.contextmanager
def drawn_quickly() -> Iterator[None]:
    """The report is read as always and not drawn, which takes a second each time and reads nothing."""
    with patch.object(write, "write_report", lambda path, run, **_: write_text(path, run.name)):
        yield


@pytest.fixture(scope="module")
def before(whole: Path) -> dict[str, Any]:
    """Command -> what it prints of the whole run."""
    return {command: shown(whole, command, "run", "--json") for command in ("status", "front")}


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole / "run", tmp_path / "run"))


def place(run: Path, file: str) -> Path:
    knee = json.loads((run / "knee.json").read_text())["checkpoint"].removeprefix("final-").removesuffix(".safetensors")
    return run / file.replace("KNEE", f"trial-{knee}").replace("FINAL", f"final-{knee}")


def shown(home: Path, *command: str) -> Any:
    done = mpsearch(*command, cwd=home)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def refused_or_right(done: Done, file: Path) -> bool:
    """Whether a command did what it should; if it refused, it named the file."""
    assert "Traceback" not in done.stderr, done.stderr
    assert "our fault" not in done.stderr, done.stderr
    assert done.returncode in (0, 2), done.stderr
    if done.returncode == 2:
        assert file.name in done.stderr, done.stderr
        assert any(
            word in done.stderr for word in ("restore", "mpsearch resume", "mpsearch finalize", "delete", "remove it")
        ), done.stderr
    return done.returncode == 0


def same_but_unknown(now: dict[str, Any], before: dict[str, Any]) -> bool:
    """Whether two documents say the same, apart from what is said to be unknown, and scores that are to be redone."""
    of_facts = {key for key in ("units", "answer") if not now.get(key)}  # of a network that is not known
    unknown = {"prescreened", *of_facts, *(key for key in before if now[key] is None)}
    return all(now[key] == before[key] for key in before.keys() - unknown)


def test_every_file_of_a_run_is_damaged_here(whole: Path) -> None:
    there = {str(path.relative_to(whole / "run")) for path in (whole / "run").rglob("*") if path.is_file()}
    tried = {str(place(whole / "run", file).relative_to(whole / "run")) for file in FILES}
    assert {name for name in there if name.startswith(("checkpoints/", "study.db-"))} >= tried & there - set(FILES)
    assert {name for name in there if not name.startswith(("checkpoints/", "study.db-", "log.txt"))} <= tried
    assert tried <= there


@pytest.mark.parametrize("damage", [d if d in QUICK_ONES else pytest.param(d, marks=pytest.mark.slow) for d in DAMAGES])
@pytest.mark.parametrize("file", FILES)
def test_looking_at_a_damaged_run(before: dict[str, Any], run: Path, tmp_path: Path, file: str, damage: str) -> None:
    path = place(run, file)
    DAMAGES[damage](path)
    for command in before:
        done = mpsearch(command, "run", "--json", cwd=tmp_path)
        if refused_or_right(done, path):
            assert same_but_unknown(json.loads(done.stdout), before[command]), (command, done.stdout)
    with drawn_quickly():
        refused_or_right(mpsearch("report", "run", cwd=tmp_path), path)


@pytest.mark.parametrize("file", ["run.json", "study.yaml", "problem.json", "trials.jsonl", "knee.json"])
def test_dashboard_of_a_damaged_run_is_refused(run: Path, tmp_path: Path, file: str) -> None:
    pytest.importorskip("optuna_dashboard")
    DAMAGES["truncated"](run / file)
    done = mpsearch("dashboard", "run", "--no-open", "--port", "0", cwd=tmp_path)
    assert not refused_or_right(done, run / file)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_view_is_made_again_from_the_record(run: Path, tmp_path: Path, damage: str) -> None:
    facts = read_facts(RunFolder.open(run))
    for storage in ("sqlite",) if damage == "doubled" else ("sqlite", "journal"):  # a journal's lines may come again
        view_of(facts, RunFolder.open(run), storage)
        folder = RunFolder.open(shutil.copytree(run, tmp_path / storage))  # which no connection holds
        path = folder.study_db if storage == "sqlite" else folder.study_journal
        DAMAGES[damage](path)
        if damage == "unreadable":
            with pytest.raises(RunError, match=rf"cannot open .*{path.name}"):
                view_of(facts, folder, storage)
            continue
        trials = view_of(facts, folder, storage).study.trials
        assert sorted(trial.user_attrs["number"] for trial in trials) == [0, 1, 2, 3]


def view_of(facts: ProblemFacts, folder: RunFolder, storage: str) -> OptunaView:
    view = open_view(storage, folder, "digits", facts.space, facts.metric, None, folder.records(), facts.cost)
    assert view is not None
    return view


def test_a_view_that_another_program_holds_is_no_damaged_one(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite3.dbapi2, "connect", functools.partial(sqlite3.connect, timeout=0.1))  # it waits for 5 s
    folder = RunFolder.open(run)
    facts, before = read_facts(folder), (run / "study.db").read_bytes()
    with contextlib.closing(sqlite3.connect(run / "study.db")) as other:
        other.execute("PRAGMA locking_mode=EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(RunError, match=r"study\.db .*locked.*end the program that holds it"):
            view_of(facts, folder, "sqlite")
    assert (run / "study.db").read_bytes() == before


def test_a_run_that_is_driven_is_looked_at_and_not_driven_twice(
    before: dict[str, Any], run: Path, tmp_path: Path
) -> None:
    """What is locked in earnest: the driver's lock."""
    with RunFolder.open(run).driving():
        for command in before:
            assert same_but_unknown(shown(tmp_path, command, "run", "--json"), before[command])
        with pytest.raises(RunError, match="is being driven by process"), RunFolder.open(run).driving():
            pass


def test_a_study_whose_end_is_missing_is_refused_wherever_it_was_cut(run: Path, tmp_path: Path) -> None:
    """A text that was cut is YAML all the same, and what it lacks would have defaults."""
    text = (run / "study.yaml").read_text()
    assert list(StudySpec.model_fields)[-1] == LAST_SECTION
    for cut in (text.index("storage:"), text.index("search:"), text.index("final:") + 20):
        (run / "study.yaml").write_text(text[:cut])
        assert not refused_or_right(mpsearch("status", "run", cwd=tmp_path), run / "study.yaml")


REBUILT: dict[str, Callable[[Path], object]] = {
    "problem.json": lambda path: read_facts(RunFolder.open(path.parent)),
    "prescreen.jsonl": lambda path: RunFolder.open(path.parent).prescreened()[3],
    "front.json": lambda path: json.loads(path.read_text())["front"][0],
    "knee.json": lambda path: read_values(RunFolder.open(path.parent)),
    "trials.parquet": pd.read_parquet,
    "study.db": lambda path: view_of(read_facts(RunFolder.open(path.parent)), RunFolder.open(path.parent), "sqlite"),
    "report.html": lambda path: path.read_text(),
    "warmstart/descent.json": lambda path: read_descent(path.parent),
    "warmstart/sensitivity.json": SensitivityTable.load,
}
"""What `resume` makes again, and how it is read."""

NEEDED_BY_TRIALS = ("prescreen.jsonl", "warmstart/descent.json", "warmstart/sensitivity.json")
"""What it makes again where it is damaged, and, where it is missing, for trials that are left."""


@pytest.mark.slow
@pytest.mark.parametrize("damage", [name for name in DAMAGES if name != "doubled"])
@pytest.mark.parametrize("file", FILES)
def test_going_on_with_a_damaged_run(
    before: dict[str, Any], whole: Path, run: Path, tmp_path: Path, file: str, damage: str
) -> None:
    path = place(run, file)
    DAMAGES[damage](path)
    (tmp_path / "copy").mkdir()
    for command in (["export", "run", "-o", "out", "--no-verify"], ["finalize", "run", "--json"], ["resume", "run"]):
        home = tmp_path / "copy"
        shutil.rmtree(home)
        home.mkdir()
        shutil.copytree(run, home / "run")
        with drawn_quickly():
            done = mpsearch(*command, cwd=home)
        if not refused_or_right(done, path):
            continue
        assert shown(home, "front", "run", "--json")["front"] == before["front"]["front"]
        if command[0] == "resume" and file in REBUILT:
            again = home / "run" / file
            if file in NEEDED_BY_TRIALS:
                assert mpsearch("report", "run", cwd=home).returncode == 0  # it reads what is there
                resumed = mpsearch("resume", "run", "--trials", "5", cwd=home)
                assert resumed.returncode == 0, resumed.stderr
            assert again.exists()
            assert REBUILT[file](again) is not None
        if command[0] == "finalize":
            assert len(RunFolder.open(home / "run").finals()) == len(RunFolder.open(whole / "run").finals())
            assert json.loads(done.stdout)["rows"] == json.loads((whole / "finals.json").read_text())["rows"]
