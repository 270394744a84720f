"""A trial: one config, fine-tuned briefly and scored on the validation split.

`run_trial` is a plain function. What does not depend on the config (the float model and its layers, the quantized
model and its compiled form, activation samples, the teacher's logits) sits on a `Workbench` that a worker keeps from
trial to trial, because bits and quantizer types are data: a new config changes buffers, and nothing is rebuilt or
recompiled.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
from torch import Tensor

from mpsearch.precision import PrecisionConfig
from mpsearch.record import TrialRecord, WallTime
from mpsearch.search.stopping import NO_THRESHOLDS, Thresholds
from mpsearch.study import TrialSpec
from mpsearch.task.task import Task
from mpsearch.train import FitResult, TrainingState
from mpsearch.workbench import Score, Workbench

START_BN_BATCHES = 4
"""Batches that re-estimate BatchNorm at the start, for a score that only says whether to go on; training moves them."""

RUNG_SEED = 10_007
"""What a rung adds to the seed of its batches."""


class Dominated(Exception):
    """The trial cannot reach the front any more."""


def run_trial(
    task: Task,
    config: PrecisionConfig,
    settings: TrialSpec,
    *,
    workbench: Workbench | None = None,
    cost: Callable[[PrecisionConfig], float] | None = None,
    on_step: Callable[[int, float], None] | None = None,
    thresholds: Thresholds = NO_THRESHOLDS,
    rung: int = 0,
    before: TrialRecord | None = None,
    begun: TrainingState | None = None,
    on_state: Callable[[TrainingState], None] | None = None,
) -> TrialRecord:
    """Fine-tune `config` briefly and score it on the validation split.

    A sample of it is scored at the start and, where `thresholds` ask for it, halfway.

    At the start BatchNorm's statistics are estimated anew, unless the network is `near` the float one. The better of
    start and end is what counts and what the workbench's model is left at: at many bits a brief fine-tune can lower the
    score.
    A config that answers as the float network does (`settled`) is not trained at all. `Comparison` says what is near
    and settled; where outputs are not compared, every trial trains from the statistics that there are.

    On a longer rung the training goes on from where the shorter one left it, on batches of its own; the start is not
    scored again, and nothing stops halfway.

    Args:
        task: what is compressed.
        config: a precision for each quantizable layer.
        settings: rungs, batch size, learning rate, ...
        workbench: the worker's workbench; default: a fresh one.
        cost: relative cost of a config; default: the record has none.
        on_step: called with (step, training loss).
        thresholds: what the trial must pass at the start and halfway; else it stops.
        rung: which of `settings.lengths` to train to.
        before: of a longer rung: what came of the shorter ones.
        begun: of a longer rung: the training to go on with; default: it begins anew.
        on_state: given the training from which the next rung can go on, where there is one.

    Returns:
        A complete or stopped record, of this rung alone. Its score is that of the hard-quantized network.

    Raises:
        FloatingPointError: the loss or the score became NaN or infinite.
        PrecisionError: the config does not fit the model.
    """
    trial = _Trial(workbench or Workbench(task, settings, offers=config.offers), settings, rung, thresholds)
    trial.prepare(config)
    if before is None:
        trial.score_start()
    else:
        trial.take_start(before)
    fitted, reason = trial.train(begun, on_step)
    score = trial.score_end() if reason is None else None
    if score is not None and fitted is not None and fitted.state is not None and on_state is not None:
        on_state(fitted.state)
    return TrialRecord(
        config=config,
        state="stopped" if score is None else "complete",
        score=trial.curve[-1][1] if score is None else score.value,
        cost=None if cost is None else cost(config),
        reason=reason,
        seed=settings.seed,
        start_loss=None if fitted is None else fitted.start_loss,
        end_loss=None if fitted is None else fitted.end_loss,
        start_divergence=trial.start_divergence,
        curve=tuple(trial.curve),
        divergence=None if score is None else score.divergence,
        values=None if score is None else score.values,
        wall=WallTime(trial.seconds["prepare"], trial.seconds["train"], trial.seconds["evaluate"]),
        started_s=trial.started_s,
        peak_memory_bytes=peak_memory_bytes(),
    )


class _Trial:
    """One trial, stage by stage: prepare, score_start or take_start, train, score_end."""

    def __init__(self, workbench: Workbench, settings: TrialSpec, rung: int, thresholds: Thresholds) -> None:
        self.started_s = time.time()
        self.seconds = {"prepare": 0.0, "train": 0.0, "evaluate": 0.0}
        self.curve: list[tuple[int, float]] = []
        self.start_divergence: float | None = None
        self._workbench, self._settings, self._thresholds = workbench, settings, thresholds
        self._rung, self._steps = rung, settings.lengths[rung]
        self._seed = settings.seed + RUNG_SEED * rung  # batches of its own: those of shorter rungs are not made again
        self._trains = self._steps > 0
        self._start: Mapping[str, Tensor] = {}
        self._start_value: float | None = None  # the score of the start on a sample of val
        self._whole: Score | None = None  # the start's on all of val, where it is not trained
        self._far = False  # from float at the start, so that BatchNorm's statistics are estimated anew

    def prepare(self, config: PrecisionConfig) -> None:
        """The float network's weights, with the precisions of a config and their ranges."""
        with self._timed("prepare"):
            self._workbench.reset(config)

    def score_start(self) -> None:
        """Score the untrained network: on a sample of val, or on all of val where it is not trained."""
        workbench, compared = self._workbench, self._workbench.comparison
        with self._timed("evaluate"):
            score = workbench.quick_score()
            if self._steps > 0 and compared is not None and (score.divergence or 0.0) >= compared.near:
                self._far = True
                workbench.reestimate(self._settings.seed, START_BN_BATCHES)
                score = workbench.quick_score()
            self.start_divergence = score.divergence
            settled = compared is not None and score.divergence is not None and score.divergence < compared.settled
            self._trains = self._trains and not settled
            if self._trains:
                self._start, self._start_value = workbench.state(), score.value
            else:
                self._whole = score = workbench.score("val")
            self._note(0, score)

    def take_start(self, before: TrialRecord) -> None:
        """Of a longer rung: what was found at the start of the first."""
        compared = self._workbench.comparison
        self._far = compared is not None and (before.start_divergence or 0.0) >= compared.near
        self._start_value = before.curve[0][1] if before.curve else None
        self._start = self._workbench.state()

    def train(
        self, begun: TrainingState | None, on_step: Callable[[int, float], None] | None
    ) -> tuple[FitResult | None, str | None]:
        """Fine-tune the network, if it is to be; how that went, and why it was stopped."""
        if not self._trains:
            return None, None
        evaluated = self.seconds["evaluate"]
        half = (self._steps + 1) // 2

        def watch(step: int, loss: float) -> None:
            if on_step is not None:
                on_step(step, loss)
            if self._thresholds.watched and self._rung == 0 and step + 1 == half < self._steps:
                self._score_halfway(half)

        with self._timed("train"):
            try:
                self._check_start()
                lengths = self._settings.rungs
                fitted = self._workbench.fit(self._steps, self._seed, on_step=watch, lengths=lengths, begun=begun)
            except Dominated as why:
                return None, f"dominated: {why}"
            finally:
                self.seconds["train"] -= self.seconds["evaluate"] - evaluated  # what was scored halfway
        last = self._rung == len(self._settings.lengths) - 1
        return replace(fitted, state=None) if last else fitted, None

    def score_end(self) -> Score:
        """Score the network on all of val; the better of start and end counts, and is what it is left at."""
        workbench = self._workbench
        with self._timed("evaluate"):
            if self._whole is not None:
                return self._whole
            workbench.reestimate(self._seed)
            end = self._note(self._steps, workbench.score("val"))
            if self._start_value is None or not workbench.metric.better(self._start_value, than=end.value):
                return end
            trained = workbench.state()
            workbench.restore(self._start)
            if self._far:
                workbench.reestimate(self._settings.seed)
            start = workbench.score("val")
            if workbench.metric.better(end.value, than=start.value):
                workbench.restore(trained)
                return end
            return start

    def _check_start(self) -> None:
        """Raise Dominated where the start is too far from float to get anywhere."""
        most, compared = self._thresholds.start, self._workbench.comparison
        if most is not None and self.start_divergence is not None and self.start_divergence > most:
            unit = compared.unit if compared else ""
            raise Dominated(f"{self.start_divergence:.3g} {unit} from float at the start, the threshold is {most:.3g}")

    def _score_halfway(self, step: int) -> None:
        """Score a sample of val; raise Dominated where that is worse than the threshold."""
        metric, worst = self._workbench.metric, self._thresholds.halfway
        with self._timed("evaluate"):
            value = self._note(step, self._workbench.quick_score()).value
        if worst is not None and metric.better(worst, than=value):
            raise Dominated(
                f"{metric.name} {metric.show(value)} after {step} steps, worse than the threshold of "
                f"{metric.show(worst)}"
            )

    def _note(self, step: int, score: Score) -> Score:
        """Put a score on the curve. Raises FloatingPointError: it is NaN or infinite."""
        if not math.isfinite(score.value):
            raise FloatingPointError(f"{self._workbench.metric.name} on val is {score.value} after {step} steps")
        self.curve.append((step, score.value))
        return score

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - began


def peak_memory_bytes() -> int:
    """The largest resident size that this process has had; on macOS, where no peak is known, its size now."""
    memory = psutil.Process().memory_info()
    if (peak := getattr(memory, "peak_wset", None)) is not None:  # Windows
        return int(peak)
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8", errors="replace").splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), int(memory.rss))
