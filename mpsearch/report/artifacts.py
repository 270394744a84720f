"""What the Optuna dashboard offers of each trial beside its numbers: the config, a bits chart, the training curve.

An artifact store that makes them from the record when they are asked for: no files that could be missing or old.
"""

from __future__ import annotations

import io
import json
from typing import BinaryIO

from optuna.artifacts.exceptions import ArtifactNotFound

from mpsearch.facts import ProblemFacts
from mpsearch.record import RunFolder, TrialRecord
from mpsearch.report import figures
from mpsearch.report.svg import svg
from mpsearch.report.tables import config_table, layers_table
from mpsearch.search.view import ARTIFACTS


class RunArtifacts:
    """An Optuna artifact store of one run, to read from.

    Args:
        folder: of the run.
        facts: of its problem.
    """

    def __init__(self, folder: RunFolder, facts: ProblemFacts) -> None:
        self._folder = folder
        self._facts = facts
        self._layers = layers_table(facts.graph.layers, facts.cost)

    def open_reader(self, artifact_id: str) -> BinaryIO:
        """The content of an artifact. Raises ArtifactNotFound if there is no such trial or kind."""
        number, _, kind = artifact_id.partition("-")
        try:
            record = next(record for record in self._folder.records() if record.number == int(number, 16))
            name, _ = ARTIFACTS[kind]
        except (ValueError, StopIteration, KeyError):
            raise ArtifactNotFound(f"no artifact {artifact_id}") from None
        return io.BytesIO(self._made(name, record).encode())

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """Refused: a run's artifacts follow from its record."""
        raise PermissionError("the artifacts of a run follow from its record: none can be added")

    def remove(self, artifact_id: str) -> None:
        """Nothing to do: nothing is stored."""

    def _made(self, name: str, record: TrialRecord) -> str:
        title = f"trial {record.number} ({record.origin})"
        if name == "config.json":
            return config_json(record, self._facts)
        if name == "bits.svg":
            table = config_table(record.config, self._layers, self._facts.cost)
            return svg(figures.network(table), f"{title}: bits by layer")
        return svg(
            figures.training(record.curve, self._facts.metric),
            f"{title}: {self._facts.metric.name} on val during the fine-tune",
        )


def config_json(record: TrialRecord, facts: ProblemFacts) -> str:
    """A trial's config with what was measured of it, as `mpsearch import` and `mpsearch debug` read it."""
    spec = facts.spec
    document = {
        "model": spec.task.model or facts.task_name,
        "task": facts.task_name,
        "metric": facts.metric.name,
        "direction": facts.metric.direction,
        "unit": facts.metric.unit,
        "score": {"val": record.score},
        "cost": {"model": spec.cost.model, "reference": spec.cost.reference, "relative": record.cost},
        "layers": record.config.to_json(),
    }
    return json.dumps(document, indent=1, allow_nan=False) + "\n"
