"""mpsearch from Python: the names that there are, what importing them costs, and that their examples run."""

from __future__ import annotations

import ast
import doctest
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from quick import FEW_IMAGES, QUICK

import mpsearch
from mpsearch.errors import StudyError
from mpsearch.problem import Problem
from mpsearch.record import RunFolder, RunningTrial, TrialRecord
from mpsearch.study import load_study

pytestmark = pytest.mark.study

STUB = Path(mpsearch.__file__).with_suffix(".pyi")
ON_STUDIES = ("check", "inspect", "ptq", "train", "debug")
ON_RUNS = (  # in an order in which each finds what the ones before it made
    *("run", "resume", "status", "front", "rank", "finalize"),
    *("export_run", "import_config", "report", "dashboard"),
)
COMMANDS = (*ON_STUDIES, *ON_RUNS)
TINY = [*QUICK, "warm_start.method=none"]
COLD = [*TINY, "warm_start.ilp=false", "warm_start.combinations=0"]


def python(script: str, cwd: Path | None = None) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def assert_example_holds(name: str) -> None:
    function = getattr(mpsearch, name)
    tests = doctest.DocTestFinder(recurse=False).find(function, name, globs={})
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)
    said: list[str] = []
    attempted = sum(runner.run(test, out=said.append).attempted for test in tests)
    assert attempted >= 2, f"{name} has no example"
    assert runner.failures == 0, "".join(said)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api") / "run"
    mpsearch.run("digits", folder, trials=3, set=COLD)
    return folder


def test_stub_all_and_attributes_agree() -> None:
    tree = ast.parse(STUB.read_text())
    imported = {
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    listed = next(ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign))
    assert listed == sorted(listed)
    assert set(listed) == imported | {"__version__"} == set(mpsearch.__all__)
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                value = getattr(mpsearch, alias.name)
                assert (value.__module__, value.__name__) == (f"mpsearch.{node.module}", alias.name)
    assert set(COMMANDS) < set(listed)
    with pytest.raises(AttributeError, match="no_such_name"):
        mpsearch.no_such_name  # noqa: B018  # type: ignore[attr-defined]


def test_importing_is_light_and_so_is_looking_at_a_run(run: Path) -> None:
    heavy = "[m for m in ('torch', 'ray', 'plotly', 'onnx', 'optuna', 'scipy', 'pandas') if m in sys.modules]"
    looking = f"mpsearch.status({str(run)!r}).to_json(); mpsearch.front({str(run)!r}).to_json()"
    assert python(f"import mpsearch, sys; print({heavy}); {looking}; print({heavy})").split() == ["[]", "[]"]


@pytest.mark.slow
def test_functions_stay_when_subpackages_of_their_names_are_imported() -> None:
    modules = "mpsearch.ptq.pipeline, mpsearch.train, mpsearch.debug.measure, mpsearch.report.write"
    functions = "mpsearch.ptq, mpsearch.train, mpsearch.debug, mpsearch.report"
    script = (
        f"import mpsearch\nimport {modules}\nfrom mpsearch.ptq.pipeline import ptq\nfrom mpsearch.train import steps\n"
    )
    assert python(script + f"print(*(f.__module__ for f in ({functions})))").split() == [
        *["mpsearch.api.networks"] * 3,
        "mpsearch.api.results",
    ]


@pytest.mark.parametrize("name", COMMANDS)
def test_docstring_names_every_argument_and_the_errors(name: str) -> None:
    function = getattr(mpsearch, name)
    text = inspect.getdoc(function) or ""
    arguments = text.partition("Args:\n")[2].partition("\n\n")[0]
    assert re.findall(r"^    (\w+): ", arguments, re.MULTILINE) == list(inspect.signature(function).parameters)
    assert "Raises:" in text


@pytest.mark.parametrize("name", ON_STUDIES)
def test_examples_on_a_study_hold(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert_example_holds(name)


def test_examples_on_a_run_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    brief = [*FEW_IMAGES, "trial.compile=false", "search.prescreen=0"]
    monkeypatch.setattr(
        "mpsearch.study.load_study", lambda study, overrides=(): load_study(study, [*overrides, *brief])
    )
    for name in ON_RUNS:
        assert_example_holds(name)


def test_front_is_the_same_as_values_table_and_json(run: Path) -> None:
    front = mpsearch.front(run)
    table, document = front.table, front.to_json()
    assert table[table.on_front].number.to_list() == [row["number"] for row in document["front"]]
    assert [trial.number for trial in front.pareto] == [row["number"] for row in document["front"]]
    assert len(front.trials) == len(front.records) == 3
    assert table.relative_cost.is_monotonic_increasing
    drawn = {
        point[0] for trace in front.figure().data for point in (() if trace.customdata is None else trace.customdata)
    }
    assert drawn == {record.number for record in front.records}


def test_observer_is_told_the_whole_run_in_order(tmp_path: Path) -> None:
    events: list[tuple[str, object]] = []

    class Noted(mpsearch.Observer):
        def on_ready(self, problem: Problem, folder: RunFolder) -> None:
            events.append(("ready", folder.path))

        def on_stage(self, stage: str, done: int, total: int) -> None:
            events.append((stage, (done, total)))

        def on_trial_started(self, trial: RunningTrial) -> None:
            events.append(("started", trial.number))

        def on_trial_ended(self, record: TrialRecord) -> None:
            assert record in RunFolder.open(tmp_path / "run").records()
            assert (tmp_path / "run" / "front.json").exists()
            events.append(("ended", record.number))

    spec = mpsearch.load_study("digits", [*COLD, "warm_start.combinations=1"])
    result = mpsearch.run(spec, tmp_path / "run", trials=3, observer=Noted())
    assert events == [
        *[("ready", result.folder), ("started", 0), ("ended", 0), ("started", 1), ("ended", 1)],
        *[("sensitivity", (0, 1)), ("sensitivity", (1, 1)), ("started", 2), ("ended", 2)],
    ]


def test_observer_is_told_steps_and_stages(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    stages: list[tuple[str, int, int]] = []

    class Noted(mpsearch.Observer):
        def on_step(self, step: int, steps_: int, loss: float) -> None:
            assert loss == loss
            steps.append((step, steps_))

        def on_stage(self, stage: str, done: int, total: int) -> None:
            stages.append((stage, done, total))

    mpsearch.train("digits", "w8a8", epochs=0.2, observer=Noted())
    assert steps == [(step, len(steps)) for step in range(1, len(steps) + 1)]
    assert len(steps) == 3
    mpsearch.debug("digits", "w8a8", samples=50, out=tmp_path / "page.html", observer=Noted())
    for name in dict.fromkeys(stage for stage, _, _ in stages):
        done = [(done, total) for stage, done, total in stages if stage == name]
        assert done == [(part, done[0][1]) for part in range(done[0][1] + 1)], name
    assert [total for stage, _, total in stages if stage == "layers one by one"] == [11] * 12


def test_overrides_of_a_study_spec_are_refused() -> None:
    with pytest.raises(StudyError, match=r"search\.trials=2.*load_study"):
        mpsearch.check(mpsearch.load_study("digits"), set=["search.trials=2"])


@pytest.mark.parametrize(("trials", "time_limit", "words"), [(0, None, r"search\.trials"), (None, -1.0, "10m")])
def test_arguments_of_a_run_are_checked_like_the_study(
    trials: int | None, time_limit: float | None, words: str, tmp_path: Path
) -> None:
    with pytest.raises(mpsearch.MpsearchError, match=words):
        mpsearch.run("digits", tmp_path / "run", trials=trials, time_limit=time_limit)
    assert not (tmp_path / "run").exists()
