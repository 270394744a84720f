"""Batches of images: order, augmentation, normalization, speed."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mpsearch.errors import TaskError
from mpsearch.task.images import (
    Images,
    Normalization,
    SampledImages,
    StoredImages,
    StreamedImages,
    random_crop_flip,
    shuffled_batches,
)

PLAIN = Normalization((0.0,), (1.0,))


def stored(pixels: Tensor, **keys: object) -> StoredImages:
    n = len(pixels)
    splits = {"train": torch.arange(2, n), "val": torch.tensor([0]), "test": torch.tensor([1])}
    facts = {"normalize": PLAIN, "num_classes": n} | keys
    return StoredImages("name", "key", pixels, torch.arange(n), splits, **facts)


def test_normalization_is_pixel_over_white_less_mean_over_std():
    pixels = torch.tensor([[0, 255]], dtype=torch.uint8).view(1, 2, 1, 1)
    x = Normalization((0.5, 0.25), (0.5, 0.125))(pixels)
    assert x.flatten().tolist() == [-1.0, 6.0]


def test_normalization_does_not_change_float_images_in_place():
    pixels = torch.zeros(1, 1, 2, 2)
    Normalization((0.5,), (0.5,), white=1.0)(pixels)
    assert torch.equal(pixels, torch.zeros(1, 1, 2, 2))


def test_every_image_comes_once_before_any_comes_again():
    batches = list(shuffled_batches(torch.arange(10, 17), 3, 7, torch.Generator().manual_seed(0)))
    assert [len(batch) for batch in batches] == [3] * 7
    stream = torch.cat(batches).view(3, 7)
    for epoch in stream:
        assert epoch.sort().values.tolist() == list(range(10, 17))
    assert not torch.equal(stream[0], stream[1])


def test_a_batch_may_be_larger_than_the_set():
    (batch,) = shuffled_batches(torch.arange(3), 8, 1, torch.Generator())
    assert batch.bincount().tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])


def test_a_sample_is_spread_over_its_split_and_leaves_the_others_whole():
    splits = {"train": torch.arange(10), "val": torch.arange(10, 30), "test": torch.arange(30, 32)}
    pixels = torch.arange(32.0).view(32, 1, 1, 1)
    images = StoredImages("name", "key", pixels, torch.arange(32), splits, PLAIN, 32)
    sample = SampledImages(images, "val", 5)
    assert isinstance(sample, Images)
    assert [sample.size(split) for split in splits] == [10, 5, 2]
    for _ in range(2):  # read, then from memory
        batches = list(sample.batches("val", 3))
        assert [labels.tolist() for _, labels in batches] == [[10, 14, 18], [22, 26]]
        assert all(torch.allclose(x.flatten() * 255, labels.float()) for x, labels in batches)
    assert torch.cat([labels for _, labels in sample.batches("test", 3)]).tolist() == [30, 31]
    assert SampledImages(images, "val", 100).size("val") == 20


def test_a_crop_is_a_window_of_the_image_with_black_margins():
    pixels = torch.randint(0, 256, (40, 2, 5, 6), dtype=torch.uint8)
    cropped = random_crop_flip(pixels, 2, flip=True, generator=torch.Generator().manual_seed(0))
    padded = F.pad(pixels, (2, 2, 2, 2))
    found = set()
    for image, out in zip(padded, cropped, strict=True):
        windows = {
            (y, x, flipped): (w.flip(2) if flipped else w)
            for y in range(5)
            for x in range(5)
            for flipped in (False, True)
            for w in (image[:, y : y + 5, x : x + 6],)
        }
        (key,) = (k for k, window in windows.items() if torch.equal(window, out))
        found.add(key)
    assert {y for y, _, _ in found} == {x for _, x, _ in found} == set(range(5))
    assert {flipped for _, _, flipped in found} == {False, True}


def test_without_flip_no_image_is_mirrored():
    pixels = torch.arange(6, dtype=torch.uint8).view(1, 1, 1, 6).expand(200, 1, 4, 6)
    out = random_crop_flip(pixels, 1, flip=False, generator=torch.Generator().manual_seed(0))
    assert (out[:, 0, 1, 3] > out[:, 0, 1, 2]).all()  # no margin reaches there


def test_the_same_seed_gives_the_same_batches_and_another_seed_others():
    images = stored(torch.randint(0, 256, (50, 1, 8, 8), dtype=torch.uint8))
    one, two, other = (list(images.train_batches(16, 5, seed)) for seed in (3, 3, 4))
    assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(one, two, strict=True))
    assert not torch.equal(one[0][1], other[0][1])


def test_batches_do_not_disturb_the_global_random_source():
    images = stored(torch.randint(0, 256, (50, 1, 8, 8), dtype=torch.uint8))
    before = torch.random.get_rng_state()
    list(images.train_batches(16, 2, 0))
    images.calibration_input(5, 0)
    assert torch.equal(before, torch.random.get_rng_state())


def test_training_and_calibration_see_only_training_images():
    images = stored(torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 1, 8, 8), augment=True)
    for x, labels in images.train_batches(8, 4, 0):
        assert labels.min() >= 2
        assert torch.equal((x[:, 0, 4, 4] * 255).round().long(), labels)
    calibration = (images.calibration_input(100, 0)[:, 0, 0, 0] * 255).round().long()
    assert calibration.sort().values.tolist() == list(range(2, 10))
    assert images.calibration_input(3, 0).shape == (3, 1, 8, 8)


def test_a_split_is_read_in_order_and_whole():
    images = stored(torch.randint(0, 256, (12, 1, 4, 4), dtype=torch.uint8))
    assert [labels.tolist() for _, labels in images.batches("train", 4)] == [[2, 3, 4, 5], [6, 7, 8, 9], [10, 11]]


def test_image_size_resizes_batches():
    images = stored(torch.full((4, 1, 8, 8), 255, dtype=torch.uint8), image_size=12)
    assert images.input_shape == (1, 12, 12)
    (x, _) = next(images.train_batches(2, 1, 0))
    assert x.shape == (2, 1, 12, 12)
    assert torch.allclose(x[:, :, 4:8, 4:8], torch.ones(2, 1, 4, 4))  # no black margin reaches there


def test_batches_are_made_faster_than_a_network_can_use_them():
    images = stored(
        torch.randint(0, 256, (5000, 3, 32, 32), dtype=torch.uint8), normalize=Normalization((0.5,), (0.5,))
    )
    list(images.train_batches(128, 5, 0))
    began = time.process_time()
    list(images.train_batches(128, 40, 0))
    rate = 40 * 128 / (time.process_time() - began)
    assert rate > 20_000  # images per second of one core; measured: 60,000 and more


@pytest.fixture
def streamed(tmp_path: Path) -> StreamedImages:
    paths = []
    for i in range(6):
        paths.append(tmp_path / f"{i}.png")
        red, noise = Image.new("L", (40, 30), 40 * i), Image.effect_noise((40, 30), 99)
        Image.merge("RGB", (red, noise, noise)).save(paths[-1])
    splits = {"train": torch.arange(4), "val": torch.tensor([4]), "test": torch.tensor([5])}
    plain = Normalization((0.0,) * 3, (1.0,) * 3)
    return StreamedImages("name", "key", paths, torch.arange(6), splits, plain, 6, image_size=16, workers=1)


def test_streamed_images_are_decoded_cut_and_labelled(streamed: StreamedImages):
    assert isinstance(streamed, Images)
    for split, labels in (("train", [0, 1, 2, 3]), ("val", [4]), ("test", [5])):
        ((x, y),) = streamed.batches(split, 8)
        assert x.shape == (len(labels), 3, 16, 16)
        assert y.tolist() == labels
        assert torch.equal((x[:, 0, 0, 0] * 255).round().long(), 40 * y)


def test_streamed_batches_repeat_with_their_seed(streamed: StreamedImages):
    one, two = (list(streamed.train_batches(3, 3, seed=5)) for _ in range(2))
    assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(one, two, strict=True))
    assert streamed.calibration_input(3, 0).shape == (3, 3, 16, 16)


def test_a_damaged_image_in_a_stream_is_named_without_a_traceback(streamed: StreamedImages):
    path = streamed._paths[4]
    path.write_bytes(b"not an image")
    with pytest.raises(TaskError, match=r"4\.png' is not an image") as caught:
        list(streamed.batches("val", 8))
    assert "Traceback" not in str(caught.value)
