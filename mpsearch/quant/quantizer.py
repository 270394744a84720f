"""What all quantizers have in common: a learnable range, and precision as data.

    q(x) = s * g(x / s)

`g` rounds to the grid of one quantizer type; a subclass brings it. The step `s` (in papers also alpha, the scale) and,
for uniform grids of tensors that take negative values, the offset `beta` are here, under the same names whatever the
type: a state dict does not tell which types a tensor could have had.

A quantizer whose precision is uniform may round to an offset grid instead (`offset_grid.py`): `beta` is then its lower
end, as it is, and a `top` code joins the state dict. By that entry a loaded state dict brings the grid along; setting a
precision takes it away.

Bits, granularity and "leave alone" are buffers, not structure: one module, and one compiled graph, serves them all.
Only groups of input features (`groups.py`) change something: `step` has an element for each of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.errors import PrecisionError
from mpsearch.precision import FLOAT, Precision, group_count
from mpsearch.quant.fused import Elementwise
from mpsearch.quant.groups import from_groups, spread_groups, to_groups
from mpsearch.quant.offset_grid import offset_codes, offset_quantize
from mpsearch.quant.rounding import scale_gradient

MIN_STEP = 2.0**-60
"""Smaller steps are taken as this: a tensor of zeros, or a step that training drove to zero, divides nothing by 0."""


def not_offered(precision: Precision, offered: Iterable[str]) -> PrecisionError:
    """The error of a quantizer that is asked for a type which it does not have."""
    return PrecisionError(
        f"{precision} is not on offer here, only {', '.join(offered)}: offer {precision.quantizer} too"
    )


class Quantizer(Elementwise):
    """One tensor's quantizer: learnable `step` (and `beta`), precision in buffers.

    Args:
        channels: output channels that may have their own step; 1 for activations.
        dims: dimensions of the tensor, channel first: `step` has the shape (channels, 1, ..., 1), and (channels,
            groups) while the precision has groups.
        signed: symmetric signed codes (weights) instead of unsigned ones (activations).
        offset: the unsigned codes stand for a tensor that takes negative values: learn an offset `beta`.
        elements: elements of a channel, which share one step: N of LSQ's gradient scale 1/sqrt(N*p).
        channel_axis: the axis of `channels` (1 for transposed convolutions).
    """

    step: nn.Parameter
    beta: nn.Parameter | None
    top: Tensor | None  # the largest code of an offset grid, shape (); None: there is none
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
        self.offset = offset
        self.elements = elements
        self.channels = channels
        self.dims = dims
        self.channel_axis = channel_axis
        self.precision = FLOAT
        self.group: int | None = None  # of the precision; by itself, as a graph is compiled anew for what changes it
        self.step = nn.Parameter(torch.ones(shape))
        self.register_parameter("beta", nn.Parameter(torch.zeros(shape)) if offset else None)
        self.register_buffer("top", None)
        self.register_buffer("gradient_scale", torch.ones(()), persistent=False)
        self.register_buffer("shared", torch.tensor(False), persistent=False)
        self.register_buffer("is_float", torch.tensor(True), persistent=False)

    @torch.no_grad()
    def set_precision(self, precision: Precision) -> None:
        """Take on a precision, without an offset grid; the step has to be set (or loaded) afterwards.

        Raises:
            PrecisionError: this is no quantizer of that type.
        """
        largest = 1.0 if precision.is_float else self._set_grid(precision)
        self._have_offset_grid(False)
        self._have_groups(precision.group)
        self.precision, self.group = precision, precision.group
        self.is_float.fill_(precision.is_float)
        if precision.is_float:
            return
        per_tensor = precision.granularity == "tensor"
        self.shared.fill_(per_tensor)
        sharing = min(precision.group or self.elements, self.elements) * (self.channels if per_tensor else 1)
        # A shared step is the mean over channels, which divides its gradient by their number: undone here.
        undo_mean = self.channels if per_tensor else 1
        self.gradient_scale.fill_(undo_mean / (sharing * max(largest, 1)) ** 0.5)

    def _set_grid(self, precision: Precision) -> float:
        """Take on the grid of a precision that is not float; returns p, the largest value of `g`."""
        raise NotImplementedError

    def quantize(self, x: Tensor, step: Tensor, beta: Tensor | None) -> Tensor:
        """s * g(x / s), computed in float32 at least, of the type of `x`; `step` and `beta` broadcast against it."""
        raise NotImplementedError

    def codes_of(self, x: Tensor, step: Tensor, beta: Tensor | None) -> Tensor:
        """Which value of the grid each element of `x` gets, int32; arguments as for `quantize`."""
        raise NotImplementedError

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """Which value of the grid each element of `x` gets under the range that holds now, int32."""
        step, beta = self.current_range()
        step, beta = self.spread(step, x), None if beta is None else self.spread(beta, x)
        if self.top is not None and beta is not None:
            return offset_codes(x, step, beta, self.top)
        return self.codes_of(x, step, beta)

    def spread(self, values: Tensor, x: Tensor) -> Tensor:
        """Values in the shape of `step` such that they broadcast against the tensor `x`: those of groups repeated."""
        size = self.group
        return values if size is None else spread_groups(values, x, self.channel_axis, size)

    @torch.no_grad()
    def set_range(self, step: Tensor, beta: Tensor | None = None) -> None:
        """Set the step, and the offset where there is one; both broadcast to the shape of `self.step`."""
        self.step.copy_(step.reshape(self.step.shape) if step.numel() == self.step.numel() else step)
        if self.beta is not None and beta is not None:
            self.beta.copy_(beta.reshape(self.beta.shape) if beta.numel() == self.beta.numel() else beta)

    @torch.no_grad()
    def set_offset_grid(self, step: Tensor, lower: Tensor, top: int) -> None:
        """Round to lower + step * code, 0 <= code <= top, until a precision is set again.

        Args:
            step: of the shape of `self.step`, or as many elements, or one.
            lower: likewise.
            top: below 2^bits of the precision, which is uniform.

        Raises:
            PrecisionError: the precision cannot have such a grid.
        """
        if self.precision.quantizer != "uniform" or not 0 <= top < 2**self.precision.bits:
            raise PrecisionError(f"{self.precision} has no grid of the codes 0 to {top}: set a uniform precision first")
        self._have_offset_grid(True)
        self.set_range(step, lower)
        assert self.top is not None
        self.top.fill_(top)

    def _have_offset_grid(self, offset_grid: bool) -> None:
        """Have the parameters and buffers of an offset grid, or those of the others."""
        if offset_grid == (self.top is not None):
            return
        self.top = self.gradient_scale.new_zeros(()) if offset_grid else None
        if not (offset_grid or self.offset):
            self.beta = None
        elif self.beta is None:
            self.beta = nn.Parameter(torch.zeros_like(self.step), requires_grad=self.step.requires_grad)

    def _have_groups(self, size: int | None) -> None:
        """Have a step for each group of so many input features; None: for each channel. Those that were there stay."""
        shape = [1] * self.dims
        if self.dims:
            shape[self.channel_axis] = self.channels
        if size is not None:
            shape = [self.channels, group_count(self.elements, size)]
        for name, start in (("step", 1.0), ("beta", 0.0)):
            old = getattr(self, name)
            if old is not None and list(old.shape) != shape:  # None: a kind of a switch, which has the steps
                setattr(self, name, nn.Parameter(torch.full(shape, start).to(old), requires_grad=old.requires_grad))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}step" in state_dict:
            self._have_offset_grid(f"{prefix}top" in state_dict)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def current_range(self) -> tuple[Tensor, Tensor | None]:
        """The step s > 0 and the offset that hold now, with LSQ's gradient scale attached."""
        return _range(self.step, self.beta, self.gradient_scale, self.shared)

    def active(self) -> Quantizer:
        """What brings the grid."""
        return self

    def forward(self, x: Tensor) -> Tensor:
        """The quantized tensor."""
        compiling = torch.compiler.is_compiling()  # somebody compiles the whole model: one graph for all precisions
        if not compiling and self.precision.is_float:
            return x
        grid = self if compiling else self.active()
        size, axis = self.group, self.channel_axis
        step: Tensor = self.step
        beta: Tensor | None = self.beta
        rows = x
        if size is not None:  # a group is to the rest what a channel is
            step, beta = step.view(-1, 1), None if beta is None else beta.view(-1, 1)
            rows, axis = to_groups(x, axis, size), 0
        y = self.run(_quantize, rows, step, beta, self.gradient_scale, self.shared, self.top, owner=grid, axis=axis)
        y = y if size is None else from_groups(y, x, self.channel_axis)
        return torch.where(self.is_float, x, y) if compiling else y

    def extra_repr(self) -> str:
        """The precision, for print(model)."""
        kind = "offset grid" if self.top is not None else "signed" if self.signed else "unsigned"
        return f"{self.precision}, {kind}{', offset' if self.offset else ''}"


def _quantize(
    grid: Quantizer,
    x: Tensor,
    step: Tensor,
    beta: Tensor | None,
    gradient_scale: Tensor,
    shared: Tensor,
    top: Tensor | None,
) -> Tensor:
    step, beta = _range(step, beta, gradient_scale, shared)
    return grid.quantize(x, step, beta) if top is None or beta is None else offset_quantize(x, step, beta, top)


def _range(step: Tensor, beta: Tensor | None, gradient_scale: Tensor, shared: Tensor) -> tuple[Tensor, Tensor | None]:
    if step.dim():
        step = torch.where(shared, _mean(step), step)  # data, like the bits: what holds is read from buffers
        beta = None if beta is None else torch.where(shared, _mean(beta), beta)
    step = scale_gradient(step, gradient_scale).abs().clamp_min(MIN_STEP)
    return step, None if beta is None else scale_gradient(beta, gradient_scale)


def _mean(x: Tensor) -> Tensor:
    """The mean, in float64: of equal values it is that value, to the last bit."""
    return x.double().mean().to(x.dtype)
