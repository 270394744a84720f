"""Folding changes the structure of a network and not its function."""

from __future__ import annotations

import pytest
import torch
from ptq_nets import MobileNet, normal, shaken
from torch import nn

from mpsearch.graph.layers import inspect_model
from mpsearch.ptq.fold import fold_batch_norms
from mpsearch.task.networks import CifarResNet


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) for module in model.modules())


NETS = {
    "plain": lambda: nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6)),
    "biased": lambda: nn.Sequential(nn.Conv2d(2, 6, 3, bias=True), nn.BatchNorm2d(6)),
    "depthwise": lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d(4)),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(2, 5, 3), nn.BatchNorm2d(5)),
    "transposed, grouped": lambda: nn.Sequential(nn.ConvTranspose2d(2, 6, 3, groups=2), nn.BatchNorm2d(6)),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(128, 6, bias=False), nn.BatchNorm1d(6)),
    "without affine": lambda: nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6, affine=False)),
}


@pytest.mark.parametrize("kind", NETS)
def test_folding_keeps_the_function_of_every_kind_of_layer(kind: str) -> None:
    torch.manual_seed(0)
    net = NETS[kind]()
    if kind == "without affine":
        net[1].running_var.uniform_(0.3, 1.5)
        net = net.eval().double()
    else:
        net = shaken(net)
    x = normal(3, 2, 8, 8)
    folded = fold_batch_norms(net, inspect_model(net, x).layers)
    assert norms(folded.model) == 0
    torch.testing.assert_close(folded.model(x), net(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("build", "shape"), [(MobileNet, (3, 1, 8, 8)), (lambda: CifarResNet(8), (2, 3, 16, 16))])
def test_folding_empties_whole_networks_and_remembers_their_statistics(build, shape) -> None:
    torch.manual_seed(0)
    net, x = shaken(build()), normal(*shape)
    layers = inspect_model(net, x).layers
    folded = fold_batch_norms(net, layers)
    assert norms(net) == len(folded.outputs) > 0
    assert norms(folded.model) == 0
    torch.testing.assert_close(folded.model(x), net(x), rtol=1e-10, atol=1e-10)
    for layer, norm in folded.folded.items():
        torch.testing.assert_close(folded.outputs[layer].mean, net.get_submodule(norm).bias.data)
        torch.testing.assert_close(folded.outputs[layer].std, net.get_submodule(norm).weight.data.abs())


def test_a_norm_behind_two_layers_is_left_alone_with_a_note() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.bn = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

        def forward(self, x):
            return self.bn(self.b(self.bn(self.a(x))))

    net, x = shaken(Shared()), normal(2, 2, 4, 4)
    folded = fold_batch_norms(net, inspect_model(net, x).layers)
    assert norms(folded.model) == 1
    assert "bn cannot be folded into a" in folded.notes[0]
    assert torch.equal(folded.model(x), net(x))
