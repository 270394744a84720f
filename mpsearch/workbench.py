"""What trials of one task share inside one process: nothing of it depends on a config."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.arithmetic import trains_in_bf16
from mpsearch.compiler import compiler_missing
from mpsearch.errors import TaskError
from mpsearch.graph.facts import LayerInfo, ModelGraph
from mpsearch.graph.inputs import call, evaluating, first_samples, samples_of
from mpsearch.graph.products import named_products
from mpsearch.precision import Offer, PrecisionConfig
from mpsearch.quant.fused import fuse
from mpsearch.quant.prepare import RangeSetter, insert_quantizers, inspect_network, set_precision
from mpsearch.quant.shift import DEFAULT_SLOPE, SlopeSchedule
from mpsearch.record import pack
from mpsearch.state_dict import load_tensors
from mpsearch.study import TrialSpec
from mpsearch.task.scoring import comparison_of, distillation, measure, metric_of
from mpsearch.task.task import Batch, Measured, Movable, Sampling, Split, Task
from mpsearch.train import (
    FitResult,
    FitSettings,
    Teacher,
    TrainingState,
    fit,
    reestimate_batch_norm,
    single_value_norms,
    usual_device,
)

logger = logging.getLogger(__name__)

WORTH_COMPILING = 5e8
"""Quantized inputs of one trial's training, in elements, from which torch.compile is worthwhile; it takes 25 s, once.

A ResNet-20 and a small MobileNetV2 with an eighth of its MACs both have 2.4e9: the one saves some ten seconds of a
trial, the other twelve.
"""

QUICK_SCORE_SAMPLES = 1000
"""Samples of val on which a trial is scored at the start and halfway, where the task can be sampled."""

AGREES_NATS, AGREES_SHARE = 0.02, 0.05
"""A bfloat16 divergence agrees with the float32 one within this, plus this share of it."""
CHECKED = 3
"""Quick scores that are taken in both kinds of arithmetic before bfloat16 is trusted with the others."""


class Workbench:
    """Everything that trials of one task share inside one process.

    Args:
        task: what is compressed.
        settings: how trials train.
        device: where they run; default: the GPU if there is one.
        offers: the quantizer types that trials switch between, by layer (`SearchSpace.offers`); default: uniform.
        float_model: what is quantized, and teaches; default: the task's.
        graph: the facts of its layers, where they have been found already (`Problem.graph`): one decision for all.
    """

    def __init__(
        self,
        task: Task,
        settings: TrialSpec,
        device: torch.device | None = None,
        offers: Mapping[str, Offer] = MappingProxyType({}),
        float_model: nn.Module | None = None,
        graph: ModelGraph | None = None,
    ) -> None:
        self.metric = metric_of(task)
        self.comparison = comparison_of(task)
        self._distillation = distillation(task) if settings.distill else None
        self.settings = settings
        self.device = device or usual_device()
        float_model = channels_last(float_model or task.float_model())
        task = task.on_device(self.device) if self.device.type != "cpu" and isinstance(task, Movable) else task
        self.task = task
        calibration = task.calibration_input(settings.calibration_samples)
        self.graph: ModelGraph = graph or inspect_network(
            float_model, calibration, products=named_products(offers) or False
        )
        self.layers: tuple[LayerInfo, ...] = self.graph.layers
        if self._distillation is not None:
            with evaluating(float_model):  # before any trial: outputs that cannot be compared are refused
                self._distillation[0](call(float_model, first_samples(calibration, 1)))
        self.ranges = RangeSetter(float_model, self.layers, calibration)
        self._single = single_value_norms(float_model, calibration)
        if self._single and settings.batch_size == 1 and (settings.steps or settings.bn_batches):
            raise TaskError(
                f"trial.batch_size is 1, and {len(self._single)} BatchNorms get one value a channel from a sample and "
                f"cannot be trained on it, '{self._single[0]}' for one: set trial.batch_size to 2 or more (16 is usual)"
            )
        self.bf16 = in_bf16(settings, task, float_model)
        self.model = insert_quantizers(float_model, self.layers, offers).to(self.device)
        self._start = {name: value.detach().clone() for name, value in float_model.state_dict().items()}
        self._float = float_model
        self._quick_task = task.sampled(QUICK_SCORE_SAMPLES) if isinstance(task, Sampling) else task
        self._float_rows: dict[tuple[str, Split], Tensor] = {}
        self._quick_bf16: bool | None = None if self.bf16 and self.comparison is not None else False  # None: not known
        self._checks: list[tuple[tuple[float, float], tuple[float, float]]] = []  # divergences and seconds, of both
        self.compile_quantizers(self.model)
        keep = (lambda output: output) if self._distillation is None else self._distillation[0]
        self.teacher = Teacher(float_model.to(self.device), keep, bf16=self.bf16)

    def compile_quantizers(self, model: nn.Module) -> nn.Module:
        """Compile a model's quantizers in place, if the study says so; `auto`: if worthwhile and a compiler exists."""
        samples = self.settings.lengths[-1] * self.settings.batch_size
        elements = samples * sum(layer.calls * math.prod(layer.input_shape) for layer in self.layers)
        setting = self.settings.compile
        if setting is False or (setting == "auto" and elements < WORTH_COMPILING):
            return model
        if missing := compiler_missing():
            logger.warning("torch.compile is not used: %s; trials run eagerly and take longer", missing)
            return model
        return fuse(model)

    def reset(self, config: PrecisionConfig, weights: Mapping[str, Tensor] | None = None) -> None:
        """Put the float model's weights back, or others under the same names, and take on a config's precisions."""
        self.restore(self._start if weights is None else weights)
        set_precision(self.model, config, self.ranges)

    def state(self) -> dict[str, Tensor]:
        """The model's weights, statistics and ranges as they are now."""
        return {name: value.clone() for name, value in self.model.state_dict().items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` holds; the rest stays."""
        load_tensors(self.model, state, strict=False)  # loaded, because what is packed has no variable to copy into

    def loss(self, seed: int) -> Callable[[int, Any, Any, Any], Tensor]:
        """The training loss: how far the outputs are from the float model's, or the task's own."""
        if self._distillation is None:
            return lambda _step, _x, output, target: self.task.loss(output, target)
        keep, loss = self._distillation
        return lambda step, x, output, _target: loss(keep(output), self.teacher(seed, step, x))

    def train_batches(self, steps: int, seed: int, size: int | None = None) -> Iterator[Batch]:
        """`steps` batches to train on. A batch of one sample is passed over where a BatchNorm cannot train on it.

        It is what is left of a task's data at the end of an epoch, if the task does not drop or fill it. `size` is how
        many samples a batch has; default: `trial.batch_size`.
        """
        size = size or self.settings.batch_size
        if not self._single:
            return self.task.train_batches(size, steps, seed)
        spare = steps // max(1, self.task.steps_per_epoch(size)) + 1
        batches = self.task.train_batches(size, steps + spare, seed)
        return islice((batch for batch in batches if samples_of(batch[0]) != 1), steps)

    def fit(
        self,
        steps: int,
        seed: int,
        lr: float | None = None,
        on_step: Callable[[int, float], None] | None = None,
        slope: SlopeSchedule = DEFAULT_SLOPE,
        lengths: Sequence[int] = (),
        begun: TrainingState | None = None,
    ) -> FitResult:
        """Fine-tune the model as it stands for `steps` batches.

        Args:
            steps: in all, those of `begun` included.
            seed: of the batches.
            lr: peak of the learning rate; default: `trial.lr`.
            on_step: called with (step, training loss).
            slope: of soft shift quantizers.
            lengths: steps of every rung, where this is one of several.
            begun: a training to go on with; the model takes its weights.
        """
        settings = FitSettings(
            steps=steps,
            lr=lr or self.settings.lr,
            weight_decay=self.settings.weight_decay,
            bf16=self.bf16,
            slope=slope,
            lengths=tuple(lengths),
        )
        batches = self.train_batches(steps - (0 if begun is None else begun.steps), seed)
        return fit(self.model, batches, self.loss(seed), settings, on_step, begun)

    def reestimate(self, seed: int, most: int | None = None) -> None:
        """Re-estimate BatchNorm statistics on `trial.bn_batches` training batches, at most `most` of them.

        In float32: in bfloat16 the divergence of a W5A5 digits network went from 0.052 to 0.061 nats.
        """
        count = min(self.settings.bn_batches, self.settings.bn_batches if most is None else most)
        if count:
            reestimate_batch_norm(self.model, self.train_batches(count, seed + 1))

    def score(self, split: Split) -> Score:
        """How the hard-quantized model fares on a split, in float32; its mode stays as it was."""
        return self._score(self.task, split)

    def quick_score(self) -> Score:
        """How it fares on `QUICK_SCORE_SAMPLES` samples of val; on all where the task takes no samples.

        In bfloat16 where that is faster, and told the first configs apart as float32 did.
        """
        if self._quick_bf16 is not None:
            return self._score(self._quick_task, "val", bf16=self._quick_bf16)
        began = time.perf_counter()
        score = self._score(self._quick_task, "val")
        between = time.perf_counter()
        if score.divergence is not None:
            self._check_bf16(score.divergence, between - began)
        return score

    def _check_bf16(self, divergence: float, seconds: float) -> None:
        """Score once more in bfloat16, and decide once enough is known."""
        began = time.perf_counter()
        try:
            other = self._score(self._quick_task, "val", bf16=True).divergence
        except (RuntimeError, TypeError, ValueError) as error:  # what a task makes of such outputs is not ours
            logger.info("scores at the start stay in float32: %s", error)
            self._quick_bf16 = False
            return
        took = (seconds, time.perf_counter() - began)
        self._checks.append(((divergence, math.nan if other is None else other), took))
        pairs = [pair for pair, _ in self._checks]
        if not agrees(pairs):
            self._quick_bf16 = False
        elif len(pairs) >= CHECKED:
            fastest = [min(took[side] for _, took in self._checks) for side in (0, 1)]  # the first may have compiled
            self._quick_bf16 = fastest[1] < fastest[0]
        if self._quick_bf16 is not None:
            used = "bfloat16" if self._quick_bf16 else "float32"
            logger.info("scores at the start, in float32 and bfloat16: %s; they are taken in %s", self._checks, used)

    def _score(self, task: Task, split: Split, bf16: bool = False) -> Score:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16):
            measured = measure(task, self.model, split)
        if not math.isfinite(measured.score):
            return Score(measured.score)
        values = None if measured.values is None or bf16 else pack(measured.values.numpy())
        return Score(measured.score, self._divergence(task, split, measured), values)

    def _divergence(self, task: Task, split: Split, measured: Measured) -> float | None:
        if self.comparison is None or measured.rows is None:
            return None
        key = ("quick_score" if task is self._quick_task else "all", split)
        if key not in self._float_rows:
            rows = measure(task, self._float, split).rows
            assert rows is not None  # the same task measures both
            self._float_rows[key] = rows
        divergence = float(self.comparison.divergence(measured.rows.float(), self._float_rows[key]))
        return divergence if math.isfinite(divergence) else None


@dataclass(frozen=True, slots=True)
class Score:
    """The task's score and, where the task says how each sample fared, its values and the divergence from float too."""

    value: float  # of the metric
    divergence: float | None = None  # mean, in the unit of the task's comparison
    values: str | None = None  # by sample, packed


def in_bf16(settings: TrialSpec, task: Task, float_model: nn.Module) -> bool:
    """Whether trials train in bfloat16: as the study says, or as is faster here."""
    if settings.precision == "auto":
        return trains_in_bf16(task, float_model, settings.batch_size)
    return settings.precision == "bf16"


def agrees(pairs: Sequence[tuple[float, float]]) -> bool:
    """Whether scores in another arithmetic are as good: each close to the first one, and in the same order.

    Args:
        pairs: (score, score in the other arithmetic).
    """
    close = all(abs(a - b) <= AGREES_NATS + AGREES_SHARE * abs(a) for a, b in pairs)  # NaN is close to nothing
    by_one, by_other = (sorted(range(len(pairs)), key=lambda i: pairs[i][side]) for side in (0, 1))
    return close and by_one == by_other


def channels_last(model: nn.Module) -> nn.Module:
    """A model whose images lie channels last in memory, in place: convolutions that are faster so, on CPUs and GPUs."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    return model
