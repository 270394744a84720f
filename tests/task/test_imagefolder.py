"""Folders of images: every way in which they can be wrong is said by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from mpsearch.errors import TaskError
from mpsearch.task.imagefolder import decoded, list_images, listing_key


def pixels(root: Path, image_size: int | None = None) -> torch.Tensor:
    listing = list_images(root)
    return decoded(listing, listing_key(listing, stat=True), image_size, threads=2)


def test_a_listing_has_splits_classes_and_labels_in_a_fixed_order(make_folder):
    listing = list_images(make_folder(splits=("train", "val"), classes=("bee", "ant"), per_class=2))
    assert listing.classes == ["ant", "bee"]
    assert listing.labels.tolist() == [0, 0, 1, 1] * 2
    assert {split: part.tolist() for split, part in listing.parts.items()} == {
        "train": [0, 1, 2, 3],
        "val": [4, 5, 6, 7],
    }
    assert [path.parent.name for path in listing.paths[:4]] == ["ant", "ant", "bee", "bee"]


def test_a_folder_of_classes_is_all_train(make_folder):
    listing = list_images(make_folder(splits=()))
    assert list(listing.parts) == ["train"]
    assert len(listing.paths) == 8


def test_images_in_subfolders_count_and_hidden_files_do_not(make_folder):
    root = make_folder()
    (root / "train" / "ant" / ".DS_Store").write_text("x")
    (root / ".git").mkdir()
    (root / "train" / "ant" / "more").mkdir()
    Image.new("RGB", (8, 8)).save(root / "train" / "ant" / "more" / "a.png")
    assert len(list_images(root).parts["train"]) == 9


def test_a_file_that_is_no_image_is_named(make_folder):
    root = make_folder()
    (root / "val" / "bee" / "notes.txt").write_text("x")
    with pytest.raises(TaskError, match=r"val/bee/notes\.txt' is not an image"):
        list_images(root)


def test_text_under_an_image_name_is_named(make_folder):
    root = make_folder()
    (root / "val" / "bee" / "3.png").write_text("not an image")
    with pytest.raises(TaskError, match=r"val/bee/3\.png' is not an image that can be read"):
        pixels(root)


def test_half_an_image_is_named(make_folder):
    root = make_folder(size=(32, 32))
    path = root / "test" / "ant" / "0.png"
    Image.effect_noise((32, 32), 50).save(path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(TaskError, match=r"test/ant/0\.png' is not an image that can be read"):
        pixels(root)


def test_an_empty_class_is_named(make_folder):
    root = make_folder()
    for path in (root / "train" / "bee").iterdir():
        path.unlink()
    with pytest.raises(TaskError, match="train/bee' is empty"):
        list_images(root)


def test_classes_that_differ_between_splits_are_named(make_folder):
    root = make_folder()
    (root / "test" / "bee").rename(root / "test" / "wasp")
    with pytest.raises(TaskError, match="different classes: bee, wasp"):
        list_images(root)


def test_one_class_is_not_enough(make_folder):
    root = make_folder(splits=())
    for path in (root / "bee").iterdir():
        path.unlink()
    (root / "bee").rmdir()
    with pytest.raises(TaskError, match="has 1 class folders: expected one folder per class, at least two"):
        list_images(root)


def test_a_split_under_another_name_is_not_passed_over(make_folder):
    root = make_folder(splits=("train", "vall"))
    with pytest.raises(TaskError, match="rename 'vall': did you mean 'val'"):
        list_images(root)


@pytest.mark.parametrize(
    ("splits", "advice"),
    [
        (("Train", "Val", "Test"), "rename 'Test' to 'test', 'Train' to 'train', 'Val' to 'val'"),
        (("TRAIN", "TEST"), "rename 'TEST' to 'test', 'TRAIN' to 'train'"),
        (("training", "validation"), "rename 'training' to 'train', 'validation' to 'val'"),
        (("train", "dev"), "rename 'dev' to 'val'"),
        (("train", "Val"), "rename 'Val' to 'val'"),
        (("seg_train", "seg_test"), "rename 'seg_test' to 'test', 'seg_train' to 'train'"),
        (("trainset2017", "valset2017"), "rename 'trainset2017' to 'train', 'valset2017' to 'val'"),
        (("training_data", "eval"), "rename 'eval' to 'val', 'training_data' to 'train'"),
        (("Valid",), "rename 'Valid' to 'val'"),
        (("val", "test"), r"train/<class>/\*\)$"),
    ],
)
def test_splits_under_other_names_are_not_taken_for_classes(make_folder, splits: tuple[str, ...], advice: str):
    with pytest.raises(TaskError, match=f"expected train, val and test in lower case.*{advice}"):
        list_images(make_folder(splits=splits))


@pytest.mark.parametrize("classes", [("valid", "invalid"), ("Train", "car", "plane"), ("contest", "trained")])
def test_a_class_may_be_called_like_a_split_where_it_holds_images(make_folder, classes: tuple[str, ...]):
    assert list_images(make_folder(splits=(), classes=classes)).classes == sorted(classes)


def test_splits_below_the_classes_are_refused(make_folder):
    root = make_folder(splits=())
    for name in ("train", "test"):
        (root / "ant" / name).mkdir()
        Image.new("RGB", (8, 8)).save(root / "ant" / name / "a.png")
    with pytest.raises(TaskError, match="ant' holds the splits test, train: expected them above the classes"):
        list_images(root)


def test_val_without_train_is_refused(make_folder):
    with pytest.raises(TaskError, match="of which only train must exist"):
        list_images(make_folder(splits=("val", "test")))


def test_a_missing_folder_is_named(tmp_path: Path):
    with pytest.raises(TaskError, match=f"no folder '{tmp_path / 'gone'}'"):
        list_images(tmp_path / "gone")


def test_images_of_two_sizes_need_an_image_size(make_folder):
    root = make_folder(size=(8, 8))
    Image.new("RGB", (12, 8)).save(root / "val" / "ant" / "0.png")
    with pytest.raises(TaskError, match=r"val/ant/0\.png' is 12x8 and .* is 8x8 .* set task\.data\.image_size"):
        pixels(root)
    assert pixels(root, image_size=6).shape == (24, 3, 6, 6)


def test_resizing_keeps_proportions_and_takes_the_centre(make_folder):
    root = make_folder(per_class=1)
    wide = Image.new("RGB", (24, 8), (0, 0, 0))
    wide.paste((255, 255, 255), (8, 0, 16, 8))
    wide.save(root / "train" / "ant" / "0.png")
    assert (pixels(root, image_size=8)[0] == 255).all()


def test_grey_and_palette_images_become_rgb(make_folder):
    root = make_folder()
    Image.new("L", (8, 8), 77).save(root / "train" / "ant" / "0.png")
    Image.new("RGB", (8, 8), (10, 20, 30)).convert("P").save(root / "train" / "ant" / "1.png")
    assert pixels(root)[0, :, 0, 0].tolist() == [77, 77, 77]
    assert pixels(root).shape[1] == 3
