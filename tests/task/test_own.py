"""A task of one's own: from a few methods to a search."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from commands import mpsearch
from own_tasks import Boxes, Denoising, Masks, Tokens
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mpsearch.errors import TaskError
from mpsearch.metric import METRICS, Metric
from mpsearch.precision import LayerPrecision, PrecisionConfig
from mpsearch.record import pack, unpack
from mpsearch.search.compare import paired
from mpsearch.search.trial import run_trial
from mpsearch.study import TaskSpec, TrialSpec
from mpsearch.task.comparing import comparison
from mpsearch.task.load import load_task
from mpsearch.task.own import OwnTask
from mpsearch.task.samples import samples_in
from mpsearch.task.scores import MeanIoU, scorer
from mpsearch.task.scoring import measure
from mpsearch.workbench import Workbench

pytestmark = pytest.mark.study

SETTINGS = TrialSpec(steps=8, batch_size=16, compile=False, precision="fp32", calibration_samples=32, bn_batches=2)


class Plain:
    """The least that a task has."""

    metric: str | Metric = "mse"

    def __init__(self, batches: Any = None, model: nn.Module | None = None) -> None:
        self._batches, self._model = batches, model or nn.Linear(3, 2)

    def float_model(self) -> nn.Module:
        return self._model

    def batches(self, split: str) -> Any:
        return self._batches(split) if callable(self._batches) else self._batches

    def loss(self, output: Any, target: Any) -> Tensor:
        return F.mse_loss(output, target)


X, Y = torch.arange(30.0).reshape(10, 3), torch.arange(20.0).reshape(10, 2)


# --------------------------------------------------------------------------------------------------------- batches


class ByName(nn.Module):
    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left + right


@pytest.mark.parametrize(
    ("batch", "model", "expected"),
    [
        ((X, 2 * X), nn.Identity(), X),
        (X, nn.Identity(), X),
        ([X, X], nn.Identity(), X),
        (((X, X), Y), ByName(), 2 * X),
        (((X,), {"right": X}, Y), ByName(), 2 * X),
        ({"left": X, "right": 3 * X}, ByName(), 4 * X),
    ],
)
def test_a_batch_of_any_form_enters_the_model(batch: Any, model: nn.Module, expected: Tensor) -> None:
    seen: list[Tensor] = []
    task = Plain([batch], model)
    task.score = lambda output, target: seen.append(output) or torch.zeros(len(output))  # type: ignore[attr-defined]
    OwnTask(task).measure(model, "val")
    assert torch.equal(torch.cat(seen), expected)


class Encoder(nn.Module):
    """Has no `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 8), nn.Linear(8, 2)

    def encode(self, x: Tensor, scale: float) -> Tensor:
        encoded: Tensor = self.outer(self.inner(x * scale).relu())
        return encoded


class Encoding(Plain):
    def forward(self, model: nn.Module, x: Any) -> Tensor:
        answer: Tensor = model.encode(x["values"], 1 / 30)  # type: ignore[operator]
        return answer

    def loss(self, output: Any, target: Any) -> Tensor:
        return F.mse_loss(output, target["values"][:, :2])

    def score(self, output: Any, target: Any) -> Tensor:
        return (output - target["values"][:, :2]).square().mean(dim=1)


def test_a_task_says_how_its_network_is_called() -> None:
    torch.manual_seed(0)
    own = Encoding([{"values": X, "noted": Y}], Encoder())
    task = OwnTask(own)
    model = task.float_model()
    expected = own.score(own._model.encode(X, 1 / 30), {"values": X}).mean()  # type: ignore[operator]
    assert task.evaluate(model, "val") == pytest.approx(float(expected))
    workbench = Workbench(task, SETTINGS.model_copy(update={"calibration_samples": 8, "batch_size": 5}))  # type: ignore[arg-type]
    names = [layer.name for layer in workbench.graph.quantizable]
    assert names == ["model.inner", "model.outer"]
    config = PrecisionConfig.uniform(names, LayerPrecision.shorthand("w4a4"))
    trained = run_trial(task, config, SETTINGS.model_copy(update={"calibration_samples": 8, "batch_size": 5}))  # type: ignore[arg-type]
    assert trained.state == "complete"
    assert own._model.inner.weight.requires_grad  # the network of the task is what it was


def test_batches_are_cut_joined_and_shuffled_by_the_seed() -> None:
    task = OwnTask(Plain([(X[:7], Y[:7]), (X[7:], Y[7:])]))

    def epoch(seed: int) -> Tensor:
        return torch.cat([x for x, _ in task.train_batches(4, 2, seed)])

    assert torch.equal(epoch(0), epoch(0))
    assert not torch.equal(epoch(0), epoch(1))
    assert len(set(epoch(0)[:, 0].tolist())) == 8  # no sample twice in an epoch
    x, y = next(task.train_batches(4, 1, 0))
    assert torch.equal(x[:, 0] / 3, y[:, 0] / 2)  # inputs keep their targets
    assert task.steps_per_epoch(4) == 2


def test_a_data_loader_is_read_by_position_and_its_augmentation_follows_the_seed() -> None:
    class Noisy(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            x, y = super().__getitem__(index)
            return x + torch.rand(()), y

    task = OwnTask(Plain(DataLoader(Noisy(X, Y), batch_size=5, shuffle=True)))
    before = torch.random.get_rng_state()
    one, again, other = ([x for x, _ in task.train_batches(4, 3, seed)] for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(map(torch.equal, one, again))
    assert not torch.equal(one[0], other[0])


def test_batches_of_other_shapes_stay_as_they_are() -> None:
    padded = [(torch.zeros(4, 3), torch.zeros(4)), (torch.zeros(4, 5), torch.zeros(4))]
    assert samples_in(padded, "train").whole_batches
    lists = [([torch.zeros(3), torch.zeros(5)], torch.zeros(2)), ([torch.zeros(1)], torch.ones(1))]
    joined = samples_in(lists, "train")
    assert joined.count == 3
    x, y = joined.take([2, 0], seed=0)
    assert [len(item) for item in x] == [1, 3]
    assert y.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "gave no batch"),
        (X, "is a Tensor, expected an iterable of batches"),
        ([(X, Y, Y)], r"a tuple of 3, expected \(input, target\) or \(args, kwargs, target\)"),
        (lambda split: {}[split], "its `batches` raised KeyError"),
    ],
)
def test_batches_that_are_none_are_refused(batches: Any, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        next(OwnTask(Plain(batches)).train_batches(2, 1, 0))


def test_calibration_takes_few_samples_of_large_inputs() -> None:
    small, large = (OwnTask(Plain([(torch.zeros(64, n), torch.zeros(64, 2))])) for n in (3, 2**20))
    assert len(small.calibration_input(50)) == 50
    assert len(large.calibration_input(50)) == 8


# ---------------------------------------------------------------------------------------------------------- scores


def test_common_metrics_are_as_their_formulas_have_them() -> None:
    logits = torch.tensor([[[2.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [3.0, 0.0]]])  # (2, 2 steps, 2 tokens)
    target = torch.tensor([[0, 1], [1, -100]])
    nats = [(math.log1p(math.exp(-2)) + math.log(2)) / 2, math.log1p(math.exp(-1))]

    def score(name: str, output: Tensor, target: Tensor) -> tuple[float, Tensor | None]:
        of = scorer("t", METRICS[name], None)
        of.add(output, target, len(output))
        return of.result()

    perplexity, values = score("perplexity", logits, target)
    assert values is not None
    assert values.tolist() == pytest.approx(nats)
    assert perplexity == pytest.approx(math.exp(sum(nats) / 2))
    assert score("bits_per_byte", logits, target)[0] == pytest.approx(sum(nats) / 2 / math.log(2))
    pictures = torch.zeros(2, 1, 2, 2)
    assert score("psnr", pictures + 0.1, pictures)[0] == pytest.approx(20.0)
    assert score("mse", pictures + 0.1, pictures)[0] == pytest.approx(0.01)
    classes = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    assert score("top1", classes, torch.tensor([0, 1]))[0] == 0.5


def test_mean_iou_is_over_the_classes_that_occur() -> None:
    of, output = MeanIoU(), F.one_hot(torch.tensor([[[0, 0, 1, 1]]]), 3).movedim(-1, 1).float()
    of.update(output, torch.tensor([[[0, 1, 1, 255]]]))
    assert of.compute() == pytest.approx((1 / 2 + 1 / 2) / 2)


def test_an_own_score_is_by_sample_a_mean_or_an_accumulator() -> None:
    class Largest:
        most = 0.0

        def reset(self) -> None:
            self.most = 0.0

        def update(self, output: Tensor, target: Tensor) -> None:
            self.most = max(self.most, float(output.max()))

        def compute(self) -> Tensor:
            return torch.tensor(self.most)

    def measured(score: Any) -> Any:
        task = Plain([(X, X)], nn.Identity())
        task.metric, task.score = Metric("own"), score  # type: ignore[attr-defined]
        return measure(OwnTask(task), nn.Identity(), "val")

    by_sample = measured(lambda output, target: output[:, 0])
    assert by_sample.score == by_sample.values.mean() == X[:, 0].mean()
    mean = measured(lambda output, target: output.mean())
    assert (mean.score, mean.values) == (X.mean(), None)
    largest = Largest()
    assert [measured(largest).score for _ in range(2)] == [29.0, 29.0]
    with pytest.raises(TaskError, match=r"`score` gave the shape \(10, 3\) for a batch of 10 samples"):
        measured(lambda output, target: output)


def test_a_metric_that_cannot_be_scored_says_what_to_write() -> None:
    task = Plain([(X, X)], nn.Identity())
    task.metric = "within_50_cents"
    with pytest.raises(TaskError, match=r"how within_50_cents is scored: give the task `score\(outputs, targets\)`"):
        measure(OwnTask(task), nn.Identity(), "val")
    task.metric = "wer"
    with pytest.raises(TaskError, match=r"wer compares texts: give the task `texts\(output, target\)`"):
        measure(OwnTask(task), nn.Identity(), "val")


@pytest.mark.parametrize(("metric", "expected"), [("wer", 2 / 5), ("cer", 5 / 19)])
def test_errors_are_counted_in_the_texts_that_a_task_makes(metric: str, expected: float) -> None:
    pytest.importorskip("torchmetrics", reason="make test-all installs it")
    said, references = ["a cat sits", "no dog"], ["the cat sits", "one dog"]
    batch = torch.eye(2)
    task = Plain([(batch, batch)], nn.Identity())
    task.metric = metric
    task.texts = lambda output, target: (said, references)  # type: ignore[attr-defined]
    assert measure(OwnTask(task), nn.Identity(), "val").score == pytest.approx(expected, abs=1e-6)


@pytest.mark.skipif("torchmetrics" in sys.modules, reason="torchmetrics is there")
def test_a_metric_of_torchmetrics_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    monkeypatch.setitem(sys.modules, "torchmetrics.image", None)
    with pytest.raises(TaskError, match=r"mpsearch\[metrics\]"):
        scorer("t", METRICS["ssim"], None)


def test_a_score_out_of_its_bounds_is_refused() -> None:
    task = Plain([(X, X)], nn.Identity())
    task.metric = "perplexity"
    task.score = lambda output, target: torch.full((len(output),), -3.5)  # type: ignore[attr-defined]
    with pytest.raises(TaskError, match="perplexity lies from 1 to inf: return it as it is"):
        measure(OwnTask(task), nn.Identity(), "val")


def test_a_paired_interval_is_of_any_metric_with_values_by_sample() -> None:
    random = torch.Generator().manual_seed(0)
    theirs = 1 + torch.rand(400, generator=random)
    ours = theirs - 0.1 + 0.05 * torch.randn(400, generator=random)
    a, b = pack(ours.numpy()), pack(theirs.numpy())
    assert torch.equal(torch.from_numpy(unpack(a).copy()), ours)
    plain = paired([a], [b], METRICS["psnr"])
    assert plain.low < -0.1 < plain.high < 0
    assert plain.high - plain.low == pytest.approx(2 * 1.96 * 0.05 / 20, rel=0.15)
    exponential = paired([a], [b], METRICS["perplexity"])
    assert exponential.mean == pytest.approx(math.exp(ours.double().mean()) - math.exp(theirs.double().mean()))
    assert exponential.low < exponential.mean < exponential.high < 0


# ---------------------------------------------------------------------------------------------------- distillation


def test_outputs_are_compared_along_their_class_axis() -> None:
    random = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 5, 4, 3, generator=random)
    of = comparison("t", "segmentation")
    assert of is not None
    assert torch.equal(of.rows({"out": scores})[7], scores[0, :, 2, 1])
    steps = comparison("t", "language")
    assert steps is not None
    assert torch.equal(steps.rows(scores[:, :, :, 0])[6], scores[1, 1, :, 0])
    numbers = comparison("t", "regression")
    assert numbers is not None
    rows = numbers.rows(scores)
    assert numbers.divergence(rows + rows.std(correction=0), rows) == pytest.approx(1.0)
    assert comparison("t", "detection") is None


@pytest.mark.parametrize("own", [Denoising, Tokens, Masks], ids=lambda own: own.__name__)
def test_trials_of_any_kind_distil_towards_the_float_network(own: Any) -> None:
    task = OwnTask(own())
    workbench = Workbench(task, SETTINGS)
    names = [layer.name for layer in workbench.layers if layer.reason is None]
    workbench.reset(PrecisionConfig.uniform(names, LayerPrecision.shorthand("w2a4")))
    before = workbench.score("val").divergence
    workbench.fit(60, seed=0, lr=0.005)
    workbench.reestimate(0)
    after = workbench.score("val").divergence
    assert before is not None
    assert after is not None
    assert after < 0.85 * before


def test_an_output_of_no_known_kind_is_refused_before_any_trial() -> None:
    task = Plain([(torch.rand(16, 1, 6, 6), torch.rand(16, 1, 6, 6))], nn.Sequential(nn.Conv2d(1, 1, 3, padding=1)))
    task.metric = Metric("own", "minimize", per_sample=True)
    task.score = lambda output, target: (output - target).abs().mean(dim=(1, 2, 3))  # type: ignore[attr-defined]
    with pytest.raises(TaskError, match=r"shape \(1, 1, 6, 6\).*`kind` \(classification, .*`distill_loss\(student"):
        Workbench(OwnTask(task), SETTINGS)
    assert Workbench(OwnTask(task), SETTINGS.model_copy(update={"distill": False})).score("val").divergence is None
    seen = []
    task.distill_loss = lambda s, t: seen.append(t.requires_grad) or F.l1_loss(s, t)  # type: ignore[attr-defined]
    workbench = Workbench(OwnTask(task), SETTINGS)
    workbench.fit(2, seed=0)
    assert seen == [False, False]
    task.kind = "regresion"  # type: ignore[attr-defined]
    with pytest.raises(TaskError, match="unknown kind 'regresion': did you mean 'regression'"):
        OwnTask(task)


# -------------------------------------------------------------------------------------------------- the float model


def test_the_float_network_is_trained_once_and_kept_by_content(cache: Path) -> None:
    class Counted(Masks):
        trained = 0

        def train(self, model: nn.Module) -> None:
            assert model.training
            assert torch.is_grad_enabled()
            type(self).trained += 1
            super().train(model)

    with torch.no_grad():
        first = OwnTask(Counted(), ("a",)).float_model()
    again = OwnTask(Counted(), ("a",)).float_model()
    assert Counted.trained == 1
    assert not again.training
    assert all(map(torch.equal, first.state_dict().values(), again.state_dict().values()))
    OwnTask(Counted(), ("b",)).float_model()  # other arguments
    assert Counted.trained == 2


def test_what_a_task_lacks_or_raises_is_told() -> None:
    with pytest.raises(TaskError, match=r"_Bare, which has no float_model, loss, metric: mpsearch.task.own lists"):
        load_task(TaskSpec(factory=f"{__name__}:bare"))
    task = Plain([(X, Y)])
    task.loss = lambda output, target: output  # type: ignore[method-assign]
    with pytest.raises(TaskError, match=r"`loss` gave the shape \(10, 3\), expected a tensor of one number"):
        OwnTask(task).loss(X, Y)
    with pytest.raises(TaskError, match=r"`loss` raised RuntimeError: .*test_own.py|functional.py, line"):
        OwnTask(Plain([(X, Y)])).loss(X, "no tensor")
    task.float_model = lambda: "net"  # type: ignore[method-assign,return-value,assignment]
    with pytest.raises(TaskError, match=r"float_model\(\) gave a str, expected a torch Module"):
        OwnTask(task).float_model()


class _Bare:
    def batches(self, split: str) -> list[Any]:
        return []


def bare() -> _Bare:
    return _Bare()


# ------------------------------------------------------------------------------------------------------- detection

DETECTION = """
name: boxes
task: {factory: "own_tasks:boxes"}
space: uniform
warm_start: {method: none}
search: {trials: 1, concurrency: 1, sampler: none}
trial: {steps: 2, batch_size: 2, compile: false, bn_batches: 1}
engine: {address: none}
"""


@pytest.mark.slow
def test_a_detector_of_torchvision_is_checked_and_searched(tmp_path: Path) -> None:
    """B11: nothing asks it for logits, nor for 256 samples."""
    (tmp_path / "study.yaml").write_text(DETECTION)
    done = mpsearch("check", "study.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Maximize overlap on the validation split" in done.stdout
    done = mpsearch("run", "study.yaml", "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (line,) = (tmp_path / "run" / "trials.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["state"] == "complete"
    assert record["divergence"] is None
    assert 0 < record["score"] == pytest.approx(unpack(record["values"]).mean(), abs=1e-6)


def test_a_detector_trains_with_its_own_loss_and_takes_as_many_samples_as_there_are() -> None:
    task = OwnTask(Boxes())
    images, targets = task.calibration_input(256)
    assert len(images) == len(targets) == 8
    workbench = Workbench(task, TrialSpec(steps=1, batch_size=2, compile=False))
    loss = workbench.loss(0)(0, None, {"box": torch.tensor(2.0), "label": torch.tensor(3.0)}, None)
    assert loss == 5.0


def test_root_mean_square_is_over_all_numbers() -> None:
    score = scorer("t", METRICS["rmse"], None)
    score.add(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]]), 1)
    score.add(torch.tensor([[0.0, 0.0], [4.0, 0.0]]), torch.zeros(2, 2), 2)
    assert score.result() == (pytest.approx(math.sqrt((4 + 16) / 6)), None)
