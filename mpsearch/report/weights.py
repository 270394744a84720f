"""What the weights of the knee are, as tables: the ranges that its quantizers learned, and histograms.

Read from the run folder, where a process that had the network has stored them (`search/knee.py`).
"""

from __future__ import annotations

from math import nan

import pandas as pd

from mpsearch.precision import PrecisionConfig
from mpsearch.report.tables import mark
from mpsearch.search.values import KneeValues


def ranges_table(values: KneeValues, config: PrecisionConfig) -> pd.DataFrame:
    """A row per quantized tensor: the smallest and largest value that its quantizer can give, over all channels.

    Columns: layer, tensor, weights (elements of the layer's weight), precision, quantizer, low, high, and for weights
    seen_low and seen_high, the ends of the float weights.

    Args:
        values: of the knee.
        config: the knee's.
    """
    rows = []
    for row in values.ranges:
        layer = config[row.layer]
        precision = layer.weight if row.tensor == "weight" else layer.activation
        seen = [nan if end is None else end for end in (row.seen_low, row.seen_high)]
        about = row.layer, row.tensor, row.weights, mark(precision), precision.quantizer
        rows.append((*about, row.low, row.high, *seen))
    columns = ["layer", "tensor", "weights", "precision", "quantizer", "low", "high", "seen_low", "seen_high"]
    return pd.DataFrame(rows, columns=columns)


def histograms(values: KneeValues, config: PrecisionConfig) -> pd.DataFrame:
    """Weights before and after quantization counted in equal bins, of the layers with the most weights.

    Columns: layer, precision, low and high (edges of the bin), before, after (counts).

    Args:
        values: of the knee.
        config: the knee's.
    """
    rows = []
    for counted in values.histograms:
        width = 2 * counted.end / len(counted.before)
        edges = [-counted.end + index * width for index in range(len(counted.before) + 1)]
        precision = mark(config[counted.layer].weight)
        bins = zip(edges[:-1], edges[1:], counted.before, counted.after, strict=True)
        rows += [(counted.layer, precision, *row) for row in bins]
    return pd.DataFrame(rows, columns=["layer", "precision", "low", "high", "before", "after"])
