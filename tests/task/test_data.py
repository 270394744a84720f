"""Data: the kinds that a study can name, and how they are split."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mpsearch.errors import TaskError
from mpsearch.state_dict import save_tensors
from mpsearch.study import DataSpec
from mpsearch.task import data as data_module
from mpsearch.task.data import load_data, make_splits
from mpsearch.task.images import Images, StoredImages, StreamedImages

SPLITS = ("train", "val", "test")


def folder_spec(root: Path, **keys: object) -> DataSpec:
    return DataSpec(kind="imagefolder", root=str(root), **keys)


def test_digits_are_1797_images_in_stratified_seeded_splits():
    one, two, other = (
        load_data(DataSpec(kind="digits", val_fraction=0.2, test_fraction=0.2, split_seed=seed)) for seed in (0, 0, 1)
    )
    assert one.input_shape == (1, 8, 8)
    assert sum(one.size(split) for split in SPLITS) == 1797
    for split in SPLITS:
        ((x, labels),) = one.batches(split, 2000)
        ((same, _),) = two.batches(split, 2000)
        ((differs, _),) = other.batches(split, 2000)
        assert torch.equal(x, same)
        assert not torch.equal(x, differs)
        shares = labels.bincount() / len(labels)
        assert 0.09 < shares.min() < shares.max() < 0.11
    assert one.key == two.key != other.key


@pytest.mark.parametrize("wrong", [{}, {"x": torch.zeros(2)}, {"pixels": torch.zeros(3), "labels": torch.zeros(3)}])
def test_digits_are_made_again_where_the_cache_holds_something_else(wrong: dict[str, torch.Tensor], cache: Path):
    before = load_data(DataSpec(kind="digits")).key
    (entry,) = cache.glob("digits-*.safetensors")
    save_tensors(wrong, entry)
    assert load_data(DataSpec(kind="digits")).key == before
    assert load_file(entry).keys() == {"pixels", "labels"}


def test_digits_are_normalized():
    x = load_data(DataSpec(kind="digits")).calibration_input(5000, 0)
    assert abs(float(x.mean())) < 0.01
    assert abs(float(x.std()) - 1) < 0.01


def test_all_splits_of_one_folder_are_disjoint_and_have_the_shares_asked_for():
    labels = torch.arange(4).repeat_interleave(50)
    spec = DataSpec(kind="digits", val_fraction=0.3, test_fraction=0.2)
    splits = make_splits(spec, labels, {"train": torch.arange(200)})
    assert {split: len(part) for split, part in splits.items()} == {"train": 100, "val": 60, "test": 40}
    assert torch.cat([splits[split] for split in SPLITS]).unique().numel() == 200


def test_a_missing_test_split_is_taken_from_val_and_leaves_train_alone():
    labels = torch.arange(2).repeat(60)
    parts = {"train": torch.arange(80), "val": torch.arange(80, 120)}
    splits = make_splits(DataSpec(kind="digits", test_fraction=0.5), labels, parts)
    assert torch.equal(splits["train"], parts["train"])
    assert len(splits["val"]) == len(splits["test"]) == 20
    assert torch.equal(torch.cat([splits["val"], splits["test"]]).sort().values, parts["val"])


def test_a_missing_val_split_is_taken_from_train():
    labels = torch.arange(2).repeat(60)
    splits = make_splits(DataSpec(kind="digits"), labels, {"train": torch.arange(100), "test": torch.arange(100, 120)})
    assert [len(splits[split]) for split in SPLITS] == [90, 10, 20]


def test_a_class_with_one_image_cannot_be_split():
    with pytest.raises(TaskError, match="class 1 has 1 samples"):
        make_splits(DataSpec(kind="digits"), torch.tensor([0, 0, 0, 1]), {"train": torch.arange(4)})


def test_an_unknown_kind_is_answered_with_the_nearest():
    with pytest.raises(TaskError, match=r"no data 'cifar_10'.*did you mean 'cifar10'"):
        load_data(DataSpec(kind="cifar_10", root="."))


@pytest.mark.parametrize("kind", ["cifar10", "cifar100", "mnist", "fashionmnist", "svhn", "imagefolder", "imagenet"])
def test_a_kind_that_needs_a_folder_says_so(kind: str, tmp_path: Path):
    with pytest.raises(TaskError, match=r"task\.data\.root: missing"):
        load_data(DataSpec(kind=kind))
    with pytest.raises(TaskError, match=str(tmp_path / "none")):
        load_data(DataSpec(kind=kind, root=str(tmp_path / "none")))


def test_a_torchvision_set_without_its_files_offers_download(tmp_path: Path):
    with pytest.raises(TaskError, match="set download: true"):
        load_data(DataSpec(kind="cifar10", root=str(tmp_path)))


def test_cifar10_is_read_from_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import torchvision.datasets

    below = tmp_path / "cifar-10-batches-py"
    below.mkdir()
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        pixels = np.zeros((20, 3, 32, 32), dtype=np.uint8)
        pixels[:, 0, 0, 1] = 255  # red, first row, second column
        batch = {"data": pixels.reshape(20, -1), "labels": list(range(10)) * 2}
        (below / name).write_bytes(pickle.dumps(batch))
    (below / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    images = load_data(DataSpec(kind="cifar10", root=str(tmp_path), mean=(0.0,) * 3, std=(1.0,) * 3))
    assert [images.size(split) for split in SPLITS] == [90, 10, 20]
    ((x, labels),) = images.batches("test", 100)
    assert labels.tolist() == list(range(10)) * 2
    assert x[0].nonzero().tolist() == [[0, 0, 1]]


@pytest.mark.parametrize(("key", "values"), [("mean", (0.5,)), ("std", (0.5, 0.5))])
def test_a_normalization_for_another_number_of_channels_is_refused(make_folder, key: str, values: tuple[float, ...]):
    with pytest.raises(TaskError, match=rf"task\.data\.{key}: got {len(values)} numbers, .* 3 channels"):
        load_data(folder_spec(make_folder(), **{key: values}))


def test_a_folder_gives_its_images_under_their_labels(make_folder):
    root = make_folder(classes=("ant", "bee", "cat"))
    images = load_data(folder_spec(root, mean=(0.0,) * 3, std=(1.0,) * 3))
    assert isinstance(images, StoredImages)
    assert images.name == "images"
    assert images.num_classes == 3
    for split in SPLITS:
        ((x, labels),) = images.batches(split, 100)
        assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        assert (x[:, 0, 0, 0] * 255).round().tolist() == [0.0] * 4 + [127.0] * 4 + [255.0] * 4


def test_a_folder_is_decoded_once_until_it_changes(make_folder, cache: Path):
    root = make_folder()
    first = load_data(folder_spec(root))
    assert len(list(cache.glob("images-*.safetensors"))) == 1
    moved = root.rename(root.with_name("elsewhere"))
    assert load_data(folder_spec(moved)).key == first.key
    assert len(list(cache.glob("images-*.safetensors"))) == 1
    Image.new("RGB", (8, 8), (9, 9, 9)).save(moved / "train" / "ant" / "new.png")
    assert load_data(folder_spec(moved)).key != first.key
    assert len(list(cache.glob("images-*.safetensors"))) == 2
    Image.new("RGB", (8, 8), (99, 99, 99)).save(moved / "train" / "ant" / "new.png")
    x, _ = next(load_data(folder_spec(moved, mean=(0.0,) * 3, std=(1.0,) * 3)).batches("train", 100))
    assert (x[:, 0, 0, 0] * 255).round().tolist().count(99.0) == 1


def test_a_folder_beyond_the_memory_limit_is_streamed_with_the_same_labels(make_folder, monkeypatch):
    monkeypatch.setattr(data_module, "MEMORY_LIMIT_BYTES", 1000)
    root = make_folder()
    images = load_data(folder_spec(root, image_size=8, mean=(0.0,) * 3, std=(1.0,) * 3), workers=1)
    assert isinstance(images, StreamedImages)
    ((x, labels),) = images.batches("val", 100)
    assert (x[:, 0, 0, 0]).tolist() == labels.float().tolist()
    with pytest.raises(TaskError, match=r"set task\.data\.image_size"):
        load_data(folder_spec(root))


def test_imagenet_has_1000_classes_or_is_refused(make_folder):
    with pytest.raises(TaskError, match="has 2 classes and ImageNet has 1000"):
        load_data(DataSpec(kind="imagenet", root=str(make_folder())))


def pair(n: int = 20, side: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.randint(0, 256, (n, 1, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return pixels, torch.arange(n) % 4


def with_nan() -> torch.Tensor:
    pixels = pair()[0].float()
    pixels[7, 0, 1, 1] = float("nan")
    pixels[9, 0, 1, 1] = float("inf")
    return pixels


BROUGHT = {
    "good": {"train": pair(400), "val": pair(8)},
    "a number": 3,
    "no train": {"val": pair()},
    "flat": {"train": (torch.zeros(4, 8), torch.zeros(4))},
    "too few labels": {"train": (pair()[0], pair(7)[1])},
    "no pair": {"train": 5},
    "one class": {"train": (pair()[0], torch.zeros(20, dtype=torch.long))},
    "empty val": {"train": pair(), "val": (pair()[0][:0], pair()[1][:0])},
    "labels from -1": {"train": (pair()[0], pair()[1] - 1)},
    "yes and no": {"train": (pair()[0], pair()[1] > 1)},
    "sixteen bits": {"train": (pair()[0].to(torch.int16), pair()[1])},
    "a NaN": {"train": (pair()[0].float(), pair()[1]), "val": (with_nan(), pair()[1])},
    "two sizes": {"train": pair(), "val": pair(8, side=6)},
}


def brought(which: str) -> object:
    return BROUGHT[which]


def own(which: str) -> DataSpec:
    return DataSpec(kind=f"{__name__}:brought", args={"which": which})


def test_tensors_from_a_function_become_images_normalized_by_what_they_hold():
    images = load_data(own("good"))
    assert isinstance(images, Images)
    assert images.name == "brought"
    assert images.num_classes == 4
    x = images.calibration_input(400, 0)
    assert abs(float(x.mean())) < 1e-2
    assert abs(float(x.std()) - 1) < 1e-2


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("a number", "gave int: expected an object with the methods"),
        ("no train", "gave dict: expected"),
        ("flat", r"train has pixels \(4, 8\) and labels \(4,\) torch.float32"),
        ("too few labels", r"labels \(7,\)"),
        ("no pair", "train is not a pair of tensors"),
        ("two sizes", r"val has images \(1, 6, 6\)"),
        ("one class", "'brought' has 1 class: give images of two or more"),
        ("empty val", r"val has pixels \(0, 1, 8, 8\) and labels \(0,\) .*n > 0"),
        ("labels from -1", "whole numbers from 0"),
        ("yes and no", r"labels \(20,\) torch.bool: expected"),
        ("sixteen bits", "train has pixels of torch.int16: expected uint8, whose white is 255, or floats"),
        ("a NaN", "2 of 20 images of val have pixels that are NaN or infinite, the first is number 7"),
    ],
)
def test_what_a_function_should_have_given_is_said(which: str, message: str):
    with pytest.raises(TaskError, match=message):
        load_data(own(which))


class NoVal:
    """Somebody's own images, without any for validation."""

    name, key, num_classes, input_shape = "mine", "mine", 3, (1, 8, 8)

    def size(self, split: str) -> int:
        return 0 if split == "val" else 5

    def train_batches(self, batch_size: int, steps: int, seed: int) -> None: ...

    def calibration_input(self, samples: int, seed: int) -> None: ...

    def batches(self, split: str, batch_size: int) -> None: ...


def test_own_images_without_a_validation_image_are_refused():
    with pytest.raises(TaskError, match="'mine' has no image in val: train, val and test need some each"):
        load_data(DataSpec(kind=f"{__name__}:NoVal"))


def test_images_that_are_in_two_splits_are_counted_pixel_for_pixel(make_folder):
    root = make_folder(classes=("ant", "bee"), per_class=3)
    for i, path in enumerate(sorted(root.rglob("*.png"))):
        Image.effect_noise((8, 8), 50 + i).convert("RGB").save(path)
    assert load_data(folder_spec(root)).overlaps() == {}
    Image.open(root / "train" / "ant" / "0.png").save(root / "test" / "bee" / "0.bmp")  # another file, another label
    Image.open(root / "train" / "ant" / "1.png").save(root / "test" / "ant" / "1.png")
    Image.open(root / "val" / "ant" / "1.png").save(root / "test" / "ant" / "2.png")
    assert load_data(folder_spec(root)).overlaps() == {("train", "test"): 2, ("val", "test"): 1}
