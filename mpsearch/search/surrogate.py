"""A sampler with a cheap model of quality: of many children of the front it proposes the most promising one.

Quantization noise falls by half with every bit, and what the tensors do to quality nearly adds up, so the model is
linear in 2^-bits of each tensor, a column a quantizer type, and in their sums over tensors, which is what is known of
tensors that have hardly been tried. Bayesian ridge regression gives a mean and a deviation for any config.

The cost of a config is known. Hence the expected hypervolume improvement, of a Gaussian quality N(m, s) at the known
log2 cost c, is a sum over the steps of the front: on each the front has quality a_j, over a width w_j of log2 cost

    EHVI(c) = sum_j w_j * [(m - a_j) * Phi(z_j) + s * phi(z_j)],    z_j = (m - a_j) / s

where steps left of c do not count (w_j: the part of step j between c and 0, the cost of the reference).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState
from scipy.special import ndtr

from mpsearch.pareto import non_dominated
from mpsearch.search.front import BETTER
from mpsearch.space.space import SearchSpace

Floats = NDArray[np.float64]

CANDIDATES = 32
LEAST = 12  # trials before their model is asked; until then children of the front are taken as they come
MOVES = 1.5  # slots that a child moves by a step, on average


class Children:
    """A child of two trials: each slot from one of them, then some slots moved by one step.

    A step is one bit, or another type (`Slot.steps`). Optuna's own mutation draws a slot's choice anew: from 4 bits to
    1 as readily as to 5.
    """

    def __init__(self, space: SearchSpace, seed: int, moves: float = 1.0) -> None:
        self.random = np.random.default_rng([seed, 1])
        self._moves = moves
        self._steps = {
            slot.parameter: {slot.value(c): [slot.value(step) for step in slot.steps(c)] for c in slot.choices}
            for slot in space.free
        }

    def __call__(self, mother: Mapping[str, Any], father: Mapping[str, Any]) -> dict[str, Any]:
        """The child's parameters."""
        count = len(self._steps)
        from_mother = self.random.random(count) < 0.5
        child = {name: (mother if m else father)[name] for name, m in zip(self._steps, from_mother, strict=True)}
        moved = self.random.random(count) < self._moves / count
        for name in [name for name, move in zip(self._steps, moved, strict=True) if move]:
            steps = self._steps[name][child[name]]
            child[name] = steps[self.random.integers(len(steps))]
        return child


class Features:
    """The columns of the model for a config's parameters."""

    def __init__(self, space: SearchSpace) -> None:
        types = [sorted({c.quantizer for c in slot.choices if not c.is_float}) for slot in space.free]
        columns = [(i, kind) for i, kinds in enumerate(types) for kind in kinds]
        sums = sorted({(space.free[i].tensor, kind) for i, kind in columns})
        self._size = len(columns) + len(sums)
        self._at: dict[str, dict[int | str, tuple[tuple[int, int], float] | None]] = {
            slot.parameter: {
                slot.value(c): None
                if c.is_float
                else (
                    (columns.index((i, c.quantizer)), len(columns) + sums.index((slot.tensor, c.quantizer))),
                    2.0**-c.bits,
                )
                for c in slot.choices
            }
            for i, slot in enumerate(space.free)
        }

    def __call__(self, params: Mapping[str, Any]) -> Floats:
        """`(columns,)`."""
        row = np.zeros(self._size)
        for name, value in params.items():
            if (entry := self._at[name][value]) is not None:
                (values, total), noise = entry
                row[values] = noise
                row[total] += noise
        return row


def expected_improvement(mean: Floats, deviation: Floats, cost: Floats, front: Floats) -> Floats:
    """The expected hypervolume improvement of candidates `(k,)`, in quality times octaves of cost.

    Args:
        mean: of their quality.
        deviation: of their quality, above 0.
        cost: log2 of their relative cost.
        front: `(n, 2)`, quality and log2 cost of non-dominated trials, by rising cost.
    """
    edges = np.concatenate([[-np.inf], front[:, 1], [max(0.0, front[-1, 1])]])
    level = np.concatenate([[0.0], front[:, 0]])
    width = np.clip(edges[1:] - np.maximum(edges[:-1], cost[:, None]), 0, None)  # (k, steps)
    above = mean[:, None] - level
    z = above / deviation[:, None]
    gain = above * ndtr(z) + deviation[:, None] * _density(z)
    return np.asarray((width * gain).sum(axis=1))


def _density(z: Floats) -> Floats:
    """Of the normal distribution; `scipy.stats`, which has it, takes a second to import."""
    return np.exp(-z * z / 2) / math.sqrt(2 * math.pi)


class JointSampler(BaseSampler):
    """A sampler that draws all parameters of a trial together, in `sample_relative`."""

    def infer_relative_search_space(self, *_: object) -> dict[str, BaseDistribution]:
        """Nothing: the controller knows the space, and so do we."""
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Never called."""
        raise NotImplementedError("all parameters are drawn together")


class SurrogateSampler(JointSampler):
    """Proposes, of `CANDIDATES` children of the front, the one with the largest expected hypervolume improvement.

    Args:
        space: the configs there are.
        log2_cost: of the config that parameters stand for, relative.
        seed: of the children.
    """

    def __init__(self, space: SearchSpace, log2_cost: Callable[[Mapping[str, Any]], float], seed: int) -> None:
        # Not at the top, because it takes a second; not later, because an import can swallow a Ctrl-C.
        from sklearn.linear_model import BayesianRidge

        self._regression = BayesianRidge
        self._children = Children(space, seed, MOVES)
        self._features = Features(space)
        self._log2_cost = log2_cost
        self._model: Any = None
        self._learned = 0  # trials that the model has learned from

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The parameters of the most promising child; none before the first trial has ended."""
        trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        best = front_of(trials)
        if not best:
            return {}
        random = self._children.random

        def child() -> dict[str, Any]:
            mother, father = (best[i].params for i in random.integers(len(best), size=2).tolist())
            return self._children(mother, father)

        if len(trials) < LEAST:
            return child()
        known = {tuple(t.params.values()) for t in trials}
        drawn = [child() for _ in range(CANDIDATES)]
        candidates = [c for c in drawn if tuple(c.values()) not in known] or drawn
        self._learn(trials)
        mean, deviation = self._model.predict(self._rows(candidates), return_std=True)
        cost = np.array([self._log2_cost(c) for c in candidates])
        improvement = expected_improvement(mean, deviation, cost, np.array([t.values for t in best]))
        return candidates[int(np.argmax(improvement))]

    def _learn(self, trials: Sequence[FrozenTrial]) -> None:
        """Fit the model, unless it knows nearly all of the trials."""
        if self._model is None or len(trials) > 1.05 * self._learned:
            quality = np.array([trial.values[0] for trial in trials])
            self._model = self._regression().fit(self._rows([trial.params for trial in trials]), quality)
            self._learned = len(trials)

    def _rows(self, params: Sequence[Mapping[str, Any]]) -> Floats:
        return np.stack([self._features(p) for p in params])


def front_of(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The non-dominated trials by rising cost."""
    on_front = non_dominated([trial.values for trial in trials], BETTER)
    return sorted((trials[i] for i in on_front), key=lambda trial: trial.values[1])
