"""What Vela says of a network on an Ethos-U NPU, as rows of a table.

Vela, Arm's compiler, writes `NETWORK_per-layer.csv` when it is asked for `--verbose-performance`: an estimate of the
cycles of each operator of one quantized network, in the columns

    TFLite_operator, NNG Operator, SRAM Usage, Peak%, Op Cycles, Network%, NPU, ..., MAC Count, Network%, Util%, Name

(ethos-u-vela, npu_performance.py; TOSA networks have `TOSA_operator` in front). A network has one pair of precisions,
so that a table of several pairs is made of as many files. Operators are told apart by kind and MACs, in order: a file
of another network, or with an operator that Vela split, does not fit and is refused. What is no layer (pooling,
additions) is shared out among the layers, as the row `rest` of the pair.
"""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mpsearch.errors import HardwareError
from mpsearch.files import read_text, write_text
from mpsearch.graph.facts import LayerInfo, ModelGraph
from mpsearch.hardware.profile import write_profile
from mpsearch.hardware.table import REST_KEY, Key, Pair, Row, Table, key_of, pair_of, read_table, write_table
from mpsearch.precision import LayerPrecision

OPERATORS: Mapping[str, str] = {
    "CONV2D": "conv",
    "DEPTHWISECONV2D": "depthwise",
    "FULLYCONNECTED": "linear",
    "TRANSPOSECONV": "conv_transpose",
    "TRANSPOSECONV2D": "conv_transpose",
    "BATCHMATMUL": "product",
    "MATMUL": "product",
}
"""Operator, without underscores -> the layers that it is; a linear layer of a sequence may be a convolution there."""


@dataclass(frozen=True)
class Operator:
    """A row of Vela's file."""

    kind: str
    cycles: float
    macs: int
    name: str


def read_vela(path: Path) -> list[Operator]:
    """The operators of a file of Vela, in order.

    Raises:
        HardwareError: it cannot be read, or has other columns or no number where one belongs.
    """
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        said = getattr(error, "strerror", None) or error
        raise HardwareError(f"cannot read the file of Vela {path}: {said}") from None
    operators: list[Operator] = []
    names: list[str] = []
    try:
        lines = list(csv.reader(io.StringIO(text)))
    except csv.Error as error:
        raise HardwareError(f"the file of Vela {path} is no CSV: {error}") from None
    for number, cells in enumerate(lines, start=1):
        where = f"the file of Vela {path}, line {number}"
        if not cells:
            continue
        if cells[0].endswith("_operator"):  # once for each part of the network
            names = cells
            if missing := [name for name in ("Op Cycles", "MAC Count", "Name") if name not in names]:
                raise HardwareError(f"{where} has no column {', '.join(missing)}, which Vela's per-layer files have")
            continue
        if not names:
            raise HardwareError(f"{where} is no head of columns: expected NETWORK_per-layer.csv, as Vela writes it")
        if len(cells) != len(names):
            raise HardwareError(f"{where} has {len(cells)} values for {len(names)} columns")
        cell = dict(zip(names, cells, strict=True))
        cycles, macs = (_number(cell[name], name, where) for name in ("Op Cycles", "MAC Count"))
        kind = OPERATORS.get(cells[0].replace("_", "").upper(), "")
        operators.append(Operator(kind, cycles, round(macs), cell["Name"]))
    if not any(operator.kind for operator in operators):
        raise HardwareError(f"the file of Vela {path} has no layer: {', '.join(sorted(OPERATORS))} are layers")
    return operators


def _number(text: str, name: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise HardwareError(f"{where}: {name} is '{text}', expected a number that is not negative")
    return value


def rows_of(
    operators: Sequence[Operator], layers: Sequence[LayerInfo], pair: LayerPrecision, clock_mhz: float
) -> dict[tuple[Key, Pair], Row]:
    """Rows of a table.

    Args:
        operators: as from `read_vela`.
        layers: the network's that multiply, in execution order.
        pair: of the network that Vela compiled.
        clock_mhz: cycles in a microsecond.

    Raises:
        HardwareError: operators and layers do not fit one another; the message names the first that does not.
    """
    if not (math.isfinite(clock_mhz) and clock_mhz > 0):
        raise HardwareError(f"the clock is {clock_mhz:g} MHz: give the NPU's, a positive number")
    left = [operator for operator in operators if operator.kind]
    us: dict[Key, list[float]] = {}
    for layer in layers:
        of_call = layer.macs // layer.calls
        fitting = [one for one in left if one.macs == of_call and _is(layer, one.kind)][: layer.calls]
        if len(fitting) < layer.calls:
            raise HardwareError(
                f"Vela's file has no operator for '{layer.name}' ({layer.kind}, {of_call:,} MACs a sample): is it of "
                f"another network or another size of input? Left are {_named(left)}"
            )
        for operator in fitting:
            left.remove(operator)
        us.setdefault(key_of(layer), []).append(sum(operator.cycles for operator in fitting) / clock_mhz)
    if left:
        raise HardwareError(f"Vela's file has operators that no layer of the network is: {_named(left)}")
    of_pair = pair_of(pair)
    rows = {(key, of_pair): Row(sum(times) / len(times), 0.0, len(times)) for key, times in us.items()}
    if zero := next((key for (key, _), row in rows.items() if not row.median_us), None):
        raise HardwareError(f"Vela's file says 0 cycles of {' '.join(filter(None, zero))}: a layer takes some")
    rest = sum(operator.cycles for operator in operators if not operator.kind) / clock_mhz / max(1, len(layers))
    return rows | {(REST_KEY, of_pair): Row(rest, 0.0, 1)}


def import_file(graph: ModelGraph, path: Path, pair: LayerPrecision, clock_mhz: float, out: Path) -> Table:
    """Add a file's rows to the table at `out`, in the place of those of the same pair, and write a profile beside it.

    Args:
        graph: the network that Vela compiled.
        path: its file.
        pair: its precisions.
        clock_mhz: cycles in a microsecond.
        out: the table, CSV; it may be there.

    Raises:
        HardwareError: as `read_vela` and `rows_of`, or the table that is there cannot be used.
    """
    layers = [layer for layer in graph.layers if not layer.looks_up]
    rows = rows_of(read_vela(path), layers, pair, clock_mhz)
    before = read_table(out).rows if out.exists() else {}
    others = {place: row for place, row in before.items() if place[1] != pair_of(pair)}
    device = f"Ethos-U at {clock_mhz:g} MHz"
    header = {"device": device, "runtime": "Vela's estimate", "date": time.strftime("%Y-%m-%d")}
    table = Table(others | rows, header, str(out))
    write_text(out, write_table(table))
    source = f"{path.name}, written by Vela; what is not in the table is not allowed"
    write_profile(out, f"{device}, as Vela estimates it.", source)
    return table


def _is(layer: LayerInfo, kind: str) -> bool:
    if kind == "depthwise":
        return layer.depthwise
    if kind == "conv":
        return layer.kind.startswith(("conv1", "conv2", "conv3", "linear"))
    return layer.kind.startswith(kind)


def _named(operators: Sequence[Operator]) -> str:
    said = [f"{operator.name} ({operator.macs:,} MACs)" for operator in operators[:3]]
    more = f" and {len(operators) - 3} more" if len(operators) > 3 else ""
    return (", ".join(said) or "none") + more
