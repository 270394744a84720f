"""SearchSpace: which precisions each tensor of a network may take, and what that means to Optuna.

A slot is one decision: the weight precision or the activation precision of one layer, or of several that must agree.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mpsearch.errors import SpaceError
from mpsearch.precision import LayerPrecision, Offer, Precision, PrecisionConfig
from mpsearch.space.choices import TENSORS, TensorName, listing, near, precision_order

if TYPE_CHECKING:
    import numpy as np
    from optuna.distributions import BaseDistribution


@dataclass(frozen=True)
class Slot:
    """One decision: the precision of one tensor, in every layer that must agree on it."""

    tensor: TensorName
    layers: tuple[str, ...]
    choices: tuple[Precision, ...]  # in order of bits, then of quantizer

    @cached_property
    def name(self) -> str:
        """The first layer and the tensor, as `layer1.0.conv1/weight`."""
        return f"{self.layers[0]}/{self.tensor}"

    @cached_property
    def only_bits(self) -> bool:
        """Whether the choices differ in nothing but their bits, and leave none out: an integer range."""
        bits = [choice.bits for choice in self.choices]
        same = len({(choice.quantizer, choice.granularity) for choice in self.choices}) == 1
        return same and bits == list(range(bits[0], bits[-1] + 1))

    @cached_property
    def parameter(self) -> str:
        """What Optuna knows it by: `LAYER/weight_bits` for an integer range, `LAYER/weight` for texts."""
        return f"{self.name}_bits" if self.only_bits else self.name

    @cached_property
    def by_value(self) -> Mapping[int | str, Precision]:
        """The choices by the values of the parameter that stand for them."""
        return {self.value(choice): choice for choice in self.choices}

    def value(self, choice: Precision) -> int | str:
        """The parameter's value that stands for a choice."""
        return choice.bits if self.only_bits else str(choice)

    def steps(self, choice: Precision) -> tuple[Precision, ...]:
        """The choices one step away: the next fewer and more bits of the same type, and each other type at the nearest.

        A type is a quantizer with its granularity.
        """
        types: dict[tuple[str, str | None], list[Precision]] = {}
        for other in self.choices:
            types.setdefault((other.quantizer, other.granularity), []).append(other)
        same = types.pop((choice.quantizer, choice.granularity))
        at = same.index(choice)
        changed = [min(others, key=lambda c: (abs(c.bits - choice.bits), -c.bits)) for others in types.values()]
        return (*same[max(at - 1, 0) : at], *same[at + 1 : at + 2], *changed)

    def nearest(self, bits: int) -> Precision:
        """The choice nearest to this many bits, the higher of two; uniform where there is a uniform one."""
        return min(
            self.choices, key=lambda c: (c.quantizer != "uniform", abs(c.bits - bits), -c.bits, precision_order(c))
        )


@dataclass(frozen=True)
class SearchSpace:
    """Every config that a search may propose for one network."""

    name: str
    layers: tuple[str, ...]  # every quantizable layer, in execution order
    slots: tuple[Slot, ...]  # every tensor of every layer is in exactly one
    notes: tuple[str, ...] = ()  # what layers that must agree have lost of their own choices, in words

    @cached_property
    def free(self) -> tuple[Slot, ...]:
        """The slots that leave something to choose."""
        return tuple(slot for slot in self.slots if len(slot.choices) > 1)

    @cached_property
    def several_types(self) -> bool:
        """Whether some slot leaves a choice between quantizer types."""
        return any(len({c.quantizer for c in slot.choices if not c.is_float}) > 1 for slot in self.slots)

    @cached_property
    def _parameters(self) -> frozenset[str]:
        return frozenset(slot.parameter for slot in self.free)

    @property
    def size(self) -> int:
        """How many configs there are."""
        return math.prod(len(slot.choices) for slot in self.slots)

    @property
    def offers(self) -> dict[str, Offer]:
        """The quantizer types among the choices of each layer."""
        types = {
            (name, slot.tensor): frozenset(choice.quantizer for choice in slot.choices)
            for slot in self.slots
            for name in slot.layers
        }
        return {name: Offer(types[name, "weight"], types[name, "activation"]) for name in self.layers}

    def distributions(self) -> dict[str, BaseDistribution]:
        """The Optuna distribution of each free slot, by parameter name."""
        from optuna.distributions import CategoricalDistribution, IntDistribution

        return {
            slot.parameter: IntDistribution(slot.choices[0].bits, slot.choices[-1].bits)
            if slot.only_bits
            else CategoricalDistribution([str(choice) for choice in slot.choices])
            for slot in self.free
        }

    def config_of(self, params: Mapping[str, Any]) -> PrecisionConfig:
        """The config that Optuna parameters stand for: the inverse of `params_of`.

        Raises:
            SpaceError: a parameter is missing, is not of this space, or has a value that is no choice.
        """
        if len(params) > len(self.free) or not params.keys() <= self._parameters:
            name = next(name for name in params if name not in self._parameters)
            names = [slot.parameter for slot in self.free]
            raise SpaceError(f"space '{self.name}' has no parameter '{name}': {near(name, names)}")
        precisions = []
        for slot in self.slots:
            if len(slot.choices) == 1:
                precisions.append(slot.choices[0])
                continue
            if slot.parameter not in params:
                raise SpaceError(f"parameter '{slot.parameter}' is missing: give a value for each of {len(self.free)}")
            value = params[slot.parameter]
            if value not in slot.by_value:
                raise SpaceError(f"parameter '{slot.parameter}' is {value!r}: choose from {listing(slot.by_value)}")
            precisions.append(slot.by_value[value])
        return self._config(precisions)

    def params_of(self, config: PrecisionConfig) -> dict[str, int | str]:
        """The Optuna parameters that stand for a config: the inverse of `config_of`.

        Raises:
            SpaceError: the config is outside the space; the message names the layer.
        """
        pairs = zip(self.slots, self._precisions(config), strict=True)
        return {slot.parameter: slot.value(choice) for slot, choice in pairs if len(slot.choices) > 1}

    def contains(self, config: PrecisionConfig) -> bool:
        """Whether the search could propose this config."""
        try:
            self._precisions(config)
        except SpaceError:
            return False
        return True

    def sample(self, rng: np.random.Generator) -> PrecisionConfig:
        """A config drawn uniformly: every slot for itself, every choice as likely."""
        return self._config([slot.choices[rng.integers(len(slot.choices))] for slot in self.slots])

    def rung(self, bits: int) -> PrecisionConfig:
        """The uniform config of the space nearest to this many bits everywhere."""
        return self._config([slot.nearest(bits) for slot in self.slots])

    def everywhere(self, precision: LayerPrecision) -> PrecisionConfig:
        """One precision for every layer, on offer or not; only what the space fixes stays as it fixes it."""
        precisions = {"weight": precision.weight, "activation": precision.activation}
        return self._config(
            [slot.choices[0] if len(slot.choices) == 1 else precisions[slot.tensor] for slot in self.slots]
        )

    def ladder(self) -> list[PrecisionConfig]:
        """The uniform ladder, the baseline of every study: a config for each bit-width on offer, from high to low.

        Bit-widths are those of uniform quantizers; a space without any has a ladder of what it has. Widths that lead to
        the same config give one rung.
        """
        choices = {choice for slot in self.slots for choice in slot.choices}
        uniform = {choice for choice in choices if choice.quantizer == "uniform"}
        widths = sorted({choice.bits for choice in uniform or choices}, reverse=True)
        return list(dict.fromkeys(map(self.rung, widths)))

    def combinations(self) -> list[PrecisionConfig]:
        """Every global combination: one weight precision and one activation precision wherever they are on offer.

        A slot that does not offer it takes its uniform choice nearest in bits. Among them is the uniform ladder.
        """
        on_offer: dict[TensorName, set[Precision | None]] = {"weight": set(), "activation": set()}
        for slot in self.free:
            on_offer[slot.tensor].update(slot.choices)
        pairs = itertools.product(*(sorted(on_offer[tensor] or {None}, key=str) for tensor in TENSORS))
        configs = dict.fromkeys(
            self._config([_take(slot, pair[TENSORS.index(slot.tensor)]) for slot in self.slots]) for pair in pairs
        )
        return list(configs)

    def neighbours(self, config: PrecisionConfig) -> list[PrecisionConfig]:
        """The configs that differ in one slot by one step: a bit, or the type.

        Raises:
            SpaceError: the config is outside the space.
        """
        precisions = self._precisions(config)
        configs = []
        for i, slot in enumerate(self.slots):
            configs += [
                self._config([*precisions[:i], step, *precisions[i + 1 :]]) for step in slot.steps(precisions[i])
            ]
        return configs

    def _config(self, precisions: Sequence[Precision]) -> PrecisionConfig:
        precision = {
            (layer, slot.tensor): choice
            for slot, choice in zip(self.slots, precisions, strict=True)
            for layer in slot.layers
        }
        return PrecisionConfig(
            (layer, LayerPrecision(precision[layer, "weight"], precision[layer, "activation"])) for layer in self.layers
        )

    def _precisions(self, config: PrecisionConfig) -> list[Precision]:
        """The choice of each slot, if the config is one of the space's."""
        for layer in config:
            if layer not in self.layers:
                raise SpaceError(f"space '{self.name}' has no layer '{layer}': {near(layer, self.layers)}")
        for layer in self.layers:
            if layer not in config:
                raise SpaceError(f"the config says nothing of layer '{layer}': give all {len(self.layers)} layers")
        values = []
        for slot in self.slots:
            precisions = [getattr(config[layer], slot.tensor) for layer in slot.layers]
            for layer, precision in zip(slot.layers, precisions, strict=True):
                if precision not in slot.choices:
                    raise SpaceError(
                        f"layer '{layer}' has {slot.tensor} {precision}, which is outside space '{self.name}': "
                        f"choose from {listing(slot.choices)}"
                    )
                if precision != precisions[0]:
                    raise SpaceError(
                        f"layers '{slot.layers[0]}' and '{layer}' share one {slot.tensor} precision in space "
                        f"'{self.name}', got {precisions[0]} and {precision}: give both the same"
                    )
            values.append(precisions[0])
        return values


def _take(slot: Slot, precision: Precision | None) -> Precision:
    """A choice of the slot: the one that is wanted, if it has it."""
    return precision if precision in slot.choices else slot.nearest(precision.bits if precision is not None else 8)
