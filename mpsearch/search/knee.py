"""Measures what the weights of a run's knee are, and stores it for those who look at the run (`search/values.py`).

Read from the checkpoint in the run folder; nothing is trained or run on data.
"""

from __future__ import annotations

import logging
from typing import cast

import torch
from pydantic import ValidationError
from torch import Tensor

from mpsearch.errors import RunError, WriteError
from mpsearch.problem import Problem
from mpsearch.quant.modules import QuantLayer
from mpsearch.quant.prepare import insert_quantizers, quant_layers
from mpsearch.quant.quantizer import Quantizer
from mpsearch.record import RunFolder, checkpoint_path, final_path
from mpsearch.search.front import ParetoFront
from mpsearch.search.values import KneeValues, TensorRange, WeightHistogram, read_values, write_values
from mpsearch.space.choices import TensorName
from mpsearch.state_dict import load_tensors, read_tensors

logger = logging.getLogger(__name__)

BINS = 61
HISTOGRAMS = 12
"""Layers with a histogram: those with the most weights."""


def keep_values(problem: Problem, folder: RunFolder, front: ParetoFront, anew: bool = False) -> None:
    """Store the values of the knee, of its final training if there is one; nothing where no weights were kept.

    A run does not end because they cannot be read or stored: a warning says why the report is without them.

    Args:
        problem: the study.
        folder: its run.
        front: of the run.
        anew: also where they are stored already (a final training may have written better weights).
    """
    if not front.trials:
        return
    knee = front.knee
    written = (final_path(folder.checkpoints, knee.number), checkpoint_path(folder.checkpoints, knee.number))
    checkpoint = next((path for path in written if path.exists()), None)
    if checkpoint is None:
        return
    try:
        known = read_values(folder)
    except RunError:  # written again
        known = None
    if known and not anew and (known.config, known.checkpoint) == (knee.config.digest, checkpoint.name):
        return
    try:
        network = insert_quantizers(problem.task.float_model(), problem.graph.layers, knee.config.offers)
        layers = quant_layers(network)
        for name, layer in layers.items():
            layer.set_precision(knee.config[name])
        load_tensors(network, read_tensors(checkpoint, "export or finalize makes it again"))
        values = KneeValues(
            config=knee.config.digest,
            checkpoint=checkpoint.name,
            ranges=ranges(layers),
            histograms=histograms(layers),
        )
        write_values(folder, values)
    except (RunError, RuntimeError, ValidationError, WriteError) as error:
        logger.warning("the report will be without the weights of the knee (%s): %s", checkpoint, error)


@torch.no_grad()
def ranges(layers: dict[str, QuantLayer]) -> tuple[TensorRange, ...]:
    """Of every quantized tensor, in the network's order: what its quantizer can give, and what float weights there are.

    Args:
        layers: with the weights and steps of a checkpoint.
    """
    rows = []
    for name, layer in layers.items():
        weight = cast(Tensor, layer.weight) if layer.has_weight else torch.zeros(())
        seen = (float(weight.min()), float(weight.max())) if layer.has_weight else (None, None)
        sides: list[tuple[TensorName, Quantizer, Tensor, float | None, float | None]] = [
            ("weight", layer.weight_quantizer, weight, *seen),
            ("activation", layer.input_quantizer, torch.zeros(()), None, None),
        ]
        for tensor, quantizer, form, seen_low, seen_high in sides:
            if quantizer.precision.has_scale:
                low, high = _ends(quantizer, form)
                rows.append(
                    TensorRange(
                        layer=name,
                        tensor=tensor,
                        weights=weight.numel() if layer.has_weight else 0,
                        low=low,
                        high=high,
                        seen_low=seen_low,
                        seen_high=seen_high,
                    )
                )
    return tuple(rows)


@torch.no_grad()
def histograms(layers: dict[str, QuantLayer], most: int = HISTOGRAMS) -> tuple[WeightHistogram, ...]:
    """Weights before and after quantization, of the `most` layers with the most weights, in the network's order."""
    sizes = {name: cast(Tensor, layer.weight).numel() for name, layer in layers.items() if layer.has_weight}
    largest = set(sorted(sizes, key=lambda name: -sizes[name])[:most])
    rows = []
    for name in filter(largest.__contains__, layers):
        before = cast(Tensor, layers[name].weight).float()
        after = layers[name].quantized_weight().float()
        # As wide above zero as below, and an odd number of bins: zero, a level of every grid, is in a bin's middle.
        end = max(float(before.abs().max()), float(after.abs().max()), 1e-12)
        counts = [tuple(torch.histc(x, BINS, -end, end).int().tolist()) for x in (before, after)]
        rows.append(WeightHistogram(layer=name, end=end, before=counts[0], after=counts[1]))
    return tuple(rows)


def _ends(quantizer: Quantizer, form: Tensor) -> tuple[float, float]:
    """What a quantizer makes of values far outside its range, whatever its type; `form` has the shape of its tensor."""
    far = torch.full_like(form, 1e30, dtype=torch.float32)
    return float(quantizer(-far).min()), float(quantizer(far).max())
