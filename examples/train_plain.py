"""Train a network in mixed precision in a plain PyTorch loop: three lines of mpsearch, the rest is yours.

python examples/train_plain.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import mpsearch


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


def train(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int, lr: float) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    return float((model.eval()(images).argmax(1) == labels).float().mean())


def main(epochs: int = 5) -> tuple[float, float, float]:
    """Accuracy on held-out images: float, quantized, quantized and trained."""
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train_set, held_out = (images[:1400], labels[:1400]), (images[1400:], labels[1400:])

    model = network()
    train(model, *train_set, epochs, lr=0.05)

    config = mpsearch.PrecisionConfig(  # or mpsearch.read_config("OUT"), what `mpsearch export` wrote
        {
            "0": mpsearch.LayerPrecision.parse("uniform:4", "uniform:8"),
            "4": mpsearch.LayerPrecision.parse("shift:3", "uniform:1"),
            "8": mpsearch.LayerPrecision.parse("uniform:1", "uniform:1"),
        }
    )
    quantized = mpsearch.prepare_for_training(model, config, images[:256])
    before = accuracy(quantized, *held_out)
    train(quantized, *train_set, epochs, lr=0.01)
    return accuracy(model, *held_out), before, accuracy(quantized, *held_out)


if __name__ == "__main__":
    print("float {:.3f}, quantized {:.3f}, quantized and trained {:.3f}".format(*main()))
