"""What every export target is given: one quantized network, and all that is known of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mpsearch.graph.facts import LayerInfo
from mpsearch.metric import Metric
from mpsearch.precision import PrecisionConfig
from mpsearch.quant.prepare import quant_layers


@dataclass(frozen=True)
class QuantizedNetwork:
    """A quantized network with its weights and scales, the facts of its layers, and what was measured of it.

    Args:
        model: what `prepare` made, trained or not; no target changes it.
        layers: the layers of the float model that it was made from.
        name: the network's name.
        task: what it was measured on.
        metric: what `score` is.
        score: measured scores by split.
        cost: `{"model", "reference", "relative"}`.
        structure: how the network was changed before it was quantized, as `mpsearch.ptq.fold.structure_of` says it.
        example_input: one batch of model input, for the targets that trace (`onnx`, `qonnx`).
        samples: a batch of model input that an export is verified on, some 64 samples; default: `example_input`.
        float_model: what the network was made from, for verifying the targets that are loaded into PyTorch.

    >>> import torch, mpsearch
    >>> model, batch = nn.Sequential(nn.Linear(4, 2)), torch.randn(8, 4)
    >>> layers = mpsearch.inspect_model(model, batch).layers
    >>> config = mpsearch.PrecisionConfig.uniform(["0"], mpsearch.LayerPrecision.shorthand("w4a8"))
    >>> prepared = mpsearch.prepare(model, config, batch, layers)
    >>> network = mpsearch.QuantizedNetwork(prepared, layers, name="mine", task="random", example_input=batch)
    >>> network.config == config
    True
    """

    model: nn.Module
    layers: tuple[LayerInfo, ...]
    name: str
    task: str
    metric: Metric | None = None
    score: Mapping[str, float | None] = field(default_factory=dict)
    cost: Mapping[str, Any] | None = None
    structure: Mapping[str, Any] | None = None
    example_input: Any = None
    samples: Any = None
    float_model: nn.Module | None = None

    @property
    def config(self) -> PrecisionConfig:
        """The precision of each quantized layer."""
        return PrecisionConfig((name, layer.precision) for name, layer in quant_layers(self.model).items())

    @property
    def info(self) -> dict[str, LayerInfo]:
        """The facts of each quantized layer, by name, in the order of `config`."""
        by_name = {layer.name: layer for layer in self.layers}
        return {name: by_name[name] for name in quant_layers(self.model)}

    def document(self, schema: str) -> dict[str, Any]:
        """What the JSON file of every target starts with."""
        from importlib.metadata import version

        document: dict[str, Any] = {
            "schema": schema,
            "mpsearch": version("mpsearch"),
            "model": self.name,
            "task": self.task,
            "layers": self.config.to_json(),
        }
        if self.metric is not None:
            facts = {"metric": self.metric.name, "direction": self.metric.direction, "unit": self.metric.unit}
            document |= {**facts, "score": dict(self.score)}
        if self.cost is not None:
            document["cost"] = dict(self.cost)
        return document
