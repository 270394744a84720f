"""Commands that run a study and say how it goes: run, resume, status, front, rank, finalize."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mpsearch import api
from mpsearch.cli.base import Json, Run, Set, Study, Trust, app, ask_for_trust, exit_code, how_it_ended, no_dead_link
from mpsearch.cli.printing import (
    duration,
    make_console,
    make_table,
    print_csv,
    print_error,
    print_json,
    print_lines,
    print_table,
)
from mpsearch.cli.progress import FinalProgress, RunProgress
from mpsearch.cli.text import visible
from mpsearch.errors import RunError
from mpsearch.units import show

if TYPE_CHECKING:
    from rich.table import Table


@app.command()
def run(
    study: Study,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Run folder, which is made (default: runs/NAME).", callback=no_dead_link),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option("--trials", min=1, help="Number of trials (overrides search.trials; default: the study's)."),
    ] = None,
    time_limit: Annotated[
        str | None,
        typer.Option(
            "--time-limit",
            help="Time after which no new trial starts, as 90s, 10m or 2h (overrides search.time_limit_s; default: "
            "the study's).",
        ),
    ] = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Run a study: propose, fine-tune and score configs, and print the Pareto front."""
    _follow(lambda progress: api.runs.run(study, out, trials, time_limit, set_ or (), progress), json_)


@app.command()
def resume(
    run: Run,
    trials: Annotated[
        int | None,
        typer.Option("--trials", min=1, help="Number of trials in all, finished ones included (default: the study's)."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Value for one key of the run's study, as task.data.root=/new/place; only keys that say where files "
            "are or how much is searched; may be repeated, and is kept (default: the run's values).",
        ),
    ] = None,
    trust: Trust = False,
    json_: Json = False,
) -> None:
    """Go on with a run that was killed, interrupted or finished; no finished trial is lost or repeated."""
    ask_for_trust(run, trust)
    _follow(lambda progress: api.runs.resume(run, trials, set_ or (), progress), json_)


@app.command()
def status(run: Run, json_: Json = False) -> None:
    """Say how far a run is; works while it runs."""
    status = api.runs.status(run)
    if json_:
        print_json(status.to_json())
        return
    console = make_console()
    lines = [
        f"{status.study}: {status.counts['complete']} of {status.trials} trials complete, "
        f"{status.counts['failed']} failed, {status.counts['stopped']} stopped, {len(status.running)} running"
        + (f", {status.prescreened} untrained configs scored" if status.prescreened else "")
    ]
    if status.rungs:
        ended = ", ".join(f"{count} to {steps}" for steps, count in status.rungs.items())
        lines.append(f"  complete trials by the training steps that they had: {ended}")
    print_lines(lines, console)
    if status.trouble:
        print_lines([f"  {status.trouble}"], console, style="yellow")
    for trial in status.running:
        runs_s = max(0.0, time.time() - trial.started_s)
        rung = f", rung {trial.rung + 1}" if status.rungs else ""
        line = f"  trial {trial.number} ({trial.origin}){rung}, cost {trial.cost:.3f}, for {duration(runs_s)}"
        print_lines([line], console)
    failed = [f"  trial {record.number} failed: {record.reason}" for record in status.failures[-5:]]
    print_lines(failed, console, style="yellow")
    if status.pareto.trials:
        best, metric = status.pareto.best, status.pareto.metric
        reached = f"best: trial {best.number}, {metric.name} {metric.show(best.score)} at cost {best.cost:.3f}"
        print_lines([f"{reached}; {len(status.pareto)} on front"], console)


@app.command()
def front(
    run: Run,
    json_: Json = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV for spreadsheets instead of text.")] = False,
    costs: Annotated[bool, typer.Option("--costs", help="Print every cost of each trial, in its unit.")] = False,
) -> None:
    """Print the Pareto front, and the uniform ladder beside it."""
    front = api.runs.front(run)
    if csv:
        print_csv(front.table[front.table.on_front])
    elif json_:
        print_json(front.to_json())
    else:
        _print_front(front, costs)
        print_lines(front.answer)


@app.command()
def rank(
    run: Run,
    proxies: Annotated[
        str, typer.Option("--proxies", help="Sensitivities to measure, with commas: kl, jeffreys, sqnr, fit.")
    ] = "kl,sqnr",
    strata: Annotated[
        int, typer.Option("--strata", min=1, help="Number of groups of about equally many trials, by cost.")
    ] = 3,
    against: Annotated[
        Literal["trial", "final"],
        typer.Option(
            "--against", help="What a proxy should predict: the score after a trial, or the test score after finalize."
        ),
    ] = "trial",
    trust: Trust = False,
    json_: Json = False,
) -> None:
    """Say how well each proxy ranks the trials that were fine-tuned: Kendall's tau, by stratum of cost."""
    ask_for_trust(run, trust)
    taus = api.runs.rank(run, proxies, strata, against)
    if json_:
        print_json({"rows": taus.astype(object).where(taus.notna(), None).to_dict("records")})
        return
    strata_trials = taus.groupby("stratum", sort=False).n.max()
    table = make_table("proxy", *(f">{stratum} ({trials})" for stratum, trials in strata_trials.items()))
    for proxy, rows in taus.groupby("proxy", sort=False):
        if rows.tau.notna().any():
            table.add_row(str(proxy), *map(_tau_text, rows.itertuples()))
    console = make_console()
    print_table(table, console)
    console.print(
        f"Kendall's tau against the score {'on test after final' if against == 'final' else 'after brief'} training, "
        "with its 95 % interval, by relative cost (trials); 1: the same order, 0: none."
    )


@app.command()
def finalize(run: Run, trust: Trust = False, json_: Json = False) -> None:
    """Train the picked front longer over several seeds, beside its uniform baseline, and score the test split."""
    ask_for_trust(run, trust)
    finals = api.runs.finalize(run, FinalProgress())
    if json_:
        print_json(finals.to_json())
        return
    rows = finals.text_table()
    table = make_table(*[name if name in ("origin", "baseline") else f">{name}" for name in rows[0]])
    for row in rows:
        table.add_row(*row.values())
    console = make_console()
    print_table(table, console)
    print_lines(finals.proxies.lines(), console)
    metric = finals.metric
    scores = f"float: {metric.name} on val {metric.show(finals.float_val)}, test {metric.show(finals.float_test)}"
    print_lines([scores, f"report: {finals.report}"], console)


def _follow(search: Callable[[RunProgress], api.runs.RunResult], json_: bool) -> None:
    """Run a search with progress, then print the front and where everything is."""
    progress = RunProgress()
    try:
        result = search(progress)
    except KeyboardInterrupt:
        progress.stop()
        if progress.folder is None:
            raise
        safe = f"{len(progress.folder.records())} finished trials are safe"
        print_error(f"{how_it_ended()}; {safe}, go on with: mpsearch resume {progress.folder.path}")
        sys.exit(exit_code())
    finally:
        progress.stop()
    if json_:
        print_json(result.front.to_json())
        return
    _print_front(result.front)
    others = "".join(f", {result.counts[state]} {state}" for state in ("stopped", "failed") if result.counts[state])
    trials = sum(result.counts.values())
    print_lines([f"{trials} trials{others}; run folder {result.folder}", f"report: {result.report}"])


def _print_front(front: api.runs.Front, costs: bool = False) -> None:
    """The front and the uniform ladder, by rising cost; without pandas, which takes a second to import."""
    pareto, metric = front.pareto, front.pareto.metric
    if not pareto.trials:
        raise RunError("no trial is complete: there is no front yet; see why with `mpsearch status RUN`")
    on_front = {trial.number for trial in pareto}
    dominated = [trial for trial in pareto.ladder if trial.number not in on_front]
    several = any(trial.rungs for trial in (*pareto, *pareto.ladder))  # lengths of training
    columns = [">trial", "origin", f">{metric.name}, val", *([">steps"] if several else []), ">cost"]
    columns += [">weight bits", ">activation bits", ""]
    over = f"over uniform, {metric.difference_unit}" if metric.difference_unit else "over uniform"
    table = make_table(*columns, f"{over} (95 %)")
    for trial in sorted((*pareto, *dominated), key=lambda trial: trial.cost or 0.0):
        weight_bits, activation_bits = trial.config.mean_bits
        table.add_row(
            str(trial.number),
            trial.origin,
            metric.show(trial.score),
            *([str(trial.steps)] if several else []),
            f"{trial.cost:.4f}",
            f"{weight_bits:.1f}",
            f"{activation_bits:.1f}",
            "knee" if trial is pareto.knee else "" if trial.number in on_front else "dominated",
            front.gains.get(trial.number, ""),
            style=None if trial.number in on_front else "dim",
        )
    console = make_console()
    print_table(table, console)
    if costs:
        every = _costs_table(front)
        unbounded = console.options.update_width(10_000)
        wide = console.measure(every, options=unbounded).maximum > console.width
        print_table(_costs_table(front, joint="_\n") if wide else every, console)


def _costs_table(front: api.runs.Front, joint: str = "_") -> Table:
    """Every cost of each trial; `joint` stands for the underscores of the heads, that a narrow table may break them."""
    from rich.text import Text

    metric = front.pareto.metric
    table = make_table(">trial", f">{metric.name}, val")
    for name in front.units:
        table.add_column(Text(visible(name).replace("_", joint)), justify="right", overflow="fold")
    for trial in front.pareto:
        costs = (show(trial.costs[name], unit) if name in trial.costs else "" for name, unit in front.units.items())
        table.add_row(str(trial.number), metric.show(trial.score), *costs)
    return table


def _tau_text(row: Any) -> str:
    return "" if math.isnan(row.tau) else f"{row.tau:+.2f} ({row.low:.1f} to {row.high:.1f})"
