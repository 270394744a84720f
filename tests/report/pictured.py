"""A small run to draw: three layers, six trials."""

from __future__ import annotations

from typing import Any, cast

from mpsearch.cost.model import RelativeCost
from mpsearch.graph.facts import LayerInfo
from mpsearch.metric import TOP1
from mpsearch.precision import LayerPrecision, PrecisionConfig
from mpsearch.record import FinalRecord, Origin, TrialRecord, WallTime
from mpsearch.report.data import RunData

LAYERS = ["stem.conv", "mid<1>", "head"]
MACS = [600, 300, 100]
CHEAPEST = 1 / 16


def info(name: str, macs: int) -> LayerInfo:
    return LayerInfo(name, "conv2d", (4, 2, 3, 3), (2, 8, 8), (4, 8, 8), macs=macs, params=76, fan_in=18)


def infos(names: list[str], macs: list[int] | None = None) -> list[LayerInfo]:
    return [info(name, m) for name, m in zip(names, macs or [100] * len(names), strict=True)]


INFOS = infos(LAYERS, MACS)
COST = RelativeCost(INFOS, "bops", "w8a8")


def trial(
    number: int, cost: float, accuracy: float, text: str = "w4a8", origin: str = "sampler", **changes: Any
) -> TrialRecord:
    """A complete trial of 30 s that started 30 s after the one before it."""
    config = PrecisionConfig.uniform(LAYERS, LayerPrecision.shorthand(text))
    values: dict[str, Any] = {"wall": WallTime(train_s=30.0), "started_s": 30.0 * number, "number": number}
    return TrialRecord(config, "complete", accuracy, cost, origin=cast(Origin, origin), **(values | changes))


RECORDS = [
    trial(0, 1.0, 0.90, "w8a8", "uniform"),
    trial(1, 0.25, 0.60, "w4a4", "uniform"),  # dominated by 2
    trial(2, 0.25, 0.8125),
    trial(3, 0.125, 0.40, "w2a8", "manual"),
    TrialRecord(trial(4, 1, 1).config, "failed", reason="CUDA <out> of memory", number=4),
    trial(5, 0.5, 0.70, "w4a8", "ilp"),  # dominated by 2
]

FINALS = [
    FinalRecord(2, 1, 100, 0.84, 0.80),
    FinalRecord(2, 2, 100, 0.86, 0.84),
    FinalRecord(0, 1, 100, 0.92, 0.91),
    FinalRecord(0, 2, 100, 0.94, 0.93),
    FinalRecord(3, 1, 100, 0.50, 0.45),
]


def run_data(records: list[TrialRecord] | None = None, **changes: Any) -> RunData:
    """The tables of a run with `RECORDS`."""
    values: dict[str, Any] = {"name": "digits", "layers": INFOS, "cost": COST, "cheapest": CHEAPEST, "metric": TOP1}
    return RunData.of(records=RECORDS if records is None else records, **(values | changes))
