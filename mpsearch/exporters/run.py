"""Export a trial of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from mpsearch.errors import RunError
from mpsearch.exporters.export import VERIFIED_ON, Exported, export
from mpsearch.exporters.targets import find_target
from mpsearch.facts import read_facts, with_costs
from mpsearch.graph.inputs import image_list
from mpsearch.metric import Metric
from mpsearch.problem import reopen
from mpsearch.quant.network import QuantizedNetwork
from mpsearch.record import RunFolder, TrialRecord
from mpsearch.search.front import pick as pick_trial
from mpsearch.search.kept import trained_model


def export_run(
    run: str | Path, pick: str, to: str, path: str | Path, *, allow_lossy: bool = False, verify: bool = True
) -> tuple[Exported, TrialRecord, Mapping[str, float | None], Metric]:
    """Export the trial of a run that `pick` names, with its finally trained weights if it was finalized.

    Returns:
        where it is and what was converted, the trial, the scores by split of the weights that were exported, and
        what these scores are.

    Raises:
        MpsearchError: no such run, trial or format, the export cannot be written, or answers otherwise.
    """
    find_target(to)  # before anything is trained again
    folder = RunFolder.open(run)
    records, references = folder.records(), {}
    with contextlib.suppress(RunError):  # an older run has no facts yet, and a pick that needs none
        facts = read_facts(folder)
        records = with_costs(records, facts)
        references = {name: cost.reference for name, cost in facts.costs.items()}
    record = pick_trial(records, pick, folder.metric, references)
    problem = reopen(folder)
    model, measured = trained_model(problem, folder, record)
    spec = problem.spec
    example = problem.task.calibration_input(2)
    images = image_list(example)
    network = QuantizedNetwork(
        model,
        problem.graph.layers,
        name=spec.task.model or spec.task.factory or problem.task.name,
        task=problem.task.name,
        metric=problem.metric,
        score=measured,
        cost={"model": spec.cost.model, "reference": spec.cost.reference, "relative": problem.cost(record.config)}
        | {"all": problem.priced(record.config)},
        example_input=images[:1] if images else example,  # a graph takes as many images as it was traced with
        samples=problem.task.calibration_input(VERIFIED_ON),
        float_model=problem.task.float_model(),
    )
    exported = export(network, to, path, allow_lossy=allow_lossy, verify=verify)
    return exported, record, measured, problem.metric
