"""Measured tables: what a device takes for a layer at a pair of precisions, one row each, as CSV.

    # device: ...      lines that begin with # say what was measured on: device, runtime, version, threads, date
    op,in_shape,out_shape,kernel,stride,groups,fused_with,weight,activation,median_us,mad_us,n
    conv2d,3x32x32,16x32x32,3x3,1x1,1,bn,uniform:8,uniform:8,41.2,0.6,200
    rest,,,,,,,float,float,4.1,0.2,200

A row holds for every layer with this key: kind, shapes of one sample, kernel, stride (the extents of the input over
those of the output, rounded), groups, and `bn` where a BatchNorm is part of it. A row with the op `rest` is what comes
beside each layer of its pair: additions, pooling, moving data, the network's share for one layer. A layer and pair
without a row is not allowed: nothing is interpolated. Any device's numbers can be written so.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mpsearch.errors import HardwareError, PrecisionError
from mpsearch.files import read_text
from mpsearch.graph.facts import LayerInfo
from mpsearch.precision import LayerPrecision, Precision

COLUMNS = (
    "op",
    "in_shape",
    "out_shape",
    "kernel",
    "stride",
    "groups",
    "fused_with",
    "weight",
    "activation",
    "median_us",
    "mad_us",
    "n",
)
KEY = COLUMNS[:7]
REST = "rest"
REST_KEY = (REST, *[""] * 6)
"""The key of what comes beside the layers."""

Key = tuple[str, ...]
"""The texts of the key columns."""
Pair = tuple[str, str]
"""The texts of weight and activation, without what shares a scale."""


@dataclass(frozen=True)
class Row:
    """What was measured of one layer at one pair."""

    median_us: float
    mad_us: float
    n: int


@dataclass(frozen=True)
class Table:
    """The rows of a table, and what its header says."""

    rows: Mapping[tuple[Key, Pair], Row]
    header: Mapping[str, str]
    source: str

    def row(self, layer: LayerInfo, pair: LayerPrecision) -> Row | None:
        """The row of a layer at a pair; None where there is none."""
        return self.rows.get((key_of(layer), pair_of(pair)))

    def rest_us(self, pair: LayerPrecision) -> float:
        """What comes beside each layer of a pair."""
        row = self.rows.get((REST_KEY, pair_of(pair)))
        return 0.0 if row is None else row.median_us


def key_of(layer: LayerInfo) -> Key:
    """The key of a layer's rows.

    >>> key_of(LayerInfo("c", "conv2d", (8, 3, 3, 3), (3, 32, 32), (8, 16, 16), 1, 1, 27, batch_norm="bn1"))
    ('conv2d', '3x32x32', '8x16x16', '3x3', '2x2', '1', 'bn')
    """
    return (
        layer.kind,
        _shape(layer.input_shape),
        _shape(layer.output_shape),
        _shape(layer.kernel) if layer.kind.startswith("conv") else "",
        _shape(stride_of(layer)),
        str(layer.groups),
        "bn" if layer.batch_norm else "",
    )


def stride_of(layer: LayerInfo) -> tuple[int, ...]:
    """The extents of the input over those of the output (of transposed layers the other way round), rounded."""
    if not layer.kind.startswith("conv"):
        return ()
    axes = len(layer.kernel)
    ends = layer.input_shape[-axes:], layer.output_shape[-axes:]
    large, small = reversed(ends) if layer.kind.startswith("conv_transpose") else ends
    return tuple(max(1, round(a / b)) if b else 1 for a, b in zip(large, small, strict=True))


def pair_of(pair: LayerPrecision) -> Pair:
    """The texts of a pair in a table."""
    return _kind(pair.weight), _kind(pair.activation)


def _kind(precision: Precision) -> str:
    return f"{precision.quantizer}:{precision.bits}" if precision.has_scale else str(precision)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def read_table(path: Path) -> Table:
    """Read a table.

    Raises:
        HardwareError: it cannot be read, a column is missing, or a value does not belong; the message names the line.
    """
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise HardwareError(f"cannot read the table {path}: {getattr(error, 'strerror', None) or error}") from None
    return parse_table(text, str(path))


def parse_table(text: str, source: str = "table") -> Table:
    """Check a table that is already in memory. Raises HardwareError as `read_table` does."""
    numbered = [(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    said = [line.lstrip("# ").partition(":") for _, line in numbered if line.startswith("#") and ":" in line]
    header = {name.strip(): value.strip() for name, _, value in said}
    lines = [(number, line) for number, line in numbered if not line.startswith("#")]
    names = _cells(lines[0][1], f"the table {source}, line {lines[0][0]}") if lines else []
    if missing := [name for name in COLUMNS if name not in names]:
        raise HardwareError(
            f"the table {source} has no column {', '.join(missing)}: its columns are {','.join(COLUMNS)}"
        )
    rows: dict[tuple[Key, Pair], Row] = {}
    for number, line in lines[1:]:
        where = f"the table {source}, line {number}"
        cells = _cells(line, where)
        if len(cells) != len(names):
            raise HardwareError(f"{where} has {len(cells)} values for {len(names)} columns")
        cell = dict(zip(names, cells, strict=True))
        key: Key = tuple(cell[name] for name in KEY)
        try:
            sides = [Precision.parse(cell[side], "tensor") for side in ("weight", "activation")]
        except PrecisionError as error:
            raise HardwareError(f"{where}: {error}") from None
        row = Row(_number(cell, "median_us", where), _number(cell, "mad_us", where), int(_number(cell, "n", where)))
        if row.median_us == 0 and key[0] != REST:
            raise HardwareError(f"{where}: median_us is 0: a layer takes some time; measure it again")
        place = key, (_kind(sides[0]), _kind(sides[1]))
        if place in rows:
            raise HardwareError(f"{where} has a key that an earlier line has: keep one of them")
        rows[place] = row
    return Table(rows, header, source)


def _cells(line: str, where: str) -> list[str]:
    try:
        return [cell.strip() for cell in next(csv.reader([line]))]
    except csv.Error as error:
        raise HardwareError(f"{where} is no CSV: {error}") from None


def _number(cell: Mapping[str, str], name: str, where: str) -> float:
    try:
        value = float(cell[name])
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise HardwareError(f"{where}: {name} is '{cell[name]}': write a number that is not negative")
    return value


def write_table(table: Table) -> str:
    """The text of a table, from which `parse_table` makes an equal one."""
    out = io.StringIO()
    for name, value in table.header.items():
        out.write(f"# {name}: {value}\n")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for (key, pair), row in table.rows.items():
        writer.writerow([*key, *pair, f"{row.median_us:.4g}", f"{row.mad_us:.3g}", row.n])
    return out.getvalue()
