"""Which arithmetic trials train in: the one that is faster here, found out once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mpsearch import arithmetic
from mpsearch.arithmetic import trains_in_bf16
from mpsearch.record import RunFolder
from mpsearch.search.run import run_study
from mpsearch.study import load_study, read_spec


class Some:
    name = "some"

    def __init__(self) -> None:
        self.asked = 0

    def train_batches(self, batch_size: int, steps: int, seed: int) -> Any:
        self.asked += 1
        yield torch.randn(batch_size, 4), torch.zeros(batch_size)


@pytest.fixture(autouse=True)
def _with_bfloat16(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MPSEARCH_CACHE", str(tmp_path))
    monkeypatch.setattr(arithmetic, "bf16_in_hardware", lambda: True)


@pytest.mark.parametrize(("bf16_s", "expected"), [(0.5, True), (0.95, False), (1.3, False)])
def test_the_faster_one_is_taken_and_bfloat16_only_if_it_gains(
    monkeypatch: pytest.MonkeyPatch, bf16_s: float, expected: bool
) -> None:
    monkeypatch.setattr(arithmetic, "_seconds", lambda model, x: [1.0, bf16_s])
    assert trains_in_bf16(Some(), nn.Linear(4, 2), 8) is expected


def test_it_is_found_out_once_and_changes_nothing() -> None:
    task, model = Some(), nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2), nn.Dropout()).eval()
    before, state = {n: v.clone() for n, v in model.state_dict().items()}, torch.get_rng_state()
    first = trains_in_bf16(task, model, 64)
    assert trains_in_bf16(task, model, 64) is first
    assert task.asked == 1
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_network_that_does_not_run_in_bfloat16_trains_in_float32() -> None:
    class Picky(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if torch.is_autocast_enabled("cpu"):
                raise RuntimeError('"eigvals" not implemented for BFloat16')
            return super().forward(x)

    assert not trains_in_bf16(Some(), Picky(4, 2), 8)


@pytest.mark.study
def test_all_trials_of_a_run_have_one_arithmetic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "_seconds", lambda model, x: [1.0, 0.5])
    cold = ["warm_start.method=none", "warm_start.ilp=false", "warm_start.combinations=0", "engine.address=none"]
    few = ["trial.steps=2", "trial.bn_batches=1", "search.trials=1", "storage=none"]
    run_study(load_study("digits", [*cold, *few]), tmp_path / "run")
    assert read_spec(RunFolder.open(tmp_path / "run")).trial.precision == "bf16"
    run_study(load_study("digits", [*cold, *few, "trial.precision=fp32"]), tmp_path / "other")
    assert read_spec(RunFolder.open(tmp_path / "other")).trial.precision == "fp32"
