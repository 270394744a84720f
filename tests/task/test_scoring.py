"""Calls into a task: A4 and A5 of the cases."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpsearch.errors import TaskError
from mpsearch.metric import Metric
from mpsearch.precision import LayerPrecision, PrecisionConfig
from mpsearch.study import TrialSpec
from mpsearch.task.scoring import evaluate
from mpsearch.task.task import Batch, Split
from mpsearch.workbench import Workbench


class Pixels:
    """A task that trusts the protocol: it sets no mode, wants no gradient, and leaves another mode behind."""

    name, metric = "pixels", Metric("agreement", unit="%", format=".2f", bounds=(0.0, 1.0))

    def __init__(self) -> None:
        self.seen: list[tuple[bool, bool]] = []

    def float_model(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1)).eval()

    def train_batches(self, batch_size: int, steps: int, seed: int) -> Iterator[Batch]:
        for i in range(steps):
            x = self.calibration_input(batch_size, seed + i)
            yield x, (x[:, 0] > 0).long()

    def calibration_input(self, samples: int, seed: int = 0) -> Tensor:
        return torch.randn(samples, 1, 6, 6, generator=torch.Generator().manual_seed(seed))

    def evaluate(self, model: nn.Module, split: Split) -> float:
        self.seen.append((model.training, torch.is_grad_enabled()))
        x = self.calibration_input(4, 9)
        agreement = float((model(x).argmax(1) == (x[:, 0] > 0)).float().mean())
        model.eval() if model.training else model.train()
        return agreement

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target)

    def logits(self, output: Any) -> Tensor:
        assert isinstance(output, Tensor)
        return output

    def steps_per_epoch(self, batch_size: int) -> int:
        return 4


@pytest.mark.parametrize("training", [True, False])
def test_a_task_is_called_in_eval_mode_without_gradients_and_every_mode_is_put_back(training: bool) -> None:
    task, model = Pixels(), Pixels().float_model().train(training)
    model[1].eval()  # type: ignore[index]
    modes = [module.training for module in model.modules()]
    evaluate(task, model, "val")
    assert task.seen == [(False, False)]
    assert [module.training for module in model.modules()] == modes


def test_a_trial_halfway_is_scored_in_eval_mode_and_goes_on_in_training_mode() -> None:
    task = Pixels()
    workbench = Workbench(task, TrialSpec(distill=False, batch_size=4, compile=False, precision="fp32"))
    workbench.reset(PrecisionConfig.uniform(["0", "3"], LayerPrecision.shorthand("w4a4")))
    workbench.fit(1, seed=0)
    mode = workbench.model.training
    score = workbench.score("val").value
    assert task.seen[-1] == (False, False)
    assert workbench.model.training == mode
    assert workbench.score("val").value == score  # statistics are as they were


def test_logits_of_positions_are_refused_before_any_trial_and_flat_ones_are_taken() -> None:
    task = Pixels()
    with pytest.raises(TaskError, match=r"pixels: the output .* has the shape \(1, 3, 6, 6\).*trial.distill to false"):
        Workbench(task, TrialSpec(batch_size=4, compile=False))
    task.logits = lambda output: output.movedim(1, -1).flatten(0, -2)  # type: ignore[method-assign]
    workbench = Workbench(task, TrialSpec(batch_size=4, compile=False, precision="fp32"))
    workbench.reset(PrecisionConfig.uniform(["0", "3"], LayerPrecision.shorthand("w2a2")))
    result = workbench.fit(20, seed=0, lr=0.05)
    assert result.end_loss < result.start_loss
