"""Rounding to integers, and what stands in for its derivative (which is zero almost everywhere)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _RoundSTE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        return torch.round(v)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def round_ste(v: Tensor) -> Tensor:
    """Round half to even; the gradient passes unchanged (straight-through, arXiv 1308.3432)."""
    rounded: Tensor = _RoundSTE.apply(v)  # type: ignore[no-untyped-call]
    return rounded


def scale_gradient(x: Tensor, factor: Tensor | float) -> Tensor:
    """`x` itself in the forward pass; its gradient times `factor` in the backward pass (LSQ, arXiv 1902.08153, §2.2)."""
    scaled = x * factor
    return scaled + (x - scaled).detach()
