"""A trial: one config, fine-tuned briefly and scored on the validation split.

`run_trial` is a plain function. What does not depend on the config (the float model and its layers, the quantized
model and its compiled form, activation samples, the teacher's logits) sits on a `Workbench` that a worker keeps from
trial to trial, because bits and quantizer types are data: a new config changes buffers, and nothing is rebuilt or
recompiled.
"""

from __future__ import annotations

import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.compiler import compiler_missing
from mpsearch.exporters.native import load_tensors
from mpsearch.graph.layers import LayerInfo, ModelGraph, inspect_model
from mpsearch.precision import Offer, PrecisionConfig
from mpsearch.quant.fused import fuse
from mpsearch.quant.prepare import RangeSetter, insert_quantizers, set_precision
from mpsearch.quant.shift import DEFAULT_SLOPE, SlopeSchedule
from mpsearch.record import TrialRecord, TrialState, WallTime
from mpsearch.search.compare import pack
from mpsearch.search.stopping import NO_BARS, Bars
from mpsearch.study import TrialSpec
from mpsearch.task.task import Answering, Answers, Sampling, Split, Task
from mpsearch.train import (
    FitResult,
    FitSettings,
    Teacher,
    bf16_is_fast,
    fit,
    jeffreys,
    reestimate_batch_norm,
)

logger = logging.getLogger(__name__)

WORTH_COMPILING = 5e8
"""Quantized inputs of one trial's training, in elements, from which torch.compile pays: its 25 seconds come once.

A ResNet-20 and a small MobileNetV2 with an eighth of its MACs both have 2.4e9: the one saves some ten seconds of a
trial, the other twelve.
"""


SETTLED = 0.01
"""Nats from the float network's answers below which brief training only does harm.

A ResNet-20 at W8A8 and W7A7 starts at 0.002 and 0.006; 100 steps of distillation take W8A8 to 0.02.
"""

NEAR = 0.1
"""Nats from the float network's answers below which BatchNorm's own statistics are better than estimates of them."""

GLANCE = 1000
"""Samples of val on which a trial is scored at the start and halfway, where the task can be sampled."""


class Workbench:
    """Everything that trials of one task share inside one process.

    Args:
        task: what is compressed.
        settings: how trials train.
        device: where they run; default: the GPU if there is one.
        offers: the quantizer types that trials switch between, by layer (`SearchSpace.offers`); default: uniform.
        float_model: what is quantized, and teaches; default: the task's.
    """

    def __init__(
        self,
        task: Task,
        settings: TrialSpec,
        device: torch.device | None = None,
        offers: Mapping[str, Offer] = MappingProxyType({}),
        float_model: nn.Module | None = None,
    ) -> None:
        self.task = task
        self.settings = settings
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        float_model = channels_last(float_model or task.float_model())
        calibration = task.calibration_input(settings.calibration_samples)
        self.graph: ModelGraph = inspect_model(float_model, calibration)
        self.layers: tuple[LayerInfo, ...] = self.graph.layers
        self.ranges = RangeSetter(float_model, self.layers, calibration)
        self.bf16 = settings.precision == "bf16" or (settings.precision == "auto" and bf16_is_fast())
        self.model = insert_quantizers(float_model, self.layers, offers).to(self.device)
        self._start = {name: value.detach().clone() for name, value in float_model.state_dict().items()}
        self._float = float_model
        self._glance = task.sampled(GLANCE) if isinstance(task, Sampling) else task
        self._float_answers: dict[tuple[str, Split], Answers] = {}
        self.quicken(self.model)
        self.teacher = Teacher(float_model.to(self.device), task.logits, bf16=self.bf16)

    def quicken(self, model: nn.Module) -> nn.Module:
        """Have a model's quantizers compiled, in place, where the study says so, or where it pays and can be done."""
        samples = self.settings.steps * self.settings.batch_size
        elements = samples * sum(layer.calls * math.prod(layer.input_shape) for layer in self.layers)
        wanted = self.settings.compile
        if wanted is False or (wanted == "auto" and elements < WORTH_COMPILING):
            return model
        if missing := compiler_missing():
            logger.warning("torch.compile is not used: %s; trials run eagerly and take longer", missing)
            return model
        return fuse(model)

    def reset(self, config: PrecisionConfig, start_weights: Mapping[str, Tensor] | None = None) -> None:
        """Put the start weights back and take on a config's precisions and ranges.

        Args:
            config: a precision for each quantizable layer.
            start_weights: a state dict with the float model's names; default: the float model's.
        """
        self.restore(self._start if start_weights is None else start_weights)
        set_precision(self.model, config, self.ranges)

    def state(self) -> dict[str, Tensor]:
        """The model's weights, statistics and ranges as they are now."""
        return {name: value.clone() for name, value in self.model.state_dict().items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` holds; the rest stays."""
        load_tensors(self.model, state, strict=False)  # loaded, because what is packed has no variable to copy into

    def loss(self, seed: int) -> Callable[[int, Any, Any, Any], Tensor]:
        """The training loss: Jeffreys divergence to the float model, or the task's own."""
        if not self.settings.distill:
            return lambda _step, _x, output, target: self.task.loss(output, target)
        return lambda step, x, output, _target: jeffreys(self.task.logits(output), self.teacher(seed, step, x))

    def fit(
        self,
        steps: int,
        seed: int,
        lr: float | None = None,
        on_step: Callable[[int, float], None] | None = None,
        slope: SlopeSchedule = DEFAULT_SLOPE,
    ) -> FitResult:
        """Fine-tune the model as it stands for `steps` batches."""
        settings = FitSettings(
            steps=steps,
            lr=lr or self.settings.lr,
            weight_decay=self.settings.weight_decay,
            bf16=self.bf16,
            slope=slope,
        )
        batches = self.task.train_batches(self.settings.batch_size, steps, seed)
        return fit(self.model, batches, self.loss(seed), settings, on_step)

    def reestimate(self, seed: int) -> None:
        """Re-estimate BatchNorm statistics on training batches."""
        count = self.settings.bn_batches
        if count:
            reestimate_batch_norm(self.model, self.task.train_batches(self.settings.batch_size, count, seed + 1))

    def score(self, split: Split) -> Score:
        """How the hard-quantized model fares on a split, in float32; its mode stays as it was."""
        return self._score(self.task, split)

    def glance(self) -> Score:
        """How it fares on `GLANCE` samples of val; on all where the task takes no samples."""
        return self._score(self._glance, "val")

    def _score(self, task: Task, split: Split) -> Score:
        if not isinstance(task, Answering):
            return Score(task.evaluate(self.model, split))
        answers = task.answers(self.model, split)
        if not math.isfinite(answers.accuracy):
            return Score(answers.accuracy)
        key = ("glance" if task is self._glance else "all", split)
        if key not in self._float_answers:
            self._float_answers[key] = task.answers(self._float, split)
        divergence = float(jeffreys(answers.logits, self._float_answers[key].logits))
        return Score(answers.accuracy, divergence, pack(answers.correct.numpy()))


@dataclass(frozen=True, slots=True)
class Score:
    """The task's metric and, where the task says how each sample fared, the divergence from the float network too."""

    accuracy: float
    divergence: float | None = None  # mean Jeffreys divergence, nats
    correct: str | None = None  # packed


class Dominated(Exception):
    """The trial cannot reach the front any more."""


def run_trial(
    task: Task,
    config: PrecisionConfig,
    settings: TrialSpec,
    start_weights: Mapping[str, Tensor] | None = None,
    *,
    bench: Workbench | None = None,
    cost: Callable[[PrecisionConfig], float] | None = None,
    on_step: Callable[[int, float], None] | None = None,
    bars: Bars = NO_BARS,
) -> TrialRecord:
    """Fine-tune `config` briefly and score it on the validation split, and on a sample of it at the start and halfway.

    At the start BatchNorm's statistics are estimated anew, unless the network is `NEAR` the float one. The better of
    start and end is what counts and what the bench's model is left at: at many bits a brief fine-tune can do harm. A
    config that answers as the float network does (`SETTLED`) is not trained at all.

    Args:
        task: what is compressed.
        config: a precision for each quantizable layer.
        settings: steps, batch size, learning rate, ...
        start_weights: weights to start from; default: the float model's.
        bench: the worker's workbench; default: a fresh one.
        cost: relative cost of a config; default: the record has none.
        on_step: called with (step, training loss).
        bars: what the trial must pass at the start and halfway; else it stops.

    Returns:
        A complete or stopped record. Its accuracy is that of the hard-quantized network.

    Raises:
        FloatingPointError: the loss or the score became NaN or infinite.
        PrecisionError: the config does not fit the model.
    """
    started = time.time()
    clock = time.perf_counter()
    bench = bench or Workbench(task, settings, offers=config.offers)
    bench.reset(config, start_weights)
    prepared = time.perf_counter()
    curve: list[tuple[int, float]] = []

    def scored(step: int, score: Score) -> Score:
        if not math.isfinite(score.accuracy):
            raise FloatingPointError(f"the task's metric on val is {score.accuracy} after {step} steps")
        curve.append((step, score.accuracy))
        return score

    score = bench.glance()
    if settings.steps > 0 and score.divergence is not None and score.divergence >= NEAR:
        bench.reestimate(settings.seed)
        score = bench.glance()
    start_divergence = score.divergence
    trains = settings.steps > 0 and not (start_divergence is not None and start_divergence < SETTLED)
    score = scored(0, score if trains else bench.score("val"))
    scoring_s = time.perf_counter() - prepared
    half = (settings.steps + 1) // 2

    def watch(step: int, loss: float) -> None:
        nonlocal scoring_s
        if on_step is not None:
            on_step(step, loss)
        if step + 1 == half < settings.steps:
            began = time.perf_counter()
            scored(half, bench.glance())
            scoring_s += time.perf_counter() - began
            if bars.halfway is not None and curve[-1][1] < bars.halfway:
                raise Dominated(f"{curve[-1][1]:.4f} after {half} steps, below the bar of {bars.halfway:.4f}")

    start_loss = end_loss = reason = None
    state: TrialState = "complete"
    if trains:
        try:
            if bars.start is not None and start_divergence is not None and start_divergence > bars.start:
                raise Dominated(f"{start_divergence:.3f} nats from float at the start, the bar is {bars.start:.3f}")
            start = bench.state()
            result = bench.fit(settings.steps, settings.seed, on_step=watch)
            start_loss, end_loss = result.start_loss, result.end_loss
        except Dominated as why:
            state, reason = "stopped", f"dominated: {why}"
    trained = time.perf_counter()
    if state == "complete" and trains:
        bench.reestimate(settings.seed)
        glanced, score = score, scored(settings.steps, bench.score("val"))
        if score.accuracy < glanced.accuracy:
            score = _better(bench, start, score)
    done = time.perf_counter()
    return TrialRecord(
        config=config,
        state=state,
        accuracy=score.accuracy if state == "complete" else curve[-1][1],
        cost=None if cost is None else cost(config),
        reason=reason,
        seed=settings.seed,
        start_loss=start_loss,
        end_loss=end_loss,
        start_divergence=start_divergence,
        curve=tuple(curve),
        divergence=score.divergence if state == "complete" else None,
        correct=score.correct if state == "complete" else None,
        wall=WallTime(
            prepare_s=prepared - clock,
            train_s=trained - prepared - scoring_s,
            evaluate_s=done - trained + scoring_s,
        ),
        started_s=started,
        peak_memory_bytes=peak_memory_bytes(),
    )


def _better(bench: Workbench, start: Mapping[str, Tensor], end: Score) -> Score:
    """Leave the model at its start where that scores better than the end; the score of what it is left at."""
    trained = bench.state()
    bench.restore(start)
    score = bench.score("val")
    if score.accuracy < end.accuracy:
        bench.restore(trained)
        return end
    return score


def channels_last(model: nn.Module) -> nn.Module:
    """A model whose images lie channels last in memory, in place: convolutions that are faster so, on CPUs and GPUs."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    return model


def peak_memory_bytes() -> int:
    """The largest resident size that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
