"""Values by block of samples: of metrics that are no mean over samples, and what intervals they make."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mpsearch.metric import METRICS, Metric
from mpsearch.record import pack
from mpsearch.search.compare import paired
from mpsearch.task.jackknife import LEAST, MOST
from mpsearch.task.scores import MeanIoU, Scorer, scorer

SAMPLES = 60


def segmented(noise: float, samples: int = SAMPLES, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits `(n, 3, 8, 8)` and labels; the noise of a picture is its own."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (samples, 8, 8), generator=random)
    hard = torch.rand(samples, 1, 1, 1, generator=random)
    logits = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).float()
    return logits + noise * hard * torch.randn(logits.shape, generator=random), labels


def scored(of: Scorer, output: Any, target: Any, batch: int) -> tuple[float, Tensor | None]:
    for start in range(0, len(output), batch):
        part = slice(start, start + batch)
        of.add(output[part], target[part], len(output[part]))
    return of.result()


@pytest.mark.parametrize("batch", [1, 7, 30])
def test_a_value_says_what_its_sample_does_to_the_score(batch: int) -> None:
    output, target = segmented(1.0)
    score, values = scored(scorer("t", METRICS["miou"], None), output, target, batch)
    assert values is not None
    assert values.shape == (SAMPLES,)
    assert float(values.double().mean()) == pytest.approx(score, abs=1e-6)
    every = MeanIoU()
    every.update(output, target)
    assert score == every.compute()
    spread = values.double() - score  # the mean of all but one, less that one
    others = [float(spread[i]) for i in (0, 17, SAMPLES - 1)]
    left = []
    for i in (0, 17, SAMPLES - 1):
        rest = MeanIoU()
        rest.update(output[torch.arange(SAMPLES) != i], target[torch.arange(SAMPLES) != i])
        left.append(rest.compute())
    for one, other in ((0, 1), (1, 2)):
        expected = (SAMPLES - 1) * (left[other] - left[one])
        assert others[one] - others[other] == pytest.approx(expected, abs=1e-5)


def test_the_interval_is_that_of_drawing_pictures_anew() -> None:
    metric = METRICS["miou"]
    (ours, labels), (theirs, _) = segmented(1.0, 120), segmented(1.3, 120)
    packed = []
    for output in (ours, theirs):
        _, values = scored(scorer("t", metric, None), output, labels, 16)
        assert values is not None
        packed.append(pack(values.numpy()))
    told = paired([packed[0]], [packed[1]], metric)

    def counts(output: Tensor) -> np.ndarray:
        kept = []
        for i in range(120):
            of = MeanIoU()
            of.update(output[i : i + 1], labels[i : i + 1])
            assert of._counts is not None
            kept.append(of._counts.numpy())
        return np.stack(kept)

    def miou(counts: np.ndarray) -> np.ndarray:
        right = np.diagonal(counts, axis1=-2, axis2=-1)
        answer: np.ndarray = (right / (counts.sum(-1) + counts.sum(-2) - right)).mean(-1)
        return answer

    drawn = np.random.default_rng(0).multinomial(120, np.full(120, 1 / 120), size=2000)
    differences = miou(np.einsum("rn,nij->rij", drawn, counts(ours))) - miou(
        np.einsum("rn,nij->rij", drawn, counts(theirs))
    )
    low, high = np.percentile(differences, [2.5, 97.5])
    assert told.high - told.low == pytest.approx(high - low, rel=0.15)
    assert told.low == pytest.approx(low, abs=0.2 * (high - low))
    assert told.low > 0


def test_many_samples_become_blocks_and_few_have_no_values() -> None:
    output, target = segmented(1.0, 1000)
    score, values = scored(scorer("t", METRICS["miou"], None), output, target, 10)
    assert values is not None
    assert MOST <= len(values) < 2 * MOST
    assert float(values.double().mean()) == pytest.approx(score, abs=1e-6)
    assert scored(scorer("t", METRICS["miou"], None), output[: LEAST - 1], target[: LEAST - 1], 4)[1] is None


def test_the_values_of_a_root_mean_square() -> None:
    random = torch.Generator().manual_seed(0)
    output = torch.randn(40, 5, generator=random)
    score, values = scored(scorer("t", METRICS["rmse"], None), output, torch.zeros(40, 5), 8)
    assert score == pytest.approx(float(output.double().square().mean().sqrt()))
    assert values is not None
    # To first order a value is the score, and half of what the sample's square differs by, over the score.
    expected = score + (output.double().square().mean(1) - score**2) / (2 * score)
    assert torch.corrcoef(torch.stack([values.double(), expected]))[0, 1] > 0.99


class Own:
    """As a user's own: the share of samples whose largest number is positive, squared."""

    def __init__(self) -> None:
        self.right, self.seen = 0, 0

    def update(self, output: Tensor, target: Tensor) -> None:
        self.right += int((output.amax(1) > target).sum())
        self.seen += len(output)

    def compute(self) -> dict[str, float]:
        return {"own": (self.right / self.seen) ** 2}


class Merging(Own):
    def merge_state(self, other: Own) -> None:
        self.right, self.seen = self.right + other.right, self.seen + other.seen


def test_an_accumulator_of_ones_own_has_values_if_it_can_be_merged() -> None:
    output = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
    metric = Metric("own")
    plain = scored(scorer("t", metric, Own()), output, torch.zeros(30), 8)
    merged = scored(scorer("t", metric, Merging()), output, torch.zeros(30), 8)
    assert plain[1] is None
    assert merged[0] == plain[0]
    assert merged[1] is not None
    assert len(merged[1]) == 30
    assert float(merged[1].mean()) == pytest.approx(merged[0], abs=1e-6)


@pytest.mark.parametrize("name", ["f1", "auroc", "r2", "ssim"])
def test_metrics_of_torchmetrics_have_values(name: str) -> None:
    pytest.importorskip("torchmetrics", reason="make test-all installs it")
    random = torch.Generator().manual_seed(0)
    if name in ("f1", "auroc"):
        target = torch.arange(SAMPLES) % 3
        output = torch.nn.functional.one_hot(target, 3) + torch.randn(SAMPLES, 3, generator=random)
    else:
        target = torch.rand((SAMPLES, 1, 16, 16) if name == "ssim" else (SAMPLES,), generator=random)
        output = (target + 0.1 * torch.randn(target.shape, generator=random)).clamp(0, 1)
    score, values = scored(scorer("t", METRICS[name], None), output, target, 16)
    assert values is not None
    assert values.shape == (SAMPLES,)
    assert float(values.double().mean()) == pytest.approx(score, abs=1e-5)
    assert float(values.std()) > 0


def test_a_metric_that_keeps_all_answers_has_values_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchmetrics", reason="make test-all installs it")
    monkeypatch.setattr("mpsearch.task.jackknife.KEPT", 4 * SAMPLES - 1)  # three scores and a label of each
    target = torch.arange(SAMPLES) % 3
    output = torch.randn(SAMPLES, 3, generator=torch.Generator().manual_seed(0))
    assert scored(scorer("t", METRICS["auroc"], None), output, target, 16)[1] is None
    assert scored(scorer("t", METRICS["auroc"], None), output[:-1], target[:-1], 16)[1] is not None
    assert scored(scorer("t", METRICS["f1"], None), output, target, 16)[1] is not None  # which counts


def test_errors_over_words_have_values() -> None:
    pytest.importorskip("torchmetrics", reason="make test-all installs it")
    words = ["a b c d", "a b x d", "a y c z"] * 5
    of = scorer("t", METRICS["wer"], None, lambda output, target: (list(output), list(target)))
    score, values = scored(of, words, ["a b c d"] * 15, 4)
    assert score == pytest.approx(3 / 12)
    assert values is not None
    assert values.tolist() == pytest.approx([0, 0.25, 0.5] * 5, abs=1e-5)
