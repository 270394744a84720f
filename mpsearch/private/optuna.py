"""Optuna 5: what samplers keep in a trial, and where a study is stored."""

from __future__ import annotations

from optuna import Study
from optuna.samplers import NSGAIISampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial


def generation_key() -> str:
    """The system attribute by which NSGA-II knows the generation of a trial; without it a trial is no parent."""
    return str(NSGAIISampler._get_generation_key())


def storage_of(study: Study) -> BaseStorage:
    """Where a study is stored: notes and other people's views are written there."""
    return study._storage


def study_id(study: Study) -> int:
    """Of a study in its storage."""
    return int(study._study_id)


def trial_id(trial: FrozenTrial) -> int:
    """Of a trial in its storage; its `number` counts within the study."""
    return int(trial._trial_id)
