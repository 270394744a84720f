"""What makes a score of outputs and targets, batch by batch: a task's own `score`, or a common metric's.

Values by sample are what two configs are compared by. Metrics that are no mean over samples are accumulated: MeanIoU
here, mAP in `box_scores`, others by torchmetrics, which is imported where one is asked for (the extra `metrics`). What
is accumulated has values by block of samples (`jackknife`), if its states can be merged.
"""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from mpsearch.errors import TaskError
from mpsearch.metric import Metric, find_metric
from mpsearch.task.box_scores import MeanAveragePrecision
from mpsearch.task.comparing import output_tensor
from mpsearch.task.factory import call_factory
from mpsearch.task.jackknife import Blocks

PerSample = Callable[[Any, Any], Any]  # (output, target) -> (n,) values, or their mean as one number


class Scorer(Protocol):
    """Takes in batches, then gives the score."""

    def add(self, output: Any, target: Any, count: int) -> None:
        """Take in a batch of `count` samples."""
        ...

    def result(self) -> tuple[float, Tensor | None]:
        """The score, and the values by sample or block of samples where there are any: `(n,)` bool or float32, CPU."""
        ...


class Mean:
    """The mean of values by sample, or of batches, weighed by their samples, where only their means are given."""

    def __init__(self, name: str, metric: Metric, values: PerSample) -> None:
        self._name, self._metric, self._function = name, metric, values
        self._values: list[Tensor] = []
        self._sums: list[tuple[float, int]] = []

    def add(self, output: Any, target: Any, count: int) -> None:
        """As `Scorer.add`."""
        values = torch.as_tensor(self._function(output, target)).detach()
        if values.dim() == 0:
            self._sums.append((float(values), count))
        elif values.shape == (count,):
            self._values.append(values.cpu() if values.dtype == torch.bool else values.float().cpu())
        else:
            raise TaskError(
                f"{self._name}: `score` gave the shape {tuple(values.shape)} for a batch of {count} samples: return "
                f"one number for each sample ({count},), their mean, or have an object with `update` and `compute`"
            )

    def result(self) -> tuple[float, Tensor | None]:
        """As `Scorer.result`."""
        if self._sums or not self._values:
            total = sum(mean * count for mean, count in self._sums) + sum(float(v.sum()) for v in self._values)
            samples = sum(count for _, count in self._sums) + sum(len(v) for v in self._values)
            return self._metric.score_of(total / max(1, samples)), None
        values = torch.cat(self._values)
        return self._metric.score_of(float(values.double().mean())), values


class Accumulated:
    """An object with `update(output, target)`, `compute()` and perhaps `reset()`, as those of torchmetrics.

    One that also has `merge_state(other)` gives values by block of samples; so does one that has
    `sample_values()`.
    """

    def __init__(self, metric: Metric, accumulator: Any, prepare: Callable[[Any], Any] = lambda output: output) -> None:
        if hasattr(accumulator, "reset"):
            accumulator.reset()
        self._metric, self._accumulator, self._prepare = metric, accumulator, prepare
        fresh = copy.deepcopy(accumulator) if _merges(accumulator) else None
        self._blocks = None if fresh is None else Blocks(lambda: self._here(copy.deepcopy(fresh)))
        self._device: torch.device | None = None

    def add(self, output: Any, target: Any, count: int) -> None:
        """As `Scorer.add`."""
        first = output if isinstance(output, Tensor) else target if isinstance(target, Tensor) else None
        if first is not None and self._device != first.device:
            self._device = first.device
            self._accumulator = self._here(self._accumulator)
        output = self._prepare(output)
        self._accumulator.update(output, target)
        if self._blocks is not None:
            for part in _parts(output, target, count):
                self._blocks.add(*part)

    def result(self) -> tuple[float, Tensor | None]:
        """As `Scorer.result`; of a mapping of several, the one that has the metric's name."""
        score = self._score(self._accumulator)
        if hasattr(self._accumulator, "sample_values"):
            return score, self._accumulator.sample_values()
        return score, None if self._blocks is None else self._blocks.values(score, self._score)

    def _score(self, accumulator: Any) -> float:
        value = accumulator.compute()
        if isinstance(value, Mapping):
            value = value[{"map50": "map_50"}.get(self._metric.name, self._metric.name)]  # as torchmetrics calls it
        return float(value)

    def _here(self, accumulator: Any) -> Any:
        """An accumulator on the device of the batches."""
        return accumulator if self._device is None or not hasattr(accumulator, "to") else accumulator.to(self._device)


def _merges(accumulator: Any) -> bool:
    """Whether two of them can be merged; torchmetrics has the method in all, and refuses it in some."""
    refuses = getattr(accumulator, "full_state_update", False) is not False
    return hasattr(accumulator, "merge_state") and not refuses and not getattr(accumulator, "dist_sync_on_step", False)


PARTS = 32
"""Blocks of a batch at most."""


def _parts(output: Any, target: Any, count: int) -> Iterator[tuple[Any, Any]]:
    """A batch in blocks of samples; whole where it is not known which part of it is of a sample."""
    if not all(isinstance(side, Tensor | list) and len(side) == count for side in (output, target)):
        yield output, target
        return
    size = math.ceil(count / PARTS)
    for start in range(0, count, size):
        yield output[start : start + size], target[start : start + size]


class MeanIoU:
    """The mean over classes of intersection over union; targets that are no class (255, say) are ignored."""

    def __init__(self) -> None:
        self._counts: Tensor | None = None  # (classes, classes): target, answer

    def update(self, output: Tensor, target: Tensor) -> None:
        """Take in logits `(n, classes, ...)` and labels `(n, ...)`, which may be finer; see `resized`."""
        output = resized(output, target)
        classes = output.shape[1]
        told, labels = output.argmax(dim=1).flatten(), target.flatten().long()
        valid = (labels >= 0) & (labels < classes)
        counts = torch.bincount(classes * labels[valid] + told[valid], minlength=classes**2).reshape(classes, classes)
        self._counts = counts if self._counts is None else self._counts + counts

    def merge_state(self, other: MeanIoU) -> None:
        """Take in what another one has seen."""
        if other._counts is not None:
            self._counts = other._counts if self._counts is None else self._counts + other._counts

    def compute(self) -> float:
        """The mean over the classes that occur in targets or answers."""
        assert self._counts is not None
        counts = self._counts.double()
        union = counts.sum(0) + counts.sum(1) - counts.diagonal()
        return float((counts.diagonal()[union > 0] / union[union > 0]).mean())


def resized(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits `(n, classes, h, w)` at the size of labels `(n, height, width)`, bilinear: networks answer coarsely."""
    if logits.dim() != 4 or logits.shape[2:] == labels.shape[1:]:
        return logits
    return F.interpolate(logits, size=labels.shape[1:], mode="bilinear")


def _right(most: int) -> PerSample:
    def values(output: Any, target: Any) -> Tensor:
        logits = resized(output_tensor(output), target) if target.dim() > 1 else output_tensor(output)
        right: Tensor = (logits.topk(most, dim=1).indices == target.unsqueeze(1)).any(dim=1)
        if right.dim() == 1:
            return right
        counted = ((target >= 0) & (target < logits.shape[1])).flatten(1)
        means: Tensor = (right.flatten(1) & counted).sum(dim=1) / counted.sum(dim=1).clamp_min(1)
        return means

    return values


def _of_errors(function: Callable[[Tensor], Tensor]) -> PerSample:
    return lambda output, target: function((output_tensor(output) - target).float().flatten(1))


def nats(output: Any, target: Any) -> Tensor:
    """Mean cross-entropy of each sample `(n,)`; logits `(n, steps, vocabulary)` or `(n, classes)`; -100 is ignored."""
    logits = output_tensor(output).float()
    losses = F.cross_entropy(logits.flatten(0, -2), target.flatten(), ignore_index=-100, reduction="none")
    counted = (target != -100).flatten(1) if target.dim() > 1 else (target != -100).unsqueeze(1)
    means: Tensor = losses.reshape(counted.shape).sum(dim=1) / counted.sum(dim=1).clamp_min(1)
    return means


def _scaled(function: PerSample, factor: float) -> PerSample:
    return lambda output, target: factor * function(output, target)


PER_SAMPLE: Mapping[str, PerSample] = {
    "top1": _right(1),
    "accuracy": _right(1),
    "top5": _right(5),
    "psnr": _of_errors(lambda error: -10 * error.square().mean(dim=1).clamp_min(1e-12).log10()),  # of values in [0, 1]
    "mse": _of_errors(lambda error: error.square().mean(dim=1)),
    "mae": _of_errors(lambda error: error.abs().mean(dim=1)),
    "cross_entropy": nats,
    "perplexity": nats,
    "bpc": _scaled(nats, 1 / math.log(2)),
    "bits_per_byte": _scaled(nats, 1 / math.log(2)),
}
"""Common metric -> the values of a batch. A step of a sequence is a character for bpc, a byte for bits_per_byte."""


class RootMeanSquare:
    """The root of the mean squared error over all numbers of all samples."""

    def __init__(self) -> None:
        self._sum, self._count = 0.0, 0

    def update(self, output: Tensor, target: Tensor) -> None:
        """Take in answers and targets of one shape."""
        self._sum += float((output - target).double().square().sum())
        self._count += target.numel()

    def merge_state(self, other: RootMeanSquare) -> None:
        """Take in what another one has seen."""
        self._sum, self._count = self._sum + other._sum, self._count + other._count

    def compute(self) -> float:
        """NaN where nothing was taken in."""
        return math.sqrt(self._sum / self._count) if self._count else math.nan


class OverClasses:
    """The mean over classes of a metric of torchmetrics, which has to know how many there are: the logits say it."""

    def __init__(self, name: str) -> None:
        self._name, self._accumulator = name, cast(Any, None)
        _torchmetrics_class(name)  # that it is missing is said before anything is trained

    def update(self, output: Tensor, target: Tensor) -> None:
        """Take in logits `(n, classes)` and labels `(n,)`."""
        if self._accumulator is None:
            self._accumulator = torchmetric(self._name, num_classes=output.shape[1]).to(output.device)
        self._accumulator.update(output, target)

    @property
    def metric_state(self) -> dict[str, Any]:
        """What it has seen, as torchmetrics gives it."""
        return dict(self._accumulator.metric_state)

    def merge_state(self, other: OverClasses) -> None:
        """Take in what another one has seen."""
        self._accumulator.merge_state(other._accumulator)

    def compute(self) -> float:
        """The mean over the classes."""
        return float(self._accumulator.compute()) if self._accumulator is not None else math.nan


class OfTexts:
    """A metric of torchmetrics over texts, which a task makes of outputs and targets.

    Args:
        name: `wer` or `cer`.
        texts: (output, target) -> the answers and the references of a batch, two lists of as many texts.
    """

    def __init__(self, name: str, texts: Callable[[Any, Any], tuple[list[str], list[str]]]) -> None:
        self._accumulator, self._texts = torchmetric(name), texts

    def update(self, output: Any, target: Any) -> None:
        """Take in a batch."""
        self._accumulator.update(*self._texts(output, target))

    def merge_state(self, other: OfTexts) -> None:
        """Take in what another one has seen."""
        self._accumulator.merge_state(other._accumulator)

    def compute(self) -> float:
        """Errors over words (`wer`) or characters (`cer`) of the references."""
        return float(self._accumulator.compute())


FROM_TORCHMETRICS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "f1": ("classification.MulticlassF1Score", {"average": "macro"}),
    "auroc": ("classification.MulticlassAUROC", {"average": "macro"}),
    "ssim": ("image.StructuralSimilarityIndexMeasure", {"data_range": 1.0}),
    "r2": ("regression.R2Score", {}),
    "wer": ("text.WordErrorRate", {}),
    "cer": ("text.CharErrorRate", {}),
}
"""Common metric -> the class of torchmetrics that accumulates it, and its arguments."""


ACCUMULATED: Mapping[str, Callable[[], Any]] = {
    "miou": MeanIoU,
    "rmse": RootMeanSquare,
    "f1": lambda: OverClasses("f1"),
    "auroc": lambda: OverClasses("auroc"),
}
"""Common metric -> what accumulates it, of the output's tensor."""


OF_BOXES: Mapping[str, Callable[[], Any]] = {
    "map": MeanAveragePrecision,
    "map50": lambda: MeanAveragePrecision(half=True),
}
"""Common metric of detectors -> what accumulates it, of the output as it is."""


def named_metric(name: str, where: str) -> tuple[Metric, Any]:
    """The metric that a study names, and its `score`: None of a common one, whose score is known.

    Args:
        name: of a common metric; or `module:function`, which returns an object with `metric` and `score`, as a task of
            one's own has them.
        where: the key of the study, for the message.

    Raises:
        TaskError: there is no such metric, or the function returns something else.
    """
    if ":" not in name:
        return find_metric(name, where), None
    made = call_factory(where, name, {})
    if not hasattr(made, "metric") or not hasattr(made, "score"):
        raise TaskError(
            f"{where}: {name} returned a {type(made).__name__}, expected an object with `metric` (a mpsearch.Metric) "
            "and `score` (a function of outputs and targets, or an object with `update` and `compute`)"
        )
    return find_metric(made.metric, f"{where}: metric of {name}"), made.score


OF_TEXTS = ("wer", "cer")


def scorer(name: str, metric: Metric, own: Any, texts: Any = None) -> Scorer:
    """What scores a split of a task.

    Args:
        name: of the task.
        metric: of the task.
        own: the task's `score`: a function of (output, target), or an object with `update` and `compute`; None: that
            of the common metric.
        texts: the task's `texts`, which `OfTexts` takes: for errors over words or characters.

    Raises:
        TaskError: the metric is none that can be scored without a `score`, or torchmetrics is missing.
    """
    if own is not None:
        return (
            Accumulated(metric, own) if hasattr(own, "update") and hasattr(own, "compute") else Mean(name, metric, own)
        )
    if metric.name in PER_SAMPLE:
        return Mean(name, metric, PER_SAMPLE[metric.name])
    if metric.name in ACCUMULATED:
        return Accumulated(metric, ACCUMULATED[metric.name](), output_tensor)
    if metric.name in OF_BOXES:
        return Accumulated(metric, OF_BOXES[metric.name]())
    if metric.name in OF_TEXTS:
        if texts is None:
            raise TaskError(
                f"{name}: {metric.name} compares texts: give the task `texts(output, target)`, which returns two lists "
                "of text, the network's answers and the references"
            )
        return Accumulated(metric, OfTexts(metric.name, texts))
    if metric.name in FROM_TORCHMETRICS:
        return Accumulated(metric, torchmetric(metric.name), output_tensor)
    raise TaskError(
        f"{name}: nothing is known of how {metric.name} is scored: give the task `score(outputs, targets)`, one number "
        "for each sample, or an object with `update` and `compute` as those of torchmetrics; without one are scored: "
        f"{', '.join(sorted({*PER_SAMPLE, *ACCUMULATED, *OF_BOXES, *FROM_TORCHMETRICS}))}"
    )


def torchmetric(name: str, **arguments: Any) -> Any:
    """A metric of torchmetrics. Raises TaskError where that is not installed."""
    kind, usual = _torchmetrics_class(name), FROM_TORCHMETRICS[name][1]
    try:
        return kind(**usual, **arguments)
    except ModuleNotFoundError as error:  # of what a metric itself is computed by
        raise _without_torchmetrics(name, error) from None


def _torchmetrics_class(name: str) -> Any:
    module, _, kind = FROM_TORCHMETRICS[name][0].rpartition(".")
    try:
        return getattr(importlib.import_module(f"torchmetrics.{module}"), kind)
    except ImportError as error:
        raise _without_torchmetrics(name, error) from None


def _without_torchmetrics(name: str, error: ImportError) -> TaskError:
    return TaskError(
        f"the metric {name} is computed by torchmetrics ({error}): pip install 'mpsearch[metrics]', or give the task a "
        "`score` of its own"
    )
