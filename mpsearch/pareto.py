"""Which points no other one beats: the one rule for fronts, baselines, thresholds and prices.

One point beats another if it is no worse in every objective and better in one. Of points that are equal in all of them
the first one stays. Objectives are finite numbers; what is not must be left out before.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


def non_dominated(points: ArrayLike, maximize: Sequence[bool]) -> list[int]:
    """The positions of the points that no other one beats, in the order of `points`.

    Args:
        points: `(n, objectives)`.
        maximize: of each objective, whether more of it is better.

    >>> non_dominated([(0.9, 1.0), (0.8, 0.5), (0.8, 0.7), (0.8, 0.5)], maximize=[True, False])
    [0, 1]
    """
    import moocore  # here, because who only looks at records needs none

    array = np.asarray(points, dtype=float).reshape(-1, len(maximize))
    return [int(i) for i in np.flatnonzero(moocore.is_nondominated(array, maximise=list(maximize)))]
