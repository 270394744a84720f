"""Compiled quantizers: all element-wise passes over a tensor in one, compiled once for tensors of every shape.

Between quantizers a network runs as it is: its convolutions and normalizations are fast already, and what else it does
may not be for a compiler. What an eager quantizer wastes is memory traffic, ten passes where one would do. So the graph
that is compiled is a quantizer's alone, on a tensor seen as rows: `(channels, n)` for a weight with a step a channel,
`(n,)` for an activation. All layers of a network share a handful of graphs. On a card each is compared with the eager
passes before it is used (`checked.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.compiler import part_caches, trust_vector_units
from mpsearch.quant.checked import checked

GRAPHS = 64
"""Graphs that one function may have: kinds of quantizers, of tensors and of modes. Dynamo's own limit is 8."""


class Elementwise(nn.Module):
    """A module that maps each element of a tensor by itself, given something for each channel."""

    fused = False

    def run(
        self, function: Callable[..., Tensor], x: Tensor, *per_channel: Tensor | None, owner: Any = None, axis: int = 0
    ) -> Tensor:
        """`function(owner, x, *per_channel)`, compiled if the module is `fused`.

        Args:
            function: element-wise in `x`; at the top of a module, or of a class.
            x: any shape.
            per_channel: of shape () or (channels, 1, ..., 1), broadcast against `x`; None stays None.
            owner: what holds the rest that the function needs; default: this module.
            axis: the axis of the channels.
        """
        owner = self if owner is None else owner
        if not self.fused or torch.compiler.is_compiling():
            return function(owner, x, *per_channel)
        by_channel = any(p is not None and p.dim() > 0 for p in per_channel)
        rows, back = as_rows(x, axis if by_channel else None)
        flat = (p if p is None else p.reshape(-1, 1) if p.dim() else p.view(()) for p in per_channel)
        return back(checked(_compiled(function), function, owner, rows, *flat))


def as_rows(x: Tensor, axis: int | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """A dense tensor as `(channels, n)`, or as `(n,)` without an axis, in the order of its memory; and the way back."""
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    if axis is not None:
        order.remove(axis)
        order.insert(0, axis)
    ordered = x.permute(order)
    inverse = sorted(range(x.dim()), key=order.__getitem__)
    rows = ordered.reshape(-1) if axis is None else ordered.reshape(x.shape[axis], -1)
    return rows, lambda y: y.view(ordered.shape).permute(inverse)


def fuse(model: nn.Module) -> nn.Module:
    """Have the quantizers of a model compiled when they first run; in place."""
    for module in model.modules():
        if isinstance(module, Elementwise):
            module.fused = True
    return model


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    part_caches()
    trust_vector_units()
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    return torch.compile(function, dynamic=True)
