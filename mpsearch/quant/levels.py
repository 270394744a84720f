"""The levels of the power-of-two quantizers, as exponents: what the quantizers round to and the cost models price.

A magnitude is a sum of terms, and each term is zero or 2^e with e from the term's own set: one term for `shift`
(power of two, PoT), one to three for `apot` (additive powers of two, https://arxiv.org/abs/1909.13144). Weights and
signed activations spend one bit on the sign, which all terms share; unsigned activations use every bit for the
magnitude. The scale of a tensor multiplies whatever comes out, so only the distances between exponents matter.

Pure integers, standard library only.
"""

from __future__ import annotations

from itertools import product

from mpsearch.errors import PrecisionError

_APOT_TERMS: dict[int, tuple[tuple[int, ...], ...]] = {
    1: ((0,),),
    2: ((-3, -2, -1),),
    3: ((-4, -2, -1), (-3,)),
    4: ((-5, -3, -1), (-6, -4, -2)),
    5: ((-6, -3, -1), (-7, -4, -2), (-5,)),
}
"""Magnitude bits -> the exponents of each term. A pair of bits makes a term of zero and three powers, a bit that is
left over a term of zero and one power; together the terms use every exponent of their range once, so that no two
codes mean the same magnitude. 5 occurs for unsigned activations only."""


def shift_exponents(bits: int, signed: bool) -> tuple[int, ...]:
    """The exponents e of the nonzero magnitudes 2^e of a `shift` quantizer, ascending, the largest 0.

    One of the 2^m codes of m magnitude bits is zero, so there are 2^m - 1 exponents.

    >>> shift_exponents(3, signed=True)
    (-2, -1, 0)

    Raises:
        PrecisionError: there is no bit left for a magnitude.
    """
    return tuple(range(2 - 2 ** _magnitude_bits(bits, signed), 1))


def apot_terms(bits: int, signed: bool) -> tuple[tuple[int, ...], ...]:
    """The exponents of each term of an `apot` quantizer, ascending within a term.

    >>> apot_terms(4, signed=True)
    ((-4, -2, -1), (-3,))

    Raises:
        PrecisionError: there is no bit left for a magnitude, or there are more than five.
    """
    magnitude = _magnitude_bits(bits, signed)
    if magnitude not in _APOT_TERMS:
        raise PrecisionError(f"apot has 1 to {max(_APOT_TERMS)} magnitude bits, got {magnitude}: give fewer bits")
    return _APOT_TERMS[magnitude]


def shift_magnitudes(bits: int, signed: bool) -> tuple[float, ...]:
    """Zero and the powers of two of a `shift` quantizer, ascending to 1.

    >>> shift_magnitudes(3, signed=True)
    (0.0, 0.25, 0.5, 1.0)
    """
    return (0.0, *(2.0**e for e in shift_exponents(bits, signed)))


def apot_magnitudes(bits: int, signed: bool) -> tuple[float, ...]:
    """Every sum of one value (zero or a power of two) from each term of an `apot` quantizer, ascending.

    >>> apot_magnitudes(4, signed=True)
    (0.0, 0.0625, 0.125, 0.1875, 0.25, 0.375, 0.5, 0.625)
    """
    terms = [(0.0, *(2.0**e for e in exponents)) for exponents in apot_terms(bits, signed)]
    return tuple(sorted(map(sum, product(*terms))))


def _magnitude_bits(bits: int, signed: bool) -> int:
    magnitude = bits - signed
    if magnitude < 1:
        raise PrecisionError(
            f"{bits} bits leave none for a {'signed' if signed else 'nonzero'} power of two: give more"
        )
    return magnitude
