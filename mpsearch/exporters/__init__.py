"""Export: a picked config arrives in the library that trains or runs the final model.

`export` fits a network to what the target can hold (`fit`), lets the target write its files, and puts a manifest,
`export.json`, beside them. Targets and what they hold: `targets.TARGETS`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mpsearch.errors import ExportError
from mpsearch.exporters.fit import Conversion, fit
from mpsearch.exporters.network import QuantizedNetwork

if TYPE_CHECKING:
    from mpsearch.record import TrialRecord

SCHEMA = "mpsearch/export/1"
MANIFEST = "export.json"


@dataclass(frozen=True)
class Exported:
    """Where an export is, and what was converted for it."""

    path: Path
    conversions: tuple[Conversion, ...] = ()


def export(network: QuantizedNetwork, to: str, path: str | Path, *, allow_lossy: bool = False) -> Exported:
    """Write a quantized network in the format `to` into the folder `path`, which is made if absent.

    Args:
        network: what to write.
        to: a name in `targets.TARGETS`.
        path: the folder.
        allow_lossy: convert what the format cannot hold, and list it, instead of refusing.

    Raises:
        ExportError: no such format, a package is missing, the format cannot hold the config, or it cannot be written.
    """
    from mpsearch.exporters.targets import find_target

    target = find_target(to)
    model = copy.deepcopy(getattr(network.model, "_orig_mod", network.model)).eval()  # a soft quantizer is not exported
    network = replace(network, model=model)
    fitted, conversions = fit(network, to, target.holds, allow_lossy)
    path = Path(path)
    if to == "native":
        target.save(fitted, path)
        return Exported(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if any(path.iterdir()):
            raise ExportError(f"{path} is not empty: give another folder, or empty it first")
        document = {
            **fitted.document(SCHEMA),
            "target": to,
            "converted": [conversion.to_json() for conversion in conversions],  # accuracy was measured before this
            **target.save(fitted, path),
        }
        (path / MANIFEST).write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise ExportError(f"cannot write the export to {path}: {error.strerror or error}") from None
    return Exported(path, conversions)


def export_run(
    run: str | Path, pick: str, to: str, path: str | Path, *, allow_lossy: bool = False
) -> tuple[Exported, TrialRecord, Mapping[str, float | None]]:
    """Export the trial of a run that `pick` names, with its finally trained weights if it was finalized.

    Returns:
        where it is and what was converted, the trial, and the accuracies by split of the weights that were exported.

    Raises:
        MpsearchError: no such run, trial or format, or the export cannot be written.
    """
    from mpsearch.exporters.targets import find_target
    from mpsearch.record import RunFolder
    from mpsearch.search.front import pick as pick_trial
    from mpsearch.search.run import open_problem, read_spec, trained_model

    find_target(to)  # before anything is trained again
    folder = RunFolder.open(run)
    record = pick_trial(folder.records(), pick)
    problem = open_problem(read_spec(folder))
    model, measured = trained_model(problem, folder, record)
    spec = problem.spec
    network = QuantizedNetwork(
        model,
        problem.graph.layers,
        name=spec.task.model or spec.task.factory or problem.task.name,
        task=problem.task.name,
        metric=problem.task.metric,
        accuracy=measured,
        cost={"model": spec.cost.model, "reference": spec.cost.reference, "relative": problem.cost(record.config)},
        example_input=problem.task.calibration_input(2),
    )
    return export(network, to, path, allow_lossy=allow_lossy), record, measured
