"""Overrides for the digits study that leave its path as it is and make it take seconds."""

from __future__ import annotations

FEW_IMAGES = ("task.data.val_fraction=0.05", "task.data.test_fraction=0.9")
"""90 images to train on and as many to validate on: sensitivities, ranges and scores see no more than these."""

QUICK = (
    *FEW_IMAGES,
    "trial.compile=false",
    "trial.steps=2",
    "trial.batch_size=16",
    "trial.bn_batches=1",
    "trial.calibration_samples=32",
    "search.prescreen=0",
    "storage=none",
    "engine.address=none",
)
"""Trials of two steps, in this process, without a prescreen and without a study for the dashboard."""
