"""Networks that sensitivities are measured on, and search spaces for them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mpsearch.graph.facts import LayerInfo
from mpsearch.graph.layers import inspect_model
from mpsearch.space.build import build_space
from mpsearch.space.space import SearchSpace
from mpsearch.space.spec import parse_space


class Residual(nn.Module):
    """A shortcut with a convolution of its own, updates in place as torchvision has them, and a layer run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.conv1 = nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.down = nn.Conv2d(8, 8, 1, stride=2)  # of fewer than 8 channels torch 2.12's AVX2 gradient writes too far
        self.relu = nn.ReLU(inplace=True)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        y = self.bn(self.conv1(x))
        y += self.down(x)
        y = self.relu(y)
        y = F.relu(self.twice(F.relu(self.twice(y))))
        return self.fc(y.mean(dim=(2, 3)))


class Branching(Residual):
    """The same, with control flow that depends on data: torch.fx cannot trace it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() < 1e9 else self.fc(x.flatten(1)[:, :8])


def space_of(layers: tuple[LayerInfo, ...], *choices: str, **more: object) -> SearchSpace:
    rule = {"match": "*", "weight": list(choices), "activation": list(choices)}
    return build_space(
        parse_space({"name": "test", "rules": [rule], "first": "search", "last": "search", **more}), layers
    )


def inspected(model: nn.Module, x: Tensor) -> tuple[LayerInfo, ...]:
    return inspect_model(model, x).layers
