"""RunData: everything that the report, the Optuna dashboard and notebooks draw of a run, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from mpsearch.cost.model import RelativeCost
from mpsearch.facts import ProblemFacts, read_facts
from mpsearch.graph.facts import LayerInfo
from mpsearch.metric import Metric
from mpsearch.record import FinalRecord, PrescreenRecord, RunFolder, TrialRecord
from mpsearch.report.tables import (
    best_table,
    bits_table,
    config_table,
    config_text,
    descent_table,
    finals_table,
    layers_table,
    prescreen_table,
    progress_table,
    trials_table,
)
from mpsearch.report.weights import histograms, ranges_table
from mpsearch.search.front import ParetoFront, ScoreRange, pareto_front, score_range, scores_of
from mpsearch.search.values import read_values
from mpsearch.warmstart.table import read_descent

RANKED = 8  # complete trials from which the report says how well cheap scores rank them


@dataclass(frozen=True)
class RunData:
    """A run as tables; the functions of `report.tables` and `report.weights` say which columns each has.

    `config` is the picked config (the knee), layer by layer; it is empty before the first complete trial. `descent`,
    `prescreen`, `ranking`, `ranges` and `histograms` are empty where a run has none.
    """

    name: str
    metric: Metric  # what scores are
    cost: RelativeCost
    reference: str  # the config that costs 1, as w8a8
    cheapest: float  # relative cost of the cheapest config of the space
    scores: ScoreRange  # the score axis of the hypervolume
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
    prescreen: pd.DataFrame = field(default_factory=pd.DataFrame)
    ranking: pd.DataFrame = field(default_factory=pd.DataFrame)
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
        metric: Metric,
        reference: str = "w8a8",
        float_score: float | None = None,
        finals: Sequence[FinalRecord] = (),
        descent: pd.DataFrame | None = None,
        ranges: pd.DataFrame | None = None,
        histograms: pd.DataFrame | None = None,
        prescreen: Sequence[PrescreenRecord] = (),
        ranking: pd.DataFrame | None = None,
    ) -> RunData:
        """The tables of a study; it may still be running.

        Args:
            name: of the study.
            records: every trial so far.
            layers: the layers of the network.
            cost: prices configs.
            cheapest: relative cost of the cheapest config of the space.
            metric: what scores are.
            reference: what costs 1.
            float_score: of the float network on val, where it is known.
            finals: every final training so far.
            descent: as from `descent_table`.
            ranges: as from `weights.ranges_table`, of the knee.
            histograms: as from `weights.histograms`, of the knee.
            prescreen: every start score so far.
            ranking: as from `proxy_tau`, of what is cheap.

        Raises:
            CostError: `cheapest` is no cost.
        """
        front = pareto_front(records, metric)
        scores = score_range(scores_of(records), metric, float_score)
        known = layers_table(layers, cost)
        empty = pd.DataFrame()
        return cls(
            name=name,
            metric=metric,
            cost=cost,
            reference=reference,
            cheapest=cheapest,
            scores=scores,
            records=tuple(records),
            front=front,
            trials=trials_table(records, metric).assign(config=[config_text(record.config) for record in records]),
            layers=known,
            bits=bits_table(records, list(known.layer), metric),
            config=config_table(front.knee.config, known, cost) if front.trials else empty,
            progress=progress_table(records, cheapest, metric, scores),
            best=best_table(records, cheapest, metric),
            finals=finals_table(records, finals),
            descent=empty if descent is None else descent,
            ranges=empty if ranges is None else ranges,
            histograms=empty if histograms is None else histograms,
            prescreen=prescreen_table(prescreen),
            ranking=empty if ranking is None else ranking,
        )


def read_run(run: str | Path | RunFolder, facts: ProblemFacts | None = None) -> RunData:
    """The tables of a run folder; it may be driven by another process meanwhile.

    Args:
        run: the folder.
        facts: of its problem, where they have been read already.

    Raises:
        MpsearchError: there is no run, or what is written of it cannot be read.
    """
    folder = run if isinstance(run, RunFolder) else RunFolder.open(run)
    facts = facts or read_facts(folder)
    records = folder.records()
    descent = None
    if (folder.warmstart / "descent.json").exists():
        descent = descent_table(read_descent(folder.warmstart)["log"], facts.space.slots)
    ranges, weights = None, None
    front, values = pareto_front(records, facts.metric), read_values(folder)
    if front.trials and values is not None and values.config == front.knee.config.digest:  # else of an earlier knee
        ranges, weights = ranges_table(values, front.knee.config), histograms(values, front.knee.config)
    return RunData.of(
        facts.spec.name,
        records,
        facts.graph.layers,
        facts.cost,
        facts.cheapest,
        facts.metric,
        facts.spec.cost.reference,
        facts.float_scores.get("val"),
        folder.finals(),
        descent,
        ranges,
        weights,
        folder.prescreened(),
        _ranking(folder, records, facts),
    )


def _ranking(folder: RunFolder, records: Sequence[TrialRecord], facts: ProblemFacts) -> pd.DataFrame | None:
    """How well start score, additive model and trial foretell: final trainings, or trials where these are few."""
    from mpsearch.warmstart.additive import start_scores  # here, because most that is looked at needs no scipy
    from mpsearch.warmstart.rank import LEAST_RANKED, SCORES, foreseen_divergence, proxy_tau, trials_frame

    complete = [record for record in records if record.state == "complete"]
    if len(complete) < RANKED:
        return None
    finals = folder.finals()
    foreseen = foreseen_divergence(complete, start_scores(folder.prescreened()), facts.space)
    trials = trials_frame(complete, facts.metric, (), foreseen, finals)
    final = int(trials.final.notna().sum()) >= LEAST_RANKED
    rungs = [name for name in trials.columns if name.startswith("rung ")]
    proxies = ["start", "additive", *rungs, "divergence", *(["quality"] if final else [])]
    shown = [name for name in proxies if trials[name].notna().any()]
    against = "final" if final else "quality"
    ranking = proxy_tau(trials, shown, against=against, more_is_better=SCORES, strata=2, resamples=200, seed=0)
    return ranking.assign(against=against)
