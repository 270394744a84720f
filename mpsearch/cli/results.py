"""Commands that show a run and carry configs out of it and into it: report, dashboard, export, import."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from mpsearch.cli.base import Run, app
from mpsearch.cli.printing import percent
from mpsearch.files import write_json


@app.command()
def report(
    run: Run,
    watch: Annotated[
        bool, typer.Option("--watch", help="write it again after every trial, while the run runs")
    ] = False,
) -> None:
    """Write `report.html` in the run folder: one file that opens without a network."""
    from mpsearch.record import RunFolder
    from mpsearch.report import write

    folder = RunFolder.open(run)
    if not watch:
        print(write.report_of(folder))
        return
    for path in write.watch(folder):
        print(f"{time.strftime('%H:%M:%S')} {path}", flush=True)


@app.command()
def dashboard(
    target: Annotated[str, typer.Argument(metavar="RUN", help="a run folder, or the URL of an Optuna storage")],
    host: Annotated[str, typer.Option("--host", help="address to listen on; beyond this machine: with --token")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any that is free")] = 8080,
    token: Annotated[
        str | None, typer.Option("--token", envvar="MPSEARCH_DASHBOARD_TOKEN", help="what visitors must give")
    ] = None,
    browser: Annotated[bool, typer.Option("--open/--no-open", help="open it in the browser")] = True,
) -> None:
    """Show a run in the Optuna dashboard, also while it runs: figures, notes, every trial's config and charts."""
    from mpsearch.report.dashboard import show

    show(target, host, port, token, browser)


@app.command()
def export(
    run: Run,
    out: Annotated[Path, typer.Option("-o", "--out", help="folder to write")],
    pick: Annotated[str, typer.Option("--pick", help="knee, best, trial:7, cost<=0.5, accuracy>=0.87")] = "knee",
    to: Annotated[str, typer.Option("--to", help="format: native, packed, ...; the README lists them")] = "native",
    allow_lossy: Annotated[
        bool, typer.Option("--allow-lossy", help="convert what the format cannot hold, and list it")
    ] = False,
) -> None:
    """Export a config with its weights and scales."""
    from mpsearch.exporters.run import export_run

    exported, record, measured = export_run(run, pick, to, out, allow_lossy=allow_lossy)
    accuracies = ", ".join(f"{split} {percent(accuracy)}" for split, accuracy in measured.items())
    print(f"trial {record.number}, cost {record.cost:.4f}: {accuracies}; written to {exported.path}")
    for conversion in exported.conversions:
        print(f"converted: {conversion}")


@app.command("import")
def import_(
    run: Run,
    config: Annotated[Path, typer.Argument(help="an export, AIMET encodings, or a table layer -> bits (JSON, YAML)")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="write the config as JSON")] = None,
    score: Annotated[bool, typer.Option("--score/--no-score", help="run it as a trial of the run")] = True,
) -> None:
    """Read a config that was made elsewhere, and score it as a trial: it joins the front if it belongs there."""
    from mpsearch.exporters.read import complete, read_config
    from mpsearch.problem import reopen
    from mpsearch.record import RunFolder
    from mpsearch.search.front import pareto_front
    from mpsearch.search.run import score_config

    folder = RunFolder.open(run)
    problem = reopen(folder)
    imported = complete(read_config(config), list(problem.layers))
    left = [name for name, layer in imported.items() if layer.weight.is_float or layer.activation.is_float]
    print(f"{len(imported)} layers, cost {problem.cost(imported):.4f} of {problem.spec.cost.reference}")
    if left:
        print(f"weight or activation left float: {', '.join(left[:10])}{', ...' if len(left) > 10 else ''}")
    if out is not None:
        write_json(out, {"layers": imported.to_json()})
        print(f"written to {out}")
    if score:
        record = score_config(problem, folder, imported)
        place = "on the front" if record in pareto_front(folder.records()).trials else "dominated"
        print(f"trial {record.number}: val {percent(record.accuracy)}, {place}")
