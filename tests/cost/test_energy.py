"""Energy per MAC: the figures of the sources, and hand arithmetic where there are none. pJ throughout."""

from __future__ import annotations

import pytest
import torch

from mpsearch.cost.energy import (
    exponent_product_pj,
    mac_pj,
    multiplier_pj,
    shift_energy_acc32_pj,
    shift_energy_pj,
    shift_product_pj,
    shifter_pj,
    uniform_mac_pj,
)
from mpsearch.graph.facts import LayerInfo
from mpsearch.precision import LayerPrecision

FAN_IN = 576  # 64 channels, 3 x 3; its sums need 10 bits more than a product
E = 0.003125  # pJ per adder bit


def mac(weight: str, activation: str, signed_input: bool = False, fan_in: int = FAN_IN) -> float:
    return mac_pj(LayerPrecision.parse(weight, activation), fan_in, signed_input)


@pytest.mark.parametrize(
    ("weight", "activation", "energy"),
    [
        ("uniform:8", "uniform:8", 0.281),
        ("uniform:4", "uniform:8", 0.1705),  # 0.17048, printed there as 0.171
        ("shift:4", "uniform:8", 0.122),
        ("uniform:4", "uniform:4", 0.108),
        ("shift:4", "uniform:4", 0.095),
        ("uniform:3", "uniform:4", 0.093),
        ("shift:3", "uniform:4", 0.068),
        ("uniform:5", "uniform:4", 0.124),
        ("shift:5", "uniform:4", 0.149),
    ],
)
def test_mac_costs_what_methods_section_4_says(weight: str, activation: str, energy: float) -> None:
    assert mac(weight, activation) == pytest.approx(energy, abs=5e-4)


@pytest.mark.parametrize(("bits", "energy"), [(8, 0.0225), (16, 0.060), (32, 0.150)])
def test_full_shifter_is_near_the_published_one(bits: int, energy: float) -> None:
    assert shifter_pj(bits, bits, bits) == pytest.approx(energy)


@pytest.mark.parametrize(("bits", "energy"), [(8, 0.2), (32, 3.1)])
def test_multiplier_passes_through_horowitz(bits: float, energy: float) -> None:
    assert multiplier_pj(bits, bits) == pytest.approx(energy, rel=1e-4)


def test_shift_beats_uniform_up_to_4_bits_and_not_at_5() -> None:
    cheaper = {bits: mac(f"shift:{bits}", "uniform:4") < mac(f"uniform:{bits}", "uniform:4") for bits in (2, 3, 4, 5)}
    assert cheaper == {2: True, 3: True, 4: True, 5: False}


def test_ternary_shift_needs_no_shifter() -> None:
    assert mac("shift:2", "uniform:4") == pytest.approx(0.3 * E * 4 + E * (4 + 1 + 10))  # negate, accumulate


def test_one_bit_weights_follow_the_uniform_formula() -> None:
    assert mac("uniform:1", "uniform:4") == pytest.approx(4 * 0.0029948 + 2 * 0.0010417 + E * (1 + 4 + 10))


def test_apot_adds_its_terms() -> None:
    # 4 bits: exponents {-4, -2, -1} and {-3}, so span 3, W = 8 + 3 = 11: one term needs 2 shifter stages, one none
    product = 0.3 * E * (8 + 11) / 2 * 2 + 0.3 * E * 11 + 1 * E * 11
    assert mac("apot:4", "uniform:8") == pytest.approx(product + E * (8 + 4 + 10))


def test_apot_with_one_term_costs_what_shift_with_the_same_exponents_costs() -> None:
    assert mac("apot:3", "uniform:8") == mac("shift:3", "uniform:8")


def test_unsigned_shift_activation_swaps_the_roles_and_has_no_sign() -> None:
    # 3 unsigned bits: 7 exponents, span 6; the 4-bit weight is shifted to W = 10 bits
    assert mac("uniform:4", "shift:3") == pytest.approx(0.3 * E * (4 + 10) / 2 * 3 + E * (4 + 7 + 10))


def test_signed_shift_activation_costs_a_negation_and_has_fewer_exponents() -> None:
    # 3 signed bits: 3 exponents, span 2, W = 6
    expected = 0.3 * E * (4 + 6) / 2 * 2 + 0.3 * E * 6 + E * (4 + 3 + 10)
    assert mac("uniform:4", "shift:3", signed_input=True) == pytest.approx(expected)


def test_two_shift_codes_add_exponents_and_set_one_bit() -> None:
    # weight: 3 exponents (2 digits); input: 7 exponents (3 digits); 9 sums (4 digits); W = 1 + 2 + 6 = 9
    product = E * 3 + 0.3 * E * (1 + 9) / 2 * 4 + 0.3 * E * 9
    assert mac("shift:3", "shift:3") == pytest.approx(product + E * (3 + 7 + 10))


def test_single_exponent_needs_no_exponent_adder() -> None:
    # weight: one exponent; input: 3 exponents; W = 3
    assert exponent_product_pj(((0,),), ((-2, -1, 0),)) == pytest.approx(0.3 * E * (1 + 3) / 2 * 2 + 0.3 * E * 3)


def test_apot_times_shift_pays_for_every_pair_of_terms() -> None:
    # terms {-4,-2,-1} (2 digits) and {-3} with {-2,-1,0} (2 digits): W = 1 + 3 + 2 = 6; sums -6..-1 (3 digits), 3 (2)
    first = E * 2 + 0.3 * E * (1 + 6) / 2 * 3
    second = 0.3 * E * (1 + 6) / 2 * 2
    product = exponent_product_pj(((-4, -2, -1), (-3,)), ((-2, -1, 0),))
    assert product == pytest.approx(first + second + E * 6 + 0.3 * E * 6)


@pytest.mark.parametrize(("weight", "activation"), [("float", "uniform:8"), ("shift:4", "float"), ("float", "float")])
def test_float_side_makes_the_mac_fp32(weight: str, activation: str) -> None:
    assert mac(weight, activation) == pytest.approx(3.7 + 0.9)


def test_fan_in_of_one_needs_no_headroom() -> None:
    assert mac("uniform:4", "uniform:4", fan_in=1) == pytest.approx(mac("uniform:4", "uniform:4") - 10 * E)


def test_layer_energy_is_macs_times_mac_energy() -> None:
    layer = LayerInfo("conv", "conv2d", (64, 64, 3, 3), (64, 8, 8), (64, 8, 8), 1000, 36864, FAN_IN, signed_input=False)
    assert shift_energy_pj(layer, LayerPrecision.parse("shift:4", "uniform:8")) == pytest.approx(1000 * 0.1221875)


def test_acc32_pays_32_bits_and_more_only_where_the_sum_needs_it() -> None:
    layer = LayerInfo("conv", "conv2d", (64, 64, 3, 3), (64, 8, 8), (64, 8, 8), 1, 36864, FAN_IN, signed_input=False)
    w4a4 = LayerPrecision.shorthand("w4a4")
    assert shift_energy_acc32_pj(layer, w4a4) - shift_energy_pj(layer, w4a4) == pytest.approx(E * (32 - 18))
    wide = LayerPrecision.parse("shift:5", "uniform:8")  # 8 + 15 + 10 = 33 bits
    assert shift_energy_acc32_pj(layer, wide) == shift_energy_pj(layer, wide)


def test_uniform_mac_is_what_mac_pj_uses() -> None:
    assert uniform_mac_pj(4.0, 8.0, FAN_IN) == pytest.approx(mac("uniform:4", "uniform:8"), rel=1e-12)


def test_uniform_mac_is_differentiable_in_bits() -> None:
    weight_bits = torch.tensor([2.0, 3.5], dtype=torch.float64, requires_grad=True)
    activation_bits = torch.full((2,), 8.0, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda bits: uniform_mac_pj(bits, activation_bits, FAN_IN), weight_bits)


def test_shift_product_of_wider_span_costs_more() -> None:
    near, far = shift_product_pj(8, ((-1, 0),), signed=True), shift_product_pj(8, ((-6, 0),), signed=True)
    assert far - near == pytest.approx(0.3 * E * 5 / 2 + 0.3 * E * 5)  # five more bits of one mux row, and of the sign
