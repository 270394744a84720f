"""Commands that make or examine one network, without a search: ptq, train, debug."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from mpsearch.cli.base import Json, Set, Study, app, open_study
from mpsearch.cli.printing import duration, make_console, make_table, percent, print_json, print_made
from mpsearch.cli.progress import training_progress
from mpsearch.errors import MpsearchError, RunError, nearest


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

    from mpsearch.exporters import native
    from mpsearch.precision import LayerPrecision
    from mpsearch.ptq.pipeline import BiasCorrection, PtqMethod, Rounding
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
        name = spec.task.model or task.name
        native.save(result.network(name=name, task=task.name, metric=task.metric, accuracy=accuracy), out)
    if json_:
        in_percent = {key: 100 * value for key, value in document.items()}
        print_json({**in_percent, "seconds": result.seconds, "method": asdict(result.method), "notes": result.notes})
        return
    console = make_console()
    table = make_table("", ">val", ">test")
    table.add_row("float", percent(document["float_val"]), percent(document["float_test"]))
    table.add_row(bits, percent(document["val"]), percent(document["test"]))
    console.print(table)
    print_made(result.seconds, result.notes, out)


@app.command()
def train(
    study: Study,
    target: Annotated[
        str,
        typer.Option("--target", help="w4a4, 'apot:4 x uniform:4' (weight x activation), or a precision config's file"),
    ],
    method: Annotated[str, typer.Option("--method", help="qat, or gdnsq (learned bit-widths, uniform only)")] = "qat",
    epochs: Annotated[float, typer.Option("--epochs", min=0.01)] = 5.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="of the batches and of whatever is random")] = 0,
    out: Annotated[Path | None, typer.Option("--out", help="folder for a native export")] = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Train one config, the study's fixed layers aside, and score val and test: no search."""
    from mpsearch.exporters import native
    from mpsearch.exporters.read import read_precisions
    from mpsearch.qat.train import METHODS, train_one

    if method not in METHODS:
        raise MpsearchError(f"unknown method '{method}': {nearest(method, METHODS)}")
    if out is not None and out.exists():
        raise MpsearchError(f"{out} exists already: give --out a folder that does not")
    _, problem = open_study(study, set_)
    with training_progress(f"{method} {target}") as on_step:
        result = train_one(problem, read_precisions(target), method, epochs, seed, on_step)
    trained, task = result.trained, problem.task
    document = {f"float_{split}": result.float_accuracy[split] for split in ("val", "test")} | {
        split: result.accuracy[split] for split in ("val", "test")
    }
    if out is not None:
        name = problem.spec.task.model or task.name
        native.save(trained.network(name=name, task=task.name, metric=task.metric, accuracy=result.accuracy), out)
    if json_:
        in_percent = {key: 100 * value for key, value in document.items()}
        print_json(
            {**in_percent, "cost": result.cost, "seconds": trained.seconds, "notes": trained.notes, "log": trained.log}
        )
        return
    console = make_console()
    table = make_table("", ">val", ">test", ">cost")
    table.add_row("float", percent(document["float_val"]), percent(document["float_test"]), "")
    table.add_row(f"{method} {target}", percent(document["val"]), percent(document["test"]), f"{result.cost:.4f}")
    console.print(table)
    if result.fixed:
        console.print(
            f"as the space fixes them: {', '.join(result.fixed)}", highlight=False, markup=False, soft_wrap=True
        )
    print_made(trained.seconds, trained.notes, out)


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
    percent, points lost as `drop`; mpsearch.debug.measure.document lists the keys.
    """
    from mpsearch.debug.advice import advise, document
    from mpsearch.debug.measure import diagnose
    from mpsearch.exporters.read import read_precisions
    from mpsearch.report.debug_page import STAGE_COLUMNS, stage_rows, summary, write_debug_page
    from mpsearch.study import load_study
    from mpsearch.task.load import load_task
    from mpsearch.task.task import Sampling

    if not out.parent.is_dir() or out.is_dir():
        raise RunError(f"--out got '{out}': give the page as a file in a folder that exists")
    precisions = read_precisions(config)
    task = load_task(load_study(study, set_ or ()).task)
    if isinstance(task, Sampling):  # another task scores all of its validation split
        task = task.sampled(samples)
    progress = make_console(stderr=True)
    found = diagnose(task, precisions, lambda stage: progress.print(stage, style="dim", highlight=False))
    again = ["mpsearch", "debug", study, config, "--samples", str(samples)]
    again += [part for item in set_ or () for part in ("--set", item)]
    page = write_debug_page(out, found, study=study, config=config, commands=[shlex.join(again)])
    if json_:
        print_json({**document(found, study), "page": str(page)})
        return
    console = make_console()
    for line in summary(found):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    table = make_table(*[f">{name}" if index > 1 else name for index, name in enumerate(STAGE_COLUMNS)])
    for row in stage_rows(found):
        table.add_row(*row, style="yellow" if row[1] == "problem" else None)
    console.print(table)
    for line in found.notes:
        console.print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)
    for number, item in enumerate(advise(found, study), start=1):
        console.print(f"{number}. {item.text}", highlight=False, markup=False, soft_wrap=True)
        if item.command:
            console.print(f"   {item.command}", style="dim", highlight=False, markup=False, soft_wrap=True)
    console.print(f"{duration(found.seconds)}; page: {page}", highlight=False, markup=False, soft_wrap=True)
