"""Groups: so many input features of an output channel that share a scale, as `uniform:4/group128` says.

A weight is seen as `(channels, features)`: a row for each output channel, its input features (and kernel taps) in the
order of the weight's shape. A row is cut into groups of `size`; the last one may be shorter. To a quantizer the groups
are what channels are otherwise: rows with a step each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def to_groups(weight: Tensor, axis: int, size: int) -> Tensor:
    """A weight, channels along `axis`, as `(channels * groups, size)`: a short last group is filled up with zeros."""
    rows = weight.movedim(axis, 0).flatten(1)
    size = min(size, rows.shape[1])
    return F.pad(rows, (0, -rows.shape[1] % size)).reshape(-1, size)


def from_groups(groups: Tensor, like: Tensor, axis: int) -> Tensor:
    """What `to_groups` made of a tensor of the shape of `like`, undone."""
    moved = like.movedim(axis, 0)
    rows = groups.reshape(len(moved), -1)[:, : moved[0].numel()]
    return rows.reshape(moved.shape).movedim(0, axis)


def spread_groups(values: Tensor, like: Tensor, axis: int, size: int) -> Tensor:
    """A value for each group, `(channels, groups)`, repeated for its features: in the shape of `like`."""
    features = like.numel() // like.shape[axis]
    return from_groups(values.reshape(-1, 1).expand(-1, min(size, features)), like, axis)


def steps_of_groups(rows: Tensor, size: int, search: Callable[[Tensor], Tensor]) -> Tensor:
    """The steps `(channels, groups)` that a search finds for the groups of `rows` `(channels, features)`.

    Args:
        rows: the weight.
        size: features of a group.
        search: `(rows, n)` -> their steps `(rows,)`.
    """
    channels, features = rows.shape
    whole = features // size * size
    parts = [rows[:, :whole].reshape(-1, size)] if whole else []
    parts += [rows[:, whole:]] if whole < features else []
    return torch.cat([search(part).view(channels, -1) for part in parts], dim=1)
