"""What a training of one config gives: the quantized model, what it is, and how it went."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from mpsearch.exporters.native import save
from mpsearch.exporters.network import QuantizedNetwork
from mpsearch.graph.layers import LayerInfo
from mpsearch.precision import PrecisionConfig


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

    def save(
        self, folder: str | Path, *, name: str, task: str, metric: str, accuracy: Mapping[str, float | None]
    ) -> Path:
        """Write a native export; `mpsearch.load` gives the model back from the original float network."""
        network = QuantizedNetwork(self.model, self.layers, name, task, metric, accuracy, structure=self.structure)
        save(network, Path(folder))
        return Path(folder)
