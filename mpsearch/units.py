"""Amounts of a cost with their unit, as people write them: `128 KiB`, `5 ms`, `40 %`, `0.4`.

One rule says what a number without a unit means: where the name of the cost says a unit (`weight_bytes`: bytes,
`latency_ms`: milliseconds), that; where it says none (`shift_energy`, `bops`, `memory_energy`, `table`), a share of the
cost of the study's reference.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from mpsearch.errors import nearest

SHARE = "of the reference"
"""The unit of an amount that is a share of the reference's cost."""

UNITS: Mapping[str, tuple[str, float]] = {
    "B": ("bytes", 1.0),
    "bytes": ("bytes", 1.0),
    "kB": ("bytes", 1e3),
    "MB": ("bytes", 1e6),
    "GB": ("bytes", 1e9),
    "KiB": ("bytes", 2.0**10),
    "MiB": ("bytes", 2.0**20),
    "GiB": ("bytes", 2.0**30),
    "pJ": ("pJ", 1.0),
    "nJ": ("pJ", 1e3),
    "uJ": ("pJ", 1e6),
    "mJ": ("pJ", 1e9),
    "BOPs": ("BOPs", 1.0),
    "MBOPs": ("BOPs", 1e6),
    "GBOPs": ("BOPs", 1e9),
    "TBOPs": ("BOPs", 1e12),
    "us": ("us", 1.0),
    "ms": ("us", 1e3),
    "s": ("us", 1e6),
    "cycles": ("cycles", 1.0),
    "%": (SHARE, 0.01),
}
"""What can stand behind a number: the unit that costs are counted in, and how many of these it is."""

_ENDS = {"_bytes": "B", "_bytes_peak": "B", "_us": "us", "_ms": "ms", "_s": "s", "_pj": "pJ", "_cycles": "cycles"}
_AMOUNT = re.compile(r"(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*(?P<unit>[^\s\d.]\S*)?")


@dataclass(frozen=True, slots=True)
class Amount:
    """So much of a cost."""

    value: float
    unit: str  # as costs are counted: bytes, pJ, BOPs, us, cycles, or SHARE

    def __str__(self) -> str:
        return show(self.value, self.unit)


def usual_unit(name: str) -> str | None:
    """The unit that the name of a cost says, as a key of UNITS; None: it says none.

    >>> usual_unit("latency_ms"), usual_unit("bops")
    ('ms', None)
    """
    return next((unit for end, unit in _ENDS.items() if name.endswith(end)), None)


def parse_amount(name: str, value: object) -> Amount:
    """Read a bound on the cost `name`: a number, or a text of a number and a unit.

    >>> parse_amount("weight_bytes", "128 KiB"), parse_amount("shift_energy", 0.4)
    (Amount(value=131072.0, unit='bytes'), Amount(value=0.4, unit='of the reference'))

    Raises:
        ValueError: it is no number above 0, or the unit does not exist.
    """
    text = str(value).strip()
    match = None if isinstance(value, bool) else _AMOUNT.fullmatch(text)
    if match is None:
        raise ValueError(f"{name}: cannot read '{text}': write a number with a unit, as 128 KiB, 5 ms or 40 %")
    unit = match["unit"] or usual_unit(name)
    if unit is not None and unit not in UNITS:
        raise ValueError(f"{name}: there is no unit '{unit}': {nearest(unit, UNITS)}")
    counted, factor = (SHARE, 1.0) if unit is None else UNITS[unit]
    amount = factor * float(match["number"])
    if not (amount > 0 and math.isfinite(amount)):
        raise ValueError(f"{name}: {text} is no bound that a network can keep: write a number above 0")
    return Amount(amount, counted)


_STEPS: Mapping[str, tuple[tuple[float, str], ...]] = {
    "bytes": ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B")),
    "pJ": ((1e9, "mJ"), (1e6, "uJ"), (1e3, "nJ"), (1.0, "pJ")),
    "BOPs": ((1e12, "TBOPs"), (1e9, "GBOPs"), (1e6, "MBOPs"), (1.0, "BOPs")),
    "us": ((1e6, "s"), (1e3, "ms"), (1.0, "us")),
}


def show(value: float, unit: str) -> str:
    """An amount for people.

    >>> show(131072, "bytes"), show(0.4, SHARE), show(1234.5, "us")
    ('128 KiB', '0.4 of the reference', '1.234 ms')
    """
    steps = _STEPS.get(unit, ((1.0, unit),))
    size, name = next((step for step in steps if abs(value) >= step[0]), steps[-1])
    return f"{value / size:.4g} {name}"
