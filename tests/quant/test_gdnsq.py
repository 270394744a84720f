"""GDNSQ's quantizer against the equations at its module's top, computed another way, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mpsearch.precision import Precision
from mpsearch.quant.gdnsq import EWGS_DELTA, GdnsqQuantizer, noisy_round
from mpsearch.quant.uniform import UniformQuantizer


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weight(bits: float, grid: str = "symmetric") -> tuple[GdnsqQuantizer, Tensor]:
    step = torch.tensor([[0.11], [0.07]], dtype=torch.float64)
    quantizer = GdnsqQuantizer(step, torch.tensor(2.0**bits).double(), weight_grid=grid)  # type: ignore[arg-type]
    return quantizer.double(), 0.3 * values(2, 50)


def gradients(step_gradient: str, round_gradient: str = "ste") -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, s, the upstream gradient g, and the gradients of x and s."""
    x = values(3, 40).requires_grad_()
    s = torch.tensor([[0.3], [0.5], [0.9]], dtype=torch.float64, requires_grad=True)
    g = values(3, 40, seed=1)
    y = noisy_round(x, s, torch.tensor(0.1).double(), step_gradient, round_gradient)  # type: ignore[arg-type]
    grad_x, grad_s = torch.autograd.grad(y, (x, s), g)
    return x.detach(), s.detach(), g, grad_x, grad_s


def test_forward_is_the_rounded_code_times_the_step_above_zero_point() -> None:
    x, s, z = values(3, 40), torch.tensor([[0.3], [0.5], [0.9]]).double(), torch.tensor(0.1).double()
    torch.testing.assert_close(noisy_round(x, s, z), torch.round((x - z) / s) * s + z, rtol=0, atol=0)


def test_straight_through_passes_the_gradient_of_the_input() -> None:
    _, _, g, grad_x, _ = gradients("residual")
    assert torch.equal(grad_x, g)


def test_residual_gradient_is_what_autograd_makes_of_constant_noise() -> None:
    x, s, g, _, grad_s = gradients("residual")
    s = s.clone().requires_grad_()
    v = (x - 0.1) / s
    y = s * (v + (torch.round(v) - v).detach()) + 0.1
    torch.testing.assert_close(grad_s, torch.autograd.grad(y, s, g)[0])


def test_noise_gradient_has_the_deviation_of_rounding_noise_and_no_mean() -> None:
    x = torch.zeros(1, 200_000, dtype=torch.float64)
    s = torch.ones(1, 200_000, dtype=torch.float64, requires_grad=True)  # a step for each element: each draw is seen
    torch.manual_seed(0)
    (noise,) = torch.autograd.grad(noisy_round(x, s, torch.zeros(()).double(), "noise").sum(), s)
    assert noise.unique().tolist() == pytest.approx([-0.5 / math.sqrt(3), 0.5 / math.sqrt(3)])
    assert float(noise.std()) == pytest.approx(1 / math.sqrt(12), rel=1e-4)
    assert abs(float(noise.mean())) < 4 / math.sqrt(12 * 200_000)


def test_both_is_the_sum_of_noise_and_residual() -> None:
    parts = {}
    for rule in ("noise", "residual", "both"):
        torch.manual_seed(3)
        parts[rule] = gradients(rule)[-1]
    torch.testing.assert_close(parts["both"], parts["noise"] + parts["residual"])


def draws(n: Tensor, seed: int) -> Tensor:
    """r = +-1/2, as they are drawn after this seed."""
    torch.manual_seed(seed)
    return (torch.rand_like(n) < 0.5).double() - 0.5


@pytest.mark.parametrize("rule", ["mhaq_ste", "mhaq_lsq"])
def test_mhaqs_rules_are_the_stated_formulas(rule: str) -> None:
    torch.manual_seed(5)
    x, s, g, grad_x, grad_s = gradients(rule)
    v = (x - torch.tensor(0.1).double()) / s
    n = torch.round(v) - v
    noise = {"mhaq_ste": n + s * draws(n, 5) / 3**0.5, "mhaq_lsq": n * (1 + s)}[rule]
    torch.testing.assert_close(grad_s, (g * noise).sum(1, keepdim=True), rtol=1e-12, atol=1e-12)
    assert torch.equal(grad_x, g)


@pytest.mark.parametrize("rule", ["mhaq_ste", "mhaq_lsq"])
def test_mhaqs_rules_follow_from_a_noise_whose_derivative_by_the_step_is_set(rule: str) -> None:
    """y = s (v + n) + z with v = (x - z) / s, and dn/ds = r / sqrt(3) or n: the graph that its code builds."""

    class Noise(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, v: Tensor, s: Tensor, derivative: Tensor) -> Tensor:
            ctx.save_for_backward(s, derivative)
            return torch.round(v) - v

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
            s, derivative = ctx.saved_tensors
            return torch.zeros_like(grads[0]), (grads[0] * derivative).sum_to_size(s.shape), None

    quantizer, w = weight(3, "min")
    quantizer.step_gradient = rule  # type: ignore[assignment]
    g = values(2, 50, seed=2)
    torch.manual_seed(9)
    (quantizer(w) * g).sum().backward()
    log_s = quantizer.log_s.detach().clone().requires_grad_()
    s, z = torch.exp2(log_s), w.amin(1, keepdim=True)
    v = (w - z) / s
    n = (torch.round(v) - v).detach()
    derivative = draws(n, 9) / 3**0.5 if rule == "mhaq_ste" else n
    y = s * (v + Noise.apply(v, s, derivative)) + z
    (expected,) = torch.autograd.grad(y, log_s, g)
    assert quantizer.log_s.grad is not None
    torch.testing.assert_close(quantizer.log_s.grad, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bits", [2.0, 3.3, 4.0])
def test_the_offset_grid_that_is_read_off_has_the_same_values(bits: float) -> None:
    precision = Precision("uniform", 4, "channel")
    free, w = weight(bits, "min")
    uniform = UniformQuantizer(2, 2, signed=True, offset=False, elements=50).double()
    uniform.set_precision(precision)
    with torch.no_grad():
        free.log_s += torch.log2((w.amax(1) - w.amin(1)).max() / (2**bits - 1)) - free.log_s.min()
    uniform.set_offset_grid(*free.offset_grid(w))
    torch.testing.assert_close(uniform(w), free(w), rtol=0, atol=0)
    activation = GdnsqQuantizer(
        torch.tensor(0.2).double(), torch.tensor(2.0**bits).double(), beta=torch.tensor(-0.31).double()
    ).double()
    step, lower, top = activation.offset_grid()
    assert top == round(2**bits - 1)
    deployed = UniformQuantizer(1, 0, signed=False, offset=False, elements=50).double()
    deployed.set_precision(Precision("uniform", 4, "tensor"))
    deployed.set_offset_grid(step, lower, top)
    x = 3 * values(1000)
    torch.testing.assert_close(deployed(x), activation(x), rtol=0, atol=1e-12)


def test_the_symmetric_grid_is_no_offset_grid() -> None:
    learned, w = weight(3)
    with pytest.raises(ValueError, match="no lower end"):
        learned.offset_grid(w)


def test_the_penalty_moves_the_range_of_an_activation_too_where_it_is_asked_to() -> None:
    activation = GdnsqQuantizer(torch.tensor(0.2).double(), torch.tensor(8.0).double()).double()
    activation.bits(moves_range=True).sum().backward()
    assert activation.log_q is not None
    assert activation.log_q.grad == 1
    assert activation.log_s.grad == -1


def test_ewgs_scales_each_gradient_by_its_distance_from_the_grid() -> None:
    x, s, g, grad_x, _ = gradients("residual", "ewgs")
    v = (x - 0.1) / s
    torch.testing.assert_close(grad_x, g * (1 + EWGS_DELTA * g.sign() * (v - torch.round(v))))


def test_adaptive_ewgs_takes_its_factor_from_the_correlation_of_gradient_and_noise() -> None:
    x, s, g, grad_x, _ = gradients("residual", "aewgs")
    v = (x - 0.1) / s
    n = torch.round(v) - v
    pull = g.sign() * n
    variance = (n**2).mean(1, keepdim=True) - n.mean(1, keepdim=True) ** 2
    factor = (pull.mean(1, keepdim=True) / variance.clamp_min(1e-3) * pull).clamp_max(0.99)
    torch.testing.assert_close(grad_x, g * (1 - factor))


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_symmetric_grid_is_the_uniform_quantizer_at_a_whole_number_of_bits(bits: int) -> None:
    learned, w = weight(bits)
    uniform = UniformQuantizer(2, 2, signed=True, offset=False, elements=50).double()
    uniform.set_precision(Precision("uniform", bits, "channel"))
    uniform.set_range(torch.exp2(learned.log_s))
    torch.testing.assert_close(learned(w), uniform(w))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_an_unsigned_activation_is_the_uniform_quantizer_too(bits: int) -> None:
    learned = GdnsqQuantizer(torch.tensor(0.2).double(), torch.tensor(2.0**bits).double()).double()
    uniform = UniformQuantizer(1, 0, signed=False, offset=False, elements=50).double()
    uniform.set_precision(Precision("uniform", bits, "tensor"))
    uniform.set_range(torch.tensor(0.2).double())
    x = values(100)
    torch.testing.assert_close(learned(x), uniform(x))


def test_bits_are_log2_of_the_levels() -> None:
    learned, w = weight(3.3)
    torch.testing.assert_close(learned.bits(), torch.full((2, 1), 3.3).double())
    free, _ = weight(3.3, "min")
    span = w.amax(1, keepdim=True) - w.amin(1, keepdim=True)
    torch.testing.assert_close(free.bits(w), torch.log2(span / torch.exp2(free.log_s) + 1))


@pytest.mark.parametrize("grid", ["symmetric", "min"])
def test_true_bits_count_the_codes_that_the_weight_takes(grid: str) -> None:
    learned, w = weight(3, grid)
    codes = torch.round((learned(w) - learned.grid(w)[1]) / torch.exp2(learned.log_s))
    most = max(float((row.max() - row.min() + 1).detach()) for row in codes)
    assert learned.true_bits(w) == pytest.approx(math.log2(most))


def test_the_smallest_weight_is_code_zero_on_the_grid_of_the_paper() -> None:
    free, w = weight(3, "min")
    y = free(w)
    torch.testing.assert_close(y.amin(1), w.amin(1))
    torch.testing.assert_close((y - w).abs().amax(1) <= torch.exp2(free.log_s).flatten() / 2, torch.ones(2).bool())


def test_more_bits_at_the_same_range_err_less() -> None:
    w = 0.3 * values(2, 500)
    errors = []
    for bits in (1.0, 1.5, 2.0, 2.7, 3.0, 4.4, 6.0, 8.0):
        step = torch.tensor([[1.6], [1.8]]).double() / 2**bits
        quantizer = GdnsqQuantizer(step, torch.tensor(2.0**bits).double(), weight_grid="symmetric").double()
        errors.append(float((quantizer(w) - w).square().mean()))
    assert errors == sorted(errors, reverse=True)


def test_the_penalty_on_bits_moves_the_step_of_a_symmetric_weight_and_not_its_range() -> None:
    learned, w = weight(4)
    learned.bits(w).sum().backward()
    assert torch.equal(learned.log_s.grad, -torch.ones(2, 1).double())  # type: ignore[arg-type]
    assert learned.log_q is not None
    assert learned.log_q.grad is None


def test_a_held_bit_width_stays_while_the_step_learns() -> None:
    learned, w = weight(3.4)
    learned.hold(3)
    torch.testing.assert_close(learned.bits(), torch.full((2, 1), 3.0).double())
    with torch.no_grad():
        learned.log_s += 0.7
    torch.testing.assert_close(learned.bits(), torch.full((2, 1), 3.0).double())
    learned(w).square().sum().backward()
    assert learned.log_s.grad is not None
    assert learned.log_s.grad.abs().min() > 0


def test_an_activation_that_is_held_begins_at_a_fixed_whole_number_of_steps() -> None:
    learned = GdnsqQuantizer(torch.tensor(2.0), torch.tensor(2.0), beta=torch.tensor(-0.8))
    x = torch.tensor([-3.0, 0.4, 0.8, 1.2, 3.0])
    torch.testing.assert_close(learned(x), torch.tensor([-0.8, 1.2, 1.2, 1.2, 1.2]))
    learned.hold(1)
    torch.testing.assert_close(learned(x), torch.tensor([0.0, 0.0, 0.0, 2.0, 2.0]))
    with torch.no_grad():
        assert learned.beta is not None
        learned.beta -= 5
        learned.log_s += 1
    torch.testing.assert_close(learned(x), torch.tensor([0.0, 0.0, 0.0, 0.0, 4.0]))


def test_a_weight_held_at_one_bit_goes_on_learning_where_it_is_clamped() -> None:
    for bits, clamped_learns in ((1, True), (2, False)):
        learned, _ = weight(4)
        learned.hold(bits)
        w = torch.tensor([[-0.5, -0.001, 0.001, 0.5]] * 2).double().requires_grad_()  # the outer two are clamped
        g = values(2, 4, seed=3)
        y = learned(w)
        y.backward(g)
        expected = g if clamped_learns else g * torch.tensor([0.0, 1.0, 1.0, 0.0])
        assert w.grad is not None
        torch.testing.assert_close(w.grad, expected, rtol=0, atol=0)
        s = torch.exp2(learned.log_s.detach())
        uniform = UniformQuantizer(2, 2, signed=True, offset=False, elements=4).double()
        uniform.set_precision(Precision("uniform", bits, "channel"))
        uniform.set_range(s)
        torch.testing.assert_close(y, uniform(w), rtol=0, atol=1e-15)


def test_gradients_are_finite_on_zeros_constants_huge_and_denormal_input() -> None:
    for x in (torch.zeros(2, 5), torch.full((2, 5), 3.0), torch.full((2, 5), 1e30), torch.full((2, 5), 1e-40)):
        for grid in ("symmetric", "min"):
            quantizer, _ = weight(3, grid)
            inputs = x.double().requires_grad_()
            quantizer(inputs).sum().backward()
            assert inputs.grad is not None
            assert inputs.grad.isfinite().all()
            assert all(p.grad is None or p.grad.isfinite().all() for p in quantizer.parameters())
