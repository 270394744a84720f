"""The quantizer with learned input thresholds, which only its benchmark has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.learned_thresholds import NonuniformQuantizer
from mpsearch.precision import Precision
from mpsearch.quant.uniform import UniformQuantizer

pytestmark = pytest.mark.unit

STEP = 0.37


def pair(bits: int) -> tuple[UniformQuantizer, NonuniformQuantizer]:
    uniform = UniformQuantizer(1, 0, signed=False, offset=False, elements=100)
    nonuniform = NonuniformQuantizer(uniform)
    for quantizer in (uniform, nonuniform):
        quantizer.set_precision(Precision("uniform", bits, "tensor"))
        quantizer.set_range(torch.tensor(STEP))
    return uniform, nonuniform


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4000, generator=generator).relu() * 1.5, torch.randn(4000, generator=generator)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_nonuniform_begins_at_the_uniform_quantizer_in_value_and_gradient(bits: int) -> None:
    x, direction = inputs()
    answers = []
    for quantizer in pair(bits):
        leaf = x.clone().requires_grad_()
        y = quantizer(leaf)
        (y * direction).sum().backward()
        answers.append((y, leaf.grad, quantizer.step.grad))
    (y, x_gradient, step_gradient), (other_y, other_x_gradient, other_step_gradient) = answers
    assert torch.equal(other_y, y)
    assert torch.equal(other_x_gradient[x > 0], x_gradient[x > 0])
    assert float(other_step_gradient) == pytest.approx(float(step_gradient), rel=1e-4)


def test_nonuniform_rounds_at_its_thresholds_to_uniform_levels() -> None:
    _, quantizer = pair(2)
    with torch.no_grad():
        quantizer.widths.copy_(torch.tensor([0.5, 2.0, 1.0]))
        quantizer.start.fill_(0.25)
    assert quantizer.thresholds() == [0.5, 1.75, 3.25]
    x = STEP * torch.tensor([0.0, 0.49, 0.51, 1.74, 1.76, 3.24, 3.26, 9.0])
    assert torch.equal(quantizer(x), STEP * torch.tensor([0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0]))


def test_nonuniform_moves_its_ends_by_the_gradient_of_the_expectation() -> None:
    _, quantizer = pair(3)
    x, direction = inputs()
    generator = torch.Generator().manual_seed(1)
    widths, start = 0.5 + torch.rand(7, generator=generator), 0.2

    def expectation(widths: Tensor, start: float) -> float:
        """Rounding up as often as an input is far along between its two ends; by interpolation, not by clamps."""
        ends = torch.cat([torch.tensor([start]), start + widths.cumsum(0)]).double()
        above = (x.double() / STEP).clamp(ends[0], ends[-1] + widths[-1] / 2)  # the last line goes on for half a width
        low = (torch.bucketize(above, ends) - 1).clamp(0, 6)
        return float((STEP * (low + (above - ends[low]) / (ends[low + 1] - ends[low])) * direction).sum())

    with torch.no_grad():
        quantizer.widths.copy_(widths)
        quantizer.start.fill_(start)
    (quantizer(x) * direction).sum().backward()
    small = 2.0**-10
    for k in range(7):
        nudge = small * torch.nn.functional.one_hot(torch.tensor(k), 7)
        slope = (expectation(widths + nudge, start) - expectation(widths - nudge, start)) / (2 * small)
        assert float(quantizer.widths.grad[k]) == pytest.approx(slope, rel=2e-2, abs=1e-2)
    slope = (expectation(widths, start + small) - expectation(widths, start - small)) / (2 * small)
    assert float(quantizer.start.grad) == pytest.approx(slope, rel=2e-2, abs=1e-2)


def test_nonuniform_refuses_an_input_with_an_offset() -> None:
    with pytest.raises(ValueError, match="offset"):
        NonuniformQuantizer(UniformQuantizer(1, 0, signed=False, offset=True, elements=100))
