"""A trial trains, scores and records; a workbench gives the same as a fresh start."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any, cast

import psutil
import pytest
import torch
from quick import FEW_IMAGES
from torch import nn

from mpsearch.errors import PrecisionError, TaskError
from mpsearch.precision import LayerPrecision, PrecisionConfig
from mpsearch.quant.fused import Elementwise
from mpsearch.record import TrialRecord, unpack
from mpsearch.search.rungs import ended_first_rung
from mpsearch.search.stopping import UNWATCHED, Thresholds
from mpsearch.search.trial import peak_memory_bytes, run_trial
from mpsearch.space.build import build_space
from mpsearch.space.spec import load_space
from mpsearch.study import TrialSpec, load_study
from mpsearch.task.comparing import NEAR, SETTLED
from mpsearch.task.load import load_task
from mpsearch.task.task import Measuring, Task
from mpsearch.train import FitResult, TrainingState
from mpsearch.workbench import CHECKED, Score, Workbench

pytestmark = pytest.mark.study

SETTINGS = TrialSpec(steps=20, batch_size=32, bn_batches=4, precision="fp32", calibration_samples=64)


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task(load_study("digits", FEW_IMAGES).task)


@pytest.fixture(scope="module")
def workbench(task: Task) -> Workbench:
    return Workbench(task, SETTINGS)


def uniform(workbench: Workbench, text: str) -> PrecisionConfig:
    names = [layer.name for layer in workbench.graph.quantizable]
    return PrecisionConfig.uniform(names, LayerPrecision.shorthand(text))


def test_trial_at_8_bits_is_as_good_as_the_float_model(task: Task, workbench: Workbench) -> None:
    record = run_trial(task, uniform(workbench, "w8a8"), SETTINGS, workbench=workbench, cost=lambda config: 1.0)
    assert record.state == "complete"
    assert record.score == pytest.approx(task.evaluate(task.float_model(), "val"), abs=0.02)
    assert record.cost == 1.0
    assert record.wall.total_s > 0
    assert record.peak_memory_bytes > 1e8


def test_trial_repairs_what_range_setting_alone_leaves_broken(task: Task, workbench: Workbench) -> None:
    config = uniform(workbench, "w2a2")
    untrained = run_trial(task, config, SETTINGS.model_copy(update={"steps": 0}), workbench=workbench)
    trained = run_trial(task, config, SETTINGS, workbench=workbench)
    assert trained.score is not None
    assert untrained.score is not None
    assert trained.score > untrained.score + 0.05
    assert trained.end_loss is not None
    assert trained.start_loss is not None
    assert trained.end_loss < trained.start_loss


@pytest.mark.slow  # the bench below is reused too, and for other types
def test_a_reused_bench_gives_what_a_fresh_one_gives(task: Task, workbench: Workbench) -> None:
    config = uniform(workbench, "w3a3")
    run_trial(task, uniform(workbench, "w1a1"), SETTINGS, workbench=workbench)
    reused = run_trial(task, config, SETTINGS, workbench=workbench)
    fresh = run_trial(task, config, SETTINGS)
    assert (reused.score, reused.end_loss) == (fresh.score, fresh.end_loss)


MIXED = [("shift:4", "uniform:8"), ("apot:4", "shift:4")]
BRIEF = SETTINGS.model_copy(update={"steps": 4})


def test_one_bench_switches_types_and_gives_what_a_fresh_one_gives(task: Task, workbench: Workbench) -> None:
    space = build_space(load_space("digits_mixed"), workbench.layers)
    switching = Workbench(task, BRIEF, offers=space.offers)
    names = [layer.name for layer in workbench.graph.quantizable]
    for weight, activation in MIXED:
        config = PrecisionConfig.uniform(names, LayerPrecision.parse(weight, activation))
        reused = run_trial(task, config, BRIEF, workbench=switching)
        fresh = run_trial(task, config, BRIEF)
        assert (reused.score, reused.end_loss) == (fresh.score, fresh.end_loss), f"{weight} x {activation}"
        assert reused.score is not None
        assert reused.score > 0.5, f"{weight} x {activation}"


def test_a_bench_without_offers_refuses_other_types_by_layer(task: Task, workbench: Workbench) -> None:
    config = uniform(workbench, "w4a4").replace(conv2=LayerPrecision.parse("apot:4", "uniform:4"))
    with pytest.raises(PrecisionError, match=r"layer 'conv2'.*offer apot too"):
        run_trial(task, config, SETTINGS, workbench=workbench)


def test_a_trial_never_sees_the_test_split(workbench: Workbench) -> None:
    seen: list[str] = []

    class Watched:
        def __init__(self, task: Task) -> None:
            self._task = task

        def __getattr__(self, name: str) -> Any:
            return getattr(self._task, name)

        def evaluate(self, model: nn.Module, split: Any) -> float:
            seen.append(split)
            return self._task.evaluate(model, split)

        def measure(self, model: nn.Module, split: Any) -> Any:
            seen.append(split)
            return cast(Measuring, self._task).measure(model, split)

    watched = Watched(workbench.task)
    run_trial(watched, uniform(workbench, "w8a8"), SETTINGS.model_copy(update={"steps": 2}))  # type: ignore[arg-type]
    assert set(seen) == {"val"}


def test_a_task_without_distillation_uses_its_own_loss(task: Task) -> None:
    workbench = Workbench(task, SETTINGS.model_copy(update={"distill": False}))
    workbench.reset(uniform(workbench, "w8a8"))
    x, y = next(task.train_batches(8, 1, 0))
    output = workbench.model(x)
    assert torch.equal(workbench.loss(0)(0, x, output, y), task.loss(output, y))


def test_a_score_that_is_no_number_is_an_error(task: Task, workbench: Workbench) -> None:
    broken = copy.copy(workbench)
    broken.score = lambda split: Score(float("nan"))  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match="top1 on val is nan after 0 steps"):
        run_trial(task, uniform(workbench, "w8a8"), SETTINGS.model_copy(update={"steps": 0}), workbench=broken)
    halfway = copy.copy(workbench)
    scores = iter([Score(0.5), Score(float("nan"))])
    halfway.quick_score = lambda: next(scores)  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match="top1 on val is nan after 10 steps"):
        run_trial(task, uniform(workbench, "w2a2"), SETTINGS, workbench=halfway)  # a record holds finite numbers


def fused(workbench: Workbench) -> bool:
    return any(module.fused for module in workbench.model.modules() if isinstance(module, Elementwise))


def test_compilation_is_not_asked_for_where_it_does_not_pay(workbench: Workbench) -> None:
    assert not fused(workbench)  # `auto`, and digits are small


@pytest.mark.compile
def test_compilation_is_asked_for_where_quantizers_have_enough_to_do(
    task: Task, workbench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_sample = sum(layer.calls * math.prod(layer.input_shape) for layer in workbench.layers)
    monkeypatch.setattr("mpsearch.workbench.WORTH_COMPILING", SETTINGS.steps * SETTINGS.batch_size * a_sample)
    assert fused(Workbench(task, SETTINGS))
    monkeypatch.setattr("mpsearch.workbench.WORTH_COMPILING", SETTINGS.steps * SETTINGS.batch_size * a_sample + 1)
    assert not fused(Workbench(task, SETTINGS))


def test_a_missing_compiler_means_eager_trials_and_is_said(
    task: Task, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("mpsearch.workbench.compiler_missing", lambda: "no C++ compiler was found")
    workbench = Workbench(task, SETTINGS.model_copy(update={"compile": True}))
    assert not fused(workbench)
    assert "torch.compile is not used: no C++ compiler was found" in caplog.text


@pytest.mark.slow
@pytest.mark.compile
def test_a_compiled_trial_scores_like_an_eager_one(task: Task, workbench: Workbench) -> None:
    compiled = Workbench(task, SETTINGS.model_copy(update={"compile": True}))
    for text in ("w4a4", "w3a3"):
        config = uniform(workbench, text)
        eager = run_trial(task, config, SETTINGS, workbench=workbench)
        fast = run_trial(task, config, SETTINGS, workbench=compiled)
        assert fast.score == pytest.approx(eager.score, abs=0.02)
        assert fast.end_loss == pytest.approx(eager.end_loss, rel=0.1)


def test_a_trial_is_scored_before_halfway_and_at_its_end(task: Task, workbench: Workbench) -> None:
    record = run_trial(task, uniform(workbench, "w3a3"), SETTINGS, workbench=workbench)
    steps, accuracies = zip(*record.curve, strict=True)
    assert steps == (0, 10, 20)
    assert record.score == max(accuracies[0], accuracies[-1])
    assert record.values is not None
    assert unpack(record.values).mean() == pytest.approx(record.score)
    assert record.divergence is not None
    assert 0 < record.divergence < 10


def test_nothing_is_scored_halfway_where_nothing_is_decided_by_it(task: Task, workbench: Workbench) -> None:
    config = uniform(workbench, "w3a3")
    watched = run_trial(task, config, SETTINGS, workbench=workbench)
    record = run_trial(task, config, SETTINGS, workbench=workbench, thresholds=UNWATCHED)
    assert [step for step, _ in record.curve] == [0, 20]
    assert (record.score, record.end_loss) == (watched.score, watched.end_loss)


def scored_in_both(workbench: Workbench, monkeypatch: pytest.MonkeyPatch, error: float = 0.0) -> list[bool]:
    """The arithmetic of each quick score of some configs; bfloat16 stands for a faster one that is wrong by `error`."""
    taken: list[bool] = []
    whole, clock = type(workbench)._score, [0.0]

    def score(self: Workbench, task: Any, split: Any, bf16: bool = False) -> Score:
        taken.append(bf16)
        clock[0] += 1.0 if bf16 else 2.0
        found = whole(self, task, split)
        return dataclasses.replace(found, divergence=(found.divergence or 0.0) + (error if bf16 else 0.0))

    monkeypatch.setattr(type(workbench), "_score", score)
    monkeypatch.setattr("mpsearch.workbench.time.perf_counter", lambda: clock[0])
    for text in ("w2a2", "w3a3", "w5a5", "w4a4", "w2a4"):
        workbench.reset(uniform(workbench, text))
        workbench.quick_score()
    return taken


def test_quick_scores_are_in_bfloat16_once_it_has_scored_as_float32_did(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    low = Workbench(task, SETTINGS.model_copy(update={"precision": "bf16"}))
    assert scored_in_both(low, monkeypatch) == [False, True] * CHECKED + [True, True]


def test_quick_scores_stay_in_float32_where_bfloat16_scores_otherwise(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    low = Workbench(task, SETTINGS.model_copy(update={"precision": "bf16"}))
    assert scored_in_both(low, monkeypatch, error=1.0) == [False, True, False, False, False, False]


def test_without_bfloat16_nothing_is_scored_twice(
    task: Task, workbench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert scored_in_both(workbench, monkeypatch) == [False] * 5  # precision: fp32


def test_a_fine_tune_that_does_harm_is_taken_back(task: Task, workbench: Workbench) -> None:
    config = uniform(workbench, "w4a4")
    untrained = run_trial(task, config, SETTINGS.model_copy(update={"steps": 0}), workbench=workbench)
    harmed = copy.copy(workbench)

    def ruin(*_: Any, **__: Any) -> FitResult:
        for parameter in workbench.model.parameters():
            parameter.data.zero_()
        return FitResult(0.0, 9.0)

    harmed.fit = ruin  # type: ignore[method-assign]
    record = run_trial(task, config, SETTINGS, workbench=harmed)
    assert record.curve[-1][1] < record.curve[0][1] - 0.1
    # w4a4 starts far from float, so its start has BatchNorm statistics of its own and not the float network's
    assert record.score == record.curve[0][1] == workbench.score("val").value > untrained.score
    assert record.values == workbench.score("val").values


def test_a_config_that_answers_as_the_float_network_does_is_not_trained(task: Task, workbench: Workbench) -> None:
    record = run_trial(task, uniform(workbench, "w8a8"), SETTINGS, workbench=workbench)
    assert record.divergence is not None
    assert record.divergence < SETTLED
    assert record.curve == ((0, record.score),)
    assert record.state == "complete"
    assert record.end_loss is None
    lower = run_trial(task, uniform(workbench, "w3a3"), SETTINGS, workbench=workbench)
    assert lower.end_loss is not None


RUNGS = SETTINGS.model_copy(update={"steps": 10, "rungs": (10, 30)})


def test_a_longer_rung_goes_on_from_the_shorter_one(task: Task, workbench: Workbench) -> None:
    config = uniform(workbench, "w2a2")
    states: list[TrainingState] = []
    first = run_trial(task, config, RUNGS, workbench=workbench, on_state=states.append)
    assert [point[0] for point in first.curve] == [0, 5, 10]
    assert [state.steps for state in states] == [5]  # before the rate fell
    before = ended_first_rung(first)
    seen: list[int] = []

    def longer(begun: TrainingState | None) -> TrialRecord:
        seen.clear()
        return run_trial(
            task,
            config,
            RUNGS,
            workbench=workbench,
            rung=1,
            before=before,
            begun=begun,
            on_state=states.append,
            on_step=lambda step, _: seen.append(step),
        )

    anew = longer(None)
    assert seen == list(range(30))
    gone_on = longer(states[0])
    assert seen == list(range(5, 30))
    assert gone_on.curve == ((30, gone_on.score),)  # neither start nor halfway is scored again
    assert gone_on.start_divergence is None
    assert gone_on.divergence is not None
    assert first.divergence is not None
    assert gone_on.divergence < first.divergence
    assert anew.score == pytest.approx(gone_on.score, abs=0.1)
    assert len(states) == 1  # there is no rung after the last
    again = longer(states[0])
    assert (again.score, again.end_loss) == (gone_on.score, gone_on.end_loss)


def test_harm_of_a_longer_rung_is_taken_back_too(task: Task, workbench: Workbench) -> None:
    config = uniform(workbench, "w4a4")
    before = ended_first_rung(run_trial(task, config, RUNGS, workbench=workbench))
    harmed = copy.copy(workbench)

    def ruin(*_: Any, **__: Any) -> FitResult:
        for parameter in workbench.model.parameters():
            parameter.data.zero_()
        return FitResult(0.0, 9.0)

    harmed.fit = ruin  # type: ignore[method-assign]
    record = run_trial(task, config, RUNGS, workbench=harmed, rung=1, before=before)
    assert record.curve[-1][1] < before.curve[0][1] - 0.1
    assert record.score == workbench.score("val").value > record.curve[-1][1] + 0.1


def test_a_trial_below_its_bar_stops_halfway_with_what_it_had(task: Task, workbench: Workbench) -> None:
    steps: list[int] = []
    record = run_trial(
        task,
        uniform(workbench, "w2a2"),
        SETTINGS,
        workbench=workbench,
        thresholds=Thresholds(halfway=1.01),
        on_step=lambda step, _: steps.append(step),
    )
    assert record.state == "stopped"
    assert steps == list(range(10))
    assert record.reason is not None
    assert "after 10 steps" in record.reason
    assert record.curve[-1] == (10, record.score)
    above = run_trial(
        task, uniform(workbench, "w2a2"), SETTINGS, workbench=workbench, thresholds=Thresholds(halfway=0.0)
    )
    assert above.state == "complete"


def test_a_trial_that_starts_too_far_from_float_is_not_trained(task: Task, workbench: Workbench) -> None:
    config = uniform(workbench, "w2a2")
    record = run_trial(task, config, SETTINGS, workbench=workbench, thresholds=Thresholds(start=0.0))
    assert record.state == "stopped"
    assert record.reason is not None
    assert "at the start" in record.reason
    assert record.start_divergence is not None
    assert record.curve == ((0, record.score),)
    assert record.end_loss is None
    passed = run_trial(
        task, config, SETTINGS, workbench=workbench, thresholds=Thresholds(start=record.start_divergence)
    )
    assert passed.state == "complete"
    assert passed.start_divergence == record.start_divergence  # the same, whatever was trained in between


def test_a_start_far_from_float_has_its_batch_norm_statistics_estimated_anew(task: Task, workbench: Workbench) -> None:
    config = uniform(workbench, "w2a2")
    workbench.reset(config)
    raw = workbench.quick_score().divergence
    workbench.reestimate(SETTINGS.seed)
    record = run_trial(task, config, SETTINGS, workbench=workbench)
    assert record.start_divergence == pytest.approx(bench_after(workbench, config), rel=1e-5)
    assert raw is not None
    assert raw > NEAR
    assert record.start_divergence != raw


def bench_after(workbench: Workbench, config: PrecisionConfig) -> float | None:
    workbench.reset(config)
    workbench.reestimate(SETTINGS.seed)
    return workbench.quick_score().divergence


def test_before_and_halfway_a_sample_is_scored_and_at_the_end_everything(task: Task, workbench: Workbench) -> None:
    sampled = copy.copy(workbench)
    sampled._quick_task = task.sampled(20)  # type: ignore[attr-defined]
    sampled._float_rows = {}
    record = run_trial(task, uniform(workbench, "w2a2"), SETTINGS, workbench=sampled)
    before, halfway, end = (accuracy for _, accuracy in record.curve)
    assert {before, halfway} <= {i / 20 for i in range(21)}
    assert end == record.score == workbench.score("val").value


def test_peak_memory_is_the_largest_size_and_not_the_present_one() -> None:
    before = peak_memory_bytes()
    block = bytearray(max(0, before - psutil.Process().memory_info().rss) + 2**26)  # beyond the peak until now
    block[::4096] = bytes(len(block[::4096]))  # every page
    del block
    assert peak_memory_bytes() >= before + 2**25


class Pooled(nn.Module):
    """BatchNorm behind global pooling: one value a channel from each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 8, 3), nn.BatchNorm1d(8)
        self.linear = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.linear(self.bn(torch.relu(self.conv(x)).mean(dim=(2, 3)))))


class Undropped:
    """The digits task as a DataLoader without `drop_last` gives it: 33 images, so that each epoch ends with one."""

    def __init__(self, task: Any) -> None:
        self._task = task

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def float_model(self) -> nn.Module:
        torch.manual_seed(0)
        return Pooled().eval()

    def steps_per_epoch(self, batch_size: int) -> int:
        return -(-33 // batch_size)

    def train_batches(self, batch_size: int, steps: int, seed: int) -> Any:
        x, y = next(iter(self._task.train_batches(33, 1, seed)))
        epoch = list(zip(x.split(batch_size), y.split(batch_size), strict=True))
        return (epoch[i % len(epoch)] for i in range(steps))


def test_a_batch_of_one_sample_is_passed_over_where_a_norm_cannot_train_on_it(task: Task) -> None:
    undropped = Undropped(task)
    sizes = [len(x) for x, _ in undropped.train_batches(16, 5, 0)]
    assert sizes == [16, 16, 1, 16, 16]
    settings = SETTINGS.model_copy(update={"batch_size": 16, "steps": 7})
    workbench = Workbench(undropped, settings)
    assert [len(x) for x, _ in workbench.train_batches(7, 0)] == [16] * 7
    workbench.reset(uniform(workbench, "w4a4"))
    assert workbench.fit(7, seed=0).end_loss > 0
    workbench.reestimate(seed=0)


def test_batches_of_one_sample_are_kept_where_every_norm_can_train_on_them(task: Task, workbench: Workbench) -> None:
    one = Workbench(task, SETTINGS.model_copy(update={"batch_size": 1}))
    assert [len(x) for x, _ in one.train_batches(3, 0)] == [1, 1, 1]


def test_a_batch_size_of_one_is_refused_where_a_norm_cannot_train_on_it(task: Task) -> None:
    one = {"batch_size": 1, "steps": 3}
    with pytest.raises(TaskError, match=r"1 BatchNorms get one value a channel .*'bn' for one: set trial\.batch_size"):
        Workbench(Undropped(task), SETTINGS.model_copy(update=one))
    Workbench(Undropped(task), SETTINGS.model_copy(update={"batch_size": 1, "steps": 0, "bn_batches": 0}))
