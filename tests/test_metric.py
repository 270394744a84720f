"""Metric: what is better, how it is shown, what is refused."""

from __future__ import annotations

import json
import math

import pytest

from mpsearch.errors import TaskError
from mpsearch.metric import METRICS, TOP1, Metric, find_metric


@pytest.mark.parametrize(
    ("metric", "score", "shown", "difference"),
    [
        ("top1", 0.9155, "91.55 %", "+1.00 points"),
        ("psnr", 28.314, "28.31 dB", "+0.01 dB"),
        ("perplexity", 3.416, "3.42", "+0.01"),
        ("bpc", 1.2345, "1.234 bits/char", "+0.010 bits/char"),
        ("mse", 0.00123456, "0.001235", "+0.01"),
    ],
)
def test_a_score_is_shown_in_its_unit(metric: str, score: float, shown: str, difference: str) -> None:
    assert METRICS[metric].show(score) == shown
    assert METRICS[metric].show_difference(0.01) == difference
    assert METRICS[metric].show(None) == "-"


@pytest.mark.parametrize("metric", METRICS.values(), ids=lambda metric: metric.name)
def test_every_metric_survives_json_and_knows_what_is_better(metric: Metric) -> None:
    assert Metric.from_json(json.loads(json.dumps(metric.to_json(), allow_nan=False))) == metric
    worse, better = (0.25, 0.75) if metric.maximize else (0.75, 0.25)
    assert metric.better(better, than=worse)
    assert not metric.better(worse, than=better)
    assert not metric.better(worse, than=worse)
    assert metric.reaches(worse, worse)
    assert metric.best_of(worse, better) == better
    assert metric.gain(better, over=worse) == 0.5
    assert metric.improved(worse, by=0.5) == better
    assert metric.quality(better) > metric.quality(worse)


def test_bounds_say_what_a_score_can_be() -> None:
    assert not METRICS["perplexity"].possible(-3.5)
    assert not TOP1.possible(91.5)
    assert TOP1.possible(1 + 1e-12)  # the rounding of a mean
    assert TOP1.possible(math.nan)
    assert TOP1.clamped(1.2) == 1.0
    assert METRICS["psnr"].clamped(60.0) == 60.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "a b"}, "letters, digits"),
        ({"name": "cost"}, "cannot be called 'cost'"),
        ({"direction": "up"}, "maximize or minimize, got 'up'"),
        ({"format": "{:.2f}"}, r"as .2f, got '\{:.2f\}'"),
        ({"bounds": (1.0, 0.0)}, "a low and a higher number"),
        ({"bounds": (1.0,)}, "a low and a higher number"),
        ({"bounds": ("a", "b")}, "a low and a higher number"),
        ({"unit": "<b>"}, "a short text"),
        ({"unit": "\x1b[31m"}, "a short text"),
        ({"unit": 5}, "a metric's unit is a str, got 5"),
        ({"per_sample": "no"}, "a metric's per_sample is a bool, got 'no'"),
    ],
)
def test_what_is_no_metric_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        Metric(**({"name": "m"} | changes))  # type: ignore[arg-type]


def test_an_unknown_name_is_told_what_to_write() -> None:
    with pytest.raises(TaskError, match=r"mine: metric: .*did you mean 'psnr'.*mpsearch.Metric\('psnrr', \"mini"):
        find_metric("psnrr", "mine: metric")
    assert find_metric("psnr") is METRICS["psnr"]
    assert find_metric(own := Metric("own")) is own
