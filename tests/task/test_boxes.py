"""Images with labelled boxes: COCO's JSON and Pascal VOC's XML, for detectors of torchvision."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mpsearch.errors import TaskError
from mpsearch.metric import METRICS
from mpsearch.record import pack
from mpsearch.search.compare import paired
from mpsearch.study import TaskSpec
from mpsearch.task.box_scores import MeanAveragePrecision
from mpsearch.task.boxes import Boxed, Labelled, from_coco, from_voc
from mpsearch.task.load import load_task
from mpsearch.task.scores import OF_BOXES, scorer


def picture(path: Path, size: tuple[int, int] = (40, 30)) -> None:
    """Dark, 40 wide and 30 high, bright in x 10 to 20 and y 5 to 15."""
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    pixels[5:15, 10:20] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def coco(root: Path, annotations: str, images: str, count: int = 2, keys: Any = None) -> None:
    """A COCO file and its images; categories have the ids 3 and 7."""
    names = [f"{Path(annotations).stem}-{i}.png" for i in range(count)]
    for name in names:
        picture(root / images / name)
    boxes = [{"id": i, "image_id": i, "category_id": 7, "bbox": [10, 5, 10, 10], "iscrowd": 0} for i in range(count)]
    document = {
        "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
        "annotations": boxes,
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
    }
    (root / annotations).parent.mkdir(parents=True, exist_ok=True)
    (root / annotations).write_text(json.dumps(document | (keys or {})))


@pytest.mark.parametrize(
    ("annotations", "images"),
    [
        ("annotations/instances_{}2017.json", "{}2017"),
        ("{}/_annotations.coco.json", "{}"),
        ("{}.json", "images"),
    ],
)
def test_coco_is_read_in_the_layouts_that_there_are(tmp_path: Path, annotations: str, images: str) -> None:
    for split in ("train", "val"):
        coco(tmp_path, annotations.format(split), images.format(split))
    parts, names = from_coco(tmp_path)
    assert names == ["cat", "dog"]
    assert {split: len(part) for split, part in parts.items()} == {"train": 2, "val": 2}
    assert parts["val"][0].boxes == ((10.0, 5.0, 20.0, 15.0),)
    assert parts["val"][0].labels == (2,)  # from 1, in the order of the ids; 0 is the background
    assert "val" in str(parts["val"][0].path)


def test_crowds_and_boxes_without_an_area_are_left_out(tmp_path: Path) -> None:
    crowd = {"image_id": 0, "category_id": 3, "bbox": [0, 0, 5, 5], "iscrowd": 1}
    flat = {"image_id": 0, "category_id": 3, "bbox": [0, 0, 5, 0]}
    coco(tmp_path, "a.json", "images", keys={"annotations": [crowd, flat]})
    parts, _ = from_coco(tmp_path)
    assert [item.boxes for item in parts["train"]] == [(), ()]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"annotations": [{"id": 4, "image_id": 0, "category_id": 9, "bbox": [0, 0, 1, 1]}]},
            "annotation 4: expected bbox",
        ),
        ({"annotations": [{"id": 5, "image_id": 0, "category_id": 3, "bbox": [0, 0]}]}, "annotation 5: expected bbox"),
        ({"images": [{"id": 0, "file_name": "gone.png"}]}, "names the image 'gone.png', which is nowhere in"),
        ({"categories": None}, "holds no JSON file with images, annotations and categories"),
    ],
)
def test_what_is_wrong_with_a_coco_file_is_told(tmp_path: Path, keys: Any, message: str) -> None:
    coco(tmp_path, "a.json", "images", keys=keys)
    with pytest.raises(TaskError, match=message):
        from_coco(tmp_path)


def test_a_folder_without_coco_names_voc(tmp_path: Path) -> None:
    (tmp_path / "package.json").write_text("{}")
    with pytest.raises(TaskError, match=r"no JSON file with images, annotations and categories.*kind: voc"):
        from_coco(tmp_path)
    with pytest.raises(TaskError, match="has no folder Annotations"):
        from_voc(tmp_path)


def voc(root: Path, stem: str, difficult: int = 0) -> None:
    picture(root / "JPEGImages" / f"{stem}.png")
    box = "<bndbox><xmin>11</xmin><ymin>6</ymin><xmax>20</xmax><ymax>15</ymax></bndbox>"
    objects = [f"<object><name>dog</name><difficult>0</difficult>{box}</object>"]
    objects += [f"<object><name>ant</name><difficult>{difficult}</difficult>{box}</object>"]
    (root / "Annotations").mkdir(exist_ok=True)
    (root / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{''.join(objects)}</annotation>")


def test_voc_is_read_with_its_lists(tmp_path: Path) -> None:
    for i in range(4):
        voc(tmp_path, f"{i}", difficult=i % 2)
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("0\n1\n")
    (lists / "val.txt").write_text("2  1\n3 -1\n")
    (lists / "test.txt").write_text("9\n")
    parts, names = from_voc(tmp_path)
    assert names == ["ant", "dog"]
    assert {split: len(part) for split, part in parts.items()} == {"train": 2, "val": 2}
    assert parts["train"][0].boxes[0] == (10.0, 5.0, 20.0, 15.0)
    assert [item.labels for item in parts["train"]] == [(2, 1), (2,)]
    (tmp_path / "Annotations" / "0.xml").write_text("<annotation><object><name>a</name></object></annotation>")
    with pytest.raises(TaskError, match=r"0\.xml' cannot be read as Pascal VOC's XML"):
        from_voc(tmp_path)


def test_boxes_follow_their_image_when_it_is_resized_and_mirrored(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    boxed = Boxed([Labelled(tmp_path / "a.png", ((10.0, 5.0, 20.0, 15.0),), (1,))], side=60, flip=True)
    torch.manual_seed(0)
    seen = set()
    for _ in range(12):
        x, target = boxed[0]
        left, top, right, bottom = target["boxes"][0].round().int().tolist()
        seen.add(left)
        assert x.shape == (3, 60, 60)
        assert x[:, top + 2 : bottom - 2, left + 2 : right - 2].min() > 0.9
        assert x.mean() == pytest.approx((right - left) * (bottom - top) / 3600, abs=0.01)
    assert seen == {15, 30}


SMALL = {"size": [64, 64]}
SSD = "torchvision:ssdlite320_mobilenet_v3_large"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split in ("train", "val", "test"):
        coco(tmp_path, f"{split}.json", "images", count=3)
    return tmp_path


class Pair(torch.nn.Module):
    def forward(self, images: Any, targets: Any) -> Any:
        return [images, targets]


class Overlap:
    """Stands for the mAP where pycocotools is not installed: whether it is called as that is."""

    def __init__(self) -> None:
        self.seen = 0

    def update(self, output: Any, target: Any) -> None:
        assert all(set(o) == {"boxes", "labels", "scores"} for o in output)
        assert all(set(t) == {"boxes", "labels"} for t in target)
        self.seen += len(output)

    def compute(self) -> Any:
        return self.seen / 10


def test_a_detector_of_torchvision_trains_by_its_own_loss(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OF_BOXES, "map", Overlap)
    data = {"kind": "coco", "root": str(folder), "image_size": 64}
    task = load_task(TaskSpec(model=SSD, data=data, float_epochs=1))
    assert (task.metric.name, task.kind) == ("map", "detection")
    model = task.float_model()
    assert "trained in" in task.float_model_source
    assert task.measure(model, "val").score == pytest.approx(0.3)
    x, target = next(task.train_batches(2, 1, 0))
    assert task.loss(model.train()(*x), target) > 0


def test_a_network_that_finds_no_boxes_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OF_BOXES, "map", Overlap)
    with pytest.raises(TaskError, match="does not find boxes, and the data asks for detection"):
        load_task(TaskSpec(model="torchvision:resnet18", data={"kind": "coco", "root": str(folder)}))
    with pytest.raises(TaskError, match=r"answers one sample .* with list, expected a list with one dict of boxes"):
        load_task(TaskSpec(model=f"{__name__}:Pair", data={"kind": "coco", "root": str(folder)}))


def test_a_score_that_needs_pycocotools_is_refused_before_training(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    monkeypatch.setitem(sys.modules, "pycocotools.cocoeval", None)
    with pytest.raises(TaskError, match=r"mpsearch\[metrics\]"):
        load_task(TaskSpec(model=SSD, data={"kind": "coco", "root": str(folder)}))


def some_boxes(images: int, seed: int, noise: float = 4.0) -> tuple[list[Any], list[Any]]:
    """What is found and what is there: boxes that are off by some pixels, some of them of another class or missing."""
    random = torch.Generator().manual_seed(seed)
    found, there = [], []
    for _ in range(images):
        count = int(torch.randint(0, 5, (), generator=random))
        corner, size = (40 * torch.rand(count, 2, generator=random) + 8 for _ in range(2))
        boxes, labels = torch.cat([corner, corner + size], 1), torch.randint(1, 4, (count,), generator=random)
        there.append({"boxes": boxes, "labels": labels})
        seen = torch.rand(count, generator=random) < 0.9
        boxes = boxes[seen] + noise * torch.randn(int(seen.sum()), 4, generator=random)
        boxes, labels = torch.cat([boxes, boxes.flip(0) + 3]), torch.cat([labels[seen], labels[seen]])
        found.append({"boxes": boxes, "labels": labels, "scores": torch.rand(len(boxes), generator=random)})
    return found, there


@pytest.mark.parametrize("seed", range(4))
def test_mean_average_precision_is_that_of_torchmetrics(seed: int) -> None:
    detection = pytest.importorskip("torchmetrics.detection")
    pytest.importorskip("pycocotools")
    found, there = some_boxes(12, seed)
    exact = {"rec_thresholds": np.linspace(0, 1, 101).tolist(), "iou_thresholds": np.linspace(0.5, 0.95, 10).tolist()}
    theirs = detection.MeanAveragePrecision(**exact)  # as COCO has them; theirs are of float32
    theirs.update(found, there)
    expected = theirs.compute()
    for name, key in (("map", "map"), ("map50", "map_50")):
        of = scorer("t", METRICS[name], None)
        for start in range(0, 12, 5):
            of.add(found[start : start + 5], there[start : start + 5], len(found[start : start + 5]))
        score, values = of.result()
        assert score == pytest.approx(float(expected[key]), abs=1e-6)
        assert values is not None
        assert values.shape == (12,)
        assert float(values.double().mean()) == pytest.approx(score, abs=1e-6)


def test_images_without_boxes_have_no_mean_average_precision() -> None:
    pytest.importorskip("pycocotools")
    of = MeanAveragePrecision()
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    of.update([nothing | {"scores": torch.zeros(0)}], [nothing])
    assert math.isnan(of.compute())
    box = {"boxes": torch.tensor([[10.0, 5, 20, 15]]), "labels": torch.tensor([2])}
    of.update([nothing | {"scores": torch.zeros(0)}], [box])
    assert of.compute() == 0
    of.update([box | {"scores": torch.tensor([0.9])}], [box])
    assert of.compute() == pytest.approx(51 / 101)  # of two boxes one is found: no recall above a half
    assert of.sample_values() is None  # of three images


def test_detectors_that_differ_are_told_apart_by_their_images() -> None:
    pytest.importorskip("pycocotools")
    metric = METRICS["map"]
    packed = {}
    for noise in (3.0, 3.3, 6.0):
        of = scorer("t", metric, None)
        of.add(*some_boxes(200, 0, noise), 200)
        score, values = of.result()
        assert values is not None
        packed[noise] = score, pack(values.numpy())
    assert len(values) == 128
    much = paired([packed[3.0][1]], [packed[6.0][1]], metric)
    assert much.mean == pytest.approx(packed[3.0][0] - packed[6.0][0], abs=1e-5)
    assert 0 < much.low < much.mean < much.high
    little = paired([packed[3.0][1]], [packed[3.3][1]], metric)
    assert little.high - little.low < much.high - much.low
