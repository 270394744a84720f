"""Commands about a study before it runs: check, inspect."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpsearch import api
from mpsearch.cli.base import Json, Set, Study, app
from mpsearch.cli.printing import duration, make_console, make_table, print_json, print_lines
from mpsearch.facts import counted

if TYPE_CHECKING:
    from mpsearch.precision import Precision

_SHOWN = ("1", "2", "3", "4", "6", "8", "3s", "3p")
"""The columns of a sensitivity table, as far as a space has them; `--json` gives all."""


@app.command()
def check(study: Study, set_: Set = None, json_: Json = False) -> None:
    """Say in words what a study would do: what is optimized, how many configs there are, how long a trial takes."""
    checked = api.studies.check(study, set_ or ())
    if json_:
        print_json(checked.to_json())
        return
    search = checked.study.search
    trials = min(search.trials, checked.configs)
    console = make_console()
    for line in checked.summary:
        console.print(line, soft_wrap=True)
    for warning in checked.warnings:
        console.print(f"[yellow]Warning:[/] {warning}", soft_wrap=True, highlight=False)
    console.print(
        f"Float model: {checked.metric.name} {checked.metric.show(checked.float_val)} on val ({checked.float_source})."
    )
    console.print(
        f"One trial should take about {duration(checked.trial_s)} run alone without compilation; "
        f"{counted(trials, 'trial')}, {search.concurrency} at a time, about {duration(checked.search_s)} on "
        f"{counted(os.cpu_count() or 1, 'core')}.",
        soft_wrap=True,
    )
    console.print("\nThe study as it holds:", style="bold")
    console.print(checked.study.to_yaml(), end="", markup=False, highlight=False)


@app.command()
def inspect(
    study: Study,
    sensitivity: Annotated[
        bool,
        typer.Option("--sensitivity", help="Measure what quantizing each tensor alone does, and print its ILP ladder."),
    ] = False,
    proxy: Annotated[
        str | None,
        typer.Option("--proxy", help="How --sensitivity is measured: kl, jeffreys, fit or sqnr (default: kl)."),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option("--samples", min=1, help="Calibration samples from train for --sensitivity (default: 512)."),
    ] = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """List the layers: shapes, MACs, groups, what each may be, and what cannot be quantized and why."""
    inspection = api.studies.inspect(study, sensitivity, proxy, samples, set_ or ())
    if json_:
        print_json(inspection.to_json())
    elif inspection.sensitivities is not None:
        _print_sensitivities(inspection.sensitivities)
    else:
        _print_layers(inspection)


def _print_layers(inspection: api.studies.Inspection) -> None:
    table = make_table("layer", "kind", "weight", ">MACs", "input", "weight precision", "activation precision")
    for layer in inspection.layers.to_dict("records"):
        shape = "x".join(map(str, layer["weight_shape"]))
        if layer["reason"] is not None:
            reason = f"[yellow]float: {layer['reason']}[/]"
            table.add_row(layer["layer"], layer["kind"], shape, f"{layer['macs']:,}", "", reason)
            continue
        shared = "" if layer["input_group"] in ("", layer["layer"]) else f", = {layer['input_group']}"
        table.add_row(
            layer["layer"],
            "depthwise" if layer["depthwise"] else layer["kind"],
            shape,
            f"{layer['macs']:,}",
            ("signed" if layer["signed_input"] else "unsigned") + shared,
            _compact(layer["weight"], "channel"),
            _compact(layer["activation"], "tensor"),
        )
    console = make_console()
    console.print(table)
    for operation, macs in inspection.other_macs.items():
        console.print(f"outside layers: {operation}, {macs:,} MACs, not priced")


def _print_sensitivities(measured: api.studies.Sensitivities) -> None:
    """A table per kind of tensor, and the ILP ladder at the costs of the uniform ladder."""
    from mpsearch.report.tables import MARKS_EXPLAINED, mark

    console = make_console()
    values: dict[Any, float] = {
        (row["layer"], row["tensor"], mark(row["precision"])): row["value"] for row in measured.table.to_dict("records")
    }
    layers = list(dict.fromkeys(layer for layer, _, _ in values))
    for tensor in ("weight", "activation"):
        columns = [short for short in _SHOWN if any((layer, tensor, short) in values for layer in layers)]
        table = make_table(f"{measured.proxy}, {tensor} alone", *(f">{short}" for short in columns))
        for layer in layers:
            row = (values.get((layer, tensor, short)) for short in columns)
            table.add_row(layer, *("" if value is None else f"{value:.1e}" for value in row))
        console.print(table)
    console.print(f"{MARKS_EXPLAINED}; --json gives every width", highlight=False)
    proxy = measured.proxy
    ladder = make_table(
        "budget of", ">cost", f">{proxy}, ILP", f">{proxy}, uniform", ">weight bits", ">activation bits"
    )
    for step in measured.ladder.to_dict("records"):
        ladder.add_row(
            f"uniform {step['uniform_weight_bits']:.1f} / {step['uniform_activation_bits']:.1f} bits, "
            f"{step['budget']:.4f}",
            f"{step['cost']:.4f}",
            f"{step['value']:.3g}",
            f"{step['uniform_value']:.3g}",
            f"{step['weight_bits']:.1f}",
            f"{step['activation_bits']:.1f}",
        )
    console.print(ladder)
    console.print(
        f"{len(values)} entries on {measured.samples} samples in {duration(measured.seconds)}; sums before any "
        "fine-tuning, which repairs much of this",
        highlight=False,
        soft_wrap=True,
    )
    print_lines(measured.notes, console, style="yellow")


def _compact(choices: Sequence[Precision], usual: str) -> str:
    """`uniform:2-8` for a run of bits of one quantizer; a granularity other than the usual one is named."""
    runs: list[list[Precision]] = []
    for choice in sorted(choices, key=lambda c: (c.quantizer, c.granularity, c.bits)):
        last = runs[-1][-1] if runs else None
        if last is not None and (last.quantizer, last.granularity, last.bits + 1) == (
            choice.quantizer,
            choice.granularity,
            choice.bits,
        ):
            runs[-1].append(choice)
        else:
            runs.append([choice])
    texts = [
        str(first) if first.bits == last.bits else f"{first.quantizer}:{first.bits}-{last.bits}/{first.granularity}"
        for first, last in ((run[0], run[-1]) for run in runs)
    ]
    return ", ".join(text.removesuffix(f"/{usual}") for text in texts)
