"""Commands that make or examine one network, without a search: ptq, train, debug."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mpsearch import api
from mpsearch.cli.base import Json, Set, Study, app, outside_runs
from mpsearch.cli.printing import duration, make_console, make_table, print_json, print_lines, print_table
from mpsearch.cli.progress import StageProgress, training_progress

Out = Annotated[
    Path | None,
    typer.Option("--out", help="Folder for a native export (default: none is written).", callback=outside_runs),
]


@app.command()
def ptq(
    study: Study,
    bits: Annotated[str, typer.Option("--bits", help="Bits of weights and activations, as w4a8.")],
    data_free: Annotated[
        bool, typer.Option("--data-free", help="Quantize from the model alone, without calibration samples.")
    ] = False,
    rounding: Annotated[
        str | None,
        typer.Option(
            "--rounding",
            help="How weights are rounded: adaround or nearest (default: adaround with data, else nearest).",
        ),
    ] = None,
    bias_correction: Annotated[
        str | None,
        typer.Option(
            "--bias-correction",
            help="How biases are corrected: none, analytic or empirical (default: none with adaround, else analytic).",
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", min=1, help="Number of unlabelled calibration samples from train.")
    ] = 512,
    out: Out = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Quantize without training (the white paper's PTQ pipeline) and score val and test."""
    result = api.networks.ptq(study, bits, data_free, rounding, bias_correction, samples, out, set_ or ())
    if json_:
        print_json(result.to_json())
        return
    show = result.metric.show
    table = make_table(result.metric.name, ">val", ">test")
    table.add_row("float", *(show(result.float_scores[split]) for split in ("val", "test")))
    table.add_row(bits, *(show(result.scores[split]) for split in ("val", "test")))
    print_table(table)
    _print_made(result)


@app.command()
def train(
    study: Study,
    target: Annotated[
        str,
        typer.Option(
            "--target", help="Precision: w4a4, 'apot:4 x uniform:4' (weight x activation), or the path of a config."
        ),
    ],
    method: Annotated[
        str, typer.Option("--method", help="Training method: qat, or gdnsq (learned bit-widths, uniform only).")
    ] = "qat",
    epochs: Annotated[float, typer.Option("--epochs", min=0.01, help="Passes over the training data.")] = 5.0,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Seed of the batches and of everything else that is random.")
    ] = 0,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            help="Training recipe: mhaq, that of GDNSQ's authors, which takes some thousands of steps (default: ours, "
            "which takes a few epochs).",
        ),
    ] = None,
    out: Out = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Train one config without a search and score val and test; layers that the space fixes keep their precision."""
    name = f"{method} {target}" if recipe is None else f"{method} {target}, {recipe}'s recipe"
    with training_progress(name) as progress:
        result = api.networks.train(study, target, method, epochs, seed, recipe, out, set_ or (), progress)
    if json_:
        print_json(result.to_json())
        return
    show = result.metric.show
    table = make_table(result.metric.name, ">val", ">test", ">cost")
    table.add_row("float", *(show(result.float_scores[split]) for split in ("val", "test")), "")
    scores = (show(result.scores[split]) for split in ("val", "test"))
    table.add_row(f"{method} {target}", *scores, f"{result.cost:.4f}")
    print_table(table)
    if result.fixed:
        print_lines([f"as the space fixes them: {', '.join(result.fixed)}"])
    _print_made(result)


@app.command()
def debug(
    study: Study,
    config: Annotated[
        str, typer.Argument(help="w4a8, w4a8/tensor, w4a8/group128, or the path of a precision config in JSON.")
    ],
    samples: Annotated[
        int, typer.Option("--samples", min=1, help="Number of validation samples to score, evenly spread.")
    ] = 1000,
    out: Annotated[Path, typer.Option("--out", help="HTML page to write.", callback=outside_runs)] = Path("debug.html"),
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Find where a config loses its score (the white paper's debugging flow) and what to try; scores val only.

    Weights or activations, which layers, what their values look like, and which remedies help. JSON:
    mpsearch.debug.advice.document lists the keys.
    """
    result = api.networks.debug(study, config, samples, out, set_ or (), StageProgress())
    if json_:
        print_json(result.to_json())
        return
    console = make_console()
    print_lines(result.summary(), console)
    rows = [list(row.values()) for row in result.text_table()]
    columns = list(result.text_table()[0])
    table = make_table(*columns[:2], *(f">{name}" for name in columns[2:]))
    for row in rows:
        table.add_row(*row, style="yellow" if row[1] == "problem" else None)
    print_table(table, console)
    print_lines(result.diagnosis.notes, console, style="yellow")
    for number, advice in enumerate(result.advice, start=1):
        print_lines([f"{number}. {advice.text}"], console)
        if advice.command:
            print_lines([f"   {advice.command}"], console, style="dim")
    print_lines([f"{duration(result.diagnosis.seconds)}; page: {result.page}"], console)


def _print_made(result: api.networks.ScoredNetwork) -> None:
    """How long each stage of making a network took, what was left out, and where the network is."""
    console = make_console()
    print_lines([", ".join(f"{stage} {duration(spent)}" for stage, spent in result.seconds.items())], console)
    print_lines(result.notes, console, style="yellow")
    if result.path is not None:
        print_lines([f"written to {result.path}"], console)
