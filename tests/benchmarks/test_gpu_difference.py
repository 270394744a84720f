"""What `benchmarks gpu` compares of a quantizer on two devices; here the CPU stands in for the card."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import gpu
from benchmarks.gpu import FORWARD_GOAL, GRADIENT_GOAL, HALFWAY, difference
from mpsearch.precision import BITS, Precision
from mpsearch.quant.quantizer import Quantizer

CPU = torch.device("cpu")
WIDTHS = [(quantizer, bits) for quantizer in ("uniform", "shift", "apot") for bits in BITS[quantizer] if bits > 1]


@pytest.mark.parametrize(("quantizer", "bits"), WIDTHS)
@pytest.mark.parametrize("weight", [True, False], ids=["weight", "input"])
@pytest.mark.parametrize(
    ("spoil", "passes"),
    [
        (lambda g: g * (1 + 1e-6), True),
        (lambda g: g + 1e-8, True),  # of a gradient that is zero, too: that of an offset where nothing is clipped
        (lambda g: -g, False),
        (lambda g: torch.full_like(g, torch.nan), False),
    ],
    ids=["rounding", "not-zero", "sign", "nan"],
)
def test_gradient_of_a_step_is_compared_at_every_width(
    quantizer: str,
    bits: int,
    weight: bool,
    spoil: Callable[[Tensor], Tensor],
    passes: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(made: Quantizer) -> Quantizer:
        made.step.register_hook(spoil)
        if made.beta is not None and passes:
            made.beta.register_hook(spoil)
        return made

    monkeypatch.setattr(gpu, "fuse", wrong)
    precision = Precision(quantizer, bits, "channel" if weight else "tensor")  # type: ignore[arg-type]
    found = difference(precision, weight, CPU, compiled=True)
    assert found.forward <= FORWARD_GOAL
    assert found.moved <= HALFWAY
    assert (found.gradient <= GRADIENT_GOAL) == passes
