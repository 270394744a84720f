"""COCO's mean average precision of boxes, with a value for each block of images.

pycocotools matches found boxes with those that are there, image by image; what follows from the matches is worked out
here, since it is wanted of all images and of all but some. An image counts its hundred best boxes of a class.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mpsearch.errors import TaskError
from mpsearch.task.jackknife import LEAST, MOST, values_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

Boxes = Mapping[str, Tensor]  # boxes (n, 4): x1 y1 x2 y2; labels (n,); scores (n,), of what was found

MOST_FOUND = 100  # boxes of an image and class that count
RECALLS = np.linspace(0.0, 1.0, 101)  # at which precision is read


class MeanAveragePrecision:
    """The mean of average precision over classes, and over the thresholds of overlap from 0.5 to 0.95 or at 0.5 alone.

    Args:
        half: at 0.5 alone.

    Raises:
        TaskError: pycocotools is missing.
    """

    def __init__(self, half: bool = False) -> None:
        try:
            import pycocotools.cocoeval  # noqa: F401
        except ImportError as error:
            raise TaskError(
                f"mAP is computed with pycocotools ({error}): pip install 'mpsearch[metrics]', or give the task a "
                "`score` of its own"
            ) from None
        self._half = half
        self._found: list[Boxes] = []
        self._there: list[Boxes] = []
        self._classes: list[_Class] | None = None

    def update(self, output: Sequence[Boxes], target: Sequence[Boxes]) -> None:
        """Take in what was found in images, and what is there."""
        self._found += [{name: tensor.detach().cpu() for name, tensor in found.items()} for found in output]
        self._there += [{name: tensor.cpu() for name, tensor in there.items()} for there in target]
        self._classes = None

    def compute(self) -> float:
        """Over all images, in [0, 1]; NaN where no image has a box."""
        return self._over(np.ones(len(self._there), dtype=bool))

    def sample_values(self) -> Tensor | None:
        """The value of each of at most 128 blocks of images."""
        images = np.arange(len(self._there))
        if len(images) < LEAST:
            return None
        without = []
        for block in np.array_split(images, min(len(images), 2 * MOST)):
            counted = np.ones(len(images), dtype=bool)
            counted[block] = False
            without.append(self._over(counted))
        return values_of(self.compute(), without)

    def _over(self, counted: NDArray[np.bool_]) -> float:
        if self._classes is None:
            self._classes = _matched(self._found, self._there)
        precisions = [p for one in self._classes if (p := one.precision(counted)) is not None]
        if not precisions:
            return float("nan")
        mean = np.mean(precisions, axis=(0, 2))
        return float(mean[0] if self._half else mean.mean())


class _Class:
    """What was found of one class in all images, best first.

    Args:
        image: that each was found in, `(d,)`.
        right: whether it is matched, by threshold, `(t, d)`.
        there: how many there are in each image, `(n,)`.
    """

    def __init__(self, image: NDArray[np.intp], right: NDArray[np.bool_], there: NDArray[np.intp]) -> None:
        self._image, self._right, self._there = image, right, there

    def precision(self, counted: NDArray[np.bool_]) -> NDArray[np.float64] | None:
        """At each threshold and recall over the images that are counted, `(t, 101)`; None: none is there."""
        there = int(self._there[counted].sum())
        if not there:
            return None
        right = self._right[:, counted[self._image]].cumsum(axis=1)
        precision = right / np.arange(1, right.shape[1] + 1)
        best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]  # at this recall or a higher one
        best = np.pad(best, ((0, 0), (0, 1)))  # a recall that is not reached has none
        return np.stack([row[np.searchsorted(r / there, RECALLS)] for row, r in zip(best, right, strict=True)])


def _matched(found: Sequence[Boxes], there: Sequence[Boxes]) -> list[_Class]:
    """Each class that is there or was found."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    classes = sorted({int(label) for boxes in (*found, *there) for label in boxes["labels"]})

    def coco(images: Sequence[Boxes]) -> Any:
        made, annotations = COCO(), list[dict[str, Any]]()
        for image, boxes in enumerate(images):
            corners = boxes["boxes"].double()
            sizes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1)
            scores = boxes["scores"].tolist() if "scores" in boxes else [1.0] * len(sizes)
            for box, label, score in zip(sizes.tolist(), boxes["labels"].tolist(), scores, strict=True):
                about = {"id": len(annotations) + 1, "image_id": image, "category_id": label, "iscrowd": 0}
                annotations.append(about | {"bbox": box, "area": box[2] * box[3], "score": score})
        made.dataset = {
            "images": [{"id": image} for image in range(len(images))],
            "categories": [{"id": label} for label in classes],
            "annotations": annotations,
        }
        made.createIndex()
        return made

    with contextlib.redirect_stdout(io.StringIO()):  # it says what it does
        matching = COCOeval(coco(there), coco(found), "bbox")
        matching.params.maxDets = [MOST_FOUND]
        matching.params.areaRng, matching.params.areaRngLbl = [[0, 1e10]], ["all"]
        matching.evaluate()
    thresholds, images = len(matching.params.iouThrs), len(there)
    answer = []
    for k in range(len(classes)):
        known = [(i, e) for i, e in enumerate(matching.evalImgs[k * images : (k + 1) * images]) if e is not None]
        counts = np.zeros(images, dtype=np.intp)
        for i, e in known:
            counts[i] = len(e["gtIds"])
        image = np.concatenate([np.full(len(e["dtScores"]), i) for i, e in known] or [np.zeros(0)]).astype(np.intp)
        right = np.concatenate([e["dtMatches"] > 0 for _, e in known] or [np.zeros((thresholds, 0), bool)], axis=1)
        score = np.concatenate([e["dtScores"] for _, e in known] or [np.zeros(0)])
        order = np.argsort(-score, kind="stable")
        answer.append(_Class(image[order], right[:, order], counts))
    return answer
