"""The pitch of a tone: within how many of them the answer is at most 50 cents, half a semitone, off.

Frames and answers are those of CREPE (arXiv 1802.06182): 1,024 samples at 16 kHz, with mean 0 and deviation 1, and a
number in [0, 1] for each of 360 pitches 20 cents apart, of which those near the largest are averaged. Tones are made
here, so that their pitch is known.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mpsearch.cache import content_key
from mpsearch.errors import TaskError
from mpsearch.study import TaskSpec, TonesSpec
from mpsearch.task.comparing import output_tensor
from mpsearch.task.libraries import Needs
from mpsearch.task.own import OwnTask
from mpsearch.task.study_task import StudyTask
from mpsearch.task.task import Split

RATE = 16_000
FRAME = 1024
PITCHES = 360
STEP_CENTS = 20.0
LOWEST_CENTS = 1997.3794084376191  # above 10 Hz: of the first pitch, 31.7 Hz
AVERAGED = 4  # pitches on either side of the largest
SPREAD_CENTS = 25.0  # of the targets that a network trains to
COUNTS: Mapping[Split, int] = {"train": 2000, "val": 500, "test": 500}


def tones(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Tones of 80 to 1,000 Hz with overtones of any strength, in noise.

    Args:
        count: tones.
        seed: of everything about them.

    Returns:
        frames `(count, 1024)` float32 with mean 0 and deviation 1; pitches `(count,)` in cents above 10 Hz.
    """
    random = np.random.default_rng(seed)
    pitch = 80 * (1000 / 80) ** random.random((count, 1))
    overtones = np.arange(1, 9)
    strengths = random.random((count, 8)) / overtones
    strengths *= overtones * pitch < RATE / 2
    phases = 2 * np.pi * random.random((count, 8, 1))
    time = np.arange(FRAME) / RATE
    waves = np.sin(2 * np.pi * (overtones * pitch)[:, :, None] * time + phases)
    frames = (strengths[:, :, None] * waves).sum(axis=1)
    frames /= frames.std(axis=1, keepdims=True)
    frames += random.uniform(0.05, 0.5, (count, 1)) * random.standard_normal(frames.shape)
    frames = (frames - frames.mean(axis=1, keepdims=True)) / frames.std(axis=1, keepdims=True)
    cents = 1200 * np.log2(pitch[:, 0] / 10)
    return torch.from_numpy(frames.astype(np.float32)), torch.from_numpy(cents.astype(np.float32))


def pitches() -> Tensor:
    """Of the answers `(360,)`, in cents above 10 Hz."""
    return LOWEST_CENTS + STEP_CENTS * torch.arange(PITCHES)


def answered_cents(output: Tensor) -> Tensor:
    """The pitch `(n,)` that an answer `(n, 360)` stands for: the mean of the pitches around the largest."""
    near = output.argmax(dim=1, keepdim=True) + torch.arange(-AVERAGED, AVERAGED + 1, device=output.device)
    inside = (near >= 0) & (near < PITCHES)
    near = near.clamp(0, PITCHES - 1)
    weights = output.gather(1, near) * inside
    cents = pitches().to(output.device)[near]
    return (weights * cents).sum(dim=1) / weights.sum(dim=1).clamp_min(1e-12)


class TonesTask(StudyTask):
    """The pitch of a frame."""

    def __init__(self, spec: TaskSpec, samples: Mapping[Split, tuple[Tensor, Tensor]], key: str) -> None:
        self._samples = samples
        super().__init__(spec, "tones", key, Needs("regression", over="audio"))
        if self.metric.name == "within_50_cents" and not hasattr(self, "score"):
            self.score = self._within

    def batches(self, split: Split) -> Iterable[Any]:
        """As `StudyTask.batches`: frames `(n, 1024)` and pitches in cents `(n,)`."""
        return [self._samples[split]]

    def loss(self, output: Any, target: Any) -> Tensor:
        """The mean cross-entropy of each pitch's number, towards a bell around the right one."""
        right = torch.exp(-((pitches().to(target.device) - target.unsqueeze(1)) ** 2) / (2 * SPREAD_CENTS**2))
        return F.binary_cross_entropy(output_tensor(output).clamp(0, 1), right)

    def fits(self, output: Any) -> bool:
        """As `StudyTask.fits`."""
        answer = output_tensor(output)
        return isinstance(answer, Tensor) and answer.shape == (1, PITCHES)

    def expected(self) -> str:
        """As `StudyTask.expected`."""
        return f"(1, {PITCHES}), a number in [0, 1] for each pitch"

    @staticmethod
    def _within(output: Any, target: Any) -> Tensor:
        near: Tensor = (answered_cents(output_tensor(output).float()) - target).abs() <= 50
        return near


def tones_task(spec: TaskSpec, workers: int | None = None) -> OwnTask:
    """The task of a study whose data are tones.

    Raises:
        TaskError: the network does not take frames, or answers something else than pitches.
    """
    if not isinstance(spec.data, TonesSpec):
        raise TaskError("task.data: expected kind tones")
    samples = {split: tones(count, seed) for seed, (split, count) in enumerate(COUNTS.items())}
    key = content_key("tones", hashlib.sha256(samples["val"][0].numpy().data).hexdigest())
    return TonesTask(spec, samples, key).task()
