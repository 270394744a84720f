"""What every quantizer has to keep to, whatever its type. A type joins by one line in KINDS."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from mpsearch.cost.energy import mac_pj
from mpsearch.errors import PrecisionError
from mpsearch.precision import BITS, FLOAT, LayerPrecision, Precision
from mpsearch.quant.quantizer import Quantizer
from mpsearch.quant.ranges import activation_range, weight_step
from mpsearch.quant.shift import ShiftGradient, ShiftQuantizer
from mpsearch.quant.switch import QUANTIZERS, make_quantizer

KINDS = ("uniform", "shift", "apot")
CASTS = ("float16", "bfloat16")  # no scale, no codes: their own tests are in test_cast.py
CASES = [(kind, bits) for kind in KINDS for bits in BITS[kind] if bits <= 8]
every_case = pytest.mark.parametrize(("kind", "bits"), CASES, ids=[f"{kind}{bits}" for kind, bits in CASES])


def weights(rows: int = 4, columns: int = 256, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.logspace(-2, 1, rows)[:, None]


def weight_quantizer(w: Tensor, precision: Precision, offered: tuple[str, ...] = ()) -> Quantizer:
    names = offered or (precision.quantizer,)
    quantizer = make_quantizer(names, w.shape[0], w.dim(), signed=True, offset=False, elements=w[0].numel())
    quantizer.set_precision(precision)
    quantizer.set_range(weight_step(w, precision))
    return quantizer.eval()


def activation_quantizer(x: Tensor, precision: Precision, signed: bool, offered: tuple[str, ...] = ()) -> Quantizer:
    names = offered or (precision.quantizer,)
    quantizer = make_quantizer(names, 1, 0, signed=False, offset=signed, elements=x[0].numel())
    quantizer.set_precision(precision)
    quantizer.set_range(*activation_range(x, precision, signed=signed))
    return quantizer.eval()


def quantizers(kind: Any, bits: int, offered: tuple[str, ...] = ()) -> list[tuple[str, Quantizer, Tensor]]:
    """(use, quantizer in eval mode, what its range was set on) for each use that a quantizer has."""
    w = weights()
    channel, tensor = Precision(kind, bits, "channel"), Precision(kind, bits, "tensor")
    return [
        ("channel", weight_quantizer(w, channel, offered), w),
        ("tensor", weight_quantizer(w, tensor, offered), w),
        ("unsigned", activation_quantizer(w.relu(), tensor, False, offered), w.relu()),
        ("negative", activation_quantizer(w + 0.3, tensor, True, offered), w + 0.3),
    ]


def test_every_quantizer_is_tested() -> None:
    assert {*KINDS, *CASTS} == set(QUANTIZERS) == set(BITS) - {"float"}


@every_case
def test_quantizer_leaves_grid_points_where_they_are(kind: str, bits: int) -> None:
    for use, quantizer, x in quantizers(kind, bits):
        once = quantizer(x)
        assert torch.equal(quantizer(once), once), use


@every_case
def test_quantizer_has_at_most_two_to_the_bits_levels(kind: str, bits: int) -> None:
    for use, quantizer, _ in quantizers(kind, bits):
        step = quantizer.step.detach().reshape(-1, 1)
        dense = torch.cat([step * torch.linspace(-300, 300, 40_001), step * 2.0 ** torch.linspace(-33, 1, 5000)], dim=1)
        if quantizer.channels == 1:
            dense = dense[:1]
        for levels in quantizer(torch.cat([dense, -dense], dim=1)):
            assert len(levels.unique()) <= 2**bits, use
            assert len(levels.unique()) >= 2**bits - 1, f"{use} wastes codes"


@every_case
def test_quantizer_is_monotone(kind: str, bits: int) -> None:
    for use, quantizer, _ in quantizers(kind, bits):
        x = torch.linspace(-20, 20, 4001).expand(quantizer.channels, -1)
        assert bool((quantizer(x).diff(dim=1) >= 0).all()), use


@every_case
def test_weights_are_quantized_symmetrically(kind: str, bits: int) -> None:
    for use, quantizer, x in quantizers(kind, bits)[:2]:
        lowest = quantizer(torch.full_like(x, -1e6)).amin() if kind == "uniform" and bits > 1 else None
        y, mirrored = quantizer(x), -quantizer(-x)
        if kind == "uniform" and bits == 1:  # zero has to go somewhere
            assert torch.equal(y[x != 0], mirrored[x != 0]), use
        elif lowest is not None:  # two's complement has one code more below zero
            inside = x.abs() < -quantizer(torch.full_like(x, -1e6)) - quantizer.step.detach()
            assert torch.equal(y[inside], mirrored[inside]), use
        else:
            assert torch.equal(y, mirrored), use


@every_case
def test_quantizer_keeps_zero_exact_except_for_binary_weights(kind: str, bits: int) -> None:
    for use, quantizer, x in quantizers(kind, bits):
        for mode in (True, False):
            at_zero = quantizer.train(mode)(torch.zeros_like(x))
            if bits == 1 and use in ("channel", "tensor"):
                assert bool((at_zero != 0).all())
            else:
                assert torch.equal(at_zero, torch.zeros_like(x)), use


@pytest.mark.parametrize("kind", KINDS)
def test_more_bits_never_increase_the_error_at_the_best_step(kind: Any) -> None:
    errors: dict[str, list[float]] = {}
    for bits in BITS[kind]:
        for use, quantizer, x in quantizers(kind, bits):
            errors.setdefault(use, []).append((quantizer(x) - x).square().mean().item())
    for use, by_bits in errors.items():
        for fewer, more in itertools.pairwise(by_bits):
            # Powers of two saturate: more bits add levels near zero only. The search is good to 0.1 % of the error.
            assert more <= fewer * (1 if kind == "uniform" else 1.001), f"{use}: {by_bits}"


@pytest.mark.parametrize("kind", ["shift", "apot"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_step_is_no_worse_than_a_dense_scan(kind: Any, bits: int) -> None:
    w = weights()
    quantizer = weight_quantizer(w, Precision(kind, bits, "channel"))
    found = (quantizer(w) - w).square().sum(dim=1)
    best = torch.full_like(found, torch.inf)
    for share in torch.logspace(-1.5, 0.5, 1000):
        quantizer.set_range(w.abs().amax(dim=1) * share)
        best = torch.minimum(best, (quantizer(w) - w).square().sum(dim=1))
    assert bool((found <= best * 1.01).all())


@pytest.mark.parametrize(("kind", "bits"), [("uniform", 1), ("uniform", 8), ("shift", 2), ("shift", 5), ("apot", 4)])
@pytest.mark.parametrize("value", [0.0, 1.0, 1e-40, 3e38, -3e38])
@pytest.mark.parametrize("gradient", get_args(ShiftGradient))
def test_gradients_stay_finite_on_zeros_constants_denormal_and_huge_input(
    kind: str, bits: int, value: float, gradient: ShiftGradient
) -> None:
    for use, quantizer, x in quantizers(kind, bits):
        quantizer.train()
        if isinstance(quantizer, ShiftQuantizer):
            quantizer.gradient = gradient
        for step in (None, 0.0, 1e-30):
            if step is not None:
                quantizer.set_range(torch.full_like(quantizer.step, step))
            constant = torch.full_like(x, value).requires_grad_()
            quantizer.zero_grad()
            quantizer(constant).mean().backward()
            assert constant.grad is not None
            assert bool(constant.grad.isfinite().all()), use
            assert all(bool(p.grad.isfinite().all()) for p in quantizer.parameters() if p.grad is not None), use


@every_case
def test_what_is_no_number_stays_none(kind: str, bits: int) -> None:
    for use, quantizer, _ in quantizers(kind, bits):
        nothing = torch.full((quantizer.channels, 1), torch.nan)
        for mode in (True, False):
            assert bool(quantizer.train(mode)(nothing).isnan().all()), use


@every_case
def test_ranges_of_zeros_and_constants_are_usable(kind: Any, bits: int) -> None:
    for value in (0.0, 1.0, -1.0):
        w = torch.full((2, 8), value)
        assert bool(weight_quantizer(w, Precision(kind, bits, "channel"))(w).isfinite().all())
        y = activation_quantizer(w, Precision(kind, bits, "tensor"), True)(w)
        torch.testing.assert_close(y, w, rtol=0.04, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_float_precision_leaves_the_tensor_alone(kind: str) -> None:
    for use, quantizer, x in quantizers(kind, 3):
        quantizer.set_precision(FLOAT)
        assert torch.equal(quantizer(x), x), use


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantizer_refuses_the_precision_of_another_type(kind: str) -> None:
    for other in set(KINDS) - {kind}:
        for _, quantizer, x in quantizers(kind, 3):
            before = quantizer(x)
            with pytest.raises(PrecisionError, match=f"{other}:3.*offer {other} too"):
                quantizer.set_precision(Precision(other, 3, "tensor"))  # type: ignore[arg-type]
            assert torch.equal(quantizer(x), before)


@every_case
def test_bfloat16_input_gets_the_same_codes_as_its_float32_copy(kind: str, bits: int) -> None:
    for use, quantizer, x in quantizers(kind, bits):
        narrow = x.bfloat16()
        assert torch.equal(quantizer(narrow), quantizer(narrow.float()).bfloat16()), use


@every_case
def test_state_dict_round_trip_restores_the_output_whatever_else_is_offered(kind: str, bits: int) -> None:
    alone, switching = quantizers(kind, bits), quantizers(kind, bits, KINDS)
    for (use, quantizer, x), (_, other, _) in zip(alone, switching, strict=True):
        assert set(quantizer.state_dict()) == set(other.state_dict()) <= {"step", "beta"}, use
        for source, target in ((quantizer, other), (other, quantizer)):
            twin = copy.deepcopy(target)
            twin.set_range(torch.full_like(twin.step, 3.0))
            twin.load_state_dict(source.state_dict())
            assert torch.equal(twin(x), source(x)), use


@every_case
def test_a_switch_is_the_chosen_type_gradients_included(kind: str, bits: int) -> None:
    """Whatever it was before: the last type that it had leaves no trace."""
    alone, switching = quantizers(kind, bits), quantizers("apot", 2, KINDS)
    for (use, quantizer, x), (_, switch, _) in zip(alone, switching, strict=True):
        switch.set_precision(quantizer.precision)
        switch.load_state_dict(quantizer.state_dict())
        for mode in (True, False):
            gradients = []
            for q in (quantizer.train(mode), switch.train(mode)):
                q.zero_grad()
                q(x).square().sum().backward()
                assert q.step.grad is not None
                gradients.append(q.step.grad.clone())
            assert torch.equal(quantizer(x), switch(x)), use
            assert torch.equal(*gradients), use


@pytest.mark.parametrize("kind", KINDS)
def test_the_cost_model_prices_more_bits_higher(kind: Any) -> None:
    for tensor in ("weight", "activation"):
        costs = []
        for bits in BITS[kind]:
            priced = Precision(kind, bits, "tensor")
            other = Precision("uniform", 4, "tensor")
            precision = LayerPrecision(priced, other) if tensor == "weight" else LayerPrecision(other, priced)
            costs.append(mac_pj(precision, fan_in=64, signed_input=False))
        assert costs[0] > 0
        assert costs == sorted(costs)


def compiled(quantizer: Quantizer, backend: Any) -> Callable[[Tensor], Tensor]:
    torch._dynamo.reset()
    return torch.compile(quantizer, backend=backend, dynamic=False, fullgraph=True)


@pytest.mark.compile
@pytest.mark.parametrize("training", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_one_compiled_switch_agrees_with_eager_for_every_type_and_width(training: bool) -> None:
    """Within 1e-5 of the largest level, but for one element in a hundred that a last-bit difference puts elsewhere."""
    from torch._dynamo.testing import CompileCounterWithBackend

    w = weights()
    switch = weight_quantizer(w, Precision("uniform", 8, "channel"), KINDS).train(training)
    counter = CompileCounterWithBackend("inductor")
    fast = compiled(switch, counter)
    for kind, bits in (("uniform", 8), ("shift", 4), ("apot", 5), ("uniform", 1), ("shift", 2), ("apot", 2)):
        precision = Precision(kind, bits, "channel")  # type: ignore[arg-type]
        switch.set_precision(precision)
        switch.set_range(weight_step(w, precision))
        gradients, outputs = [], []
        for run in (switch, fast):
            switch.zero_grad()
            y = run(w)
            y.square().sum().backward()
            assert switch.step.grad is not None
            gradients.append(switch.step.grad.clone())
            outputs.append(y.detach())
        close = (outputs[0] - outputs[1]).abs() <= 1e-5 * outputs[0].abs().amax(dim=1, keepdim=True)
        assert close.float().mean() >= 0.99, f"{kind}:{bits}"
        torch.testing.assert_close(*gradients, rtol=0.02, atol=0.02)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.slow  # the switch above compiles all types
@pytest.mark.parametrize("kind", KINDS)
def test_a_traced_quantizer_agrees_with_eager(kind: str) -> None:
    for use, quantizer, x in quantizers(kind, 3):
        for mode in (True, False):
            quantizer.train(mode)
            torch.testing.assert_close(compiled(quantizer, "eager")(x), quantizer(x), msg=use)
    torch._dynamo.reset()
