"""The uniform quantizer: its gradients against the stated rules, its step, its codes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mpsearch.precision import Precision
from mpsearch.quant.ranges import activation_range, weight_step
from mpsearch.quant.uniform import UniformQuantizer, code_range, fake_quantize, grid_shift

BITS = range(1, 9)


def weights(rows: int = 4, columns: int = 256, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.logspace(-2, 1, rows)[:, None]


def weight_quantizer(w: Tensor, bits: int, granularity: str = "channel") -> UniformQuantizer:
    quantizer = UniformQuantizer(w.shape[0], w.dim(), signed=True, offset=False, elements=w[0].numel())
    precision = Precision("uniform", bits, granularity)  # type: ignore[arg-type]
    quantizer.set_precision(precision)
    quantizer.set_range(weight_step(w, precision))
    return quantizer


def activation_quantizer(x: Tensor, bits: int, signed: bool) -> UniformQuantizer:
    quantizer = UniformQuantizer(1, 0, signed=False, offset=signed, elements=x[0].numel())
    precision = Precision("uniform", bits, "tensor")
    quantizer.set_precision(precision)
    quantizer.set_range(*activation_range(x, precision, signed=signed))
    return quantizer


def quantizers(bits: int) -> list[tuple[str, UniformQuantizer, Tensor]]:
    w = weights()
    return [
        ("channel", weight_quantizer(w, bits), w),
        ("tensor", weight_quantizer(w, bits, "tensor"), w),
        ("unsigned", activation_quantizer(w.relu(), bits, False), w.relu()),
        ("offset", activation_quantizer(w + 0.3, bits, True), w + 0.3),
    ]


def test_quantizer_of_one_bit_weights_is_sign_times_mean_magnitude() -> None:
    w = weights()
    expected = torch.where(w < 0, -1.0, 1.0) * w.abs().mean(dim=1, keepdim=True)
    torch.testing.assert_close(weight_quantizer(w, 1)(w), expected)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_weight_step_is_no_worse_than_a_dense_scan(bits: int) -> None:
    w = weights()
    low, high = code_range(bits, signed=True)
    step = weight_step(w, Precision("uniform", bits, "channel"))
    found = (fake_quantize(w, step[:, None], torch.tensor(0.0), torch.tensor(low), torch.tensor(high)) - w).square()
    for row in range(len(w)):
        best = min(
            (torch.clamp(torch.round(w[row] / s), low, high) * s - w[row]).square().sum()
            for s in torch.linspace(1e-4, 1, 2000) * (w[row].abs().max() / -low)
        )
        assert found[row].sum() <= best * 1.01


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_gradients_equal_the_rules_of_lsq(bits: int, signed: bool) -> None:
    """LSQ, eq. 3: dy/ds is n or p (shifted) where clamped, round(v) - v inside; dy/dx is 1 inside, else 0."""
    low, high = code_range(bits, signed)
    o = grid_shift(bits, signed)
    x = torch.linspace(-3, 3, 101, dtype=torch.float64, requires_grad=True)
    step = torch.tensor(0.37, dtype=torch.float64, requires_grad=True)
    upstream = torch.linspace(0.5, 1.5, 101, dtype=torch.float64)
    as_tensor = [torch.tensor(float(v), dtype=torch.float64) for v in (o, low, high)]
    fake_quantize(x, step, *as_tensor).backward(upstream)

    v = (x / step).detach() - o
    inside = (v.round() >= low) & (v.round() <= high)
    per_element = torch.where(inside, v.round() - v, torch.where(v < low, low + o, high + o))
    torch.testing.assert_close(x.grad, inside * upstream)
    torch.testing.assert_close(step.grad, (per_element * upstream).sum())


def test_offset_gradient_is_one_where_clamped_and_zero_inside() -> None:
    """LSQ+, eq. 6, for a grid whose zero stays exact: only clamped values move with the offset."""
    quantizer = UniformQuantizer(1, 0, signed=False, offset=True, elements=1).double()
    quantizer.set_precision(Precision("uniform", 2, "tensor"))
    quantizer.gradient_scale.fill_(1)
    quantizer.set_range(torch.tensor(0.5), torch.tensor(-0.5))  # levels -0.5 0 0.5 1
    for value, expected in ((-3.0, 1.0), (0.2, 0.0), (3.0, 1.0)):
        quantizer.zero_grad()
        quantizer(torch.tensor([value], dtype=torch.float64)).sum().backward()
        assert quantizer.beta is not None
        assert quantizer.beta.grad is not None
        assert quantizer.beta.grad.item() == pytest.approx(expected)


def test_a_shared_step_gets_the_sum_of_the_gradients() -> None:
    w = weights()
    shared, alone = (
        weight_quantizer(w, 3, "tensor"),
        UniformQuantizer(1, 2, signed=True, offset=False, elements=w.numel()),
    )
    alone.set_precision(Precision("uniform", 3, "channel"))
    alone.set_range(shared.step[:1, :1].detach())
    for quantizer in (shared, alone):
        quantizer(w).square().sum().backward()
    assert alone.step.grad is not None
    assert shared.step.grad is not None
    # SGD moves every entry by the gradient that a single step would have got.
    torch.testing.assert_close(shared.step.grad, alone.step.grad.expand(4, 1))


def test_codes_are_integers_that_rebuild_the_output() -> None:
    for bits in BITS:
        for name, quantizer, x in quantizers(bits):
            low, high = code_range(bits, quantizer.signed)
            codes = quantizer.codes(x)
            assert low <= int(codes.min()), name
            assert int(codes.max()) <= high, name
            step, shift = quantizer.grid()
            torch.testing.assert_close(step * (codes + shift), quantizer(x))
