"""What a training of one config gives: the quantized model, what it is, and how it went."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from mpsearch.graph.facts import LayerInfo
from mpsearch.metric import Metric
from mpsearch.precision import PrecisionConfig
from mpsearch.quant.network import QuantizedNetwork


@dataclass(frozen=True)
class Trained:
    """A quantized model in eval mode, whose quantizers are those that are priced and exported."""

    model: nn.Module
    layers: tuple[LayerInfo, ...]
    config: PrecisionConfig
    seconds: Mapping[str, float]  # by stage
    log: tuple[Mapping[str, float], ...] = ()  # of training, in order: step, loss and what the method adds
    notes: tuple[str, ...] = ()  # what was left out and why, in words
    structure: Mapping[str, Any] | None = None  # how the network was changed before it was quantized

    def network(self, *, name: str, task: str, metric: Metric, score: Mapping[str, float | None]) -> QuantizedNetwork:
        """What `mpsearch.export` takes."""
        return QuantizedNetwork(self.model, self.layers, name, task, metric, score, structure=self.structure)
