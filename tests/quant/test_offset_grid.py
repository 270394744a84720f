"""The offset grid: its formula, its gradients, and how state dicts bring it along."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import mpsearch
from mpsearch.errors import PrecisionError
from mpsearch.precision import FLOAT, LayerPrecision, Precision, PrecisionConfig
from mpsearch.quant.prepare import insert_quantizers, quant_layers
from mpsearch.quant.quantizer import Quantizer
from mpsearch.quant.switch import make_quantizer

UNIFORM3 = Precision("uniform", 3, "channel")
OFFERS = [("uniform",), ("uniform", "shift", "apot")]


def weights(rows: int = 4, columns: int = 256) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 1, rows)[:, None]


def weight_quantizer(w: Tensor, offered: tuple[str, ...] = ("uniform",)) -> Quantizer:
    """3 bits from the smallest weight of each row to the largest."""
    quantizer = make_quantizer(offered, len(w), w.dim(), signed=True, offset=False, elements=w[0].numel())
    quantizer.set_precision(UNIFORM3)
    quantizer.set_offset_grid((w.amax(1) - w.amin(1)) / 7, w.amin(1), top=7)
    return quantizer.eval()


def activation_quantizer(offered: tuple[str, ...] = ("uniform",), top: int = 5) -> Quantizer:
    quantizer = make_quantizer(offered, 1, 0, signed=False, offset=False, elements=256)
    quantizer.set_precision(Precision("uniform", 3, "tensor"))
    quantizer.set_offset_grid(torch.tensor(0.3), torch.tensor(-0.07), top)
    return quantizer.eval()


@pytest.mark.parametrize("offered", OFFERS, ids=len)
def test_a_weight_is_lower_plus_step_times_code(offered: tuple[str, ...]) -> None:
    w = weights()
    quantizer = weight_quantizer(w, offered)
    lower, step = w.amin(1, keepdim=True), (w.amax(1, keepdim=True) - w.amin(1, keepdim=True)) / 7
    codes = torch.round((w - lower) / step)
    assert torch.equal(quantizer(w), step * codes + lower)
    assert torch.equal(quantizer.codes(w), codes.int())
    assert torch.equal(quantizer(w).amin(1), w.amin(1))
    assert (int(codes.min()), int(codes.max())) == (0, 7)


@pytest.mark.parametrize("offered", OFFERS, ids=len)
def test_an_input_ends_at_its_top_code_below_what_its_bits_could_hold(offered: tuple[str, ...]) -> None:
    quantizer = activation_quantizer(offered)
    levels = quantizer(torch.linspace(-3, 3, 10_001)).unique()
    torch.testing.assert_close(levels, -0.07 + 0.3 * torch.arange(6))


def test_the_uniform_grid_is_the_special_case_of_a_whole_number_of_steps() -> None:
    w = weights() + 0.3
    uniform = make_quantizer(["uniform"], 1, 0, signed=False, offset=True, elements=256)
    uniform.set_precision(Precision("uniform", 3, "tensor"))
    uniform.set_range(torch.tensor(0.5), torch.tensor(-1.5))
    offset = copy.deepcopy(uniform)
    offset.set_offset_grid(torch.tensor(0.5), torch.tensor(-1.5), top=7)
    assert torch.equal(offset(w), uniform(w))


def test_gradients_are_those_of_straight_through_rounding() -> None:
    quantizer = activation_quantizer(top=5).double()
    x = torch.tensor([-1.0, 0.2, 0.9, 4.0], dtype=torch.float64, requires_grad=True)  # below, inside twice, above
    quantizer(x).sum().backward()
    s, lower = 0.3, -0.07
    v = [(0.2 - lower) / s, (0.9 - lower) / s]
    scale = float(quantizer.gradient_scale)
    assert x.grad is not None
    assert quantizer.step.grad is not None
    assert quantizer.beta is not None
    assert quantizer.beta.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 0]
    assert float(quantizer.step.grad) == pytest.approx(scale * (sum(round(u) - u for u in v) + 5), rel=1e-6)
    assert float(quantizer.beta.grad) == pytest.approx(2 * scale)  # what is clamped moves with the lower end


def test_one_step_and_lower_end_serve_a_whole_weight_per_tensor() -> None:
    w = weights()
    quantizer = make_quantizer(["uniform"], 4, 2, signed=True, offset=False, elements=256)
    quantizer.set_precision(Precision("uniform", 3, "tensor"))
    quantizer.set_offset_grid((w.max() - w.min()) / 7, w.min(), top=7)
    assert len(quantizer(w).unique()) <= 8


@pytest.mark.parametrize("offered", OFFERS, ids=len)
def test_a_state_dict_brings_the_grid_along_and_takes_it_away(offered: tuple[str, ...]) -> None:
    w = weights()
    on_offset_grid = weight_quantizer(w)
    assert set(on_offset_grid.state_dict()) == {"step", "beta", "top"}
    plain = make_quantizer(offered, 4, 2, signed=True, offset=False, elements=256)
    plain.set_precision(UNIFORM3)
    plain.set_range(torch.full((4,), 0.1))
    before, state = plain(w), copy.deepcopy(plain.state_dict())
    plain.load_state_dict(on_offset_grid.state_dict())
    assert torch.equal(plain(w), on_offset_grid(w))
    plain.load_state_dict(state)  # of a run from before there were offset grids
    assert torch.equal(plain(w), before)
    assert set(plain.state_dict()) == {"step"}


@pytest.mark.parametrize("precision", [UNIFORM3, FLOAT])
def test_setting_a_precision_leaves_the_uniform_grid(precision: Precision) -> None:
    for quantizer, x in ((weight_quantizer(weights()), weights()), (activation_quantizer(), weights())):
        quantizer.set_precision(precision)
        assert set(quantizer.state_dict()) == {"step"}
        if precision.is_float:
            assert torch.equal(quantizer(x), x)


@pytest.mark.parametrize(("precision", "top"), [(FLOAT, 1), (Precision("shift", 3, "channel"), 3), (UNIFORM3, 8)])
def test_a_grid_beyond_the_bits_or_of_another_type_is_refused(precision: Precision, top: int) -> None:
    quantizer = make_quantizer(["uniform", "shift"], 4, 2, signed=True, offset=False, elements=256)
    quantizer.set_precision(precision)
    with pytest.raises(PrecisionError, match=rf"no grid of the codes 0 to {top}: set a uniform precision"):
        quantizer.set_offset_grid(torch.tensor(1.0), torch.tensor(0.0), top)


def test_the_grid_trains_and_costs_as_much_as_its_bits() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)).eval(), torch.randn(64, 6)
    config = PrecisionConfig.uniform(["0", "2"], LayerPrecision.shorthand("w3a3"))
    prepared = mpsearch.prepare_for_training(model, config, x)
    layers = quant_layers(prepared)
    for layer in layers.values():
        w = layer.weight.detach()  # type: ignore[union-attr, operator]
        layer.weight_quantizer.set_offset_grid((w.amax(1) - w.amin(1)) / 7, w.amin(1), top=7)
        layer.input_quantizer.set_offset_grid(torch.tensor(0.4), torch.tensor(-0.01), top=6)
    before = copy.deepcopy(prepared.state_dict())
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1)
    losses = []
    for _ in range(30):
        loss = (prepared(x) - model(x).detach()).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    learned = {name for name, value in prepared.state_dict().items() if not torch.equal(value, before[name])}
    assert {"0.weight_quantizer.beta", "0.input_quantizer.beta", "2.weight_quantizer.step"} <= learned
    assert not any(name.endswith("top") for name in learned)
    assert PrecisionConfig((name, layer.precision) for name, layer in layers.items()) == config


@pytest.mark.slow
@pytest.mark.compile
def test_compiled_quantizers_agree_with_eager() -> None:
    from mpsearch.quant.fused import fuse

    w = weights()
    for quantizer in (weight_quantizer(w), activation_quantizer()):
        expected = quantizer(w)
        fuse(quantizer)
        torch.testing.assert_close(quantizer(w), expected)


def test_a_network_without_offset_grids_has_the_state_dict_that_it_had() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)).eval(), torch.randn(8, 4)
    twin = insert_quantizers(model, mpsearch.inspect_model(model, x).layers)
    assert {name for name in twin.state_dict() if "quantizer" in name} == {
        "0.weight_quantizer.step",
        "0.input_quantizer.step",
        "0.input_quantizer.beta",
    }
