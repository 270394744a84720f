"""Export: a picked config arrives in the library that trains or runs the final model.

A target is one module with one function, and one entry in `TARGETS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpsearch.errors import ExportError, nearest
from mpsearch.exporters import native

if TYPE_CHECKING:
    from torch import nn

    from mpsearch.graph.layers import LayerInfo
    from mpsearch.record import TrialRecord

TARGETS: dict[str, Callable[..., Path]] = {"native": native.save}
"""Name of a format -> the function that writes it."""


def export(
    model: nn.Module,
    layers: Sequence[LayerInfo],
    to: str,
    path: str | Path,
    *,
    name: str,
    task: str,
    metric: str = "top1",
    accuracy: Mapping[str, float | None] | None = None,
    cost: Mapping[str, Any] | None = None,
) -> Path:
    """Write a quantized model in the format `to`; the other arguments are those of `native.save`.

    Raises:
        ExportError: no such format, or it cannot be written.
    """
    if to not in TARGETS:
        raise ExportError(f"unknown export format '{to}': {nearest(to, TARGETS)}")
    return TARGETS[to](model, layers, path, name=name, task=task, metric=metric, accuracy=accuracy, cost=cost)


def export_run(
    run: str | Path, pick: str, to: str, path: str | Path
) -> tuple[Path, TrialRecord, Mapping[str, float | None]]:
    """Export the trial of a run that `pick` names, with its finally trained weights if it was finalized.

    Returns:
        where it is, the trial, and the accuracies by split of the weights that were exported.

    Raises:
        MpsearchError: no such run, trial or format, or the export cannot be written.
    """
    from mpsearch.record import RunFolder
    from mpsearch.search.front import pick as pick_trial
    from mpsearch.search.run import open_problem, read_spec, trained_model

    if to not in TARGETS:
        raise ExportError(f"unknown export format '{to}': {nearest(to, TARGETS)}")
    folder = RunFolder.open(run)
    record = pick_trial(folder.records(), pick)
    problem = open_problem(read_spec(folder))
    model, measured = trained_model(problem, folder, record)
    spec = problem.spec
    path = export(
        model,
        problem.graph.layers,
        to,
        path,
        name=spec.task.model or spec.task.factory or problem.task.name,
        task=problem.task.name,
        metric=problem.task.metric,
        accuracy=measured,
        cost={"model": spec.cost.model, "reference": spec.cost.reference, "relative": problem.cost(record.config)},
    )
    return path, record, measured
