"""AdaRound: its formulas, its optimum against exhaustive search, and weights that stay on the grid."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpsearch.graph.layers import inspect_model
from mpsearch.precision import LayerPrecision, PrecisionConfig
from mpsearch.ptq.adaround import (
    adaround,
    beta_at,
    input_of,
    input_products,
    learned_rounding,
    on_grid,
    rectified_sigmoid,
)
from mpsearch.ptq.pipeline import set_weight_ranges
from mpsearch.quant.prepare import insert_quantizers, quant_layers


def with_weights(model: nn.Module, x: Tensor, bits: str) -> nn.Module:
    quantized = insert_quantizers(model, inspect_model(model, x).layers).eval()
    set_weight_ranges(quantized, PrecisionConfig.uniform(quant_layers(quantized), LayerPrecision.shorthand(bits)))
    return quantized


def test_the_rectified_sigmoid_reaches_both_ends() -> None:
    v = torch.tensor([-5.0, 0.0, 5.0])
    assert rectified_sigmoid(v).tolist() == [0.0, 0.5, 1.0]
    assert float(rectified_sigmoid(torch.tensor(1.0))) == pytest.approx(1.2 * 0.7310586 - 0.1)


def test_beta_waits_for_a_fifth_of_the_steps_and_falls_from_20_to_2() -> None:
    betas = [beta_at(i, 101) for i in range(101)]
    assert betas[:20] == [None] * 20
    assert betas[20] == 20
    assert betas[60] == pytest.approx(11)
    assert betas[100] == pytest.approx(2)


LAYERS = {
    "linear": (nn.Linear(12, 5), (7, 12)),
    "linear on tokens": (nn.Linear(12, 5), (7, 3, 12)),
    "conv": (nn.Conv2d(4, 6, 3, stride=2, padding=1), (5, 4, 7, 7)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding=2), (5, 4, 7, 7)),
    "same, reflected": (nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"), (5, 4, 7, 7)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (5, 4, 9)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_two_matrices_hold_the_whole_reconstruction_error(kind: str) -> None:
    """tr(W~ G W~^T) - 2 tr(W~ (W C)^T) differs between two roundings as E||W x - W~ x~||^2 does."""
    torch.manual_seed(0)
    layer, shape = LAYERS[kind]
    layer = layer.double()
    x, noisy = torch.randn(shape).double(), torch.randn(shape).double()
    gram, cross = input_products(layer, noisy, x)
    other = [torch.randn_like(layer.weight) for _ in range(2)]

    def rows(weight: Tensor) -> Tensor:
        return weight.reshape(gram.shape[0], -1, gram.shape[-1])

    def short(weight: Tensor) -> Tensor:
        w, q = rows(layer.weight), rows(weight)
        return (q @ gram * q).sum() - 2 * (q * (w @ cross)).sum()

    def measured(weight: Tensor) -> Tensor:
        y = layer(x)
        error = y - torch.func.functional_call(layer, {"weight": weight, "bias": layer.bias}, noisy)
        return error.square().sum() / (y.numel() / layer.weight.shape[0])  # per sample and place

    torch.testing.assert_close(short(other[0]) - short(other[1]), measured(other[0]) - measured(other[1]))


@torch.no_grad()
def test_learned_rounding_comes_close_to_the_best_of_all_roundings() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 16, bias=False))
    x = torch.randn(256, 8) @ torch.randn(8, 8)  # correlated inputs: nearest is not the best
    layer = with_weights(model, x, "w3a32")[0]  # type: ignore[index]
    exact = model[0].weight

    def errors(up: Tensor) -> Tensor:
        return (x @ (on_grid(layer, up) - exact).T).square().mean(0)

    roundings = itertools.product([False, True], repeat=8)
    best = torch.stack([errors(torch.tensor([ups])) for ups in roundings]).amin(0).sum()
    gram, cross = input_products(layer, x, x)
    learned = errors(learned_rounding(layer, gram, cross)).sum()
    nearest = (x @ (layer.quantized_weight() - exact).T).square().mean(0).sum()
    assert learned < best + 0.2 * (nearest - best)


@pytest.mark.parametrize("bits", ["w1a32", "w2a32", "w4a32", "w8a32"])
def test_rounded_weights_are_kept_by_the_layers_own_quantizer(bits: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(64, 3))
    x = torch.randn(16, 2, 8, 8)
    quantized = with_weights(model, x, bits)
    assert adaround(quantized, model, x, steps=50) == []
    for layer in quant_layers(quantized).values():
        assert torch.equal(layer.quantized_weight(), layer.weight)


def test_each_layer_gets_the_input_that_the_quantized_network_gives_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
    x = torch.randn(128, 6)
    quantized = with_weights(model, x, "w2a32")
    start = with_weights(model, x, "w2a32")
    adaround(quantized, model, x, steps=200)
    gram, cross = input_products(start[2], quantized[1](quantized[0](x)), model[1](model[0](x)))  # type: ignore[index]
    up = learned_rounding(start[2], gram, cross, steps=200)  # type: ignore[index]
    assert torch.equal(quantized[2].weight, on_grid(start[2], up))  # type: ignore[index]
    assert torch.equal(input_of(quantized, "2", x), quantized[1](quantized[0](x)))  # type: ignore[index]


@torch.no_grad()
def test_the_output_comes_closer_than_nearest_rounding_brings_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
    x = F.avg_pool2d(torch.randn(256, 1, 16, 16), 2)
    nearest, learned = with_weights(model, x, "w3a32"), with_weights(model, x, "w3a32")
    adaround(learned, model, x, steps=300)
    errors = [float((net(x) - model(x)).square().mean()) for net in (learned, nearest)]
    assert errors[0] < 0.7 * errors[1]


def test_layers_that_are_not_treated_are_named() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(2, 3, 3))
    x = torch.randn(4, 2, 5, 5)
    quantized = with_weights(model, x, "w4a32")
    before = quantized(x)
    assert adaround(quantized, model, x, steps=5) == ["0"]
    assert torch.equal(quantized(x), before)
