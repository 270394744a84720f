"""The exponents of shift and apot: as many codes as the bits hold, no magnitude twice."""

from __future__ import annotations

from itertools import product

import pytest

from mpsearch.errors import PrecisionError
from mpsearch.quant.levels import apot_magnitudes, apot_terms, shift_exponents


@pytest.mark.parametrize(
    ("bits", "signed", "exponents"),
    [
        (2, True, (0,)),
        (3, True, (-2, -1, 0)),
        (4, True, (-6, -5, -4, -3, -2, -1, 0)),
        (2, False, (-2, -1, 0)),
        (1, False, (0,)),
    ],
)
def test_shift_exponents_are_the_top_of_the_range(bits: int, signed: bool, exponents: tuple[int, ...]) -> None:
    assert shift_exponents(bits, signed) == exponents


@pytest.mark.parametrize(
    ("bits", "signed", "terms"),
    [
        (2, True, ((0,),)),
        (3, True, ((-3, -2, -1),)),
        (4, True, ((-4, -2, -1), (-3,))),
        (5, True, ((-5, -3, -1), (-6, -4, -2))),
        (4, False, ((-5, -3, -1), (-6, -4, -2))),
        (5, False, ((-6, -3, -1), (-7, -4, -2), (-5,))),
    ],
)
def test_apot_terms_are_those_of_the_paper(bits: int, signed: bool, terms: tuple[tuple[int, ...], ...]) -> None:
    assert apot_terms(bits, signed) == terms


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("signed", [True, False])
def test_every_code_is_its_own_magnitude(bits: int, signed: bool) -> None:
    codes = 2 ** (bits - signed)
    assert len({0, *(2.0**e for e in shift_exponents(bits, signed))}) == codes
    terms = [(0.0, *(2.0**e for e in exponents)) for exponents in apot_terms(bits, signed)]
    assert len({sum(values) for values in product(*terms)}) == codes


@pytest.mark.parametrize(
    ("bits", "signed", "levels"),
    [
        (2, True, [0, 1]),
        (3, True, [0, 1 / 4, 1 / 2, 1]),
        (4, True, [0, 1 / 10, 2 / 10, 3 / 10, 4 / 10, 6 / 10, 8 / 10, 1]),
        (2, False, [0, 1 / 4, 1 / 2, 1]),
        (3, False, [0, 1 / 10, 2 / 10, 3 / 10, 4 / 10, 6 / 10, 8 / 10, 1]),
    ],
)
def test_apot_magnitudes_scaled_to_one_are_the_papers_levels(bits: int, signed: bool, levels: list[float]) -> None:
    ours = apot_magnitudes(bits, signed)
    assert [level / ours[-1] for level in ours] == pytest.approx(levels)


def test_bits_without_a_magnitude_are_refused() -> None:
    with pytest.raises(PrecisionError, match="1 bits leave none for a signed power of two"):
        shift_exponents(1, signed=True)
    with pytest.raises(PrecisionError, match="1 to 5 magnitude bits, got 6"):
        apot_terms(6, signed=False)
