"""Commands that show a run and carry configs out of it and into it: report, dashboard, export, import."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from mpsearch import api
from mpsearch.cli.base import Run, Trust, app, ask_for_trust, outside_runs
from mpsearch.cli.printing import print_lines
from mpsearch.errors import RunError
from mpsearch.observer import Observer


@app.command()
def report(
    run: Run,
    watch: Annotated[
        bool, typer.Option("--watch", help="Write the report again after every trial, until the run is over.")
    ] = False,
) -> None:
    """Write `report.html` in the run folder: one file that opens without a network."""

    class Timed(Observer):
        def on_report(self, path: Path) -> None:
            print_lines([f"{time.strftime('%H:%M:%S')} {path}" if watch else str(path)])

    api.results.report(run, watch, Timed())


@app.command()
def dashboard(
    run: Annotated[str, typer.Argument(help="A run folder, or the URL of an Optuna storage.")],
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; one beyond this machine needs --token.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 for any free one.")
    ] = 8080,
    token: Annotated[
        str | None,
        typer.Option(
            "--token",
            envvar="MPSEARCH_DASHBOARD_TOKEN",
            help="Access token that a browser has to send (default: none; then only this machine has access).",
        ),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option("--token-file", help="File whose first line is the access token (default: none is read)."),
    ] = None,
    open_: Annotated[bool, typer.Option("--open/--no-open", help="Open it in the browser.")] = True,
) -> None:
    """Show a run in the Optuna dashboard, also while it runs: figures, notes, every trial's config and charts."""
    if token_file is not None:
        token = _first_line(token_file)
    api.results.dashboard(run, host, port, token, open_)


def _first_line(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise RunError(f"--token-file: cannot read '{path}': {getattr(error, 'strerror', None) or error}") from None
    if not lines or not lines[0].strip():
        raise RunError(f"--token-file: '{path}' has no first line: write the secret there")
    return lines[0].strip()


@app.command()
def export(
    run: Run,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.", callback=outside_runs)],
    pick: Annotated[
        str,
        typer.Option(
            "--pick",
            help="Trial to export: knee, best, trial:7, cost<=0.5, by the metric: top1>=0.87, psnr>=28.5, "
            "bpc<=1.2, or by any cost: weight_bytes<=100KiB.",
        ),
    ] = "knee",
    to: Annotated[
        str,
        typer.Option("--to", help="Format: native, packed, onnx, qonnx, brevitas, torchao, modelopt, aimet or mhaq."),
    ] = "native",
    allow_lossy: Annotated[
        bool, typer.Option("--allow-lossy", help="Convert what the format cannot hold, and list it.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Run the export in its own runtime and compare its answers.")
    ] = True,
    trust: Trust = False,
) -> None:
    """Export a config with its weights and scales."""
    ask_for_trust(run, trust)
    exported = api.results.export_run(run, out, pick, to, allow_lossy, verify)
    scores = ", ".join(f"{split} {exported.metric.show(score)}" for split, score in exported.scores.items())
    lines = [f"trial {exported.trial.number}, cost {exported.trial.cost:.4f}: {scores}; written to {exported.path}"]
    lines += [f"converted: {conversion}" for conversion in exported.conversions]
    print_lines([*lines, str(exported.verified)])


@app.command("import")
def import_(
    run: Run,
    source: Annotated[
        Path,
        typer.Argument(
            help="An export, AIMET encodings, a table of bits by layer (JSON or YAML), or a checkpoint of MHAQ."
        ),
    ],
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="YAML that MHAQ was trained with, for a checkpoint of MHAQ (default: the source is a config).",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            help="File to write the config to as JSON (default: none is written).",
            callback=outside_runs,
        ),
    ] = None,
    score: Annotated[bool, typer.Option("--score/--no-score", help="Score it as a trial of the run.")] = True,
    trust: Trust = False,
) -> None:
    """Read a config or a trained network that was made elsewhere, and score it as a trial; it may join the front."""
    ask_for_trust(run, trust)
    imported = api.results.import_config(run, source, config, out, score)
    lines = [f"{len(imported.config)} layers, cost {imported.cost:.4f} of {imported.reference}"]
    if names := imported.left_float:
        lines.append(f"weight or activation left float: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}")
    lines += imported.notes
    if imported.path is not None:
        lines.append(f"written to {imported.path}")
    if imported.trial is not None:
        place = "on the front" if imported.on_front else "dominated"
        lines.append(f"trial {imported.trial.number}: val {imported.metric.show(imported.trial.score)}, {place}")
    print_lines(lines)
