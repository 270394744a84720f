"""TrialRecord and the run folder: the only file that reads or writes a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mpsearch.precision import PrecisionConfig

TrialState = Literal["complete", "failed", "stopped"]
Origin = Literal["uniform", "sampler", "manual"]  # who proposed a config; the warm start and the ILP add theirs


@dataclass(frozen=True, slots=True)
class WallTime:
    """Where a trial's wall time went, in seconds."""

    prepare_s: float = 0.0  # setting precisions, loading start weights, range setting
    train_s: float = 0.0
    evaluate_s: float = 0.0  # BatchNorm re-estimation and scoring

    @property
    def total_s(self) -> float:
        """All of it."""
        return self.prepare_s + self.train_s + self.evaluate_s


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """One config and what became of it: everything that is known of a trial once it has ended.

    `accuracy` is the task's metric on the validation split (a share in [0, 1] for top-1; higher is better).
    `cost` is relative to the study's reference config. A failed trial has neither and gives its `reason`.
    """

    config: PrecisionConfig
    state: TrialState
    accuracy: float | None = None
    cost: float | None = None
    reason: str | None = None
    number: int = -1  # position in the study; -1 outside one
    origin: Origin = "manual"
    seed: int = 0
    start_loss: float | None = None  # training loss over the first and the last steps of the fine-tune
    end_loss: float | None = None
    wall: WallTime = WallTime()
    started_s: float = 0.0  # seconds since the epoch
    peak_memory_bytes: int = 0
    costs: dict[str, float] = field(default_factory=dict)  # absolute cost by part, in the cost model's unit
