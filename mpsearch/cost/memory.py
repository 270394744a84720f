"""Bytes of weights and activations, and the energy of moving them.

What is counted is what a deployed network stores: BatchNorm folded into the layer before it (its factor into the
weight scales, its shift into the bias), weights as packed codes, scales and biases as 32-bit numbers. Groups of input
features (`uniform:4/group128`) have a scale each: at 4 bits, groups of 128 add a sixteenth, groups of 32 a quarter. A
BatchNorm that follows no layer directly is left out: `LayerInfo` does not know it. So are the two numbers that scale an
activation.

Energy per byte, 45 nm, from M. Horowitz, "Computing's energy problem", ISSCC 2014: a 64-bit read from a cache of 8 kB
costs 10 pJ, of 32 kB 20 pJ, of 1 MB 100 pJ; from DRAM 1.3 to 2.6 nJ.
"""

from __future__ import annotations

from math import prod

from mpsearch.graph.facts import LayerInfo
from mpsearch.precision import LayerPrecision, Precision, group_count

SCALE_BYTES = 4
"""A weight scale: one 32-bit number per output channel, per tensor, or per group of a channel's input features."""
BIAS_BYTES = 4
"""A bias: one 32-bit number per output channel, whatever the weight's precision (int32 or fp32)."""
SRAM_PJ_PER_BYTE = 100 / 8
"""pJ per byte read from, and assumed the same written to, an on-chip buffer of 1 MB: activations of an image network
do not fit the smaller ones."""
DRAM_PJ_PER_BYTE = 1300 / 8
"""pJ per byte read from DRAM: the lower end of the published range, so that savings are not overstated."""


def weight_bytes(layer: LayerInfo, precision: LayerPrecision) -> float:
    """Bytes of one layer's weight: its codes, rounded up to whole bytes, and its scales. Float has no scale."""
    if layer.multiplies_activations:
        return 0.0
    return _packed(layer.weights, precision.weight) + SCALE_BYTES * _scales(layer, precision.weight)


def bias_bytes(layer: LayerInfo, _precision: LayerPrecision) -> float:
    """Bytes of one layer's bias: its own, or the one that folding its BatchNorm leaves."""
    if layer.multiplies_activations:
        return 0.0
    has_bias = layer.params > layer.weights or layer.batch_norm is not None
    return float(BIAS_BYTES * _out_channels(layer) * has_bias)


def activation_bytes(layer: LayerInfo, precision: LayerPrecision) -> float:
    """Bytes of the activations that one layer reads, each rounded up to whole bytes; none if it looks up.

    One per call, two of a product of activations.
    """
    if layer.looks_up:
        return 0.0
    return layer.calls * (_packed(prod(layer.input_shape), precision.activation) + _second(layer, precision))


def live_activation_bytes(layer: LayerInfo, precision: LayerPrecision) -> float:
    """Bytes of the input and the output of one layer, which are live together.

    The output is held at the precision of this layer's input, because `LayerInfo` does not know who reads it: exact
    where neighbours agree. Tensors that wait for a residual addition come on top and are not counted. What a layer
    looks up is counted at the layer that reads it.
    """
    if layer.looks_up:
        return 0.0
    ends = sum(_packed(prod(shape), precision.activation) for shape in (layer.input_shape, layer.output_shape))
    return ends + _second(layer, precision)


def weight_traffic_pj(layer: LayerInfo, precision: LayerPrecision) -> float:
    """Energy of reading the weight from DRAM, once per sample, pJ."""
    return DRAM_PJ_PER_BYTE * weight_bytes(layer, precision)


def bias_traffic_pj(layer: LayerInfo, precision: LayerPrecision) -> float:
    """Energy of reading the bias from DRAM, once per sample, pJ."""
    return DRAM_PJ_PER_BYTE * bias_bytes(layer, precision)


def activation_traffic_pj(layer: LayerInfo, precision: LayerPrecision) -> float:
    """Energy of writing the input to SRAM once, pJ; reading it once costs the same."""
    return SRAM_PJ_PER_BYTE * activation_bytes(layer, precision)


def _second(layer: LayerInfo, precision: LayerPrecision) -> float:
    """Bytes of the second factor of a product of activations."""
    return _packed(prod(layer.second_shape), precision.weight) if layer.multiplies_activations else 0.0


def _scales(layer: LayerInfo, weight: Precision) -> int:
    """How many scales a weight has."""
    if not weight.has_scale:
        return 0
    if weight.group is not None:
        rows = layer.weight_shape[1 if layer.kind.startswith("conv_transpose") else 0]
        return rows * group_count(layer.weights // max(1, rows), weight.group)
    return _out_channels(layer) if weight.granularity == "channel" else 1


def _packed(elements: int, precision: Precision) -> float:
    """Bytes of codes without gaps between them."""
    return float(-(-elements * precision.bits // 8))


def _out_channels(layer: LayerInfo) -> int:
    if layer.kind.startswith("conv_transpose"):
        return layer.weight_shape[1] * layer.groups
    return layer.weight_shape[0]
