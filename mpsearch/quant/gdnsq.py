"""The GDNSQ quantizer (arXiv 2508.14004): rounding as additive noise, with step, range and thus bit-width learnable.

    v = (c - z) / s,   n = round(v) - v,   y = s (v + n) + z = c + s n

| tensor                 | c                       | z             | b, the bit-width            |
|------------------------|-------------------------|---------------|-----------------------------|
| weight, grid "min"     | w                       | min(w)        | log2((max(w) - min(w))/s + 1) |
| weight, "symmetric"    | clamp to [l, l + Q - s] | s o           | log2(Q / s)                 |
| activation             | clamp to [b0, b0 + Q - s] | b0          | log2(Q / s)                 |

s = 2^log_s, Q = 2^log_q. "min" is the paper's grid for weights. "symmetric" is ours, l = s o - Q/2 with the grid shift
o = 0 from 2 bits up and 1/2 at 1 bit (a straight line between): at a whole number of bits it is exactly the uniform
quantizer of `quant/uniform.py`, so that what was trained is what is priced, searched and exported. Unsigned
activations keep b0 = 0. Once the bit-width is held (`hold`), b0 is a fixed whole number of steps, as the zero point of
a uniform quantizer is: rounded afterwards it would move the one threshold that 1 bit has, and one that learns comes to
rest where rounding goes either way.

Backward. dn/dv is 0 (straight-through), or what EWGS (arXiv 2104.00903) or its adaptive form put there; the noise
itself makes the gradient of the step, dy/ds:

| gradient   | dy/ds                                                                        |
|------------|------------------------------------------------------------------------------|
| "noise"    | r / sqrt(3), r = +-1/2 at random: the deviation 1/(2 sqrt 3) of rounding noise |
| "residual" | n, what the chain rule gives (LSQ, arXiv 1902.08153)                         |
| "both"     | their sum                                                                    |
| "mhaq_ste" | n + s r / sqrt(3), what the published code does (aifoundry-org/MHAQ, STE)    |
| "mhaq_lsq" | n + s n, its rule LSQ                                                        |

A weight of the symmetric grid that is clamped has no gradient, but for one that is held at 1 bit: between its two
levels, +-mean|w|, lie little more than half of the weights, and the others could never change their sign.

The published code takes r / sqrt(3), or n, for dn/ds; by y = s (v + n) + z that makes s r / sqrt(3), or s n, of dy/ds,
beside the n that the chain rule through v and s adds. In "noise" the noise term is dy/ds itself, as the noise model
y = x + s n has it.

A quantizer of grid "min", or an activation, rounds to an offset grid (`offset_grid.py`), whatever its bit-width:
`offset_grid` reads it off.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mpsearch.quant.fused import Elementwise
from mpsearch.quant.groups import from_groups, to_groups
from mpsearch.quant.quantizer import MIN_STEP

StepGradient = Literal["noise", "residual", "both", "mhaq_ste", "mhaq_lsq"]
RoundGradient = Literal["ste", "ewgs", "aewgs"]
WeightGrid = Literal["symmetric", "min"]

EWGS_DELTA = 1e-2
AEWGS_GAP = 0.01  # the adaptive factor is kept this far below 1, where the gradient would vanish
AEWGS_MIN_VARIANCE = 1e-3


class _NoisyRound(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, c: Tensor, s: Tensor, z: Tensor, step_gradient: StepGradient, round_gradient: RoundGradient
    ) -> Tensor:
        v = (c - z) / s
        q = torch.round(v)
        ctx.save_for_backward(v, s, z)
        ctx.rules = step_gradient, round_gradient
        return s * q + z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        v, s, z = ctx.saved_tensors
        step_gradient, round_gradient = ctx.rules
        g = grads[0]
        n = torch.round(v) - v
        noise = _step_gradient(n, s, step_gradient)
        if round_gradient == "ste":
            return g, (g * noise).sum_to_size(s.shape), torch.zeros_like(z), None, None
        h = _through_noise(g, n, s, round_gradient)  # g dn/dv
        return g + h, (g * noise - h * v).sum_to_size(s.shape), (-h).sum_to_size(z.shape), None, None


def _step_gradient(n: Tensor, s: Tensor, rule: StepGradient) -> Tensor:
    """dy/ds of the table at the module's top."""
    if rule == "residual":
        return n
    if rule == "mhaq_lsq":
        return n * (1 + s)
    random = (torch.rand_like(n) < 0.5).to(n.dtype).sub(0.5) / math.sqrt(3)
    return {"noise": random, "both": n + random, "mhaq_ste": n + s * random}[rule]


def _through_noise(g: Tensor, n: Tensor, s: Tensor, rule: RoundGradient) -> Tensor:
    """g dn/dv of an element-wise gradient scaling rule; the adaptive one takes its means over what shares a step."""
    if rule == "ewgs":
        return -EWGS_DELTA * g.abs() * n
    pull = g.sign() * n
    shape, share = s.shape, s.numel() / n.numel()

    def mean(x: Tensor) -> Tensor:
        return x.sum_to_size(shape) * share

    variance = (mean(n.square()) - mean(n).square()).clamp_min(AEWGS_MIN_VARIANCE)
    return -g * (mean(pull) / variance * pull).clamp_max(1 - AEWGS_GAP)


def noisy_round(
    c: Tensor,
    s: Tensor,
    z: Tensor,
    step_gradient: StepGradient = "residual",
    round_gradient: RoundGradient = "ste",
) -> Tensor:
    """s round((c - z) / s) + z, with the gradients of the module's top.

    Args:
        c: any shape, clamped already.
        s: the step > 0, broadcasts against `c`.
        z: the value of code zero, broadcasts against `c`.
        step_gradient: what dy/ds is.
        round_gradient: what dn/dv is.
    """
    y: Tensor = _NoisyRound.apply(c, s, z, step_gradient, round_gradient)  # type: ignore[no-untyped-call]
    return y


def clamp_and_round(
    rules: tuple[StepGradient, RoundGradient, bool],
    x: Tensor,
    s: Tensor,
    z: Tensor,
    low: Tensor | None,
    high: Tensor | None,
) -> Tensor:
    """`noisy_round` of `x` clamped to [low, high] (None: not clamped), in float32 at least, of the type of `x`.

    The last of the rules says whether what is clamped has its gradient all the same.
    """
    step_gradient, round_gradient, through_clamp = rules
    c = x.to(torch.promote_types(x.dtype, torch.float32))
    if low is not None and high is not None:
        free, clamped = c, c.detach() if through_clamp else c
        c = torch.maximum(torch.minimum(clamped, high), low)
        if through_clamp:
            c = c + (free - clamped)  # a zero, which carries the gradient
    return noisy_round(c, s, z, step_gradient, round_gradient).to(x.dtype)


class GdnsqQuantizer(Elementwise):
    """One tensor's quantizer with a learnable bit-width.

    Args:
        step: `(channels, 1, ..., 1)` or (): the first step; `(channels * groups, 1)` with groups.
        levels: how many levels the range has at first, 2^b; broadcasts against `step`.
        beta: the lower end b0 of an activation that takes negative values, shape (); None: 0, or a weight.
        weight_grid: how a weight is quantized; None: an activation.
        step_gradient: what dy/ds is.
        round_gradient: what dn/dv is.
        group: input features of a weight that share a step; not for grid "min".
        axis: of a weight's channels, for its groups.
    """

    log_q: nn.Parameter | None
    beta: nn.Parameter | None
    held: Tensor  # the bit-width that is held, whatever log_q; NaN: none is
    zero: Tensor  # the lower end of an activation in steps while a bit-width is held, a whole number

    def __init__(
        self,
        step: Tensor,
        levels: Tensor,
        *,
        beta: Tensor | None = None,
        weight_grid: WeightGrid | None = None,
        step_gradient: StepGradient = "residual",
        round_gradient: RoundGradient = "ste",
        group: int | None = None,
        axis: int = 0,
    ) -> None:
        super().__init__()
        self.group, self.axis = group, axis
        self.weight_grid = weight_grid
        self.step_gradient: StepGradient = step_gradient
        self.round_gradient: RoundGradient = round_gradient
        log_s = torch.log2(step.detach().clamp_min(MIN_STEP))
        self.log_s = nn.Parameter(log_s.clone())
        self.register_parameter(
            "log_q", None if weight_grid == "min" else nn.Parameter(log_s + torch.log2(levels.detach()))
        )
        self.register_parameter("beta", None if beta is None else nn.Parameter(beta.detach().clone()))
        self.register_buffer("held", torch.tensor(math.nan), persistent=False)
        self.register_buffer("zero", torch.tensor(0.0), persistent=False)
        self.binary = False  # a weight that is held at 1 bit: what is clamped goes on learning

    @torch.no_grad()
    def hold(self, bits: float) -> None:
        """From now on the bit-width is `bits`, whatever was learned; the step stays learnable. Not for grid "min".

        An activation's lower end is then the nearest whole number of steps, and as many whatever the step becomes.
        """
        if self.log_q is not None:
            if (lower := self.lower_end()) is not None:
                self.zero.copy_(torch.round(lower / torch.exp2(self.log_s)))
            self.held.fill_(bits)
            self.binary = self.weight_grid is not None and bits <= 1
            self.log_q.copy_(self.log_s + bits)

    def bits(self, x: Tensor | None = None, moves_range: bool = False) -> Tensor:
        """The bit-width b of the shape of the step; grid "min" needs the weight `x`.

        Where there is a range, the gradient of b moves the step alone, unless it `moves_range` too. A penalty that
        dominates the loss, under an optimizer that takes the size out of gradients, would draw in the range as fast as
        it widens the step; what is clipped learns nothing.
        """
        if self.weight_grid == "min":
            assert x is not None
            low, high = self._ends(x)
            return torch.log2((high - low) / torch.exp2(self.log_s) + 1)
        log_range = self.log_range()
        return (log_range if moves_range else log_range.detach()) - self.log_s

    def log_range(self) -> Tensor:
        """log2 Q now: as learned, or what the held bit-width makes of the step. Not for grid "min"."""
        assert self.log_q is not None
        return torch.where(self.held.isnan(), self.log_q, self.log_s + self.held)

    def lower_end(self) -> Tensor | None:
        """b0 of an activation that takes negative values now: as learned, or a whole number of steps; else None."""
        return (
            None if self.beta is None else torch.where(self.held.isnan(), self.beta, torch.exp2(self.log_s) * self.zero)
        )

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """s, z and the clamping bounds that hold now."""
        s = torch.exp2(self.log_s)
        if self.weight_grid == "min":
            low, high = self._ends(x)
            return s, low, low, high
        q = torch.exp2(self.log_range())
        if self.weight_grid == "symmetric":
            z = s * grid_shift(self.bits())
            return s, z, z - q / 2, z + q / 2 - s
        lower = self.lower_end()
        low = torch.zeros_like(s) if lower is None else lower
        return s, low, low, low + q - s

    def forward(self, x: Tensor) -> Tensor:
        """The quantized tensor, of the type of `x`; computed in float32 at least."""
        s, z, low, high = self.grid(x)
        ends = (None, None) if self.weight_grid == "min" else (low, torch.maximum(high, low))
        rules = self.step_gradient, self.round_gradient, self.binary
        if self.group is None:
            return self.run(clamp_and_round, x, s, z, *ends, owner=rules, axis=self.axis)
        rows = to_groups(x, self.axis, self.group)  # a group is what a channel is otherwise
        return from_groups(self.run(clamp_and_round, rows, s, z, *ends, owner=rules), x, self.axis)

    @torch.no_grad()
    def true_bits(self, x: Tensor | None = None) -> float:
        """log2(qmax - qmin + 1) over the integer codes of the channel that has most.

        Of the codes that a weight `x` takes, or of those that the clamp allows.
        """
        s = torch.exp2(self.log_s)
        if x is None:
            _, z, low, high = self.grid(s)
            codes_low, codes_high = torch.round((low - z) / s), torch.round((high - z) / s)
        else:
            x = x if self.group is None else to_groups(x, self.axis, self.group)
            s, z, low, high = self.grid(x)
            codes = torch.round((torch.maximum(torch.minimum(x, torch.maximum(high, low)), low) - z) / s)
            codes_low, codes_high = self._ends(codes)
        return float(torch.log2(codes_high - codes_low + 1).max())

    @torch.no_grad()
    def offset_grid(self, x: Tensor | None = None) -> tuple[Tensor, Tensor, int]:
        """The step, the lower end and the top code of the offset grid that the quantizer rounds to now.

        Args:
            x: the weight, whose channel of most codes gives the top; None: an activation, which ends where it is
                clamped.

        Raises:
            ValueError: it is a weight of the symmetric grid, which is no offset grid.
        """
        if self.weight_grid == "symmetric":
            raise ValueError("the symmetric grid is that of a uniform quantizer: it has no lower end")
        s, z, _, high = self.grid(self.log_s if x is None else x)
        top = torch.round((high - z) / s if x is None else (x - z) / s).max()
        return s, z, max(0, int(top))

    def _ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest and the largest of what shares a step, of the shape of the step."""
        if self.log_s.dim() == 0:
            return x.amin(), x.amax()
        axes = [axis for axis, size in enumerate(self.log_s.shape) if size == 1]
        return x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)

    def extra_repr(self) -> str:
        """The kind of tensor and its gradients, for print(model)."""
        return f"{self.weight_grid or 'activation'}, {self.step_gradient}, {self.round_gradient}"


def grid_shift(bits: Tensor) -> Tensor:
    """The shift o of the symmetric grid in steps: 1/2 at 1 bit, 0 from 2 bits up."""
    return (2 - bits).clamp(0, 1) / 2
