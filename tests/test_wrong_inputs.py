"""Inputs that once were taken as good, or crashed, as a user gives them: what is said, and the exit code."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from commands import Done, mpsearch

from mpsearch import api
from mpsearch.cli.studies import _compact
from mpsearch.errors import WriteError
from mpsearch.search import run
from mpsearch.space.choices import parse_choices
from mpsearch.space.spec import load_space, space_names
from mpsearch.study import load_study

pytestmark = pytest.mark.study

QUICK = """
name: quick
task: {model: digits_cnn, checkpoint: digits_cnn, data: {kind: digits, val_fraction: 0.05, test_fraction: 0.9}}
space: digits
search: {trials: 9, seed: 1, stop_dominated: false}
trial: {steps: 2, batch_size: 16, bn_batches: 1, calibration_samples: 32, precision: fp32}
final: {pick: 2, epochs: 0.1, seeds: 1}
engine: {address: none}
"""


def refused(done: Done, *words: str) -> None:
    """Exit code 2, one message, no traceback."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A working folder with a quick study."""
    (tmp_path / "quick.yaml").write_text(QUICK)
    return tmp_path


@pytest.mark.parametrize("name", space_names())
def test_inspect_writes_the_choices_of_every_shipped_space_and_loses_none(name: str) -> None:
    for rule in load_space(name).rules:
        for tensor, choices in rule.choices():
            usual = {"weight": "channel", "activation": "tensor"}[tensor]
            assert set(parse_choices(_compact(choices, usual).split(", "), tensor)) == set(choices)


def test_inspect_prints_a_space_of_several_types(here: Path) -> None:
    done = mpsearch("inspect", "quick.yaml", "--set", "space=digits_mixed", cwd=here)
    assert done.returncode == 0, done.stderr
    assert all(text in done.stdout for text in ("apot:3-5", "shift:2-5", "uniform:1-8"))


def test_a_space_with_nothing_to_choose_is_one_trial_a_report_and_a_warning(here: Path) -> None:
    fixed = {"name": "fixed", "rules": [{"match": "*", "weight": "uniform:8", "activation": "uniform:8"}]}
    (here / "fixed.yaml").write_text(yaml.safe_dump(fixed))
    done = mpsearch("run", "quick.yaml", "--set", "space=fixed.yaml", "--out", "run", "--json", cwd=here)
    assert done.returncode == 0, done.stderr
    assert "leaves nothing to choose: its one config is trained and scored" in " ".join(done.stderr.split())
    assert [row["number"] for row in json.loads(done.stdout)["front"]] == [0]
    assert (here / "run" / "report.html").stat().st_size > 0
    assert mpsearch("resume", "run", "--trials", "3", cwd=here).returncode == 0
    assert len((here / "run" / "trials.jsonl").read_text().splitlines()) == 1
    done = mpsearch("export", "run", "--pick", "accuracy>=-3.5", "-o", "out", cwd=here)
    assert done.returncode == 0, done.stderr
    refused(mpsearch("export", "run", "--pick", "accuracy>=3.5", "-o", "other", cwd=here), "no trial", "3.5")


def test_check_says_what_a_tie_takes_from_layers(here: Path) -> None:
    space = {
        "name": "tied",
        "rules": [{"match": "*", "weight": ["uniform:2-8"], "activation": ["uniform:2-8"]}],
        "fixed": {"down.depthwise": {"weight": "uniform:8", "activation": "uniform:8"}},
        "tied": [["down.*"]],
    }
    (here / "tied.yaml").write_text(yaml.safe_dump(space))
    done = mpsearch("check", "quick.yaml", "--set", "space=tied.yaml", "--json", cwd=here)
    assert done.returncode == 0, done.stderr
    said = " ".join(json.loads(done.stdout)["warnings"])
    assert "2 layers must share one weight precision (`tied`) and have uniform:8/channel left" in said
    assert "'down.pointwise' (7 choices)" in said


@pytest.mark.parametrize(
    "command",
    [
        ["run", "quick.yaml", "--out", "r\udcff"],
        ["check", "q\udcff.yaml"],
        ["ptq", "quick.yaml", "--bits", "w8a8", "--out", "e\udcff"],
        ["train", "quick.yaml", "--target", "w8a8", "--out", "e\udcff"],
        ["debug", "quick.yaml", "w8a8", "--out", "d\udcff.html"],
    ],
    ids=lambda command: command[0],
)
def test_a_path_that_is_not_utf8_is_refused_before_anything_is_done(here: Path, command: list[str]) -> None:
    (here / "q\udcff.yaml").write_text(QUICK)
    before = sorted(here.iterdir())
    refused(mpsearch(*command, cwd=here), "is not UTF-8", "\\xff", "give another path")
    assert sorted(here.iterdir()) == before


def test_a_home_that_is_not_known_is_a_folder_that_is_not_there(here: Path) -> None:
    refused(
        mpsearch("check", "~nobody-of-that-name/quick.yaml", cwd=here), "no study '~nobody-of-that-name/quick.yaml'"
    )


def test_a_run_that_was_moved_to_a_path_that_is_not_utf8_is_not_gone_on_with() -> None:
    for act in (api.runs.resume, lambda path: api.results.export_run("run", path)):
        with pytest.raises(WriteError, match="is not UTF-8"):
            act("r\udcff")


POOLED = """
from torch import nn
def build():
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8), nn.Flatten(),
                         nn.Linear(8, 10))
"""


@pytest.mark.parametrize("command", ["check", "run"])
def test_batch_norm_that_a_batch_of_one_cannot_train_stops_the_study(here: Path, command: str) -> None:
    (here / "pooled_net.py").write_text(POOLED)
    sets = ("task.model=pooled_net:build", "task.checkpoint=null", "task.float_epochs=1", "trial.batch_size=1")
    done = mpsearch(command, "quick.yaml", *(part for text in sets for part in ("--set", text)), cwd=here)
    refused(done, "trial.batch_size is 1", "'3' for one", "set trial.batch_size to 2 or more")


def test_check_warns_of_batch_norm_on_single_samples(here: Path) -> None:
    done = mpsearch("check", "quick.yaml", "--json", "--set", "trial.batch_size=1", cwd=here)
    assert done.returncode == 0, done.stderr
    assert any("BatchNorm normalizes each sample by itself" in text for text in json.loads(done.stdout)["warnings"])


@pytest.mark.parametrize(
    "setting",
    ["task.checkpoint=weights/a.pt", "space=spaces/mine.yaml", "task.data={kind: imagefolder, root: images}"],
)
def test_a_relative_path_that_leads_nowhere_is_named_with_its_folder(here: Path, setting: str) -> None:
    given = setting.rpartition("=")[2].rpartition(" ")[2].rstrip("}")
    refused(mpsearch("check", "quick.yaml", "--set", setting, cwd=here), f"'{given}' in {here}")


@pytest.fixture
def swapped(here: Path) -> Path:
    """A run whose checkpoint has since been replaced by another network's of the same architecture."""
    from mpsearch.task.load import load_task

    state = load_task(load_study(here / "quick.yaml").task).float_model().state_dict()
    torch.save(state, here / "a.pt")
    command = ("run", "quick.yaml", "--set", "task.checkpoint=a.pt", "--trials", "2", "--out", "run")
    assert mpsearch(*command, cwd=here).returncode == 0
    state["linear.weight"] = state["linear.weight"].flip(0)
    (here / "a.pt").rename(here / "first.pt")
    torch.save(state, here / "a.pt")
    return here


@pytest.mark.slow
def test_a_run_whose_network_was_replaced_is_refused_until_the_first_is_back(swapped: Path) -> None:
    (swapped / "config.json").write_text(json.dumps({"conv1": 4}))
    records = (swapped / "run" / "trials.jsonl").read_text()
    commands = {
        "resume": ("resume", "run", "--trials", "3"),
        "finalize": ("finalize", "run"),
        "export": ("export", "run", "-o", "exported"),
        "import": ("import", "run", "config.json"),
    }
    for name, command in commands.items():
        done = mpsearch(*command, cwd=swapped)
        refused(done, "the float network", "another one", "mpsearch run")
        digests = set(re.findall(r"\b[0-9a-f]{16}\b", done.stderr))
        assert len(digests) == 2, name  # the run's and the other one's
    assert (swapped / "run" / "trials.jsonl").read_text() == records
    (swapped / "first.pt").replace(swapped / "a.pt")
    done = mpsearch(*commands["resume"], cwd=swapped)
    assert done.returncode == 0, done.stderr
    assert len((swapped / "run" / "trials.jsonl").read_text().splitlines()) == 3


def test_a_trial_is_estimated_by_its_quickest_step_on_the_threads_of_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    now, seen = [0.0], []

    class Busy:
        """Steps of 2 s and scoring of 1 s, on a machine where other processes take their time too."""

        def __init__(self, *_: object, **__: object) -> None:
            self.model = torch.nn.Identity()
            self.name, self.metric = "busy", "top1"

        def reset(self, config: object) -> None: ...

        def fit(self, steps: int, seed: int, on_step: Callable[[int, float], None]) -> None:
            for step, spent in zip(range(steps), [90.0, 2.0, 50.0, 2.0, 30.0, 70.0], strict=True):
                now[0] += spent
                on_step(step, 0.0)

        def evaluate(self, model: object, split: str) -> float:
            seen.append(torch.get_num_threads())
            now[0] += 40.0 if len(seen) == 1 else 1.0
            return 0.5

    monkeypatch.setattr(run, "Workbench", Busy)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    spec = load_study("digits", ["trial.steps=10", "trial.bn_batches=3", "search.concurrency=2"])
    problem: Any = SimpleNamespace(
        spec=spec, task=Busy(), graph=None, space=SimpleNamespace(offers={}, ladder=lambda: [0])
    )
    before = torch.get_num_threads()
    assert run.estimate_trial_s(problem) == 2.0 * (10 + 1) + 3 * 1.0
    assert set(seen) == {3}
    assert torch.get_num_threads() == before
