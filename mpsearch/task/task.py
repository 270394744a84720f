"""Task: what is being compressed. A float model, batches to train on, a way to score, a loss.

The search knows nothing else about a problem. Whoever brings a problem of their own writes less than this: an object
with `float_model`, `batches`, `loss` and `score`, of which `mpsearch.task.own` makes a Task.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mpsearch.metric import Metric
from mpsearch.task.comparing import Comparison

Split = Literal["train", "val", "test"]
Batch = tuple[Any, Any]  # model input, target


@dataclass(frozen=True, slots=True)
class Measured:
    """How a model does on a split; tensors are in the split's order, on the CPU."""

    score: float
    values: Tensor | None = None  # (n,) bool or float32, by sample or block; the score is `Metric.score_of` their mean
    rows: Tensor | None = None  # (m, k) float32: what the task's comparison compares; None where nothing is compared


@dataclass(frozen=True, slots=True)
class Answers:
    """What a classifier says to each sample of a split, in the split's order; on the CPU."""

    logits: torch.Tensor  # (n, classes) float32
    correct: torch.Tensor  # (n,) bool
    labels: torch.Tensor  # (n,) int64

    @property
    def accuracy(self) -> float:
        """The share of correct answers; NaN where a logit is."""
        return float("nan") if bool(self.logits.isnan().any()) else int(self.correct.sum()) / len(self.correct)


@runtime_checkable
class Measuring(Protocol):
    """A task that can also say how each sample fared, so that two configs are compared on the same samples."""

    def measure(self, model: nn.Module, split: Split) -> Measured:
        """How `model` (called in eval mode, without gradients) does on a split."""
        ...


@runtime_checkable
class Compared(Protocol):
    """A task that says how two networks' outputs are compared; of another one, `logits` are."""

    @property
    def comparison(self) -> Comparison:
        """How outputs are compared."""
        ...


@runtime_checkable
class Sampling(Protocol):
    """A task that can be scored on fewer samples of val, where an estimate will do."""

    def sampled(self, samples: int) -> Task:
        """This task with at most `samples` samples of val."""
        ...


@runtime_checkable
class Loadable(Protocol):
    """A task whose float network can be given its weights, instead of reading or training them."""

    def load_float_model(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Make these the weights of `float_model()`. Raises RuntimeError: they are another network's."""
        ...


@runtime_checkable
class Movable(Protocol):
    """A task whose data can lie on the device where it is used."""

    def on_device(self, device: torch.device) -> Task:
        """This task with batches on a device if it has room for them; calibration input is on the CPU all the same."""
        ...


@runtime_checkable
class Warns(Protocol):
    """A task that can say what about its data looks wrong."""

    def warnings(self) -> list[str]:
        """What looks wrong and what to do, in words."""
        ...


@runtime_checkable
class Task(Protocol):
    """A trained network with its data and metric.

    `name` identifies model and data in records and exports; `metric` says what `evaluate` returns: the name of a common
    metric (`mpsearch.metric.METRICS`), or a `Metric`. A task whose outputs are `(n, classes)`, or hold such a tensor,
    may say so by a method `logits(output)`; others are `Compared`.
    """

    name: str
    metric: str | Metric

    def float_model(self) -> nn.Module:
        """A fresh copy of the trained float network, in eval mode, on the CPU."""
        ...

    def train_batches(self, batch_size: int, steps: int, seed: int) -> Iterator[Batch]:
        """`steps` batches of training data, augmented; the same `seed` gives the same batches."""
        ...

    def calibration_input(self, samples: int, seed: int = 0) -> Any:
        """Model input made of `samples` training samples, not augmented: for range setting and shape inference."""
        ...

    def evaluate(self, model: nn.Module, split: Split) -> float:
        """The score of `model` (called in eval mode, without gradients) on a split."""
        ...

    def loss(self, output: Any, target: Any) -> torch.Tensor:
        """The scalar training loss of a batch, used where a study does not distil."""
        ...

    def steps_per_epoch(self, batch_size: int) -> int:
        """How many batches make one pass over the training data."""
        ...
