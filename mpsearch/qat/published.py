"""GDNSQ (arXiv 2508.14004) as its authors train: the recipe of their library, github.com/aifoundry-org/MHAQ, read.

    loss = base + t * mean(base) * [m_w mean relu(b_w - (W - e)) + m_a mean relu(b_a - (A - e))]

Weights and inputs start at 10 bits between their smallest and largest value. All parameters, ranges included, have one
RAdam and one learning rate, which rises over `warmup` steps. From then on the temperature t grows by the same amount at
each step, and bits fall. Once an epoch it is asked whether the *true* bits, those of the integer codes, are at their
targets; from that epoch on the rate shrinks by the same factor at each step.

Constants are the library's, and meant for hundreds of epochs: RAdam moves a log2 step by about `lr` a step, so nine
bits take some 5,000 steps after the warm-up. The library counts a network only when it has converged; a note says where
one has not.

How we differ. Targets may differ between layers, and inputs learn their lower end in all layers (there, wherever the
module made just before is no ReLU: in all layers of its ResNet-20). Bits are looked at as what the clamp allows, where
the library looks at what a validation batch used. The end of training counts, not the best epoch. The mean of the base
loss includes the batch at hand. Batch size and loss are the study's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from mpsearch.precision import PrecisionConfig
from mpsearch.qat.gdnsq import (
    Penalty,
    bit_targets,
    check_targets,
    deployed,
    logged,
    violation,
)
from mpsearch.qat.trained import Trained
from mpsearch.quant.gdnsq import GdnsqQuantizer, RoundGradient, StepGradient
from mpsearch.quant.prepare import insert_quantizers, quant_layers, weight_rows, without_products
from mpsearch.task.task import Task
from mpsearch.train import steps as training_steps
from mpsearch.train import timed
from mpsearch.workbench import Workbench


@dataclass(frozen=True, slots=True)
class Recipe:
    """The library's constants."""

    bits: int = 10  # after calibration
    lr: float = 2e-3
    warmup: int = 1000  # steps
    growth: float = 2.0  # of t, at each step, in learning rates
    anneal: float = 0.9985  # of the learning rate, at each step after convergence
    step_gradient: StepGradient = "mhaq_ste"  # of weights; inputs always have this one
    round_gradient: RoundGradient = "ste"  # of weights; inputs always have this one


def published(
    task: Task,
    config: PrecisionConfig,
    workbench: Workbench,
    steps: int,
    seed: int = 0,
    recipe: Recipe | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> Trained:
    """Train the network of `task` down to `config` by the published recipe.

    Args:
        task: what is compressed.
        config: the target of each layer: uniform weights per channel, uniform activations, or float.
        workbench: the float network's workbench, for layers, ranges, the teacher and how to train.
        steps: batches; a few thousand at least.
        seed: of the batches.
        recipe: other constants.
        on_step: called with (step, training loss).

    Returns:
        the network on the offset grids (`quant/offset_grid.py`) that its quantizers have become.

    Raises:
        PrecisionError: a target that GDNSQ cannot have.
        FloatingPointError: the loss became NaN or infinite.
    """
    recipe = recipe or Recipe()
    check_targets(config, groups=False)
    seconds: dict[str, float] = {}
    with timed(seconds, "prepare"):
        model = calibrated(task.float_model(), config, workbench, recipe).to(workbench.device)
        workbench.compile_quantizers(model)
        torch.manual_seed(seed)
    with timed(seconds, "train"):
        log, notes = _train(task, model, config, workbench, steps, seed, recipe, on_step)
    with timed(seconds, "finish"):
        model = deployed(model, config, task.float_model(), workbench.layers).to(workbench.device)
    return Trained(model.eval(), workbench.layers, config, seconds, tuple(log), notes)


def calibrated(model: nn.Module, config: PrecisionConfig, workbench: Workbench, recipe: Recipe) -> nn.Module:
    """A copy of a float model with quantizers of 2^bits codes from the smallest to the largest value of each tensor."""
    without_products(workbench.layers, "gdnsq as published")
    quantized = insert_quantizers(model, workbench.layers)
    levels = torch.tensor(2.0**recipe.bits)
    for name, layer in quant_layers(quantized).items():
        rows, shape = weight_rows(layer), layer.weight_quantizer.step.shape
        if not config[name].weight.is_float:
            step = (rows.amax(dim=1) - rows.amin(dim=1)) / (levels - 1)
            layer.weight_quantizer = GdnsqQuantizer(  # type: ignore[assignment]
                step.reshape(shape),
                levels,
                weight_grid="min",
                axis=layer.channel_axis,
                step_gradient=recipe.step_gradient,
                round_gradient=recipe.round_gradient,
            )
        if not config[name].activation.is_float:
            low, high = workbench.ranges.ends(name)
            layer.input_quantizer = GdnsqQuantizer(  # type: ignore[assignment]
                torch.tensor((high - low) / (2**recipe.bits - 1)),
                levels,
                beta=torch.tensor(low),
                step_gradient="mhaq_ste",
            )
    return quantized


def _train(
    task: Task,
    model: nn.Module,
    config: PrecisionConfig,
    workbench: Workbench,
    steps: int,
    seed: int,
    recipe: Recipe,
    on_step: Callable[[int, float], None] | None,
) -> tuple[list[dict[str, float]], tuple[str, ...]]:
    """The training loop; the model is trained in place. Returns what happened once an epoch, and notes."""
    layers = quant_layers(model)
    targets = bit_targets(config, layers)
    penalty = Penalty(targets, growth=0.0, moves_ranges=True)
    optimizer = torch.optim.RAdam(model.parameters(), lr=recipe.lr)
    epoch = max(1, task.steps_per_epoch(workbench.settings.batch_size))
    log: list[dict[str, float]] = []
    share, converged = 1.0, False

    def schedule(step: int) -> None:
        nonlocal share
        if step >= recipe.warmup:
            penalty.t += recipe.growth * recipe.lr
            share *= recipe.anneal if converged else 1.0
        rising = min(1.0, step / max(1, recipe.warmup))
        optimizer.param_groups[0]["lr"] = recipe.lr * share * rising

    def excess_penalty(_step: int, base: Tensor) -> Tensor:
        return penalty(base, layers)

    for step, value in training_steps(
        model,
        workbench.train_batches(steps, seed),
        workbench.loss(seed),
        [optimizer],
        steps,
        schedule,
        clipped=(),
        penalty=excess_penalty,
        bf16=workbench.bf16,
    ):
        if (step + 1) % epoch == 0 or step == steps - 1:
            excess = violation(layers, targets)
            converged = excess <= 0
            log.append(
                logged(step, value, layers, excess, penalty.t, cast(float, optimizer.param_groups[0]["lr"]) / recipe.lr)
            )
        if on_step is not None:
            on_step(step, value)
    if converged:
        return log, ()
    return log, (
        f"true bits were still {log[-1]['excess']:.2f} above the target when the steps ended, and were cut to it: the "
        f"recipe takes some {recipe.warmup + _steps_down(config, recipe)} steps to get there, these were {steps}",
    )


def _steps_down(config: PrecisionConfig, recipe: Recipe) -> int:
    """The steps from calibration down to the lowest target, when a log2 step moves by the learning rate a step."""
    bits = [p.bits for layer in config.values() for p in (layer.weight, layer.activation) if not p.is_float]
    return round((recipe.bits - min(bits, default=recipe.bits)) / recipe.lr)
