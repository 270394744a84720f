"""Runs of a study: run, resume, status, front, rank, finalize."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mpsearch.api.studies import read_study
from mpsearch.errors import MpsearchError
from mpsearch.files import nameable
from mpsearch.observer import SILENT, Observer

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from mpsearch.metric import Metric
    from mpsearch.record import RunFolder, RunningTrial, TrialRecord
    from mpsearch.search.finals import FinalRow, Proxies
    from mpsearch.search.front import ParetoFront
    from mpsearch.study import StudySpec


@dataclass(frozen=True)
class Front:
    """The Pareto front of a run.

    Attributes:
        pareto: the front as records, with `knee`, `best`, `at_most(cost)`, `at_least(score)`; its `metric` is what
            scores are.
        records: every trial of any state, in the order of the run's record.
        gains: trial number -> score minus that of the uniform baseline nearest in cost, in the metric's
            `difference_unit` with its 95 % interval, for trials of the front.
        hypervolume: as last written by the run (`mpsearch.search.front` says of what); None before that.
        answer: in words, what the knee gains over the reference and float in every cost, and which of its layers have
            how many bits; a line each, none for a run of an older version.
        units: of every cost that the trials have, by its name.
    """

    pareto: ParetoFront
    records: tuple[TrialRecord, ...]
    gains: Mapping[int, str]
    hypervolume: float | None
    answer: tuple[str, ...] = ()
    units: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def trials(self) -> pd.DataFrame:
        """A row per record.

        Columns: number, origin, state, score (on val, in the metric's unit), relative_cost, weight_bits and
        activation_bits (means over the layers), on_front, knee, reason, steps (of training, behind the score), gain (as
        in `gains`; empty off the front).
        """
        from mpsearch.report.tables import trials_table

        trials = trials_table(self.records, self.pareto.metric)
        trials = trials.assign(gain=[self.gains.get(number, "") for number in trials.number])
        for name in self.units:
            trials[f"cost.{name}"] = [record.costs.get(name) for record in self.records]
        return trials

    @property
    def table(self) -> pd.DataFrame:
        """The rows of `trials` that are on the front or complete ones of the uniform ladder, by rising cost."""
        trials = self.trials
        shown = trials.on_front | ((trials.origin == "uniform") & (trials.state == "complete"))
        return trials[shown].sort_values("relative_cost", ignore_index=True)

    def figure(self) -> go.Figure:
        """Score over relative cost: the front, the uniform ladder and every other trial."""
        from mpsearch.report import figures

        return figures.front(self.trials, self.pareto.metric)

    def to_json(self) -> dict[str, Any]:
        """What `mpsearch front --json` prints."""
        from mpsearch.search.front import front_rows

        ladder = [
            {"number": trial.number, "score": trial.score, "cost": trial.cost, "steps": trial.steps}
            for trial in self.pareto.ladder
        ]
        metric = self.pareto.metric.to_json()
        return {
            "metric": metric,
            "hypervolume": self.hypervolume,
            "front": front_rows(self.pareto),
            "uniform": ladder,
            "units": dict(self.units),
            "answer": list(self.answer),
        }


@dataclass(frozen=True)
class Status:
    """How far a run is.

    Attributes:
        study: its name.
        trials: how many are asked for.
        counts: ended trials by state: complete, failed, stopped.
        running: trials under way.
        failures: the failed trials, oldest first.
        pareto: the front so far; empty before the first complete trial.
        hypervolume: as in `Front`.
        prescreened: untrained configs that were scored.
        rungs: where trials train by rungs, training steps -> how many complete trials have had so many, and no more.
        trouble: what goes wrong beside the search now, in words: a storage that cannot be reached; None: nothing.
    """

    study: str
    trials: int
    counts: Mapping[str, int]
    running: tuple[RunningTrial, ...]
    failures: tuple[TrialRecord, ...]
    pareto: ParetoFront
    hypervolume: float | None
    prescreened: int = 0
    trouble: str | None = None
    rungs: Mapping[int, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """What `mpsearch status --json` prints."""
        best = self.pareto.best if self.pareto.trials else None
        return {
            "study": self.study,
            "trials": self.trials,
            "completed": self.counts["complete"],
            "failed": self.counts["failed"],
            "stopped": self.counts["stopped"],
            "running": len(self.running),
            "prescreened": self.prescreened,
            "rungs": {str(steps): count for steps, count in self.rungs.items()},
            "trouble": self.trouble,
            "metric": self.pareto.metric.to_json(),
            "best": best and {"number": best.number, "score": best.score, "cost": best.cost},
            "hypervolume": self.hypervolume,
        }


@dataclass(frozen=True)
class RunResult:
    """A run that has ended.

    Attributes:
        folder: the run folder, which `resume`, `front`, `finalize`, `export_run`, ... take.
        front: its Pareto front.
        counts: trials by state: complete, failed, stopped.
        report: its report, one HTML file.
    """

    folder: Path
    front: Front
    counts: Mapping[str, int]
    report: Path


@dataclass(frozen=True)
class Finals:
    """The picked front after its final trainings, beside its baselines.

    Attributes:
        rows: a config each, by rising cost.
        metric: what scores are.
        float_val: score of the float model on val.
        float_test: on test.
        proxies: how well the trials foretold the final order.
        report: the report, one HTML file.
    """

    rows: tuple[FinalRow, ...]
    metric: Metric
    float_val: float
    float_test: float
    proxies: Proxies
    report: Path

    @property
    def table(self) -> pd.DataFrame:
        """A row per config.

        Columns: number, cost (relative), proxy_val (score on val after the trial), baseline (number of the uniform
        trial nearest in cost, or None), val_mean, val_std, test_mean, test_std (over seeds; std None for a single
        seed), seeds, gain (over the baseline on test, paired by sample: mean, low and high of the 95 % interval, or
        None). Scores are in the metric's unit.
        """
        import pandas as pd

        return pd.DataFrame(self._documents())

    def text_table(self) -> list[dict[str, str]]:
        """The rows as `mpsearch finalize` prints them: column -> text."""
        from mpsearch.search.finals import final_table

        return final_table(self.rows, self.metric)

    def to_json(self) -> dict[str, Any]:
        """What `mpsearch finalize --json` prints."""
        return {
            "metric": self.metric.to_json(),
            "float_val": self.float_val,
            "float_test": self.float_test,
            "rows": self._documents(),
            "tau": dict(self.proxies.tau),
        }

    def _documents(self) -> list[dict[str, Any]]:
        return [
            {"number": row.trial.number, "cost": row.trial.cost, "proxy_val": row.trial.score}
            | {f.name: getattr(row, f.name) for f in fields(row) if f.name not in ("trial", "values", "gain")}
            | {"gain": row.gain and asdict(row.gain)}
            for row in self.rows
        ]


def run(
    study: str | Path | StudySpec,
    out: str | Path | None = None,
    trials: int | None = None,
    time_limit: str | float | None = None,
    set: Sequence[str] = (),
    observer: Observer = SILENT,
) -> RunResult:
    """Run a study: propose, fine-tune and score configs until it has its trials.

    Args:
        study: a shipped study by name, the path of a study file, or a StudySpec.
        out: the run folder, which must not hold a run (default `runs/NAME`).
        trials: number of trials (overrides search.trials).
        time_limit: no new trial starts after this: seconds, or text as 90s, 10m, 2h (overrides search.time_limit_s;
            default: no limit).
        set: `key.path=value` to override values of the study file.
        observer: told when everything is loaded, of the warm start, and of every trial.

    Raises:
        MpsearchError: the study cannot be used, the folder holds a run or is not writable, or the search was given up.
        KeyboardInterrupt: as given; trials that had ended are on the disk, and `resume` goes on.

    >>> import mpsearch
    >>> tiny = ["trial.steps=4", "warm_start.method=none", "warm_start.ilp=false", "warm_start.combinations=0"]
    >>> tiny += ["final.pick=1", "final.epochs=0.1", "final.seeds=1", "engine.address=none"]
    >>> result = mpsearch.run("digits", out="runs/tiny", trials=4, set=tiny)
    >>> sum(result.counts.values()), result.report.name
    (4, 'report.html')
    """
    spec = read_study(study, set)  # before torch is imported: a mistake is answered at once
    path = nameable(out if out is not None else Path("runs") / spec.name)
    from mpsearch.record import RunFolder
    from mpsearch.search.run import run_study
    from mpsearch.study import parse_study

    changes: dict[str, Any] = {}
    if trials is not None:
        changes["trials"] = trials
    if time_limit is not None:
        changes["time_limit_s"] = _seconds(time_limit)
    if changes:
        document = spec.document()
        spec = parse_study(document | {"search": document["search"] | changes})  # checks the changes
    run_study(spec, path, observer)
    return _result(RunFolder.open(path))


def resume(
    run: str | Path, trials: int | None = None, set: Sequence[str] = (), observer: Observer = SILENT
) -> RunResult:
    """Go on with a run that was killed, interrupted or finished; no finished trial is lost or repeated.

    Args:
        run: a run folder.
        trials: number of trials in all, finished ones included (default: the study's search.trials).
        set: values for keys of the run's study that say where files are, how much is searched and where
            (`task.data.root=/new/place`); the run keeps them.
        observer: as for `run`.

    Raises:
        MpsearchError: there is no run, another process drives it, or as `run`.

    >>> import mpsearch
    >>> result = mpsearch.resume("runs/tiny", trials=5)
    >>> sum(result.counts.values())
    5
    """
    from mpsearch.record import RunFolder
    from mpsearch.search.run import resume_study

    resume_study(nameable(run), trials, observer, set)
    return _result(RunFolder.open(run))


def untrusted(run: str | Path) -> tuple[str, ...]:
    """What code opening a run would import that was not made or trusted here: `module:function`s of its study.

    Args:
        run: a run folder.

    Raises:
        MpsearchError: there is no run.
    """
    from mpsearch.record import RunFolder
    from mpsearch.study import read_spec
    from mpsearch.trust import untrusted as unknown

    folder = RunFolder.open(run)
    return unknown(folder, read_spec(folder))


def trust(run: str | Path) -> None:
    """Let a run that was made elsewhere have imported and run what its study names; read that code first.

    It is noted in this user's cache, for this run and all that its task says now.

    Args:
        run: a run folder.

    Raises:
        MpsearchError: there is no run, or the note cannot be written.

    >>> import mpsearch
    >>> mpsearch.trust("runs/tiny")
    """
    from mpsearch.record import RunFolder
    from mpsearch.study import read_spec
    from mpsearch.trust import trust as note

    folder = RunFolder.open(run)
    note(folder, read_spec(folder))


def status(run: str | Path) -> Status:
    """Say how far a run is; works while it runs.

    Args:
        run: a run folder.

    Raises:
        MpsearchError: there is no run, or it cannot be read.

    >>> import mpsearch
    >>> status = mpsearch.status("runs/tiny")
    >>> status.study, status.counts["failed"], len(status.running)
    ('digits', 0, 0)
    """
    from mpsearch.record import RunFolder
    from mpsearch.search.front import pareto_front
    from mpsearch.study import read_spec

    folder = RunFolder.open(run)
    spec, records = read_spec(folder), folder.records()
    return Status(
        study=spec.name,
        trials=spec.search.trials,
        counts=_counts(records),
        running=tuple(folder.running),
        failures=tuple(record for record in records if record.state == "failed"),
        pareto=pareto_front(records, folder.metric),
        hypervolume=folder.written_front.hypervolume,
        prescreened=len({record.config for record in folder.prescreened()}),
        trouble=folder.trouble,
        rungs=dict(sorted(Counter(r.steps for r in records if r.rungs).items())),
    )


def front(run: str | Path) -> Front:
    """Give the Pareto front, and the uniform ladder beside it; works while the run runs.

    Args:
        run: a run folder.

    Raises:
        MpsearchError: there is no run, or it cannot be read.

    >>> import mpsearch
    >>> front = mpsearch.front("runs/tiny")
    >>> bool(front.pareto.best.score == max(front.trials.score))
    True
    >>> front.figure().write_html("front.html")
    """
    from mpsearch.record import RunFolder

    return _front(RunFolder.open(run))


def rank(
    run: str | Path, proxies: str = "kl,sqnr", strata: int = 3, against: Literal["trial", "final"] = "trial"
) -> pd.DataFrame:
    """Say how well each proxy ranks the trials that were fine-tuned: Kendall's tau-b, by stratum of cost.

    Args:
        run: a run folder; it keeps what is measured.
        proxies: sensitivities to measure, separated by commas: kl, jeffreys, sqnr, fit.
        strata: number of groups of about equally many trials, by cost.
        against: what is to be foretold: the score after a `trial`, or the mean on test after the `final` trainings.

    Returns:
        A row per stratum and proxy: `start` (the divergence before training), `additive` (the additive model's, of
        configs it did not see), `before`, `halfway`, `rung N` (the divergence after a rung of N steps, where trials
        train by rungs), `divergence` (after the trial), against final trainings
        `quality` too (of the trial's score), and those measured. Columns: stratum (`all`, or its costs as `0.1-0.25`),
        proxy, tau (1: the same order, 0: none), n (trials), low and high (95 % interval by bootstrap); NaN where
        nothing can be ranked.

    Raises:
        MpsearchError: there is no run, its study cannot be opened, or no such proxy.

    >>> import mpsearch
    >>> taus = mpsearch.rank("runs/tiny", proxies="sqnr", strata=1)
    >>> sorted(taus.proxy)
    ['additive', 'before', 'divergence', 'halfway', 'sqnr', 'start']
    """
    from mpsearch.warmstart.table import check_proxy

    names = [name.strip() for name in proxies.split(",") if name.strip()]
    for name in names:
        check_proxy(name)

    from mpsearch.problem import reopen
    from mpsearch.record import RunFolder
    from mpsearch.warmstart.additive import start_scores
    from mpsearch.warmstart.rank import LEAST_RANKED, SCORES, foreseen_divergence, proxy_tau, trials_frame
    from mpsearch.warmstart.start import sensitivity_table

    folder = RunFolder.open(run)
    problem = reopen(folder)
    tables = [sensitivity_table(name, problem.task, problem.graph, problem.space, folder.warmstart) for name in names]
    records, starts = folder.records(), start_scores(folder.prescreened())
    kl = next((table for table in tables if table.proxy == "kl"), None)
    foreseen = foreseen_divergence(records, starts, problem.space, kl)
    trials = trials_frame(records, problem.metric, tables, foreseen, folder.finals())
    target = {"trial": "quality", "final": "final"}[against]
    if against == "final" and (trials.final.notna()).sum() < LEAST_RANKED:
        raise MpsearchError(
            f"{int(trials.final.notna().sum())} trials of {folder.path} have been finally trained, and {LEAST_RANKED} "
            f"are needed to rank them: `mpsearch finalize {folder.path}` first, or rank against trials"
        )
    columns = [name for name in trials.columns if name not in ("cost", "final", target)]
    return proxy_tau(
        trials,
        columns,
        against=target,
        more_is_better=SCORES,
        strata=strata,
        seed=problem.spec.search.seed,
    )


def finalize(run: str | Path, observer: Observer = SILENT) -> Finals:
    """Train the picked front longer over several seeds, beside its uniform baseline, and score the test split.

    What was trained before an interruption is not trained again. This alone sees test data.

    Args:
        run: a run folder.
        observer: told before each training.

    Raises:
        MpsearchError: there is no run, it has no complete trial, or it cannot be written.

    >>> import mpsearch
    >>> finals = mpsearch.finalize("runs/tiny")
    >>> finals.table.seeds.to_list()[:1]
    [1]
    """
    from mpsearch.problem import reopen
    from mpsearch.record import RunFolder
    from mpsearch.report.write import report_of
    from mpsearch.search.finalize import finalize as train_finally
    from mpsearch.search.finalize import float_scores
    from mpsearch.search.finals import proxies

    folder = RunFolder.open(run)
    problem = reopen(folder)
    rows = train_finally(problem, folder, observer)
    scores = float_scores(problem, folder)
    return Finals(
        tuple(rows), problem.metric, scores["val"], scores["test"], proxies(rows, problem.metric), report_of(folder)
    )


def _result(folder: RunFolder) -> RunResult:
    from mpsearch.report.write import report_of

    front = _front(folder)
    return RunResult(folder.path, front, _counts(front.records), report_of(folder))


def _front(folder: RunFolder) -> Front:
    from mpsearch.facts import read_facts, with_costs
    from mpsearch.search.answer import answer
    from mpsearch.search.front import gains_over_baselines, pareto_front

    records, facts = folder.records(), None
    with contextlib.suppress(MpsearchError):  # an older run, or one that was killed before it had them
        facts = read_facts(folder)
        records = with_costs(records, facts)
    front = pareto_front(records, folder.metric)
    words: Sequence[str] = ()
    if facts is not None and front.trials and facts.space.contains(front.knee.config):
        words = answer(f"Trial {front.knee.number}, the knee", front.knee.config, facts)
    units = {} if facts is None else {name: cost.reference.unit for name, cost in facts.costs.items()}
    return Front(
        front, tuple(records), gains_over_baselines(front), folder.written_front.hypervolume, tuple(words), units
    )


def _counts(records: Sequence[TrialRecord]) -> dict[str, int]:
    return {state: sum(record.state == state for record in records) for state in ("complete", "failed", "stopped")}


def _seconds(limit: str | float) -> float:
    """Seconds of `90s`, `10m`, `2h` or a number."""
    units = {"s": 1, "m": 60, "h": 3600}
    text = str(limit)
    number, unit = (text[:-1], text[-1]) if text and text[-1] in units else (text, "s")
    try:
        seconds = float(number) * units[unit]
    except ValueError:
        seconds = 0
    if not seconds > 0:
        raise MpsearchError(f"--time-limit got '{limit}': write seconds, minutes or hours as 90s, 10m or 2h")
    return seconds
