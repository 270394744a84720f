"""Looking at a run is light and harmless: no torch, nothing that its study names is imported or loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictured import CHEAPEST, FINALS, INFOS, LAYERS, RECORDS, trial

from mpsearch.cost.model import RelativeCost
from mpsearch.errors import RunError
from mpsearch.facts import ProblemFacts, read_facts
from mpsearch.files import write_text
from mpsearch.graph.facts import ModelGraph
from mpsearch.metric import TOP1
from mpsearch.precision import LayerPrecision, PrecisionConfig
from mpsearch.record import RunFolder, pack
from mpsearch.report.data import read_run
from mpsearch.report.write import report_of, sizes
from mpsearch.search.values import KneeValues, TensorRange, WeightHistogram, write_values
from mpsearch.space.choices import parse_choices
from mpsearch.space.space import SearchSpace, Slot
from mpsearch.study import parse_study

pytestmark = pytest.mark.study

TRAP = "from pathlib import Path\nPath(__file__).with_name('sprung').touch()\nmake = print\n"
"""A module that is seen to have been imported."""

LOOK = """
import json, sys, urllib.request
import psutil

commands, runs = sys.argv[1:]
for command, run in [(command.split(), run) for command in commands.split(",") for run in runs.split()]:
    if command == ["dashboard"]:
        from mpsearch.report.serve import serving
        with serving(run, port=0) as served:
            assert served.caught_up.wait(120)
            address = served.url.removesuffix("/dashboard")
            study = json.load(urllib.request.urlopen(f"{address}/api/studies/1?after=0"))
            trial = study["trials"][0]
            for artifact in trial["artifacts"]:
                url = f"{address}/artifacts/1/{trial['trial_id']}/{artifact['artifact_id']}"
                assert urllib.request.urlopen(url).read()
            print(study["note"]["body"])
    else:
        from mpsearch.cli import app
        app([*command, run], standalone_mode=False)
heavy = ["torch", "torchvision", "ray", "pandas", "plotly", "optuna", "scipy"]
imported = [name for name in heavy if name in sys.modules]
print(json.dumps({"imported": imported, "mib": psutil.Process().memory_info().rss / 2**20}), file=sys.stderr)
"""


def facts_of(task: dict[str, Any]) -> ProblemFacts:
    """The facts of a study of the pictured layers, with the task that it names."""
    spec = parse_study({"name": "looked-at", "task": task, "space": "uniform", "cost": {"model": "bops"}})
    slots = tuple(
        Slot(tensor, (name,), parse_choices(["uniform:1-8", "shift:3"], tensor))
        for name in LAYERS
        for tensor in ("weight", "activation")
    )
    layers = (*INFOS, replace(INFOS[0], name="odd", reason="its kind"))
    return ProblemFacts(
        spec=spec,
        task_name="net/data",
        metric=TOP1,
        graph=ModelGraph(layers, {"bmm": 100}),
        space=SearchSpace("uniform", tuple(LAYERS), slots),
        cost=RelativeCost(layers, "bops"),
        cheapest=CHEAPEST,
        dearest=1.0,
        float_digest="0123456789abcdef",
        float_scores={"val": 0.93, "test": 0.92},
        notes=("the margins are <odd>",),
    )


def values_of(config: PrecisionConfig) -> KneeValues:
    """Made-up weights of the pictured layers."""
    return KneeValues(
        config=config.digest,
        checkpoint="trial-2.safetensors",
        ranges=(
            TensorRange(layer=LAYERS[0], tensor="weight", weights=72, low=-1, high=1, seen_low=-2, seen_high=3),
            TensorRange(layer=LAYERS[0], tensor="activation", weights=72, low=0, high=4, seen_low=None, seen_high=None),
        ),
        histograms=(WeightHistogram(layer=LAYERS[1], end=1.5, before=(1, 4, 2), after=(0, 7, 0)),),
    )


def run_of(path: Path, task: dict[str, Any], records: list[Any] = RECORDS) -> RunFolder:
    """A run folder as a driver leaves it."""
    facts = facts_of(task)
    folder = RunFolder.create(path, facts.spec.to_yaml(), "name: uniform\n", metric=TOP1)
    with folder.driving():
        write_text(folder.problem_json, facts.to_json())
        for record in records:
            folder.append(record)
        for final in FINALS:
            folder.append_final(final)
    write_values(folder, values_of(RECORDS[2].config))
    return folder


def searched(first: Path) -> str:
    """PYTHONPATH with a folder before what it holds already: the checkout under test, say."""
    return os.pathsep.join(filter(None, (str(first), os.environ.get("PYTHONPATH"))))


def look(commands: str, *folders: RunFolder) -> tuple[str, dict[str, Any]]:
    """What commands, between commas, print of runs in a process of its own, and what that process has imported."""
    home = folders[0].path.parent
    done = subprocess.run(
        [sys.executable, "-c", LOOK, commands, " ".join(folder.path.name for folder in folders)],
        cwd=home,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": searched(home), "COLUMNS": "160"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(done.stderr.splitlines()[-1])


TASKS: dict[str, dict[str, Any]] = {
    "model": {"model": "os:system", "model_args": {"command": "touch sprung"}, "data": {"kind": "digits"}},
    "module": {"model": "trap:make", "data": {"kind": "digits"}},
    "factory": {"factory": "trap:make"},
}


@pytest.mark.parametrize(
    "commands", ["status,front,front --json", "report", pytest.param("dashboard", marks=pytest.mark.slow)]
)
def test_looking_imports_no_torch_and_nothing_that_the_study_names(tmp_path: Path, commands: str) -> None:
    (tmp_path / "trap.py").write_text(TRAP)
    printed, process = look(commands, *(run_of(tmp_path / name, task) for name, task in TASKS.items()))
    assert printed.strip()
    heavy = commands in ("report", "dashboard")
    assert set(process["imported"]) <= ({"pandas", "plotly", "optuna", "scipy"} if heavy else set())
    assert not list(tmp_path.rglob("sprung"))


@pytest.mark.slow
def test_the_trap_springs_where_the_task_is_loaded(tmp_path: Path) -> None:
    """The test above can fail: opening the problem does import what the study names."""
    (tmp_path / "trap.py").write_text(TRAP)
    folder = run_of(tmp_path / "run", TASKS["factory"])
    code = (
        "import sys, mpsearch; mpsearch.trust(sys.argv[1]); "
        "from mpsearch.problem import reopen; from mpsearch.record import RunFolder; "
        "reopen(RunFolder.open(sys.argv[1]))"
    )
    command = [sys.executable, "-c", code, str(folder.path)]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, check=False, env={**os.environ, "PYTHONPATH": searched(tmp_path)}
    )
    assert done.returncode != 0
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize("command", [pytest.param("status", marks=pytest.mark.slow), "front"])
def test_looking_at_two_thousand_trials_takes_little_memory(tmp_path: Path, command: str) -> None:
    names = [f"stage{i // 10}.conv{i}" for i in range(50)]
    widths = [LayerPrecision.shorthand(f"w{w}a{a}") for w in (2, 3, 4, 6, 8) for a in (3, 4, 8)]
    correct = pack(np.arange(5000) % 3 > 0)
    records = [
        replace(
            trial(number, 1 / (1 + number % 97), 0.9 - 0.5 / (1 + number % 89)),
            config=PrecisionConfig((name, widths[(number * 7 + i) % len(widths)]) for i, name in enumerate(names)),
            origin="uniform" if number % 200 == 0 else "sampler",
            values=correct,
        )
        for number in range(2000)
    ]
    folder = RunFolder.create(tmp_path / "run", facts_of(TASKS["factory"]).spec.to_yaml(), metric=TOP1)
    with folder.driving():
        for record in records[:-1]:
            folder.append(record)
    _, process = look(command, folder)
    assert process["mib"] < 200


def test_output_without_unicode_gets_replaced_characters(tmp_path: Path) -> None:
    folder = run_of(
        tmp_path / "run", TASKS["model"], [trial(0, 0.5, 0.9), replace(RECORDS[4], number=1, reason="zu groß")]
    )
    done = subprocess.run(
        [sys.executable, "-m", "mpsearch", "status", folder.path.name],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )
    assert done.returncode == 0, done.stderr
    assert "trial 1 failed: zu gro?" in done.stdout


def test_facts_are_read_as_they_were_written(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run", TASKS["model"])
    written, read = facts_of(TASKS["model"]), read_facts(folder)
    for name in ("task_name", "metric", "graph", "cheapest", "dearest", "float_digest", "float_scores", "notes"):
        assert getattr(read, name) == getattr(written, name)
    assert read.space == written.space
    assert read.cost(RECORDS[2].config) == written.cost(RECORDS[2].config)
    assert read.summary() == written.summary()
    assert read.summary()[-1] == "The float network: val 93.00 %, test 92.00 %."
    assert read.to_json() == folder.problem_json.read_text(encoding="utf-8")


def test_a_run_without_facts_says_how_to_write_them(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run", TASKS["model"])
    folder.problem_json.unlink()
    with pytest.raises(RunError, match=rf"no problem\.json.*mpsearch resume {folder.path} --trials {len(RECORDS)}"):
        report_of(folder)


def broken(document: dict[str, Any], where: tuple[Any, ...], value: Any) -> str:
    at: Any = document
    for key in where[:-1]:
        at = at[key]
    at[where[-1]] = value
    return json.dumps(document)


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        (("schema",), "mpsearch/problem/2", "schema: got 'mpsearch/problem/2'; did you mean 'mpsearch/problem/1'"),
        (("graph", "layers", 0, "macs"), "600", "graph.layers.0.macs: input should be a valid integer"),
        (("slots", 0, "choices"), ["uniform:99"], "no 99-bit form"),
        (("slots", 0, "layers"), ["head"], "slots: they are not those of its layers"),
        (("cheapest",), -1.0, "cheapest: input should be greater than 0"),
        (("invented",), 1, "invented: no such key"),
    ],
)
def test_broken_facts_are_refused_by_file_and_key(
    tmp_path: Path, where: tuple[Any, ...], value: Any, said: str
) -> None:
    folder = run_of(tmp_path / "run", TASKS["model"])
    document = json.loads(folder.problem_json.read_text(encoding="utf-8"))
    folder.problem_json.write_text(broken(document, where, value))
    with pytest.raises(RunError, match=r"problem\.json cannot be used") as refused:
        read_facts(folder)
    assert said in str(refused.value)
    assert "mpsearch resume" in str(refused.value)


@pytest.mark.parametrize("text", ["", "[1]", "null", '{"schema": ', "[" * 100_000])
def test_facts_that_are_no_document_are_refused(tmp_path: Path, text: str) -> None:
    folder = run_of(tmp_path / "run", TASKS["model"])
    folder.problem_json.write_text(text)
    with pytest.raises(RunError, match=r"problem\.json cannot be used"):
        read_facts(folder)


def test_report_shows_the_weights_of_the_knee_and_of_no_earlier_one(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run", TASKS["model"])
    run = read_run(folder)
    assert run.front.knee.number == 2
    assert list(run.ranges.tensor) == ["weight", "activation"]
    assert run.ranges.seen_high[0] == 3
    assert run.ranges.seen_low.isna().tolist() == [False, True]
    assert run.ranges.precision.tolist() == ["4", "8"]  # those of the knee's config
    assert run.histograms.before.tolist() == [1, 4, 2]
    assert run.histograms.low.tolist() == [-1.5, -0.5, 0.5]
    assert run.histograms.high.tolist() == [-0.5, 0.5, 1.5]
    before = sizes(folder)
    write_values(folder, values_of(RECORDS[0].config))
    assert sizes(folder) != before  # a watched report is written again
    run = read_run(folder)
    assert run.ranges.empty
    assert run.histograms.empty


def test_broken_weights_of_the_knee_are_refused_by_file(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run", TASKS["model"])
    text = folder.knee_json.read_text(encoding="utf-8")
    for bad in ("", "null", text.replace('"after":[0,7,0]', '"after":[0,7]'), text.replace("knee/1", "knee/9")):
        folder.knee_json.write_text(bad)
        with pytest.raises(RunError, match=r"knee\.json cannot be used"):
            read_run(folder)


def test_report_of_a_received_run_says_its_warnings_as_text(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "run", TASKS["model"])
    moved = shutil.move(folder.path, tmp_path / "received")
    page = report_of(RunFolder.open(moved)).read_text(encoding="utf-8")
    assert "Warning: the margins are &lt;odd&gt;" in page
    assert "<odd>" not in page
