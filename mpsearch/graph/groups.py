"""Groups: which things must share one choice, because they are connected through something they have in common."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence


def connected(members: Sequence[Iterable[Hashable]]) -> list[int]:
    """For each item, the index of the first item that it is connected to: by a common key, or through other items.

    Args:
        members: the keys of each item, such as the tensors that a layer reads.

    >>> connected([{"a"}, {"b"}, {"a", "c"}, {"c"}])
    [0, 1, 0, 0]
    """
    parent = list(range(len(members)))

    def root(item: int) -> int:
        while parent[item] != item:
            item = parent[item]
        return item

    first_with: dict[Hashable, int] = {}
    for item, keys in enumerate(members):
        for key in keys:
            one, other = root(first_with.setdefault(key, item)), root(item)
            parent[max(one, other)] = min(one, other)
    return [root(item) for item in range(len(members))]
