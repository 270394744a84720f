"""Metric: what a task's score is. Its name, which way is better, its unit, how it is shown, and between what it lies.

A **score** is a metric's value in the metric's own unit: a share for `top1` (shown in percent), decibels for `psnr`, a
perplexity as it is. A lower perplexity is better, and no score needs a minus sign for that: whatever compares scores
asks the metric. Where an order of numbers is needed, `quality` gives one in which more is better; it is never shown.
This module needs neither torch nor the task, so that whoever only looks at a run knows what its scores are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

from mpsearch.errors import TaskError, nearest

Direction = Literal["maximize", "minimize"]


@dataclass(frozen=True, slots=True)
class Metric:
    """What the scores of a task are.

    Args:
        name: as in `--pick 'psnr>=28.5'`; letters, digits and `_`, `.`, `-`.
        direction: whether more is better (`maximize`) or less.
        unit: that is shown behind a score. With `%` a score is a share: 0.9155 is shown as 91.55 %.
        format: how the shown number is written, as in Python's `format`.
        bounds: the lowest and the highest score that there can be; may be infinite.
        per_sample: whether a score is the mean of a value for each sample, so that two networks can be compared sample
            by sample.
        exponential: whether it is e to the power of that mean, as a perplexity is.

    Raises:
        TaskError: name, direction, format or bounds are none.

    >>> psnr = Metric("psnr", unit="dB", format=".2f")
    >>> psnr.show(28.314), psnr.show_difference(-0.2)
    ('28.31 dB', '-0.20 dB')
    >>> perplexity = Metric("perplexity", "minimize", format=".2f", bounds=(1.0, math.inf))
    >>> perplexity.show(3.416), perplexity.better(3.4, than=3.5)
    ('3.42', True)
    """

    name: str
    direction: Direction = "maximize"
    unit: str = ""
    format: str = ".4g"
    bounds: tuple[float, float] = (-math.inf, math.inf)
    per_sample: bool = False
    exponential: bool = False

    def __post_init__(self) -> None:
        for key, kind in _KINDS.items():
            if not isinstance(value := getattr(self, key), kind):
                raise TaskError(f"a metric's {key} is a {kind.__name__}, got {value!r:.60}")
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,40}", self.name):
            raise TaskError(f"a metric's name is letters, digits and _ . -, got '{self.name}'")
        if self.name in ("cost", "trial", "knee", "best"):
            raise TaskError(f"a metric cannot be called '{self.name}', which --pick has another meaning for")
        if self.direction not in get_args(Direction):
            raise TaskError(f"the direction of metric {self.name} is maximize or minimize, got '{self.direction}'")
        if not _are_bounds(self.bounds):
            raise TaskError(
                f"the bounds of metric {self.name} must be a low and a higher number, got {self.bounds!r:.60}"
            )
        if not re.fullmatch(r",?\.[0-9][0-9]?[efg]", self.format):  # which the pages' scripts read too
            raise TaskError(f"the format of metric {self.name} is digits and e, f or g, as .2f, got '{self.format}'")
        if len(self.unit) > 20 or not self.unit.isprintable() or not re.fullmatch(r"[^<>&{}\"']*", self.unit):
            raise TaskError(f"the unit of metric {self.name} is a short text without <>&{{}} and quotes, as dB")

    @property
    def maximize(self) -> bool:
        """Whether more is better."""
        return self.direction == "maximize"

    @property
    def factor(self) -> float:
        """Shown number over score: 100 for a share in percent, else 1."""
        return 100.0 if self.unit == "%" else 1.0

    @property
    def label(self) -> str:
        """The name with its unit, for the head of a column and for an axis: `top1, %`, `psnr, dB`, `perplexity`."""
        return f"{self.name}, {self.unit}" if self.unit else self.name

    @property
    def difference_unit(self) -> str:
        """The unit of a difference of two scores: points where scores are in percent."""
        return "points" if self.unit == "%" else self.unit

    @property
    def lost(self) -> str:
        """The head of a column of differences by which a score got worse: `lost, points`, `lost, dB`, `lost`."""
        return f"lost, {self.difference_unit}" if self.difference_unit else "lost"

    @property
    def goal(self) -> str:
        """`Maximize top1`, `Minimize perplexity`."""
        return f"{self.direction.capitalize()} {self.name}"

    @property
    def sign(self) -> str:
        """What stands between the metric and a number that it should reach: `>=`, or `<=` where less is better."""
        return ">=" if self.maximize else "<="

    def quality(self, score: float) -> float:
        """A number of which more is better, for comparison only."""
        return score if self.maximize else -score

    def better(self, score: float, than: float) -> bool:
        """Whether a score is truly better than another one."""
        return self.quality(score) > self.quality(than)

    def reaches(self, score: float, target: float) -> bool:
        """Whether a score is at least as good as another one."""
        return self.quality(score) >= self.quality(target)

    def gain(self, score: float, over: float) -> float:
        """How much better a score is than another one, in the score's unit; negative where it is worse."""
        return self.quality(score) - self.quality(over)

    def improved(self, score: float, by: float) -> float:
        """The score that is better by so much, or worse where that is negative."""
        return score + by if self.maximize else score - by

    def best_of(self, *scores: float) -> float:
        """The best of some scores."""
        return max(scores, key=self.quality)

    def clamped(self, score: float) -> float:
        """The score, or the bound that it is beyond."""
        return min(max(score, self.bounds[0]), self.bounds[1])

    def possible(self, score: float) -> bool:
        """Whether a score is within the bounds, up to rounding; a NaN is no score, and passes."""
        low, high = self.bounds
        slack = 1e-6 * max(1.0, abs(score))
        return math.isnan(score) or low - slack <= score <= high + slack

    def number(self, score: float) -> str:
        """The score without its unit, for a column that says it: `91.55`."""
        return format(self.factor * score, self.format)

    def show(self, score: float | None) -> str:
        """The score with its unit: `91.55 %`, `28.31 dB`, `3.42`; a dash of None."""
        return "-" if score is None else f"{self.number(score)} {self.unit}".rstrip()

    def difference(self, difference: float) -> str:
        """A difference of two scores without its unit, with its sign: `-0.20`."""
        return format(self.factor * difference, f"+{self.format}")

    def show_difference(self, difference: float) -> str:
        """A difference of two scores with its sign and unit: `+1.20 points`, `-0.20 dB`."""
        return f"{self.difference(difference)} {self.difference_unit}".rstrip()

    def score_of(self, mean: float) -> float:
        """The score, of the mean of the samples' values."""
        if not self.exponential:
            return mean
        return math.exp(mean) if mean < 700 else math.inf

    def to_json(self) -> dict[str, Any]:
        """A JSON value from which `from_json` makes an equal metric; an infinite bound is null."""
        return {
            "name": self.name,
            "direction": self.direction,
            "unit": self.unit,
            "format": self.format,
            "bounds": [bound if math.isfinite(bound) else None for bound in self.bounds],
            "per_sample": self.per_sample,
            "exponential": self.exponential,
        }

    @classmethod
    def from_json(cls, document: Any) -> Metric:
        """Read what `to_json` wrote. Raises TaskError where it is something else."""
        if not isinstance(document, Mapping) or set(document) - set(cls.__dataclass_fields__) or "name" not in document:
            raise TaskError(
                f"not a metric: expected an object with {', '.join(cls.__dataclass_fields__)}, got {document!r:.200}"
            )
        bounds: Any = document.get("bounds", [None, None])
        if isinstance(bounds, list) and len(bounds) == 2:
            ends = (-math.inf, math.inf)
            bounds = tuple(end if bound is None else bound for bound, end in zip(bounds, ends, strict=True))
        return cls(**{**document, "bounds": bounds})


_KINDS: Mapping[str, type] = {
    "name": str,
    "direction": str,
    "unit": str,
    "format": str,
    "per_sample": bool,
    "exponential": bool,
}


def _are_bounds(bounds: object) -> bool:
    """Whether it is a pair of numbers of which the second is higher."""
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        return False
    numbers = all(isinstance(bound, Real) and not isinstance(bound, bool) for bound in bounds)
    return numbers and bool(bounds[0] < bounds[1])


def _share(name: str, per_sample: bool = False, direction: Direction = "maximize", high: float = 1.0) -> Metric:
    return Metric(name, direction, "%", ".2f", (0.0, high), per_sample)


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        _share("top1", per_sample=True),
        _share("top5", per_sample=True),
        _share("accuracy", per_sample=True),
        _share("f1"),
        _share("miou"),
        _share("map"),
        _share("map50"),
        _share("auroc"),
        _share("within_50_cents", per_sample=True),
        _share("wer", direction="minimize", high=math.inf),
        _share("cer", direction="minimize", high=math.inf),
        Metric("psnr", unit="dB", format=".2f", per_sample=True),
        Metric("ssim", format=".4f", bounds=(-1.0, 1.0), per_sample=True),
        Metric("r2", format=".4f", bounds=(-math.inf, 1.0)),
        Metric("perplexity", "minimize", "", ".2f", (1.0, math.inf), per_sample=True, exponential=True),
        Metric("bpc", "minimize", "bits/char", ".3f", (0.0, math.inf), per_sample=True),
        Metric("bits_per_byte", "minimize", "bits/byte", ".3f", (0.0, math.inf), per_sample=True),
        Metric("cross_entropy", "minimize", "nats", ".4f", (0.0, math.inf), per_sample=True),
        Metric("mse", "minimize", bounds=(0.0, math.inf), per_sample=True),
        Metric("rmse", "minimize", bounds=(0.0, math.inf)),
        Metric("mae", "minimize", bounds=(0.0, math.inf), per_sample=True),
    )
}
"""The common metrics by name."""

TOP1, TOP5 = METRICS["top1"], METRICS["top5"]


def find_metric(metric: str | Metric, where: str = "metric") -> Metric:
    """A metric as it is, or the common one of a name; `where` says who asks, for the message.

    Raises:
        TaskError: no common metric has this name; the message says what to write.
    """
    if isinstance(metric, Metric):
        return metric
    if isinstance(metric, str) and metric in METRICS:
        return METRICS[metric]
    given = f"'{metric}'" if isinstance(metric, str) else type(metric).__name__
    raise TaskError(
        f"{where}: nothing is known of the metric {given}, so that its scores could be compared the wrong way round: "
        f"{nearest(metric if isinstance(metric, str) else '', METRICS)}; or say what it is, as in "
        f'mpsearch.Metric({metric if isinstance(metric, str) else "name"!r}, "minimize", unit="dB")'
    )
