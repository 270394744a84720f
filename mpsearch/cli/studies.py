"""Commands about a study before it runs: check, inspect."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mpsearch import api
from mpsearch.cli.base import Json, Set, Study, app
from mpsearch.cli.printing import (
    duration,
    make_console,
    make_table,
    print_json,
    print_lines,
    print_table,
    print_warnings,
)
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
    print_lines(checked.summary, console)
    print_warnings(checked.warnings, console)
    score = f"{checked.metric.name} {checked.metric.show(checked.float_val)}"
    lines = [
        f"Float model: {score} on val ({checked.float_source}).",
        f"One trial should take about {duration(checked.trial_s)} run alone without compilation; "
        f"{counted(trials, 'trial')}, {search.concurrency} at a time, about {duration(checked.search_s)} on "
        f"{counted(os.cpu_count() or 1, 'core')}.",
        "",
    ]
    print_lines(lines, console)
    print_lines(["The study as it holds:"], console, style="bold")
    print_lines(checked.study.to_yaml().rstrip("\n").split("\n"), console)


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
    from rich.styled import Styled

    table = make_table("layer", "kind", "weight", ">MACs", "input", "weight precision", "activation precision")
    for layer in inspection.layers.to_dict("records"):
        shape = "x".join(map(str, layer["weight_shape"]))
        if layer["reason"] is not None:
            reason = Styled(f"float: {layer['reason']}", "yellow")
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
    print_table(table, console)
    others = inspection.other_macs.items()
    print_lines([f"outside layers: {operation}, {macs:,} MACs, not priced" for operation, macs in others], console)


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
        print_table(table, console)
    print_lines([f"{MARKS_EXPLAINED}; --json gives every width"], console)
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
    print_table(ladder, console)
    measuring = f"{len(values)} entries on {measured.samples} samples in {duration(measured.seconds)}"
    print_lines([f"{measuring}; sums before any fine-tuning, which repairs much of this"], console)
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
