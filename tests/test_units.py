"""Amounts with units: what people write, and what is refused."""

from __future__ import annotations

import doctest

import pytest

from mpsearch import units
from mpsearch.units import SHARE, Amount, parse_amount, show


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("weight_bytes", "128 KiB", Amount(131072.0, "bytes")),
        ("weight_bytes", 4096, Amount(4096.0, "bytes")),
        ("activation_bytes_peak", "64kB", Amount(64000.0, "bytes")),
        ("weight_bytes", "40 %", Amount(0.4, SHARE)),
        ("shift_energy", 0.4, Amount(0.4, SHARE)),
        ("shift_energy", "2.5 uJ", Amount(2.5e6, "pJ")),
        ("bops", "3e9 BOPs", Amount(3e9, "BOPs")),
        ("latency_ms", 5, Amount(5000.0, "us")),
        ("latency_ms", "800 us", Amount(800.0, "us")),
    ],
)
def test_an_amount_is_read_in_its_unit(name: str, given: object, expected: Amount) -> None:
    amount = parse_amount(name, given)
    assert amount.unit == expected.unit
    assert amount.value == pytest.approx(expected.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("128 Kib", r"no unit 'Kib': did you mean 'KiB'"),
        ("many", "cannot read 'many'"),
        ("-3 B", "write a number above 0"),
        (0, "write a number above 0"),
        (float("nan"), "cannot read 'nan'"),
        ("1e400 B", "write a number above 0"),
        (True, "cannot read 'True'"),
        ("3 4 B", "cannot read"),
    ],
)
def test_what_is_no_amount_is_refused(given: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_amount("weight_bytes", given)


def test_shown_amounts_are_read_again_as_they_were() -> None:
    for value, unit in ((131072, "bytes"), (2.5e6, "pJ"), (4.2e9, "BOPs"), (5000, "us"), (12, "cycles")):
        assert parse_amount("cost", show(value, unit)) == Amount(value, unit)


def test_examples_of_the_docstrings_hold() -> None:
    assert doctest.testmod(units).failed == 0
