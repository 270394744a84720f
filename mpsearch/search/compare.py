"""Comparing two configs on the same samples: far sharper than comparing two scores.

An accuracy p on n samples has a standard error of sqrt(p (1 - p) / n): half a point at 87 % of 5,000. Two configs of
one network mostly fail on the same samples, so that their difference, sample by sample, is known better:

    d_i = a_i - b_i,    difference = mean(d),    standard error = sd(d) / sqrt(n)

a_i, b_i: 1 where the config is right on sample i, 0 where it is wrong, or the mean of that over several trainings. With
one training each this is the interval that belongs to McNemar's test. It covers the choice of samples; what another
training seed would change is seen in the spread over seeds alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

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


def paired(a: Sequence[str], b: Sequence[str], confidence: float = 0.95) -> Difference:
    """The mean of a - b over the samples of a split.

    Args:
        a: packed correctness of one config, an entry for each training.
        b: of the other, on the same samples.
        confidence: of the interval.

    Raises:
        ValueError: the numbers of samples differ, or there is none.
    """
    import numpy as np  # here, because a run's status needs nothing of it

    ours, theirs = (np.mean([unpack(text) for text in texts], axis=0) for texts in (a, b))
    if ours.shape != theirs.shape or not ours.size:
        raise ValueError(f"correctness of {ours.size} and {theirs.size} samples: they must be the same samples")
    difference = ours - theirs
    mean = float(difference.mean())
    reach = float(NormalDist().inv_cdf((1 + confidence) / 2) * difference.std() / np.sqrt(difference.size))
    return Difference(mean, mean - reach, mean + reach)
