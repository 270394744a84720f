"""What does the sampler add once the initial configs are tried? The hypervolume of long runs, by who proposed what.

Make the runs first, as `mpsearch run resnet20-cifar10-jpeg --time-limit 60m --trials 1000 --out RUN`. Beside the
hypervolume of the metric, which the report shows, stands the mean divergence of the front over octaves of cost, from
the cheapest config to the reference: samplers improve that. To compare samplers, give runs that have their initial
trials in common. What of the metric a nat of divergence stands for is printed, too: samplers take it for a constant.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.options import RESULTS, Results
from benchmarks.printing import print_table
from benchmarks.rows import MEASURED, Row, Rows
from mpsearch.facts import read_facts
from mpsearch.record import RunFolder, TrialRecord
from mpsearch.report.data import RunData, read_run
from mpsearch.report.tables import last_initial, origins_table, rows_of
from mpsearch.search.front import ScoreRange, objectives, share_dominated

MINUTES = (5, 10, 15, 20, 30, 40, 50, 60)
PAUSE_S = 600.0
"""Between the ends of two trials: the run was resumed, and its minutes are not told."""
TRIALS = (20, 40, 60, 80, 100, 140, 180, 220)
BUDGETS = (0.75, 0.5, 0.384, 0.284, 0.204, 0.16)
"""Relative costs at which the best trial is looked up, before and after the sampler's: between those that initial
configs are made for, too. W4A4, W3A3 and W2A2 of a ResNet-20 cost 0.384, 0.284 and 0.204."""


NATS = (0.1, 0.3, 1.0)


def origins(
    runs: Annotated[list[Path], typer.Argument(help="run folders")],
    results: Results = RESULTS / "origins.jsonl",
) -> None:
    rows = Rows(results, key=("run", *MEASURED))
    folders = [RunFolder.open(path) for path in runs]
    cases: list[Row] = [{"run": folder.path.name} for folder in folders]
    for case, folder in zip(cases, folders, strict=True):
        for missing in rows.missing([case]):
            rows.append(missing | of_run(folder))
    show(rows.select(cases))


def of_run(folder: RunFolder) -> Row:
    """What one run says; a volume or a score is None where there is none yet."""
    facts = read_facts(folder)
    run = read_run(folder, facts)
    ended = sorted((trial for trial in run.records if trial.state == "complete"), key=lambda trial: trial.ended_s)
    began_s = min(trial.started_s for trial in ended)
    initial = [trial for trial in ended if trial.origin != "sampler"]
    last = last_initial(run.progress)
    paused = any(b.ended_s - a.ended_s > PAUSE_S for a, b in pairwise(ended))
    worst = max((trial.divergence for trial in ended if trial.divergence is not None), default=0.0)
    return {
        "study": run.name,
        "sampler": facts.spec.search.sampler,
        "minutes": (ended[-1].ended_s - began_s) / 60,
        "trials": len(ended),
        "initial": len(initial),
        "initial_minutes": float(run.progress.elapsed_s.iloc[last]) / 60,
        "volumes": {
            str(minute): volumes(run, [trial for trial in ended if trial.ended_s - began_s <= 60 * minute], worst)
            for minute in MINUTES
            if 60 * minute <= ended[-1].ended_s - began_s + 60 and not paused
        },
        "volumes_by_trials": {str(n): volumes(run, ended[:n], worst) for n in TRIALS if n <= len(ended)},
        "origins": [
            {"origin": str(row.origin), "trials": int(row.trials), "added": row.first + row.longer, "late": row.late}
            for row in rows_of(origins_table(run.progress))
        ],
        "lost_per_nat": lost_per_nat(run, facts.float_scores.get("val")),
        "budgets": {
            str(budget): [_best(trials, budget) for trials in (initial, ended)]
            for budget in BUDGETS
            if any(objectives(trial)[1] <= budget for trial in initial)
        },
    }


def volumes(run: RunData, trials: Sequence[TrialRecord], worst: float) -> tuple[float, float | None]:
    """The hypervolume of the metric, and the front's mean divergence where all trials have one; `worst` left of all."""
    scored = [objectives(trial) for trial in trials]
    near = [(1 - trial.divergence / worst, objectives(trial)[1]) for trial in trials if trial.divergence is not None]
    of_metric = share_dominated(scored, run.cheapest, run.scores)
    if len(near) < len(scored) or not worst:
        return of_metric, None
    return of_metric, worst * (1 - share_dominated(near, run.cheapest, ScoreRange(0.0, 1.0)))


def lost_per_nat(run: RunData, floating: float | None) -> dict[str, float]:
    """What a nat of divergence costs of the metric, the median over trials from 0.1 to 0.3 nats, to 1, and beyond."""
    if floating is None:
        return {}
    ratios: dict[str, list[float]] = {}
    for trial in run.records:
        if trial.score is not None and trial.divergence is not None and trial.divergence > NATS[0]:
            above = str(max(nats for nats in NATS if nats < trial.divergence))
            ratios.setdefault(above, []).append(abs(floating - trial.score) / trial.divergence)
    return {nats: statistics.median(values) for nats, values in ratios.items()}


def _best(trials: Sequence[TrialRecord], budget: float) -> tuple[float | None, float | None]:
    """The best score within a budget, and the least divergence."""
    within = [trial for trial in trials if objectives(trial)[1] <= budget]
    scores = [trial.score for trial in within if trial.score is not None]
    divergences = [trial.divergence for trial in within if trial.divergence is not None]
    return max(scores, default=None), min(divergences, default=None)


def show(rows: Sequence[Row]) -> None:
    """The tables of the page, on the terminal."""
    for title, (heads, lines) in tables(rows).items():
        print_table(title, heads, lines)


def tables(rows: Sequence[Row]) -> dict[str, tuple[Sequence[str], list[tuple[str, ...]]]]:
    """Heads and lines of each table, by its title."""
    budgets = [(row, str(budget)) for row in rows for budget in BUDGETS if str(budget) in row["budgets"]]
    return {
        "who added what to the hypervolume of the metric": (
            ("run", "trials", "initial ones", "minutes of these", "added by them", "by the sampler"),
            [_origins(row) for row in rows],
        ),
        "hypervolume of the metric / mean divergence of the front, by minutes": (
            ("run", *map(str, MINUTES)),
            [(_name(row), *(_volumes(row["volumes"].get(str(minute))) for minute in MINUTES)) for row in rows],
        ),
        "the same by trials that have ended": (
            ("run", *map(str, TRIALS)),
            [(_name(row), *(_volumes(row["volumes_by_trials"].get(str(n))) for n in TRIALS)) for row in rows],
        ),
        "points that a nat of divergence costs, median": (
            ("run", *(f"above {nats} nats" for nats in NATS)),
            [(_name(row), *(_points(row["lost_per_nat"].get(str(nats))) for nats in NATS)) for row in rows],
        ),
        "the best within a budget, of the initial trials and of all": (
            ("run", "budget", "score, initial", "all", "divergence, initial", "all"),
            [(_name(row), budget, *_bests(row["budgets"][budget])) for row, budget in budgets],
        ),
    }


def _name(row: Row) -> str:
    return f"{row['study'].removesuffix('-cifar10-jpeg')}, {row['sampler']}"


def _origins(row: Row) -> tuple[str, ...]:
    added = {True: 0.0, False: 0.0}
    for each in row["origins"]:
        added[each["origin"] == "sampler"] += each["added"]
    minutes = f"{row['initial_minutes']:.0f}"
    return _name(row), str(row["trials"]), str(row["initial"]), minutes, f"{added[False]:.4f}", f"{added[True]:.4f}"


def _volumes(pair: Sequence[float | None] | None) -> str:
    return "" if pair is None else " / ".join("–" if value is None else f"{value:.4f}" for value in pair)


def _points(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def _bests(pairs: Sequence[Sequence[float | None]]) -> tuple[str, ...]:
    """Scores in percent, as both networks have."""
    scores = ["–" if score is None else f"{100 * score:.2f}" for score, _ in pairs]
    return *scores, *("–" if divergence is None else f"{divergence:.3f}" for _, divergence in pairs)
