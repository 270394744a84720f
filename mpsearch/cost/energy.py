"""Energy of multiply-accumulates (MACs) in pJ at 45 nm: the bit-shift cost model.

Sources:
- M. Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014: integer add 0.03 pJ at 8 bit and
  0.1 at 32, integer multiply 0.2 at 8 bit and 3.1 at 32, fp16 add 0.4, fp16 multiply 1.1, fp32 add 0.9, fp32 multiply
  3.7. bfloat16 is not in it and taken as fp16, which has the wider multiplier of the two.
- The multiplier fit through those two points, linear in each operand's bits: QKeras qtools.
- Ours: pricing a shifter as rows of multiplexers, the widths of what is added, and power-of-two times power-of-two.

Symbols: b bits; S nonzero exponents of a term, k terms, span = largest - smallest exponent of all terms;
W = bits of the shifted operand; e = an adder's energy per bit. A code that spans `span` exponents is an integer of
span + 1 bits, which is what the accumulator must be wide enough for: **more than 4 bits of shift cost more than
uniform**, because the accumulator widens.

A scale per channel or tensor is left out: it multiplies an output once. Where groups of input features have a scale
each, the sum of a group leaves the integers: for all groups of a channel but one, an fp32 multiply and add is counted.

At 4x4 bits the sign of the shifter's advantage depends on these constants: compare cost models before relying on it.
"""

from __future__ import annotations

from itertools import chain, product
from typing import TYPE_CHECKING, TypeVar

from mpsearch.graph.facts import LayerInfo
from mpsearch.precision import LayerPrecision, Precision, group_count
from mpsearch.quant.levels import apot_terms, shift_exponents

if TYPE_CHECKING:
    from torch import Tensor

ADDER_PJ_PER_BIT = 0.1 / 32
"""pJ per bit of an integer adder: Horowitz' 32-bit add; gives 0.025 at 8 bit against the published 0.03."""
MULTIPLIER_PJ_PER_BIT_PAIR = 0.0029948
"""pJ per pair of operand bits: QKeras' fit of Horowitz' multiplies."""
MULTIPLIER_PJ_PER_BIT = 0.0010417
"""pJ per geometric mean of the operand bits: the same fit."""
MUX_PER_ADDER = 0.3
"""Energy of a 2-to-1 multiplexer bit as a share of an adder bit. Ours: a full barrel shifter of 8, 16, 32 bits then
costs 0.0225, 0.060, 0.150 pJ, against 0.024, 0.057, 0.13 published for 45 nm (ShiftAddNet, arXiv 2010.12785)."""
FP32_MULTIPLY_PJ = 3.7
"""pJ, Horowitz."""
FP32_ADD_PJ = 0.9
"""pJ, Horowitz."""
FP16_MULTIPLY_PJ = 1.1
"""pJ, Horowitz."""
FP16_ADD_PJ = 0.4
"""pJ, Horowitz."""
FIXED_ACCUMULATOR_BITS = 32
"""The accumulator of most integer accelerators."""

Bits = TypeVar("Bits", float, "Tensor")
Terms = tuple[tuple[int, ...], ...]
"""The exponents of each term of a power-of-two code; `()` for a code that is no sum of powers of two."""


def adder_pj(bits: Bits) -> Bits:
    """Energy of an integer adder, pJ."""
    return ADDER_PJ_PER_BIT * bits


def multiplier_pj(weight_bits: Bits, activation_bits: Bits) -> Bits:
    """Energy of an integer multiplier, pJ."""
    bit_pairs = weight_bits * activation_bits
    energy: Bits = MULTIPLIER_PJ_PER_BIT_PAIR * bit_pairs + MULTIPLIER_PJ_PER_BIT * bit_pairs**0.5
    return energy


def mux_pj(bits: float) -> float:
    """Energy of one row of 2-to-1 multiplexers, pJ: one stage of a shifter, or a conditional negation."""
    return MUX_PER_ADDER * adder_pj(bits)


def shifter_pj(bits_in: float, bits_out: float, shifts: int) -> float:
    """Energy of a shifter with `shifts` settings, pJ: a row of muxes per binary digit, of the mean width."""
    return mux_pj((bits_in + bits_out) / 2) * ceil_log2(shifts)


def uniform_mac_pj(weight_bits: Bits, activation_bits: Bits, fan_in: int) -> Bits:
    """Energy of a MAC of two uniform codes, pJ: multiply, then add into an accumulator as wide as the sum can get.

    Args:
        weight_bits: real numbers as well as whole ones, or a tensor of any shape: smooth and differentiable in bits.
        activation_bits: the same.
        fan_in: products summed into one output.
    """
    return multiplier_pj(weight_bits, activation_bits) + adder_pj(weight_bits + activation_bits + ceil_log2(fan_in))


def shift_product_pj(operand_bits: int, terms: Terms, signed: bool) -> float:
    """Energy of an integer times a power-of-two code, pJ: shift by every term, add the terms, negate if need be.

    Args:
        operand_bits: width of the integer that is shifted.
        terms: exponents of each term of the code.
        signed: whether the code has a sign, which negates the shifted integer (the terms share it).
    """
    width = operand_bits + span(terms)
    shift = sum(shifter_pj(operand_bits, width, len(exponents)) for exponents in terms)
    return shift + mux_pj(width) * signed + (len(terms) - 1) * adder_pj(width)


def exponent_product_pj(weight: Terms, activation: Terms) -> float:
    """Energy of one power-of-two code times another, pJ (ours).

    2^i * 2^j = 2^(i+j): for every pair of terms an adder of the wider exponent code (none where one side has a single
    exponent), and a shifter that sets one bit out of W = 1 + both spans; then the pairs are added, and the sign of
    the product (weights have one) negates the sum.
    """
    width = 1 + span(weight) + span(activation)
    total = mux_pj(width) + (len(weight) * len(activation) - 1) * adder_pj(width)
    for ours, theirs in product(weight, activation):
        narrow, wide = sorted((ceil_log2(len(ours)), ceil_log2(len(theirs))))
        sums = {i + j for i, j in product(ours, theirs)}
        total += adder_pj(float(wide if narrow else 0)) + shifter_pj(1, width, len(sums))
    return total


def mac_pj(
    precision: LayerPrecision,
    fan_in: int,
    signed_input: bool,
    least_accumulator_bits: int = 0,
    signed_weight: bool = True,
) -> float:
    """Energy of one MAC at any precision, pJ.

    A float side makes the whole MAC one in fp32, a side of 16-bit floating point one in fp16: the other side is
    expanded first.

    Args:
        precision: of weight and activation; of a product of two activations the second takes the weight's place.
        fan_in: products summed into one output.
        signed_input: whether the activation has a sign; unsigned power-of-two codes have twice the exponents.
        least_accumulator_bits: the accumulator is this wide, or wider if the sum needs more.
        signed_weight: whether the weight has a sign; only a product's second factor may have none.
    """
    weight, activation = precision.weight, precision.activation
    if weight.is_float or activation.is_float:
        return FP32_MULTIPLY_PJ + FP32_ADD_PJ
    if weight.is_cast or activation.is_cast:
        return FP16_MULTIPLY_PJ + FP16_ADD_PJ
    weight_terms, activation_terms = _terms(weight, signed_weight), _terms(activation, signed_input)
    if weight_terms and activation_terms:
        product_pj = exponent_product_pj(weight_terms, activation_terms)
    elif weight_terms:
        product_pj = shift_product_pj(activation.bits, weight_terms, signed_weight)
    elif activation_terms:
        product_pj = shift_product_pj(weight.bits, activation_terms, signed_input)
    else:
        product_pj = multiplier_pj(float(weight.bits), float(activation.bits))
    together = min(weight.group or fan_in, fan_in)
    sum_bits = _width(weight, weight_terms) + _width(activation, activation_terms) + ceil_log2(together)
    groups_pj = (group_count(fan_in, together) - 1) * (FP32_MULTIPLY_PJ + FP32_ADD_PJ) / fan_in
    return product_pj + adder_pj(float(max(sum_bits, least_accumulator_bits))) + groups_pj


def shift_energy_pj(layer: LayerInfo, precision: LayerPrecision) -> float:
    """Energy of one layer's MACs for one sample, pJ, with accumulators as wide as each layer needs."""
    return layer.macs * mac_pj(precision, layer.fan_in, layer.signed_input, 0, layer.signed_second)


def shift_energy_acc32_pj(layer: LayerInfo, precision: LayerPrecision) -> float:
    """The same with a 32-bit accumulator, which no precision makes narrower; wider only where the sum needs it."""
    return layer.macs * mac_pj(precision, layer.fan_in, layer.signed_input, FIXED_ACCUMULATOR_BITS, layer.signed_second)


def span(terms: Terms) -> int:
    """Distance between the largest and the smallest exponent of all terms."""
    exponents = list(chain.from_iterable(terms))
    return max(exponents) - min(exponents)


def ceil_log2(count: int) -> int:
    """Binary digits that tell `count` things apart: 0 for one thing."""
    return (count - 1).bit_length()


def _terms(precision: Precision, signed: bool) -> Terms:
    match precision.quantizer:
        case "shift":
            return (shift_exponents(precision.bits, signed),)
        case "apot":
            return apot_terms(precision.bits, signed)
        case _:
            return ()


def _width(precision: Precision, terms: Terms) -> int:
    """Bits of the integer that a code stands for."""
    return span(terms) + 1 if terms else precision.bits
