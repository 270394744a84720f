"""Bias correction takes back the shift of the mean that rounded weights cause."""

from __future__ import annotations

import torch
from ptq_nets import MobileNet, normal, shaken
from torch import nn

from mpsearch.graph.layers import inspect_model
from mpsearch.precision import FLOAT, LayerPrecision, Precision, PrecisionConfig
from mpsearch.ptq.bias import correct_bias_analytically, correct_bias_empirically
from mpsearch.ptq.flow import Normal
from mpsearch.ptq.fold import fold_batch_norms
from mpsearch.ptq.pipeline import set_weight_ranges
from mpsearch.quant.prepare import insert_quantizers, quant_layers

W3 = LayerPrecision(Precision("uniform", 3, "tensor"), FLOAT)


def rounded(model: nn.Module, x: torch.Tensor) -> nn.Module:
    quantized = insert_quantizers(model, inspect_model(model, x).layers)
    set_weight_ranges(quantized, PrecisionConfig.uniform(quant_layers(quantized), W3))
    return quantized


def test_analytic_correction_is_the_weight_error_times_the_mean() -> None:
    torch.manual_seed(0)
    for layer in (nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 3), nn.Linear(4, 6)):
        net = nn.Sequential(layer)
        x = torch.rand(2, 4, 5, 5) if not isinstance(layer, nn.Linear) else torch.rand(2, 4)
        quantized = rounded(net, x)
        mean = torch.tensor([0.3, 1.0, -0.5, 2.0])
        # A constant input, and an output place away from the border: the mean shift is the shift itself.
        constant = mean.view(1, 4, 1, 1).expand(1, 4, 7, 7) if x.dim() == 4 else mean[None]
        place = (0, slice(None), 3, 3) if x.dim() == 4 else 0
        assert not torch.allclose(quantized(constant)[place], net(constant)[place], atol=1e-3)
        left = correct_bias_analytically(quantized, {"0": Normal(mean, torch.full((4,), 0.1))})
        assert left == []
        torch.testing.assert_close(quantized(constant)[place], net(constant)[place], rtol=1e-4, atol=1e-4)


def test_analytic_correction_agrees_with_measured_means_behind_a_relu() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.ReLU(), nn.Linear(16, 8))
    mean, std = torch.randn(16), torch.rand(16) + 0.5
    x = mean + std * torch.randn(100_000, 16)
    quantized = rounded(net, x[:8])
    before = (quantized(x) - net(x)).mean(0)
    correct_bias_analytically(quantized, {"1": Normal(mean, std).clip(0.0)})
    after = (quantized(x) - net(x)).mean(0)
    assert after.abs().max() < 0.1 * before.abs().max()


def test_layers_without_statistics_are_named() -> None:
    quantized = rounded(nn.Sequential(nn.Linear(4, 2)), torch.rand(2, 4))
    bias = quantized[0].bias.clone()  # type: ignore[index]
    assert correct_bias_analytically(quantized, {}) == ["0"]
    assert torch.equal(quantized[0].bias, bias)  # type: ignore[index]


def test_empirical_correction_makes_every_mean_the_float_networks() -> None:
    torch.manual_seed(0)
    net, x = shaken(MobileNet()).float(), normal(16, 1, 8, 8).float()
    net = fold_batch_norms(net, inspect_model(net, x).layers).model
    quantized = rounded(net, x)

    def means(model: nn.Module) -> dict[str, torch.Tensor]:
        found = {}
        for name in quant_layers(quantized):
            model.get_submodule(name).register_forward_hook(
                lambda _m, _a, y, name=name: found.__setitem__(
                    name, y.mean(dim=(0, 2, 3)) if y.dim() == 4 else y.mean(0)
                )
            )
        model(x)
        return found

    wanted = means(net)
    assert any(not torch.allclose(wanted[name], mean, atol=1e-2) for name, mean in means(quantized).items())
    correct_bias_empirically(quantized, net, x)
    for name, mean in means(quantized).items():
        torch.testing.assert_close(mean, wanted[name], rtol=1e-3, atol=1e-4)
