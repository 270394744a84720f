"""Super-resolution: squares of images, made smaller, and the network that makes them large again; PSNR of [0, 1]."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mpsearch.cache import content_key
from mpsearch.errors import TaskError
from mpsearch.files import with_home
from mpsearch.shipped import where
from mpsearch.study import PatchesSpec, TaskSpec
from mpsearch.task.comparing import output_tensor
from mpsearch.task.imagefolder import SUFFIXES, split_of
from mpsearch.task.images import open_rgb
from mpsearch.task.libraries import Needs
from mpsearch.task.made import halved, photographs, tiles
from mpsearch.task.own import OwnTask
from mpsearch.task.splitting import divided
from mpsearch.task.study_task import StudyTask
from mpsearch.task.task import Split


class Squares(Dataset[tuple[Tensor, Tensor]]):
    """Squares `(n, 3, side, side)` uint8 and the same made smaller."""

    def __init__(self, squares: Tensor, scale: int, flip: bool) -> None:
        self.large, self.small, self._flip = squares, halved(squares, scale), flip

    def __len__(self) -> int:
        return len(self.large)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """The small one and the large one, float32 in [0, 1]."""
        pair = self.small[index].float() / 255, self.large[index].float() / 255
        if self._flip and torch.rand(()) < 0.5:
            return pair[0].flip(-1), pair[1].flip(-1)
        return pair


class PatchesTask(StudyTask):
    """The large square from the small one: mean absolute error, PSNR."""

    def __init__(self, spec: TaskSpec, name: str, key: str, samples: Mapping[Split, Squares]) -> None:
        self._samples = samples
        _, height, width = samples["train"].small.shape[1:]
        super().__init__(spec, name, key, Needs("regression", channels=3, size=(height, width)))

    def batches(self, split: Split) -> Iterable[Any]:
        """As `StudyTask.batches`: small and large squares, float32 in [0, 1]."""
        return DataLoader(self._samples[split], batch_size=16)

    def loss(self, output: Any, target: Any) -> Tensor:
        """The mean absolute error, by which networks for larger images train sharper than by the squared one."""
        return F.l1_loss(output_tensor(output), target)

    def fits(self, output: Any) -> bool:
        """As `StudyTask.fits`."""
        large = output_tensor(output)
        return isinstance(large, Tensor) and large.shape == (1, *self._samples["train"].large.shape[1:])

    def expected(self) -> str:
        """As `StudyTask.expected`."""
        return f"{(1, *self._samples['train'].large.shape[1:])}, the larger image"

    def float_batch(self) -> int:
        """As `StudyTask.float_batch`."""
        return 16


def patches_task(spec: TaskSpec, workers: int | None = None) -> OwnTask:
    """The task of a study whose data are squares of images.

    Raises:
        TaskError: there are no images or too small ones, or the network does not fit; the message names them.
    """
    data = spec.data
    assert isinstance(data, PatchesSpec)
    name, parts = _images(data)
    squares = {
        split: [square for image in images for square in tiles(image, data.side)] for split, images in parts.items()
    }
    splits = divided(data, squares, f"squares of {data.side} pixels")
    samples = {
        split: Squares(torch.stack(part), data.scale, data.augment and split == "train")
        for split, part in splits.items()
    }
    digests = {split: hashlib.sha256(part.large.numpy().data).hexdigest() for split, part in samples.items()}
    key = content_key("patches", digests, data.model_dump(mode="json", exclude={"root"}))
    return PatchesTask(spec, name, key, samples).task()


def _images(data: PatchesSpec) -> tuple[str, Mapping[Split, list[Tensor]]]:
    """What the images are called, and those of each split; `train` where they have none."""
    if data.root is None:
        return "photographs", {"train": photographs()}
    root = with_home(data.root)
    if not root.is_dir():
        raise TaskError(f"task.data.root: no folder {where(root)}: give the folder with images")
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES)
    meant = {path: split_of(path.relative_to(root)) for path in paths}
    if not paths:
        raise TaskError(f"task.data.root: '{root}' holds no image: expected {' '.join(SUFFIXES)}")
    if any(meant.values()) and (odd := [path.name for path, split in meant.items() if split is None]):
        raise TaskError(f"task.data.root: '{root}' holds splits and also {', '.join(odd[:3])}: put each into a split")
    parts: dict[Split, list[Tensor]] = {}
    for path, split in meant.items():
        pixels = torch.from_numpy(np.array(open_rgb(path))).permute(2, 0, 1)
        parts.setdefault(split or "train", []).append(pixels)
    return root.resolve().name, parts
