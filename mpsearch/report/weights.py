"""What the weights of a picked config are: the ranges that its quantizers learned, and histograms.

Read from the checkpoint in the run folder; nothing is trained or run on data.
"""

from __future__ import annotations

from math import nan
from pathlib import Path
from typing import cast

import pandas as pd
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mpsearch.graph.facts import LayerInfo
from mpsearch.precision import PrecisionConfig
from mpsearch.quant.modules import QuantLayer
from mpsearch.quant.prepare import insert_quantizers, quant_layers
from mpsearch.quant.quantizer import Quantizer
from mpsearch.report.tables import mark
from mpsearch.state_dict import load_tensors

BINS = 61
HISTOGRAMS = 12  # layers, those with the most weights


def quantized_layers(
    model: nn.Module, layers: tuple[LayerInfo, ...], config: PrecisionConfig, checkpoint: Path
) -> dict[str, QuantLayer]:
    """The layers of a network under a config, with the weights and ranges of a checkpoint of a run.

    Args:
        model: the float network, which is left untouched.
        layers: its layers.
        config: of the checkpoint.
        checkpoint: a safetensors file that a trial or a final training wrote.
    """
    network = insert_quantizers(model, layers, config.offers)
    found = quant_layers(network)
    for name, layer in found.items():
        layer.set_precision(config[name])
    load_tensors(network, load_file(checkpoint))
    network.eval()
    return found


@torch.no_grad()
def ranges_table(layers: dict[str, QuantLayer]) -> pd.DataFrame:
    """A row per quantized tensor: the smallest and largest value that its quantizer can give, over all channels.

    Columns: layer, tensor, weights (elements of the layer's weight), precision, quantizer, low, high, and for weights
    seen_low and seen_high, the ends of the float weights.
    """
    rows = []
    for name, layer in layers.items():
        weight = cast(Tensor, layer.weight)
        seen = {"weight": (float(weight.min()), float(weight.max())), "activation": (nan, nan)}
        for tensor, quantizer in (("weight", layer.weight_quantizer), ("activation", layer.input_quantizer)):
            if not quantizer.precision.is_float:
                form = weight if tensor == "weight" else torch.zeros(())
                ends = _ends(quantizer, form)
                precision = quantizer.precision
                rows.append((name, tensor, weight.numel(), mark(precision), precision.quantizer, *ends, *seen[tensor]))
    columns = ["layer", "tensor", "weights", "precision", "quantizer", "low", "high", "seen_low", "seen_high"]
    return pd.DataFrame(rows, columns=columns)


@torch.no_grad()
def histograms(layers: dict[str, QuantLayer], most: int = HISTOGRAMS) -> pd.DataFrame:
    """Weights before and after quantization counted in equal bins, of the `most` layers with the most weights.

    Columns: layer, precision, low and high (edges of the bin), before, after (counts).
    """
    sizes = {name: cast(Tensor, layer.weight).numel() for name, layer in layers.items()}
    largest = set(sorted(sizes, key=lambda name: -sizes[name])[:most])
    rows = []
    for name, layer in layers.items():
        if name not in largest:
            continue
        before, after = cast(Tensor, layer.weight).float(), layer.quantized_weight().float()
        # As wide above zero as below, and an odd number of bins: zero, a level of every grid, is in a bin's middle.
        end = max(float(before.abs().max()), float(after.abs().max()), 1e-12)
        edges = torch.linspace(-end, end, BINS + 1).tolist()
        counts = [torch.histc(x, BINS, -end, end).int().tolist() for x in (before, after)]
        precision = mark(layer.weight_quantizer.precision)
        rows += [(name, precision, *row) for row in zip(edges[:-1], edges[1:], *counts, strict=True)]
    return pd.DataFrame(rows, columns=["layer", "precision", "low", "high", "before", "after"])


def _ends(quantizer: Quantizer, form: Tensor) -> tuple[float, float]:
    """What a quantizer makes of values far outside its range, whatever its type."""
    far = torch.full_like(form, 1e30, dtype=torch.float32)
    return float(quantizer(-far).min()), float(quantizer(far).max())
