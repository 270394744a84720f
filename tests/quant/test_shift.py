"""The shift quantizer: its soft phase against an independent computation, and integer arithmetic by shifts alone."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from mpsearch.errors import PrecisionError
from mpsearch.precision import LayerPrecision, Offer, Precision
from mpsearch.quant.levels import apot_terms, shift_magnitudes
from mpsearch.quant.modules import quantized
from mpsearch.quant.nearest import LevelQuantizer, midpoints, nearest_level
from mpsearch.quant.shift import ShiftQuantizer, SlopeSchedule, set_slope, sigmoid_levels, soft_phase, tanh_levels


def levels_of(bits: int, signed: bool = True) -> Tensor:
    return torch.tensor(shift_magnitudes(bits, signed), dtype=torch.float64)


def shift_quantizer(bits: int, slope: float, step: float = 0.8) -> ShiftQuantizer:
    quantizer = ShiftQuantizer(1, 2, signed=True, offset=False, elements=1).double()
    quantizer.set_precision(Precision("shift", bits, "channel"))
    quantizer.set_range(torch.tensor(step))
    quantizer.gradient_scale.fill_(1)
    set_slope([quantizer], slope)
    return quantizer


def soft_by_hand(v: float, levels: list[float], slope: float) -> tuple[float, float]:
    """The sum of sigmoids and its derivative, one number at a time."""
    value = derivative = 0.0
    for low, high in itertools.pairwise(levels):
        for tau in ((low + high) / 2, -(low + high) / 2):
            z = slope / (high - low) * (v - tau)
            sigmoid = 1 / (1 + math.exp(-z)) if z > -700 else 0.0
            value += (high - low) * (sigmoid - 0.5)
            derivative += slope * sigmoid * (1 - sigmoid)
    return value, derivative


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("slope", [4.0, 32.0])
def test_soft_levels_and_their_derivative_equal_the_formula(bits: int, slope: float) -> None:
    levels = levels_of(bits)
    v = torch.linspace(-1.4, 1.4, 57, dtype=torch.float64, requires_grad=True)
    soft = sigmoid_levels(v, levels, torch.tensor(slope, dtype=torch.float64))
    (derivative,) = torch.autograd.grad(soft.sum(), v)
    expected = [soft_by_hand(x, levels.tolist(), slope) for x in v.tolist()]
    torch.testing.assert_close(soft, torch.tensor([value for value, _ in expected], dtype=torch.float64))
    torch.testing.assert_close(derivative, torch.tensor([slope_ for _, slope_ in expected], dtype=torch.float64))


@pytest.mark.parametrize("bits", [2, 3])
def test_soft_quantizer_has_exact_gradients_in_input_and_step(bits: int) -> None:
    quantizer = shift_quantizer(bits, slope=6.0)
    x = torch.linspace(-1.3, 1.3, 12, dtype=torch.float64).reshape(1, -1).requires_grad_()
    step = quantizer.step.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, step: quantizer.quantize(x, step, None), (x, step))


def test_soft_quantizer_tends_to_the_hard_one_and_its_weights_freeze() -> None:
    quantizer = shift_quantizer(4, slope=4).float()
    w = torch.randn(1, 4096, generator=torch.Generator().manual_seed(0)) * 0.3
    phases = []
    for slope in (4, 16, 64, 128, 200):
        set_slope([quantizer], slope)
        phases.append(soft_phase(quantizer, w))
    gaps, live = [phase.gap for phase in phases], [phase.live for phase in phases]
    assert gaps == sorted(gaps, reverse=True)
    assert live == sorted(live, reverse=True)
    assert live[0] > 0.9
    assert gaps[-1] < 0.06
    assert live[-1] < 0.3


def test_training_is_soft_and_scoring_is_hard() -> None:
    quantizer = shift_quantizer(3, slope=8.0, step=0.5)
    w = torch.linspace(-0.6, 0.6, 101, dtype=torch.float64).reshape(1, -1)
    levels = levels_of(3)
    hard = 0.5 * nearest_level(w / 0.5, levels, midpoints(levels))
    assert torch.equal(quantizer.eval()(w), hard)
    assert len(quantizer.train()(w).unique()) == 101
    for gradient in ("ste", "dsq"):
        quantizer.gradient = gradient  # type: ignore[assignment]
        assert torch.equal(quantizer(w), hard)


def test_straight_through_gradients_are_those_of_lsq_on_levels() -> None:
    quantizer = shift_quantizer(3, slope=8.0, step=0.5)
    quantizer.gradient = "ste"
    w = torch.linspace(-0.9, 0.9, 37, dtype=torch.float64).reshape(1, -1).requires_grad_()
    quantizer(w).sum().backward()
    v = (w / 0.5).detach()
    inside = v.abs() <= 1
    torch.testing.assert_close(w.grad, inside.double())
    level = quantizer(w).detach() / 0.5
    assert quantizer.step.grad is not None
    torch.testing.assert_close(quantizer.step.grad.sum(), torch.where(inside, level - v, v.sign()).sum())


def test_dsq_differentiates_a_tanh_that_meets_the_levels() -> None:
    levels, slope = levels_of(3), torch.tensor(8.0, dtype=torch.float64)
    torch.testing.assert_close(tanh_levels(levels, levels, slope), levels)
    v = torch.tensor([-0.9, -0.3, 0.0, 0.11, 0.6], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: tanh_levels(v, levels, slope), (v[[0, 1, 3, 4]],))
    quantizer = shift_quantizer(3, slope=8.0, step=1.0)
    quantizer.gradient = "dsq"
    (through,) = torch.autograd.grad(quantizer(v.reshape(1, -1)).sum(), v)
    (soft,) = torch.autograd.grad(tanh_levels(v, levels, slope).sum(), v)
    torch.testing.assert_close(through, soft)
    assert soft[2] > 0


def test_slope_grows_by_the_same_factor_each_step() -> None:
    slopes = [SlopeSchedule(2, 50).at(step / 10) for step in range(11)]
    assert slopes[0] == 2
    assert slopes[-1] == pytest.approx(50)
    assert all(b / a == pytest.approx(25**0.1) for a, b in itertools.pairwise(slopes))


def integer_layer(name: str, bits: int) -> tuple[nn.Module, Tensor]:
    """A linear layer with 4-bit uniform input codes; scales are powers of two, so that float arithmetic is exact."""
    torch.manual_seed(bits)
    offer = Offer(frozenset({name}), frozenset({"uniform"}))  # type: ignore[arg-type]
    layer = quantized(nn.Linear(16, 6, bias=False), signed_input=False, input_elements=16, offer=offer).eval()
    precision = Precision(name, bits, "channel")  # type: ignore[arg-type]
    layer.set_precision(LayerPrecision(precision, Precision("uniform", 4, "tensor")))  # type: ignore[operator]
    layer.weight_quantizer.set_range(2.0 ** -torch.arange(1, 7))  # type: ignore[operator, union-attr]
    layer.input_quantizer.set_range(torch.tensor(0.25))  # type: ignore[operator, union-attr]
    return layer, torch.rand(32, 16, generator=torch.Generator().manual_seed(1)) * 5


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("name", ["shift", "apot"])
def test_integer_arithmetic_by_shifts_and_adds_equals_the_float_forward(name: str, bits: int) -> None:
    layer, x = integer_layer(name, bits)
    weight_quantizer = layer.weight_quantizer
    assert isinstance(weight_quantizer, LevelQuantizer)
    inputs = layer.input_quantizer.codes(x)  # type: ignore[operator, union-attr]
    codes = weight_quantizer.codes(layer.weight)  # type: ignore[arg-type]
    terms = [shift_terms(bits)] if name == "shift" else apot_terms(bits, signed=True)
    least = min(itertools.chain.from_iterable(terms))
    sums = sorted(itertools.product(*[(None, *term) for term in terms]), key=lambda exponents: magnitude(exponents))

    accumulator = torch.zeros(len(x), len(codes), dtype=torch.int32)
    for row, column in itertools.product(range(codes.shape[0]), range(codes.shape[1])):
        code = int(codes[row, column])
        for exponent in sums[abs(code)]:
            if exponent is not None:
                shifted = torch.bitwise_left_shift(inputs[:, column], exponent - least)
                accumulator[:, row] += shifted if code > 0 else -shifted
    assert inputs.dtype == accumulator.dtype == torch.int32
    scale = 0.25 * weight_quantizer.step.detach().flatten() * 2.0**least
    assert torch.equal(accumulator * scale, layer(x))


def shift_terms(bits: int) -> tuple[int, ...]:
    return tuple(int(math.log2(m)) for m in shift_magnitudes(bits, True)[1:])


def magnitude(exponents: tuple[int | None, ...]) -> float:
    return sum(2.0**e for e in exponents if e is not None)


@pytest.mark.parametrize(("start", "end"), [(0, 64), (64, 4), (4, 1000)])
def test_a_slope_that_cannot_be_had_is_refused(start: float, end: float) -> None:
    with pytest.raises(PrecisionError, match="slope"):
        SlopeSchedule(start, end)


def test_the_closed_form_is_the_sum_of_two_sigmoids_an_interval() -> None:
    levels = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    v = torch.linspace(-1.5, 1.5, 31, dtype=torch.float64)
    for slope in (1.0, 8.0, 60.0, 200.0):
        expected = torch.zeros_like(v)
        for low, high in itertools.pairwise(levels):
            t, tau = slope / (high - low), (high + low) / 2
            pair = torch.sigmoid(t * (v - tau)) + torch.sigmoid(t * (v + tau)) - 1
            expected += (high - low) * pair
        torch.testing.assert_close(sigmoid_levels(v, levels, torch.tensor(slope).double()), expected)
