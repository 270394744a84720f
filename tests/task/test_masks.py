"""Images with a class for each pixel: folders, and the digits on a ground that are made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mpsearch.errors import StudyError, TaskError
from mpsearch.study import TaskSpec, parse_study
from mpsearch.task.load import load_task
from mpsearch.task.masks import list_pairs, textured_digits
from mpsearch.task.scores import MeanIoU
from mpsearch.task.scoring import measure


def write(root: Path, folder: str, count: int = 6, size: int = 16, high: int = 1) -> None:
    """Dark images with a bright square, whose mask is `high` there; `{}` in the folder stands for images and masks."""
    random = np.random.default_rng(0)
    for what in ("images", "masks"):
        (root / folder.format(what)).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = random.integers(0, 60, (size, size, 3), dtype=np.uint8)
        mask = np.zeros((size, size), dtype=np.uint8)
        left, top = random.integers(0, size // 2, 2)
        pixels[top : top + size // 2, left : left + size // 2] += 180
        mask[top : top + size // 2, left : left + size // 2] = high
        Image.fromarray(pixels).save(root / folder.format("images") / f"{i}.png")
        Image.fromarray(mask).save(root / folder.format("masks") / f"{i}.png")


def task(
    root: Path, model: str = "unet", args: Any = None, epochs: int = 1, num_classes: Any = None, **data: Any
) -> Any:
    return load_task(
        TaskSpec(
            model=model,
            model_args={"width": 4, "levels": 1} if args is None else args,
            data={"kind": "masks", "root": str(root), **data},
            float_epochs=epochs,
            num_classes=num_classes,
        )
    )


@pytest.mark.parametrize("layout", ["{}", "train/{}", "{}/train"])
def test_images_find_their_masks_in_every_layout(tmp_path: Path, layout: str) -> None:
    write(tmp_path, layout)
    if layout != "{}":
        write(tmp_path, layout.replace("train", "val"), 2)
    pairs = list_pairs(tmp_path, "images", "masks")
    assert {split: len(part) for split, part in pairs.items()} == (
        {"train": 6} if layout == "{}" else {"train": 6, "val": 2}
    )
    assert all(image.stem == mask.stem and "masks" in str(mask) for part in pairs.values() for image, mask in part)


def test_a_network_learns_masks_and_is_trained_once(tmp_path: Path) -> None:
    write(tmp_path, "{}", 30)
    first = task(tmp_path, epochs=40)
    assert first.metric.name == "miou"
    assert measure(first, first.float_model(), "test").score > 0.8
    again = task(tmp_path, epochs=40)
    again.float_model()
    assert "trained before" in again.float_model_source


def test_a_mask_stays_with_its_image_when_both_are_mirrored(tmp_path: Path) -> None:
    write(tmp_path, "{}", 12)
    mirrored = 0
    for x, target in task(tmp_path).train_batches(4, 6, seed=0):
        bright = x.mean(dim=1) > 0
        assert torch.equal(bright, target == 1)
        mirrored += len(x)
    assert mirrored == 24


def test_values_of_masks_in_black_and_white_are_named(tmp_path: Path) -> None:
    write(tmp_path, "{}", high=255)
    with pytest.raises(TaskError, match=r"no mask of .* has a class above 0 .*mask_values: \[0, 255\]"):
        task(tmp_path)
    _, target = next(task(tmp_path, mask_values=[0, 255]).train_batches(4, 1, 0))
    assert set(target.unique().tolist()) == {0, 1}


def test_images_of_several_sizes_are_resized_where_asked(tmp_path: Path) -> None:
    write(tmp_path, "{}")
    Image.new("RGB", (20, 24)).save(tmp_path / "images" / "0.png")
    Image.new("L", (20, 24)).save(tmp_path / "masks" / "0.png")
    with pytest.raises(TaskError, match=r"is 16x16 \(width x height\) and the first image 20x24: .*image_size"):
        task(tmp_path)
    x, target = next(task(tmp_path, image_size=8).train_batches(4, 1, 0))
    assert (x.shape, target.shape) == ((4, 3, 8, 8), (4, 8, 8))


def test_what_is_wrong_with_a_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="no folder '/nowhere'"):
        task(Path("/nowhere"))
    (tmp_path / "pictures").mkdir()
    with pytest.raises(TaskError, match="holds pictures: expected images/ and masks/, or train/images/"):
        task(tmp_path)
    write(tmp_path, "{}")
    Image.fromarray(np.full((16, 16), 5, dtype=np.uint8)).save(tmp_path / "masks" / "0.png")
    with pytest.raises(TaskError, match="the masks have the classes 0 to 5: give as many"):
        task(tmp_path, num_classes=3)
    Image.new("RGB", (16, 16)).save(tmp_path / "masks" / "1.png")
    with pytest.raises(TaskError, match=r"mask '.*1\.png' is of mode RGB: expected one channel"):
        task(tmp_path)
    (tmp_path / "masks" / "1.png").unlink()
    with pytest.raises(TaskError, match=r"1 of the 6 images .* have no mask in .*expected 1\.png there"):
        task(tmp_path)


def test_a_network_that_answers_no_masks_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "{}")
    with pytest.raises(TaskError, match=r"answers one sample .* with \(1, 2\), expected \(1, 2, height, width\)"):
        task(tmp_path, "resnet18", {})


def test_a_network_of_torchvision_trains_by_both_of_its_heads(tmp_path: Path) -> None:
    write(tmp_path, "{}", size=32)
    of = task(tmp_path, "torchvision:deeplabv3_mobilenet_v3_large", {"aux_loss": True})
    x, target = next(of.train_batches(2, 1, 0))
    output = of._own.network.train()(x)
    output = {name: logits.detach() for name, logits in output.items()}
    alone = of.loss({"out": output["out"]}, target)
    assert of.loss(output, target) == pytest.approx(
        float(alone + 0.4 * of.loss({"out": output["aux"]}, target)), rel=1e-5
    )


def test_coarse_answers_are_scored_at_the_size_of_the_masks() -> None:
    target = torch.zeros(1, 8, 8, dtype=torch.long)
    target[:, 4:] = 1
    coarse = torch.zeros(1, 2, 2, 2)
    coarse[:, 1, 1], coarse[:, 0, 0] = 1.0, 1.0
    of = MeanIoU()
    of.update(coarse, target)
    assert of.compute() == 1.0


def test_pixels_of_no_class_do_not_count_for_accuracy() -> None:
    from mpsearch.metric import METRICS
    from mpsearch.task.scores import scorer

    output = torch.tensor([[[[3.0, 0.0, 0.0, 0.0]], [[0.0, 1.0, 1.0, 1.0]]]])
    of = scorer("t", METRICS["accuracy"], None)
    of.add(output, torch.tensor([[[0, 1, 0, 255]]]), 1)
    assert of.result()[0] == pytest.approx(2 / 3)


def test_digits_on_a_ground_are_the_same_each_time_and_have_their_masks() -> None:
    digits, labels = torch.zeros(3, 8, 8), torch.tensor([4, 0, 9])
    digits[:, 2:6, 2:6] = 16
    one, again = (textured_digits(digits, labels, seed=0) for _ in range(2))
    assert torch.equal(one["pixels"], again["pixels"])
    assert [set(mask.unique().tolist()) for mask in one["masks"]] == [{0, 5, 1}, {0, 1, 10}, {0, 10, 5}]
    x, masks = one["pixels"][:, 0].float(), one["masks"]
    assert x[masks > 0].mean() > x[masks == 0].mean() + 50
    task = load_task(TaskSpec(model="unet", data={"kind": "digit_masks"}))
    assert [task._of(split).count for split in ("train", "val", "test")] == [1200, 300, 297]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"kind": "masks"}, "task.data: give `root`"),
        ({"kind": "digit_masks", "root": "x"}, "digit_masks reads no folder: leave `root` out"),
        ({"kind": "masks", "root": "x", "mask": "y"}, "task.data.mask: no such key; did you mean 'masks'"),
        ({"kind": "masks", "root": "x", "std": [0]}, "task.data.std: standard deviations are above 0"),
        ({"kind": "masks", "root": "x", "val_fraction": 0.5, "test_fraction": 0.5}, "leave nothing to train on"),
    ],
)
def test_a_study_of_masks_is_checked(data: Any, message: str) -> None:
    study = {"name": "a", "space": "uniform", "task": {"model": "unet", "data": data}}
    with pytest.raises(StudyError) as error:
        parse_study(study)
    assert message in str(error.value)
    with pytest.raises(StudyError, match="`metric` is top1, and data of kind masks has miou, accuracy"):
        parse_study(study | {"task": {"model": "unet", "data": {"kind": "masks", "root": "x"}, "metric": "top1"}})
