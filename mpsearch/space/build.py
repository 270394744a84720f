"""From a search space as it is written to the slots of one network:

rules (later ones override) -> first and last layer -> fixed -> pairs of the hardware
-> groups (same tensor, same weight, tied, by the space or by the hardware) -> slots
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import reduce
from itertools import product

from mpsearch.errors import SpaceError
from mpsearch.graph.facts import LayerInfo
from mpsearch.graph.groups import connected
from mpsearch.hardware.profile import Allowed, Profile, matches
from mpsearch.precision import FLOAT, LayerPrecision, Precision
from mpsearch.quant.levels import apot_terms
from mpsearch.space.choices import TENSORS, TensorName, listing, near, precision_order
from mpsearch.space.space import SearchSpace, Slot
from mpsearch.space.spec import EndSpec, FixedSpec, RuleSpec, SpaceSpec


def build_space(
    spec: SpaceSpec,
    layers: Iterable[LayerInfo],
    hardware: Profile | None = None,
    priced: Callable[[LayerInfo, LayerPrecision], bool] | None = None,
) -> SearchSpace:
    """Apply a search space to the layers of one network; layers with a `reason` take no part.

    Only what `hardware` runs remains: pairs that it excludes for a layer, and what its ties leave. Of these again only
    pairs that are `priced`, where the cost knows some alone.

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
    pairs = {} if hardware is None else _pairs(spec, hardware, free, choices, priced)
    ties = [*spec.tied, *([] if hardware is None else hardware.ties(free))]
    slots = [slot for tensor in TENSORS for slot in _slots(tensor, spec.name, ties, free, choices)]
    notes = tuple(note for slot in slots if (note := _forced(slot, choices, spec.tied, ties)))
    if pairs:
        slots, pairs = _consistent(spec.name, slots, pairs)
    position = {layer.name: index for index, layer in enumerate(free)}
    slots.sort(key=lambda slot: (position[slot.layers[0]], TENSORS.index(slot.tensor)))
    space = SearchSpace(spec.name, tuple(position), tuple(slots), notes, pairs)
    space.ladder()  # raises where pairs exclude each other
    return space


_Pairs = dict[str, frozenset[LayerPrecision]]


def _pairs(
    spec: SpaceSpec,
    hardware: Profile,
    layers: Sequence[LayerInfo],
    choices: _ChoicesOf,
    priced: Callable[[LayerInfo, LayerPrecision], bool] | None,
) -> _Pairs:
    """The pairs of each layer that a device does not run all of; `choices` keep what is in some pair, in place.

    Raises:
        SpaceError: the device runs nothing that the space offers a layer.
    """
    pairs: _Pairs = {}
    multiplying = [layer for layer in layers if not layer.looks_up and not layer.multiplies_activations] or layers
    for layer in layers:
        texts = hardware.allowed(layer, first=layer is multiplying[0], last=layer is multiplying[-1])
        runs = Allowed(texts, hardware.granularity, layer)
        sides = [choices[layer.name, tensor] for tensor in TENSORS]
        every = [LayerPrecision(w, a) for w, a in product(*sides)]
        left = frozenset(filter(runs, every))
        if left and priced is not None:
            run = left
            left = frozenset(pair for pair in left if priced(layer, pair))
            if not left:
                raise SpaceError(
                    f"the study's cost model knows no pair of layer '{layer.name}' ({layer.kind}) that hardware "
                    f"'{hardware.name}' and space '{spec.name}' leave: {listing(sorted(run))}; measure them (`mpsearch "
                    "measure STUDY -o TABLE`), or widen the space"
                )
        if not left:
            raise SpaceError(
                f"hardware '{hardware.name}' runs nothing that space '{spec.name}' offers layer '{layer.name}' "
                f"({layer.kind}): it runs {listing(texts)}, the space has {listing(every)}; widen the space (`space: "
                "full` offers everything), or take other hardware"
            )
        if len(left) < len(every):
            pairs[layer.name] = left
            for tensor, options in zip(TENSORS, sides, strict=True):
                in_some = {getattr(pair, tensor) for pair in left}
                choices[layer.name, tensor] = tuple(choice for choice in options if choice in in_some)
    return pairs


def _consistent(space: str, slots: Sequence[Slot], pairs: _Pairs) -> tuple[list[Slot], _Pairs]:
    """The slots without the choices that no choice of a partner goes with, and the pairs without what is then left out.

    Raises:
        SpaceError: a slot has no choice left.
    """
    slots = list(slots)
    slot_of = {(layer, slot.tensor): i for i, slot in enumerate(slots) for layer in slot.layers}
    changed = True
    while changed:
        changed = False
        for name, options in pairs.items():
            w, a = slot_of[name, "weight"], slot_of[name, "activation"]
            left = frozenset(p for p in options if p.weight in slots[w].choices and p.activation in slots[a].choices)
            for i, tensor in ((w, "weight"), (a, "activation")):
                possible = {getattr(pair, tensor) for pair in left}
                choices = tuple(choice for choice in slots[i].choices if choice in possible)
                if not choices:
                    raise SpaceError(
                        f"layer '{name}' has no pair left in space '{space}': it must share its {tensor} precision "
                        f"with {listing(slots[i].layers)}, and the hardware runs none of what they have in common; "
                        "widen the space, or take other hardware"
                    )
                if choices != slots[i].choices:
                    slots[i], changed = replace(slots[i], choices=choices), True
            changed = changed or left != options
            pairs = {**pairs, name: left}
    return slots, pairs


def _check_pattern(pattern: str, layers: Sequence[LayerInfo], space: str) -> None:
    matches = [layer for layer in layers if fnmatchcase(layer.name, pattern)]
    if not matches:
        raise SpaceError(
            f"pattern '{pattern}' in space '{space}' matches none of the {len(layers)} layers: "
            + near(pattern, [layer.name for layer in layers])
        )
    if all(layer.reason is not None for layer in matches):
        raise SpaceError(
            f"pattern '{pattern}' in space '{space}' matches only layers that cannot be quantized: "
            f"'{matches[0].name}', because {matches[0].reason}; take it out"
        )


_ChoicesOf = dict[tuple[str, TensorName], tuple[Precision, ...]]


def _choices(spec: SpaceSpec, layers: Sequence[LayerInfo]) -> _ChoicesOf:
    """The choices of every tensor of every layer, before layers have to agree."""
    choices: _ChoicesOf = {}
    for rule in spec.rules:
        for layer in filter(rule.applies, layers):
            choices |= _of(layer, rule)
    multiplying = [layer for layer in layers if not layer.looks_up and not layer.multiplies_activations] or layers
    ends = [("first", spec.first, multiplying[0]), ("last", spec.last, multiplying[-1])]
    for key, end, layer in ends:
        if end is None:
            continue
        if any(rule.match == layer.name for rule in spec.rules):
            raise SpaceError(
                f"a rule names '{layer.name}', the {key} layer, for which `{key}` holds (8 bits unless it is given): "
                f"say what it may take under `{key}`, or write `{key}: search` to let the rule hold"
            )
        choices |= _of(layer, end)
    for pattern, fixed in spec.fixed.items():
        for layer in layers:
            if fnmatchcase(layer.name, pattern):
                choices |= _of(layer, fixed)
    for layer in layers:
        if layer.looks_up:  # no activation; and a weight that a layer multiplies by is as that layer wants it
            choices[layer.name, "activation"] = (FLOAT,)
            tied = (other for other in multiplying if other.weight_group == layer.weight_group and not other.looks_up)
            if (other := next(tied, None)) is not None and (given := choices.get((other.name, "weight"))) is not None:
                choices[layer.name, "weight"] = given
    for tensor in TENSORS:
        missing = [layer.name for layer in layers if (layer.name, tensor) not in choices]
        if missing:
            raise SpaceError(
                f"space '{spec.name}' has no {tensor} rule for {len(missing)} of {len(layers)} layers: "
                f'{listing(missing)}; add a rule that matches them, or `match: "*"` as the first one'
            )
    return choices


def _of(layer: LayerInfo, section: RuleSpec | FixedSpec | EndSpec) -> _ChoicesOf:
    """The choices that a part of a space has for the tensors of a layer; both factors of a product are activations."""
    choices = dict(section.choices())
    if layer.multiplies_activations:
        choices = {tensor: choices["activation"] for tensor in TENSORS if "activation" in choices}
    return {(layer.name, tensor): options for tensor, options in choices.items()}


def _slots(
    tensor: TensorName,
    space: str,
    ties: Sequence[Sequence[str]],
    layers: Sequence[LayerInfo],
    choices: _ChoicesOf,
) -> Iterator[Slot]:
    """One slot for each set of layers that must agree, with the choices that all of them have, each quantizer once."""
    shared = [
        [
            ("group", layer.weight_group if tensor == "weight" else layer.input_group),
            *(("tied", i) for i, tie in enumerate(ties) if matches(layer.name, tie)),
        ]
        if tensor == "weight" or not layer.looks_up
        else []  # float, whatever the others are
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
            offers = "; ".join(f"'{name}': {listing(choices[name, tensor])}" for name in names[:6])
            raise SpaceError(
                f"these layers must share one {tensor} precision in space '{space}' (they are tied, or have {why}) "
                f"and have none in common: {offers}; give them a common choice"
            )
        signed = {by_name[name].signed_second if tensor == "weight" else by_name[name].signed_input for name in names}
        doubled = {c for c in common if all(_as_shift(c, s) in common for s in signed)}
        yield Slot(tensor, tuple(names), tuple(sorted(common - doubled, key=precision_order)))


def _forced(
    slot: Slot, choices: _ChoicesOf, ties: Sequence[Sequence[str]], of_hardware: Sequence[Sequence[str]]
) -> str:
    """In words, what layers lose of their own choices by having to agree with others; empty if nothing."""
    options = {name: choices[name, slot.tensor] for name in slot.layers}
    common = set.intersection(*map(set, options.values()))
    losing = [name for name in options if set(options[name]) - common]
    if not losing:
        return ""
    least = min(options, key=lambda name: len(options[name]))
    tied = any(matches(least, tie) for tie in ties)
    by_hardware = not tied and any(matches(least, tie) for tie in of_hardware)
    same = "the same weight" if slot.tensor == "weight" else "the same input tensor"
    why = "`tied`" if tied else "tied by the hardware" if by_hardware else same
    of_their_own = listing(f"'{name}' ({_count(options[name])})" for name in losing)
    return (
        f"{len(options)} layers must share one {slot.tensor} precision ({why}) and have {_count(slot.choices)} left, "
        f"as '{least}' has {_count(options[least])}; by the rules alone there is more for {of_their_own}: "
        f"give '{least}' more choices" + (", or take it out of `tied`" if tied else "")
    )


def _count(choices: Sequence[Precision]) -> str:
    return str(choices[0]) if len(choices) == 1 else f"{len(choices)} choices"


def _as_shift(choice: Precision, signed: bool) -> Precision | None:
    """The shift precision with the same levels as an APoT precision of one term; None for any other precision.

    They are one quantizer at one cost: a search that has both would try everything twice.
    """
    if choice.quantizer != "apot" or len(apot_terms(choice.bits, signed)) > 1:
        return None
    return replace(choice, quantizer="shift")
