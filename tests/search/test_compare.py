"""Paired differences: against McNemar's statistic and a bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap

from mpsearch.metric import TOP1
from mpsearch.record import pack, unpack
from mpsearch.search.compare import paired

RANDOM = np.random.default_rng(0)
A = RANDOM.random(1003) < 0.87
B = np.where(RANDOM.random(1003) < 0.05, ~A, A)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 1003])
def test_packed_answers_come_back(count: int) -> None:
    given = A[:count]
    text = pack(given)
    assert np.array_equal(unpack(text), given)
    assert len(text) <= count / 6 + 10


def test_difference_is_that_of_the_accuracies_with_mcnemars_standard_error() -> None:
    found = paired([pack(A)], [pack(B)], TOP1)
    only_a, only_b, n = int((A & ~B).sum()), int((B & ~A).sum()), len(A)
    assert found.mean == pytest.approx(A.mean() - B.mean())
    error = np.sqrt(only_a + only_b - (only_a - only_b) ** 2 / n) / n
    assert (found.high - found.low) / 2 == pytest.approx(1.959964 * error, rel=1e-5)
    # Far narrower than two accuracies that are taken for independent.
    assert found.high - found.low < 0.6 * 2 * 1.96 * np.sqrt(2 * 0.87 * 0.13 / n)


def test_interval_agrees_with_a_bootstrap_over_samples_of_several_trainings() -> None:
    ours = [np.where(RANDOM.random(1003) < 0.05, ~A, A) for _ in range(3)]
    found = paired([pack(a) for a in ours], [pack(B), pack(A)], TOP1)
    d = np.mean(ours, axis=0) - np.mean([B, A], axis=0)
    low, high = bootstrap((d,), np.mean, n_resamples=4000, method="percentile", random_state=0).confidence_interval
    assert (found.low, found.high) == (pytest.approx(low, abs=0.002), pytest.approx(high, abs=0.002))


def test_different_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="1003 and 1000 samples"):
        paired([pack(A)], [pack(B[:1000])], TOP1)
