"""Studies of other kinds than classification from beginning to end, with brief trials."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import mpsearch

BRIEF = {
    "task.float_epochs": 1,
    "warm_start.method": "none",
    "warm_start.ilp": False,
    "search.prescreen": 0,
    "search.trials": 3,
    "search.concurrency": 1,
    "trial.steps": 4,
    "trial.compile": False,
    "final.pick": 1,
    "final.epochs": 0.01,
    "final.seeds": 1,
    "storage": "none",
    "engine.address": "none",
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "metric", "needs"),
    [
        ("digits-segmentation", "miou", "sklearn"),
        ("keyword-tones", "top1", "sklearn"),
        ("super-resolution", "psnr", "sklearn"),
        ("shapes-detection", "map", "torchmetrics"),
        ("text-topics", "top1", "transformers"),
        ("tiny-lm", "bits_per_byte", "transformers"),
        ("tones-pitch", "within_50_cents", "torchcrepe"),
    ],
)
def test_a_shipped_study_of_another_kind_runs_to_the_end(tmp_path: Path, name: str, metric: str, needs: str) -> None:
    pytest.importorskip(needs)
    sets = [part for key, value in BRIEF.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    steps = [
        ("check", name, *sets),
        ("run", name, "--out", "run", *sets),
        ("front", "run"),
        ("finalize", "run"),
        ("report", "run"),
        ("export", "run", "--to", "native", "--out", "native"),
    ]
    for step in steps:
        done = mpsearch(*step, cwd=tmp_path)
        assert done.returncode == 0, f"{step}: {done.stderr}"
    records = [json.loads(line) for line in (tmp_path / "run" / "trials.jsonl").read_text().splitlines()]
    assert [record["state"] for record in records] == ["complete"] * 3
    compared = metric != "map"  # a detector's outputs are not
    assert all((record["divergence"] is not None) == compared for record in records)
    assert metric in (tmp_path / "run" / "run.json").read_text()
    verified = json.loads((tmp_path / "native" / "precision.json").read_text())["verified"]
    assert verified["same_answers"] == verified["samples"] > 0
