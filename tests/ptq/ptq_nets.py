"""Small networks for the PTQ tests, with BatchNorm statistics that fold into something visible."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def shaken(model: nn.Module, seed: int = 0) -> nn.Module:
    """`model` in eval mode and float64, its BatchNorms with random statistics and parameters."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor, low in ((module.weight.data, 0.3), (module.running_var, 0.3), (module.running_mean, -1.0)):
                tensor.uniform_(low, 1.5, generator=generator)
            module.bias.data.uniform_(-1.0, 1.0, generator=generator)
    return model.eval().double()


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class InvertedResidual(nn.Module):
    """MobileNetV2's block: expand, depthwise, project, and a shortcut."""

    def __init__(self, channels: int, width: int, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.expand = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = act()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.act2 = act()
        self.project = nn.Conv2d(width, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.expand(x)))
        y = self.act2(self.bn2(self.depthwise(y)))
        return x + self.bn3(self.project(y))


class MobileNet(nn.Module):
    """A small MobileNetV2 for 8x8 images."""

    def __init__(self, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(12)
        self.act = act()
        self.block1 = InvertedResidual(12, 36, act)
        self.block2 = InvertedResidual(12, 36, act)
        self.fc = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.block1(self.act(self.bn(self.stem(x)))))
        return self.fc(x.mean(dim=(2, 3)))


@torch.no_grad()
def scale_badly(block: InvertedResidual, seed: int = 0) -> None:
    """Rescale the hidden channels by factors from 1/100 to 100, taken back behind the ReLU: the function stays."""
    generator = torch.Generator().manual_seed(seed)
    for norm, second, shape in ((block.bn1, block.depthwise, (-1, 1, 1, 1)), (block.bn2, block.project, (1, -1, 1, 1))):
        s = 10 ** (4 * torch.rand(norm.num_features, generator=generator) - 2).to(norm.weight)
        norm.weight.mul_(s)
        norm.bias.mul_(s)
        second.weight.div_(s.view(shape))
