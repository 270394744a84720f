"""Going on with a run: from another folder, with its files elsewhere, with another study, without its secrets."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from commands import Done, mpsearch
from filelock import FileLock
from optuna.storages import InMemoryStorage
from quick import QUICK

from mpsearch.cli import base
from mpsearch.cli.progress import RunProgress
from mpsearch.facts import read_facts
from mpsearch.metric import TOP1
from mpsearch.precision import LayerPrecision, PrecisionConfig
from mpsearch.problem import open_problem
from mpsearch.record import RunFolder, RunningTrial, TrialRecord, this_process
from mpsearch.report import dashboard
from mpsearch.search import run as run_module
from mpsearch.search.cluster import remove_leftovers
from mpsearch.search.controller import Proposal
from mpsearch.search.job import Job
from mpsearch.search.run import resume_study, run_study
from mpsearch.search.view import open_view
from mpsearch.shipped import shipped_folder
from mpsearch.space.choices import parse_choices
from mpsearch.space.space import SearchSpace, Slot
from mpsearch.study import load_study, read_spec
from mpsearch.variables import masked

pytestmark = pytest.mark.study

COLD = (*QUICK, "warm_start.method=none", "warm_start.ilp=false", "warm_start.combinations=0", "search.trials=2")


@pytest.fixture
def home(shared: Path, tmp_path: Path) -> Path:
    """A working folder with weights, a space and a run of both, all given by relative paths."""
    folder = shared / "going-on"
    with FileLock(shared / "going-on.lock"):
        if not (folder / "run" / "front.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            (folder / "files").mkdir(parents=True)
            shutil.copy(shipped_folder("checkpoints") / "digits_cnn.safetensors", folder / "files" / "net.safetensors")
            shutil.copy(shipped_folder("search_spaces") / "digits.yaml", folder / "files" / "space.yaml")
            sets = [*COLD, "task.checkpoint=files/net.safetensors", "space=files/space.yaml"]
            typed = [part for override in sets for part in ("--set", override)]
            done = mpsearch("run", "digits", "--out", "run", *typed, cwd=folder)
            assert done.returncode == 0, done.stderr
            (folder / "home.txt").write_text(str(folder))
    return Path(shutil.copytree(folder, tmp_path / "home"))


def refused(done: Done, *words: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


def test_workers_get_values_and_no_path_into_the_run_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """D1, D2: they run elsewhere, on machines that may have nothing but the data."""
    monkeypatch.chdir(home)
    handed: list[bytes] = []
    monkeypatch.setattr(run_module, "run_trials", lambda *arguments: handed.append(pickle.dumps(arguments[3])))
    files = ("task.checkpoint=files/net.safetensors", "space=files/space.yaml")
    run_study(load_study("digits", [*COLD, *files, "engine.address=local"]), "new")
    resume_study("run", overrides=["engine.address=local"])
    monkeypatch.chdir("/")
    for folder in ("files", "new", "run"):
        (home / folder).rename(home / f"{folder}-moved")
    for setup in handed:
        for folder in ("new", "run"):
            assert str(home / folder).encode() not in setup
        runner = pickle.loads(setup)()
        config = SearchSpace.ladder(open_problem(load_study("digits", COLD)).space)[0]
        outcome = runner(Job(Proposal(0, config, "uniform", 1.0)))
        assert outcome.record.state == "complete"
        assert outcome.weights
    assert len(handed) == 2


def test_paths_of_every_section_become_absolute_and_shipped_names_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    task = {"model": "cifar_resnet20", "checkpoint": "digits_cnn", "data": {"kind": "imagefolder", "root": "data"}}
    (tmp_path / "data").mkdir()
    study = {"name": "a", "task": task, "space": "digits", "storage": "sqlite:///here/study.db"}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(study))
    spec = load_study("a.yaml").absolute()
    assert spec.task.data is not None
    assert (spec.space, spec.task.checkpoint) == ("digits", "digits_cnn")
    assert spec.task.data.root == str(tmp_path / "data")
    assert spec.storage == f"sqlite:///{tmp_path}/here/study.db"
    assert spec.absolute() == spec


def test_resume_by_a_relative_path_from_elsewhere(home: Path, tmp_path: Path) -> None:
    done = mpsearch("resume", Path("home", "run"), "--trials", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(RunFolder.open(home / "run").records()) == 3


def test_files_that_have_moved_are_said_and_given_anew(home: Path) -> None:
    (home / "elsewhere").mkdir()
    shutil.move(home / "files" / "net.safetensors", home / "elsewhere" / "net.safetensors")
    moved = str(home / "files" / "net.safetensors")
    study = home / "run" / "study.yaml"
    study.write_text(study.read_text().replace((home / "home.txt").read_text(), str(home)))
    refused(mpsearch("resume", "run", "--trials", "3", cwd=home), moved)
    done = mpsearch("resume", "run", "--trials", "3", "--set", "task.checkpoint=elsewhere/net.safetensors", cwd=home)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(study.read_text())["task"]["checkpoint"] == str(home / "elsewhere" / "net.safetensors")
    assert mpsearch("resume", "run", "--trials", "4", cwd=home).returncode == 0  # it was kept


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trial.steps=60", "trial.steps was 2 and is 60"),
        ("cost.model=bops", "cost.model was 'shift_energy' and is 'bops'"),
        ("task.data.split_seed=7", "task.data.split_seed was 0 and is 7"),
        ("task.model=cifar_resnet20", "task.model was 'digits_cnn' and is 'cifar_resnet20'"),
        ("search.trails=4", "did you mean 'trials'"),
    ],
)
def test_a_change_after_which_trials_could_not_be_compared_is_refused(home: Path, override: str, words: str) -> None:
    before = (home / "run" / "study.yaml").read_bytes()
    trials = (home / "run" / "trials.jsonl").read_bytes()
    refused(mpsearch("resume", "run", "--set", override, cwd=home), words)
    assert (home / "run" / "study.yaml").read_bytes() == before
    assert (home / "run" / "trials.jsonl").read_bytes() == trials


def test_a_run_whose_trials_began_with_the_descents_weights_is_read_and_not_gone_on_with(home: Path) -> None:
    study = home / "run" / "study.yaml"
    document = yaml.safe_load(study.read_text())
    document["warm_start"] |= {"method": "gdnsq", "reuse_weights": True}  # as earlier versions write it
    study.write_text(yaml.safe_dump(document))
    facts = json.loads((home / "run" / "problem.json").read_text())
    facts["study"] |= {"warm_start.method": "gdnsq", "warm_start.reuse_weights": True}
    (home / "run" / "problem.json").write_text(json.dumps(facts))
    for command in ("status", "front", "report"):
        done = mpsearch(command, "run", cwd=home)
        assert done.returncode == 0, done.stderr
    refused(mpsearch("resume", "run", "--trials", "3", cwd=home), "began with the weights of its descent", "status")
    refused(mpsearch("run", "run/study.yaml", "--out", "new", cwd=home), "reuse_weights", "leave the key out")


def test_an_edited_study_or_space_is_seen(home: Path) -> None:
    """D5: by whoever opens the run's problem again."""
    study, space = home / "run" / "study.yaml", home / "run" / "space.yaml"
    texts = study.read_text(), space.read_text()
    study.write_text(texts[0].replace("  steps: 2\n", "  steps: 60\n"))
    for command in (["resume", "run"], ["finalize", "run"], ["export", "run", "-o", "out"]):
        refused(mpsearch(*command, cwd=home), "trial.steps was 2 and is 60", "mpsearch run")
    study.write_text(texts[0])
    space.write_text(texts[1].replace("1-8", "2-8"))
    refused(mpsearch("resume", "run", cwd=home), "search space that the run began with", "conv")
    space.write_text(texts[1])
    assert mpsearch("resume", "run", "--set", "search.concurrency=1", cwd=home).returncode == 0


def test_other_data_under_the_old_name_are_seen(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = json.loads((home / "run" / "problem.json").read_text())
    problem["float_scores"]["val"] -= 0.2
    (home / "run" / "problem.json").write_text(json.dumps(problem))
    done = mpsearch("resume", "run", "--set", "task.checkpoint=files/net.safetensors", cwd=home)
    refused(done, "give it the same data")


# ------------------------------------------------------------------------------------------------------------- secrets


def test_variables_stay_variables_in_the_run_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """D9: neither a file nor a message holds what they stand for; looking needs none."""
    monkeypatch.setenv("MP_SECRET", "s3cr/et@x")
    url = f"sqlite:///{home}/db-${{MP_SECRET_NAME:-plain}}.db?x=${{MP_SECRET}}"
    folder = RunFolder.create(home / "new", load_study("digits", [f"storage={url}"]).to_yaml(), metric=TOP1)
    assert "s3cr" not in folder.study_yaml.read_text()
    assert yaml.safe_load(folder.study_yaml.read_text())["storage"] == url
    assert read_spec(folder).storage.endswith("db-plain.db?x=s3cr/et@x")
    monkeypatch.delenv("MP_SECRET")
    assert read_spec(folder).storage.endswith("?x=${MP_SECRET}")
    assert mpsearch("status", "new", cwd=home).returncode == 0
    shown = mpsearch("check", "digits", "--json", "--set", "storage=${MP_SECRET:-hidden}://h/db", cwd=home)
    assert json.loads(shown.stdout)["study"]["storage"] == "${MP_SECRET:-hidden}://h/db"


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:hunter2@host/db",
        "mysql://me:a/b@c@host/db",
        "postgresql://host/db?password=hunter2",
        "postgresql://me:${MP_UNSET:-hunter2}@host/db",
        "mssql://host/db?odbc_connect=PWD%3Dhunter2",
        *(
            f"postgresql://host/db?x=1&{name}=hunter2"
            for name in (
                "PASSWORD",
                "ssl_password",
                "sslkeypassword",
                "passphrase",
                "authToken",
                "api_key",
                "pass%77ord",
            )
        ),
    ],
)
def test_a_password_in_clear_is_refused_before_it_is_written(tmp_path: Path, url: str) -> None:
    done = mpsearch("run", "digits", "--out", "run", "--set", f"storage={url}", cwd=tmp_path)
    refused(done, "storage holds a password", "${DB_PASSWORD}")
    assert "hunter2" not in done.stderr
    assert "a/b" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:a/b@c@host/db", "postgresql://***@host/db"),
        ("postgresql://host/db?user=x&password=abc&sslmode=on", "postgresql://host/db?user=x&password=***&sslmode=on"),
        ("cannot reach 'mysql+pymysql://u:p:q@h:3306/d'", "cannot reach 'mysql+pymysql://***@h:3306/d'"),
        ("sqlite:////tmp/x.db", "sqlite:////tmp/x.db"),
        ("cannot open 'postgresql://u:s3cr et@h/db'", "cannot open 'postgresql://***@h/db'"),
        ("postgresql://h/db?SslPassword=hun ter&passfile=/a", "postgresql://h/db?SslPassword=***&passfile=/a"),
        ("postgresql://h/db?token=a", "postgresql://h/db?token=***"),
    ],
)
def test_passwords_of_every_form_are_masked(text: str, shown: str) -> None:
    assert masked(text) == shown


@pytest.mark.parametrize(
    "override",
    [
        "storage=postgresql:/u:${MP_GIVEN}@h/db",
        "storage={url: '${MP_GIVEN}'}",
        "search.trials=${MP_TOKEN}",
        "task={factory: 'mine:make', args: {token: '${MP_GIVEN}'}}",
        "task={factory: 'mine:make', args: {url: '${MP_TOKEN}'}}",
    ],
)
def test_what_a_secret_variable_holds_is_in_no_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str
) -> None:
    monkeypatch.setenv("MP_GIVEN", "hun ter/2")
    monkeypatch.setenv("MP_TOKEN", "hun ter/2")
    (tmp_path / "mine.py").write_text("def make(**args):\n    raise ValueError(f'no {args}')\n")
    done = mpsearch("run", "digits", "--out", "run", "--set", override, cwd=tmp_path)
    assert done.returncode == 2
    assert "hun ter" not in done.stdout + done.stderr
    assert "${MP_" in done.stderr


# ------------------------------------------------------------------------------------------------------- interruptions


def test_sigterm_ends_as_ctrl_c_does_and_says_how_to_go_on(tmp_path: Path) -> None:
    """D3."""
    sets = [part for override in (*COLD, "search.sampler=random", "search.trials=500") for part in ("--set", override)]
    process = subprocess.Popen(
        [sys.executable, "-m", "mpsearch", "run", "digits", "--out", "run", *sets],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    trials = tmp_path / "run" / "trials.jsonl"
    deadline = time.monotonic() + 240
    while process.poll() is None and not (trials.exists() and trials.stat().st_size):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors
    assert "terminated; " in errors
    assert "mpsearch resume run" in errors
    assert "Traceback" not in errors
    assert RunFolder.open(tmp_path / "run").running == []


@pytest.mark.parametrize(
    ("number", "word", "code"), [(signal.SIGTERM, "terminated", 143), (signal.SIGINT, "interrupted", 130)]
)
def test_a_signal_before_there_is_a_run_is_said_too(tmp_path: Path, number: int, word: str, code: int) -> None:
    make = ["signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background has it ignored"]
    make += [f"os.kill(os.getpid(), {int(number)})"]
    (tmp_path / "mine.py").write_text("\n    ".join(["import os, signal\n\ndef make():", *make]) + "\n")
    (tmp_path / "s.yaml").write_text("name: s\nspace: digits\ntask: {factory: 'mine:make'}\n")
    for command in ("check", "run"):
        done = subprocess.run(
            [sys.executable, "-m", "mpsearch", command, "s.yaml"], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == code, done.stderr
        assert f"mpsearch: {word}" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_sigterm_that_falls_into_a_destructor_is_not_lost() -> None:
    class Dying:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)  # Python handles it here, and drops what is raised

    progress = RunProgress()
    trial = RunningTrial(0, "uniform", 1.0, 0.0)
    with base._sigterm_raised():
        progress.on_trial_started(trial)
        Dying()
        with pytest.raises(KeyboardInterrupt):
            progress.on_trial_started(trial)
        assert base.exit_code() == 143
    base._terminated.clear()


def test_what_killed_drivers_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    """D4."""
    living = this_process()
    owners = {"dead": living | {"started_s": 1.0}, "living": living, "elsewhere": living | {"host": "another"}}
    for name, owner in owners.items():
        (tmp_path / f"mpsearch-{name}").mkdir()
        (tmp_path / f"mpsearch-{name}" / "driver.json").write_text(json.dumps(owner))
    for name, age_s in {"begun": 60, "begun-long-ago": 7200}.items():
        (tmp_path / f"mpsearch-{name}").mkdir()
        (begun := tmp_path / f"mpsearch-{name}" / "driver.json").touch()
        os.utime(begun, (time.time() - age_s,) * 2)
    (tmp_path / "mpsearch-root").mkdir()  # a cache, say
    remove_leftovers(tmp_path)
    assert {path.name.removeprefix("mpsearch-") for path in tmp_path.iterdir()} == {
        "living",
        "elsewhere",
        "begun",
        "root",
    }


@pytest.mark.parametrize("damaged", ["null", "[]", "{", '{"driver": 3}', '{"driver": {}, "running": [{"x": 1}]}', ""])
def test_a_damaged_state_is_that_of_no_driver(home: Path, damaged: str) -> None:
    """D6: it says only what is under way."""
    (home / "run" / "state.json").write_text(damaged)
    done = mpsearch("status", "run", cwd=home)
    assert done.returncode == 0, done.stderr
    assert "0 running" in done.stdout


# ------------------------------------------------------------------------------------------------------------- storage

SPACE = SearchSpace(
    "toy",
    ("a",),
    tuple(Slot(tensor, ("a",), parse_choices(["uniform:1-8"], tensor)) for tensor in ("weight", "activation")),
)


def test_a_storage_that_comes_back_gets_what_it_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """D8: said, seen in `status`, and mended without a resume."""
    folder = RunFolder.create(tmp_path / "run", load_study("digits").to_yaml(), metric=TOP1)
    records = [
        TrialRecord(
            PrecisionConfig({"a": LayerPrecision.shorthand(f"w{bits}a8")}),
            "complete",
            score=0.5,
            cost=bits / 8,
            number=bits - 1,
        )
        for bits in range(1, 7)
    ]

    def gone(*_: object) -> None:
        raise ConnectionError("gone: postgresql://me:hunter2@host/db")

    with folder.driving():
        view = open_view(
            "sqlite", folder, "toy", SPACE, TOP1, on_trouble=lambda words: setattr(folder, "trouble", words)
        )
        assert view is not None
        view.add(records[0])
        with monkeypatch.context() as broken:
            broken.setattr(view.study, "add_trial", gone)
            broken.setattr(view.study, "add_trials", gone)
            with caplog.at_level("INFO", logger="mpsearch.progress"):
                view.add(records[1])
                view.add(records[2])
            assert "the Optuna study is not updated" in (RunFolder.open(tmp_path / "run").trouble or "")
            assert "hunter2" not in caplog.text
            status = mpsearch("status", "run", cwd=tmp_path).stdout
            assert "the Optuna study is not updated (ConnectionError: gone" in status
            view.flush()  # tried once more, in vain
        monkeypatch.setattr(view, "_retry_at", 0.0)
        view.add(records[3])
        assert RunFolder.open(tmp_path / "run").trouble is None
        view.add(records[4])
        assert [trial.user_attrs["number"] for trial in view.study.trials] == [0, 1, 2, 3, 4]
    assert len([r for r in caplog.records if "is not updated" in r.getMessage()]) == 1


# --------------------------------------------------------------------------------------------------------------- trust

MINE = """
from mpsearch.task.networks import DigitsCNN

def make(checkpoint=None):
    open("imported", "a").close()
    return DigitsCNN(num_classes=10, in_channels=1)
"""


@pytest.fixture
def received(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a run that was made by another user, and the module that its study names."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "mine_of_another.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(home))
    monkeypatch.setenv("MPSEARCH_CACHE", str(tmp_path / "their cache"))
    overrides = (*COLD, "task.checkpoint=null", "task.float_epochs=1", "task.model=mine_of_another:make")
    sets = [part for override in overrides for part in ("--set", override)]
    done = mpsearch("run", "digits", "--out", "run", *sets, cwd=home)
    assert done.returncode == 0, done.stderr
    assert mpsearch("resume", "run", cwd=home).returncode == 0  # who made it is not asked
    monkeypatch.setenv("MPSEARCH_CACHE", str(tmp_path / "my cache"))
    (home / "imported").unlink()
    return home


def test_a_run_that_was_made_elsewhere_has_nothing_imported_until_it_is_trusted(received: Path) -> None:
    """D10: in a pipe, where nobody can be asked."""
    for command in (["resume", "run"], ["finalize", "run"], ["export", "run", "-o", "out"], ["rank", "run"]):
        refused(mpsearch(*command, cwd=received), "was not made here", "mine_of_another:make", "--trust")
    for command in (["status", "run"], ["front", "run"], ["report", "run"]):
        assert mpsearch(*command, cwd=received).returncode == 0
    assert not (received / "imported").exists()
    done = mpsearch("resume", "run", "--trust", cwd=received)
    assert done.returncode == 0, done.stderr
    assert (received / "imported").exists()
    assert mpsearch("resume", "run", cwd=received).returncode == 0  # it was noted
    study = received / "run" / "study.yaml"
    study.write_text(study.read_text().replace("model_args: {}", "model_args: {checkpoint: other}"))
    refused(mpsearch("resume", "run", cwd=received), "study was changed since", "--trust")


def test_a_database_that_a_run_from_elsewhere_names_is_not_reached(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its URL may hold whatever of this environment the study asks for."""
    monkeypatch.setenv("MP_SECRET", "s3cret")
    study = home / "run" / "study.yaml"
    url = f"sqlite:///{tmp_path}/leak-${{MP_SECRET}}.db"
    assert "storage: none" in study.read_text()
    study.write_text(study.read_text().replace("storage: none", f"storage: {url}"))
    refused(mpsearch("resume", "run", cwd=home), "was not made here", "leak-${MP_SECRET}", "--trust")
    folder = RunFolder.open(home / "run")
    with dashboard.application(str(folder.path), threading.Event()):
        pass
    assert isinstance(dashboard._view(folder, read_facts(folder))._storage, InMemoryStorage)
    assert "is not reached, as the run was not made here" in caplog.text
    assert not list(tmp_path.glob("leak*"))
    assert mpsearch("resume", "run", "--trust", cwd=home).returncode == 0
    assert (tmp_path / "leak-s3cret.db").exists()
    done = mpsearch("resume", "run", "--set", f"storage=sqlite:///{tmp_path}/mine.db", cwd=home)
    assert done.returncode == 0, done.stderr  # who names it is not asked
    assert mpsearch("resume", "run", cwd=home).returncode == 0


@pytest.mark.parametrize(
    "name", ["evil-mod:build", "1mod:build", "torchcrepe:build", "evil mod:build", "evil_mod:build"]
)
def test_whatever_is_imported_is_asked_about(received: Path, name: str) -> None:
    """A file can be imported under a name that is no identifier, and `torchcrepe:` begins a model's name alone."""
    study = received / "run" / "study.yaml"
    document = yaml.safe_load(study.read_text())
    document["task"] = {"factory": name, "args": {}}
    study.write_text(yaml.safe_dump(document, sort_keys=False))
    (received / "run" / "problem.json").unlink()  # which says what the run began with
    (received / f"{name.partition(':')[0]}.py").write_text("def build(**args):\n    open('imported', 'a').close()\n")
    done = mpsearch("export", "run", "-o", "out", cwd=received)
    refused(done, name)
    assert not (received / "imported").exists()


@pytest.mark.parametrize("name", ["os:system", "subprocess:run", "builtins:eval", "importlib.util:find_spec"])
@pytest.mark.parametrize("key", ["task.model", "task.data.kind", "task.factory"])
def test_the_standard_library_makes_no_models(tmp_path: Path, key: str, name: str) -> None:
    sets = ["--set", f"{key}={name}"]
    if key == "task.factory":
        (tmp_path / "s.yaml").write_text(f"name: s\nspace: digits\ntask: {{factory: '{name}'}}\n")
        sets = []
    done = mpsearch("check", "s.yaml" if key == "task.factory" else "digits", *sets, cwd=tmp_path)
    refused(done, "standard library", name)
