"""SearchSpace: which precisions each tensor of a network may take, and what that means to Optuna.

A slot is one decision: the weight precision or the activation precision of one layer, or of several that must agree.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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


COUNTABLE = 100_000
"""Choices of the slots on one side of a component up to which its configs are counted one by one."""


@dataclass(frozen=True)
class SearchSpace:
    """Every config that a search may propose for one network."""

    name: str
    layers: tuple[str, ...]  # every quantizable layer, in execution order
    slots: tuple[Slot, ...]  # every tensor of every layer is in exactly one
    notes: tuple[str, ...] = ()  # what layers that must agree have lost of their own choices, in words
    pairs: Mapping[str, frozenset[LayerPrecision]] = field(default_factory=dict, hash=False)
    """The pairs that a layer may have, of its choices for both tensors; a layer that is not named may have all."""

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
        """How many configs there are; at most so many where pairs are excluded in a way that cannot be counted."""
        return math.prod(self._count(component) for component in self._components)

    @property
    def combined(self) -> int:
        """How many ways there are to choose for each slot by itself, excluded pairs among them."""
        return math.prod(len(slot.choices) for slot in self.slots)

    @cached_property
    def options(self) -> Mapping[str, tuple[LayerPrecision, ...]]:
        """Every pair of precisions that each layer may have."""
        choices = {(name, slot.tensor): slot.choices for slot in self.slots for name in slot.layers}
        return {
            name: tuple(
                pair
                for pair in itertools.starmap(
                    LayerPrecision, itertools.product(choices[name, "weight"], choices[name, "activation"])
                )
                if self.allows(name, pair)
            )
            for name in self.layers
        }

    def allows(self, layer: str, pair: LayerPrecision) -> bool:
        """Whether a layer may have these two of its choices together."""
        return layer not in self.pairs or pair in self.pairs[layer]

    @cached_property
    def _partners(self) -> list[dict[int, list[str]]]:
        """Of each slot, the slots that it has a layer in common with, and these layers."""
        slot_of = {(layer, slot.tensor): i for i, slot in enumerate(self.slots) for layer in slot.layers}
        partners: list[dict[int, list[str]]] = [{} for _ in self.slots]
        for layer in self.layers:
            w, a = slot_of[layer, "weight"], slot_of[layer, "activation"]
            partners[w].setdefault(a, []).append(layer)
            partners[a].setdefault(w, []).append(layer)
        return partners

    @cached_property
    def _components(self) -> list[list[int]]:
        """The slots whose choices depend on each other, activations first; a slot that nothing restricts is alone."""
        components, seen = [], set[int]()
        for first in range(len(self.slots)):
            if first in seen:
                continue
            component, waiting = [], [first]
            while waiting:
                slot = waiting.pop()
                if slot not in seen:
                    seen.add(slot)
                    component.append(slot)
                    restricted = (
                        other
                        for other, layers in self._partners[slot].items()
                        if not self.pairs.keys().isdisjoint(layers)
                    )
                    waiting += restricted
            components.append(sorted(component, key=lambda i: (self.slots[i].tensor, i)))
        return components

    def _agree(self, slot: int, choice: Precision, other: int, its_choice: Precision) -> bool:
        """Whether two slots may have these choices."""
        weight, activation = (choice, its_choice) if self.slots[slot].tensor == "weight" else (its_choice, choice)
        pair = LayerPrecision(weight, activation)
        return all(self.allows(layer, pair) for layer in self._partners[slot][other])

    def _count(self, component: Sequence[int]) -> int:
        """How many choices there are for the slots of a component together."""
        if len(component) == 1:
            return len(self.slots[component[0]].choices)
        sides = [[i for i in component if self.slots[i].tensor == tensor] for tensor in TENSORS]
        few, many = sorted(sides, key=lambda side: math.prod(len(self.slots[i].choices) for i in side))
        if math.prod(len(self.slots[i].choices) for i in few) > COUNTABLE:
            return math.prod(len(self.slots[i].choices) for i in component)
        total = 0
        for chosen in itertools.product(*(self.slots[i].choices for i in few)):
            known = dict(zip(few, chosen, strict=True))
            total += math.prod(
                sum(
                    all(self._agree(i, choice, other, known[other]) for other in self._partners[i] if other in known)
                    for choice in self.slots[i].choices
                )
                for i in many
            )
        return total

    def allowed(self, precisions: Sequence[Precision], pinned: int | None = None) -> list[Precision]:
        """The choice of each slot, changed to near ones where a layer may not have the pair that it would get.

        Args:
            precisions: a choice for each slot.
            pinned: the slot whose choice is the last that is changed; default: those of activations are.

        Raises:
            SpaceError: there is no config at all: whatever some layers have, another may not have it.
        """
        if not self.pairs:
            return list(precisions)
        chosen = list(precisions)
        for component in self._components:
            if len(component) > 1 and not self._agreed(component, chosen):
                order = sorted(component, key=lambda i: (i != pinned, component.index(i)))
                if not self._choose(order, 0, chosen, list(precisions)):
                    names = ", ".join(self.slots[i].name for i in component[:4])
                    raise SpaceError(
                        f"space '{self.name}' has no config: the pairs allowed for {names} exclude each other"
                    )
        return chosen

    def _agreed(self, component: Sequence[int], chosen: Sequence[Precision]) -> bool:
        return all(
            self._agree(i, chosen[i], other, chosen[other])
            for i in component
            if self.slots[i].tensor == "weight"
            for other in self._partners[i]
        )

    def _choose(self, order: Sequence[int], at: int, chosen: list[Precision], wanted: Sequence[Precision]) -> bool:
        """Fill `chosen` from the slot at position `at` of `order` on, the nearest choices first; whether it can be."""
        if at == len(order):
            return True
        slot = order[at]
        decided = [other for other in self._partners[slot] if other in order[:at]]
        later = [other for other in self._partners[slot] if other in order[at:]]
        for choice in sorted(self.slots[slot].choices, key=lambda c: _distance(c, wanted[slot])):
            if not all(self._agree(slot, choice, other, chosen[other]) for other in decided):
                continue
            if not all(any(self._agree(slot, choice, other, c) for c in self.slots[other].choices) for other in later):
                continue
            chosen[slot] = choice
            if self._choose(order, at + 1, chosen, wanted):
                return True
        return False

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

        Samplers choose for each slot by itself: where a layer may not have the pair that it gets, a near one is taken
        (`allowed`).

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
        """A config drawn uniformly: every slot for itself, every choice as likely; then as `allowed`."""
        return self._config([slot.choices[rng.integers(len(slot.choices))] for slot in self.slots])

    def uniform(self, bits: int) -> PrecisionConfig:
        """The uniform config of the space nearest to this many bits everywhere."""
        return self._config([slot.nearest(bits) for slot in self.slots])

    def everywhere(self, precision: LayerPrecision) -> PrecisionConfig:
        """One precision for every layer, on offer or not; only what the space fixes stays as it fixes it."""
        precisions = {"weight": precision.weight, "activation": precision.activation}
        return self._as_is(
            [slot.choices[0] if len(slot.choices) == 1 else precisions[slot.tensor] for slot in self.slots]
        )

    def ladder(self) -> list[PrecisionConfig]:
        """The uniform ladder, the baseline of every study: a config for each bit-width on offer, from high to low.

        Bit-widths are those of uniform quantizers; a space without any has a ladder of what it has. Widths that lead to
        the same config give one.
        """
        choices = {choice for slot in self.slots for choice in slot.choices}
        uniform = {choice for choice in choices if choice.quantizer == "uniform"}
        widths = sorted({choice.bits for choice in uniform or choices}, reverse=True)
        return list(dict.fromkeys(map(self.uniform, widths)))

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
        """The configs that differ in one slot by one step: a bit, or the type; and in what that step demands of others.

        Raises:
            SpaceError: the config is outside the space.
        """
        precisions = self._precisions(config)
        configs = []
        for i, slot in enumerate(self.slots):
            configs += [
                self._config([*precisions[:i], step, *precisions[i + 1 :]], pinned=i)
                for step in slot.steps(precisions[i])
            ]
        return list(dict.fromkeys(other for other in configs if other != config)) if self.pairs else configs

    def _config(self, precisions: Sequence[Precision], pinned: int | None = None) -> PrecisionConfig:
        return self._as_is(self.allowed(precisions, pinned))

    def _as_is(self, precisions: Sequence[Precision]) -> PrecisionConfig:
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
                raise SpaceError(f"the config has no precision for layer '{layer}': give all {len(self.layers)} layers")
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
        for layer, pair in config.items():
            if not self.allows(layer, pair):
                raise SpaceError(
                    f"layer '{layer}' has {pair}, which the hardware does not run: choose from "
                    f"{listing(self.options[layer])}"
                )
        return values


def _distance(choice: Precision, wanted: Precision) -> tuple[bool, bool, int, int]:
    """Key to sort choices by how far they are from one; of two as far the one with more bits is first."""
    return choice != wanted, choice.quantizer != wanted.quantizer, abs(choice.bits - wanted.bits), -choice.bits


def _take(slot: Slot, precision: Precision | None) -> Precision:
    """A choice of the slot: the one that is wanted, if it has it."""
    return precision if precision in slot.choices else slot.nearest(precision.bits if precision is not None else 8)
