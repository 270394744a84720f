"""Calls into a task: its mode, its gradients and the form of its logits are seen to here, not by the task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from mpsearch.errors import TaskError
from mpsearch.graph.inputs import evaluating
from mpsearch.metric import Metric, find_metric
from mpsearch.task.task import Answering, Answers, Split, Task


def metric_of(task: Task) -> Metric:
    """What the task's scores are. Raises TaskError where it gives a name that is not a common metric's."""
    return find_metric(task.metric, f"{task.name}: metric")


def evaluate(task: Task, model: nn.Module, split: Split) -> float:
    """The task's score of a model on a split, in eval mode and without gradients; each module's mode is put back.

    Raises:
        TaskError: no score of the task's metric can be such a number.
    """
    with evaluating(model):
        score = float(task.evaluate(model, split))
    metric = metric_of(task)
    if not metric.possible(score):
        low, high = metric.bounds
        share = " a share, not percent," if metric.unit == "%" else ""
        raise TaskError(
            f"{task.name}: the score on {split} is {score:g}, and {metric.name} lies from {low:g} to {high:g}: return "
            f"it as it is,{share} without a changed sign ({metric.direction} is the metric's direction), or give the "
            "task a Metric of its own"
        )
    return score


def answers_of(task: Answering, model: nn.Module, split: Split) -> Answers:
    """The task's answers of a model to a split, in eval mode and without gradients; each mode is put back."""
    with evaluating(model):
        return task.answers(model, split)


def logits_of(task: Task) -> Callable[[Any], Tensor]:
    """The task's `logits`, which raise TaskError where they are not `(n, classes)`.

    A softmax over the rows of an image or the steps of a sequence would train, and to the wrong end.
    """

    def logits(output: Any) -> Tensor:
        value = task.logits(output)
        if value.dim() != 2:
            raise TaskError(
                f"{task.name}: `logits` gave the shape {tuple(value.shape)}, expected (n, classes), whose classes "
                "distillation compares: return (n * positions, classes) where each position is classified, or set "
                "trial.distill to false to train with the task's own loss"
            )
        return value

    return logits
