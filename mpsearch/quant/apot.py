"""The APoT quantizer (additive powers of two, https://arxiv.org/abs/1909.13144), 2 to 5 bits.

    q(x) = s * sgn(v) * (p_1 + ... + p_k),   p_i in {0, 2^e : e among the exponents of term i}

The sums are the paper's levels, eq. 4; the sign is shared by the terms. Where the paper multiplies by a clipping
threshold alpha and scales the levels to a maximum of 1, we keep the sums as they are, exact in binary, and learn
s = alpha / (the largest sum). The gradient is straight-through to the nearest level, as there; weight normalization
before quantization, which is part of the paper's training, is left out.
"""

from __future__ import annotations

from mpsearch.quant.nearest import LevelQuantizer


class ApotQuantizer(LevelQuantizer):
    """One tensor's APoT quantizer: learnable `step`, precision in buffers."""

    quantizer = "apot"
