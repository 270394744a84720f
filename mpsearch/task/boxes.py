"""Images with labelled boxes, as COCO's JSON or Pascal VOC's XML, for the detectors of torchvision.

COCO: every JSON file with `images`, `annotations` and `categories`, in ROOT or below it; its split is said by its name
(`instances_train2017.json`) or by its folder's (`train/_annotations.coco.json`). VOC: `Annotations/*.xml`,
`JPEGImages/*` and, where they are, the lists of `ImageSets/Main`. Crowds of COCO and difficult boxes of VOC, which
their own scores pass over, are left out of both training and scores.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mpsearch.cache import content_key
from mpsearch.errors import TaskError
from mpsearch.files import require_regular, with_home
from mpsearch.shipped import where
from mpsearch.study import BoxesSpec, TaskSpec
from mpsearch.task.imagefolder import SUFFIXES, split_of
from mpsearch.task.images import open_rgb
from mpsearch.task.libraries import Needs
from mpsearch.task.made import SHAPES, SIDE, shapes
from mpsearch.task.own import OwnTask
from mpsearch.task.scores import OF_BOXES
from mpsearch.task.splitting import divided
from mpsearch.task.study_task import StudyTask
from mpsearch.task.task import Split

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Labelled:
    """An image with its boxes `(n, 4)`, x1 y1 x2 y2 in pixels, and the numbers of their classes `(n,)`, from 1."""

    path: Path
    boxes: tuple[tuple[float, float, float, float], ...]
    labels: tuple[int, ...]


Parts = dict[Split, list[Labelled]]


class BoxesTask(StudyTask):
    """Detection: the loss is the detector's own, the score is mAP."""

    def __init__(
        self, spec: TaskSpec, name: str, key: str, samples: Mapping[Split, Boxed | Drawn], classes: int
    ) -> None:
        self._samples = samples
        super().__init__(spec, name, key, Needs("detection", classes, 3))
        if self.metric.name in OF_BOXES:
            OF_BOXES[self.metric.name]()  # that pycocotools is missing is said before anything is trained

    def batches(self, split: Split) -> Iterable[Any]:
        """As `StudyTask.batches`: a detector takes images and targets, and gives its losses in training."""
        return DataLoader(self._samples[split], batch_size=8, collate_fn=_collated)

    def loss(self, output: Any, target: Any) -> Tensor:
        """The sum of the detector's losses."""
        if not isinstance(output, Mapping):
            raise TaskError(
                f"{self.name}: in training the model gave a {type(output).__name__}, expected a dict of losses, as the "
                "detectors of torchvision give"
            )
        losses: Tensor = torch.stack(list(output.values())).sum()
        return losses

    def fits(self, output: Any) -> bool:
        """As `StudyTask.fits`: a list of dicts with boxes, labels and scores."""
        return (
            isinstance(output, Sequence)
            and len(output) == 1
            and isinstance(output[0], Mapping)
            and {"boxes", "labels", "scores"} <= set(output[0])
        )

    def expected(self) -> str:
        """As `StudyTask.expected`."""
        return "a list with one dict of boxes, labels and scores, as the detectors of torchvision give"

    def float_batch(self) -> int:
        """As `StudyTask.float_batch`."""
        return 8


def _collated(items: Sequence[tuple[Tensor, dict[str, Tensor]]]) -> Any:
    images, targets = [image for image, _ in items], [target for _, target in items]
    return (images, targets), targets


class Boxed(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Images that are read one by one, in [0, 1], with their boxes; detectors normalize them themselves."""

    def __init__(self, items: Sequence[Labelled], side: int | None, flip: bool) -> None:
        self._items, self._side, self._flip = items, side, flip

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """An image `(3, h, w)` and what is in it."""
        item = self._items[index]
        image = open_rgb(item.path)
        boxes = torch.tensor(item.boxes, dtype=torch.float32).reshape(-1, 4)
        if self._side:
            boxes = boxes * (self._side / torch.tensor([image.width, image.height] * 2))
            image = image.resize((self._side, self._side))
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        if self._flip:
            x, boxes = perhaps_flipped(x, boxes)
        return x, {"boxes": boxes, "labels": torch.tensor(item.labels, dtype=torch.long)}


class Drawn(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Drawings with their boxes, in memory."""

    def __init__(self, count: int, seed: int, flip: bool) -> None:
        self._pixels, self._boxes, self._labels = shapes(count, seed)
        self._flip = flip

    def __len__(self) -> int:
        return len(self._pixels)

    def digest(self) -> str:
        """Of the pixels, which are others with another numpy."""
        return hashlib.sha256(self._pixels.numpy().data).hexdigest()

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """An image `(3, 64, 64)` in [0, 1] and what is in it."""
        x, boxes = self._pixels[index].float() / 255, self._boxes[index]
        if self._flip:
            x, boxes = perhaps_flipped(x, boxes)
        return x, {"boxes": boxes, "labels": self._labels[index]}


def perhaps_flipped(x: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """An image `(c, h, w)` and its boxes `(n, 4)`, every other time with left and right changed."""
    if torch.rand(()) < 0.5:
        return x, boxes
    width = x.shape[-1]
    return x.flip(-1), torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)


DRAWN: Mapping[Split, tuple[int, int]] = {"train": (800, 0), "val": (200, 1), "test": (200, 2)}
"""Drawings of a split, and their seed."""


def boxes_task(spec: TaskSpec, workers: int | None = None) -> OwnTask:
    """The task of a study whose data are boxes.

    Raises:
        TaskError: files are missing or of another form, or the network is no detector; the message names them.
    """
    data = spec.data
    assert isinstance(data, BoxesSpec)
    if data.root is None:
        return _drawn(spec, data)
    root = with_home(data.root)
    if not root.is_dir():
        raise TaskError(f"task.data.root: no folder {where(root)}: give the folder with images and annotations")
    parts, names = (from_coco if data.kind == "coco" else from_voc)(root)
    splits = divided(data, parts, "images")
    for split in get_args(Split):
        if not any(item.boxes for item in splits[split]):
            raise TaskError(f"task.data: no image of {split} in '{root}' has a box")
    classes = spec.num_classes or len(names)
    if classes < len(names):
        raise TaskError(
            f"task.num_classes: got {classes}, the data has {len(names)} classes, the background not counted: leave it "
            "out, or give as many"
        )
    facts = data.model_dump(mode="json", exclude={"root"})
    content = {s: [(str(i.path.relative_to(root)), i.boxes, i.labels) for i in part] for s, part in splits.items()}
    samples = {split: Boxed(part, data.image_size, data.augment and split == "train") for split, part in splits.items()}
    return BoxesTask(spec, root.resolve().name, content_key(facts, content), samples, classes).task()


def _drawn(spec: TaskSpec, data: BoxesSpec) -> OwnTask:
    if data.image_size not in (None, SIDE):
        raise TaskError(f"task.data.image_size: shapes are {SIDE}x{SIDE}: leave it out")
    drawn = {split: Drawn(count, seed, data.augment and split == "train") for split, (count, seed) in DRAWN.items()}
    key = content_key("shapes", drawn["val"].digest(), data.model_dump(mode="json"))
    return BoxesTask(spec, "shapes", key, drawn, spec.num_classes or len(SHAPES)).task()


# --------------------------------------------------------------------------------------------------------------- COCO


def from_coco(root: Path) -> tuple[Parts, list[str]]:
    """The images and boxes of every COCO file, by split, and the names of the classes 1, 2, ..., by their id.

    Raises:
        TaskError: no such file, or one whose images or categories are missing.
    """
    paths = sorted(root.rglob("*.json"))
    paths = [
        path for path in paths if path.name.startswith("instances")
    ] or paths  # beside COCO's keypoints and captions
    documents = {path: document for path in paths if (document := _coco(path)) is not None}
    if not documents:
        raise TaskError(
            f"task.data.root: '{root}' holds no JSON file with images, annotations and categories, as COCO's: expected "
            "annotations/instances_train2017.json, say; for Pascal VOC write kind: voc"
        )
    meant = {path: split_of(path.relative_to(root)) for path in documents}
    if any(meant.values()) and (odd := [path.name for path, split in meant.items() if split is None]):
        raise TaskError(
            f"task.data.root: '{root}' holds splits and also {', '.join(odd[:3])}: name each file as a split"
        )
    names: dict[int, str] = {}
    for document in documents.values():
        names |= {int(category["id"]): str(category["name"]) for category in document["categories"]}
    number = {identity: i for i, identity in enumerate(sorted(names), 1)}
    files = {path.name: path for path in sorted(root.rglob("*")) if path.suffix.lower() in SUFFIXES}
    parts: Parts = {}
    for path, document in documents.items():
        split: Split = meant[path] or "train"
        parts.setdefault(split, []).extend(_coco_images(path, document, root, files, number))
    return parts, [names[identity] for identity in sorted(names)]


def _coco(path: Path) -> Any:
    try:
        require_regular(path)
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TaskError(f"'{path}' is not JSON: {error}") from None
    keys = ("images", "annotations", "categories")
    is_coco = isinstance(document, dict) and all(isinstance(document.get(key), list) for key in keys)
    return document if is_coco else None


def _coco_images(
    path: Path, document: Any, root: Path, files: Mapping[str, Path], number: Mapping[int, int]
) -> list[Labelled]:
    boxes: dict[Any, list[tuple[tuple[float, float, float, float], int]]] = {}
    dropped = 0
    for item in document["annotations"]:
        try:
            x, y, width, height = (float(value) for value in item["bbox"])
            label = number[int(item["category_id"])]
        except (KeyError, TypeError, ValueError) as error:
            raise TaskError(
                f"'{path}', annotation {item.get('id') if isinstance(item, dict) else item!r}: expected bbox [x, y, "
                f"width, height] and the category_id of a category ({type(error).__name__}: {error})"
            ) from None
        if item.get("iscrowd") or width <= 0 or height <= 0:
            dropped += 1
            continue
        boxes.setdefault(item["image_id"], []).append(((x, y, x + width, y + height), label))
    if dropped:
        logger.info("%s: %d boxes of crowds, or without an area, are left out", path, dropped)
    listed: list[Labelled] = []
    for image in document["images"]:
        name = str(image["file_name"])
        candidates = [path.parent / name, root / name, root / "images" / name]
        file = next((file for file in candidates if file.is_file()), files.get(Path(name).name))
        if file is None:
            raise TaskError(f"'{path}' names the image '{name}', which is nowhere in '{root}'")
        mine = boxes.get(image["id"], [])
        listed.append(Labelled(file, tuple(box for box, _ in mine), tuple(label for _, label in mine)))
    return listed


# ---------------------------------------------------------------------------------------------------------------- VOC


def from_voc(root: Path) -> tuple[Parts, list[str]]:
    """The images and boxes of a folder of Pascal VOC, by split, and the names of the classes 1, 2, ..., in order.

    Raises:
        TaskError: a folder is missing, a file is of another form, or an image is missing.
    """
    annotations = root / "Annotations"
    if not annotations.is_dir():
        raise TaskError(
            f"task.data.root: '{root}' has no folder Annotations: give the folder that also holds JPEGImages"
        )
    files = {path.stem: path for path in sorted((root / "JPEGImages").glob("*")) if path.suffix.lower() in SUFFIXES}
    read = {path.stem: _voc_boxes(path) for path in sorted(annotations.glob("*.xml"))}
    if missing := [stem for stem in read if stem not in files]:
        raise TaskError(
            f"{len(missing)} of the {len(read)} files in '{annotations}' have no image in '{root / 'JPEGImages'}', the "
            f"first is {missing[0]}.xml"
        )
    names = sorted({name for found in read.values() for name, _ in found})
    number = {name: i for i, name in enumerate(names, 1)}
    listed = {
        stem: Labelled(files[stem], tuple(box for _, box in found), tuple(number[name] for name, _ in found))
        for stem, found in read.items()
    }
    lists = {split: root / "ImageSets" / "Main" / f"{split}.txt" for split in get_args(Split)}
    parts: Parts = {}
    for split, path in lists.items():
        if path.is_file():
            stems = [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            if unknown := [stem for stem in stems if stem not in listed]:
                if split == "test":  # VOC gives the test images, and keeps their boxes
                    continue
                raise TaskError(f"'{path}' names {unknown[0]}, which has no file in '{annotations}'")
            parts[split] = [listed[stem] for stem in stems]
    return parts or {"train": list(listed.values())}, names


def _voc_boxes(path: Path) -> list[tuple[str, tuple[float, float, float, float]]]:
    try:
        objects = ElementTree.parse(path).getroot().iter("object")
        boxes = []
        for item in objects:
            place = item.find("bndbox")
            assert place is not None
            # VOC counts pixels from 1, both ends included.
            x1, y1, x2, y2 = (float(place.findtext(key) or "") for key in ("xmin", "ymin", "xmax", "ymax"))
            if (item.findtext("difficult") or "0").strip() != "1" and x2 >= x1 and y2 >= y1:
                boxes.append((str(item.findtext("name")).strip(), (x1 - 1, y1 - 1, x2, y2)))
    except (ElementTree.ParseError, OSError, ValueError, AssertionError) as error:
        raise TaskError(
            f"'{path}' cannot be read as Pascal VOC's XML (object with name and bndbox of xmin, ymin, xmax, ymax): "
            f"{error}"
        ) from None
    return boxes
