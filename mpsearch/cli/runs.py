"""Commands that run a study and say how it goes: run, resume, status, front, rank, finalize."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpsearch.cli.base import Json, Run, Set, Study, app
from mpsearch.cli.printing import duration, make_console, make_table, percent, print_json
from mpsearch.cli.progress import RunProgress
from mpsearch.errors import MpsearchError, RunError

if TYPE_CHECKING:
    from mpsearch.record import RunFolder, TrialRecord


@app.command()
def run(
    study: Study,
    out: Annotated[Path | None, typer.Option("--out", help="run folder; default runs/NAME")] = None,
    trials: Annotated[int | None, typer.Option("--trials", min=1, help="over search.trials")] = None,
    time_limit: Annotated[
        str | None, typer.Option("--time-limit", help="no new trial after this: 90s, 10m, 2h")
    ] = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Run a study: propose, fine-tune and score configs, and print the Pareto front."""
    from mpsearch.search.run import run_study
    from mpsearch.study import load_study

    overrides = list(set_ or ())
    if trials is not None:
        overrides.append(f"search.trials={trials}")
    if time_limit is not None:
        overrides.append(f"search.time_limit_s={_seconds(time_limit)}")
    spec = load_study(study, overrides)
    _follow(lambda display: run_study(spec, out, display.on_event, display.on_ready, display.on_progress), json_)


@app.command()
def resume(
    run: Run,
    trials: Annotated[int | None, typer.Option("--trials", min=1, help="wanted in all, finished ones included")] = None,
    json_: Json = False,
) -> None:
    """Go on with a run that was killed, interrupted or finished; no finished trial is lost or repeated."""
    from mpsearch.search.run import resume_study

    _follow(lambda display: resume_study(run, display.on_event, display.on_ready, trials, display.on_progress), json_)


@app.command()
def status(run: Run, json_: Json = False) -> None:
    """Say how far a run is; works while it runs."""
    from mpsearch.record import RunFolder
    from mpsearch.search.front import pareto_front
    from mpsearch.study import read_spec

    folder = RunFolder.open(run)
    spec, records, running = read_spec(folder), folder.records(), folder.running
    front = pareto_front(records)
    counts = {state: sum(r.state == state for r in records) for state in ("complete", "failed", "stopped")}
    document = {
        "study": spec.name,
        "trials": spec.search.trials,
        "completed": counts["complete"],
        "failed": counts["failed"],
        "stopped": counts["stopped"],
        "running": len(running),
        "best": {"number": front.best.number, "accuracy": front.best.accuracy, "cost": front.best.cost}
        if front.trials
        else None,
        "hypervolume": _hypervolume(folder),
    }
    if json_:
        print_json(document)
        return
    console = make_console()
    console.print(
        f"{spec.name}: {counts['complete']} of {spec.search.trials} trials complete, {counts['failed']} failed, "
        f"{counts['stopped']} stopped, {len(running)} running"
    )
    for trial in running:
        console.print(f"  trial {trial.number} ({trial.origin}), cost {trial.cost:.3f}, {_ago(trial.started_s)}")
    for record in [r for r in records if r.state == "failed"][-5:]:
        console.print(f"  trial {record.number} failed: {record.reason}", style="yellow", soft_wrap=True)
    if front.trials:
        best = front.best
        console.print(
            f"best: trial {best.number}, {percent(best.accuracy)} at cost {best.cost:.3f}; {len(front)} on front"
        )


@app.command()
def front(
    run: Run,
    json_: Json = False,
    csv: Annotated[bool, typer.Option("--csv", help="print CSV")] = False,
) -> None:
    """Print the Pareto front, and the uniform ladder beside it."""
    from mpsearch.record import RunFolder

    folder = RunFolder.open(run)
    records = folder.records()
    if csv:
        from mpsearch.report.tables import front_table

        print(front_table(records).to_csv(index=False), end="")
    elif json_:
        print_json(_front_document(folder, records))
    else:
        _print_front(records)


@app.command()
def rank(
    run: Run,
    proxies: Annotated[
        str, typer.Option("--proxies", help="sensitivities to measure: kl, jeffreys, sqnr, fit")
    ] = "kl,sqnr",
    strata: Annotated[int, typer.Option("--strata", min=1, help="of equal numbers of trials, by cost")] = 3,
    json_: Json = False,
) -> None:
    """Say how well each proxy ranks the trials that were fine-tuned: Kendall's tau, by stratum of cost."""
    from mpsearch.problem import reopen
    from mpsearch.record import RunFolder
    from mpsearch.warmstart.rank import ACCURACIES, proxy_tau, trials_frame
    from mpsearch.warmstart.start import sensitivity_table
    from mpsearch.warmstart.table import check_proxy

    names = [name.strip() for name in proxies.split(",") if name.strip()]
    for name in names:
        check_proxy(name)
    folder = RunFolder.open(run)
    problem = reopen(folder)
    tables = [sensitivity_table(name, problem.task, problem.graph, problem.space, folder.warmstart) for name in names]
    frame = trials_frame(folder.records(), tables)
    columns = [name for name in frame.columns if name not in ("cost", "accuracy")]
    taus = proxy_tau(frame, columns, more_is_better=ACCURACIES, strata=strata, seed=problem.spec.search.seed)
    if json_:
        print_json({"rows": taus.astype(object).where(taus.notna(), None).to_dict("records")})
        return
    table = make_table("cost", ">trials", *(f">{name}" for name in columns))
    for stratum, rows in taus.groupby("stratum", sort=False):
        by_proxy = {str(row.proxy): row for row in rows.itertuples()}
        cells = [_tau_text(by_proxy[name]) for name in columns]
        table.add_row(str(stratum), str(rows.n.max()), *cells)
    console = make_console()
    console.print(table)
    console.print(
        "Kendall's tau against the accuracy after fine-tuning, with its 95 % interval; 1: the same order, 0: none.",
        highlight=False,
    )


def _tau_text(row: Any) -> str:
    return "" if math.isnan(row.tau) else f"{row.tau:+.2f} ({row.low:.1f} to {row.high:.1f})"


@app.command()
def finalize(
    run: Run,
    json_: Json = False,
) -> None:
    """Train the picked front longer over several seeds, beside its uniform baseline, and score the test split."""
    from mpsearch.problem import reopen
    from mpsearch.record import RunFolder
    from mpsearch.report.write import report_of
    from mpsearch.search.finalize import finalize as train_finally
    from mpsearch.search.finalize import float_scores
    from mpsearch.search.finals import final_table, proxies

    folder = RunFolder.open(run)
    problem = reopen(folder)
    console = make_console(stderr=True)

    def progress(done: int, total: int, trial: TrialRecord, seed: int) -> None:
        console.print(
            f"[{done + 1}/{total}] trial {trial.number} (cost {trial.cost:.3f}), seed {seed}", highlight=False
        )

    rows = train_finally(problem, folder, progress)
    float_val, float_test = (float_scores(problem, folder)[split] for split in ("val", "test"))
    path = report_of(folder)
    if json_:
        documents = [
            {"number": row.trial.number, "cost": row.trial.cost, "proxy_val": row.trial.accuracy}
            | {f.name: getattr(row, f.name) for f in fields(row) if f.name not in ("trial", "correct", "gain")}
            | {"gain": row.gain and asdict(row.gain)}
            for row in rows
        ]
        print_json(
            {"float_val": float_val, "float_test": float_test, "rows": documents, "tau": dict(proxies(rows).tau)}
        )
        return
    texts = final_table(rows)
    table = make_table(*[name if name in ("origin", "baseline") else f">{name}" for name in texts[0]])
    for text in texts:
        table.add_row(*text.values())
    out = make_console()
    out.print(table)
    for line in proxies(rows).lines():
        out.print(line, highlight=False, soft_wrap=True)
    out.print(f"float: val {percent(float_val)}, test {percent(float_test)}", highlight=False)
    out.print(f"report: {path}", highlight=False, soft_wrap=True)


def _follow(search: Callable[[RunProgress], object], json_: bool) -> None:
    """Run a search with progress, then print the front and where everything is."""
    from mpsearch.report.write import report_of

    display = RunProgress()
    try:
        search(display)
    except KeyboardInterrupt:
        display.progress.stop()
        if display.folder is not None:
            print(
                f"mpsearch: interrupted; {len(display.folder.records())} finished trials are safe, go on with: "
                f"mpsearch resume {display.folder.path}",
                file=sys.stderr,
            )
            sys.exit(130)
        raise
    finally:
        display.progress.stop()
    assert display.folder is not None
    assert display.problem is not None
    records = display.folder.records()
    report_path = report_of(display.folder, display.problem)
    if json_:
        print_json(_front_document(display.folder, records))
        return
    _print_front(records)
    counts = {state: sum(record.state == state for record in records) for state in ("stopped", "failed")}
    said = "".join(f", {count} {state}" for state, count in counts.items() if count)
    console = make_console()
    console.print(
        f"{len(records)} trials{said}; run folder {display.folder.path}",
        highlight=False,
    )
    console.print(f"report: {report_path}", highlight=False, soft_wrap=True)


def _front_document(folder: RunFolder, records: Sequence[TrialRecord]) -> dict[str, Any]:
    from mpsearch.search.front import front_rows, pareto_front

    front = pareto_front(records)
    return {
        "hypervolume": _hypervolume(folder),
        "front": front_rows(front),
        "uniform": [{"number": t.number, "accuracy": t.accuracy, "cost": t.cost} for t in front.ladder],
    }


def _hypervolume(folder: RunFolder) -> float | None:
    """Of the front as last written; None before that."""
    try:
        document = json.loads(folder.front_json.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    value = document.get("hypervolume")
    return float(value) if isinstance(value, int | float) else None


def _print_front(records: Sequence[TrialRecord]) -> None:
    from mpsearch.search.front import gains_over_baselines, objectives, pareto_front

    front = pareto_front(records)
    if not front.trials:
        raise RunError("no trial is complete: there is no front yet; see why with `mpsearch status RUN`")
    gains = gains_over_baselines(records)
    on_front = {trial.number for trial in front}
    dominated = [trial for trial in front.ladder if trial.number not in on_front]
    table = make_table(
        ">trial",
        "origin",
        ">accuracy, val",
        ">cost",
        ">weight bits",
        ">activation bits",
        "",
        "over uniform, points (95 %)",
    )
    for trial in sorted((*front, *dominated), key=lambda trial: objectives(trial)[1]):
        accuracy, cost = objectives(trial)
        weight_bits, activation_bits = trial.config.mean_bits
        table.add_row(
            str(trial.number),
            trial.origin,
            percent(accuracy),
            f"{cost:.4f}",
            f"{weight_bits:.1f}",
            f"{activation_bits:.1f}",
            "knee" if trial is front.knee else "" if trial.number in on_front else "dominated",
            gains.get(trial.number, ""),
            style=None if trial.number in on_front else "dim",
        )
    make_console().print(table)


def _ago(started_s: float) -> str:
    return f"for {duration(max(0.0, time.time() - started_s))}"


def _seconds(text: str) -> float:
    units = {"s": 1, "m": 60, "h": 3600}
    number, unit = (text[:-1], text[-1]) if text and text[-1] in units else (text, "s")
    try:
        seconds = float(number) * units[unit]
    except ValueError:
        seconds = 0
    if not seconds > 0:
        raise MpsearchError(f"--time-limit got '{text}': write seconds, minutes or hours as 90s, 10m or 2h")
    return seconds
