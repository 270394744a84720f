"""Image classification: cross-entropy, top-1 or top-5, and a float model from a checkpoint or trained here, once."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpsearch.cache import content_key
from mpsearch.errors import TaskError
from mpsearch.files import sha256
from mpsearch.metric import Metric, find_metric
from mpsearch.shipped import shipped
from mpsearch.state_dict import load_tensors
from mpsearch.study import TaskSpec
from mpsearch.task.cache import cached_tensors
from mpsearch.task.checkpoint import load_checkpoint
from mpsearch.task.images import Images, SampledImages, StoredImages
from mpsearch.task.libraries import Needs
from mpsearch.task.models import build_network, model_name
from mpsearch.task.scores import named_metric, scorer
from mpsearch.task.task import Answers, Batch, Measured, Split
from mpsearch.task.training import FLOAT_BATCH, has_batch_norm, progress, saying, train_adamw
from mpsearch.train import FitSettings, fit, threads, usual_device

logger = logging.getLogger(__name__)

EVAL_BATCH = 250
EVAL_PIXELS = EVAL_BATCH * 64 * 64  # larger images come in smaller batches, so that memory stays bounded

# How a float model is trained where no checkpoint is given.
FLOAT_RECIPE = 2  # raise when `fit` or a forward of ours changes: cached models are trained again
FLOAT_LR = 0.1
FLOAT_WEIGHT_DECAY = 5e-4
FLOAT_SEED = 0
SMALL_PIXELS = 16 * 16


class ClassificationTask:
    """A Task for labelled images: top1, top5, or another metric of logits and labels."""

    def __init__(self, spec: TaskSpec, images: Images) -> None:
        """Build the network, read its checkpoint and run one image through it; nothing is trained yet.

        Raises:
            TaskError: model, checkpoint and data do not fit together.
        """
        self.name = f"{model_name(spec.model)}/{images.name}"
        self.metric: str | Metric
        self.metric, self._score = named_metric(spec.metric or "top1", "task.metric")
        self.images = images
        self._spec = spec
        self._classes = spec.num_classes or images.num_classes
        self._top = {"top1": 1, "top5": 5}.get(self.metric.name) if self._score is None else None
        scorer(self.name, self.metric, self._score)  # that nothing computes it is said before anything is trained
        if self._classes < images.num_classes:
            raise TaskError(
                f"task.num_classes: got {self._classes}, the data has {images.num_classes} classes: leave it out, "
                "or give as many"
            )
        if self._top is not None and self._top >= images.num_classes:
            raise TaskError(f"task.metric: top5 of {images.num_classes} classes is always 100 %: write top1")
        with _seeded(FLOAT_SEED):
            channels, *size = images.input_shape
            needs = Needs("classification", self._classes, channels, (size[0], size[1]))
            network = build_network(spec, needs)
        self._model = network.module.eval()
        self._check_output()
        self._trained = network.weights is not None
        self.float_model_source = network.weights or "not trained yet"
        if spec.checkpoint is not None:
            path = shipped("checkpoints", spec.checkpoint, TaskError)
            where = load_checkpoint(self._model, path)
            self._trained = True
            self.float_model_source = f"checkpoint {spec.checkpoint}{where and f', {where}'}, sha256 {sha256(path)}"

    def float_model(self) -> nn.Module:
        """A fresh copy of the trained float network, in eval mode, on the CPU; the first call may train it.

        Raises:
            TaskError: the training diverged.
        """
        if not self._trained:
            self._train_once()
        return copy.deepcopy(self._model)

    def load_float_model(self, weights: Mapping[str, Tensor]) -> None:
        """Make these the weights of `float_model()`: nothing is trained. Raises RuntimeError: they are another's."""
        load_tensors(self._model, weights)
        self._trained = True
        self.float_model_source = "weights that came with the study"

    def sampled(self, samples: int) -> ClassificationTask:
        """This task with at most `samples` images of val: for what is scored many times over."""
        task = copy.copy(self)
        task.images = SampledImages(self.images, "val", samples)
        return task

    def on_device(self, device: torch.device) -> ClassificationTask:
        """This task with batches that are made on a device, where the images are in memory and it has room for them."""
        images = self.images.on_device(device) if isinstance(self.images, StoredImages) else self.images
        if images is self.images:
            return self
        task = copy.copy(self)
        task.images = images
        return task

    def train_batches(self, batch_size: int, steps: int, seed: int) -> Iterator[Batch]:
        """`steps` augmented batches: `(n, c, h, w)` float32 and labels `(n,)`; the same `seed`, the same batches."""
        return self.images.train_batches(batch_size, steps, seed)

    def calibration_input(self, samples: int, seed: int = 0) -> Tensor:
        """`(samples, c, h, w)` training images, not augmented; all of them where there are fewer."""
        return self.images.calibration_input(samples, seed)

    def evaluate(self, model: nn.Module, split: Split) -> float:
        """The score of a model on a split; NaN where the model answers NaN."""
        return self.measure(model, split).score

    def measure(self, model: nn.Module, split: Split) -> Measured:
        """The score, its values by image (of top1 and top5, whether each is right), and the logits."""
        answers = self.answers(model, split)
        if self._top is not None or bool(answers.logits.isnan().any()):
            return Measured(answers.accuracy, answers.correct, answers.logits)
        scores = scorer(self.name, find_metric(self.metric), self._score)
        scores.add(answers.logits, answers.labels, len(answers.labels))
        return Measured(*scores.result(), answers.logits)

    @torch.inference_mode()
    def answers(self, model: nn.Module, split: Split) -> Answers:
        """The logits and labels of every image of a split, and whether each is right, as the metric has it.

        Runs in eval mode on the model's device, under whatever autocast the caller set, and leaves the mode as it was.
        """
        height, width = self.images.input_shape[1:]
        batch_size = max(1, min(EVAL_BATCH, EVAL_PIXELS // (height * width)))
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        in_training = [module for module in model.modules() if module.training]
        model.eval()
        said, correct, true = [], [], []
        for x, labels in self.images.batches(split, batch_size):
            logits = self.logits(model(x.to(device))).float()
            if labels.min() < 0 or labels.max() >= logits.shape[1]:
                raise TaskError(
                    f"the labels of {split} go from {int(labels.min())} to {int(labels.max())}, and the model answers "
                    f"{logits.shape[1]} classes, 0 to {logits.shape[1] - 1}: number the classes from 0, or change the "
                    "model"
                )
            first = logits.topk(self._top or 1).indices
            said.append(logits)
            true.append(labels)
            correct.append((first == labels.to(device).unsqueeze(1)).any(dim=1))
        for module in in_training:
            module.training = True
        return Answers(torch.cat(said).cpu(), torch.cat(correct).cpu(), torch.cat(true).cpu())

    def loss(self, output: Any, target: Tensor) -> Tensor:
        """The mean cross-entropy of a batch."""
        return F.cross_entropy(self.logits(output), target)

    def logits(self, output: Any) -> Tensor:
        """`(n, classes)`: the output, or the `logits` of an output that has more (as Inception's in training)."""
        return cast(Tensor, getattr(output, "logits", output))

    def steps_per_epoch(self, batch_size: int) -> int:
        """How many batches make one pass over the training data."""
        return -(-self.images.size("train") // batch_size)

    def warnings(self) -> list[str]:
        """What about the data looks wrong, in words: images that are in two splits."""
        if not isinstance(self.images, StoredImages):
            return []
        return [
            f"{count} of the {self.images.size(other)} images of {other} are in {one} too, pixel for pixel: "
            f"what is measured on {other} is better than on images that the network has not seen; take them out"
            for (one, other), count in self.images.overlaps().items()
        ]

    def _check_output(self) -> None:
        shape = self.images.input_shape
        model, data = f"model '{self._spec.model}'", f"data '{self.images.name}'"
        try:
            with torch.inference_mode():
                output = self._model(torch.zeros(1, *shape))
        except Exception as error:
            said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise TaskError(
                f"{model} cannot take the images of {data}, (channels, height, width) {shape}: {said}; choose a model "
                "for such images, or set task.data.image_size"
            ) from error
        actual = tuple(getattr(getattr(output, "logits", output), "shape", ()))
        if actual != (1, self._classes):
            raise TaskError(
                f"{model} answers one image with {actual or type(output).__name__}, expected (1, {self._classes}) for "
                f"the {self.images.num_classes} classes of {data}: change the model's or set task.num_classes"
            )

    def _float_threads(self) -> int:
        """One where layers are too small to share (several threads then mostly wait for each other), else as set."""
        height, width = self.images.input_shape[1:]
        return 1 if height * width <= SMALL_PIXELS else torch.get_num_threads()

    def _train_once(self) -> None:
        facts = self._spec.model_dump(mode="json", include={"model", "num_classes", "model_args", "float_epochs"})
        shapes = {name: list(value.shape) for name, value in self._model.state_dict().items()}
        recipe = FLOAT_RECIPE if has_batch_norm(self._model) else f"adamw {FLOAT_RECIPE}"
        key = content_key(recipe, facts, shapes, self.images.key)
        seconds: list[float] = []

        def train() -> dict[str, Tensor]:
            began = time.perf_counter()
            progress.info("no checkpoint is given: training %s for %d epochs", self.name, self._spec.float_epochs)
            state = self._train_float_model()
            seconds.append(time.perf_counter() - began)
            return state

        state, path = cached_tensors(f"float-{key}", train)
        self._model.load_state_dict(state)
        self._trained = True
        how = f"trained here in {seconds[0]:.1f} s, cached as {path}" if seconds else f"trained here before: {path}"
        self.float_model_source = how
        logger.info("float model %s: %s", self.name, how)

    def _train_float_model(self) -> dict[str, Tensor]:
        """Train from the seeded start; the same spec gives the same weights."""
        model = copy.deepcopy(self._model).to(usual_device())
        if math.prod(self.images.input_shape[1:]) > SMALL_PIXELS:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # depthwise convolutions: 1.7 times as fast
        steps = self._spec.float_epochs * self.steps_per_epoch(FLOAT_BATCH)
        batches = self.train_batches(FLOAT_BATCH, steps, FLOAT_SEED)
        with torch.inference_mode(False), _seeded(FLOAT_SEED), threads(self._float_threads()):
            try:
                if has_batch_norm(model):
                    settings = FitSettings(steps, FLOAT_LR, FLOAT_WEIGHT_DECAY)
                    fit(model, batches, lambda _step, _x, output, y: self.loss(output, y), settings, saying(steps))
                else:
                    train_adamw(model, batches, self.loss, steps, saying(steps))
            except FloatingPointError as error:
                raise TaskError(
                    f"the float model of {self.name} diverged, {error}: check the images and task.data.mean and std, "
                    "or give a task.checkpoint"
                ) from None
        return {name: value.cpu().clone() for name, value in model.state_dict().items()}


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torch's global random source set to `seed` inside, and afterwards as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
