"""Hardware profiles: which pairs of weight and activation precision a device runs, by layer, as YAML says it.

A pair is written as `w8a8` (uniform, 8-bit weights and activations), `w2-8a8` (2 to 8 bits), `float16`, `bfloat16`,
`float`, or in full as `shift:4 x uniform:8`; `any` is every pair there is. What the device shares a scale over is said
once, by `granularity`. A pair that is not there is not allowed: nobody proposes, prices or exports it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from mpsearch.documents import explain, read_yaml, to_yaml
from mpsearch.errors import HardwareError, PrecisionError, nearest
from mpsearch.files import read_text, with_home, write_text
from mpsearch.graph.facts import KIND_NAMES, LayerInfo
from mpsearch.precision import LayerPrecision, Precision
from mpsearch.shipped import shipped, shipped_names

_BITS = re.compile(r"w(\d+)(?:-(\d+))?a(\d+)(?:-(\d+))?")

Kind = tuple[str, int]
"""Quantizer and bits of a tensor, whatever shares its scale."""

Side = Literal["weight", "activation"]

ANY = "any"

RUN_TABLE = "hardware.csv"
"""What the table of a run's profile is called in the run folder."""


def kinds_of_pair(text: str) -> frozenset[tuple[Kind, Kind]]:
    """The (weight, activation) kinds that a text stands for.

    >>> sorted(kinds_of_pair("w4-5a8"))
    [(('uniform', 4), ('uniform', 8)), (('uniform', 5), ('uniform', 8))]

    Raises:
        PrecisionError: the text has another form, or names a precision that does not exist.
    """
    text = text.strip()
    if match := _BITS.fullmatch(text):
        (first, last), (low, high) = ((int(a), int(b or a)) for a, b in ((match[1], match[2]), (match[3], match[4])))
        pairs = [LayerPrecision.shorthand(f"w{w}a{a}") for w in range(first, last + 1) for a in range(low, high + 1)]
        if not pairs:
            raise PrecisionError(f"'{text}' is no range of bits: write the smaller first, as w2-8a8")
    elif " x " in text:
        weight, _, activation = text.partition(" x ")
        pairs = [LayerPrecision.parse(weight, activation)]
    else:
        pairs = [LayerPrecision.shorthand(text)]
    return frozenset((_kind(pair.weight), _kind(pair.activation)) for pair in pairs)


def _kind(precision: Precision) -> Kind:
    return precision.quantizer, precision.bits


def _readable(texts: tuple[str, ...]) -> tuple[str, ...]:
    if not texts:
        raise ValueError("there is no pair: give at least one, as [w8a8]")
    for text in texts:
        if text != ANY:
            try:
                kinds_of_pair(text)
            except PrecisionError as error:
                raise ValueError(str(error)) from None
    return texts


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Pairs = Annotated[tuple[str, ...], BeforeValidator(_listed), AfterValidator(_readable)]


def _known_kind(kind: str) -> str:
    if kind not in (*KIND_NAMES, "depthwise"):
        raise ValueError(nearest(kind, [*KIND_NAMES, "depthwise"]))
    return kind


def _known_granularity(text: str) -> str:
    try:
        return Precision("uniform", 8, text).granularity
    except PrecisionError as error:
        raise ValueError(str(error)) from None


LayerKind = Annotated[str, AfterValidator(_known_kind)]
Granularities = Annotated[
    tuple[Annotated[str, AfterValidator(_known_granularity)], ...], BeforeValidator(_listed), Field(min_length=1)
]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PriceSpec(_Section):
    """What a device takes for a layer: measured rows, or how many MACs it does in a cycle at a pair."""

    table: str | None = Field(default=None, description="CSV beside the profile, or its path")
    macs_per_cycle: dict[str, float] | None = Field(default=None, description="pair -> MACs in a cycle")
    layer: float = Field(default=0.0, ge=0, description="fixed cost of each layer, in the unit of the others")
    change: float = Field(
        default=0.0,
        ge=0,
        description="cost of each change of the activations' precision from a layer to the next one in execution order",
    )

    def model_post_init(self, context: Any) -> None:
        """Check what belongs together. Raises ValueError."""
        if (self.table is None) == (self.macs_per_cycle is None):
            raise ValueError("give `table` or `macs_per_cycle`, one of them")
        for text, speed in (self.macs_per_cycle or {}).items():
            _readable((text,))
            if text == ANY or not speed > 0:
                raise ValueError(f"macs_per_cycle: {text} has {speed}: write a pair and a number above 0")


class Profile(_Section):
    """What one device runs."""

    name: str
    about: str = Field(description="the device and how it computes, in a sentence or two")
    source: str = Field(description="where the pairs and numbers are from")
    pairs: Pairs = Field(description="allowed pairs, of every layer for which nothing else is said")
    kinds: dict[LayerKind, Pairs] = Field(
        default_factory=dict, description="kind of layer, or depthwise -> its pairs instead"
    )
    first: Pairs | None = Field(default=None, description="pairs of the first layer instead")
    last: Pairs | None = Field(default=None, description="pairs of the last layer instead")
    granularity: dict[Side, Granularities] = Field(
        default_factory=dict, description="what may share a scale; of a tensor that is not named anything may"
    )
    alike: Literal["none", "block", "network"] = Field(
        default="none",
        description="layers that have one precision: those of a block (names that differ after the last dot), or all",
    )
    fused: tuple[tuple[LayerKind, LayerKind], ...] = Field(
        default=(), description="kinds of layers that share a precision where the second follows the first"
    )
    cost: PriceSpec | None = None

    def allowed(self, layer: LayerInfo, *, first: bool = False, last: bool = False) -> tuple[str, ...]:
        """The texts of the pairs that a layer may have."""
        if first and self.first is not None:
            return self.first
        if last and self.last is not None:
            return self.last
        if layer.depthwise and "depthwise" in self.kinds:
            return self.kinds["depthwise"]
        return self.kinds.get(layer.kind, self.pairs)

    def ties(self, layers: Sequence[LayerInfo]) -> list[list[str]]:
        """The layers that must agree, those that only look up left out; lists of one are left out too."""
        free = [layer for layer in layers if layer.reason is None and not layer.looks_up]
        groups: dict[str, list[str]] = {}
        if self.alike != "none":
            for layer in free:
                block = layer.name.rpartition(".")[0] if self.alike == "block" else ""
                if block or self.alike == "network":
                    groups.setdefault(block, []).append(layer.name)
        ties = [*groups.values()]
        for one, other in pairwise(free):
            if any(_is(one, a) and _is(other, b) for a, b in self.fused):
                ties.append([one.name, other.name])
        return [tie for tie in ties if len(tie) > 1]


def _is(layer: LayerInfo, kind: str) -> bool:
    return layer.depthwise if kind == "depthwise" else layer.kind == kind


class Allowed:
    """The pairs of one layer as a test: kinds of both tensors, and what shares their scales."""

    def __init__(self, texts: Iterable[str], granularity: Mapping[Side, Sequence[str]], layer: LayerInfo) -> None:
        texts = tuple(texts)
        self._all = ANY in texts
        self._kinds = frozenset().union(*(kinds_of_pair(text) for text in texts if text != ANY))
        self._granularity = granularity
        self._layer = layer

    def __call__(self, pair: LayerPrecision) -> bool:
        """Whether the device runs the layer at this pair."""
        if not self._all:
            weight, activation = _kind(pair.weight), _kind(pair.activation)
            if self._layer.looks_up:  # no activation: whatever pair has this weight
                if all(weight != other for other, _ in self._kinds):
                    return False
            elif (weight, activation) not in self._kinds:
                return False
        sides: list[tuple[Side, Precision]] = [("activation", pair.activation)]
        if not self._layer.multiplies_activations:
            sides.append(("weight", pair.weight))
        return all(
            not precision.has_scale or side not in self._granularity or precision.granularity in self._granularity[side]
            for side, precision in sides
        )


def load_profile(hardware: str | Path) -> Profile:
    """Read a shipped profile by name or one's own by path.

    Raises:
        HardwareError: no such profile, no YAML, or a key or value that does not belong; the message names all of them.
    """
    path = profile_path(hardware)
    document = read_yaml(path, HardwareError)
    if not isinstance(document, Mapping):
        raise HardwareError(f"{path} must hold keys and values, got {type(document).__name__}: see `generic.yaml`")
    try:
        return Profile.model_validate(document)
    except ValidationError as error:
        raise HardwareError(f"{path} cannot be used:\n" + explain(error, Profile, "hardware profile")) from None


def profile_path(hardware: str | Path) -> Path:
    """The file of a profile. Raises HardwareError if there is none."""
    return shipped("hardware", str(hardware), HardwareError)


def profile_copy(hardware: str | Path) -> tuple[str, str | None]:
    """The text of a profile and of its table, as a run folder keeps them: beside each other."""
    path, profile = profile_path(hardware), load_profile(hardware)
    if profile.cost is None or profile.cost.table is None:
        return read_text(path), None
    document = profile.model_dump(mode="json", exclude_defaults=True)
    document["cost"]["table"] = RUN_TABLE
    return to_yaml(document), read_text(table_path(path, profile))


def table_path(path: Path, profile: Profile) -> Path:
    """The table of a profile that lies at `path`. Raises HardwareError if the profile has none, or it is not there."""
    if profile.cost is None or profile.cost.table is None:
        raise HardwareError(f"hardware profile '{profile.name}' has no table: give `cost: {{table: FILE.csv}}` there")
    table = path.parent / with_home(profile.cost.table)
    if not table.is_file():
        raise HardwareError(f"hardware profile '{profile.name}' names the table {table}, which is not there")
    return table


def profile_names() -> list[str]:
    """The profiles that ship with mpsearch."""
    return shipped_names("hardware")


def matches(name: str, tie: Iterable[str]) -> bool:
    """Whether a layer is among those that a list of patterns or names ties."""
    return any(name == pattern or fnmatchcase(name, pattern) for pattern in tie)


def write_profile(table_csv: Path, about: str, source: str, change: float = 0.0) -> None:
    """Write a profile beside a table, with its name; one that is there stays. What has no row is not allowed.

    Args:
        table_csv: the file of the table.
        about: the device, in a sentence.
        source: where the numbers are from.
        change: what a change of the activations' precision costs, in microseconds.

    Raises:
        RunError: the file cannot be written.
    """
    path = table_csv.with_suffix(".yaml")
    if path.exists():
        return
    document = {
        "name": table_csv.stem,
        "about": about,
        "source": source,
        "pairs": ["any"],  # that has rows, now or when the table has got more
        "cost": {"table": table_csv.name, "change": change},
    }
    write_text(path, to_yaml(document))
