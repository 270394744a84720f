"""The precisions that a tensor may take, as texts say them.

Weights are per channel and activations per tensor unless the text says otherwise.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Literal

from mpsearch.errors import PrecisionError
from mpsearch.precision import Granularity, LayerPrecision, Precision

TensorName = Literal["weight", "activation"]
TENSORS: tuple[TensorName, ...] = ("weight", "activation")

GRANULARITY: Mapping[TensorName, Granularity] = {"weight": "channel", "activation": "tensor"}
"""What holds where a precision text names none."""

_RANGE = re.compile(r"(?P<quantizer>[a-z]+):(?P<low>\d+)-(?P<high>\d+)(?P<granularity>/[a-z]+\d*)?")


def parse_choices(texts: Iterable[str], tensor: TensorName) -> tuple[Precision, ...]:
    """Read precision texts, a range of bits (`uniform:2-8`) standing for each of them.

    Returns:
        The choices without repeats, in order of bits, then of quantizer.

    Raises:
        PrecisionError: a text has another form or names a precision that does not exist, or there is none.
    """
    choices = {Precision.parse(text, GRANULARITY[tensor]) for entry in texts for text in _spelled_out(entry)}
    if not choices:
        raise PrecisionError("there is no precision to choose from: give at least one, as [uniform:4]")
    if tensor == "activation":
        for choice in choices:
            LayerPrecision(choice, choice)  # raises if a layer's input cannot have it
    return tuple(sorted(choices, key=precision_order))


def _spelled_out(text: str) -> list[str]:
    match = _RANGE.fullmatch(text.strip())
    if match is None:
        return [text]
    low, high = int(match["low"]), int(match["high"])
    if low >= high:
        raise PrecisionError(f"'{text}' is no range of bits: write the smaller first, as {match['quantizer']}:2-8")
    return [f"{match['quantizer']}:{bits}{match['granularity'] or ''}" for bits in range(low, high + 1)]


def precision_order(precision: Precision) -> tuple[int, str, str]:
    """Key to sort choices by: bits, then quantizer, then granularity."""
    return precision.bits, precision.quantizer, precision.granularity


def near(word: str, names: Iterable[str]) -> str:
    """The end of an error message: the few names most like the one given; networks have too many to list."""
    names = list(names)
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.3) or names[:3]
    return f"near: {', '.join(close)}" if close else "there is none"


def listing(items: Iterable[object]) -> str:
    """The first items as text, and how many more there are."""
    texts = [str(item) for item in items]
    return ", ".join(texts if len(texts) <= 8 else [*texts[:8], f"and {len(texts) - 8} more"])
