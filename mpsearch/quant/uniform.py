"""The uniform quantizer, 1 to 8 bits, with learnable step and offset.

    q(x) = s * (clamp(round(x/s - o), n, p) + o)

| tensor                | n        | p          | o (grid shift, in steps)                           |
|-----------------------|----------|------------|----------------------------------------------------|
| signed, b >= 2        | -2^(b-1) | 2^(b-1)-1  | 0                                                  |
| signed, b = 1         | -1       | 0          | 1/2: the levels are -s/2 and +s/2                  |
| unsigned              | 0        | 2^b - 1    | round(beta/s): minus the zero point, 0 without beta |

Signed and symmetric is for weights; unsigned is for activations, with an offset `beta` where the input takes negative
values. The shift is a whole number of steps, so zero stays on the grid and zero padding is exact in integer arithmetic.

White paper (arXiv 2106.08295) §2.2-2.3; the gradients of step and offset are those of LSQ (arXiv 1902.08153) and LSQ+
(arXiv 2004.09576), which follow from straight-through rounding alone. We differ in one point: binary weights are the
same formula with a shifted grid instead of a special case.

Bits, granularity and "leave alone" are buffers, not structure: one module, and one compiled graph, serves them all.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mpsearch.precision import FLOAT, Precision
from mpsearch.quant.rounding import round_ste, scale_gradient

MIN_STEP = 2.0**-60
"""Smaller steps are taken as this: a tensor of zeros, or a step that training drove to zero, divides nothing by 0."""


def fake_quantize(x: Tensor, step: Tensor, shift: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Map `x` to the grid step * (k + shift), low <= k <= high; all arguments broadcast against `x`.

    Computed in float32 at least, because bfloat16 cannot tell neighbouring codes apart; the result has the type of `x`.
    """
    v = x.to(torch.promote_types(x.dtype, torch.float32)) / step - shift
    code = torch.clamp(round_ste(v), low, high)
    return (step * (code + shift)).to(x.dtype)


def code_range(bits: int, signed: bool) -> tuple[int, int]:
    """The smallest and the largest integer code (n, p)."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def grid_shift(bits: int, signed: bool) -> float:
    """The grid shift o without an offset: half a step for binary signed tensors, else none."""
    return 0.5 if signed and bits == 1 else 0.0


class UniformQuantizer(nn.Module):
    """One tensor's uniform quantizer: learnable `step` (and `beta`), precision in buffers.

    Args:
        channels: output channels that may have their own step; 1 for activations.
        dims: dimensions of the tensor, channel first: `step` has the shape (channels, 1, ..., 1).
        signed: symmetric signed codes (weights) instead of unsigned ones (activations).
        offset: learn an offset `beta` (activations that take negative values).
        elements: elements that share one step, N of LSQ's gradient scale 1/sqrt(N*p).
        channel_axis: the axis of `channels` (1 for transposed convolutions).
    """

    low: Tensor
    high: Tensor
    shift: Tensor
    shared: Tensor
    is_float: Tensor
    gradient_scale: Tensor

    def __init__(
        self, channels: int, dims: int, *, signed: bool, offset: bool, elements: int, channel_axis: int = 0
    ) -> None:
        super().__init__()
        shape = [1] * dims
        if dims:
            shape[channel_axis] = channels
        self.signed = signed
        self.elements = elements
        self.channels = channels
        self.channel_axis = channel_axis
        self.precision = FLOAT
        self.step = nn.Parameter(torch.ones(shape))
        self.beta = nn.Parameter(torch.zeros(shape)) if offset else None
        for name in ("low", "high", "shift"):
            self.register_buffer(name, torch.zeros(()), persistent=False)
        self.register_buffer("gradient_scale", torch.ones(()), persistent=False)
        self.register_buffer("shared", torch.tensor(False), persistent=False)
        self.register_buffer("is_float", torch.tensor(True), persistent=False)

    @torch.no_grad()
    def set_precision(self, precision: Precision) -> None:
        """Take on a precision; the step has to be set (or loaded) afterwards."""
        self.precision = precision
        self.is_float.fill_(precision.is_float)
        if precision.is_float:
            return
        low, high = code_range(precision.bits, self.signed)
        per_tensor = precision.granularity == "tensor"
        self.low.fill_(low)
        self.high.fill_(high)
        self.shift.fill_(grid_shift(precision.bits, self.signed))
        self.shared.fill_(per_tensor)
        sharing = self.elements * (self.channels if per_tensor else 1)
        # A shared step is the mean over channels, which divides its gradient by their number: undone here.
        undo_mean = self.channels if per_tensor else 1
        self.gradient_scale.fill_(undo_mean / (sharing * max(high, 1)) ** 0.5)

    @torch.no_grad()
    def set_range(self, step: Tensor, beta: Tensor | None = None) -> None:
        """Set the step, and the offset where there is one; both broadcast to (channels, 1, ..., 1)."""
        self.step.copy_(step.reshape(self.step.shape) if step.numel() == self.step.numel() else step)
        if self.beta is not None and beta is not None:
            self.beta.copy_(beta.reshape(self.beta.shape) if beta.numel() == self.beta.numel() else beta)

    def grid(self) -> tuple[Tensor, Tensor]:
        """The step s > 0 and the shift o that hold now, with LSQ's gradient scale attached."""
        step: Tensor = self.step
        if torch.compiler.is_compiling():  # one graph for all precisions: what holds is read from buffers
            step = torch.where(self.shared, step.mean(), step)
        elif self.precision.granularity == "tensor" and self.channels > 1:
            step = step.mean().expand_as(step)
        step = scale_gradient(step, self.gradient_scale).abs().clamp_min(MIN_STEP)
        if self.beta is None:
            return step, self.shift
        return step, self.shift + round_ste(scale_gradient(self.beta, self.gradient_scale) / step)

    def forward(self, x: Tensor) -> Tensor:
        """The quantized tensor."""
        compiling = torch.compiler.is_compiling()
        if not compiling and self.precision.is_float:  # not read when compiling: it would guard the graph
            return x
        step, shift = self.grid()
        y = fake_quantize(x, step, shift, self.low, self.high)
        return torch.where(self.is_float, x, y) if compiling else y

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """The integer codes of `x` (int32), between n and p."""
        step, shift = self.grid()
        return torch.clamp(torch.round(x / step - shift), self.low, self.high).to(torch.int32)

    def extra_repr(self) -> str:
        """The precision, for print(model)."""
        return (
            f"{self.precision}, {'signed' if self.signed else 'unsigned'}{', offset' if self.beta is not None else ''}"
        )
