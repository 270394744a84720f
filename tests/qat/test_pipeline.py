"""The white paper's QAT pipeline on digits, and one config trained from the command's text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import mpsearch
from mpsearch.errors import ExportError, PrecisionError
from mpsearch.exporters import native
from mpsearch.exporters.read import read_precisions
from mpsearch.metric import TOP1
from mpsearch.precision import LayerPrecision, PrecisionConfig
from mpsearch.problem import Problem, open_problem
from mpsearch.qat.pipeline import qat
from mpsearch.qat.train import target_config, train_one
from mpsearch.quant.prepare import prepare
from mpsearch.quant.shift import SlopeSchedule

pytestmark = pytest.mark.study


@pytest.fixture(scope="module")
def problem() -> Problem:
    torch.set_num_threads(1)
    return open_problem(mpsearch.load_study("digits", ["trial.steps=24", "trial.batch_size=32"]))


def everywhere(problem: Problem, weight: str, activation: str) -> PrecisionConfig:
    return PrecisionConfig.uniform(problem.layers, LayerPrecision.parse(weight, activation))


def test_training_repairs_what_ranges_alone_leave_broken(problem: Problem) -> None:
    task, config = problem.task, everywhere(problem, "uniform:2", "uniform:2")
    untrained = prepare(task.float_model(), config, task.calibration_input(256)).eval()
    trained = qat(task, config, problem.spec.trial)
    assert task.evaluate(trained.model, "val") > task.evaluate(untrained, "val") + 0.05
    assert trained.log[-1]["loss"] < trained.log[0]["loss"]


def test_weights_with_one_range_train_with_folded_norms(problem: Problem, tmp_path: Path) -> None:
    task, config = problem.task, everywhere(problem, "uniform:4/tensor", "uniform:4")
    trained = qat(task, config, problem.spec.trial)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in trained.model.modules())
    assert task.evaluate(trained.model, "val") > task.evaluate(task.float_model(), "val") - 0.1
    native.save(trained.network(name="m", task=task.name, metric=TOP1, score={}), tmp_path / "out")
    x = task.calibration_input(16)
    again = mpsearch.load(task.float_model(), tmp_path / "out")
    assert torch.equal(again(x), trained.model(x))


def test_weights_with_a_range_a_channel_keep_their_norms(problem: Problem) -> None:
    trained = qat(problem.task, everywhere(problem, "uniform:4", "uniform:4"), problem.spec.trial)
    assert any(isinstance(m, nn.BatchNorm2d) for m in trained.model.modules())
    assert trained.structure is None


def test_the_soft_phase_of_shift_weights_is_logged_and_hardens(problem: Problem) -> None:
    config = everywhere(problem, "shift:4", "float")
    log = qat(problem.task, config, problem.spec.trial, slope=SlopeSchedule(4, 128)).log
    assert log[0]["slope"] == 4
    assert log[-1]["slope"] == pytest.approx(128)
    assert log[-1]["soft_hard_gap"] < log[0]["soft_hard_gap"] / 2
    assert log[-1]["live_share"] < log[0]["live_share"]


@pytest.mark.slow
@pytest.mark.parametrize("gradient", ["ste", "dsq"])
def test_shift_trains_with_the_other_gradients_too(problem: Problem, gradient: str) -> None:
    task, config = problem.task, everywhere(problem, "shift:2", "shift:3")
    untrained = prepare(task.float_model(), config, task.calibration_input(256)).eval()
    trained = qat(task, config, problem.spec.trial, shift_gradient=gradient, slope=SlopeSchedule(4, 64))  # type: ignore[arg-type]
    assert "live_share" not in trained.log[0]
    assert task.evaluate(trained.model, "val") > task.evaluate(untrained, "val") + 0.05


@pytest.mark.parametrize("method", ["qat", "gdnsq"])
def test_train_one_scores_both_splits_and_prices_the_config(problem: Problem, method: str) -> None:
    seen: list[tuple[int, int]] = []

    class Steps(mpsearch.Observer):
        def on_step(self, step: int, steps: int, loss: float) -> None:
            seen.append((step, steps))

    scored = train_one(problem, LayerPrecision.shorthand("w8a8"), method, 0.5, 0, Steps())
    assert seen == [(step, len(seen)) for step in range(1, len(seen) + 1)]
    assert scored.cost == pytest.approx(1.0)
    for split in ("val", "test"):
        assert scored.score[split] == problem.task.evaluate(scored.trained.model, split)
        assert scored.float_score[split] == problem.task.evaluate(problem.task.float_model(), split)


def test_a_target_is_for_every_layer_that_the_space_does_not_fix() -> None:
    study = mpsearch.load_study("digits", ["space=digits_mixed"])
    space = open_problem(study).space
    config, fixed = target_config(space, read_precisions("w1a1"))
    assert set(config.values()) == {LayerPrecision.shorthand("w1a1")}
    assert fixed == ()
    config, _ = target_config(space, read_precisions("shift:4 x float"))
    assert {str(p) for p in config.values()} == {"shift:4/channel x float"}


def test_layers_that_the_space_fixes_are_named(problem: Problem, tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(
        "name: s\nrules:\n  - {match: '*', weight: ['uniform:2-8'], activation: ['uniform:2-8']}\n"
        "first: {weight: ['uniform:8'], activation: ['uniform:8']}\n"
    )
    space = open_problem(mpsearch.load_study("digits", [f"space={path}"])).space
    config, fixed = target_config(space, read_precisions("w1a1"))
    assert f"{space.layers[0]} uniform:8/channel x uniform:8/tensor" in fixed
    assert str(config[space.layers[1]]) == "uniform:1/channel x uniform:1/tensor"


def test_a_config_file_is_a_target(problem: Problem, tmp_path: Path) -> None:
    task = problem.task
    trained = qat(task, everywhere(problem, "apot:4", "uniform:5"), problem.spec.trial.model_copy(update={"steps": 1}))
    native.save(trained.network(name="m", task=task.name, metric=TOP1, score={}), tmp_path / "out")
    for path in (tmp_path / "out", tmp_path / "out" / "precision.json"):
        assert target_config(problem.space, read_precisions(str(path))) == (trained.config, ())


def test_targets_that_cannot_be_read_are_refused(problem: Problem, tmp_path: Path) -> None:
    for text in ("four", "w4", "shift:9 x float", "uniform:4 x uniform:4/channel"):
        with pytest.raises(PrecisionError):
            target_config(problem.space, read_precisions(text))
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ExportError):
        target_config(problem.space, read_precisions(str(tmp_path / "x.json")))
