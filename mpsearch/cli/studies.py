"""Commands about a study before it runs: check, inspect."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from mpsearch.cli.base import Json, Set, Study, app, open_study
from mpsearch.cli.printing import duration, make_console, make_table, percent, print_json
from mpsearch.errors import MpsearchError

if TYPE_CHECKING:
    from mpsearch.precision import Precision
    from mpsearch.study import StudySpec

_SHOWN = ("1", "2", "3", "4", "6", "8", "3s", "3p")
"""The columns of a sensitivity table, as far as a space has them; `--json` gives all."""


@app.command()
def check(study: Study, set_: Set = None, json_: Json = False) -> None:
    """Say in words what a study would do: what is optimised, how many configs there are, how long a trial takes."""
    from mpsearch.search.run import estimate_trial_s

    spec, problem = open_study(study, set_)
    trial_s = estimate_trial_s(problem)
    float_val = problem.task.evaluate(problem.task.float_model(), "val")
    total_s = spec.search.trials * trial_s / _parallel(spec)
    if json_:
        print_json(
            {
                "study": spec.model_dump(mode="json"),
                "layers": len(problem.layers),
                "free": len(problem.space.free),
                "configs": problem.space.size,
                "cost": {"cheapest": problem.cheapest, "dearest": problem.dearest, "unit": problem.cost.reference.unit},
                "warnings": problem.warnings(),
                "float_val": float_val,
                "trial_s": trial_s,
                "search_s": total_s,
            }
        )
        return
    console = make_console()
    for line in problem.summary():
        console.print(line, soft_wrap=True)
    for warning in problem.warnings():
        console.print(f"[yellow]Warning:[/] {warning}", soft_wrap=True, highlight=False)
    console.print(
        f"Float model: {percent(float_val)} on val ({getattr(problem.task, 'float_model_source', 'as given')})."
    )
    console.print(
        f"One trial should take about {duration(trial_s)} run alone without compilation; {spec.search.trials} trials, "
        f"{spec.search.concurrency} at a time, about {duration(total_s)} on {os.cpu_count()} cores.",
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
    _, problem = open_study(study, set_)
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
        print_json({"layers": rows, "other_macs": dict(problem.graph.other_macs), "macs": problem.graph.macs})
        return
    table = make_table("layer", "kind", "weight", ">MACs", "input", "weight precision", "activation precision")
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
    console = make_console()
    console.print(table)
    for operation, macs in problem.graph.other_macs.items():
        console.print(f"outside layers: {operation}, {macs:,} MACs, not priced")


def _inspect_sensitivity(study: str, proxy: str, samples: int, set_: Sequence[str] | None, json_: bool) -> None:
    """Print a sensitivity table, and the ILP ladder that it gives at the costs of the uniform ladder."""
    from mpsearch.report.tables import MARKS_EXPLAINED, mark
    from mpsearch.space.choices import TENSORS
    from mpsearch.warmstart.allocate import ilp_ladder
    from mpsearch.warmstart.sensitivity import measure
    from mpsearch.warmstart.table import check_proxy

    check_proxy(proxy)  # before anything is loaded
    spec, problem = open_study(study, set_)
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
        print_json(
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
    console = make_console()
    marked = {(layer, tensor, mark(p)): value for (layer, tensor, p), value in table.items()}
    for tensor in TENSORS:
        columns = [short for short in _SHOWN if any((name, tensor, short) in marked for name in space.layers)]
        values = make_table(f"{proxy}, {tensor} alone", *(f">{short}" for short in columns))
        for name in space.layers:
            row = (marked.get((name, tensor, short)) for short in columns)
            values.add_row(name, *("" if value is None else f"{value:.1e}" for value in row))
        console.print(values)
    console.print(f"{MARKS_EXPLAINED}; --json gives every width", highlight=False)
    ladder_table = make_table(
        "budget of", ">cost", f">{proxy}, ILP", f">{proxy}, uniform", ">weight bits", ">activation bits"
    )
    for rung, step in zip(rungs, steps, strict=True):
        (uniform_w, uniform_a), (bits_w, bits_a) = rung.mean_bits, step.config.mean_bits
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
        f"{len(table)} entries on {table.samples} samples in {duration(table.seconds)}; sums before any fine-tuning, "
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


def _parallel(spec: StudySpec) -> float:
    """How many trials' worth of work is done at a time: concurrency shares the cores, it does not multiply them."""
    return 1.0 if spec.engine.address == "none" else min(spec.search.concurrency, os.cpu_count() or 1)
