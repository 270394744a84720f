"""Sounds with a class each."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpsearch.errors import TaskError
from mpsearch.study import TaskSpec
from mpsearch.task.audio import read_sound, resampled
from mpsearch.task.load import load_task
from mpsearch.task.scoring import measure


def write(path: Path, sound: Any, rate: int = 4000, width: int = 2, channels: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.round(np.repeat(np.asarray(sound), channels) * (2.0 ** (8 * width - 1) - 1)).astype("<i8")
    if width == 1:
        data = (values + 128).astype(np.uint8).tobytes()
    else:
        data = b"".join(int(value).to_bytes(width, "little", signed=True) for value in values)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(data)


def tone(pitch: float, seconds: float = 0.2, rate: int = 4000, phase: float = 0.0) -> Any:
    return 0.8 * np.sin(2 * np.pi * pitch * np.arange(round(seconds * rate)) / rate + phase)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, pitch in (("high", 900), ("low", 150)):
        for i in range(10):
            write(tmp_path / name / f"{i}.wav", tone(pitch + 10 * i, phase=i))
    return tmp_path


def task(root: Path, model: str = "wave_cnn", epochs: int = 1, **data: Any) -> Any:
    args = {"first": 16, "stride": 4, "width": 8} if model == "wave_cnn" else {}
    return load_task(
        TaskSpec(model=model, model_args=args, data={"kind": "audio", "root": str(root), **data}, float_epochs=epochs)
    )


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_waves_of_every_width_are_read_the_same(tmp_path: Path, width: int, channels: int) -> None:
    write(tmp_path / "a.wav", tone(300), width=width, channels=channels)
    sound, rate = read_sound(tmp_path / "a.wav")
    assert rate == 4000
    assert torch.allclose(sound, torch.from_numpy(tone(300)).float(), atol=1.5 * 2.0 ** (1 - 8 * width))


def test_a_sound_that_is_resampled_keeps_its_pitch() -> None:
    slow = resampled(torch.from_numpy(tone(300, rate=8000)).float(), 8000, 4000)
    assert torch.allclose(slow[50:-50], torch.from_numpy(tone(300)).float()[50:-50], atol=0.01)


def test_a_network_tells_pitches_apart(folder: Path) -> None:
    of = task(folder, epochs=40)
    assert (of.metric.name, of.kind) == ("top1", "classification")
    assert measure(of, of.float_model(), "val").score == 1.0


def test_sounds_are_cut_and_padded_to_one_length(folder: Path) -> None:
    write(folder / "low" / "9.wav", tone(150, seconds=0.05))
    x = task(folder, seconds=0.1).calibration_input(100)
    assert x.shape[1:] == (1, 400)
    assert task(folder).calibration_input(1).shape == (1, 1, 800)


def test_what_is_wrong_with_sounds_is_told(folder: Path) -> None:
    write(folder / "low" / "9.wav", tone(150), rate=8000)
    with pytest.raises(TaskError, match=r"has 8000 samples a second and '.*' has 4000: set task\.data\.rate"):
        task(folder)
    assert task(folder, rate=2000).calibration_input(1).shape == (1, 1, 400)
    (folder / "low" / "9.wav").write_bytes(b"RIFF")
    with pytest.raises(TaskError, match=r"9\.wav' is no sound that can be read"):
        task(folder)
    (folder / "low" / "9.wav").rename(folder / "low" / "9.txt")
    with pytest.raises(TaskError, match=r"9\.txt' is not a sound: expected \.wav \.flac"):
        task(folder)


def test_other_sounds_name_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    (folder / "high" / "0.flac").write_bytes(b"fLaC")
    with pytest.raises(TaskError, match=r"read by soundfile .*pip install 'mpsearch\[audio\]'"):
        task(folder)


def test_flac_is_read_by_soundfile(tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(tmp_path / "a.flac", tone(300), 4000)
    sound, rate = read_sound(tmp_path / "a.flac")
    assert rate == 4000
    assert torch.allclose(sound, torch.from_numpy(tone(300)).float(), atol=1e-3)


def test_a_network_for_images_is_refused(folder: Path) -> None:
    with pytest.raises(TaskError, match="cannot take a sample of the data"):
        task(folder, "resnet18")
