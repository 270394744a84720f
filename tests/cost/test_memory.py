"""Bytes and traffic: hand arithmetic."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mpsearch.cost.memory import (
    activation_bytes,
    activation_traffic_pj,
    bias_bytes,
    live_activation_bytes,
    weight_bytes,
    weight_traffic_pj,
)
from mpsearch.graph.facts import LayerInfo
from mpsearch.precision import LayerPrecision

CONV = LayerInfo("conv", "conv2d", (5, 3, 3, 3), (3, 9, 9), (5, 9, 9), 10_935, 135, 27)  # 135 weights, no bias
W3A3 = LayerPrecision.shorthand("w3a3")
FLOAT = LayerPrecision.parse("float", "float")


def test_weight_codes_are_packed_and_rounded_up_to_bytes() -> None:
    assert weight_bytes(CONV, W3A3) == 51 + 4 * 5  # 405 bits, five scales


def test_one_scale_per_tensor_costs_four_bytes() -> None:
    assert weight_bytes(CONV, LayerPrecision.parse("uniform:3/tensor", "uniform:3")) == 51 + 4


def test_float_weight_is_four_bytes_an_element_and_has_no_scale() -> None:
    assert weight_bytes(CONV, FLOAT) == 4 * 135


def test_transposed_conv_counts_its_scales_by_output_channel() -> None:
    transposed = replace(CONV, kind="conv_transpose2d", weight_shape=(6, 4, 3, 3), groups=2)  # 216 weights, 8 channels
    assert weight_bytes(transposed, LayerPrecision.shorthand("w8a8")) == 216 + 4 * 8


@pytest.mark.parametrize(("params", "batch_norm", "expected"), [(135, None, 0), (140, None, 20), (135, "bn1", 20)])
def test_bias_is_its_own_or_what_the_folded_batch_norm_leaves(
    params: int, batch_norm: str | None, expected: int
) -> None:
    assert bias_bytes(replace(CONV, params=params, batch_norm=batch_norm), W3A3) == expected


def test_activation_is_the_input_once_per_call() -> None:
    assert activation_bytes(CONV, W3A3) == 92  # 243 * 3 bits = 91.1 bytes
    assert activation_bytes(replace(CONV, calls=2), W3A3) == 2 * 92
    assert activation_bytes(CONV, FLOAT) == 4 * 243


def test_live_activations_are_input_and_output() -> None:
    assert live_activation_bytes(CONV, W3A3) == 92 + 152  # 405 * 3 bits = 151.9 bytes


def test_traffic_is_1300_pj_per_8_bytes_of_dram_and_100_of_sram() -> None:
    assert weight_traffic_pj(CONV, W3A3) == pytest.approx(71 * 1300 / 8)
    assert activation_traffic_pj(CONV, W3A3) == pytest.approx(92 * 100 / 8)
