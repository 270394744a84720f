"""Bit operations (BOPs): MACs times weight bits times activation bits, as HAWQ-V3 counts them (arXiv 2011.10680).

The measure of most papers, blind to the accumulator and to the quantizer: a 4-bit shift weight counts as a 4-bit
uniform one, float counts as 32 bits, and scales (of channels or of groups) are not counted.
"""

from __future__ import annotations

from mpsearch.graph.facts import LayerInfo
from mpsearch.precision import LayerPrecision


def bit_operations(layer: LayerInfo, precision: LayerPrecision) -> float:
    """BOPs of one layer for one sample."""
    return float(layer.macs * precision.weight.bits * precision.activation.bits)
