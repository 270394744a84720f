"""Calls into a task: its mode, its gradients and the form of its logits are seen to here, not by the task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from mpsearch.errors import TaskError
from mpsearch.graph.inputs import evaluating
from mpsearch.task.task import Answering, Answers, Split, Task


def evaluate(task: Task, model: nn.Module, split: Split) -> float:
    """The task's metric of a model on a split, in eval mode and without gradients; each module's mode is put back."""
    with evaluating(model):
        return task.evaluate(model, split)


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
