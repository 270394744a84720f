"""Which data a study names: digits, torchvision's sets, a folder of images, or anybody's by `module:function`.

Splits, the same for every kind. What the data brings is used as it is. Missing test images are split off val where the
data brings val (`test_fraction` of it: images that the model was not trained on), else off train; missing val images
are split off train (`val_fraction`). All splits are stratified by class and seeded by `split_seed`.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from mpsearch.cache import content_key
from mpsearch.errors import TaskError, nearest
from mpsearch.files import with_home
from mpsearch.shipped import where
from mpsearch.study import SPEC_OF_KIND, DataSpec
from mpsearch.task.cache import cached_tensors
from mpsearch.task.factory import call_factory
from mpsearch.task.imagefolder import DECODER, decoded, first_size, list_images, listing_key
from mpsearch.task.images import Images, Normalization, Splits, StoredImages, StreamedImages
from mpsearch.task.splitting import Fractions
from mpsearch.task.task import Split

logger = logging.getLogger(__name__)

MEMORY_LIMIT_BYTES = 2 * 2**30  # decoded sets above this are streamed
IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class TorchvisionSet:
    """How one of torchvision's sets is called there, and what is usual for it."""

    class_name: str
    normalize: Normalization
    flip: bool = True  # whether a mirrored image is still of its class


TORCHVISION: Mapping[str, TorchvisionSet] = {
    "cifar10": TorchvisionSet("CIFAR10", Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))),
    "cifar100": TorchvisionSet("CIFAR100", Normalization((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))),
    "mnist": TorchvisionSet("MNIST", Normalization((0.1307,), (0.3081,)), flip=False),
    "fashionmnist": TorchvisionSet("FashionMNIST", Normalization((0.2860,), (0.3530,))),
    "svhn": TorchvisionSet("SVHN", Normalization((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)), flip=False),
}


def load_data(spec: DataSpec, workers: int | None = None) -> Images:
    """The images that `spec` describes, checked and ready; `workers` decode (default: one per core, 8 at most).

    A `module:function` is called with `spec.args` and gives an object with the methods of `Images`, or a dict of split
    -> (pixels, labels): `(n, c, h, w)` uint8, or float with 1.0 as white, and `(n,)` int64.

    Raises:
        TaskError: no such kind, missing or damaged files, classes or splits that do not fit; the message names them.
    """
    images = _load(spec, workers or min(os.cpu_count() or 1, 8))
    if images.num_classes < 2:
        raise TaskError(f"task.data: '{images.name}' has {images.num_classes} class: give images of two or more")
    if empty := [split for split in get_args(Split) if images.size(split) < 1]:
        raise TaskError(
            f"task.data: '{images.name}' has no image in {' and '.join(empty)}: train, val and test need some each"
        )
    return images


def _load(spec: DataSpec, workers: int) -> Images:
    if ":" in spec.kind:
        return _from_factory(spec)
    if spec.kind in TORCHVISION:
        return _from_torchvision(spec, TORCHVISION[spec.kind])
    kinds: Mapping[str, Callable[[DataSpec, int], Images]] = {
        "digits": _from_digits,
        "imagefolder": _from_folder,
        "imagenet": _from_imagenet,
    }
    if spec.kind not in kinds:
        raise TaskError(
            f"task.data.kind: no data '{spec.kind}', or write module:function for your own; "
            + nearest(spec.kind, [*kinds, *TORCHVISION, *SPEC_OF_KIND])
        )
    try:
        return kinds[spec.kind](spec, workers)
    except OSError as error:
        raise TaskError(f"task.data: cannot read '{error.filename}': {error.strerror}; check its permissions") from None


def _from_digits(spec: DataSpec, workers: int) -> Images:
    def read() -> dict[str, Tensor]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels = torch.from_numpy(digits.images.astype(np.uint8)).unsqueeze(1)
        return {"pixels": pixels, "labels": torch.from_numpy(digits.target.astype(np.int64))}

    # Kept because importing scikit-learn takes seconds, in every worker process.
    digits, path = cached_tensors(f"digits-{version('scikit-learn')}", read)
    if not _are_digits(digits):
        logger.warning("%s holds something else than digits and is made again", path)
        path.unlink(missing_ok=True)
        digits, _ = cached_tensors(f"digits-{version('scikit-learn')}", read)
    usual = Normalization((0.3053,), (0.3761,), white=16.0)
    return _stored(spec, "digits", digits["pixels"], digits["labels"], {}, usual, flip=False)


def _are_digits(tensors: Mapping[str, Tensor]) -> bool:
    about = {name: (value.dtype, value.shape) for name, value in tensors.items()}
    return about == {"pixels": (torch.uint8, (1797, 1, 8, 8)), "labels": (torch.int64, (1797,))}


def _from_torchvision(spec: DataSpec, known: TorchvisionSet) -> Images:
    import torchvision.datasets

    root = _root(spec)
    build: Any = getattr(torchvision.datasets, known.class_name)
    pixels, labels = [], []
    for train in (True, False):
        which = {"split": "train" if train else "test"} if spec.kind == "svhn" else {"train": train}
        try:
            part = build(root, download=spec.download, **which)
        except (RuntimeError, OSError) as error:
            raise TaskError(
                f"task.data: no usable {known.class_name} in {where(Path(root))} ({error}): "
                + ("check the network and the folder" if spec.download else "give its root, or set download: true")
            ) from None
        array = torch.as_tensor(part.data)
        if array.ndim == 3:  # (n, h, w), grey
            array = array.unsqueeze(1)
        elif array.shape[3] == 3:  # (n, h, w, 3)
            array = array.permute(0, 3, 1, 2)
        pixels.append(array)
        labels.append(torch.as_tensor(part.labels if spec.kind == "svhn" else part.targets, dtype=torch.int64))
    trained = len(labels[0])
    parts: dict[Split, Tensor] = {
        "train": torch.arange(trained),
        "test": torch.arange(trained, trained + len(labels[1])),
    }
    return _stored(spec, spec.kind, torch.cat(pixels), torch.cat(labels), parts, known.normalize, known.flip)


def _from_folder(spec: DataSpec, workers: int) -> Images:
    listing = list_images(Path(_root(spec)))
    name = listing.root.resolve().name
    classes = len(listing.classes)
    side = spec.image_size
    height, width = (side, side) if side else first_size(listing)
    normalize = _normalization(spec, IMAGENET, 3)
    splits = make_splits(spec, listing.labels, listing.parts)
    if len(listing.paths) * 3 * height * width > MEMORY_LIMIT_BYTES:
        if side is None:
            raise TaskError(
                f"'{listing.root}' takes more than {MEMORY_LIMIT_BYTES / 2**30:.0f} GiB as pixels and is read as it is "
                f"needed: set task.data.image_size, as in image_size: 224 (the first image is {width}x{height})"
            )
        key = _key(spec, DECODER, listing_key(listing, stat=False))
        return StreamedImages(
            name, key, listing.paths, listing.labels, splits, normalize, classes, side, spec.augment, workers
        )
    content = listing_key(listing, stat=True)
    pixels = decoded(listing, content, side, workers)
    return StoredImages(
        name, _key(spec, DECODER, content), pixels, listing.labels, splits, normalize, classes, augment=spec.augment
    )


def _from_imagenet(spec: DataSpec, workers: int) -> Images:
    images = _from_folder(spec.model_copy(update={"image_size": spec.image_size or 224}), workers)
    if images.num_classes != 1000:
        raise TaskError(
            f"task.data: '{spec.root}' has {images.num_classes} classes and ImageNet has 1000: expected "
            "train/<wnid>/*.JPEG and val/<wnid>/*.JPEG, as torchvision.datasets.ImageNet unpacks them; for a subset of "
            "the classes write kind: imagefolder"
        )
    return images


def _from_factory(spec: DataSpec) -> Images:
    made = call_factory("task.data.kind", spec.kind, spec.args)
    if isinstance(made, Images):
        return made
    if not isinstance(made, Mapping) or "train" not in made or not set(made) <= {"train", "val", "test"}:
        raise TaskError(
            f"task.data.kind: {spec.kind} gave {type(made).__name__}: expected an object with the methods of "
            "mpsearch.task.images.Images, or a dict of train, val, test -> (pixels, labels)"
        )
    pixels: list[Tensor] = []
    labels: list[Tensor] = []
    for split, pair in made.items():
        try:
            x, y = torch.as_tensor(pair[0]), torch.as_tensor(pair[1])
        except (TypeError, ValueError, IndexError, KeyError) as error:
            raise TaskError(f"{spec.kind}: {split} is not a pair of tensors (pixels, labels): {error}") from None
        whole = not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)
        if x.ndim != 4 or y.shape != x.shape[:1] or not whole or not len(y) or y.min() < 0:
            raise TaskError(
                f"{spec.kind}: {split} has pixels {tuple(x.shape)} and labels {tuple(y.shape)} {y.dtype}: expected "
                "(n, c, h, w) and (n,) whole numbers from 0, n > 0"
            )
        if pixels and (x.shape[1:], x.dtype) != (pixels[0].shape[1:], pixels[0].dtype):
            raise TaskError(
                f"{spec.kind}: {split} has images {tuple(x.shape[1:])} {x.dtype}, other splits "
                f"{tuple(pixels[0].shape[1:])} {pixels[0].dtype}: give all splits one shape and type"
            )
        if x.dtype != torch.uint8 and not x.is_floating_point():
            raise TaskError(
                f"{spec.kind}: {split} has pixels of {x.dtype}: expected uint8, whose white is 255, or floats, whose "
                "white is 1.0"
            )
        if x.is_floating_point() and len(bad := (~x.isfinite().flatten(1).all(dim=1)).nonzero().flatten()):
            raise TaskError(
                f"{spec.kind}: {len(bad)} of {len(x)} images of {split} have pixels that are NaN or infinite, the "
                f"first is number {int(bad[0])}: repair or leave them out"
            )
        pixels.append(x)
        labels.append(y.long())
    ends = np.cumsum([0] + [len(y) for y in labels])
    parts: dict[Split, Tensor] = {split: torch.arange(ends[i], ends[i + 1]) for i, split in enumerate(made)}
    x = torch.cat(pixels)
    white = 255.0 if x.dtype == torch.uint8 else 1.0
    measured = _measured(x[parts["train"]], white)
    return _stored(spec, spec.kind.rpartition(":")[2], x, torch.cat(labels), parts, measured)


def _measured(pixels: Tensor, white: float) -> Normalization:
    """Mean and deviation of what a factory brought, from up to 10,000 training images."""
    sample = pixels[:: max(1, len(pixels) // 10_000)].double() / white
    std, mean = torch.std_mean(sample, dim=(0, 2, 3))
    return Normalization(tuple(mean.tolist()), tuple(std.clamp(min=1e-3).tolist()), white)


def _stored(
    spec: DataSpec,
    name: str,
    pixels: Tensor,
    labels: Tensor,
    parts: Mapping[Split, Tensor],
    usual: Normalization,
    flip: bool = True,
) -> StoredImages:
    key = _key(spec, name, _digest(pixels), _digest(labels), {split: len(part) for split, part in parts.items()})
    splits = make_splits(spec, labels, parts or {"train": torch.arange(len(labels))})
    return StoredImages(
        name=name,
        key=key,
        pixels=pixels,
        labels=labels,
        splits=splits,
        normalize=_normalization(spec, usual, pixels.shape[1]),
        num_classes=int(labels.max()) + 1,
        image_size=spec.image_size,
        augment=spec.augment,
        flip=flip,
    )


def _digest(values: Tensor) -> str:
    return hashlib.sha256(values.contiguous().numpy().data).hexdigest()


def _key(spec: DataSpec, *content: Any) -> str:
    """What makes two sets the same to a model trained on them: wherever the folder lies."""
    return content_key(spec.model_dump(mode="json", exclude={"root", "download"}), *content)


def _root(spec: DataSpec) -> str:
    if not spec.root:
        raise TaskError(f"task.data.root: missing; {spec.kind} is read from a folder, give its path")
    return str(with_home(spec.root))


def _normalization(spec: DataSpec, usual: Normalization, channels: int) -> Normalization:
    normalization = Normalization(spec.mean or usual.mean, spec.std or usual.std, usual.white)
    for name, values in (("mean", normalization.mean), ("std", normalization.std)):
        if len(values) != channels:
            raise TaskError(f"task.data.{name}: got {len(values)} numbers, the images have {channels} channels")
    return normalization


def make_splits(spec: Fractions, labels: Tensor, parts: Mapping[Split, Tensor]) -> Splits:
    """train, val and test from the parts that the data brings; the rule is at the head of this module.

    Raises:
        TaskError: a class has too few images to be in every split.
    """
    splits = dict(parts)
    generator = torch.Generator().manual_seed(spec.split_seed)
    if "test" not in splits:
        source: Split = "val" if "val" in splits else "train"
        splits[source], splits["test"] = _divide(splits[source], labels, spec.test_fraction, generator)
    if "val" not in splits:
        # Both fractions are of the same whole, so what was taken for test is put back into the measure.
        share = spec.val_fraction if "test" in parts else spec.val_fraction / (1 - spec.test_fraction)
        splits["train"], splits["val"] = _divide(splits["train"], labels, share, generator)
        logger.info(
            "val: %d images split off train; a checkpoint trained on them scores too well there", len(splits["val"])
        )
    return splits


def _divide(positions: Tensor, labels: Tensor, fraction: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`positions` in two: the rest, and `fraction` of every class (at least one image), both in their old order."""
    taken = []
    for label in torch.unique(labels[positions]):
        mine = positions[labels[positions] == label]
        count = max(1, round(fraction * len(mine)))
        if count >= len(mine):
            raise TaskError(
                f"task.data: class {int(label)} has {len(mine)} samples, too few to split {fraction:.0%} off: add "
                "samples or give the splits as folders"
            )
        taken.append(mine[torch.randperm(len(mine), generator=generator)[:count]])
    indices = torch.cat(taken).sort().values
    return positions[~torch.isin(positions, indices)], indices
