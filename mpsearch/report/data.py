"""RunData: everything that the report, the Optuna dashboard and notebooks draw of a run, as tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from mpsearch.cost.model import RelativeCost
from mpsearch.graph.facts import LayerInfo
from mpsearch.record import FinalRecord, RunFolder, TrialRecord
from mpsearch.report.tables import (
    best_table,
    bits_table,
    config_table,
    config_text,
    descent_table,
    finals_table,
    layers_table,
    progress_table,
    trials_table,
)
from mpsearch.search.front import ParetoFront, pareto_front

if TYPE_CHECKING:
    from mpsearch.problem import Problem


@dataclass(frozen=True)
class RunData:
    """A run as tables; the functions of `report.tables` and `report.weights` say which columns each has.

    `config` is the picked config (the knee), layer by layer; it is empty before the first complete trial. `descent`,
    `ranges` and `histograms` are empty where a run has none.
    """

    name: str
    cost: RelativeCost
    reference: str  # the config that costs 1, as w8a8
    cheapest: float  # relative cost of the cheapest config of the space
    records: tuple[TrialRecord, ...]
    front: ParetoFront
    trials: pd.DataFrame
    layers: pd.DataFrame
    bits: pd.DataFrame
    config: pd.DataFrame
    progress: pd.DataFrame
    best: pd.DataFrame
    finals: pd.DataFrame
    descent: pd.DataFrame = field(default_factory=pd.DataFrame)
    ranges: pd.DataFrame = field(default_factory=pd.DataFrame)
    histograms: pd.DataFrame = field(default_factory=pd.DataFrame)

    @classmethod
    def of(
        cls,
        name: str,
        records: Sequence[TrialRecord],
        layers: Sequence[LayerInfo],
        cost: RelativeCost,
        cheapest: float,
        reference: str = "w8a8",
        finals: Sequence[FinalRecord] = (),
        descent: pd.DataFrame | None = None,
        ranges: pd.DataFrame | None = None,
        histograms: pd.DataFrame | None = None,
    ) -> RunData:
        """The tables of a study; it may still be running.

        Args:
            name: of the study.
            records: every trial so far.
            layers: the layers of the network.
            cost: prices configs.
            cheapest: relative cost of the cheapest config of the space.
            reference: what costs 1.
            finals: every final training so far.
            descent: as from `descent_table`.
            ranges: as from `weights.ranges_table`, of the knee.
            histograms: as from `weights.histograms`, of the knee.

        Raises:
            CostError: `cheapest` is no cost.
        """
        front = pareto_front(records)
        known = layers_table(layers, cost)
        empty = pd.DataFrame()
        return cls(
            name=name,
            cost=cost,
            reference=reference,
            cheapest=cheapest,
            records=tuple(records),
            front=front,
            trials=trials_table(records).assign(config=[config_text(record.config) for record in records]),
            layers=known,
            bits=bits_table(records, list(known.layer)),
            config=config_table(front.knee.config, known, cost) if front.trials else empty,
            progress=progress_table(records, cheapest),
            best=best_table(records, cheapest),
            finals=finals_table(records, finals),
            descent=empty if descent is None else descent,
            ranges=empty if ranges is None else ranges,
            histograms=empty if histograms is None else histograms,
        )


def read_run(run: str | Path | RunFolder, problem: Problem | None = None) -> RunData:
    """The tables of a run folder; it may be driven by another process meanwhile.

    Args:
        run: the folder.
        problem: its study, where it has been opened already (which loads the task).

    Raises:
        MpsearchError: there is no run, or its study cannot be opened.
    """
    from mpsearch.problem import open_problem
    from mpsearch.study import read_spec

    folder = run if isinstance(run, RunFolder) else RunFolder.open(run)
    problem = problem or open_problem(read_spec(folder))
    records = folder.records()
    log = folder.warmstart / "descent.json"
    descent = None
    if log.exists():
        descent = descent_table(json.loads(log.read_text(encoding="utf-8"))["log"], problem.space.slots)
    ranges, histograms = _values(folder, problem, records)
    return RunData.of(
        problem.spec.name,
        records,
        problem.graph.layers,
        problem.cost,
        problem.cheapest,
        problem.spec.cost.reference,
        folder.finals(),
        descent,
        ranges,
        histograms,
    )


def _values(
    folder: RunFolder, problem: Problem, records: Sequence[TrialRecord]
) -> tuple[pd.DataFrame, pd.DataFrame] | tuple[None, None]:
    """Ranges and histograms of the knee: of its final training if there is one; None where no weights were kept."""
    from mpsearch.record import checkpoint_path, final_path
    from mpsearch.report import weights

    front = pareto_front(records)
    if not front.trials:
        return None, None
    knee = front.knee
    found = [path(folder.checkpoints, knee.number) for path in (final_path, checkpoint_path)]
    checkpoint = next((path for path in found if path.exists()), None)
    if checkpoint is None:
        return None, None
    model = problem.task.float_model()
    layers = weights.quantized_layers(model, problem.graph.layers, knee.config, checkpoint)
    return weights.ranges_table(layers), weights.histograms(layers)
