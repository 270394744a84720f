"""SearchSpace: which precisions each tensor of a network may take, and what that means to Optuna.

`load_space` reads the YAML, `build_space` applies it to the layers of one network:

    rules (later ones override) -> first and last layer -> fixed -> groups (same tensor, same weight, tied) -> slots

A slot is one decision: the weight precision or the activation precision of one layer, or of several that must agree.
Weights are per channel and activations per tensor unless the text says otherwise.
"""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from mpsearch.errors import PrecisionError, SpaceError, nearest
from mpsearch.graph.groups import connected
from mpsearch.graph.layers import KINDS, LayerInfo
from mpsearch.precision import Granularity, LayerPrecision, Offer, Precision, PrecisionConfig
from mpsearch.quant.levels import apot_terms
from mpsearch.shipped import shipped, shipped_names

if TYPE_CHECKING:
    import numpy as np
    from optuna.distributions import BaseDistribution

TensorName = Literal["weight", "activation"]
TENSORS: tuple[TensorName, ...] = ("weight", "activation")
GRANULARITY: Mapping[TensorName, Granularity] = {"weight": "channel", "activation": "tensor"}
"""What holds where a precision text names none."""

_RANGE = re.compile(r"(?P<quantizer>[a-z]+):(?P<low>\d+)-(?P<high>\d+)(?P<granularity>/[a-z]+)?")


def parse_choices(texts: Iterable[str], tensor: TensorName) -> tuple[Precision, ...]:
    """Read precision texts, a range of bits (`uniform:2-8`) standing for each of them.

    Returns:
        The choices without repeats, in order of bits, then of quantizer.

    Raises:
        PrecisionError: a text has another form or names a precision that does not exist, or there is none.
    """
    choices = {Precision.parse(text, GRANULARITY[tensor]) for given in texts for text in _spelled_out(given)}
    if not choices:
        raise PrecisionError("there is no precision to choose from: give at least one, as [uniform:4]")
    if tensor == "activation":
        for choice in choices:
            LayerPrecision(choice, choice)  # raises if a layer's input cannot have it
    return tuple(sorted(choices, key=_order))


def _spelled_out(text: str) -> list[str]:
    match = _RANGE.fullmatch(text.strip())
    if match is None:
        return [text]
    low, high = int(match["low"]), int(match["high"])
    if low >= high:
        raise PrecisionError(f"'{text}' is no range of bits: write the smaller first, as {match['quantizer']}:2-8")
    return [f"{match['quantizer']}:{bits}{match['granularity'] or ''}" for bits in range(low, high + 1)]


def _order(precision: Precision) -> tuple[int, str, str]:
    return precision.bits, precision.quantizer, precision.granularity


# ---------------------------------------------------------------------------------------------------- the YAML file


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _readable(tensor: TensorName) -> AfterValidator:
    def check(texts: tuple[str, ...]) -> tuple[str, ...]:
        try:
            parse_choices(texts, tensor)
        except PrecisionError as error:
            raise ValueError(str(error)) from None
        return texts

    return AfterValidator(check)


WeightTexts = Annotated[tuple[str, ...], BeforeValidator(_listed), _readable("weight")]
ActivationTexts = Annotated[tuple[str, ...], BeforeValidator(_listed), _readable("activation")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Choices(_Section):
    weight: WeightTexts | None = None
    activation: ActivationTexts | None = None

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.weight is None and self.activation is None:
            raise ValueError("gives no precision: write `weight`, `activation` or both")
        return self

    def given(self) -> Iterator[tuple[TensorName, tuple[Precision, ...]]]:
        """The tensors that have choices here, with them."""
        if self.weight is not None:
            yield "weight", parse_choices(self.weight, "weight")
        if self.activation is not None:
            yield "activation", parse_choices(self.activation, "activation")


def _known_kind(kind: str) -> str:
    if kind not in KINDS.values():
        raise ValueError(nearest(kind, KINDS.values()))
    return kind


class RuleSpec(_Choices):
    """The choices of the layers whose name matches; a later rule overrides the keys that it gives."""

    match: str = Field(description="layer names, with * ? [..] as in a shell")
    kind: Annotated[str, AfterValidator(_known_kind)] | None = Field(None, description="only layers of this kind")
    depthwise: bool | None = Field(None, description="only layers that are (true) or are not (false) depthwise")

    def applies(self, layer: LayerInfo) -> bool:
        """Whether the rule is about this layer."""
        return (
            fnmatchcase(layer.name, self.match)
            and self.kind in (None, layer.kind)
            and self.depthwise in (None, layer.depthwise)
        )


class FixedSpec(_Choices):
    """The one precision that a layer has."""

    @model_validator(mode="after")
    def _single(self) -> Self:
        for tensor, choices in self.given():
            if len(choices) > 1:
                raise ValueError(f"`{tensor}` has {len(choices)} precisions: `fixed` takes one, `rules` take several")
        return self


class EndSpec(_Choices):
    """The choices of the first or the last layer."""

    weight: WeightTexts | None = ("uniform:8",)
    activation: ActivationTexts | None = ("uniform:8",)


def _end(value: Any) -> Any:
    if isinstance(value, (Mapping, EndSpec)):
        return value
    if value == "search":
        return None
    raise ValueError("write `search`, or `weight` and `activation` with their precisions")


End = Annotated[EndSpec | None, BeforeValidator(_end)]


class SpaceSpec(_Section):
    """A search space as it is written, for any network."""

    name: str
    rules: tuple[RuleSpec, ...] = ()
    first: End = Field(EndSpec(), description="the first layer; `search`: a layer like any other (None here)")
    last: End = Field(EndSpec(), description="the last layer; `search`: a layer like any other (None here)")
    fixed: dict[str, FixedSpec] = Field({}, description="pattern -> precision; overrides everything else")
    tied: tuple[tuple[str, ...], ...] = Field((), description="lists of patterns whose layers share their choices")


def load_space(space: str | Path) -> SpaceSpec:
    """Read a shipped search space by name or one's own by path.

    Raises:
        SpaceError: no such space, no YAML, or a key or value that does not belong; the message names all of them.
    """
    path = shipped("search_spaces", str(space), SpaceError)
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpaceError(f"{path} is not YAML: {error}") from None
    except OSError as error:
        raise SpaceError(f"cannot read the search space {path}: {error.strerror}") from None
    return parse_space(document, source=str(path))


def parse_space(document: Any, source: str = "search space") -> SpaceSpec:
    """Check a search space that is already in memory. Raises SpaceError as `load_space` does."""
    if not isinstance(document, Mapping):
        raise SpaceError(f"{source} must hold keys and values, got {type(document).__name__}: see `uniform.yaml`")
    try:
        return SpaceSpec.model_validate(document)
    except ValidationError as error:
        raise SpaceError(f"{source} cannot be used:\n" + "\n".join(map(_explain, error.errors()))) from None


def _explain(item: Any) -> str:
    location = [str(part) for part in item["loc"]]
    key = ".".join(location) or "search space"
    match item["type"]:
        case "extra_forbidden":
            section: dict[str, type[BaseModel]] = {
                "rules": RuleSpec,
                "fixed": FixedSpec,
                "first": EndSpec,
                "last": EndSpec,
            }
            inside = section[location[0]] if len(location) > 1 else SpaceSpec
            return f"  {key}: no such key; {nearest(location[-1], inside.model_fields)}"
        case "missing":
            return f"  {key}: missing; it is required"
        case "value_error":
            return f"  {key}: {item['msg'].removeprefix('Value error, ')} (got {item['input']!r})"
        case _:
            return f"  {key}: {item['msg'][:1].lower()}{item['msg'][1:]} (got {item['input']!r})"


def space_names() -> list[str]:
    """The search spaces that ship with mpsearch."""
    return shipped_names("search_spaces")


# ------------------------------------------------------------------------------------------------ the space itself


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
        return min(self.choices, key=lambda c: (c.quantizer != "uniform", abs(c.bits - bits), -c.bits, _order(c)))


@dataclass(frozen=True)
class SearchSpace:
    """Every config that a search may propose for one network."""

    name: str
    layers: tuple[str, ...]  # every quantizable layer, in execution order
    slots: tuple[Slot, ...]  # every tensor of every layer is in exactly one

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
            raise SpaceError(f"space '{self.name}' has no parameter '{name}': {_near(name, names)}")
        chosen = []
        for slot in self.slots:
            if len(slot.choices) == 1:
                chosen.append(slot.choices[0])
                continue
            if slot.parameter not in params:
                raise SpaceError(f"parameter '{slot.parameter}' is missing: give a value for each of {len(self.free)}")
            given = params[slot.parameter]
            if given not in slot.by_value:
                raise SpaceError(f"parameter '{slot.parameter}' is {given!r}: choose from {_listing(slot.by_value)}")
            chosen.append(slot.by_value[given])
        return self._config(chosen)

    def params_of(self, config: PrecisionConfig) -> dict[str, int | str]:
        """The Optuna parameters that stand for a config: the inverse of `config_of`.

        Raises:
            SpaceError: the config is outside the space; the message names the layer.
        """
        chosen = zip(self.slots, self._chosen(config), strict=True)
        return {slot.parameter: slot.value(choice) for slot, choice in chosen if len(slot.choices) > 1}

    def contains(self, config: PrecisionConfig) -> bool:
        """Whether the search could propose this config."""
        try:
            self._chosen(config)
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
        wanted = {"weight": precision.weight, "activation": precision.activation}
        return self._config([slot.choices[0] if len(slot.choices) == 1 else wanted[slot.tensor] for slot in self.slots])

    def ladder(self) -> list[PrecisionConfig]:
        """The uniform ladder, the control of every study: a rung for each bit-width on offer, from high to low.

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
        found = dict.fromkeys(
            self._config([_take(slot, pair[TENSORS.index(slot.tensor)]) for slot in self.slots]) for pair in pairs
        )
        return list(found)

    def neighbours(self, config: PrecisionConfig) -> list[PrecisionConfig]:
        """The configs that differ in one slot by one step: a bit, or the type.

        Raises:
            SpaceError: the config is outside the space.
        """
        chosen = self._chosen(config)
        found = []
        for i, slot in enumerate(self.slots):
            found += [self._config([*chosen[:i], step, *chosen[i + 1 :]]) for step in slot.steps(chosen[i])]
        return found

    def _config(self, chosen: Sequence[Precision]) -> PrecisionConfig:
        precision = {
            (layer, slot.tensor): choice
            for slot, choice in zip(self.slots, chosen, strict=True)
            for layer in slot.layers
        }
        return PrecisionConfig(
            (layer, LayerPrecision(precision[layer, "weight"], precision[layer, "activation"])) for layer in self.layers
        )

    def _chosen(self, config: PrecisionConfig) -> list[Precision]:
        """The choice of each slot, if the config is one of the space's."""
        for layer in config:
            if layer not in self.layers:
                raise SpaceError(f"space '{self.name}' has no layer '{layer}': {_near(layer, self.layers)}")
        for layer in self.layers:
            if layer not in config:
                raise SpaceError(f"the config says nothing of layer '{layer}': give all {len(self.layers)} layers")
        chosen = []
        for slot in self.slots:
            precisions = [getattr(config[layer], slot.tensor) for layer in slot.layers]
            for layer, precision in zip(slot.layers, precisions, strict=True):
                if precision not in slot.choices:
                    raise SpaceError(
                        f"layer '{layer}' has {slot.tensor} {precision}, which is outside space '{self.name}': "
                        f"choose from {_listing(slot.choices)}"
                    )
                if precision != precisions[0]:
                    raise SpaceError(
                        f"layers '{slot.layers[0]}' and '{layer}' share one {slot.tensor} precision in space "
                        f"'{self.name}', got {precisions[0]} and {precision}: give both the same"
                    )
            chosen.append(precisions[0])
        return chosen


# ------------------------------------------------------------------------------------ from the file to the space


def build_space(spec: SpaceSpec, layers: Iterable[LayerInfo]) -> SearchSpace:
    """Apply a search space to the layers of one network; layers with a `reason` take no part.

    Raises:
        SpaceError: a pattern matches no layer, a layer has no choices, or layers that must agree have none in common.
    """
    layers = tuple(layers)
    free = tuple(layer for layer in layers if layer.reason is None)
    if not free:
        raise SpaceError(f"space '{spec.name}' has no layer to work on: the network has none that can be quantized")
    patterns = [rule.match for rule in spec.rules] + [*spec.fixed] + [p for tie in spec.tied for p in tie]
    for pattern in patterns:
        _check_pattern(pattern, layers, spec.name)
    choices = _choices(spec, free)
    slots = [slot for tensor in TENSORS for slot in _slots(tensor, spec, free, choices)]
    position = {layer.name: index for index, layer in enumerate(free)}
    slots.sort(key=lambda slot: (position[slot.layers[0]], TENSORS.index(slot.tensor)))
    return SearchSpace(spec.name, tuple(position), tuple(slots))


def _check_pattern(pattern: str, layers: Sequence[LayerInfo], space: str) -> None:
    found = [layer for layer in layers if fnmatchcase(layer.name, pattern)]
    if not found:
        raise SpaceError(
            f"pattern '{pattern}' in space '{space}' matches none of the {len(layers)} layers: "
            + _near(pattern, [layer.name for layer in layers])
        )
    if all(layer.reason is not None for layer in found):
        raise SpaceError(
            f"pattern '{pattern}' in space '{space}' matches only layers that cannot be quantized: "
            f"'{found[0].name}', because {found[0].reason}; take it out"
        )


_ChoicesOf = dict[tuple[str, TensorName], tuple[Precision, ...]]


def _choices(spec: SpaceSpec, layers: Sequence[LayerInfo]) -> _ChoicesOf:
    """The choices of every tensor of every layer, before layers have to agree."""
    choices: _ChoicesOf = {}
    for rule in spec.rules:
        for layer in filter(rule.applies, layers):
            choices |= {(layer.name, tensor): given for tensor, given in rule.given()}
    ends = [("first", spec.first, layers[0]), ("last", spec.last, layers[-1])]
    for key, end, layer in ends:
        if end is None:
            continue
        if any(rule.match == layer.name for rule in spec.rules):
            raise SpaceError(
                f"a rule names '{layer.name}', the {key} layer, for which `{key}` holds (8 bits unless it is given): "
                f"say what it may take under `{key}`, or write `{key}: search` to let the rule hold"
            )
        choices |= {(layer.name, tensor): given for tensor, given in end.given()}
    for pattern, fixed in spec.fixed.items():
        for layer in layers:
            if fnmatchcase(layer.name, pattern):
                choices |= {(layer.name, tensor): given for tensor, given in fixed.given()}
    for tensor in TENSORS:
        missing = [layer.name for layer in layers if (layer.name, tensor) not in choices]
        if missing:
            raise SpaceError(
                f"space '{spec.name}' has no {tensor} rule for {len(missing)} of {len(layers)} layers: "
                f'{_listing(missing)}; add a rule that matches them, or `match: "*"` as the first one'
            )
    return choices


def _slots(tensor: TensorName, spec: SpaceSpec, layers: Sequence[LayerInfo], choices: _ChoicesOf) -> Iterator[Slot]:
    """One slot for each set of layers that must agree, with the choices that all of them have, each quantizer once."""
    shared = [
        [
            ("group", layer.weight_group if tensor == "weight" else layer.input_group),
            *(("tied", i) for i, tie in enumerate(spec.tied) if any(fnmatchcase(layer.name, p) for p in tie)),
        ]
        for layer in layers
    ]
    why = "the same weight" if tensor == "weight" else "the same input tensor"
    by_name = {layer.name: layer for layer in layers}
    members: dict[int, list[str]] = {}
    for layer, first in zip(layers, connected(shared), strict=True):
        members.setdefault(first, []).append(layer.name)
    for names in members.values():
        common = reduce(set.intersection, (set(choices[name, tensor]) for name in names))
        if not common:
            offers = "; ".join(f"'{name}': {_listing(choices[name, tensor])}" for name in names[:6])
            raise SpaceError(
                f"these layers must share one {tensor} precision in space '{spec.name}' (they are tied, or have {why}) "
                f"and have none in common: {offers}; give them a common choice"
            )
        signed = {tensor == "weight" or by_name[name].signed_input for name in names}
        doubled = {c for c in common if all(_as_shift(c, s) in common for s in signed)}
        yield Slot(tensor, tuple(names), tuple(sorted(common - doubled, key=_order)))


def _as_shift(choice: Precision, signed: bool) -> Precision | None:
    """The shift precision with the same levels as an APoT precision of one term; None for any other precision.

    They are one quantizer at one cost: a search that has both would try everything twice.
    """
    if choice.quantizer != "apot" or len(apot_terms(choice.bits, signed)) > 1:
        return None
    return replace(choice, quantizer="shift")


def _take(slot: Slot, wanted: Precision | None) -> Precision:
    """A choice of the slot: the one that is wanted, if it has it."""
    return wanted if wanted in slot.choices else slot.nearest(wanted.bits if wanted is not None else 8)


def _near(given: str, names: Iterable[str]) -> str:
    """The end of an error message: the few names most like the one given; networks have too many to list."""
    names = list(names)
    close = difflib.get_close_matches(given, names, n=3, cutoff=0.3) or names[:3]
    return f"near: {', '.join(close)}" if close else "there is none"


def _listing(items: Iterable[object]) -> str:
    texts = [str(item) for item in items]
    return ", ".join(texts if len(texts) <= 8 else [*texts[:8], f"and {len(texts) - 8} more"])
