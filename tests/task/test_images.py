"""Batches of images: order, augmentation, normalization, speed."""

from __future__ import annotations

import multiprocessing
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import get_worker_info

from mpsearch.errors import TaskError
from mpsearch.task.images import (
    Images,
    Normalization,
    SampledImages,
    StoredImages,
    StreamedImages,
    open_rgb,
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


class Operations(TorchDispatchMode):
    """Counts torch operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += 1
        return operation(*args, **(kwargs or {}))


def test_a_batch_is_augmented_as_a_whole_and_not_image_by_image():
    images = stored(torch.randint(0, 256, (600, 3, 32, 32), dtype=torch.uint8), augment=True)
    counts = []
    for size in (8, 512):
        with Operations() as operations:
            list(images.train_batches(size, 1, 0))
        counts.append(operations.count)
    assert counts[0] == counts[1]


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


class FailsInWorkers:
    """Another transform, but in a worker process it fails at its fourth image, as where shared memory runs out."""

    def __init__(self, transform: Any) -> None:
        self._transform, self._calls = transform, 0

    def __call__(self, image: Any) -> Any:
        self._calls += 1
        if get_worker_info() is not None and self._calls > 3:
            raise RuntimeError("unable to allocate shared memory")
        return self._transform(image)


@pytest.mark.parametrize("fails", ["at once", "on the way"])
def test_workers_that_fail_cost_time_and_change_no_batch(
    streamed: StreamedImages, fails: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    whole = list(streamed.train_batches(2, 6, seed=5))
    if fails == "at once":

        def refuse(**_: object) -> None:
            raise OSError("AF_UNIX path too long")

        monkeypatch.setattr(multiprocessing.connection, "Listener", refuse)
    else:
        monkeypatch.setattr(streamed, "_random", FailsInWorkers(streamed._random))
    state = torch.get_rng_state()
    for _ in range(2):
        again = list(streamed.train_batches(2, 6, seed=5))
        assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(whole, again, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    (said,) = [record.message for record in caplog.records if "decoded in this process" in record.message]
    assert said.endswith("path too long" if fails == "at once" else "unable to allocate shared memory")


def test_what_fails_without_workers_too_is_raised(streamed: StreamedImages, monkeypatch: pytest.MonkeyPatch):
    def fail(image: Any) -> None:
        raise RuntimeError("whatever the process")

    monkeypatch.setattr(streamed, "_random", fail)
    with pytest.raises(RuntimeError, match="whatever the process"):
        list(streamed.train_batches(2, 6, seed=5))


def grey16(value: int, kind: str) -> np.ndarray:
    return np.full((4, 4), value, dtype=kind)


# What a file holds, under which name it is saved, the mode that PIL reads, and the right pixel.
READ = [
    (Image.new("1", (4, 4), 1), "a.png", "1", (255, 255, 255)),
    (Image.new("L", (4, 4), 77), "a.png", "L", (77, 77, 77)),
    (Image.new("RGB", (4, 4), (10, 20, 30)).quantize(4), "a.png", "P", (10, 20, 30)),
    (Image.new("RGB", (4, 4), (10, 20, 30)), "a.png", "RGB", (10, 20, 30)),
    (Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "a.tif", "CMYK", (255, 0, 0)),
    (Image.new("LA", (4, 4), (77, 255)), "a.png", "LA", (77, 77, 77)),
    (Image.new("RGBA", (4, 4), (10, 20, 30, 255)), "a.png", "RGBA", (10, 20, 30)),
    (grey16(60 * 257, "<u2"), "a.png", "I;16", (60, 60, 60)),
    (grey16(170 * 257, "<u2"), "a.png", "I;16", (170, 170, 170)),
    (grey16(170 * 257 + 100, "<u2"), "a.tif", "I;16", (170, 170, 170)),
    (grey16(170 * 257 + 150, "<u2"), "a.tif", "I;16", (171, 171, 171)),
    (grey16(65535, ">u2"), "a.tif", "I;16B", (255, 255, 255)),
    (grey16(60 * 257, "<u2"), "a.pgm", "I", (60, 60, 60)),
]


@pytest.mark.parametrize(("content", "name", "mode", "right"), READ, ids=[f"{r[2]}-{i}" for i, r in enumerate(READ)])
def test_images_of_every_mode_arrive_with_their_own_brightness(
    tmp_path: Path, content: object, name: str, mode: str, right: tuple[int, ...]
):
    image = content if isinstance(content, Image.Image) else Image.fromarray(content)
    image.save(tmp_path / name)
    assert Image.open(tmp_path / name).mode == mode
    read = open_rgb(tmp_path / name)
    assert read.mode == "RGB"
    assert (np.asarray(read) == right).all()


def test_twelve_bits_of_a_tiff_have_their_own_white(tmp_path: Path):
    packed = np.array([[0x8F, 0xF8, 0xFF], [0xFF, 0xF0, 0x00]], dtype=np.uint8)  # 0x8ff, 0x8ff / 0xfff, 0x000
    _tiff(tmp_path / "a.tif", packed.tobytes(), width=2, height=2, bits=12)
    assert Image.open(tmp_path / "a.tif").mode == "I;16"
    assert np.asarray(open_rgb(tmp_path / "a.tif"))[..., 0].tolist() == [[143, 143], [255, 0]]  # 143.3


def _tiff(path: Path, pixels: bytes, width: int, height: int, bits: int) -> None:
    """A grey TIFF as its standard has it: PIL writes none of 12 bits."""
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, 1), (273, 8), (277, 1), (278, height)]
    tags.append((279, len(pixels)))
    pixels += b"\0" * (len(pixels) % 2)
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags)
    head = b"II*\0" + struct.pack("<I", 8 + len(pixels))
    path.write_bytes(head + pixels + struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0))


GREY = Image.new("L", (4, 4), 9)
REFUSED = [
    (Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)), "a.tif", {}, "mode F .*no pixel value is known to be w"),
    (
        Image.fromarray(np.full((4, 4), 9, dtype=np.int32)),
        "a.tif",
        {},
        r"mode I \(32 bits\).*save it with 8 or 16 bits",
    ),
    (Image.new("LA", (4, 4), (77, 0)), "a.png", {}, "mode LA with transparent pixels .alpha 0 of 255"),
    (Image.new("RGBA", (4, 4), (10, 20, 30, 254)), "a.png", {}, "mode RGBA with .*alpha 254.*the background"),
    (GREY.convert("P"), "a.png", {"transparency": 9}, "mode P with transparent pixels"),
    (GREY, "a.png", {"transparency": 9}, "mode L with transparent pixels"),
    (Image.new("RGB", (4, 4), (1, 2, 3)), "a.png", {"transparency": (1, 2, 3)}, "mode RGB with transparent pixels"),
]


@pytest.mark.parametrize(("image", "name", "keys", "message"), REFUSED, ids=[r[0].mode for r in REFUSED])
def test_images_without_a_known_white_or_background_are_refused_by_name(
    tmp_path: Path, image: Image.Image, name: str, keys: dict[str, object], message: str
):
    image.save(tmp_path / name, **keys)
    with pytest.raises(TaskError, match=rf"{name}' is an image of {message}"):
        open_rgb(tmp_path / name)


@pytest.mark.parametrize("flip", [True, False])
def test_set_moved_to_a_device_gives_the_same_batches(flip: bool) -> None:
    """Where there is no card, a copy in the same memory: what is moved is what batches are made of."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pixels = torch.randint(0, 256, (40, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = stored(pixels, flip=flip, normalize=Normalization((0.4, 0.5, 0.6), (0.2, 0.25, 0.3)))
    there = images._moved(device)
    assert there._there[0].device.type == device.type
    for (x, labels), (y, others) in zip(images.train_batches(8, 7, 3), there.train_batches(8, 7, 3), strict=True):
        assert torch.equal(labels, others.cpu())
        torch.testing.assert_close(x, y.cpu())
    for (x, labels), (y, others) in zip(images.batches("val", 5), there.batches("val", 5), strict=True):
        assert torch.equal(labels, others.cpu())
        torch.testing.assert_close(x, y.cpu())
    assert there.calibration_input(4, 0).device.type == "cpu"
    assert images.on_device(torch.device("cpu")) is images
