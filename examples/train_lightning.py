"""The same under Lightning (`pip install lightning`): the LightningModule does not know that its network is quantized.

python examples/train_lightning.py
"""

from __future__ import annotations

import lightning
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from train_plain import network

import mpsearch


class Classifier(lightning.LightningModule):
    """A network with a loss and an optimizer."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        super().__init__()
        self.model, self.lr = model, lr

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        images, labels = batch
        return F.cross_entropy(self.model(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def main(epochs: int = 5) -> float:
    """Accuracy of the quantized network on held-out images."""
    lightning.seed_everything(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    loader = DataLoader(TensorDataset(images[:1400], labels[:1400]), batch_size=64, shuffle=True)

    def fit(model: nn.Module, lr: float) -> None:
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
        )
        trainer.fit(Classifier(model, lr), loader)

    model = network()
    fit(model, lr=0.05)
    config = mpsearch.PrecisionConfig.uniform(["0", "4", "8"], mpsearch.LayerPrecision.shorthand("w3a4"))
    quantized = mpsearch.prepare_for_training(model, config, images[:256])
    fit(quantized, lr=0.01)
    with torch.no_grad():
        return float((quantized.eval()(images[1400:]).argmax(1) == labels[1400:]).float().mean())


if __name__ == "__main__":
    print(f"quantized and trained {main():.3f}")
