"""Ranges against their definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mpsearch.precision import LayerPrecision, Precision
from mpsearch.ptq.flow import Normal
from mpsearch.ptq.ranges import CANDIDATES, cross_entropy_range, min_max_step, normal_range, range_to_grid
from mpsearch.quant.modules import quantized
from mpsearch.quant.ranges import activation_range, weight_step

W4 = Precision("uniform", 4, "channel")
A2 = Precision("uniform", 2, "tensor")


def test_min_max_clips_nothing_and_wastes_nothing() -> None:
    rows = torch.tensor([[0.7, -0.1], [-1.4, 1.0]])
    torch.testing.assert_close(min_max_step(rows, W4), torch.tensor([0.1, 0.2]))
    torch.testing.assert_close(min_max_step(rows, Precision("uniform", 4, "tensor")), torch.tensor([0.2, 0.2]))


def test_a_range_becomes_a_grid_that_holds_zero() -> None:
    step, beta = range_to_grid(-1.0, 2.0, A2)
    assert (float(step), float(beta)) == (1.0, -1.0)
    step, beta = range_to_grid(1.0, 3.0, A2)
    assert (float(step), float(beta)) == (1.0, 0.0)


def test_a_range_without_data_is_six_deviations() -> None:
    x = Normal(torch.tensor([0.0, 3.0]), torch.tensor([1.0, 2.0]))
    step, beta = normal_range(x.clip(0.0), A2)
    assert (float(step), float(beta)) == (5.0, 0.0)
    step, beta = normal_range(x, A2)
    assert (float(step), float(beta)) == (8.0, -9.0)


def test_the_cross_entropy_range_is_the_best_of_all_candidates() -> None:
    torch.manual_seed(0)
    layer = quantized(nn.Linear(8, 4), signed_input=True, input_elements=8)
    x = torch.randn(64, 8)
    x[0, 0] = 20.0  # an outlier that a min-max range would pay for
    answers = F.linear(x, layer.weight, layer.bias).softmax(1)

    def loss(share: float) -> float:
        layer.input_quantizer.set_precision(A2)
        layer.input_quantizer.set_range(*range_to_grid(share * float(x.min()), share * 20.0, A2))
        return float(F.cross_entropy(layer(x), answers))

    losses = [loss(k / CANDIDATES) for k in range(1, CANDIDATES + 1)]
    best = (losses.index(min(losses)) + 1) / CANDIDATES
    step, _ = cross_entropy_range(layer, x, A2)
    assert best < 1
    torch.testing.assert_close(step, range_to_grid(best * float(x.min()), best * 20.0, A2)[0])


@pytest.mark.parametrize("text", ["uniform:8", "uniform:2", "shift:4", "apot:4"])
def test_a_tensor_of_zeros_gets_a_range_of_one(text: str) -> None:
    """B15: a step of 2^-60 would turn all that comes later into 0."""
    precision = LayerPrecision.parse(text, text)
    for signed in (False, True):
        step, _ = activation_range(torch.zeros(100), precision.activation, signed=signed)
        assert 2**-9 < float(step) < 2  # the largest level of APoT is below one
    rows = torch.zeros(3, 8)
    assert float(weight_step(rows, precision.weight).min()) > 2**-9
    rows[1], rows[2] = 0.5, 0.25
    steps = weight_step(rows, precision.weight)
    assert steps[0] in steps[1:]  # a dead channel is taken to be like the others
    assert torch.equal(steps[1:], weight_step(rows[1:], precision.weight))
