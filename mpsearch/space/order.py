"""The order in which configs of rising or falling cost are tried."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TypeVar

_T = TypeVar("_T")


def ends_first(items: Sequence[_T]) -> list[_T]:
    """First and last, then what is in the middle of the widest gap, and so on: wherever it ends, all is covered.

    Of two gaps as wide, and of two in the middle, the latter comes first: towards the cheap end, where `items` go from
    dear to cheap, as scores change most there.

    >>> ends_first([8, 7, 6, 5, 4, 3, 2])
    [8, 2, 5, 3, 6, 4, 7]
    """
    order = [0, len(items) - 1][: len(items)]
    while len(order) < len(items):
        known = sorted(order)
        low, high = max(itertools.pairwise(known), key=lambda gap: (gap[1] - gap[0], gap[1]))
        order.append((low + high + 1) // 2)
    return [items[i] for i in order]
