"""How the float network of a study is trained where nothing gives its weights: AdamW under a one-cycle rate."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.private.torch import BatchNormNd
from mpsearch.train import FitSettings, learning_rate, steps

progress = logging.getLogger("mpsearch.progress")
"""What a person waits for, before there is a run to show it: the command line prints it."""

SAY_EVERY_S = 30.0  # how a long float training goes on
FLOAT_BATCH = 64
ADAMW_LR = 2e-3
ADAMW_WEIGHT_DECAY = 0.01


def has_batch_norm(model: nn.Module) -> bool:
    """Whether SGD's high rates suit a network: without BatchNorm, as transformers are, it diverges or stands still."""
    return any(isinstance(module, BatchNormNd) for module in model.modules())


def train_adamw(
    model: nn.Module,
    batches: Iterable[tuple[Any, Any]],
    loss: Callable[[Any, Any], Tensor],
    count: int,
    on_step: Callable[[int, float], None] | None = None,
) -> None:
    """Train `model` in place on `count` batches.

    Raises:
        FloatingPointError: the loss became NaN or infinite.
        TaskError: the batches ended early.
    """
    settings = FitSettings(count, ADAMW_LR)
    weights = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in weights if p.dim() > 1], "weight_decay": ADAMW_WEIGHT_DECAY},
        {"params": [p for p in weights if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=ADAMW_LR)

    def schedule(step: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)

    taken = steps(model, batches, lambda _step, _x, output, target: loss(output, target), [optimizer], count, schedule)
    for step, value in taken:
        if on_step is not None:
            on_step(step, value)


def saying(count: int) -> Callable[[int, float], None]:
    """Says every `SAY_EVERY_S` how far a training of so many steps is."""
    began = said = time.monotonic()

    def on_step(step: int, loss: float) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= SAY_EVERY_S:
            said = now
            left_s = (now - began) / (step + 1) * (count - step - 1)
            progress.info("step %d of %d, loss %.3f, %.0f s left", step + 1, count, loss, left_s)

    return on_step
