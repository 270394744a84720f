"""MHAQ's networks for super-resolution and detection as tasks of a study, from a checkout of it.

`task: {factory: "benchmarks.mhaq_tasks:rfdn", args: {root: CHECKOUT}}`, from the folder that holds `benchmarks`. Only
the files of the network are imported, under a name of ours: MHAQ's requirements (Lightning, ...) need not be installed.

Images are crops of the two photographs that scikit-learn brings (china and flower, 427 x 640): train is cut from the
left 60 % of each, val from the next 20 %, test from the right 20 %. That is enough to tell configs apart, and too
little to judge a network by.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpsearch.errors import TaskError
from mpsearch.metric import Metric
from mpsearch.task.checkpoint import load_checkpoint
from mpsearch.task.task import Batch, Split
from mpsearch.train import reestimate_batch_norm

WHITE = 255.0
SHARES: Mapping[Split, tuple[float, float]] = {"train": (0.0, 0.6), "val": (0.6, 0.8), "test": (0.8, 1.0)}
"""The part of a photograph's width that each split is cut from."""

RFDN_FOLDER, RFDN_CHECKPOINT = "src/models/sr/rfdn", "data/models/RFDN_AIM.pth"
YOLO_FOLDER = "src/models/od"

SATURATED = 2.0**-23
"""Probabilities nearer to 0 or 1 count as this near: float32 holds no others below 1, and random weights reach 1."""

RELATIVE_ERROR = Metric("relative_error", "minimize", "%", ".2f", (0.0, float("inf")))
"""Distance from the float network's outputs over their own spread, root mean square: 0 where both are equal, 1 (100 %)
where the outputs say nothing that the float network's mean over the images does not say."""


def rfdn(
    root: str | None = None, checkpoint: str = RFDN_CHECKPOINT, scale: int = 4, side: int = 24, samples: int = 24
) -> Upscaling:
    """RFDN (arXiv 2009.11551) with the weights that the checkout brings; PSNR of RGB patches, in dB.

    Args:
        root: a checkout of MHAQ.
        checkpoint: a state dict of RFDN; a relative path is from `root`.
        scale: how much wider the answers are than the patches; that of the weights.
        side: pixels of a small patch's side, at least 15.
        samples: patches of val, and of test.

    Raises:
        TaskError: no checkout, no such weights, or patches too small for the network's pooling.
    """
    module = load_package(root, RFDN_FOLDER)
    path = Path(root or "") / checkpoint
    if path.is_file() and path.read_bytes()[:8] == b"version ":
        raise TaskError(f"{path} is a pointer of Git LFS: run `git lfs pull` there, or give another checkpoint")
    if side < 15:
        raise TaskError(f"side is {side}: RFDN pools 7 pixels of half the side, give 15 or more")
    model = module.RFDN(scale=scale)
    load_checkpoint(model, path)
    return Upscaling("RFDN", model, scale, side, samples)


def yolo11n(root: str | None = None, side: int = 128, samples: int = 24, classes: int = 80, seed: int = 0) -> Agreement:
    """YOLO11-n with random weights; the score is the relative error of its outputs, and there are no labels.

    Statistics of BatchNorm are those of the photographs, so that a signal gets through the random layers.

    Args:
        root: a checkout of MHAQ.
        side: pixels of a crop's side, a multiple of 32.
        samples: crops of val, and of test.
        classes: that the network tells apart.
        seed: of the weights.

    Raises:
        TaskError: no checkout, or a side that the network cannot halve five times.
    """
    if side % 32:
        raise TaskError(f"side is {side}: YOLO halves it five times, give a multiple of 32")
    module = load_package(root, YOLO_FOLDER)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = module.yolo_v11_n(classes)
    return Agreement("YOLO11-n with random weights", model, side, samples)


def load_package(root: str | None, folder: str) -> ModuleType:
    """A folder of a checkout as a package, under a name that no other folder has; imported once.

    Raises:
        TaskError: no checkout was given, or it has no such folder.
    """
    if not root:
        raise TaskError("root is missing: give a checkout of github.com/aifoundry-org/MHAQ, task.args.root=PATH")
    path = (Path(root).expanduser() / folder).resolve()
    init = path / "__init__.py"
    if not init.is_file():
        raise TaskError(f"root is '{root}', which has no {folder}/__init__.py: give the top folder of a checkout")
    name = f"mhaq_{path.name}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, init, submodule_search_locations=[str(path)])
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


@cache
def photographs() -> tuple[Tensor, ...]:
    """scikit-learn's sample images, each `(3, 427, 640)` uint8."""
    from sklearn.datasets import load_sample_images

    return tuple(torch.tensor(image).permute(2, 0, 1) for image in load_sample_images().images)


def crops(split: Split, count: int, side: int, seed: int) -> Tensor:
    """`count` squares of a split's part of the photographs, in turn, at random places: `(n, 3, side, side)`, 0..255."""
    random = torch.Generator().manual_seed(seed)
    images = photographs()
    squares = []
    for index in range(count):
        image = images[index % len(images)]
        left, right = (round(share * image.shape[2]) for share in SHARES[split])
        if side > min(image.shape[1], right - left):
            raise TaskError(f"a crop of {side} pixels is larger than {split}'s part of a photo, {right - left} wide")
        y = int(torch.randint(image.shape[1] - side + 1, (), generator=random))
        x = left + int(torch.randint(right - left - side + 1, (), generator=random))
        squares.append(image[:, y : y + side, x : x + side])
    return torch.stack(squares).float()


class Photographs(ABC):
    """What the tasks below share: a network, and how often each split of the photographs is cut."""

    def __init__(self, name: str, model: nn.Module, samples: int) -> None:
        self.name, self.samples = f"{name} on photographs", samples
        self._model = model

    @abstractmethod
    def batch(self, split: Split, count: int, seed: int) -> Batch:
        """Model input and target of `count` crops."""

    def float_model(self) -> nn.Module:
        return copy.deepcopy(self._model).eval()

    def train_batches(self, batch_size: int, steps: int, seed: int) -> Iterator[Batch]:
        for step in range(steps):
            yield self.batch("train", batch_size, seed * 100_000 + step + 1)

    def calibration_input(self, samples: int, seed: int = 0) -> Tensor:
        return self.batch("train", samples, seed)[0]  # type: ignore[no-any-return]

    def steps_per_epoch(self, batch_size: int) -> int:
        """There is no end of random crops: 512 of them count as an epoch."""
        return max(1, 512 // batch_size)


class Upscaling(Photographs):
    """Super-resolution: patches made smaller by a bicubic filter are made large again; colors from 0 to 255.

    The score is the mean of the patches' PSNR, over all pixels and the three colors. Patches differ widely: what is out
    of focus reaches 50 dB whoever makes it large, a roof 18. So compare scores with `bicubic`, not with other papers'.
    """

    metric = "psnr"

    def __init__(self, name: str, model: nn.Module, scale: int, side: int, samples: int) -> None:
        super().__init__(name, model, samples)
        self.scale, self.side = scale, side

    def batch(self, split: Split, count: int, seed: int) -> Batch:
        """Small patches `(n, 3, side, side)` and large ones, `scale` times as wide."""
        large = crops(split, count, self.scale * self.side, seed)
        small = F.interpolate(large, size=(self.side, self.side), mode="bicubic", antialias=True)
        return small.clamp(0, WHITE).round(), large

    def evaluate(self, model: nn.Module, split: Split) -> float:
        """The mean of the patches' PSNR, dB, of answers in the 8 bits of an image."""
        x, large = self.batch(split, self.samples, seed=0)
        return psnr(model(x.to(next(model.parameters()).device)).cpu(), large)

    def bicubic(self, split: Split) -> float:
        """What a bicubic filter scores: the least that a network is for, dB."""
        x, large = self.batch(split, self.samples, seed=0)
        return psnr(F.interpolate(x, size=large.shape[2:], mode="bicubic"), large)

    def loss(self, output: Any, target: Any) -> Tensor:
        """L1, of colors from 0 to 1."""
        return F.l1_loss(output, target) / WHITE

    def logits(self, output: Any) -> Tensor:
        """Nothing is classified: what this gives is refused where a study would distil."""
        return output  # type: ignore[no-any-return]


def psnr(answers: Tensor, images: Tensor) -> float:
    """The mean over images `(n, c, h, w)` of 8 bits of each one's peak signal-to-noise ratio, dB; 100 if equal."""
    error = ((answers.clamp(0, WHITE).round() - images) / WHITE).square().mean(dim=(1, 2, 3))
    return float(-10 * error.clamp(min=1e-10).log10().mean())


class Agreement(Photographs):
    """Detection without labels: how close the outputs are to those of the float network."""

    metric = RELATIVE_ERROR

    def __init__(self, name: str, model: nn.Module, side: int, samples: int) -> None:
        super().__init__(name, model, samples)
        self.side = side
        reestimate_batch_norm(model, self.train_batches(16, 2, seed=0))
        self._expected: dict[Split, tuple[Tensor, ...]] = {}

    def batch(self, split: Split, count: int, seed: int) -> Batch:
        """Crops `(n, 3, side, side)`, colors from 0 to 1, twice: there are no labels."""
        x = crops(split, count, self.side, seed) / WHITE
        return x, x

    def evaluate(self, model: nn.Module, split: Split) -> float:
        """The relative error, boxes and classes counting alike."""
        if split not in self._expected:
            self._expected[split] = self._parts(self.float_model(), split)
        ratios = [
            (actual - expected).square().sum() / (expected - expected.mean(dim=0)).square().sum()
            for actual, expected in zip(self._parts(model, split), self._expected[split], strict=True)
        ]
        return float(torch.stack(ratios).mean().sqrt())

    def _parts(self, model: nn.Module, split: Split) -> tuple[Tensor, ...]:
        """Boxes `(n, 4, anchors)` in pixels, and logits of classes `(n, classes, anchors)`; float64."""
        x, _ = self.batch(split, self.samples, seed=0)
        output = model(x.to(next(model.parameters()).device)).cpu().double()
        return output[:, :4], output[:, 4:].logit(eps=SATURATED)

    def loss(self, output: Any, target: Any) -> Tensor:
        raise TaskError(f"{self.name} has no labels: leave trial.distill true")

    def logits(self, output: Any) -> Tensor:
        """Logits of classes, `(n * anchors, classes)`; in train mode the network gives a raw map for each stride."""
        if isinstance(output, Tensor):  # 4 numbers of the box, then probabilities
            return output[:, 4:].transpose(1, 2).flatten(0, 1).logit(eps=SATURATED)
        return torch.cat([level[:, 64:].flatten(2).transpose(1, 2) for level in output], dim=1).flatten(0, 1)
