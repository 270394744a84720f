"""A trial: one config, fine-tuned briefly and scored on the validation split.

`run_trial` is a plain function. What does not depend on the config (the float model and its layers, the quantized
model and its compiled form, activation samples, the teacher's logits) sits on a `Workbench` that a worker keeps from
trial to trial, because bits and quantizer types are data: a new config changes buffers, and nothing is rebuilt or
recompiled.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
from torch import Tensor

from mpsearch.precision import PrecisionConfig
from mpsearch.record import TrialRecord, TrialState, WallTime
from mpsearch.search.stopping import NO_THRESHOLDS, Thresholds
from mpsearch.study import TrialSpec
from mpsearch.task.task import Task
from mpsearch.workbench import Score, Workbench

START_BN_BATCHES = 4
"""Batches that re-estimate BatchNorm at the start, for a score that only says whether to go on; training moves them."""


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
) -> TrialRecord:
    """Fine-tune `config` briefly and score it on the validation split, and on a sample of it at the start and halfway.

    At the start BatchNorm's statistics are estimated anew, unless the network is `near` the float one. The better of
    start and end is what counts and what the workbench's model is left at: at many bits a brief fine-tune can do harm.
    A config that answers as the float network does (`settled`) is not trained at all. `Comparison` says what is near
    and settled; where outputs are not compared, every trial trains from the statistics that there are.

    Args:
        task: what is compressed.
        config: a precision for each quantizable layer.
        settings: steps, batch size, learning rate, ...
        workbench: the worker's workbench; default: a fresh one.
        cost: relative cost of a config; default: the record has none.
        on_step: called with (step, training loss).
        thresholds: what the trial must pass at the start and halfway; else it stops.

    Returns:
        A complete or stopped record. Its score is that of the hard-quantized network.

    Raises:
        FloatingPointError: the loss or the score became NaN or infinite.
        PrecisionError: the config does not fit the model.
    """
    started = time.time()
    clock = time.perf_counter()
    workbench = workbench or Workbench(task, settings, offers=config.offers)
    metric = workbench.metric
    workbench.reset(config)
    prepared = time.perf_counter()
    curve: list[tuple[int, float]] = []

    def scored(step: int, score: Score) -> Score:
        if not math.isfinite(score.value):
            raise FloatingPointError(f"{metric.name} on val is {score.value} after {step} steps")
        curve.append((step, score.value))
        return score

    score = workbench.quick_score()
    compared = workbench.comparison
    far = settings.steps > 0 and compared is not None and (score.divergence or 0.0) >= compared.near
    if far:
        workbench.reestimate(settings.seed, START_BN_BATCHES)
        score = workbench.quick_score()
    start_divergence = score.divergence
    settled = compared is not None and start_divergence is not None and start_divergence < compared.settled
    trains = settings.steps > 0 and not settled
    score = scored(0, score if trains else workbench.score("val"))
    scoring_s = time.perf_counter() - prepared
    half = (settings.steps + 1) // 2

    def watch(step: int, loss: float) -> None:
        nonlocal scoring_s
        if on_step is not None:
            on_step(step, loss)
        if step + 1 == half < settings.steps:
            began = time.perf_counter()
            scored(half, workbench.quick_score())
            scoring_s += time.perf_counter() - began
            if thresholds.halfway is not None and metric.better(thresholds.halfway, than=curve[-1][1]):
                raise Dominated(
                    f"{metric.name} {metric.show(curve[-1][1])} after {half} steps, worse than the threshold of "
                    f"{metric.show(thresholds.halfway)}"
                )

    start_loss = end_loss = reason = None
    state: TrialState = "complete"
    if trains:
        try:
            if thresholds.start is not None and start_divergence is not None and start_divergence > thresholds.start:
                unit = compared.unit if compared else ""
                raise Dominated(
                    f"{start_divergence:.3g} {unit} from float at the start, the threshold is {thresholds.start:.3g}"
                )
            start = workbench.state()
            result = workbench.fit(settings.steps, settings.seed, on_step=watch)
            start_loss, end_loss = result.start_loss, result.end_loss
        except Dominated as why:
            state, reason = "stopped", f"dominated: {why}"
    trained = time.perf_counter()
    if state == "complete" and trains:
        workbench.reestimate(settings.seed)
        quick, score = score, scored(settings.steps, workbench.score("val"))
        if metric.better(quick.value, than=score.value):
            score = _better(workbench, start, score, settings.seed if far else None)
    done = time.perf_counter()
    return TrialRecord(
        config=config,
        state=state,
        score=score.value if state == "complete" else curve[-1][1],
        cost=None if cost is None else cost(config),
        reason=reason,
        seed=settings.seed,
        start_loss=start_loss,
        end_loss=end_loss,
        start_divergence=start_divergence,
        curve=tuple(curve),
        divergence=score.divergence if state == "complete" else None,
        values=score.values if state == "complete" else None,
        wall=WallTime(
            prepare_s=prepared - clock,
            train_s=trained - prepared - scoring_s,
            evaluate_s=done - trained + scoring_s,
        ),
        started_s=started,
        peak_memory_bytes=peak_memory_bytes(),
    )


def _better(workbench: Workbench, start: Mapping[str, Tensor], end: Score, seed: int | None) -> Score:
    """Leave the model at its start where that scores better than the end; the score of what it is left at.

    `seed`: of the batches that re-estimate the start's BatchNorm, all of them now; None: it has its own statistics.
    """
    trained = workbench.state()
    workbench.restore(start)
    if seed is not None:
        workbench.reestimate(seed)
    score = workbench.score("val")
    if workbench.metric.better(end.value, than=score.value):
        workbench.restore(trained)
        return end
    return score


def peak_memory_bytes() -> int:
    """The largest resident size that this process has had; on macOS, where no peak is known, its size now."""
    memory = psutil.Process().memory_info()
    if (peak := getattr(memory, "peak_wset", None)) is not None:  # Windows
        return int(peak)
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8", errors="replace").splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), int(memory.rss))
