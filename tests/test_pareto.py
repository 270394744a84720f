"""Non-dominated points, against the definition, with ties and in any order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mpsearch.pareto import non_dominated

COORDINATES = st.integers(0, 4)


@given(st.lists(st.tuples(COORDINATES, COORDINATES)), st.tuples(st.booleans(), st.booleans()))
def test_non_dominated_is_the_definition_and_keeps_the_first_of_equals(points, maximize):
    def beats(one, other):
        gains = [(a - b) * (1 if more else -1) for a, b, more in zip(one, other, maximize, strict=True)]
        return min(gains) >= 0 and max(gains) > 0

    expected = [
        i
        for i, point in enumerate(points)
        if not any(beats(other, point) for other in points) and point not in points[:i]
    ]
    assert non_dominated(points, maximize) == expected


def test_no_points_have_no_front():
    assert non_dominated([], (True, False)) == []
