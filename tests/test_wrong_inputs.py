"""Inputs that once were taken as good, or crashed, as a user gives them: what is said, and the exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from commands import Done, mpsearch

from mpsearch.cli.studies import _compact
from mpsearch.space.choices import parse_choices
from mpsearch.space.spec import load_space, space_names

QUICK = """
name: quick
task: {model: digits_cnn, checkpoint: digits_cnn, data: {kind: digits}}
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
        for tensor, choices in rule.given():
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
