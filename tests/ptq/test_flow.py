"""What is said of distributions without data agrees with what data shows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mpsearch.ptq.flow import Normal, trace


@pytest.mark.parametrize(("low", "high"), [(0.0, math.inf), (0.0, 6.0), (-math.inf, math.inf), (-math.inf, 1.0)])
def test_moments_of_a_clipped_normal_agree_with_samples(low: float, high: float) -> None:
    mean, std = torch.tensor([-3.0, -0.5, 0.0, 2.0, 5.0]), torch.tensor([1.0, 2.0, 0.5, 3.0, 1e-3])
    z = torch.randn(400_000, 1, generator=torch.Generator().manual_seed(0))
    samples = (mean + std * z).clamp(low, high)
    expected, variance = Normal(mean, std).clip(low, high).moments()
    torch.testing.assert_close(expected, samples.mean(0), rtol=0.01, atol=0.01)
    torch.testing.assert_close(variance, samples.var(0), rtol=0.02, atol=0.01)


def test_a_rectified_standard_normal_has_mean_one_over_root_two_pi() -> None:
    expected, variance = Normal(torch.zeros(1), torch.ones(1)).clip(0.0).moments()
    assert float(expected) == pytest.approx(1 / math.sqrt(2 * math.pi), rel=1e-6)
    assert float(variance) == pytest.approx(0.5 - 1 / (2 * math.pi), rel=1e-6)


def test_the_extent_is_six_deviations_within_the_clipping() -> None:
    x = Normal(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0]))
    assert x.extent() == (-11.0, 13.0)
    assert x.clip(0.0, 6.0).extent() == (0.0, 6.0)


def test_inputs_follow_through_sums_pools_and_layers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 3, 1), nn.Linear(3, 2)
            self.relu = nn.ReLU()

        def forward(self, x):
            y = self.relu(self.a(x))
            return self.c(self.b(y + x).mean(dim=(2, 3)))

    torch.manual_seed(0)
    net = Net()
    flow = trace(net)
    assert flow is not None
    a = Normal(torch.tensor([1.0, -1.0]), torch.tensor([1.0, 2.0]))
    inputs = flow.input_distributions({"a": a}, (0.0, 1.0))
    assert set(inputs) == {"a", "b", "c"}
    mean, var = a.clip(0.0).moments()
    torch.testing.assert_close(inputs["b"].mean, mean)
    torch.testing.assert_close(inputs["b"].std, (var + 1).sqrt())
    matrix = net.b.weight.detach().flatten(1)
    torch.testing.assert_close(inputs["c"].mean, matrix @ mean + net.b.bias.detach())
    torch.testing.assert_close(inputs["c"].std, (matrix.square() @ (var + 1)).sqrt())


def test_what_is_not_understood_is_left_out() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Softplus(), nn.Linear(3, 3))
    flow = trace(net)
    assert flow is not None
    assert set(flow.input_distributions({}, (0.0, 1.0))) == {"0"}
    assert set(flow.input_distributions({})) == set()
