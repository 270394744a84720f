"""Calls into a task: its mode, its gradients and the form of its outputs are seen to here, not by the task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from mpsearch.errors import TaskError
from mpsearch.graph.inputs import evaluating
from mpsearch.metric import Metric, find_metric
from mpsearch.task.comparing import KIND_OF_METRIC, Comparison, comparison
from mpsearch.task.task import Compared, Measured, Measuring, Split, Task


def metric_of(task: Task) -> Metric:
    """What the task's scores are. Raises TaskError where it gives a name that is not a common metric's."""
    return find_metric(task.metric, f"{task.name}: metric")


def kind_of(task: Any) -> str | None:
    """What kind of outputs a task has: as it says, or as its metric does, unless its `logits` say it all."""
    kind = getattr(task, "kind", None)
    if kind is not None or hasattr(task, "logits"):
        return kind
    return KIND_OF_METRIC.get(metric_of(task).name)


def comparison_of(task: Task) -> Comparison | None:
    """How the outputs of a task's networks are compared; None where they are not.

    Raises:
        TaskError: the task says a kind that there is not.
    """
    if isinstance(task, Compared):
        return task.comparison
    return comparison(task.name, kind_of(task), getattr(task, "logits", None))


def distillation(task: Task) -> tuple[Callable[[Any], Any], Callable[[Any, Any], Tensor]] | None:
    """How a task distils: what is kept of the float network's output, and (student, what was kept) -> loss.

    The task's own `distill_loss`, else the divergence of its comparison; None where a task has neither, so that it is
    trained with its own loss.
    """
    own = getattr(task, "distill_loss", None)
    if own is not None:
        return (lambda output: output), own
    compared = comparison_of(task)
    return None if compared is None else (compared.rows, compared.divergence)


def measure(task: Task, model: nn.Module, split: Split) -> Measured:
    """How a model does on a split, in eval mode and without gradients; each module's mode is put back.

    Raises:
        TaskError: no score of the task's metric can be such a number.
    """
    with evaluating(model):
        if isinstance(task, Measuring):
            measured = task.measure(model, split)
        else:
            measured = Measured(float(task.evaluate(model, split)))
    metric = metric_of(task)
    if not metric.possible(measured.score):
        low, high = metric.bounds
        share = " a share, not percent," if metric.unit == "%" else ""
        raise TaskError(
            f"{task.name}: the score on {split} is {measured.score:g}, and {metric.name} lies from {low:g} to "
            f"{high:g}: return it as it is,{share} without a changed sign ({metric.direction} is the metric's "
            "direction), or give the task a Metric of its own"
        )
    return measured


def evaluate(task: Task, model: nn.Module, split: Split) -> float:
    """The task's score of a model on a split. Modes, gradients and errors as for `measure`."""
    return measure(task, model, split).score
