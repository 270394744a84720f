"""Splits of samples that have no class: by position, with the fractions and the seed of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar, get_args

import torch

from mpsearch.errors import TaskError
from mpsearch.task.task import Split

Item = TypeVar("Item")


class Fractions(Protocol):
    """What a study says of splits."""

    @property
    def val_fraction(self) -> float:
        """Share of train used for val."""
        ...

    @property
    def test_fraction(self) -> float:
        """Share of val, or of train, used for test."""
        ...

    @property
    def split_seed(self) -> int:
        """Seed of those splits."""
        ...


def divided(
    spec: Fractions, parts: Mapping[Split, Sequence[Item]], what: str, shuffle: bool = True
) -> dict[Split, list[Item]]:
    """train, val and test out of what the data brings, by the rule of `mpsearch.task.data`.

    Args:
        spec: the fractions and the seed.
        parts: what the data brings; without `shuffle` the end of a part is taken, which keeps neighbours together.
        what: the items are, for the message.

    Raises:
        TaskError: a split would be empty.
    """
    splits: dict[Split, list[Any]] = {split: list(items) for split, items in parts.items()}
    random = torch.Generator().manual_seed(spec.split_seed)
    if "train" not in splits:
        raise TaskError(f"task.data: there are {what} of {', '.join(splits) or 'no split'} and none of train: add them")
    if "test" not in splits:
        source: Split = "val" if "val" in splits else "train"
        splits[source], splits["test"] = _off(splits[source], spec.test_fraction, random, shuffle)
    if "val" not in splits:
        share = spec.val_fraction if "test" in parts else spec.val_fraction / (1 - spec.test_fraction)
        splits["train"], splits["val"] = _off(splits["train"], share, random, shuffle)
    if empty := [split for split in get_args(Split) if not splits[split]]:
        raise TaskError(f"task.data: no {what} in {' and '.join(empty)}: train, val and test need some each")
    return splits


def _off(items: list[Item], share: float, random: torch.Generator, shuffle: bool) -> tuple[list[Item], list[Item]]:
    """The rest of `items`, and a share of them (at least one), both in their old order."""
    count = max(1, round(share * len(items)))
    order = torch.randperm(len(items), generator=random).tolist() if shuffle else range(len(items))
    taken = set(order[len(items) - count :])
    return [x for i, x in enumerate(items) if i not in taken], [x for i, x in enumerate(items) if i in taken]
