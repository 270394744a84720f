"""Documents that people write, or pass on: they are read, checked against a model, and what is wrong is said.

YAML is read as version 1.2 has it (its core schema): `1e-3` and `0o17` are numbers, while `yes`, `no`, `on`, `off`,
dates and `1:30` are text, and there are no merge keys. A key that is given twice is refused, as is what no person
writes: megabytes, hundreds of levels, or references that unfold to a flood of values. PyYAML reads YAML 1.1, and lets
its rules be replaced; ruamel.yaml reads 1.2, but leaves the other checks to us as well. JSON is read as its standard
has it: numbers are finite, texts can be encoded, and a key is given once.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from mpsearch.errors import MpsearchError, nearest
from mpsearch.files import read_text, read_whole

MOST_CHARACTERS = 2**20
MOST_VALUES = 100_000  # with all references unfolded
MOST_LEVELS = 50

_INT = r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"
_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
_PLAIN = {  # in this order: an integer would also pass for a float
    "null": re.compile(r"(~|null|Null|NULL|)\Z"),
    "bool": re.compile(r"(true|True|TRUE|false|False|FALSE)\Z"),
    "int": re.compile(rf"({_INT})\Z"),
    "float": re.compile(rf"({_FLOAT})\Z"),
}


class YamlError(ValueError):
    """A text is no YAML that we take; the message names the line."""


_RULES = [(f"tag:yaml.org,2002:{tag}", rule) for tag, rule in _PLAIN.items()]


class _Loader(yaml.SafeLoader):
    """Reads plain scalars by the core schema, and stops where nesting is deeper than any person writes."""

    level = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.level > MOST_LEVELS:
            line = self.line + 1
            raise YamlError(f"line {line}: it is nested in more than {MOST_LEVELS} levels: is it the right file?")
        self.level += 1
        node = super().compose_node(parent, index)
        self.level -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes text that a reader of YAML 1.1 or 1.2 would take for something else."""


_Loader.yaml_implicit_resolvers = {None: _RULES}
_Dumper.yaml_implicit_resolvers = {**yaml.SafeDumper.yaml_implicit_resolvers, None: _RULES}


def _int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    return int(text[2:], {"0o": 8, "0x": 16}[text[:2]]) if text[:2] in ("0o", "0x") else int(text)


def _float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(loader.construct_scalar(node).lower().replace(".inf", "inf").replace(".nan", "nan"))


_Loader.add_constructor("tag:yaml.org,2002:int", _int)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)


def parse_yaml(text: str) -> Any:
    """What a YAML text says: mappings, sequences, text, numbers, booleans and None.

    Raises:
        YamlError: it is no YAML, gives a key twice, or is larger or deeper than anybody writes.
    """
    if len(text) > MOST_CHARACTERS:
        raise YamlError(
            f"it has {len(text):,} characters, and at most {MOST_CHARACTERS:,} are read: is it the right file?"
        )
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _weigh(node, {})
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise YamlError(" ".join(str(error).replace('in "<unicode string>", ', "").split())) from None
    except ValueError as error:  # an integer of thousands of digits
        raise error if isinstance(error, YamlError) else YamlError(str(error)) from None


def _weigh(node: yaml.Node, known: dict[yaml.Node, int]) -> int:
    """How many values a node stands for, with all references unfolded; what must not be is refused on the way."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if (weight := known.get(node)) is not None:  # the composer keeps one node for all references to it
        if weight == 0:
            raise YamlError(f"line {_line(node)}: a value refers to itself")
        return weight
    known[node] = 0
    below: list[yaml.Node] = list(node.value)
    if isinstance(node, yaml.MappingNode):
        _refuse_repeated_keys(node)
        below = [part for pair in node.value for part in pair]
    weight = 1
    for part in below:
        weight += _weigh(part, known)
        if weight > MOST_VALUES:
            raise YamlError(
                f"line {_line(node)}: it unfolds to more than {MOST_VALUES:,} values: is it the right file?"
            )
    known[node] = weight
    return weight


def _refuse_repeated_keys(node: yaml.MappingNode) -> None:
    lines: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            name, line = (key.tag, key.value), _line(key)
            if name in lines:
                raise YamlError(
                    f"line {line}: the key '{key.value}' was given in line {lines[name]} already: keep one of them"
                )
            lines[name] = line


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def read_yaml(path: Path, error: type[MpsearchError]) -> Any:
    """What a YAML (or JSON) file says.

    Raises:
        error: it cannot be read, or `parse_yaml` refuses it; the message names file and line.
    """
    try:
        return parse_yaml(read_text(path))
    except OSError as reason:
        raise error(f"cannot read {path}: {reason.strerror}") from None
    except UnicodeDecodeError as reason:
        raise error(f"{path} is not YAML: {reason}") from None
    except YamlError as reason:
        raise error(f"{path} is not YAML that can be used: {reason}") from None


def parse_json(text: str | bytes) -> Any:
    """What a JSON text says. Raises ValueError: it is none, or gives a key twice, or a number that is not finite."""
    try:
        document = json.loads(
            text, object_pairs_hook=_object, parse_float=_finite, parse_int=_whole, parse_constant=_finite
        )
    except RecursionError:
        raise ValueError("it is nested in hundreds of levels") from None
    if "\\ud" in (text if isinstance(text, str) else text.decode()).lower():  # half of a pair cannot be printed
        json.dumps(document, ensure_ascii=False).encode()
    return document


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    known = dict(pairs)
    if len(known) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key '{next(name for name in names if names.count(name) > 1)}' is given twice")
    return known


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"it has {clip_text(text)} where a finite number belongs")
    return number


def _whole(text: str) -> int:
    if len(text) > 20:  # more than 64 bits
        raise ValueError(f"it has {clip_text(text)}, and whole numbers have at most 20 digits")
    return int(text)


def read_json(path: Path, error: type[MpsearchError], advice: str) -> dict[str, Any]:
    """The object that a JSON file of ours holds.

    Raises:
        error: it cannot be read, or holds something else; the message names the file and ends with `advice`.
    """
    try:
        document = parse_json(read_whole(path))
    except OSError as reason:
        raise error(f"cannot read {path}: {reason.strerror}; {advice}") from None
    except ValueError as reason:
        raise error(f"{path} is not JSON ({reason}); {advice}") from None
    if not isinstance(document, dict):
        raise error(f"{path} must hold an object, got {clip(document)}; {advice}")
    return document


def to_yaml(document: Any) -> str:
    """A document of plain values as YAML, from which `parse_yaml` makes an equal one."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def explain(error: ValidationError, model: type[BaseModel], whole: str) -> str:
    """What is wrong with a document, a line for each key: what was given, what is expected, the most similar names.

    Args:
        error: of validating it.
        model: what it was validated against.
        whole: what the document is called, where it is wrong as a whole.
    """
    return "\n".join(f"  {_key(model, item['loc']) or whole}: {_reason(item, model)}" for item in error.errors())


def _reason(item: Any, model: type[BaseModel]) -> str:
    location = item["loc"]
    match item["type"]:
        case "extra_forbidden":
            return f"no such key; {nearest(str(location[-1]), _keys_at(model, location[:-1]))}"
        case "missing":
            return "missing; it is required"
        case "literal_error":
            valid = re.findall(r"'([^']*)'", str(item.get("ctx", {}).get("expected", "")))
            return f"got {item['input']!r}; {nearest(str(item['input']), valid)}"
        case "value_error":
            return f"{item['msg'].removeprefix('Value error, ')} (got {clip(item['input'])})"
        case _:
            return f"{item['msg'][:1].lower()}{item['msg'][1:]} (got {clip(item['input'])})"


def _key(model: type[BaseModel], location: Sequence[int | str]) -> str:
    """The place in the document; pydantic also names the member of a union that it tried."""
    return ".".join(str(part) for part in _walk(model, location)[0] if part not in ("bool", "literal['auto']"))


def _keys_at(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """The keys that there are at a place of a document."""
    return sorted({name for candidate in _models(_walk(model, location)[1]) for name in candidate.model_fields})


def _walk(model: type[BaseModel], location: Sequence[int | str]) -> tuple[list[int | str], Any]:
    """A place in a document without the classes of unions that pydantic names in it, and what is annotated there."""
    annotation: Any = model
    place: list[int | str] = []
    for part in location:
        candidates = list(_models(annotation))
        if chosen := [candidate for candidate in candidates if candidate.__name__ == part]:
            annotation = chosen[0]
            continue
        place.append(part)
        # An index, or a key of a mapping, stays within the annotation.
        fields = [candidate.model_fields[part] for candidate in candidates if part in candidate.model_fields]
        annotation = fields[0].annotation if fields else annotation
    return place, annotation


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def first_fault(error: ValidationError) -> str:
    """What is wrong with a line of JSON, in words: the first fault that was found."""
    fault = error.errors()[0]
    name = ".".join(map(str, fault["loc"]))
    match fault["type"]:
        case "missing":
            return f"'{name}' is missing"
        case "unexpected_keyword_argument" | "extra_forbidden":
            return f"unknown key '{name}'"
        case "value_error":
            return f"'{name}': {fault['msg'].removeprefix('Value error, ')}"
        case _:
            return f"'{name}': {fault['msg'][:1].lower()}{fault['msg'][1:]}, got {clip(fault['input'])}"


def clip(value: Any) -> str:
    """A value as it is shown in a message."""
    return clip_text(repr(value))


def clip_text(text: str) -> str:
    """A text as it is shown in a message."""
    return text if len(text) <= 60 else text[:57] + "..."
