"""Precision: how the numbers of one tensor, one layer, one network are represented.

`Precision` -> `LayerPrecision` -> `PrecisionConfig`, from tensor to network. All three are immutable, hashable and
ordered, because a configuration is the unit that the search proposes, trains, records and exports. Their text form
(`uniform:4/channel`) is the one used in YAML files, in Optuna and on screen; their JSON form is the published schema
`mpsearch/schema/precision-config-1.json`.

This module imports nothing but the standard library: a configuration can be read anywhere.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import nan
from typing import Any, Literal, cast

from mpsearch.errors import PrecisionError, nearest

QuantizerName = Literal["uniform", "shift", "apot", "float16", "bfloat16", "float"]
Granularity = str
"""What shares a scale: `channel`, `tensor`, or `groupN`: N input features of a channel, as `group128`."""

FLOAT_BITS = 32
BITS: Mapping[str, range] = {
    "uniform": range(1, 17),
    "shift": range(2, 6),
    "apot": range(2, 6),
    "float16": range(16, 17),
    "bfloat16": range(16, 17),
    "float": range(32, 33),
}
"""The bit-widths that each quantizer has."""

CASTS = ("float16", "bfloat16")
"""The quantizers that round to a floating-point format: there is no scale."""

_TEXT = re.compile(r"(?P<quantizer>b?float16|[a-z]+)(:(?P<bits>\d{1,9}))?(/(?P<granularity>[a-z]+\d*))?")
_SHORTHAND = re.compile(r"w(\d{1,9})a(\d{1,9})(/(?P<granularity>channel|tensor|group\d+))?", re.IGNORECASE)
_GROUP = re.compile(r"group([1-9]\d{0,9})")


@dataclass(frozen=True, order=True, slots=True)
class Precision:
    """How one tensor is mapped to few values: quantizer, bits, and what shares a scale.

    That is a channel, the tensor, or a group of so many input features of a channel: the weight of an output channel
    is taken as one row (of a convolution the taps of its first input channel come first), and the row is cut into
    groups, of which the last may be shorter.

    >>> Precision.parse("uniform:4/group128", "channel").group
    128
    """

    quantizer: QuantizerName
    bits: int
    granularity: Granularity

    def __post_init__(self) -> None:
        if self.quantizer not in BITS:
            raise PrecisionError(f"unknown quantizer '{self.quantizer}': {nearest(self.quantizer, BITS)}")
        if self.granularity not in ("channel", "tensor") and self.group is None:
            raise PrecisionError(
                f"unknown granularity '{self.granularity}': write channel, tensor, or group and how many input "
                "features share a scale, as group128"
            )
        widths = BITS[self.quantizer]
        if self.bits not in widths:
            raise PrecisionError(
                f"{self.quantizer} has no {self.bits}-bit form: give {widths.start} to {widths.stop - 1} bits"
                if len(widths) > 1
                else f"{self.quantizer} is {widths.start} bits wide, got {self.bits}: leave the bits out"
            )
        if not self.has_scale:  # none that could be shared: one form for it
            object.__setattr__(self, "granularity", "tensor")

    @classmethod
    def parse(cls, text: str, granularity: Granularity) -> Precision:
        """Read `float`, `uniform:4` or `shift:3/tensor`; `granularity` is what holds when the text names none.

        Raises:
            PrecisionError: the text has another form, or names a precision that does not exist.
        """
        match = _TEXT.fullmatch(text.strip())
        if match is None:
            raise PrecisionError(f"cannot read precision '{text}': write QUANTIZER:BITS, as in uniform:4, or float")
        quantizer = match["quantizer"]
        if quantizer not in BITS:
            raise PrecisionError(f"unknown quantizer '{quantizer}' in '{text}': {nearest(quantizer, BITS)}")
        if len(BITS[quantizer]) == 1:
            return cls(cast(QuantizerName, quantizer), int(match["bits"] or BITS[quantizer].start), "tensor")
        if match["bits"] is None:
            raise PrecisionError(f"'{text}' names no bits: write {quantizer}:4")
        return cls(cast(QuantizerName, quantizer), int(match["bits"]), match["granularity"] or granularity)

    @property
    def group(self) -> int | None:
        """How many input features share a scale; None: all of a channel, or of the tensor."""
        match = _GROUP.fullmatch(self.granularity) if isinstance(self.granularity, str) else None
        return None if match is None else int(match[1])

    @property
    def is_float(self) -> bool:
        """Whether the tensor is left as it is."""
        return self.quantizer == "float"

    @property
    def is_cast(self) -> bool:
        """Whether the tensor is rounded to a floating-point format of fewer bits."""
        return self.quantizer in CASTS

    @property
    def has_scale(self) -> bool:
        """Whether there are codes and a scale: of floating-point numbers there are none."""
        return not self.is_float and not self.is_cast

    def __str__(self) -> str:
        return str(self.quantizer) if not self.has_scale else f"{self.quantizer}:{self.bits}/{self.granularity}"


FLOAT = Precision("float", FLOAT_BITS, "tensor")


def per_tensor(precision: Precision) -> Precision:
    """The same with one scale for all: what the second factor of a product of two activations has.

    >>> str(per_tensor(Precision.parse("uniform:4", "channel")))
    'uniform:4/tensor'
    """
    return Precision(precision.quantizer, precision.bits, "tensor")


def group_count(features: int, size: int) -> int:
    """Into how many groups of `size` input features a channel is cut; the last may be shorter.

    >>> group_count(300, 128)
    3
    """
    return -(-features // size)


@dataclass(frozen=True, order=True, slots=True)
class LayerPrecision:
    """The precision of a layer's weight and of its input activation.

    >>> str(LayerPrecision.parse("shift:3", "uniform:6"))
    'shift:3/channel x uniform:6/tensor'
    >>> LayerPrecision.shorthand("w4a8") == LayerPrecision.parse("uniform:4", "uniform:8")
    True
    """

    weight: Precision
    activation: Precision

    def __post_init__(self) -> None:
        if self.activation.granularity != "tensor":
            which = "channel" if self.activation.group is None else "group"
            raise PrecisionError(
                f"activation precision '{self.activation}' is per {which}: a layer's input has one scale, write /tensor"
            )

    @classmethod
    def parse(cls, weight: str, activation: str) -> LayerPrecision:
        """Read both texts; a weight is per channel and an activation per tensor unless the text says otherwise."""
        return cls(Precision.parse(weight, "channel"), Precision.parse(activation, "tensor"))

    @classmethod
    def shorthand(cls, text: str) -> LayerPrecision:
        """Read `w4a8`, `w4a8/tensor` or `w4a8/group128`: uniform, activations per tensor; 32 bits mean float.

        `float16`, `bfloat16` and `float` are both tensors in that format.

        Raises:
            PrecisionError: the text has another form, or bits that do not exist.
        """
        if text.strip() in (*CASTS, "float"):
            return cls.parse(text, text)
        match = _SHORTHAND.fullmatch(text.strip())
        if match is None:
            raise PrecisionError(
                f"cannot read '{text}': write weight and activation bits as w4a8, w4a8/tensor for one scale a weight, "
                "or w4a8/group128 for one for 128 input features; or float16, bfloat16, float"
            )
        weights = (match["granularity"] or "channel").lower()

        def uniform(bits: int, granularity: Granularity) -> Precision:
            return FLOAT if bits == FLOAT_BITS else Precision("uniform", bits, granularity)

        return cls(uniform(int(match[1]), weights), uniform(int(match[2]), "tensor"))

    def __str__(self) -> str:
        return f"{self.weight} x {self.activation}"


@dataclass(frozen=True, slots=True)
class Offer:
    """The quantizer types that one layer can switch between."""

    weight: frozenset[QuantizerName] = frozenset({"uniform"})
    activation: frozenset[QuantizerName] = frozenset({"uniform"})


class PrecisionConfig(Mapping[str, LayerPrecision]):
    """Layer name -> LayerPrecision for a whole network, in the network's layer order.

    Two configs are equal when every layer has the same precision, whatever order they were written in.

    >>> config = PrecisionConfig.uniform(["conv", "fc"], LayerPrecision.shorthand("w4a8"))
    >>> config = config.replace(fc=LayerPrecision.shorthand("w8a8"))
    >>> config.mean_bits, str(config["conv"])
    ((6.0, 8.0), 'uniform:4/channel x uniform:8/tensor')
    """

    __slots__ = ("_hash", "_layers")

    def __init__(self, layers: Mapping[str, LayerPrecision] | Iterable[tuple[str, LayerPrecision]]) -> None:
        self._layers: dict[str, LayerPrecision] = dict(layers)
        self._hash: int | None = None  # of thousands of configs that are read few are ever looked up

    @classmethod
    def uniform(cls, names: Iterable[str], precision: LayerPrecision) -> PrecisionConfig:
        """The same precision for every layer named."""
        return cls((name, precision) for name in names)

    @classmethod
    def from_json(cls, layers: Any) -> PrecisionConfig:
        """Read the `layers` object of the JSON schema.

        Raises:
            PrecisionError: a layer, a key or a value is not of the schema's form; the message names it.
        """
        if not isinstance(layers, Mapping) or not layers:
            raise PrecisionError(f"'layers' must be an object of layer name -> precision, got {_clip(layers)}")
        return cls((str(name), _layer_from_json(str(name), value)) for name, value in layers.items())

    def to_json(self) -> dict[str, dict[str, dict[str, str | int]]]:
        """The `layers` object of the JSON schema."""
        return {
            name: {"weight": _precision_to_json(layer.weight), "activation": _precision_to_json(layer.activation)}
            for name, layer in self._layers.items()
        }

    @property
    def offers(self) -> dict[str, Offer]:
        """The types that each layer needs to be able to have for this config."""
        return {
            name: Offer(frozenset({layer.weight.quantizer}), frozenset({layer.activation.quantizer}))
            for name, layer in self._layers.items()
        }

    @property
    def mean_bits(self) -> tuple[float, float]:
        """Bits of the weights and of the activations, each the plain mean over the layers; float counts 32.

        NaN for a config without layers.
        """
        if not self:
            return nan, nan
        layers = self._layers.values()
        return (
            sum(layer.weight.bits for layer in layers) / len(self),
            sum(layer.activation.bits for layer in layers) / len(self),
        )

    @property
    def digest(self) -> str:
        """16 hex digits that name this config: the same for equal configs, in every process."""
        text = json.dumps(sorted((name, str(layer)) for name, layer in self._layers.items()))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def replace(self, **changes: LayerPrecision) -> PrecisionConfig:
        """This config with some layers changed (names with dots: `replace(**{"layer1.conv": p})`)."""
        unknown = set(changes) - set(self._layers)
        if unknown:
            name = sorted(unknown)[0]
            raise PrecisionError(f"no layer '{name}' in this config: {nearest(name, self._layers)}")
        return PrecisionConfig(self._layers | changes)

    def __getitem__(self, name: str) -> LayerPrecision:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash(frozenset(self._layers.items()))
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        return PrecisionConfig, (self._layers,)  # without the hash: texts hash differently in every process

    def __eq__(self, other: object) -> bool:
        return self._layers == other._layers if isinstance(other, PrecisionConfig) else NotImplemented

    def __repr__(self) -> str:
        return f"PrecisionConfig({self.digest}, {len(self)} layers)"


def _precision_to_json(precision: Precision) -> dict[str, str | int]:
    return {"quantizer": precision.quantizer, "bits": precision.bits, "granularity": precision.granularity}


def _layer_from_json(name: str, value: Any) -> LayerPrecision:
    if not isinstance(value, Mapping) or set(value) != {"weight", "activation"}:
        raise PrecisionError(f"layer '{name}': expected an object with 'weight' and 'activation', got {_clip(value)}")
    try:
        return LayerPrecision(_precision_from_json(value["weight"]), _precision_from_json(value["activation"]))
    except PrecisionError as error:
        raise PrecisionError(f"layer '{name}': {error}") from None


def _precision_from_json(value: Any) -> Precision:
    if not isinstance(value, Mapping) or set(value) != {"quantizer", "bits", "granularity"}:
        raise PrecisionError(f"expected an object with 'quantizer', 'bits' and 'granularity', got {_clip(value)}")
    for key in ("quantizer", "granularity"):
        if not isinstance(value[key], str):
            raise PrecisionError(f"'{key}' must be a text, got {_clip(value[key])}")
    if not isinstance(value["bits"], int) or isinstance(value["bits"], bool):
        raise PrecisionError(f"'bits' must be a whole number, got {_clip(value['bits'])}")
    return Precision(value["quantizer"], value["bits"], value["granularity"])


def _clip(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
