"""Values by block of samples for a score that is no mean over samples: the delete-one jackknife.

    v_i = S + (n - 1) (mean_j S_-j - S_-i)

S: the score of all n blocks; S_-i: of all but block i. The mean of v is S, and of two configs on the same blocks the
difference of v says by how much each block tells them apart, as that of two values of one sample does. Where a score is
a mean over blocks, v is the score of each. Source: B. Efron, The Jackknife, the Bootstrap and Other Resampling Plans,
SIAM 1982.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

LEAST, MOST = 10, 64
"""Blocks: of fewer no interval is made; at twice as many neighbours are merged, so that a score stays cheap."""

KEPT = 2**18
"""Numbers that accumulators may keep in lists: what sorts all answers, as AUROC does, would take minutes for many."""


def values_of(score: float, without: Sequence[float]) -> Tensor | None:
    """The value of each block `(n,)` float32; None where there are too few.

    Args:
        score: of all blocks.
        without: of all blocks but one, for each.

    >>> values_of(4.5, [(45 - x) / 9 for x in range(10)]).round().tolist()  # of the mean of 0 to 9
    [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]
    """
    if len(without) < LEAST:
        return None
    left = torch.tensor(without, dtype=torch.float64)
    return (score + (len(left) - 1) * (left.mean() - left)).float()


class Blocks:
    """Accumulators of blocks of samples, each with `update` and `merge_state` as those of torchmetrics.

    Args:
        fresh: makes an accumulator that has seen nothing.
    """

    def __init__(self, fresh: Callable[[], Any]) -> None:
        self._fresh = fresh
        self._blocks: list[Any] = []
        self._kept = 0

    def add(self, output: Any, target: Any) -> None:
        """Take in a block."""
        if self._kept > KEPT:
            return
        block = self._fresh()
        block.update(output, target)
        self._blocks.append(block)
        self._kept += _kept(block)
        if len(self._blocks) == 2 * MOST:
            self._blocks = [_merged(*pair) for pair in zip(self._blocks[::2], self._blocks[1::2], strict=True)]

    def values(self, score: float, compute: Callable[[Any], float]) -> Tensor | None:
        """The value of each block, by the score of an accumulator; None where they are too few, or keep too much."""
        blocks = self._blocks
        if len(blocks) < LEAST or self._kept > KEPT:
            return None
        before = list(accumulate(blocks[:-1], _merged))  # [i]: the first i + 1 blocks
        after = list(accumulate(reversed(blocks[1:]), _merged))  # [i]: the last i + 1
        between = map(_merged, before[:-1], after[-2::-1])
        return values_of(score, [compute(rest) for rest in (after[-1], *between, before[-1])])


def _merged(one: Any, other: Any) -> Any:
    merged = copy.deepcopy(one)
    merged.merge_state(other)
    return merged


def _kept(accumulator: Any) -> int:
    """Numbers in the lists of an accumulator of torchmetrics."""
    lists = [state for state in getattr(accumulator, "metric_state", {}).values() if isinstance(state, list)]
    return sum(item.numel() for state in lists for item in state if isinstance(item, Tensor))
