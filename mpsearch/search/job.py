"""What goes to whoever runs a trial, and what comes back: values alone, so that a worker needs no file of the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpsearch.record import TrialRecord
from mpsearch.search.controller import Proposal

if TYPE_CHECKING:
    from torch import Tensor

    from mpsearch.train import TrainingState


@dataclass(frozen=True)
class Job:
    """A proposal, and of a longer rung the training that it goes on from (None: that is lost, and begins anew)."""

    proposal: Proposal
    begun: TrainingState | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of a job; tensors are on the CPU."""

    record: TrialRecord
    weights: Mapping[str, Tensor] | None = None  # and scales, of a complete trial
    state: TrainingState | None = None  # from which a longer rung can go on


Runner = Callable[[Job], Outcome]
"""Runs one job after another, in the process that it was made in."""
