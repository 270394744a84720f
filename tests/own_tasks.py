"""Tasks that are no classifications, in the form in which people bring their own: `factory: own_tasks:denoising`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpsearch.task.task import Batch, Split

SEEDS = {"train": 0, "val": 1, "test": 2}


class Residual(nn.Module):
    """The input plus what two convolutions make of it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Own:
    """What the two tasks below share: a float network that is trained once, in a second."""

    name: str
    metric: str

    def network(self) -> nn.Module:
        raise NotImplementedError

    def samples(self, count: int, seed: int) -> Batch:
        raise NotImplementedError

    def loss(self, output: Any, target: Any) -> Tensor:
        raise NotImplementedError

    def float_model(self) -> nn.Module:
        model = self.network()
        model.load_state_dict(trained(type(self)))
        return model.eval()

    def train_batches(self, batch_size: int, steps: int, seed: int) -> Iterator[Batch]:
        for step in range(steps):
            yield self.samples(batch_size, 1000 * seed + step + 10)

    def calibration_input(self, samples: int, seed: int = 0) -> Tensor:
        return self.samples(samples, seed)[0]

    def steps_per_epoch(self, batch_size: int) -> int:
        return 4


class Denoising(Own):
    """Noise off pictures of waves: PSNR, more is better."""

    name, metric = "waves", "psnr"

    def network(self) -> nn.Module:
        return Residual()

    def samples(self, count: int, seed: int) -> Batch:
        random = torch.Generator().manual_seed(seed)
        across = torch.linspace(0, 6, 8).reshape(1, 8) + torch.linspace(0, 6, 8).reshape(8, 1)
        clean = 0.5 + 0.4 * torch.sin(across + 6 * torch.rand(count, 1, 1, 1, generator=random))
        return clean + 0.1 * torch.randn(clean.shape, generator=random), clean

    def loss(self, output: Any, target: Any) -> Tensor:
        return F.mse_loss(output, target)

    def logits(self, output: Any) -> Tensor:
        return output.flatten(1)  # type: ignore[no-any-return]

    def evaluate(self, model: nn.Module, split: Split) -> float:
        x, clean = self.samples(64, SEEDS[split])
        return float((-10 * (model(x) - clean).square().mean(dim=(1, 2, 3)).log10()).mean())


class Tokens(Own):
    """The next of eight tokens, where each follows from the one before: perplexity, less is better."""

    name, metric = "tokens", "perplexity"

    def network(self) -> nn.Module:
        return nn.Sequential(nn.Embedding(8, 16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))

    def samples(self, count: int, seed: int) -> Batch:
        random = torch.Generator().manual_seed(seed)
        tokens = torch.randint(8, (count, 1), generator=random)
        for _ in range(6):
            jump = (torch.rand(count, 1, generator=random) < 0.2).long()
            tokens = torch.cat([tokens, (3 * tokens[:, -1:] + 1 + jump) % 8], dim=1)
        return tokens[:, :-1], tokens[:, 1:]

    def loss(self, output: Any, target: Any) -> Tensor:
        return F.cross_entropy(output.flatten(0, 1), target.flatten())

    def logits(self, output: Any) -> Tensor:
        return output.flatten(0, 1)  # type: ignore[no-any-return]

    def evaluate(self, model: nn.Module, split: Split) -> float:
        x, y = self.samples(64, SEEDS[split])
        return math.exp(float(self.loss(model(x), y)))


@cache
def trained(kind: type[Own]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    task = kind()
    model = task.network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for x, target in task.train_batches(32, 150, seed=5):
        optimizer.zero_grad()
        task.loss(model(x), target).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.state_dict()


def denoising() -> Denoising:
    return Denoising()


def tokens() -> Tokens:
    return Tokens()
