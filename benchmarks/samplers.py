"""Which sampler finds more after the initial configs? Trials are simulated by a model of a run's own scores.

An additive model (`mpsearch/warmstart/additive.py`) of all start scores and trials of a run is taken for the truth:
the divergence of any config of its space, without a second of training. Each sampler goes on from the run's initial
configs, in a world where trials miss the truth by as much as those of the run miss the model. Prints the front's mean
true divergence over octaves of cost after so many trials, over `--seeds`. What a simulation says is to be seen in a
real run (`origins`) before it is believed: the truth is of the kind that the sampler `additive` supposes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from benchmarks.options import RESULTS, Results, Seeds, several
from benchmarks.printing import print_table, say, spread
from benchmarks.rows import MEASURED, Row, Rows
from mpsearch.errors import MpsearchError
from mpsearch.facts import ProblemFacts, read_facts
from mpsearch.precision import PrecisionConfig
from mpsearch.record import RunFolder, TrialRecord
from mpsearch.search.additive import Knowledge
from mpsearch.search.controller import SearchController
from mpsearch.search.front import ScoreRange, objectives, pareto_front, share_dominated
from mpsearch.study import SearchSpec
from mpsearch.warmstart.additive import LEAST, AdditiveModel, Design, start_scores, unlinked
from mpsearch.warmstart.table import SensitivityTable

AFTER = (20, 40, 80, 160)


def samplers(
    run: Annotated[Path, typer.Argument(help="run folder with a prescreen")],
    names: Annotated[Sequence[str], several(str, "samplers, by their names in a study file")] = (
        "surrogate",
        "additive",
        "nsga2",
        "random",
    ),
    seeds: Seeds = (0, 1, 2, 3, 4),
    results: Results = RESULTS / "samplers.jsonl",
) -> None:
    rows = Rows(results, key=("run", "sampler", "seed", *MEASURED))
    folder = RunFolder.open(run)
    cases: list[Row] = [{"run": folder.path.name, "sampler": name, "seed": seed} for name in names for seed in seeds]
    world = World.of(folder)
    for case in rows.missing(cases):
        row = world.search(case["sampler"], case["seed"])
        rows.append(case | row)
        say(f"{case['sampler']}, seed {case['seed']}: {row['mean_divergence']}")
    show(rows.select(cases))


@dataclass(frozen=True)
class World:
    """A simulated task."""

    facts: ProblemFacts
    initial: Sequence[TrialRecord]  # of the run, that its sampler did not propose
    truth: Callable[[PrecisionConfig], float]  # nats
    noise: float  # deviation of log(divergence)
    knowledge: Knowledge
    worst: float  # the largest true divergence of an initial config

    @classmethod
    def of(cls, folder: RunFolder) -> World:
        """That of a run."""
        facts = read_facts(folder)
        path = folder.warmstart / "sensitivity.json"
        table = SensitivityTable.load(path) if path.exists() else None
        ended = [trial for trial in folder.records() if trial.state == "complete" and trial.divergence is not None]
        trials = [(trial.config, float(trial.divergence or 0.0)) for trial in ended]
        starts = start_scores(folder.prescreened())
        if len(trials) + len(starts) < LEAST:
            raise MpsearchError(
                f"{folder.path} has {len(trials)} trials and {len(starts)} start scores, and the truth takes {LEAST} "
                "of both: give a run with a prescreen, or let this one go on"
            )
        model = AdditiveModel(Design(facts.space, table), starts, trials)
        effects = model.mean()

        def truth(config: PrecisionConfig) -> float:
            return max(unlinked(effects(config), effects.link), 1e-4)

        missed = [math.log(max(divergence, 1e-4) / truth(config)) for config, divergence in trials]
        initial = [trial for trial in ended if trial.origin != "sampler"]
        worst = max(truth(trial.config) for trial in initial)
        return cls(facts, initial, truth, float(np.std(missed)), Knowledge(starts, table), worst)

    def search(self, sampler: str, seed: int) -> Row:
        """What one sampler finds."""
        random = np.random.default_rng([seed, 5])

        def ended(trial: TrialRecord) -> TrialRecord:
            divergence = self.truth(trial.config) * math.exp(self.noise * random.normal())
            return replace(trial, score=math.exp(-divergence), divergence=divergence, values=None, curve=(), rungs=())

        records = [ended(trial) for trial in self.initial]
        search = SearchSpec(
            sampler=sampler,  # type: ignore[arg-type]  # pydantic checks it
            seed=seed,
            trials=len(records) + AFTER[-1],
            stop_dominated=False,
        )
        facts = self.facts
        controller = SearchController(
            facts.space, facts.cost, search, facts.metric, records=records, knowledge=self.knowledge
        )
        found = {"0": self.mean_divergence(records)}
        for count in range(1, AFTER[-1] + 1):
            proposal = controller.ask()
            assert proposal is not None
            records.append(controller.tell(proposal, ended(TrialRecord(proposal.config, "complete"))))
            if count in AFTER:
                found[str(count)] = self.mean_divergence(records)
        costs = [objectives(trial)[1] for trial in records[len(self.initial) :]]
        return {
            "study": facts.spec.name,
            "mean_divergence": found,
            "median_cost": float(np.median(costs)),
            "noise": self.noise,
        }

    def mean_divergence(self, records: Sequence[TrialRecord]) -> float:
        """The true one along the front that the trials show, over octaves of cost from the cheapest config to 1."""
        front = pareto_front(records, self.facts.metric).trials
        points = [(1 - self.truth(trial.config) / self.worst, objectives(trial)[1]) for trial in front]
        return self.worst * (1 - share_dominated(points, self.facts.cheapest, ScoreRange(0.0, 1.0)))


HEADS = ("run", "sampler", "seeds", "initial", *(f"{n} more" for n in AFTER), "median cost")


def show(rows: Sequence[Row]) -> None:
    """The table on the terminal."""
    print_table("mean true divergence of the front, nats", HEADS, lines(rows))


def lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """A line a run and sampler."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["study"], row["sampler"]), []).append(row)

    def found(group: Sequence[Row]) -> list[str]:
        return [spread([row["mean_divergence"][str(n)] for row in group], 4) for n in (0, *AFTER)]

    return [
        (*names, str(len(group)), *found(group), spread([row["median_cost"] for row in group], 2))
        for names, group in groups.items()
    ]
