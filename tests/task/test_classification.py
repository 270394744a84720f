"""The classification task: scores, the contract of Task, and the float model that is trained where none is given."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mpsearch.errors import TaskError
from mpsearch.files import sha256
from mpsearch.metric import METRICS, Metric
from mpsearch.shipped import shipped
from mpsearch.study import DataSpec, TaskSpec, load_study
from mpsearch.task import ClassificationTask, Task, load_task, training
from mpsearch.task.images import Normalization, StoredImages

pytestmark = pytest.mark.study

DIGITS = DataSpec(kind="digits", val_fraction=0.2, test_fraction=0.2)


def digits_task(**keys: object) -> ClassificationTask:
    task = load_task(TaskSpec(**({"model": "digits_cnn", "data": DIGITS, "float_epochs": 2} | keys)))
    assert isinstance(task, ClassificationTask)
    return task


class Answers(nn.Module):
    """Ranks the classes by the image's first pixels: the answer that the test wants is in the image."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0, 0, :7]


def task_of_known_answers(metric: str, ranks: list[list[int]]) -> ClassificationTask:
    """Image i holds scores with classes in the order `ranks[i]`; its label is 0."""
    pixels = torch.zeros(len(ranks), 1, 8, 8)
    for image, order in zip(pixels, ranks, strict=True):
        image[0, 0, order] = torch.arange(len(order), 0, -1.0)
    labels = torch.zeros(len(ranks), dtype=torch.int64)
    everything = torch.arange(len(ranks))
    splits = {"train": everything, "val": everything, "test": everything[:1]}
    images = StoredImages("made", "key", pixels, labels, splits, Normalization((0.0,), (1.0,), white=1.0), 7)
    return ClassificationTask(TaskSpec(model="digits_cnn", data=DIGITS, metric=metric), images)


RANKS = [[0, 1, 2, 3, 4, 5, 6], [1, 0, 2, 3, 4, 5, 6], [1, 2, 3, 4, 0, 5, 6], [1, 2, 3, 4, 5, 0, 6]]


@pytest.mark.parametrize(("metric", "share"), [("top1", 1 / 4), ("top5", 3 / 4)])
def test_the_metric_is_the_share_of_labels_among_the_first_answers(metric: str, share: float):
    task = task_of_known_answers(metric, RANKS)
    assert task.metric == METRICS[metric]
    assert task.evaluate(Answers(), "val") == share
    assert task.evaluate(Answers(), "test") == 1.0


def test_another_metric_is_computed_of_logits_and_labels():
    pytest.importorskip("torchmetrics")
    f1 = task_of_known_answers("f1", RANKS).measure(Answers(), "val")
    # Of label 0 one of four is answered: precision 1, recall 1/4; of class 1, which no image is, three answers.
    assert f1.score == pytest.approx((0.4 + 0.0) / 2)
    assert f1.values is None
    assert f1.rows is not None


def test_a_metric_of_ones_own_is_named_as_module_and_function():
    task = task_of_known_answers("own_tasks:rank_of_label", RANKS)
    assert task.metric == Metric("rank", "minimize", unit="places", bounds=(1.0, math.inf), per_sample=True)
    measured = task.measure(Answers(), "val")
    assert measured.score == (1 + 2 + 5 + 6) / 4
    assert measured.values is not None
    assert measured.values.tolist() == [1, 2, 5, 6]
    with pytest.raises(TaskError, match=r"task.metric: own_tasks:nothing returned a \w+, expected an object with"):
        task_of_known_answers("own_tasks:nothing", RANKS)


def test_a_sampled_task_scores_fewer_images_of_val_and_leaves_the_task_whole():
    task = task_of_known_answers("top1", RANKS)
    assert task.sampled(2).evaluate(Answers(), "val") == 1 / 2  # images 0 and 2
    assert task.evaluate(Answers(), "val") == 1 / 4


def test_a_model_that_answers_nan_scores_nan():
    task = task_of_known_answers("top1", RANKS)
    assert math.isnan(task.evaluate(nn.Sequential(Answers(), nn.Threshold(1.5, math.nan)), "val"))


def test_a_label_that_no_answer_stands_for_is_refused_instead_of_counted_as_wrong():
    task = task_of_known_answers("top1", RANKS)
    task.images._labels = task.images._labels + 7
    with pytest.raises(TaskError, match=r"labels of val go from 7 .* answers 7 classes, 0 to 6: number the classes"):
        task.evaluate(Answers(), "val")


def test_a_task_warns_of_images_in_two_splits():
    task = task_of_known_answers("top1", RANKS)
    task.images._splits = dict.fromkeys(("train", "val", "test"), torch.tensor([0]))
    warnings = task.warnings()
    assert len(warnings) == 3
    assert warnings[0].startswith("1 of the 1 images of val are in train too, pixel for pixel")
    assert digits_task().warnings() == []


def test_evaluation_runs_in_eval_mode_without_gradients_and_leaves_modes_as_they_were():
    seen = []

    class Watched(Answers):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((self.training, torch.is_grad_enabled()))
            return super().forward(x)

    model = nn.Sequential(nn.Identity().eval(), Watched())
    model[1].train()
    task_of_known_answers("top1", RANKS).evaluate(model, "val")
    assert seen == [(False, False)]
    assert [m.training for m in model] == [False, True]


def test_evaluation_honours_autocast():
    seen = []

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 7)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x.flatten(1))
            seen.append(y.dtype)
            return y

    task, model = task_of_known_answers("top1", RANKS), Watched()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        task.evaluate(model, "val")
    task.evaluate(model, "val")
    assert seen == [torch.bfloat16, torch.float32]


def test_the_digits_task_is_a_task_and_loading_it_trains_nothing(cache: Path):
    task = digits_task()
    assert isinstance(task, Task)
    assert task.name == "digits_cnn/digits"
    assert task.float_model_source == "not trained yet"
    assert task.steps_per_epoch(64) == math.ceil(1079 / 64)
    assert task.calibration_input(10).shape == (10, 1, 8, 8)
    assert not list(cache.glob("float-*"))


def test_a_long_training_says_how_far_it_is(
    cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    caplog.set_level(logging.INFO, "mpsearch.progress")

    def said() -> list[str]:
        return [record.message for record in caplog.records if record.name == "mpsearch.progress"]

    digits_task(float_epochs=1).float_model()
    assert said() == ["no checkpoint is given: training digits_cnn/digits for 1 epochs"]
    monkeypatch.setattr(training, "SAY_EVERY_S", 0.0)
    digits_task(float_epochs=2).float_model()
    assert re.fullmatch(r"step 34 of 34, loss \d+\.\d{3}, 0 s left", said()[-1])


def test_the_float_model_is_trained_once_kept_and_reported(cache: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "mpsearch")
    task = digits_task(float_epochs=4)
    model = task.float_model()
    assert task.evaluate(model, "val") > 0.85
    assert not model.training
    assert "trained here in" in task.float_model_source
    (kept,) = cache.glob("float-*.safetensors")
    assert str(kept) in task.float_model_source
    assert task.float_model_source in caplog.text

    again = digits_task(float_epochs=4)
    assert_same_weights(again.float_model(), model)
    assert "trained here before" in again.float_model_source


def test_training_repeats_bit_for_bit_and_leaves_the_random_source_and_threads_alone(
    cache: Path, monkeypatch: pytest.MonkeyPatch
):
    torch.set_num_threads(2)
    before = torch.random.get_rng_state()
    one = digits_task().float_model()
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.get_num_threads() == 2
    (kept,) = cache.glob("float-*.safetensors")
    kept.unlink()
    torch.manual_seed(99)
    torch.set_num_threads(1)
    assert_same_weights(digits_task().float_model(), one)


def test_the_digits_study_starts_from_the_network_that_ships(cache: Path, monkeypatch: pytest.MonkeyPatch):
    """The accuracies that README names, but for one image, whose logits another processor may sum the other way."""
    monkeypatch.chdir(cache)
    before = set(cache.glob("float-*"))
    task = load_task(load_study("digits").task)
    model = task.float_model()
    assert set(cache.glob("float-*")) == before  # nothing is trained
    assert task.evaluate(model, "val") == pytest.approx(354 / 359, abs=1.1 / 359)
    assert task.evaluate(model, "test") == pytest.approx(356 / 359, abs=1.1 / 359)
    file = shipped("checkpoints", "digits_cnn", TaskError)
    assert file.stat().st_size < 100_000
    assert task.float_model_source == f"checkpoint digits_cnn, sha256 {sha256(file)}"


def test_another_split_or_length_of_training_is_another_float_model(cache: Path):
    for keys in ({}, {"float_epochs": 1}, {"data": DataSpec(kind="digits")}):
        digits_task(**keys).float_model()
    assert len(list(cache.glob("float-*.safetensors"))) == 3


def test_each_float_model_is_a_copy():
    task = digits_task(float_epochs=1)
    with torch.no_grad():
        for parameter in task.float_model().parameters():
            parameter.zero_()
    assert any(p.any() for p in task.float_model().parameters())


def test_a_checkpoint_is_used_and_named(tmp_path: Path, cache: Path):
    path = tmp_path / "digits.pt"
    source = digits_task(float_epochs=1).float_model()
    torch.save(source.state_dict(), path)
    for kept in cache.glob("float-*"):
        kept.unlink()
    task = digits_task(checkpoint=str(path))
    assert_same_weights(task.float_model(), source)
    assert task.float_model_source.startswith(f"checkpoint {path}, sha256 ")
    assert not list(cache.glob("float-*"))


def test_a_training_that_diverges_says_so_and_keeps_nothing(cache: Path):
    pixels = torch.full((20, 1, 8, 8), math.nan)
    splits = {"train": torch.arange(20), "val": torch.arange(20), "test": torch.arange(20)}
    images = StoredImages("made", "k", pixels, torch.arange(20) % 2, splits, Normalization((0.0,), (1.0,)), 2)
    task = ClassificationTask(TaskSpec(model="digits_cnn", data=DIGITS), images)
    with pytest.raises(TaskError, match=r"the float model of digits_cnn/made diverged, .*nan at step 0"):
        task.float_model()
    assert not list(cache.glob("float-*.safetensors"))


def test_a_checkpoint_of_another_number_of_classes_is_refused(tmp_path: Path):
    from mpsearch.task.networks import DigitsCNN

    torch.save(DigitsCNN(num_classes=12).state_dict(), tmp_path / "a.pt")
    with pytest.raises(TaskError, match=r"linear\.weight: \(12, 32\) instead of \(10, 32\).*number of classes"):
        digits_task(checkpoint=str(tmp_path / "a.pt"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_classes": 5}, r"task\.num_classes: got 5, the data has 10 classes"),
        ({"model": "resnet18"}, r"model 'resnet18' cannot take the images of data 'digits'.*\(1, 8, 8\)"),
        ({"model": "torch.nn:Flatten"}, r"answers one image with \(1, 64\), expected \(1, 10\) for the 10 classes"),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_refused_before_anything_is_trained(
    keys: dict[str, object], message: str
):
    with pytest.raises(TaskError, match=message):
        digits_task(**keys)


def test_a_model_may_have_more_classes_than_the_data():
    assert digits_task(num_classes=12).float_model()(torch.zeros(1, 1, 8, 8)).shape == (1, 12)


def test_the_loss_is_the_cross_entropy_of_the_logits():
    class Output:
        logits = torch.tensor([[0.0, math.log(3)]])

    task = digits_task()
    assert task.loss(Output(), torch.tensor([1])).item() == pytest.approx(-math.log(3 / 4))
    assert torch.equal(task.logits(Output()), Output.logits)


class _Half:
    name, metric = "mine", "psnr"

    def float_model(self) -> nn.Module:
        return nn.Identity()

    def evaluate(self, model: nn.Module, split: str) -> float:
        return 0.0


def half(**_: object) -> object:
    return _Half()


def whole(epochs: int) -> Task:
    return digits_task(float_epochs=epochs)


def test_a_task_of_ones_own_comes_from_its_function():
    task = load_task(TaskSpec(factory=f"{__name__}:whole", args={"epochs": 7}))
    assert isinstance(task, ClassificationTask)


def test_a_task_that_lacks_methods_is_told_which():
    with pytest.raises(TaskError, match="_Half, which has no train_batches, calibration_input, loss, steps_per_epoch"):
        load_task(TaskSpec(factory=f"{__name__}:half"))


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def test_a_float_network_of_large_images_is_trained_and_kept(make_folder: Callable[..., Path], cache: Path):
    """It is trained with images that lie channels last, a layout in which safetensors keeps nothing."""
    data = DataSpec(kind="imagefolder", root=str(make_folder(size=(20, 20))))
    spec = TaskSpec(model="cifar_resnet20", data=data, float_epochs=1)
    trained = load_task(spec).float_model().state_dict()
    (kept,) = cache.glob("float-*.safetensors")
    again = load_task(spec)
    assert all(torch.equal(value, trained[name]) for name, value in again.float_model().state_dict().items())
    assert again.float_model_source == f"trained here before: {kept}"
