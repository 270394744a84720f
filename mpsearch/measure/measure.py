"""Measuring a table: every distinct layer of a network at each pair that a runtime has kernels for, and a check.

The check compares the sum of the rows with whole networks, run at once. What a network of one pair takes beyond its
layers (additions, pooling, moving data) is shared out among them, as the row `rest` of that pair: what follows a layer
runs in its precision. What a network whose layers alternate takes beyond its rows is what a change of precision costs.
So those three agree by construction, unless the layers alone take longer than the whole; a fourth, `mixed`, with other
changes, says how far the sum can be trusted. Rows are on the disk as soon as they are
measured: called again, the command goes on. The pairs of a layer are measured in turn, as are the networks, so
that what differs between them is not the hour.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import nn

from mpsearch.errors import HardwareError
from mpsearch.files import write_text
from mpsearch.graph.facts import LayerInfo
from mpsearch.graph.inputs import map_tensors
from mpsearch.hardware.profile import write_profile
from mpsearch.hardware.table import REST, REST_KEY, Key, Pair, Row, Table, key_of, pair_of, read_table, write_table
from mpsearch.measure.runtimes import FLOAT32, W8A8, Runtime, find_runtime
from mpsearch.measure.timing import Clock, Timing, clock_of, device_name, timed_in_turn
from mpsearch.observer import SILENT, Observer
from mpsearch.precision import LayerPrecision
from mpsearch.problem import open_problem
from mpsearch.study import StudySpec

TRUSTED = 0.10
"""Relative error of the sum of the rows up to which it is said to hold."""
CHANGE = "change_us"
ALTERNATING = "alternating"
Whole = tuple[Sequence[LayerPrecision], Timing | str]
"""The precisions of a whole network, and what it takes, or why it could not be run."""
_SAME = ("device", "runtime", "version", "threads")


@dataclass(frozen=True)
class Checked:
    """A whole network against the sum of its layers' rows."""

    name: str  # float, w8a8, alternating or mixed
    whole_us: float | None  # None: it could not be run
    sum_us: float | None
    reason: str = ""

    @property
    def error(self) -> float | None:
        """How far the sum is off, as a share of the whole."""
        return None if self.whole_us is None or self.sum_us is None else self.sum_us / self.whole_us - 1


@dataclass(frozen=True)
class Measured:
    """What came of measuring: the table, what had no kernel, and the check."""

    table: Table
    left_out: tuple[str, ...]
    checks: tuple[Checked, ...]


def measure_study(
    spec: StudySpec,
    runtime: str,
    out: Path,
    threads: int = 1,
    observer: Observer = SILENT,
) -> Measured:
    """Measure the layers of a study's network on this machine and write the table; rows that are there stay.

    Args:
        spec: the study.
        runtime: a name in `RUNTIMES`.
        out: the CSV; a profile is written beside it where there is none.
        threads: that the runtime may use.
        observer: told of each row as of a stage, which is what is measured.

    Raises:
        HardwareError: no such runtime, it is not installed, or the table at `out` is of another machine.
    """
    problem = open_problem(spec)
    run = find_runtime(runtime, threads)
    clock, clock_name = clock_of(threads)
    header = {
        "device": device_name(),
        "runtime": run.name,
        "version": run.version,
        "threads": str(threads),
        "clock": clock_name,
        "date": time.strftime("%Y-%m-%d"),
        "network": problem.task_name,
    }
    table = _begun(out, header)
    model = problem.task.float_model().cpu().eval()
    modules = dict(model.named_modules())
    layers = [layer for layer in problem.graph.layers if layer.name in modules]
    plan = {key_of(layer): (layer, run.pairs(layer)) for layer in layers}
    left_out = tuple(f"{layer.name} ({layer.kind})" for layer in problem.graph.layers if not run.pairs(layer))
    nothing = [empty for empty in (run.empty(),) if empty is not None]  # what calling takes is no layer's
    for done, (key, (layer, pairs)) in enumerate(plan.items()):
        observer.on_stage(f"{layer.name} ({layer.kind})", done, len(plan))
        missing = [pair for pair in pairs if (key, pair_of(pair)) not in table.rows]
        each = [run.layer(layer, modules[layer.name], pair) for pair in missing]
        timings = timed_in_turn([*nothing, *(once for once, _ in each)], clock) if each else []
        of_call = sum(timing.median_us for timing in timings[: len(nothing)])
        for pair, (_, share), timing in zip(missing, each, timings[len(nothing) :], strict=bool(each)):
            least = timing.median_us / 100
            of_layer = replace(timing, median_us=max(least, (timing.median_us - of_call) * share))
            table = _with(table, (key, pair_of(pair)), of_layer, out)
    observer.on_stage("the whole network", len(plan), len(plan))
    x = map_tensors(lambda tensor: tensor[:1].cpu(), problem.task.calibration_input(1))
    wholes = _wholes(run, model, x, layers, clock)
    table = _with_change(_with_rest(table, layers, wholes), layers, wholes)
    checks = tuple(_check(name, table, layers, *whole) for name, whole in wholes.items())
    said = {f"check {c.name}": _said(c) for c in checks}
    table = replace(table, header={**table.header, **said})
    write_text(out, write_table(table))
    about = f"{run.name} {run.version} on {table.header['device']}, {table.header['threads']} threads."
    source = (
        f"measured by `mpsearch measure` on {table.header.get('date', '')}; what is not in the table is not allowed"
    )
    write_profile(out, about, source, change=float(table.header.get(CHANGE, "0")))
    return Measured(table, left_out, checks)


def _wholes(run: Runtime, model: nn.Module, x: Any, layers: Sequence[LayerInfo], clock: Clock) -> dict[str, Whole]:
    """Whole networks to compare with, and what each takes."""
    calls: dict[str, Callable[[], object]] = {}
    reasons: dict[str, str] = {}
    configs = dict(_configs(run, layers))
    for name, precisions in configs.items():
        try:
            call = run.network(model, x, precisions)
            call()
            calls[name] = call
        except HardwareError as reason:
            reasons[name] = str(reason)
        except Exception as error:  # of whatever exporter or runtime: the rows are worth having all the same
            reasons[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    timings = dict(zip(calls, timed_in_turn([*calls.values()], clock), strict=True)) if calls else {}
    return {name: (configs[name], timings[name] if name in timings else reasons[name]) for name in configs}


def _begun(out: Path, header: Mapping[str, str]) -> Table:
    if not out.exists():
        return Table({}, header, str(out))
    table = read_table(out)
    if other := [name for name in _SAME if table.header.get(name) != header[name]]:
        now = ", ".join(f"{name} was {table.header.get(name)!r} and is {header[name]!r}" for name in other)
        raise HardwareError(f"{out} was measured otherwise ({now}): give another -o, or remove the file")
    return table


def _with(table: Table, place: tuple[Key, Pair], timing: Timing, out: Path) -> Table:
    row = Row(timing.median_us, timing.mad_us, timing.n)
    table = replace(table, rows={**table.rows, place: row})
    write_text(out, write_table(table))
    return table


def _configs(run: Runtime, layers: Sequence[LayerInfo]) -> Iterator[tuple[str, list[LayerPrecision]]]:
    """Whole networks: float, W8A8 wherever there is a kernel, both in turn, and two of three layers of W8A8."""
    called = [layer for layer in layers for _ in range(layer.calls)]
    yield "float", [FLOAT32 for _ in called]
    reduced = [max(run.pairs(layer), key=lambda pair: pair != FLOAT32, default=FLOAT32) for layer in called]
    if any(pair != FLOAT32 for pair in reduced):
        low = next(pair for pair in reduced if pair != FLOAT32)
        yield ("w8a8" if low == W8A8 else str(low.weight)), reduced
        yield ALTERNATING, [pair if i % 2 == 0 else FLOAT32 for i, pair in enumerate(reduced)]
        yield "mixed", [pair if i % 3 else FLOAT32 for i, pair in enumerate(reduced)]


def _with_rest(table: Table, layers: Sequence[LayerInfo], wholes: Mapping[str, Whole]) -> Table:
    """The table with what a network of one pair takes beside its layers, for each of them."""
    table = replace(table, rows=_layers_only(table))
    rows = dict(table.rows)
    for precisions, whole in wholes.values():
        total = _sum(table, layers, precisions)
        if isinstance(whole, str) or total is None or len(set(precisions)) > 1:
            continue
        count = len(precisions)
        beside = max(0.0, whole.median_us - total) / count
        rows[REST_KEY, pair_of(precisions[0])] = Row(beside, whole.mad_us / count, whole.n)
    return replace(table, rows=rows)


def _with_change(table: Table, layers: Sequence[LayerInfo], wholes: Mapping[str, Whole]) -> Table:
    """The table with what a change of precision from a layer to the next costs in its header; 0 where none was run."""
    table = replace(table, header={**table.header, CHANGE: "0"})
    precisions, whole = wholes.get(ALTERNATING, ((), "there is no other pair"))
    total, changes = _sum(table, layers, precisions) if precisions else None, _changes(precisions)
    if isinstance(whole, str) or total is None or not changes:
        return table
    each = max(0.0, whole.median_us - total) / changes
    return replace(table, header={**table.header, CHANGE: f"{each:.4g}"})


def _changes(precisions: Sequence[LayerPrecision]) -> int:
    return sum(a.activation != b.activation for a, b in pairwise(precisions))


def _layers_only(table: Table) -> dict[tuple[Key, Pair], Row]:
    return {place: row for place, row in table.rows.items() if place[0][0] != REST}


def _sum(table: Table, layers: Sequence[LayerInfo], precisions: Sequence[LayerPrecision]) -> float | None:
    """What the table says of a network, each call of a layer counted; None where a row is missing."""
    called = [layer for layer in layers for _ in range(layer.calls)]
    rows = [table.row(layer, pair) for layer, pair in zip(called, precisions, strict=True)]
    beside = sum(map(table.rest_us, precisions))
    if any(row is None for row in rows):
        return None
    of_changes = _changes(precisions) * float(table.header.get(CHANGE, "0"))
    return sum(row.median_us for row in rows if row is not None) + beside + of_changes


def _check(
    name: str, table: Table, layers: Sequence[LayerInfo], precisions: Sequence[LayerPrecision], whole: Timing | str
) -> Checked:
    if isinstance(whole, str):
        return Checked(name, None, None, whole)
    total = _sum(table, layers, precisions)
    return Checked(name, whole.median_us, total, "" if total is not None else "some layers have no row")


def _said(check: Checked) -> str:
    if check.error is None:
        return f"not checked, as {check.reason}"
    return f"whole {check.whole_us:.4g} us, sum {check.sum_us:.4g} us, {check.error:+.1%}"
