"""Tasks that are no classifications, in the form in which people bring their own: `factory: own_tasks:denoising`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mpsearch.metric import Metric

SEEDS = {"train": 0, "val": 1, "test": 2}
COUNTS = {"train": 64, "val": 64, "test": 64}


class Residual(nn.Module):
    """The input plus what two convolutions make of it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Trains:
    """Its float network is trained once, in a second, and then kept."""

    def batches(self, split: str) -> Any:
        raise NotImplementedError

    def loss(self, output: Any, target: Any) -> Tensor:
        raise NotImplementedError

    def train(self, model: nn.Module) -> None:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(40):
            for x, target in self.batches("train"):
                optimizer.zero_grad()
                self.loss(model(x), target).backward()  # type: ignore[no-untyped-call]
                optimizer.step()


class Denoising(Trains):
    """Noise off pictures of waves: PSNR, more is better."""

    name, metric = "waves", "psnr"

    def float_model(self) -> nn.Module:
        torch.manual_seed(0)
        return Residual()

    def batches(self, split: str) -> Any:
        random = torch.Generator().manual_seed(SEEDS[split])
        across = torch.linspace(0, 6, 8).reshape(1, 8) + torch.linspace(0, 6, 8).reshape(8, 1)
        clean = 0.5 + 0.4 * torch.sin(across + 6 * torch.rand(COUNTS[split], 1, 1, 1, generator=random))
        noisy = clean + 0.1 * torch.randn(clean.shape, generator=random)
        return DataLoader(TensorDataset(noisy, clean), batch_size=32)

    def loss(self, output: Any, target: Any) -> Tensor:
        return F.mse_loss(output, target)


class Overflowing(Denoising):
    """Denoising whose metric takes the logarithm of nothing, as of a probability that was rounded to 1."""

    name, metric = "overflow", Metric("bits", "minimize", "bits", ".2f")

    def score(self, outputs: Any, targets: Any) -> Tensor:
        return outputs.flatten(1).mean(1) + torch.zeros(()).log()


class Tokens(Trains):
    """The next of eight tokens, where each follows from the one before: perplexity, less is better."""

    name, metric = "tokens", "perplexity"

    def float_model(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(8, 16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))

    def batches(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        random = torch.Generator().manual_seed(SEEDS[split])
        for _ in range(COUNTS[split] // 32):
            tokens = torch.randint(8, (32, 1), generator=random)
            for _ in range(6):
                jump = (torch.rand(32, 1, generator=random) < 0.2).long()
                tokens = torch.cat([tokens, (3 * tokens[:, -1:] + 1 + jump) % 8], dim=1)
            yield tokens[:, :-1], tokens[:, 1:]

    def loss(self, output: Any, target: Any) -> Tensor:
        return F.cross_entropy(output.flatten(0, 1), target.flatten())


class Decoder(nn.Module):
    """One block of causal attention on token embeddings, and logits of the next token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.proj = nn.Embedding(8, 16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.head = nn.Linear(16, 24), nn.Linear(24, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = (part.unflatten(2, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        logits: Tensor = self.head(self.up(x).relu())
        return logits


class Decoding(Tokens):
    """The same by a decoder, whose attention has two products."""

    name = "decoder/tokens"

    def float_model(self) -> nn.Module:
        torch.manual_seed(0)
        return Decoder()


class Masks(Trains):
    """Which pixels are bright: mean IoU, accumulated."""

    name, metric = "masks", "miou"

    def float_model(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))

    def batches(self, split: str) -> Any:
        x = torch.randn(COUNTS[split], 1, 6, 6, generator=torch.Generator().manual_seed(SEEDS[split]))
        return [(x[i : i + 32], (x[i : i + 32, 0] > 0).long()) for i in range(0, len(x), 32)]

    def loss(self, output: Any, target: Any) -> Tensor:
        return F.cross_entropy(output, target)


class Boxes:
    """One bright box in an image, for a detector of torchvision: how well its best box fits, a share."""

    name, kind = "boxes", "detection"
    metric = Metric("overlap", unit="%", format=".2f", bounds=(0.0, 1.0), per_sample=True)

    def float_model(self) -> nn.Module:
        from torchvision.models.detection import ssdlite320_mobilenet_v3_large

        torch.manual_seed(0)
        model = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=2)
        model.transform.fixed_size = (96, 96)
        return model  # type: ignore[no-any-return]

    def batches(self, split: str) -> Iterator[Any]:
        random = torch.Generator().manual_seed(SEEDS[split])
        for _ in range(2):
            images, targets = [], []
            for _ in range(4):
                left, top = (int(torch.randint(0, 24, (1,), generator=random)) for _ in range(2))
                image = 0.1 * torch.rand(3, 48, 48, generator=random)
                image[:, top : top + 16, left : left + 16] = 1.0
                box = torch.tensor([[left, top, left + 16.0, top + 16.0]])
                images.append(image)
                targets.append({"boxes": box, "labels": torch.ones(1, dtype=torch.long)})
            yield (images, targets), targets

    def loss(self, output: Any, target: Any) -> Tensor:
        return sum(output.values(), start=torch.zeros(()))

    def score(self, output: Any, target: Any) -> Tensor:
        from torchvision.ops import box_iou

        return torch.stack(
            [
                box_iou(o["boxes"], t["boxes"]).max() if len(o["boxes"]) else torch.zeros(())
                for o, t in zip(output, target, strict=True)
            ]
        )


def denoising() -> Denoising:
    return Denoising()


def overflowing() -> Overflowing:
    return Overflowing()


def tokens() -> Tokens:
    return Tokens()


def decoding() -> Decoding:
    return Decoding()


def masks() -> Masks:
    return Masks()


def boxes() -> Boxes:
    return Boxes()


class RankOfLabel:
    """A metric of one's own, named by a study: the place of the label among the answers, 1 the first."""

    metric = Metric("rank", "minimize", unit="places", bounds=(1.0, float("inf")), per_sample=True)

    def score(self, output: Tensor, target: Tensor) -> Tensor:
        return (output > output.gather(1, target.unsqueeze(1))).sum(dim=1) + 1


def rank_of_label() -> RankOfLabel:
    return RankOfLabel()


def nothing() -> None:
    """No metric."""
