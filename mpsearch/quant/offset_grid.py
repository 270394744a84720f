"""The offset grid: a uniform grid that begins at any real value, and may end before its bits do.

    q(x) = l + s * clamp(round((x - l) / s), 0, t)

`l` is the lower end, `s` the step and `t` the top code, at most 2^b - 1 of b bits. The uniform grid is the special case
whose lower end is a whole number of steps (half a step off for binary weights) and whose top is 2^b - 1; zero lies on
it. On an offset grid zero need not lie, so no integer zero point stands for `l`: a format either adds `l` as a real
number, or cannot hold the grid.

It is the grid of GDNSQ (arXiv 2508.14004), whose weights begin at min(w) of each channel and whose activations learn
both ends. Rounding is straight-through, so the gradients are those of LSQ+ (arXiv 2004.09576).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpsearch.quant.rounding import round_ste


def offset_quantize(x: Tensor, step: Tensor, lower: Tensor, top: Tensor) -> Tensor:
    """The formula at the module's top, in float32 at least, of the type of `x`; the others broadcast against `x`."""
    code = torch.clamp(round_ste(_in_steps(x, step, lower)), torch.zeros_like(top), top)
    return (step * code + lower).to(x.dtype)


def offset_codes(x: Tensor, step: Tensor, lower: Tensor, top: Tensor) -> Tensor:
    """The code of each element of `x`, int32, 0 to `top`; arguments as for `offset_quantize`."""
    return torch.clamp(torch.round(_in_steps(x, step, lower)), torch.zeros_like(top), top).to(torch.int32)


def _in_steps(x: Tensor, step: Tensor, lower: Tensor) -> Tensor:
    return (x.to(torch.promote_types(x.dtype, torch.float32)) - lower) / step
