"""Images with a class for each pixel: `ROOT/images/*` and `ROOT/masks/*`, whole or with a folder for each split.

A mask is a picture of one channel, grey or of a palette, as large as its image; the value of a pixel is the number of
its class, and a value that is no class's, 255 say, is not counted. Folders of splits lie above the two
(`train/images`), or below them (`images/train`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
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
from mpsearch.study import MasksSpec, TaskSpec
from mpsearch.task.cache import cached_tensors
from mpsearch.task.comparing import output_tensor
from mpsearch.task.imagefolder import SUFFIXES, split_meant
from mpsearch.task.images import Normalization, open_rgb
from mpsearch.task.libraries import Needs
from mpsearch.task.own import OwnTask
from mpsearch.task.samples import MOST_BYTES
from mpsearch.task.scores import resized
from mpsearch.task.splitting import divided
from mpsearch.task.study_task import StudyTask
from mpsearch.task.task import Split

DECODER = 1  # raise when reading changes: entries of the cache are made again
IGNORED = 255
AUXILIARY = 0.4  # weight of a second head's loss, as torchvision's networks have one (PSPNet, arXiv 1612.01105)
IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

Pair = tuple[Path, Path]  # image, mask


class MasksTask(StudyTask):
    """Segmentation: cross-entropy over pixels, mean IoU."""

    def __init__(self, spec: TaskSpec, name: str, key: str, samples: Mapping[Split, Pairs], classes: int) -> None:
        self._samples = samples
        channels, height, width = samples["train"].shape
        super().__init__(spec, name, key, Needs("segmentation", classes, channels, (height, width)))

    def batches(self, split: Split) -> Iterable[Any]:
        """As `StudyTask.batches`: images `(n, c, h, w)` float32, classes `(n, h, w)` int64."""
        return DataLoader(self._samples[split], batch_size=16)

    def loss(self, output: Any, target: Any) -> Tensor:
        """The mean cross-entropy of the pixels that have a class, with that of a second head where there is one."""
        loss = _cross_entropy(output_tensor(output), target)
        if isinstance(output, Mapping) and "aux" in output:
            return loss + AUXILIARY * _cross_entropy(output["aux"], target)
        return loss

    def fits(self, output: Any) -> bool:
        """As `StudyTask.fits`."""
        logits = output_tensor(output)
        return isinstance(logits, Tensor) and logits.dim() == 4 and logits.shape[:2] == (1, self.needs.classes)

    def expected(self) -> str:
        """As `StudyTask.expected`."""
        return f"(1, {self.needs.classes}, height, width) for the {self.needs.classes} classes"

    def float_batch(self) -> int:
        """As `StudyTask.float_batch`."""
        return 16


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(resized(logits, target), target, ignore_index=IGNORED)


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """Images and masks: from memory, or from files one by one."""

    def __init__(self, pixels: Any, masks: Any, normalize: Normalization, flip: bool) -> None:
        """`pixels[i]` is `(c, h, w)` uint8 and `masks[i]` `(h, w)` uint8."""
        self._pixels, self._masks, self._normalize, self._flip = pixels, masks, normalize, flip
        self.shape: tuple[int, int, int] = tuple(pixels[0].shape)

    def __len__(self) -> int:
        return len(self._masks)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, mask = self._normalize(self._pixels[index].unsqueeze(0))[0], self._masks[index].long()
        if self._flip and torch.rand(()) < 0.5:
            return x.flip(-1), mask.flip(-1)
        return x, mask


class _Read(Sequence[Tensor]):
    """Files that are read as they are needed."""

    def __init__(self, paths: Sequence[Path], read: Any) -> None:
        self._paths, self._read = paths, read

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: Any) -> Any:
        return torch.from_numpy(self._read(self._paths[index]))


def masks_task(spec: TaskSpec, workers: int | None = None) -> OwnTask:
    """The task of a study whose data are masks.

    Raises:
        TaskError: files are missing or no masks, or the network does not fit; the message names them.
    """
    data = spec.data
    assert isinstance(data, MasksSpec)
    return (_digit_masks if data.kind == "digit_masks" else _from_folders)(spec, data).task()


def _from_folders(spec: TaskSpec, data: MasksSpec) -> MasksTask:
    root = with_home(data.root or "")
    splits = divided(data, list_pairs(root, data.images, data.masks), "images")
    pairs = [pair for split in splits.values() for pair in split]
    side = data.image_size
    height, width = (side, side) if side else _read_image(pairs[0][0], None).shape[1:]
    table = _table(data.mask_values)
    stats = [
        (os.path.relpath(path, root), os.stat(path).st_size, os.stat(path).st_mtime_ns) for p in pairs for path in p
    ]
    facts = data.model_dump(mode="json", exclude={"root", "mean", "std", "augment"})
    key = content_key(DECODER, facts, stats)

    def image(path: Path) -> np.ndarray[Any, Any]:
        return _sized(_read_image(path, side), path, (height, width))

    def mask(path: Path) -> np.ndarray[Any, Any]:
        return _sized(_read_mask(path, side, table), path, (height, width))

    def make() -> dict[str, Tensor]:
        made = {"pixels": torch.empty(len(pairs), 3, height, width, dtype=torch.uint8)}
        made["masks"] = torch.empty(len(pairs), height, width, dtype=torch.uint8)
        for i, (one, other) in enumerate(pairs):
            made["pixels"][i], made["masks"][i] = torch.from_numpy(image(one)), torch.from_numpy(mask(other))
        return made

    if len(pairs) * 4 * height * width <= MOST_BYTES:
        tensors, _ = cached_tensors(f"masks-{key}", make)
        pixels: Tensor | None = tensors["pixels"]
        masks: Tensor | None = tensors["masks"]
        assert masks is not None
        top = int(masks[masks != IGNORED].max()) if bool((masks != IGNORED).any()) else 0
    else:
        pixels, masks = None, None
        top = max(int(m[m != IGNORED].max(initial=0)) for m in map(mask, (other for _, other in pairs[:1000])))
    classes = _classes(spec, top + 1, data)
    normalize = Normalization(data.mean or IMAGENET.mean, data.std or IMAGENET.std)
    samples: dict[Split, Pairs] = {}
    start = 0
    for split, mine in splits.items():
        part = slice(start, start + len(mine))
        start += len(mine)
        samples[split] = Pairs(
            _Read([one for one, _ in mine], image) if pixels is None else pixels[part],
            _Read([other for _, other in mine], mask) if masks is None else masks[part],
            normalize,
            data.augment and split == "train",
        )
    return MasksTask(
        spec, root.resolve().name, content_key(key, data.model_dump(mode="json", exclude={"root"})), samples, classes
    )


def _classes(spec: TaskSpec, there: int, data: MasksSpec) -> int:
    classes = spec.num_classes or (len(data.mask_values) if data.mask_values else there)
    if classes < there:
        raise TaskError(f"task.num_classes: got {classes}, the masks have the classes 0 to {there - 1}: give as many")
    if classes < 2:
        raise TaskError(
            f"task.data: no mask of '{data.root}' has a class above 0 (255 is not counted): the value of a pixel is "
            "the number of its class; of masks in black and white say so with mask_values: [0, 255]"
        )
    return classes


def list_pairs(root: Path, images: str, masks: str) -> dict[Split, list[Pair]]:
    """The images of a folder with their masks, by split; `train` where the folder has no splits.

    Raises:
        TaskError: the folder is of another layout, or an image has no mask.
    """
    if not root.is_dir():
        raise TaskError(f"task.data.root: no folder {where(root)}: give the folder that holds {images}/ and {masks}/")
    below = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    folders: dict[Split, Pair] = {}
    if images in below and masks in below:
        inside = sorted(p.name for p in (root / images).iterdir() if p.is_dir())
        for name in inside:
            if meant := split_meant(name):
                folders[meant] = root / images / name, root / masks / name
        folders = folders or {"train": (root / images, root / masks)}
    else:
        for name in below:
            if (meant := split_meant(name)) and (root / name / images).is_dir():
                folders[meant] = root / name / images, root / name / masks
    if not folders:
        raise TaskError(
            f"'{root}' holds {', '.join(below[:8]) or 'no folder'}: expected {images}/ and {masks}/, or "
            f"train/{images}/ and train/{masks}/; other names are given as task.data.images and task.data.masks"
        )
    return {split: _paired(*pair) for split, pair in folders.items()}


def _paired(images: Path, masks: Path) -> list[Pair]:
    if not masks.is_dir():
        raise TaskError(f"task.data: no folder {where(masks)} with the masks of '{images}'")
    by_stem = {path.stem: path for path in sorted(masks.rglob("*")) if path.suffix.lower() in SUFFIXES}
    found = [path for path in sorted(images.rglob("*")) if path.suffix.lower() in SUFFIXES]
    if missing := [path for path in found if path.stem not in by_stem]:
        raise TaskError(
            f"{len(missing)} of the {len(found)} images in '{images}' have no mask in '{masks}', the first is "
            f"'{missing[0].name}': expected {missing[0].stem}.png there"
        )
    if not found:
        raise TaskError(f"'{images}' holds no image: expected {' '.join(SUFFIXES)}")
    return [(path, by_stem[path.stem]) for path in found]


def _read_image(path: Path, side: int | None) -> np.ndarray[Any, Any]:
    image = open_rgb(path)
    if side:
        image = image.resize((side, side))
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _read_mask(path: Path, side: int | None, table: np.ndarray[Any, Any] | None) -> np.ndarray[Any, Any]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            if image.mode not in ("L", "P", "1"):
                raise TaskError(
                    f"mask '{path}' is of mode {image.mode}: expected one channel of 8 bits (L or P), whose values are "
                    "the numbers of the classes"
                )
            plain = image.convert("L") if image.mode == "1" else image
            values = np.array(plain.resize((side, side), Image.Resampling.NEAREST) if side else plain)
    except (OSError, SyntaxError, ValueError) as error:
        raise TaskError(f"mask '{path}' cannot be read: {error}; repair or remove it") from None
    return values if table is None else table[values]


def _sized(values: np.ndarray[Any, Any], path: Path, size: tuple[int, int]) -> np.ndarray[Any, Any]:
    if values.shape[-2:] != size:
        height, width = values.shape[-2:]
        raise TaskError(
            f"'{path}' is {width}x{height} (width x height) and the first image {size[1]}x{size[0]}: a mask is as "
            "large as its image; of images of several sizes set task.data.image_size"
        )
    return values


def _table(values: Sequence[int] | None) -> np.ndarray[Any, Any] | None:
    """Value in a mask -> class, IGNORED for all that are none."""
    if values is None:
        return None
    if min(values) < 0 or max(values) > 255:
        raise TaskError(f"task.data.mask_values: got {list(values)}, the values of a mask go from 0 to 255")
    table = np.full(256, IGNORED, dtype=np.uint8)
    table[list(values)] = np.arange(len(values))
    return table


# ------------------------------------------------------------------------------------------------ digits on a ground

DIGIT_MASKS = 1  # raise when the pictures change
DIGIT_COUNTS: Mapping[Split, int] = {"train": 1200, "val": 300, "test": 297}  # all 1,797 digits, each in one picture
DIGIT_SIDE = 32


def _digit_masks(spec: TaskSpec, data: MasksSpec) -> MasksTask:
    """Two of scikit-learn's digits on stripes and noise: classes are 0 for the ground and d + 1 for the digit d."""

    def make() -> dict[str, Tensor]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        made, start = [], 0
        for seed, count in enumerate(DIGIT_COUNTS.values()):  # by split, so that no digit is in two
            part = slice(start, start + count)
            start += count
            made.append(
                textured_digits(torch.from_numpy(digits.images[part]), torch.from_numpy(digits.target[part]), seed)
            )
        return {name: torch.cat([tensors[name] for tensors in made]) for name in made[0]}

    tensors, _ = cached_tensors(f"digit-masks-{DIGIT_MASKS}-{version('scikit-learn')}", make)
    pixels, masks = tensors["pixels"], tensors["masks"]
    if data.image_size not in (None, DIGIT_SIDE):
        raise TaskError(f"task.data.image_size: digit_masks are {DIGIT_SIDE}x{DIGIT_SIDE}: leave it out")
    normalize = Normalization(data.mean or (0.5,), data.std or (0.25,))
    samples: dict[Split, Pairs] = {}
    start = 0
    for split, count in DIGIT_COUNTS.items():
        part = slice(start, start + count)
        samples[split] = Pairs(pixels[part], masks[part], normalize, flip=False)  # a mirrored 2 is no 2
        start += count
    key = content_key(DIGIT_MASKS, hashlib.sha256(pixels.numpy().data).hexdigest(), data.model_dump(mode="json"))
    return MasksTask(spec, "digit-masks", key, samples, spec.num_classes or 11)


def textured_digits(digits: Tensor, labels: Tensor, seed: int) -> dict[str, Tensor]:
    """A picture for each digit: it and a second one at random places on a ground of stripes and noise.

    Args:
        digits: `(n, 8, 8)`, 0 to 16.
        labels: `(n,)`, 0 to 9.
        seed: of places, grounds and noise.

    Returns:
        pixels `(n, 1, 32, 32)` uint8 and masks `(n, 32, 32)` uint8, 0 for the ground and d + 1 for the digit d.
    """
    random = torch.Generator().manual_seed(seed)
    count, side = len(digits), DIGIT_SIDE
    angle, phase = (6.2832 * torch.rand(count, 1, 1, generator=random) for _ in range(2))
    period = 3 + 6 * torch.rand(count, 1, 1, generator=random)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    stripes = torch.sin(6.2832 * (rows * angle.sin() + columns * angle.cos()) / period + phase)
    pixels = 0.35 + 0.2 * stripes + 0.12 * torch.randn(count, side, side, generator=random)
    masks = torch.zeros(count, side, side, dtype=torch.uint8)
    large = F.interpolate(digits.float().unsqueeze(1) / 16, scale_factor=2, mode="bilinear")[:, 0]
    # The second digit of a picture is the first one of the picture after it.
    for shift, first_column in ((0, 0), (1, side // 2)):
        place = torch.randint(side // 2 + 1, (count,), generator=random).tolist()
        bright = 0.25 + 0.4 * torch.rand(count, generator=random)
        for i in range(count):
            j = (i + shift) % count
            window = (i, slice(place[i], place[i] + 16), slice(first_column, first_column + 16))
            pixels[window] += bright[i] * large[j]
            masks[window][large[j] > 0.35] = int(labels[j]) + 1
    return {"pixels": (255 * pixels.clamp(0, 1)).byte().unsqueeze(1), "masks": masks}
