"""Sounds with a class each: `ROOT/train/<class>/*`, with val and test where they are, or `ROOT/<class>/*`.

WAV of 8, 16, 24 or 32 bits is read by Python's `wave`; other files by soundfile, where that is installed. Channels are
averaged, and a sound is as long as all others: cut, or padded with silence.
"""

from __future__ import annotations

import hashlib
import wave
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpsearch.cache import content_key
from mpsearch.errors import TaskError
from mpsearch.files import with_home
from mpsearch.study import AudioSpec, TaskSpec
from mpsearch.task.cache import cached_tensors
from mpsearch.task.data import make_splits
from mpsearch.task.imagefolder import list_folder, listing_key
from mpsearch.task.libraries import Needs
from mpsearch.task.made import MELODIES, melodies
from mpsearch.task.own import OwnTask
from mpsearch.task.study_task import StudyTask
from mpsearch.task.task import Split

DECODER = 1  # raise when reading changes: entries of the cache are made again
SOUNDS = (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif")


class AudioTask(StudyTask):
    """The class of a sound."""

    def __init__(
        self, spec: TaskSpec, name: str, key: str, samples: Mapping[Split, tuple[Tensor, Tensor]], classes: int
    ) -> None:
        self._samples = samples
        self._flat = (spec.model or "").startswith("hf:")  # transformers takes (n, samples)
        super().__init__(spec, name, key, Needs("classification", classes, 1, over="audio"))

    def batches(self, split: Split) -> Iterable[Any]:
        """As `StudyTask.batches`: sounds `(n, 1, samples)` float32 in [-1, 1] and classes `(n,)`."""
        x, labels = self._samples[split]
        return [(x[:, 0] if self._flat else x, labels)]


def audio_task(spec: TaskSpec, workers: int | None = None) -> OwnTask:
    """The task of a study whose data are sounds.

    Raises:
        TaskError: files are missing or cannot be read, or the network does not fit; the message names them.
    """
    data = spec.data
    assert isinstance(data, AudioSpec)
    if data.root is None:
        return _melodies(spec)
    listing = list_folder(with_home(data.root), SOUNDS, "a sound")
    first, first_rate = read_sound(listing.paths[0])
    rate = data.rate or first_rate
    length = round((data.seconds or len(first) / first_rate) * rate)
    facts = data.model_dump(mode="json", exclude={"root"})
    key = content_key(DECODER, facts, listing_key(listing, stat=True))

    def make() -> dict[str, Tensor]:
        sounds = torch.zeros(len(listing.paths), 1, length)
        for i, path in enumerate(listing.paths):
            sound, its_rate = read_sound(path)
            if its_rate != rate and data.rate is None:
                raise TaskError(
                    f"'{path}' has {its_rate} samples a second and '{listing.paths[0]}' has {rate}: set "
                    "task.data.rate, to which all are resampled"
                )
            sound = resampled(sound, its_rate, rate)[:length]
            sounds[i, 0, : len(sound)] = sound
        return {"sounds": sounds}

    tensors, _ = cached_tensors(f"sounds-{key}", make)
    splits = make_splits(data, listing.labels, listing.parts)
    samples = {split: (tensors["sounds"][part], listing.labels[part]) for split, part in splits.items()}
    classes = spec.num_classes or len(listing.classes)
    if classes < len(listing.classes):
        raise TaskError(f"task.num_classes: got {classes}, the data has {len(listing.classes)} classes: give as many")
    return AudioTask(spec, listing.root.resolve().name, key, samples, classes).task()


MELODY_COUNTS: Mapping[Split, int] = {"train": 1500, "val": 400, "test": 400}


def _melodies(spec: TaskSpec) -> OwnTask:
    samples = {split: melodies(count, seed) for seed, (split, count) in enumerate(MELODY_COUNTS.items())}
    key = content_key("melodies", hashlib.sha256(samples["val"][0].numpy().data).hexdigest())
    return AudioTask(spec, "melodies", key, samples, spec.num_classes or len(MELODIES)).task()


def read_sound(path: Path) -> tuple[Tensor, int]:
    """A sound `(samples,)` float32 in [-1, 1], its channels averaged, and its rate in samples a second.

    Raises:
        TaskError: it cannot be read, or is empty.
    """
    try:
        sound, rate = _read_wave(path) if path.suffix.lower() == ".wav" else _read_other(path)
    except (wave.Error, EOFError, OSError, RuntimeError, ValueError) as error:
        raise TaskError(f"'{path}' is no sound that can be read: {error or type(error).__name__}") from None
    if not len(sound):
        raise TaskError(f"'{path}' holds no sample: repair or remove it")
    return torch.from_numpy(sound.astype(np.float32)), rate


def _read_wave(path: Path) -> tuple[np.ndarray[Any, Any], int]:
    try:
        with wave.open(str(path), "rb") as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            data = file.readframes(file.getnframes())
    except wave.Error:  # floats, or compressed
        return _read_other(path)
    if width == 1:  # unsigned, as WAV has it
        values = np.frombuffer(data, np.uint8).astype(np.float32) / 128 - 1
    elif width == 3:
        low = np.frombuffer(data, np.uint8).reshape(-1, 3)
        padded = np.concatenate([np.zeros((len(low), 1), np.uint8), low], axis=1)
        values = padded.view("<i4")[:, 0] / 2.0**31
    else:
        values = np.frombuffer(data, f"<i{width}") / 2.0 ** (8 * width - 1)
    return values.reshape(-1, channels).mean(axis=1), rate


def _read_other(path: Path) -> tuple[np.ndarray[Any, Any], int]:
    try:
        import soundfile
    except (ImportError, OSError) as error:
        raise TaskError(
            f"'{path}' is no WAV of whole numbers, and other sounds are read by soundfile ({error}): pip install "
            "'mpsearch[audio]', or convert it"
        ) from None
    values, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return values.mean(axis=1), int(rate)


def resampled(sound: Tensor, rate: int, to: int) -> Tensor:
    """A sound at another rate: `(samples,)`; when the rate falls, what is above the new one's half is averaged away."""
    if rate == to:
        return sound
    from scipy.signal import resample_poly

    common = int(np.gcd(rate, to))
    return torch.from_numpy(resample_poly(sound.numpy(), to // common, rate // common).astype(np.float32))
