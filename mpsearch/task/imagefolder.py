"""Folders of images, one subfolder per class: what is in them, and their pixels.

Either `root/train/<class>/*`, with `val` and `test` beside `train` where they exist, or `root/<class>/*`.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from mpsearch.cache import content_key
from mpsearch.errors import TaskError, nearest
from mpsearch.shipped import where
from mpsearch.task.cache import cached_tensors
from mpsearch.task.images import open_rgb
from mpsearch.task.task import Split

logger = logging.getLogger(__name__)

_SPLIT_LIKE: Mapping[Split, re.Pattern[str]] = {
    "train": re.compile(r"tra?in(ing)?|trn|fit(ting)?"),
    "val": re.compile(r"val(id(ation)?)?|dev(el(opment)?)?|eval(uation)?"),
    "test": re.compile(r"te?st(ing)?|holdout"),
}
"""What people call their splits, between whatever else is in the name: Train, validation, seg_test, trainset."""
_AROUND = re.compile(r"[^a-z]+|(?:set|split|data|images?|imgs?)(?=[^a-z]|$)")

DECODER = 2  # raise when decoding or resizing changes: entries of the cache are made again
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")


@dataclass(frozen=True)
class Listing:
    """The images of a folder in a fixed order: `labels` `(n,)` index `classes`, `parts` says which folder each is in.

    `parts` maps each of train, val, test that has a folder of its own to its images' positions; a folder without them
    has all its images under `train`.
    """

    root: Path
    paths: Sequence[Path]
    labels: Tensor
    classes: Sequence[str]
    parts: dict[Split, Tensor]


def list_images(root: Path) -> Listing:
    """Find every image of a folder; see `list_folder`."""
    return list_folder(root, SUFFIXES, "an image")


def list_folder(root: Path, suffixes: Sequence[str], what: str) -> Listing:
    """Find every file of a folder that ends as one of `suffixes`; hidden files are passed over.

    Raises:
        TaskError: the folder is missing or of another layout, a class is empty or not in every split, or a file in a
            class folder is not `what` is looked for.
    """
    if not root.is_dir():
        raise TaskError(
            f"task.data.root: no folder {where(root)}: give the folder that holds train/<class>/ or <class>/"
        )
    below = _subfolders(root)
    splits: list[Split] = [split for split in get_args(Split) if split in below]
    others = [name for name in below if name not in splits]
    # A folder of another name is a split where it looks like one and holds folders, which would be the classes.
    likely = {name: meant for name in others if (meant := split_meant(name)) and _subfolders(root / name)}
    if likely or (splits and (others or "train" not in splits)):
        advice = [f"'{name}' to '{split}'" for name, split in likely.items() if split not in splits]
        advice += [f"'{name}': {nearest(name, get_args(Split))}" for name in others if name not in likely]
        raise TaskError(
            f"'{root}' holds the folders {', '.join(below)}: expected train, val and test in lower case and nothing "
            "else, of which only train must exist, with a folder for each class in each (train/<class>/*)"
            + (f"; rename {', '.join(advice[:3])}" if advice else "")
        )
    folders = {split: root / split for split in splits} or {"train": root}
    classes = _subfolders(folders["train"])
    if len(classes) < 2:
        raise TaskError(
            f"'{folders['train']}' has {len(classes)} class folders: expected one folder per class, at least two"
        )
    paths: list[Path] = []
    labels: list[int] = []
    parts: dict[Split, Tensor] = {}
    for split, folder in folders.items():
        if (inside := _subfolders(folder)) != classes:
            odd = sorted(set(inside) ^ set(classes))
            raise TaskError(
                f"'{folder}' and '{folders['train']}' have different classes: {', '.join(odd[:5])} in only one of "
                "them; every split needs the same class folders"
            )
        start = len(paths)
        for label, name in enumerate(classes):
            inside = _subfolders(folder / name)
            if len(set(map(split_meant, inside)) - {None}) > 1:
                raise TaskError(
                    f"class folder '{folder / name}' holds the splits {', '.join(inside)}: expected them above the "
                    "classes, as train/<class>/* and val/<class>/*"
                )
            images = _files(folder / name, suffixes, what)
            paths += images
            labels += [label] * len(images)
        parts[split] = torch.arange(start, len(paths))
    return Listing(root, paths, torch.tensor(labels), classes, parts)


def split_meant(name: str) -> Split | None:
    """Which split a folder's name stands for in any spelling that people use; None for any other name.

    >>> [split_meant(name) for name in ("Train", "validation", "seg_test", "trainset2017", "trains", "cat")]
    ['train', 'val', 'test', 'train', None, None]
    """
    words = _AROUND.sub(" ", name.lower()).split()
    return next((split for split, like in _SPLIT_LIKE.items() if any(map(like.fullmatch, words))), None)


def split_of(path: Path) -> Split | None:
    """Which split a file is of, by its name or else by the folders that it lies in, given from the data's root."""
    return next(filter(None, map(split_meant, (path.stem, *reversed(path.parts[:-1])))), None)


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _files(folder: Path, suffixes: Sequence[str], what: str) -> list[Path]:
    paths = []
    for parent, below, names in os.walk(folder, followlinks=True):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(names):
            if name.startswith("."):
                continue
            if not name.lower().endswith(tuple(suffixes)):
                raise TaskError(
                    f"'{Path(parent, name)}' is not {what}: expected {' '.join(suffixes)}; move it out of the "
                    "class folder"
                )
            paths.append(Path(parent, name))
    if not paths:
        raise TaskError(f"class folder '{folder}' is empty: put files in, or remove it from every split")
    return paths


def listing_key(listing: Listing, stat: bool) -> str:
    """The content key of a listing: names and, with `stat`, sizes and times of change."""
    names = [os.path.relpath(path, listing.root) for path in listing.paths]
    facts = [(info.st_size, info.st_mtime_ns) for info in map(os.stat, listing.paths)] if stat else []
    return content_key(names, facts)


def decoded(listing: Listing, key: str, image_size: int | None, threads: int) -> Tensor:
    """All images as `(n, 3, h, w)` uint8, decoded once and from then on mapped from the cache.

    With `image_size` the shorter side is resized to it and the centre cut out; without, all must be of one size.

    Raises:
        TaskError: an image cannot be read, or has another size than the first.
    """

    def make() -> dict[str, Tensor]:
        began = time.perf_counter()
        pixels = _decode(listing.paths, image_size, threads)
        logger.info("decoded %d images in %.1f s", len(pixels), time.perf_counter() - began)
        return {"pixels": pixels}

    tensors, _ = cached_tensors(f"images-{content_key(DECODER, key, image_size)}", make)
    return tensors["pixels"]


def first_size(listing: Listing) -> tuple[int, int]:
    """Height and width of the first image."""
    image = open_rgb(listing.paths[0])
    return image.height, image.width


def _decode(paths: Sequence[Path], image_size: int | None, threads: int) -> Tensor:
    height, width = (image_size, image_size) if image_size else _array(paths[0], None).shape[:2]
    pixels = np.empty((len(paths), 3, height, width), dtype=np.uint8)

    def fill(position: int) -> None:
        image = _array(paths[position], image_size)
        if image.shape[:2] != (height, width):
            raise TaskError(
                f"'{paths[position]}' is {image.shape[1]}x{image.shape[0]} and '{paths[0]}' is {width}x{height} (width "
                "x height): set task.data.image_size to resize all to one size"
            )
        pixels[position] = image.transpose(2, 0, 1)

    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(fill, range(len(paths)), chunksize=256):
            pass
    return torch.from_numpy(pixels)


def _array(path: Path, image_size: int | None) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    from PIL import ImageOps

    image = open_rgb(path)
    if image_size and image.size != (image_size, image_size):
        image = ImageOps.fit(image, (image_size, image_size))
    return np.asarray(image)
