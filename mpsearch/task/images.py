"""Labelled images: batches to train on, to score on, to set ranges with.

`Images` is the contract. `StoredImages` holds a set as one uint8 tensor and augments whole batches at once, so that
data never bounds a trial (over 100,000 images of 32x32 per second on one core); on a card it lies there, if it has
room, and batches are made there. `StreamedImages` decodes from disk for sets that do not fit.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import logging
import multiprocessing
import multiprocessing.connection
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, get_args, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mpsearch.errors import TaskError
from mpsearch.task.task import Split

logger = logging.getLogger(__name__)

CARD_BYTES = 2 * 2**30
"""Larger sets stay in main memory, and so do those of more than CARD_SHARE of a card's free memory."""
CARD_SHARE = 0.25

Splits = Mapping[Split, Tensor]  # positions of a split's images, int64


@runtime_checkable
class Images(Protocol):
    """A labelled image set with its splits. `key` names its content: equal keys, equal images, labels and splits."""

    name: str
    key: str
    num_classes: int
    input_shape: tuple[int, int, int]  # (channels, height, width) of what the model sees

    def size(self, split: Split) -> int:
        """How many images a split has."""
        ...

    def train_batches(self, batch_size: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """`steps` augmented batches: images `(n, c, h, w)` float32 and labels `(n,)` int64; same seed, same batches."""
        ...

    def calibration_input(self, samples: int, seed: int) -> Tensor:
        """`(samples, c, h, w)` training images, not augmented; all of them where there are fewer."""
        ...

    def batches(self, split: Split, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """A split in order, not augmented."""
        ...


@dataclass(frozen=True)
class Normalization:
    """`(pixel / white - mean) / std` per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    white: float = 255.0  # the pixel value that counts as 1.0

    def __call__(self, pixels: Tensor) -> Tensor:
        """`(n, c, h, w)` of any number type -> float32."""
        factor, offset = _affine(self, pixels.device)
        return pixels.to(torch.float32, copy=True).mul_(factor).sub_(offset)


@functools.cache
@torch.inference_mode(False)
def _affine(normalize: Normalization, device: torch.device) -> tuple[Tensor, Tensor]:
    """What pixels are multiplied by, and what is then subtracted, `(1, c, 1, 1)` each: computed on the CPU."""
    values = (normalize.mean, normalize.std)
    mean, std = (torch.tensor(numbers, dtype=torch.float32).view(1, -1, 1, 1) for numbers in values)
    return (1 / (normalize.white * std)).to(device), (mean / std).to(device)


def shuffled_batches(positions: Tensor, batch_size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """`steps` batches of positions: every image once, in random order, before any comes again."""
    queue = positions[:0]
    for _ in range(steps):
        while len(queue) < batch_size:
            queue = torch.cat([queue, positions[torch.randperm(len(positions), generator=generator)]])
        batch, queue = queue[:batch_size], queue[batch_size:]
        yield batch


def random_crop_flip(pixels: Tensor, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Shift every image by up to `padding` pixels, black where it was not, and flip half of them left to right.

    As torchvision's RandomCrop(size, padding), which nearly all checkpoints for small images were trained with. It
    matters: BatchNorm's statistics are those of images with black margins. One gather for the whole batch:
    `(n, c, h, w)` -> the same shape and type, on the same device. `generator` is the CPU's: the same seed shifts the
    same images everywhere.
    """
    n, c, h, w = pixels.shape
    device = pixels.device
    shift = torch.randint(-padding, padding + 1, (2, n, 1), generator=generator).to(device)
    rows, columns = torch.arange(h, device=device) + shift[0], torch.arange(w, device=device) + shift[1]
    if flip:
        flipped = (torch.rand(n, 1, generator=generator) < 0.5).to(device)
        columns = torch.where(flipped, columns.flip(1), columns)
    inside = ((rows >= 0) & (rows < h))[:, :, None] & ((columns >= 0) & (columns < w))[:, None, :]
    source = rows.clamp(0, h - 1)[:, :, None] * w + columns.clamp(0, w - 1)[:, None, :]
    source = source.view(n, 1, h * w).expand(n, c, h * w)
    return pixels.reshape(n, c, h * w).gather(2, source).view(n, c, h, w) * inside.view(n, 1, h, w)


class StoredImages:
    """A set in memory: `pixels` `(n, c, h, w)`, uint8 or float, and `labels` `(n,)` int64 in [0, num_classes)."""

    def __init__(
        self,
        name: str,
        key: str,
        pixels: Tensor,
        labels: Tensor,
        splits: Splits,
        normalize: Normalization,
        num_classes: int,
        image_size: int | None = None,
        augment: bool = True,
        flip: bool = True,
    ) -> None:
        self.name = name
        self.key = key
        self.num_classes = num_classes
        self._pixels, self._labels, self._splits, self._normalize = pixels, labels, splits, normalize
        self._augment, self._flip = augment, flip
        channels, height, width = pixels.shape[1:]
        self._resize = (image_size, image_size) if image_size and (height, width) != (image_size, image_size) else None
        self.input_shape = (channels, *(self._resize or (height, width)))
        self._there = pixels, labels  # where batches are made
        self._copies: dict[torch.device, StoredImages] = {}

    def on_device(self, device: torch.device) -> StoredImages:
        """This set with batches that are made on a device, where it has room for the pixels; one copy a device.

        The same images in the same order, shifted and flipped in the same way. Calibration input stays on the CPU.
        """
        if device.type != "cuda":
            return self
        if device not in self._copies:
            size = self._pixels.numel() * self._pixels.element_size()
            free, _ = torch.cuda.mem_get_info(device)
            self._copies[device] = self if size > min(CARD_BYTES, CARD_SHARE * free) else self._moved(device)
        return self._copies[device]

    @torch.inference_mode(False)
    def _moved(self, device: torch.device) -> StoredImages:
        twin = copy.copy(self)
        twin._there = self._pixels.to(device), self._labels.to(device)
        return twin

    def size(self, split: Split) -> int:
        """How many images a split has."""
        return len(self._splits[split])

    def train_batches(self, batch_size: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Images`."""
        generator = torch.Generator().manual_seed(seed)
        padding = max(1, min(self._pixels.shape[2:]) // 8)
        pixels, labels = self._there
        for indices in shuffled_batches(self._splits["train"], batch_size, steps, generator):
            indices = indices.to(pixels.device)
            batch = pixels[indices]
            if self._augment:
                batch = random_crop_flip(batch, padding, self._flip, generator)
            yield self._to_input(batch), labels[indices]

    def calibration_input(self, samples: int, seed: int) -> Tensor:
        """See `Images`."""
        train = self._splits["train"]
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
        return self._to_input(self._pixels[train[order[:samples]]])

    def batches(self, split: Split, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Images`."""
        for indices in torch.split(self._splits[split], batch_size):
            yield self._to_input(self._there[0][indices.to(self._there[0].device)]), self._labels[indices]

    def overlaps(self) -> Mapping[tuple[Split, Split], int]:
        """How many images of the second split are in the first too, pixel for pixel; pairs without any are left out."""
        digests = {
            split: [hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest() for image in self._pixels[part]]
            for split, part in self._splits.items()
        }
        counts: dict[tuple[Split, Split], int] = {}
        for one, other in itertools.combinations(get_args(Split), 2):
            known = set(digests[one])
            if count := sum(digest in known for digest in digests[other]):
                counts[one, other] = count
        return counts

    def _to_input(self, pixels: Tensor) -> Tensor:
        x = self._normalize(pixels)
        if self._resize is None:
            return x
        return F.interpolate(x, size=self._resize, mode="bilinear", antialias=True)


class SampledImages:
    """Other images with at most `samples` of one split, evenly spread over it (folders are sorted by class).

    The sample stays in memory as the model sees it: it is read once, however often it is scored.
    """

    def __init__(self, images: Images, split: Split, samples: int) -> None:
        self.name, self.key, self.num_classes = images.name, images.key, images.num_classes
        self.input_shape = images.input_shape
        self._images, self._split = images, split
        whole = images.size(split)
        count = min(samples, whole)
        self._indices = torch.arange(count) * whole // count
        self._kept: tuple[Tensor, Tensor] | None = None

    def size(self, split: Split) -> int:
        """How many images a split has."""
        return len(self._indices) if split == self._split else self._images.size(split)

    def train_batches(self, batch_size: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Images`."""
        return self._images.train_batches(batch_size, steps, seed)

    def calibration_input(self, samples: int, seed: int) -> Tensor:
        """See `Images`."""
        return self._images.calibration_input(samples, seed)

    def batches(self, split: Split, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Images`."""
        if split != self._split:
            yield from self._images.batches(split, batch_size)
            return
        if self._kept is None:
            with torch.inference_mode(False):  # what is kept outlives the scoring that first asked for it
                self._kept = self._read(batch_size)
        x, labels = self._kept
        yield from zip(torch.split(x, batch_size), torch.split(labels, batch_size), strict=True)

    def _read(self, batch_size: int) -> tuple[Tensor, Tensor]:
        parts, begin = [], 0
        for x, labels in self._images.batches(self._split, batch_size):
            mine = self._indices[(self._indices >= begin) & (self._indices < begin + len(labels))] - begin
            parts.append((x[mine], labels[mine]))
            begin += len(labels)
        return torch.cat([x for x, _ in parts]), torch.cat([labels for _, labels in parts])


class StreamedImages:
    """A set too large for memory: `paths` decoded by worker processes, cut to `image_size` x `image_size`, RGB.

    Training images are cut out at random place and scale and flipped; others are resized so that the cut takes the
    central 7/8 of the shorter side. (The usual ImageNet recipe.)
    """

    def __init__(
        self,
        name: str,
        key: str,
        paths: Sequence[Path],
        labels: Tensor,
        splits: Splits,
        normalize: Normalization,
        num_classes: int,
        image_size: int,
        augment: bool = True,
        workers: int = 4,
    ) -> None:
        from torchvision.transforms import v2

        self.name = name
        self.key = key
        self.num_classes = num_classes
        self.input_shape = (3, image_size, image_size)
        self._paths, self._labels, self._splits, self._normalize = paths, labels, splits, normalize
        self._workers = workers
        self._central = v2.Compose([v2.Resize(round(image_size * 8 / 7)), v2.CenterCrop(image_size), v2.PILToTensor()])
        self._random = (
            v2.Compose([v2.RandomResizedCrop(image_size), v2.RandomHorizontalFlip(), v2.PILToTensor()])
            if augment
            else self._central
        )

    def size(self, split: Split) -> int:
        """How many images a split has."""
        return len(self._splits[split])

    def train_batches(self, batch_size: int, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Images`."""
        generator = torch.Generator().manual_seed(seed)
        indices = shuffled_batches(self._splits["train"], batch_size, steps, generator)
        return self._load(indices, self._random, generator)

    def calibration_input(self, samples: int, seed: int) -> Tensor:
        """See `Images`."""
        train, generator = self._splits["train"], torch.Generator().manual_seed(seed)
        indices = train[torch.randperm(len(train), generator=generator)[:samples]]
        return torch.cat([x for x, _ in self._load(torch.split(indices, 64), self._central, generator)])

    def batches(self, split: Split, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See `Images`."""
        return self._load(torch.split(self._splits[split], batch_size), self._central, torch.Generator())

    def _load(
        self, indices: Iterator[Tensor] | Sequence[Tensor], transform: Any, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches decoded by workers; where these fail, this process goes on with what would have come next."""
        files = _Files(self._paths, self._labels, transform)
        left = [_with_seeds(batch, generator) for batch in [*indices]]  # the order is drawn first
        while left:
            try:
                if self._workers:
                    _check_sharing()
                loader: DataLoader[tuple[Tensor, int]] = DataLoader(
                    files, batch_sampler=[*left], num_workers=self._workers, generator=torch.Generator()
                )
                for pixels, labels in loader:
                    del left[0]
                    yield self._normalize(pixels), labels
            except TaskError as error:  # the loader puts the worker's traceback before the message
                message = str(error).rpartition("TaskError: ")[2].strip()
                error.__traceback__ = None  # holds the loader, whose processes then take 5 s to end
                break
            except (OSError, RuntimeError) as error:
                if not self._workers:
                    raise
                self._workers = 0
                why = str(error).strip().rpartition("\n")[2]
                logger.warning("images are decoded in this process, which takes longer, as its workers fail: %s", why)
        else:
            return
        raise TaskError(message)


def _with_seeds(batch: Tensor, generator: torch.Generator) -> list[tuple[int, int]]:
    seeds = torch.randint(2**62, batch.shape, generator=generator)
    return list(zip(batch.tolist(), seeds.tolist(), strict=True))


def _check_sharing() -> None:
    """See that worker processes can send tensors: else a loader waits for them in vain.

    Raises:
        OSError: there is no shared memory, or TMPDIR is too long a path for sockets.
    """
    with multiprocessing.connection.Listener(family="AF_UNIX"):
        multiprocessing.Lock()


class _Files(Dataset[tuple[Tensor, int]]):
    """Images by position and seed, so that whatever is random of one does not depend on who decodes it."""

    def __init__(self, paths: Sequence[Path], labels: Tensor, transform: Any) -> None:
        self._paths, self._labels, self._transform = paths, labels, transform

    def __getitem__(self, which: tuple[int, int]) -> tuple[Tensor, int]:
        position, seed = which
        image = open_rgb(self._paths[position])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self._transform(image), int(self._labels[position])


def open_rgb(path: Path) -> Any:
    """A decoded PIL image with three channels of 8 bits, whatever the file's own mode is.

    16 bits become 8 by 65535 -> 255. Grey, palette and CMYK images are converted as PIL does it.

    Raises:
        TaskError: the file is no image, or a damaged one; its numbers have no known white (floats, 32 bits); or pixels
            are transparent: what the network would see there depends on a background that nobody has named.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            return _rgb(image)
    except _Unusable as why:
        raise TaskError(f"'{path}' is an image of mode {why}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise TaskError(f"'{path}' is not an image that can be read: {error}; repair or remove it") from None


class _Unusable(Exception):
    """Why an image that can be read is not taken, and what to do."""


def _rgb(image: Any) -> Any:
    from PIL import Image

    mode: str = image.mode
    if mode.startswith("I"):
        # PNG and PGM have no more than 16 bits and PIL scales PGM's; TIFF says in tag 258 that a pixel has, say, 12.
        bits = image.tag_v2.get(258, (16,))[0] if image.format == "TIFF" else 16
        if bits > 16 or (mode == "I" and image.format not in ("PNG", "PPM")):
            raise _Unusable(f"{mode} ({bits} bits), for which no pixel value is known to be white: " + _SAVE_AGAIN)
        grey = np.asarray(image).astype(np.float64) * (255 / (2**bits - 1))
        return Image.fromarray(np.rint(grey).astype(np.uint8)).convert("RGB")
    if mode == "F":
        raise _Unusable("F (floats), for which no pixel value is known to be white: " + _SAVE_AGAIN)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if (lowest := image.getchannel("A").getextrema()[0]) < 255:
            raise _Unusable(
                f"{mode} with transparent pixels (alpha {lowest} of 255), and what is seen there depends on the "
                "background: paint the images on the one that the network was trained on, as by "
                "`background.paste(image, mask=image.getchannel('A'))`, and save them as RGB"
            )
    return image.convert("RGB")


_SAVE_AGAIN = (
    "save it with 8 or 16 bits, or bring the images as tensors (`kind: module:function`; floats with 1.0 as white)"
)
