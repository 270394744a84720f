"""The commands, and nothing else: each reads its arguments, calls one function and prints what came of it.

Exit codes: 0 done; 2 the input is wrong (one message, no traceback); 1 our fault; 130 interrupted.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpsearch.errors import MpsearchError, RunError, nearest

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from mpsearch.precision import Precision
    from mpsearch.record import RunFolder, TrialRecord
    from mpsearch.search.engine import Event
    from mpsearch.search.run import Problem
    from mpsearch.study import StudySpec

_SHOWN = ("1", "2", "3", "4", "6", "8", "3s", "3p")
"""The columns of a sensitivity table, as far as a space has them; `--json` gives all."""

app = typer.Typer(
    name="mpsearch",
    help="Search the bit-widths and quantizer types of a network's layers: accuracy against hardware cost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Study = Annotated[str, typer.Argument(help="a shipped study by name (digits), or the path of a study file")]
Run = Annotated[Path, typer.Argument(help="a run folder")]
Set = Annotated[list[str] | None, typer.Option("--set", help="KEY.PATH=VALUE over the study file; may be repeated")]
Json = Annotated[bool, typer.Option("--json", help="print JSON for programs instead of a table")]


def main() -> None:
    """The `mpsearch` command."""
    try:
        app(standalone_mode=True)
    except MpsearchError as error:
        print(f"mpsearch: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("mpsearch: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception:
        traceback.print_exc()
        print("mpsearch: this is our fault, not yours: please report it with the lines above", file=sys.stderr)
        sys.exit(1)


@app.command()
def check(study: Study, set_: Set = None, json_: Json = False) -> None:
    """Say in words what a study would do: what is optimised, how many configs there are, how long a trial takes."""
    from mpsearch.search.run import estimate_trial_s

    spec, problem = _open(study, set_)
    trial_s = estimate_trial_s(problem)
    float_val = problem.task.evaluate(problem.task.float_model(), "val")
    total_s = spec.search.trials * trial_s / _parallel(spec)
    if json_:
        _print_json(
            {
                "study": spec.model_dump(mode="json"),
                "layers": len(problem.layers),
                "free": len(problem.space.free),
                "configs": problem.space.size,
                "cost": {"cheapest": problem.cheapest, "dearest": problem.dearest, "unit": problem.cost.reference.unit},
                "doubts": problem.doubts(),
                "float_val": float_val,
                "trial_s": trial_s,
                "search_s": total_s,
            }
        )
        return
    console = _console()
    for line in problem.summary():
        console.print(line, soft_wrap=True)
    for doubt in problem.doubts():
        console.print(f"[yellow]Warning:[/] {doubt}", soft_wrap=True, highlight=False)
    console.print(
        f"Float model: {_percent(float_val)} on val ({getattr(problem.task, 'float_model_source', 'as given')})."
    )
    console.print(
        f"One trial should take about {_duration(trial_s)} run alone without compilation; {spec.search.trials} trials, "
        f"{spec.search.concurrency} at a time, about {_duration(total_s)} on {os.cpu_count()} cores.",
        soft_wrap=True,
    )
    console.print("\nThe study as it holds:", style="bold")
    console.print(spec.to_yaml(), end="", markup=False, highlight=False)


@app.command()
def inspect(
    study: Study,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="what quantizing each tensor alone does, and the ILP ladder from it")
    ] = False,
    proxy: Annotated[
        str | None, typer.Option("--proxy", help="with --sensitivity: kl (default), jeffreys, fit or sqnr")
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", min=1, help="with --sensitivity: of training data; default 512")
    ] = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """List the layers: shapes, MACs, groups, what each may be, and what cannot be quantized and why."""
    if sensitivity:
        _inspect_sensitivity(study, proxy or "kl", samples or 512, set_, json_)
        return
    if proxy is not None or samples is not None:
        raise MpsearchError("--proxy and --samples say how sensitivities are measured: add --sensitivity")
    _, problem = _open(study, set_)
    choices = {(name, slot.tensor): slot for slot in problem.space.slots for name in slot.layers}
    rows = [
        {
            "layer": layer.name,
            "kind": layer.kind,
            "weight_shape": list(layer.weight_shape),
            "input_shape": list(layer.input_shape),
            "macs": layer.macs,
            "params": layer.params,
            "signed_input": layer.signed_input,
            "batch_norm": layer.batch_norm,
            "input_group": layer.input_group,
            "weight_group": layer.weight_group,
            "calls": layer.calls,
            "reason": layer.reason,
            "weight": [str(c) for c in choices[layer.name, "weight"].choices] if layer.reason is None else [],
            "activation": [str(c) for c in choices[layer.name, "activation"].choices] if layer.reason is None else [],
        }
        for layer in problem.graph.layers
    ]
    if json_:
        _print_json({"layers": rows, "other_macs": dict(problem.graph.other_macs), "macs": problem.graph.macs})
        return
    table = _table("layer", "kind", "weight", ">MACs", "input", "weight as", "input as")
    for layer in problem.graph.layers:
        shape = "x".join(map(str, layer.weight_shape))
        if layer.reason is not None:
            table.add_row(layer.name, layer.kind, shape, f"{layer.macs:,}", "", f"[yellow]float: {layer.reason}[/]")
            continue
        shared = "" if layer.input_group in ("", layer.name) else f", = {layer.input_group}"
        table.add_row(
            layer.name,
            "depthwise" if layer.depthwise else layer.kind,
            shape,
            f"{layer.macs:,}",
            ("signed" if layer.signed_input else "unsigned") + shared,
            _compact(choices[layer.name, "weight"].choices, "channel"),
            _compact(choices[layer.name, "activation"].choices, "tensor"),
        )
    console = _console()
    console.print(table)
    for operation, macs in problem.graph.other_macs.items():
        console.print(f"outside layers: {operation}, {macs:,} MACs, not priced")


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
    from mpsearch.search.run import read_spec

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
        _print_json(document)
        return
    console = _console()
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
            f"best: trial {best.number}, {_percent(best.accuracy)} at cost {best.cost:.3f}; {len(front)} on front"
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
        _print_json(_front_document(folder, records))
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
    from mpsearch.record import RunFolder
    from mpsearch.search.run import open_problem, read_spec
    from mpsearch.warmstart.rank import ACCURACIES, proxy_tau, trials_frame
    from mpsearch.warmstart.sensitivity import check_proxy
    from mpsearch.warmstart.start import sensitivity_table

    names = [name.strip() for name in proxies.split(",") if name.strip()]
    for name in names:
        check_proxy(name)
    folder = RunFolder.open(run)
    problem = open_problem(read_spec(folder))
    tables = [sensitivity_table(name, problem.task, problem.graph, problem.space, folder.warmstart) for name in names]
    frame = trials_frame(folder.records(), tables)
    columns = [name for name in frame.columns if name not in ("cost", "accuracy")]
    taus = proxy_tau(frame, columns, more_is_better=ACCURACIES, strata=strata, seed=problem.spec.search.seed)
    if json_:
        _print_json({"rows": taus.astype(object).where(taus.notna(), None).to_dict("records")})
        return
    table = _table("cost", ">trials", *(f">{name}" for name in columns))
    for stratum, rows in taus.groupby("stratum", sort=False):
        by_proxy = {str(row.proxy): row for row in rows.itertuples()}
        cells = [_tau_text(by_proxy[name]) for name in columns]
        table.add_row(str(stratum), str(rows.n.max()), *cells)
    console = _console()
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
    """Train the picked front longer over several seeds, beside its uniform control, and score the test split."""
    from mpsearch.record import RunFolder
    from mpsearch.search.finalize import final_table, proxies
    from mpsearch.search.finalize import finalize as train_finally
    from mpsearch.search.run import open_problem, read_spec

    folder = RunFolder.open(run)
    problem = open_problem(read_spec(folder))
    console = _console(stderr=True)

    def progress(done: int, total: int, trial: TrialRecord, seed: int) -> None:
        console.print(
            f"[{done + 1}/{total}] trial {trial.number} (cost {trial.cost:.3f}), seed {seed}", highlight=False
        )

    rows = train_finally(problem, folder, progress)
    model = problem.task.float_model()
    float_val, float_test = problem.task.evaluate(model, "val"), problem.task.evaluate(model, "test")
    path = _write_report(folder, problem)
    if json_:
        documents = [
            {"number": row.trial.number, "cost": row.trial.cost, "proxy_val": row.trial.accuracy}
            | {f.name: getattr(row, f.name) for f in fields(row) if f.name not in ("trial", "correct", "gain")}
            | {"gain": row.gain and asdict(row.gain)}
            for row in rows
        ]
        _print_json(
            {"float_val": float_val, "float_test": float_test, "rows": documents, "tau": dict(proxies(rows).tau)}
        )
        return
    texts = final_table(rows)
    table = _table(*[name if name in ("origin", "control") else f">{name}" for name in texts[0]])
    for text in texts:
        table.add_row(*text.values())
    out = _console()
    out.print(table)
    for line in proxies(rows).lines():
        out.print(line, highlight=False, soft_wrap=True)
    out.print(f"float: val {_percent(float_val)}, test {_percent(float_test)}", highlight=False)
    out.print(f"report: {path}", highlight=False, soft_wrap=True)


@app.command()
def ptq(
    study: Study,
    bits: Annotated[str, typer.Option("--bits", help="of weights and activations, as w4a8")],
    data_free: Annotated[bool, typer.Option("--data-free", help="quantize from the model alone")] = False,
    rounding: Annotated[str | None, typer.Option("--rounding", help="adaround (default with data) or nearest")] = None,
    bias_correction: Annotated[
        str | None,
        typer.Option("--bias-correction", help="none, analytic or empirical; default: none with adaround, or analytic"),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="of training data, without labels")] = 512,
    out: Annotated[Path | None, typer.Option("--out", help="folder for a native export")] = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Quantize without training (the white paper's PTQ pipeline) and score val and test."""
    from typing import cast

    from mpsearch.precision import LayerPrecision
    from mpsearch.ptq.pipeline import BiasCorrection, PtqMethod, Rounding, save_result
    from mpsearch.ptq.pipeline import ptq as quantize
    from mpsearch.study import load_study
    from mpsearch.task.load import load_task

    precision = LayerPrecision.shorthand(bits)
    method = PtqMethod(
        rounding=cast(Rounding | None, rounding), bias_correction=cast(BiasCorrection | None, bias_correction)
    ).resolved(data_free)
    spec = load_study(study, set_ or ())
    task = load_task(spec.task)
    model = task.float_model()
    result = quantize(model, precision, None if data_free else task.calibration_input(samples), method)
    document: dict[str, Any] = {
        f"{name}{split}": task.evaluate(network, split)
        for name, network in (("float_", model), ("", result.model))
        for split in ("val", "test")
    }
    if out is not None:
        accuracy = {split: document[split] for split in ("val", "test")}
        save_result(
            result, out, name=spec.task.model or task.name, task=task.name, metric=task.metric, accuracy=accuracy
        )
    if json_:
        percent = {key: 100 * value for key, value in document.items()}
        _print_json({**percent, "seconds": result.seconds, "method": asdict(result.method), "notes": result.notes})
        return
    console = _console()
    table = _table("", ">val", ">test")
    table.add_row("float", _percent(document["float_val"]), _percent(document["float_test"]))
    table.add_row(bits, _percent(document["val"]), _percent(document["test"]))
    console.print(table)
    _print_made(result.seconds, result.notes, out)


@app.command()
def train(
    study: Study,
    target: Annotated[
        str, typer.Option("--target", help="w4a4, 'apot:4 x uniform:4' (weight x input), or a precision config's file")
    ],
    method: Annotated[str, typer.Option("--method", help="qat, or gdnsq (learned bit-widths, uniform only)")] = "qat",
    epochs: Annotated[float, typer.Option("--epochs", min=0.01)] = 5.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="of the batches and of whatever is random")] = 0,
    out: Annotated[Path | None, typer.Option("--out", help="folder for a native export")] = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Train one config, the study's fixed layers aside, and score val and test: no search."""
    from mpsearch.qat.train import METHODS, train_one

    if method not in METHODS:
        raise MpsearchError(f"unknown method '{method}': {nearest(method, METHODS)}")
    if out is not None and out.exists():
        raise MpsearchError(f"{out} exists already: give --out a folder that does not")
    _, problem = _open(study, set_)
    with _steps(f"{method} {target}") as on_step:
        result = train_one(problem, target, method, epochs, seed, on_step)
    trained, task = result.trained, problem.task
    document = {f"float_{split}": result.float_accuracy[split] for split in ("val", "test")} | {
        split: result.accuracy[split] for split in ("val", "test")
    }
    if out is not None:
        trained.save(
            out, name=problem.spec.task.model or task.name, task=task.name, metric=task.metric, accuracy=result.accuracy
        )
    if json_:
        percent = {key: 100 * value for key, value in document.items()}
        _print_json(
            {**percent, "cost": result.cost, "seconds": trained.seconds, "notes": trained.notes, "log": trained.log}
        )
        return
    console = _console()
    table = _table("", ">val", ">test", ">cost")
    table.add_row("float", _percent(document["float_val"]), _percent(document["float_test"]), "")
    table.add_row(f"{method} {target}", _percent(document["val"]), _percent(document["test"]), f"{result.cost:.4f}")
    console.print(table)
    held = result.held
    if held:
        console.print(f"as the space fixes them: {', '.join(held)}", highlight=False, markup=False, soft_wrap=True)
    _print_made(trained.seconds, trained.notes, out)


@app.command()
def debug(
    study: Study,
    config: Annotated[str, typer.Argument(help="w4a8, w4a8/tensor, or the path of a precision config in JSON")],
    samples: Annotated[int, typer.Option("--samples", min=1, help="validation images to score, evenly spread")] = 1000,
    out: Annotated[Path, typer.Option("--out", help="the page")] = Path("debug.html"),
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Find where a config loses accuracy (the white paper's debugging flow) and what to try; scores val only.

    Weights or activations, which layers, what their values look like, and which remedies help. JSON: accuracies in
    percent, points lost as `drop`; mpsearch.ptq.debug.document lists the keys.
    """
    from mpsearch.exporters.read import read_precisions
    from mpsearch.ptq.debug import advise, diagnose, document
    from mpsearch.report.debug_page import STAGE_COLUMNS, stage_rows, summary, write_debug_page
    from mpsearch.study import load_study
    from mpsearch.task.classification import ClassificationTask
    from mpsearch.task.load import load_task

    if not out.parent.is_dir() or out.is_dir():
        raise RunError(f"--out got '{out}': give the page as a file in a folder that exists")
    precisions = read_precisions(config)
    task = load_task(load_study(study, set_ or ()).task)
    if isinstance(task, ClassificationTask):  # another task scores all of its validation split
        task = task.sampled(samples)
    progress = _console(stderr=True)
    found = diagnose(task, precisions, lambda stage: progress.print(stage, style="dim", highlight=False))
    again = ["mpsearch", "debug", study, config, "--samples", str(samples)]
    again += [part for item in set_ or () for part in ("--set", item)]
    page = write_debug_page(out, found, study=study, config=config, commands=[shlex.join(again)])
    if json_:
        _print_json({**document(found, study), "page": str(page)})
        return
    console = _console()
    for line in summary(found):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    table = _table(*[f">{name}" if index > 1 else name for index, name in enumerate(STAGE_COLUMNS)])
    for row in stage_rows(found):
        table.add_row(*row, style="yellow" if row[1] == "problem" else None)
    console.print(table)
    for line in found.notes:
        console.print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)
    for number, item in enumerate(advise(found, study), start=1):
        console.print(f"{number}. {item.text}", highlight=False, markup=False, soft_wrap=True)
        if item.command:
            console.print(f"   {item.command}", style="dim", highlight=False, markup=False, soft_wrap=True)
    console.print(f"{_duration(found.seconds)}; page: {page}", highlight=False, markup=False, soft_wrap=True)


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
    from mpsearch.exporters import export_run

    exported, record, measured = export_run(run, pick, to, out, allow_lossy=allow_lossy)
    accuracies = ", ".join(f"{split} {_percent(accuracy)}" for split, accuracy in measured.items())
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
    from mpsearch.record import RunFolder
    from mpsearch.search.front import pareto_front
    from mpsearch.search.run import open_problem, read_spec, score_config

    folder = RunFolder.open(run)
    problem = open_problem(read_spec(folder))
    imported = complete(read_config(config), list(problem.layers))
    left = [name for name, layer in imported.items() if layer.weight.is_float or layer.activation.is_float]
    print(f"{len(imported)} layers, cost {problem.cost(imported):.4f} of {problem.spec.cost.reference}")
    if left:
        print(f"weight or input left float: {', '.join(left[:10])}{', ...' if len(left) > 10 else ''}")
    if out is not None:
        out.write_text(json.dumps({"layers": imported.to_json()}, indent=1) + "\n", encoding="utf-8")
        print(f"written to {out}")
    if score:
        record = score_config(problem, folder, imported)
        place = "on the front" if record in pareto_front(folder.records()).trials else "dominated"
        print(f"trial {record.number}: val {_percent(record.accuracy)}, {place}")


# ---------------------------------------------------------------------------------------------- what commands share


class _Display:
    """Progress of a run: a bar in a terminal, a line per trial elsewhere."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn

        from mpsearch.report.terminal import FrontProgress

        self.console = _console(stderr=True)
        self.progress = FrontProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[best]}"),
            TextColumn("{task.fields[eta]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.problem: Problem | None = None
        self.folder: RunFolder | None = None
        self.ended: list[TrialRecord] = []
        self.earlier = 0
        self.began = time.monotonic()

    def on_ready(self, problem: Problem, folder: RunFolder) -> None:
        """The run starts."""
        self.problem, self.folder = problem, folder
        _log_to(folder)
        self.ended = folder.records()
        self.earlier = len(self.ended)
        self.began = time.monotonic()
        for line in problem.summary():
            self.console.print(line, style="dim", soft_wrap=True, highlight=False)
        for doubt in problem.doubts():
            self.console.print(f"[yellow]Warning:[/] {doubt}", soft_wrap=True, highlight=False)
        self.task = self.progress.add_task(
            problem.spec.name, total=problem.spec.search.trials, completed=self.earlier, best="", eta=""
        )
        self.progress.start()

    def on_progress(self, stage: str, done: int, total: int) -> None:
        """The warm start goes on."""
        self.progress.update(self.task, description=f"warm start: {stage}", completed=done, total=total)
        if done == total:
            took = f"{stage} took {_duration(time.monotonic() - self.began)}"
            self.console.print(took, style="dim", highlight=False)
            self.began = time.monotonic()
            assert self.problem is not None
            name, trials = self.problem.spec.name, self.problem.spec.search.trials
            self.progress.update(self.task, description=name, completed=self.earlier, total=trials)

    def on_event(self, event: Event) -> None:
        """A trial has started or ended."""
        from mpsearch.search.engine import Finished

        if not isinstance(event, Finished) or self.problem is None:
            return
        from mpsearch.report.terminal import sketch
        from mpsearch.search.front import pareto_front

        record = event.record
        self.ended.append(record)
        done, total = len(self.ended), self.problem.spec.search.trials
        new = done - self.earlier
        left_s = (time.monotonic() - self.began) / new * (total - done)
        front = pareto_front(self.ended)
        best = f"best {_percent(front.best.accuracy)}, {len(front)} on the front" if front.trials else ""
        self.progress.sketch = sketch(self.ended)
        self.progress.update(self.task, completed=done, best=best, eta=f"{_duration(left_s)} left")
        if self.progress.disable or record.state == "failed":
            outcome = (
                f"failed: {record.reason}"
                if record.state == "failed"
                else f"{_percent(record.accuracy)} at cost {record.cost:.4f}"
                + (", stopped halfway" if record.state == "stopped" else "")
            )
            self.console.print(
                f"[{done}/{total}] trial {record.number} ({record.origin}): {outcome}, {record.wall.total_s:.1f} s",
                style="yellow" if record.state == "failed" else None,
                highlight=False,
                markup=False,
                soft_wrap=True,
            )


@contextmanager
def _steps(name: str) -> Iterator[Callable[[int, int, float], None]]:
    """Progress of one training: (step, steps, loss) in a terminal, silence elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = _console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        job = progress.add_task(name, total=None, loss=float("nan"))
        yield lambda step, steps, loss: progress.update(job, completed=step + 1, total=steps, loss=loss)


def _follow(search: Any, json_: bool) -> None:
    """Run a search with progress, then print the front and where everything is."""
    display = _Display()
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
    report_path = _write_report(display.folder, display.problem)
    if json_:
        _print_json(_front_document(display.folder, records))
        return
    _print_front(records)
    counts = {state: sum(record.state == state for record in records) for state in ("stopped", "failed")}
    said = "".join(f", {count} {state}" for state, count in counts.items() if count)
    console = _console()
    console.print(
        f"{len(records)} trials{said}; run folder {display.folder.path}",
        highlight=False,
    )
    console.print(f"report: {report_path}", highlight=False, soft_wrap=True)


def _open(study: str, set_: Sequence[str] | None) -> tuple[StudySpec, Problem]:
    from mpsearch.search.run import open_problem
    from mpsearch.study import load_study

    spec = load_study(study, set_ or ())
    return spec, open_problem(spec)


def _write_report(folder: RunFolder, problem: Problem) -> Path:
    from mpsearch.report.write import report_of

    return report_of(folder, problem)


def _front_document(folder: RunFolder, records: Sequence[TrialRecord]) -> dict[str, Any]:
    from mpsearch.search.front import pareto_front
    from mpsearch.search.run import front_rows

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
    from mpsearch.report.tables import trials_table
    from mpsearch.search.front import gains_over_controls

    trials = trials_table(records)
    trials = trials[trials.on_front | ((trials.origin == "uniform") & (trials.state == "complete"))]
    if not trials.on_front.any():
        raise RunError("no trial is complete: there is no front yet; see why with `mpsearch status RUN`")
    gains = gains_over_controls(records)
    table = _table(
        ">trial", "origin", ">accuracy, val", ">cost", ">weight bits", ">input bits", "", "over uniform, points (95 %)"
    )
    for row in trials.sort_values("relative_cost").itertuples():
        table.add_row(
            str(row.number),
            str(row.origin),
            f"{row.accuracy_percent:.2f} %",
            f"{row.relative_cost:.4f}",
            f"{row.weight_bits:.1f}",
            f"{row.activation_bits:.1f}",
            "knee" if row.knee else "" if row.on_front else "dominated",
            gains.get(int(str(row.number)), ""),
            style=None if row.on_front else "dim",
        )
    _console().print(table)


def _log_to(folder: RunFolder) -> None:
    handler = logging.FileHandler(folder.log_txt, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("mpsearch")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    console = Console(stderr=stderr)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 140  # in a file or a pipe nothing has to be cut to 80 columns
    return console


def _table(*columns: str) -> Table:
    """A table without a frame; a column whose name starts with > is aligned right."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    return table


def _print_made(seconds: Mapping[str, float], notes: Sequence[str], out: Path | None) -> None:
    """How long each stage of making a network took, what was left out, and where the network is."""
    console = _console()
    stages = ", ".join(f"{stage} {_duration(spent)}" for stage, spent in seconds.items())
    console.print(stages, highlight=False, soft_wrap=True)
    for note in notes:
        console.print(note, style="yellow", highlight=False, markup=False, soft_wrap=True)
    if out is not None:
        console.print(f"written to {out}", highlight=False, markup=False, soft_wrap=True)


def _print_json(document: Any) -> None:
    print(json.dumps(document, indent=1, allow_nan=False))


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def _ago(started_s: float) -> str:
    return f"for {_duration(max(0.0, time.time() - started_s))}"


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


def _parallel(spec: StudySpec) -> float:
    """How many trials' worth of work is done at a time: concurrency shares the cores, it does not multiply them."""
    return 1.0 if spec.engine.address == "none" else min(spec.search.concurrency, os.cpu_count() or 1)


def _inspect_sensitivity(study: str, proxy: str, samples: int, set_: Sequence[str] | None, json_: bool) -> None:
    """Print a sensitivity table, and the ILP ladder that it gives at the costs of the uniform ladder."""
    from mpsearch.report.tables import MARKS_EXPLAINED, mark, mean_bits
    from mpsearch.space import TENSORS
    from mpsearch.warmstart.allocate import ilp_ladder
    from mpsearch.warmstart.sensitivity import check_proxy, measure

    check_proxy(proxy)  # before anything is loaded
    spec, problem = _open(study, set_)
    task, space, cost = problem.task, problem.space, problem.cost
    x = task.calibration_input(samples)
    table = measure(proxy, task.float_model(), problem.graph.layers, space, x, task.logits)
    budget = math.inf if spec.cost.budget is None else spec.cost.budget
    rungs = [rung for rung in space.ladder() if cost(rung) <= budget]
    steps = ilp_ladder(space, cost, table, [cost(rung) for rung in rungs])
    if json_:
        rows = table.to_frame().to_dict("records")
        ladder = [
            {
                "budget": step.budget,
                "cost": step.cost,
                "value": step.value,
                "uniform_value": _or_none(table.total(rung)),
                "layers": step.config.to_json(),
            }
            for rung, step in zip(rungs, steps, strict=True)
        ]
        _print_json(
            {
                "proxy": proxy,
                "samples": table.samples,
                "seconds": table.seconds,
                "notes": list(table.notes),
                "sensitivity": [{**row, "value": _or_none(row["value"])} for row in rows],
                "ilp_ladder": ladder,
            }
        )
        return
    console = _console()
    marked = {(layer, tensor, mark(p)): value for (layer, tensor, p), value in table.items()}
    for tensor in TENSORS:
        columns = [short for short in _SHOWN if any((name, tensor, short) in marked for name in space.layers)]
        values = _table(f"{proxy}, {tensor} alone", *(f">{short}" for short in columns))
        for name in space.layers:
            row = (marked.get((name, tensor, short)) for short in columns)
            values.add_row(name, *("" if value is None else f"{value:.1e}" for value in row))
        console.print(values)
    console.print(f"{MARKS_EXPLAINED}; --json gives every width", highlight=False)
    ladder_table = _table("budget of", ">cost", f">{proxy}, ILP", f">{proxy}, uniform", ">weight bits", ">input bits")
    for rung, step in zip(rungs, steps, strict=True):
        (uniform_w, uniform_a), (bits_w, bits_a) = mean_bits(rung), mean_bits(step.config)
        uniform_value = table.total(rung)
        ladder_table.add_row(
            f"uniform {uniform_w:.1f} / {uniform_a:.1f} bits, {step.budget:.4f}",
            f"{step.cost:.4f}",
            f"{step.value:.3g}",
            f"{uniform_value:.3g}",
            f"{bits_w:.1f}",
            f"{bits_a:.1f}",
        )
    console.print(ladder_table)
    console.print(
        f"{len(table)} entries on {table.samples} samples in {_duration(table.seconds)}; sums before any fine-tuning, "
        "which repairs much of this",
        highlight=False,
        soft_wrap=True,
    )
    for note in table.notes:
        console.print(note, style="yellow", highlight=False, markup=False, soft_wrap=True)


def _or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def _compact(choices: Sequence[Precision], usual: str) -> str:
    """`uniform:2-8` for a run of bits of one quantizer; a granularity other than the usual one is named."""
    runs: list[list[Precision]] = []
    for choice in sorted(choices, key=lambda c: (c.quantizer, c.granularity, c.bits)):
        if runs and replace(runs[-1][-1], bits=choice.bits) == choice and runs[-1][-1].bits == choice.bits - 1:
            runs[-1].append(choice)
        else:
            runs.append([choice])
    texts = [
        str(first) if first.bits == last.bits else f"{first.quantizer}:{first.bits}-{last.bits}/{first.granularity}"
        for first, last in ((run[0], run[-1]) for run in runs)
    ]
    return ", ".join(text.removesuffix(f"/{usual}") for text in texts)
