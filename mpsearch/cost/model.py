"""Cost models: what a config costs, in total and by layer.

A cost model is a list of parts, each a pure function of (layer, precision). Adding a model is one entry in
`COST_MODELS` and its name in `study.COST_NAMES`. All models count the first and the last layer at the width they
really have, and a layer that cannot be quantized as float, by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from mpsearch.cost.bops import bit_operations
from mpsearch.cost.energy import shift_energy_acc32_pj, shift_energy_pj
from mpsearch.cost.memory import (
    activation_bytes,
    activation_traffic_pj,
    bias_bytes,
    bias_traffic_pj,
    live_activation_bytes,
    weight_bytes,
    weight_traffic_pj,
)
from mpsearch.errors import CostError, nearest
from mpsearch.graph.facts import LayerInfo
from mpsearch.precision import FLOAT, LayerPrecision, PrecisionConfig, per_tensor

Choices = Mapping[str, Sequence[LayerPrecision]]
"""Layer name -> the precisions that it may have."""


@dataclass(frozen=True, slots=True)
class Part:
    """One addend of a cost model."""

    of: Callable[[LayerInfo, LayerPrecision], float]
    once_per: Literal["weight_group", "input_group"] | None = None
    """Layers of one group hold the same tensor: it is counted once, at the widest of their precisions."""


@dataclass(frozen=True, slots=True)
class CostModel:
    """A named way to price a config."""

    unit: str
    parts: tuple[Part, ...]
    total: Callable[[Iterable[float]], float] = sum  # of the layers' costs
    change: float = 0.0  # for each two layers one after another whose activations differ in precision, in the unit
    fixed: float = 0.0  # of the network outside its layers, in the unit
    rows_only: bool = False  # whether it knows some pairs alone, and raises CostError for others


_WEIGHT_BYTES = (Part(weight_bytes, once_per="weight_group"), Part(bias_bytes))
_MEMORY_ENERGY = (
    Part(weight_traffic_pj, once_per="weight_group"),
    Part(bias_traffic_pj),
    Part(activation_traffic_pj, once_per="input_group"),  # written by whoever makes it
    Part(activation_traffic_pj),  # read by every layer that it feeds
)

COST_MODELS: dict[str, CostModel] = {
    "shift_energy": CostModel("pJ", (Part(shift_energy_pj),)),
    "shift_energy_acc32": CostModel("pJ", (Part(shift_energy_acc32_pj),)),
    "bops": CostModel("BOPs", (Part(bit_operations),)),
    "weight_bytes": CostModel("bytes", _WEIGHT_BYTES),
    "activation_bytes": CostModel("bytes", (Part(activation_bytes, once_per="input_group"),)),
    "activation_bytes_peak": CostModel("bytes", (Part(live_activation_bytes),), total=max),
    "memory_energy": CostModel("pJ", _MEMORY_ENERGY),
}


@dataclass(frozen=True, slots=True)
class Cost:
    """What one config costs for one sample."""

    total: float
    unit: str
    per_layer: Mapping[str, float]  # a tensor that layers share is counted at the one that holds it widest
    float_layers: tuple[str, ...]  # cannot be quantized, priced as float


def cost_of(layers: Sequence[LayerInfo], config: PrecisionConfig, model: str | CostModel = "shift_energy") -> Cost:
    """Price a config under a cost model.

    Raises:
        CostError: no such model; or the config misses a quantizable layer, or names one that is none.
    """
    return _Pricing(layers, model).cost(config)


@dataclass(frozen=True)
class Bound:
    """The most that one cost of a config may be."""

    name: str  # of the cost
    cost: RelativeCost
    most: float  # relative to the reference
    text: str  # the bound as people read it, with its unit

    def octaves(self, config: PrecisionConfig) -> float:
        """log2 of the cost over the bound: at most 0 where it is kept."""
        return math.log2(max(self.cost(config), 1e-300) / self.most)

    def __str__(self) -> str:
        return f"{self.name} <= {self.text}"


class RelativeCost:
    """Config -> its cost, divided by the cost of the network with every quantizable layer at the reference.

    Remembers what each layer costs at each precision it has met: made for many configs of one network. The study's
    limits on other costs are with it (`limits`), because whoever proposes configs by their cost has to keep them too.
    """

    def __init__(
        self,
        layers: Sequence[LayerInfo],
        model: str | CostModel = "shift_energy",
        reference: str = "w8a8",
        limits: Sequence[Bound] = (),
    ) -> None:
        """Fix the network, the model and what costs 1.

        Raises:
            CostError: no such model, or a network that costs nothing.
            PrecisionError: a reference of another form than w8a8.
        """
        self._pricing = _Pricing(layers, model)
        self.limits = tuple(limits)
        names = [layer.name for layer in layers if layer.reason is None]
        self.reference = self.absolute(PrecisionConfig.uniform(names, LayerPrecision.shorthand(reference)))
        if not self.reference.total > 0:
            raise CostError(f"the network costs nothing under {model}: give one with layers that multiply")

    def __call__(self, config: PrecisionConfig) -> float:
        """Relative cost. Raises CostError as `cost_of` does."""
        return self.absolute(config).total / self.reference.total

    def absolute(self, config: PrecisionConfig) -> Cost:
        """The cost in the model's unit. Raises CostError as `cost_of` does."""
        return self._pricing.cost(config)

    def within_limits(self, config: PrecisionConfig) -> bool:
        """Whether a config keeps every limit. Raises CostError as `cost_of` does."""
        return all(bound.cost(config) <= bound.most for bound in self.limits)

    @property
    def combined_by(self) -> Callable[[Iterable[float]], float]:
        """What makes one cost of the layers' costs: `sum`, or `max` for a peak."""
        return self._pricing.model.total

    @property
    def rows_only(self) -> bool:
        """Whether only some pairs have a cost."""
        return self._pricing.model.rows_only

    @property
    def model(self) -> CostModel:
        """The cost model."""
        return self._pricing.model

    def price(self, name: str, precision: LayerPrecision) -> float | None:
        """What a layer costs by itself at a precision, in the model's unit; None where the model does not know it."""
        try:
            return self._pricing.alone(name)(precision)
        except CostError:
            return None

    @property
    def change(self) -> float:
        """Relative cost of a change of the activations' precision from one layer to the next; mostly 0."""
        return self._pricing.model.change / self.reference.total

    def of_changes(self, config: PrecisionConfig) -> float:
        """Relative cost of all changes of precision in a config."""
        return self._pricing.of_changes(config) / self.reference.total

    @property
    def of_float_layers(self) -> float:
        """Relative cost of what no config names: layers that stay float, combined, and what is outside layers."""
        return self._pricing.of_float_layers() / self.reference.total

    def addend(self, name: str, precision: LayerPrecision) -> float:
        """Relative cost of one layer in a config where the layers that share its tensors agree on their precision.

        Then `combined_by` of all addends and of `of_float_layers`, and `of_changes`, make up the cost of the config.

        Raises:
            CostError: no quantizable layer has this name.
        """
        return self._pricing.addend(name, precision) / self.reference.total

    def bounds(self, choices: Choices) -> tuple[float, float]:
        """Relative cost of the cheapest and of the dearest config that can be chosen.

        Every layer is taken at its own cheapest (dearest) precision, which need not be the one with the fewest
        (most) bits. Layers that must agree are not made to: where that matters, no config reaches the bound, and
        still none passes it.

        Raises:
            CostError: a quantizable layer has no choice, or a name is no quantizable layer.
        """
        self._pricing.check(choices)
        if empty := [name for name, precisions in choices.items() if not precisions]:
            raise CostError(f"layer '{empty[0]}' has no precision to choose: allow one for its weight and its input")
        cheapest, dearest = (
            PrecisionConfig((name, pick(choices[name], key=self._pricing.alone(name))) for name in choices)
            for pick in (min, max)
        )
        every = self.change * max(0, len(choices) - 1)  # as if each layer were another than the one before it
        return self(cheapest) - self.of_changes(cheapest), self(dearest) - self.of_changes(dearest) + every


def affordable(cost: Callable[[PrecisionConfig], float], config: PrecisionConfig, budget: float) -> bool:
    """Whether a config is within a budget of relative cost, and within the limits of the study that has the cost."""
    return cost(config) <= budget and (not isinstance(cost, RelativeCost) or cost.within_limits(config))


class _Pricing:
    """A network under a cost model, with a memory: layer name -> precision -> the value of every part."""

    def __init__(self, layers: Sequence[LayerInfo], model: str | CostModel) -> None:
        if isinstance(model, str) and model not in COST_MODELS:
            raise CostError(f"unknown cost model '{model}': {nearest(model, COST_MODELS)}")
        self.model = COST_MODELS[model] if isinstance(model, str) else model
        self._prices = {layer.name: _LayerPrices(layer, self.model.parts) for layer in layers}
        self._float = {layer.name: layer.reason for layer in layers if layer.reason is not None}
        self._shared = [
            (index, members)
            for index, part in enumerate(self.model.parts)
            if part.once_per is not None
            for members in _groups(layers, part.once_per)
        ]

    def cost(self, config: PrecisionConfig) -> Cost:
        self.check(config)
        parts = {
            name: prices[_AS_FLOAT if name in self._float else config[name]] for name, prices in self._prices.items()
        }
        per_layer = {name: sum(values) for name, values in parts.items()}
        for index, members in self._shared:
            holder = max(members, key=lambda name: parts[name][index])
            for name in members:
                if name != holder:
                    per_layer[name] -= parts[name][index]
        total = self.model.total(per_layer.values()) if per_layer else 0.0
        total += self.of_changes(config) + self.model.fixed
        return Cost(total, self.model.unit, per_layer, tuple(self._float))

    def addend(self, name: str, precision: LayerPrecision) -> float:
        """What a layer adds to the total; a tensor that layers share is counted at the one that `cost` counts it at."""
        if name not in self._prices or name in self._float:
            raise CostError(f"no quantizable layer '{name}': {nearest(name, self._prices.keys() - self._float.keys())}")
        parts = self._prices[name][precision]
        counted_elsewhere = (
            parts[index]
            for index, members in self._shared
            if name in members and name != max(members, key=lambda other: self._prices[other][precision][index])
        )
        return sum(parts) - sum(counted_elsewhere)

    def of_changes(self, config: PrecisionConfig) -> float:
        """The cost of the changes of precision between layers one after another, in execution order."""
        if not self.model.change:
            return 0.0
        activations = [config[name].activation for name in self._prices if name not in self._float]
        return self.model.change * sum(a != b for a, b in pairwise(activations))

    def of_float_layers(self) -> float:
        """The cost of the layers that stay float, combined, and of what is outside layers."""
        prices = [sum(self._prices[name][_AS_FLOAT]) for name in self._float]
        return (self.model.total(prices) if prices else 0.0) + self.model.fixed

    def alone(self, name: str) -> Callable[[LayerPrecision], float]:
        """The price of one layer that shares nothing, as a function of its precision."""
        return lambda precision: sum(self._prices[name][precision])

    def check(self, named: Mapping[str, object]) -> None:
        """Whether exactly the quantizable layers are named. Raises CostError if not."""
        quantizable = self._prices.keys() - self._float.keys()
        if missing := [name for name in self._prices if name in quantizable and name not in named]:
            raise CostError(f"layer '{missing[0]}' has no precision: give every quantizable layer one")
        for name in named:
            if name in self._float:
                raise CostError(f"layer '{name}' stays float ({self._float[name]}): leave it out")
            if name not in quantizable:
                raise CostError(f"no quantizable layer '{name}' in this network: {nearest(name, quantizable)}")


_AS_FLOAT = LayerPrecision(FLOAT, FLOAT)


class _LayerPrices(dict[LayerPrecision, tuple[float, ...]]):
    """Precision -> the value of every part for one layer, computed when first asked for."""

    def __init__(self, layer: LayerInfo, parts: tuple[Part, ...]) -> None:
        self._layer, self._parts = layer, parts

    def __missing__(self, precision: LayerPrecision) -> tuple[float, ...]:
        one_scale = self._layer.multiplies_activations
        priced = LayerPrecision(per_tensor(precision.weight), precision.activation) if one_scale else precision
        values = self[precision] = tuple(part.of(self._layer, priced) for part in self._parts)
        return values


def _groups(layers: Sequence[LayerInfo], kind: Literal["weight_group", "input_group"]) -> list[list[str]]:
    """The names of layers that share a tensor, group by group; a layer that shares none is in no group."""
    groups: dict[str, list[str]] = {}
    for layer in layers:
        first = layer.weight_group if kind == "weight_group" else layer.input_group
        groups.setdefault(first or layer.name, []).append(layer.name)
    return [members for members in groups.values() if len(members) > 1]
