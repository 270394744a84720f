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


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        # Where x/s overflows the chain rule multiplies a zero by an infinity: a clamped value, which moves no step.
        return torch.nan_to_num(grads[0], nan=0.0) * factor, None


def scale_gradient(x: Tensor, factor: Tensor) -> Tensor:
    """`x` itself, to the last bit; its gradient is multiplied by `factor` (LSQ, arXiv 1902.08153, §2.2)."""
    same: Tensor = _ScaleGradient.apply(x, factor)  # type: ignore[no-untyped-call]
    return same


class _WithGradientOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, surrogate: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def with_gradient_of(surrogate: Tensor, value: Tensor) -> Tensor:
    """`value` itself, to the last bit; its gradient is that of `surrogate`, of the same shape."""
    same: Tensor = _WithGradientOf.apply(surrogate, value)  # type: ignore[no-untyped-call]
    return same
