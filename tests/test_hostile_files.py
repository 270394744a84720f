"""A run folder that somebody passed on: whatever one of its values says, it is refused by name or does not matter.

No process ends with a traceback, waits for a pipe, or reads a device to its end.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import itertools
import json
import os
import re
import shutil
import signal
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import mpsearch

from mpsearch.errors import MpsearchError, RunError, SpaceError
from mpsearch.facts import ProblemFacts, price_study
from mpsearch.graph.facts import LayerInfo, ModelGraph
from mpsearch.hardware.profile import profile_copy
from mpsearch.metric import TOP1
from mpsearch.precision import LayerPrecision, PrecisionConfig
from mpsearch.record import (
    FinalRecord,
    PrescreenRecord,
    RunFolder,
    RungScore,
    RunningTrial,
    TrialRecord,
    WallTime,
    this_process,
)
from mpsearch.report.data import read_run
from mpsearch.search.finals import final_rows, final_table
from mpsearch.search.values import KneeValues, TensorRange, WeightHistogram, write_values
from mpsearch.shipped import shipped
from mpsearch.space.choices import parse_choices
from mpsearch.space.space import SearchSpace, Slot
from mpsearch.study import StudySpec, load_study

LAYERS = ("conv", "fc")
HOSTILE = {
    "huge": "1" + "0" * 400,
    "infinite": "1e999",
    "large": "1e308",
    "negative": "-5",
    "zero": "0",
    "text": '"x"',
    "list": "[]",
    "object": "{}",
    "null": "null",
    "half a pair": '"\\ud800"',
    "true": "true",
    "deep": "[" * 100_000 + "]" * 100_000,
}
"""What takes the place of a value, as JSON."""


def config(bits: int) -> PrecisionConfig:
    return PrecisionConfig.uniform(LAYERS, LayerPrecision.shorthand(f"w{bits}a8"))


def trial(number: int, bits: int, **changes: Any) -> TrialRecord:
    known: dict[str, Any] = {
        "score": bits / 10,
        "cost": bits / 8,
        "number": number,
        "origin": "uniform",
        "start_loss": 2.0,
        "end_loss": 1.0,
        "start_divergence": 0.5,
        "curve": ((0, 0.25), (4, bits / 10)),
        "divergence": 0.25,
        "values": f"5:{base64.b64encode(bytes([bits * 8])).decode()}",
        "wall": WallTime(0.25, 2.0, 0.5),
        "started_s": 1.7e9,
        "peak_memory_bytes": 2**30,
        "costs": {"bops": 1000.0 * bits, "weight_bytes": 100.0},
        "rungs": (RungScore(4, bits / 10, 0.25, 2.75, 1.7e9),),
    }
    return TrialRecord(config(bits), **{"state": "complete", **known, **changes})


def facts(spec: StudySpec) -> ProblemFacts:
    layers = (
        LayerInfo("conv", "conv2d", (4, 1, 3, 3), (1, 8, 8), (4, 8, 8), 2304, 36, 9, batch_norm="bn"),
        LayerInfo("fc", "linear", (10, 256), (256,), (10,), 2560, 2570, 256),
        LayerInfo("norm", "LayerNorm", (10,), (10,), (10,), 10, 20, 1, reason="no layer"),
    )
    slots = [
        Slot(tensor, (name,), parse_choices([choices], tensor))
        for name in LAYERS
        for tensor, choices in (("weight", "uniform:2-8"), ("activation", "uniform:8"))
    ]
    cost, costs = price_study(spec, layers)
    return ProblemFacts(
        spec=spec,
        task_name="digits",
        metric=TOP1,
        graph=ModelGraph(layers, {"bmm": 100}, ("a note",)),
        space=SearchSpace("toy", LAYERS, tuple(slots)),
        cost=cost,
        costs=costs,
        cheapest=0.25,
        dearest=1.0,
        float_digest="0" * 16,
        float_scores={"val": 0.9},
        notes=("another",),
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with every file that looking at a run reads, made without a search."""
    spec = load_study("digits").absolute()
    space = shipped("search_spaces", spec.space, SpaceError).read_text()
    path = tmp_path_factory.mktemp("hostile") / "run"
    folder = RunFolder.create(path, spec.to_yaml(), space, metric=TOP1, hardware=profile_copy(spec.hardware))
    folder.problem_json.write_text(facts(spec).to_json())
    with folder.driving():
        for record in (trial(0, 8), trial(1, 4), trial(2, 2, state="failed", reason="it broke")):
            folder.append(record)
            folder.append_prescreened(PrescreenRecord(record.config, record.cost or 1.0, 0.5, 4, "ladder"))
        for seed in (0, 1):
            folder.append_final(FinalRecord(0, seed, 8, 0.75, 0.5, trial(0, 8).values))
            folder.append_final(FinalRecord(1, seed, 8, 0.5, 0.25, trial(1, 4).values))
        folder.write_front({"schema": "mpsearch/front/1", "trials": 3, "hypervolume": 0.5})
    ranges = (TensorRange(layer="conv", tensor="weight", weights=72, low=-1, high=1, seen_low=-1, seen_high=1),)
    histograms = (WeightHistogram(layer="conv", end=1, before=(1, 2), after=(2, 1)),)
    knee = {"config": config(4).digest, "checkpoint": "trial-1.safetensors"}
    write_values(folder, KneeValues(**knee, ranges=ranges, histograms=histograms))
    running = [{"number": 3, "origin": "sampler", "cost": 0.5, "started_s": 1.7e9, "rung": 0}]
    state = {"driver": this_process() | {"host": "elsewhere"}, "running": running, "trouble": "none"}
    (path / "state.json").write_text(json.dumps(state))
    assert folder.running == [RunningTrial(3, "sampler", 0.5, 1.7e9)]
    assert looked_at(path) == []
    return path


def looked_at(run: Path) -> list[str]:
    """What is wrong with what looking at a run does."""
    faults = []
    for command in ("status", "front"):
        done = mpsearch(command, "run", cwd=run.parent)
        if done.returncode not in (0, 2) or "Traceback" in done.stderr or "our fault" in done.stderr:
            faults.append(f"{command}: {done.returncode}: {done.stderr[-800:]}")
    try:
        data = read_run(run)
        final_table(final_rows(data.records, RunFolder.open(run).finals(), 3, data.metric), data.metric)
    except MpsearchError:
        pass
    except Exception as error:
        faults.append(f"report: {error!r}")
    return faults


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the values of a document are, those that hold others included."""
    if at:
        yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in items:
        yield from places(below, (*at, key))


def with_hostile(document: Any, at: tuple[Any, ...], hostile: str) -> str:
    """The JSON text of a document that has something else in one place."""
    changed = copy.deepcopy(document)
    inner = changed
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = "@"
    return json.dumps(changed).replace('"@"', hostile)


LINES = ("trials.jsonl", "prescreen.jsonl", "finals.jsonl")
DOCUMENTS = ("run.json", "front.json", "state.json", "knee.json", "problem.json")


@pytest.mark.parametrize("each", [1, pytest.param(len(HOSTILE), marks=pytest.mark.slow)])
@pytest.mark.parametrize("file", [*LINES, *DOCUMENTS])
def test_value_of_any_kind_in_any_place_is_refused_or_does_not_matter(
    whole: Path, tmp_path: Path, file: str, each: int
) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    text = (run / file).read_text()
    first, newline, rest = text.partition("\n") if file in LINES else (text, "", "")
    hostile, faults = itertools.cycle(HOSTILE), []
    for at in places(document := json.loads(first)):
        for what in itertools.islice(hostile, each):
            (run / file).write_text(with_hostile(document, at, HOSTILE[what]) + newline + rest)
            faults += [f"{what} at {at}: {fault}" for fault in looked_at(run)]
    assert not faults, "\n".join(faults)


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """What waits for a pipe is interrupted."""

    def late(*_: object) -> None:
        raise TimeoutError(f"not done in {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("what", ["pipe", "/dev/zero", "/dev/full"])
@pytest.mark.parametrize("file", [*LINES, *DOCUMENTS, "study.yaml", "space.yaml", "hardware.yaml", "report.html"])
def test_pipe_or_device_in_the_place_of_a_file_is_not_read(whole: Path, tmp_path: Path, file: str, what: str) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    (run / file).unlink(missing_ok=True)
    os.mkfifo(run / file) if what == "pipe" else (run / file).symlink_to(what)
    with within(60):
        assert looked_at(run) == []
        if file in ("trials.jsonl", "report.html"):
            done = mpsearch("report", "run", cwd=tmp_path)
            assert (done.returncode, f"{file} is a pipe" in done.stderr or "cannot read" in done.stderr) == (2, True)
        with pytest.raises(RunError, match=file), RunFolder.open(run).driving():
            pass


def packed(count: str, content: bytes) -> str:
    return f"{count}:{base64.b64encode(content).decode()}"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ("99999999999:AA==", "expected N:base64"),
        ("9999999999:AA==", "9999999999 samples are 1250000000 bytes, and there are 1"),
        ("90:A", "cannot be 1 more than a multiple of 4"),
        ("9:A*A=", "base64"),
        ("3:4A==", "its samples are not those of an earlier line"),
        ("x", "expected N:base64"),
        ("", "expected N:base64"),
        (packed("5f", zlib.compress(bytes(2**24))), "5 samples are 20 bytes, and there are 21"),
        (packed("9999999999f", zlib.compress(bytes(2**24))), "samples are 39999999996 bytes"),
        (packed("5f", zlib.compress(bytes(20))[:-6]), "5 samples are 20 bytes"),
        (packed("5f", b"no deflated text"), "header check"),
    ],
)
def test_values_that_are_none_are_refused_by_line(whole: Path, tmp_path: Path, values: str, says: str) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    lines = (run / "trials.jsonl").read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | {"values": values})
    (run / "trials.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(RunError, match=rf"trials\.jsonl, line 2: .*{re.escape(says)}.*restore the file from a copy"):
        RunFolder.open(run).records()


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"score": 0.4', '"score": 5.0', "it has a top1 of 5, which is between 0 and 1"),
        ('"score": 0.4', '"score": 1e999', "1e999 where a finite number belongs"),
        ('"score": 0.4', '"score": NaN', "NaN where a finite number belongs"),
        ('"number": 1', '"number": -7', "'number': input should be greater than or equal to 0, got -7"),
        ('"number": 1', '"number": 1, "number": 4', "the key 'number' is given twice"),
        ('"conv":', '"other":', "its layers are not those of an earlier line"),
    ],
)
def test_line_that_cannot_be_of_the_run_is_refused(whole: Path, tmp_path: Path, old: str, new: str, says: str) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    lines = (run / "trials.jsonl").read_text().splitlines(keepends=True)
    assert old in lines[1]
    (run / "trials.jsonl").write_text("".join([lines[0], lines[1].replace(old, new), *lines[2:]]))
    with pytest.raises(RunError, match=rf"trials\.jsonl, line 2: .*{re.escape(says)}"):
        RunFolder.open(run).records()


def test_line_of_more_bytes_than_any_is_not_parsed(whole: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    (run / "trials.jsonl").write_bytes(b"[" + b"0," * 2**25 + b"0]\n")
    with pytest.raises(RunError, match=r"line 1: not a trial record: it has 67,108,8\d\d bytes, and at most"):
        RunFolder.open(run).records()
