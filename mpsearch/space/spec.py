"""A search space as it is written in YAML, for any network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from mpsearch.documents import explain, read_yaml
from mpsearch.errors import PrecisionError, SpaceError, nearest
from mpsearch.graph.facts import KIND_NAMES, LayerInfo
from mpsearch.precision import Precision
from mpsearch.shipped import shipped, shipped_names
from mpsearch.space.choices import TensorName, parse_choices


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

    def choices(self) -> Iterator[tuple[TensorName, tuple[Precision, ...]]]:
        """The tensors that have choices here, with them."""
        if self.weight is not None:
            yield "weight", parse_choices(self.weight, "weight")
        if self.activation is not None:
            yield "activation", parse_choices(self.activation, "activation")


def _known_kind(kind: str) -> str:
    if kind not in KIND_NAMES:
        raise ValueError(nearest(kind, KIND_NAMES))
    return kind


class RuleSpec(_Choices):
    """The choices of the layers whose name matches; a later rule overrides the keys that it gives."""

    match: str = Field(description="layer names, with * ? [..] as in a shell")
    kind: Annotated[str, AfterValidator(_known_kind)] | None = Field(None, description="only layers of this kind")
    depthwise: bool | None = Field(None, description="only layers that are (true) or are not (false) depthwise")
    pointwise: bool | None = Field(
        None, description="only layers whose kernel is (true) or is not (false) 1 everywhere"
    )

    def applies(self, layer: LayerInfo) -> bool:
        """Whether the rule is about this layer."""
        return (
            fnmatchcase(layer.name, self.match)
            and self.kind in (None, layer.kind)
            and self.depthwise in (None, layer.depthwise)
            and self.pointwise in (None, layer.pointwise)
        )


class FixedSpec(_Choices):
    """The one precision that a layer has."""

    @model_validator(mode="after")
    def _single(self) -> Self:
        for tensor, choices in self.choices():
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
    products: bool = Field(
        False,
        description="whether products of two activations, as in attention, are layers too; both factors take the "
        "`activation` choices of their rules",
    )
    tied: tuple[tuple[str, ...], ...] = Field((), description="lists of patterns whose layers share their choices")


def load_space(space: str | Path) -> SpaceSpec:
    """Read a shipped search space by name or one's own by path.

    Raises:
        SpaceError: no such space, no YAML, or a key or value that does not belong; the message names all of them.
    """
    path = shipped("search_spaces", str(space), SpaceError)
    return parse_space(read_yaml(path, SpaceError), source=str(path))


def parse_space(document: Any, source: str = "search space") -> SpaceSpec:
    """Check a search space that is already in memory. Raises SpaceError as `load_space` does."""
    if not isinstance(document, Mapping):
        raise SpaceError(f"{source} must hold keys and values, got {type(document).__name__}: see `uniform.yaml`")
    try:
        return SpaceSpec.model_validate(document)
    except ValidationError as error:
        raise SpaceError(f"{source} cannot be used:\n" + explain(error, SpaceSpec, "search space")) from None


def space_names() -> list[str]:
    """The search spaces that ship with mpsearch."""
    return shipped_names("search_spaces")
