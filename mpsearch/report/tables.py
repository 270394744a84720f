"""Records as tables: what the figures draw and the report prints."""

from __future__ import annotations

from collections.abc import Sequence
from math import nan

import pandas as pd

from mpsearch.precision import Precision, PrecisionConfig
from mpsearch.record import TrialRecord
from mpsearch.search.front import hypervolume_over_time, pareto_front

_MARKS = {"uniform": "", "shift": "s", "apot": "p"}
MARKS_EXPLAINED = "4: uniform, 4 bits · 4s: shift (power of two) · 4p: APoT (sum of powers of two) · f: float"


def mean_bits(config: PrecisionConfig) -> tuple[float, float]:
    """Bits of the weights and of the activations, each the plain mean over the layers; float counts 32.

    NaN for a config without layers.
    """
    if not config:
        return nan, nan
    return (
        sum(layer.weight.bits for layer in config.values()) / len(config),
        sum(layer.activation.bits for layer in config.values()) / len(config),
    )


def trials_table(records: Sequence[TrialRecord]) -> pd.DataFrame:
    """A row per trial, in the order of `records`.

    Columns: number, origin, state, accuracy_percent, relative_cost, weight_bits and activation_bits (see
    `mean_bits`), on_front, knee, reason.
    """
    front = pareto_front(records)
    on_front = {id(trial) for trial in front}  # by identity: numbers may repeat outside a study
    knee = front.knee if front.trials else None
    rows = [
        (
            trial.number,
            trial.origin,
            trial.state,
            None if trial.accuracy is None else 100 * trial.accuracy,
            trial.cost,
            *mean_bits(trial.config),
            id(trial) in on_front,
            trial is knee,
            trial.reason,
        )
        for trial in records
    ]
    columns = "number origin state accuracy_percent relative_cost weight_bits activation_bits on_front knee reason"
    return pd.DataFrame(rows, columns=columns.split()).astype(
        {"accuracy_percent": float, "relative_cost": float, "on_front": bool, "knee": bool}
    )


def front_table(records: Sequence[TrialRecord]) -> pd.DataFrame:
    """The rows of `trials_table` that are on the front, by rising cost."""
    trials = trials_table(records)
    return trials[trials.on_front].sort_values("relative_cost", ignore_index=True)


def bits_table(records: Sequence[TrialRecord], layers: Sequence[str]) -> pd.DataFrame:
    """A row per front trial (by rising cost) and layer (in the order of `layers`; those not in the config left out).

    Columns: position (on the front, 0 the cheapest), number, relative_cost, knee, layer, weight_bits, weight_mark,
    activation_bits, activation_mark, where a mark is the short form explained by `MARKS_EXPLAINED`.
    """
    front = pareto_front(records)
    knee = front.knee if front.trials else None
    rows = [
        (
            position,
            trial.number,
            trial.cost,
            trial is knee,
            layer,
            trial.config[layer].weight.bits,
            mark(trial.config[layer].weight),
            trial.config[layer].activation.bits,
            mark(trial.config[layer].activation),
        )
        for position, trial in enumerate(front)
        for layer in layers
        if layer in trial.config
    ]
    columns = "position number relative_cost knee layer weight_bits weight_mark activation_bits activation_mark"
    return pd.DataFrame(rows, columns=columns.split())


def progress_table(records: Sequence[TrialRecord], cheapest: float) -> pd.DataFrame:
    """A row per complete trial in the order of ending; columns: trials, elapsed_s, hypervolume.

    Args:
        records: the trials of a study.
        cheapest: relative cost of the cheapest config of the space, where the hypervolume's cost axis begins.
    """
    steps = [(step.trials, step.elapsed_s, step.hypervolume) for step in hypervolume_over_time(records, cheapest)]
    return pd.DataFrame(steps, columns=["trials", "elapsed_s", "hypervolume"])


def mark(precision: Precision) -> str:
    """The short form of a precision that `MARKS_EXPLAINED` explains."""
    return "f" if precision.is_float else f"{precision.bits}{_MARKS[precision.quantizer]}"
