"""Compiled code on a card is compared with the eager one before it is used; what cannot be compiled runs eagerly.

Compilers have faults that a user would take for a training that does not converge: on an H200, torch 2.11 searched all
of a tensor where a slice was asked for, and DSQ's gradients were wrong or NaN. So, whenever a call has compiled a new
graph, forward and backward pass are made on copies and compared. A function whose compiled form is wrong runs eagerly
for the rest of the process, and a warning says so.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mpsearch.compiler import compile_errors, graphs_compiled
from mpsearch.files import no_room

progress = logging.getLogger("mpsearch.progress")

DEVICES = ("cuda",)
"""Kinds of devices on which it is compared: what the CPU computes, tests compare on every machine."""

APART = 0.05
"""Largest distance from the eager result, as a share of its norm: rounding at the edge of two codes stays far below."""

FLOOR = 1e-4
"""Norm that a result has at least, as a share of its upstream gradient's: that of a weight which lies on its grid is
rounding noise."""

Function = Callable[..., Tensor]

_eager: set[Function] = set()
"""Functions that are not compiled in this process: what came of it was wrong, or nothing came of it."""


def given_up() -> int:
    """How many functions are not compiled in this process, as that failed or gave wrong numbers."""
    return len(_eager)


def checked(compiled: Function, function: Function, owner: Any, x: Tensor, *per_channel: Tensor | None) -> Tensor:
    """`compiled(owner, x, *per_channel)`, compared with `function` of the same where that has compiled a new graph.

    Where torch cannot compile it (a C++ compiler without its headers, a cache that cannot be written) `function` runs.

    Args:
        compiled: the compiled form of `function`.
        function: element-wise in `x`.
        owner: what it needs beside tensors.
        x: any shape.
        per_channel: broadcast against `x`.
    """
    if function in _eager:
        return function(owner, x, *per_channel)
    before = graphs_compiled()
    try:
        y = compiled(owner, x, *per_channel)
    except compile_errors() as error:
        if no_room(getattr(error, "inner_exception", error)):  # the run ends, and says it
            raise
        why = " ".join(str(error).split())[:300]
        progress.warning("torch.compile fails for %s: it runs eagerly, and takes longer (%s)", _name(owner), why)
        _eager.add(function)
        return function(owner, x, *per_channel)
    if x.device.type not in DEVICES or graphs_compiled() == before or _capturing(x):
        return y
    apart = _apart(compiled, function, owner, x, per_channel)
    if apart <= APART:
        return y
    _eager.add(function)
    progress.warning(
        "torch.compile gives wrong numbers for %s on %s (%.2g of their norm from the eager ones): it runs eagerly, and "
        "takes longer",
        _name(owner),
        x.device,
        apart,
    )
    return function(owner, x, *per_channel)


def _apart(
    compiled: Function, function: Function, owner: Any, x: Tensor, per_channel: Sequence[Tensor | None]
) -> float:
    """The largest distance of results and gradients of the compiled form from the eager ones, as shares of norms.

    What is random, so that two eager passes give it otherwise, must be finite, and as large within a factor of ten.
    """
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        passes = functools.partial(_pass, owner=owner, x=x, per_channel=per_channel)
        upstream = torch.randn_like(x)
        got, expected, again = passes(compiled, upstream), passes(function, upstream), passes(function, upstream)
    least = FLOOR * float(upstream.float().norm())
    worst = 0.0
    for one, other, another in zip(got, expected, again, strict=True):
        norm = float(other.norm())
        if not math.isfinite(norm):  # of a diverged training; there is nothing to compare
            continue
        if float((another - other).norm()) > APART / 10 * norm:
            distance = 0.0 if float(one.norm()) <= 10 * max(norm, least) else math.inf  # a NaN is not
        else:
            distance = float((one - other).norm()) / max(norm, least)
        worst = max(worst, distance if math.isfinite(distance) else math.inf)
    return worst


def _pass(
    function: Function, upstream: Tensor, owner: Any, x: Tensor, per_channel: Sequence[Tensor | None]
) -> list[Tensor]:
    """The result of a forward pass and, where gradients are on, the gradients of a backward pass; in float32."""
    tensors = [p if p is None else p.detach().requires_grad_(p.requires_grad) for p in (x, *per_channel)]
    y = function(owner, *tensors)
    leaves = [p for p in tensors if p is not None and p.requires_grad]
    gradients: Sequence[Tensor | None] = [None] * len(leaves)
    if y.requires_grad and leaves:
        gradients = torch.autograd.grad(y, leaves, upstream.to(y.dtype), allow_unused=True)
    whole = [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, gradients, strict=True)]
    return [result.detach().float() for result in (y, *whole)]


def _capturing(x: Tensor) -> bool:
    return x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _name(owner: Any) -> str:
    return "the GDNSQ quantizer" if isinstance(owner, tuple) else f"the {type(owner).__name__}"
