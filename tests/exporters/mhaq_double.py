"""A double of MHAQ, of the parts that our adapter touches, written from the facts of its code of February 2026.

What it does where one would not expect it is what the tests are about: a layer becomes
Sequential(activations_quantizer, 0); kernels of 1x1 are left out, a Linear or a last module stops it; bits are
collected from whatever wants a gradient, and `torch.cat` wants one at least; calibration makes new parameters, stops at
one scale per tensor, takes an input that is constant out of the penalty, and goes on at 24 bits after one without a
gradient.
`benchmarks/mhaq.py` runs the same adapter in the real one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

EPS = 1e-3


class NoisyAct(nn.Module):
    """The input of a layer: clamped to [b, b + Q - s], rounded from b."""

    def __init__(self) -> None:
        super().__init__()
        self.disable = False
        self.log_act_q = nn.Parameter(torch.tensor([10.0]))
        self.log_act_s = nn.Parameter(torch.tensor([-10.0]))
        self.act_b = nn.Parameter(torch.tensor([-(2.0**9)]))
        self.bw = torch.tensor(0.0)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.detach().aminmax()
        if self.disable:
            return x
        s, q = torch.exp2(self.log_act_s), torch.exp2(self.log_act_q)
        value = (torch.maximum(torch.minimum(x, self.act_b + q - s), self.act_b) - self.act_b) / s
        code = value + (value.round() - value).detach()
        if not self.training:
            least, most = code.detach().aminmax()
            self.bw = torch.log2(most - least + 1)
        return code * s + self.act_b


class NoisyConv2d(nn.Conv2d):
    """A convolution whose weight is rounded from its least value."""

    def __init__(self, conv: nn.Conv2d, per_channel: bool) -> None:
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            cast(Any, conv.kernel_size),
            cast(Any, conv.stride),
            cast(Any, conv.padding),
            cast(Any, conv.dilation),
            conv.groups,
            conv.bias is not None,
        )
        self.weight, self.bias = conv.weight, conv.bias
        shape = (conv.out_channels, 1, 1, 1) if per_channel else (1,)
        self.log_wght_s = nn.Parameter(torch.full(shape, -12.0))

    def ends(self) -> tuple[Tensor, Tensor]:
        rows = self.weight.flatten(1) if self.log_wght_s.dim() > 1 else self.weight.reshape(1, -1)
        return rows.amin(1), rows.amax(1)

    def forward(self, x: Tensor) -> Tensor:
        s, least = torch.exp2(self.log_wght_s), self.ends()[0].view_as(self.log_wght_s)
        value = (self.weight - least) / s
        return self._conv_forward(x, (value + (value.round() - value).detach()) * s + least, self.bias)


class Criterion(nn.Module):
    """The penalty beside a loss: relu(bits - (target - eps)), its mean over all weights and over all inputs."""

    def __init__(self, wt: int, at: int) -> None:
        super().__init__()
        self.wt, self.at = wt, at

    def forward(self, model: nn.Module) -> Tensor:
        b_w, b_a = bits(model)
        return torch.relu(b_w - (self.wt - EPS)).mean() + torch.relu(b_a - (self.at - EPS)).mean()


def bits(model: nn.Module) -> tuple[Tensor, Tensor]:
    """The bits of all weights and of all inputs that want a gradient, in the order of `named_modules`."""
    weights, inputs = [], []
    for module in model.modules():
        if isinstance(module, NoisyConv2d) and module.log_wght_s.requires_grad:
            least, most = module.ends()
            step = module.log_wght_s.ravel()
            weights.append(torch.log2(most - least + torch.exp2(step)) - step)
        if isinstance(module, NoisyAct) and module.log_act_s.requires_grad:
            inputs.append(module.log_act_q - module.log_act_s)
    return torch.cat(weights), torch.cat(inputs)


class Module(nn.Module):
    """What stands for the LightningModule."""

    def __init__(self, model: nn.Module, wt: int, at: int) -> None:
        super().__init__()
        self.model = model
        self.wrapped_criterion = Criterion(wt, at)


def quantize(model: nn.Module, quantization: Mapping[str, Any]) -> tuple[Module, SimpleNamespace]:
    """What `quantizer.quantize` makes of a network, in place, and the quantizer."""
    names, modules = zip(*model.named_modules(), strict=True)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    for name in cast(Sequence[str], quantization["excluded_layers"]):
        if name not in layers:
            raise AttributeError(f"Layer name {name} is not found in the model.")
        layers.pop(name)
    for name, layer in layers.items():
        if layer.kernel_size == (1, 1):  # a Linear has none
            continue
        modules[names.index(name) + 1]  # the next one, to fold a BatchNorm: the last has none
        act = NoisyAct()
        act.disable = quantization["act_bit"] == -1
        conv = NoisyConv2d(cast(nn.Conv2d, layer), quantization["qscheme"] == 1)
        model.set_submodule(name, nn.Sequential(OrderedDict([("activations_quantizer", act), ("0", conv)])))
    stats = SimpleNamespace(is_converged=lambda: None)
    return Module(model, quantization["weight_bit"], quantization["act_bit"]), SimpleNamespace(model_stats=stats)


@torch.no_grad()
def calibrate(qmodel: Module, calibration: Mapping[str, int], x: Tensor) -> None:
    """Ranges of weights and of inputs as they are, with so many bits."""
    for module in qmodel.model.modules():
        if isinstance(module, NoisyConv2d) and calibration["weight_bit"]:
            least, most = module.weight.amin((1, 2, 3)), module.weight.amax((1, 2, 3))
            step = torch.log2((most - least) / (2 ** calibration["weight_bit"] - 1)).reshape(module.log_wght_s.shape)
            module.log_wght_s = nn.Parameter(torch.maximum(step, module.log_wght_s))
    qmodel.eval().model(x)
    width = calibration["act_bit"]
    for module in qmodel.model.modules():
        if not isinstance(module, NoisyAct):
            continue
        least, most = module.seen
        if not module.log_act_s.requires_grad:
            width = 24
        if most > least:
            step = torch.log2((most - least) / (2**width - 1)).reshape(1)
            module.log_act_s, module.log_act_q = nn.Parameter(step), nn.Parameter(step + width)
            module.act_b = nn.Parameter(least.reshape(1))
        else:
            for name in ("log_act_q", "log_act_s"):
                setattr(module, name, nn.Parameter(torch.tensor([0]), requires_grad=False))
            module.act_b = nn.Parameter(least.reshape(1), requires_grad=False)
