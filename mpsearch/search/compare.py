"""Comparing two configs on the same samples: far sharper than comparing two scores.

An accuracy p on n samples has a standard error of sqrt(p (1 - p) / n): half a point at 87 % of 5,000. Two configs of
one network mostly fail on the same samples, so that their difference, sample by sample, is known better:

    d_i = a_i - b_i,    difference = mean(d),    standard error = sd(d) / sqrt(n)

a_i, b_i: the value of sample i (for top-1 1 where the config is right, 0 where it is wrong; for a PSNR that of the
sample), or the mean of that over several trainings. With one training each and values of 0 and 1 this is the interval
that belongs to McNemar's test. Other values may have long tails: their interval is the percentile bootstrap's over
samples, and where a score is no plain mean (a perplexity is e to the mean), it is the difference of two scores that is
resampled. Both cover the choice of samples; what another training seed would change is seen in the spread over seeds
alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from mpsearch.metric import Metric
from mpsearch.record import unpack


@dataclass(frozen=True, slots=True)
class Difference:
    """The score of one config minus that of another, in the metric's unit, with its confidence interval."""

    mean: float
    low: float
    high: float

    def show(self, metric: Metric) -> str:
        """`+1.20 (+0.40 to +2.00)`, in `metric.difference_unit`."""
        return f"{metric.difference(self.mean)} ({metric.difference(self.low)} to {metric.difference(self.high)})"


RESAMPLES = 1000


def paired(a: Sequence[str], b: Sequence[str], metric: Metric, confidence: float = 0.95) -> Difference:
    """The score of a minus that of b on the same samples of a split.

    Args:
        a: packed values of one config, an entry for each training.
        b: of the other, on the same samples.
        metric: what score the values make.
        confidence: of the interval.

    Raises:
        ValueError: the numbers of samples differ, or there is none.
    """
    import numpy as np  # here, because a run's status needs nothing of it

    ours, theirs = (np.mean([unpack(text) for text in texts], axis=0) for texts in (a, b))
    if ours.shape != theirs.shape or not ours.size:
        raise ValueError(f"values of {ours.size} and {theirs.size} samples: they must be the same samples")
    difference = ours - theirs
    mean = metric.score_of(float(ours.mean())) - metric.score_of(float(theirs.mean()))
    if all(unpack(text).dtype == bool for text in (*a, *b)):
        reach = float(NormalDist().inv_cdf((1 + confidence) / 2) * difference.std() / np.sqrt(difference.size))
        return Difference(mean, mean - reach, mean + reach)
    if difference.size < 2 or not difference.any():
        return Difference(mean, mean, mean)
    from scipy.stats import bootstrap  # here, because it takes a second to import, and correctness needs none

    def scores(ours: Any, theirs: Any, axis: int = -1) -> Any:
        ours, theirs = ours.mean(axis=axis), theirs.mean(axis=axis)
        return np.exp(ours) - np.exp(theirs) if metric.exponential else ours - theirs

    interval = bootstrap(
        (ours, theirs),
        scores,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, 2**22 // difference.size),
        confidence_level=confidence,
        method="percentile",
        rng=0,
    ).confidence_interval
    return Difference(mean, float(interval.low), float(interval.high))
