"""A sampler that asks an integer program: the best config within a budget, under a draw of what each choice does.

An additive model (`warmstart/additive.py`) is conditioned on the start scores of the prescreen and on the trials'
divergences; where a task has none or its metric is the objective, on the trials' objective alone. A draw from its
posterior is a table of effects, and the integer program of `warmstart/allocate.py` finds its best config within a
budget: Thompson sampling with an exact oracle, where a sampler that draws children of the front sees a few dozen of all
configs.

The budget lies in a gap of the front. Of the gaps with the largest area (width in octaves of cost, times what the
divergence falls by), some are tried, and that counts by which the front's divergence falls most, over octaves of cost,
if the draw is true. In nats, not in the objective exp(-D): what a nat costs of the metric is much the same at 0.2 nats
and at 3 (`benchmarks origins`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from mpsearch.cost.model import RelativeCost, affordable
from mpsearch.precision import PrecisionConfig
from mpsearch.program import program_of
from mpsearch.search.surrogate import MOVES, Children, JointSampler, front_of
from mpsearch.space.space import SearchSpace
from mpsearch.warmstart.additive import LEAST, AdditiveModel, Design, Effects, Link, Scores, unlinked
from mpsearch.warmstart.propose import propose, variant
from mpsearch.warmstart.table import SensitivityTable

DIVERGENCE = "divergence"
"""The user attribute of a trial that holds its divergence."""

CHILDREN = 100  # of the front, that are looked at where there is no program
GAPS = 4  # of the front, in which a config is looked for
TEMPERATURE = 0.5  # of the draws
GROWN = 1.2  # by how much the scores must have grown for link and noise to be chosen anew


@dataclass(frozen=True)
class Knowledge:
    """What is known before the first trial."""

    starts: Scores = ()  # start scores
    table: SensitivityTable | None = None
    budget: float = math.inf  # the largest relative cost that is acceptable


NOTHING = Knowledge()


class AdditiveSampler(JointSampler):
    """Proposes the best config of a posterior draw within a budget that lies in a gap of the front.

    Args:
        space: the configs there are.
        cost: relative, of a config. Under one that is no `RelativeCost`, or no sum or maximum over layers, there is no
            program: that of many children of the front is proposed which the front falls most by.
        knowledge: what is known before the first trial.
        seed: of the draws.
    """

    def __init__(
        self, space: SearchSpace, cost: Callable[[PrecisionConfig], float], knowledge: Knowledge, seed: int
    ) -> None:
        self._space, self._cost, self._knowledge = space, cost, knowledge
        self._random = np.random.default_rng([seed, 4])
        self._children = Children(space, seed, MOVES)
        self._design = Design(space, knowledge.table)
        self._program = program_of(space, cost) if isinstance(cost, RelativeCost) else None
        cheapest = cost.bounds(space.options)[0] if isinstance(cost, RelativeCost) else 0.0
        self._cheapest = math.log2(cheapest) if cheapest > 0 else math.inf
        self._model: AdditiveModel | None = None
        self._chosen_of = 0  # scores that link and noise were chosen by
        self._configs: dict[int, PrecisionConfig] = {}  # of the study's trials, by number

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The parameters of the proposal; none before the first trial has ended."""
        trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        front = front_of(trials)
        if not front:
            return {}
        if not self._learn(trials):
            mother, father = (front[i].params for i in self._random.integers(len(front), size=2).tolist())
            return self._children(mother, father)
        assert self._model is not None
        effects = self._model.draw(self._random, TEMPERATURE)
        known = {self._config(t) for t in trials}
        config = self._found(effects, front)
        if config is not None and config in known:
            config = variant(self._space, self._cost, config, known, self._cost(config), self._random, effects)
        return {} if config is None else dict(self._space.params_of(config))

    def _config(self, trial: FrozenTrial) -> PrecisionConfig:
        if trial.number not in self._configs:
            self._configs[trial.number] = self._space.config_of(trial.params)
        return self._configs[trial.number]

    def _learn(self, trials: Sequence[FrozenTrial]) -> bool:
        """Condition the model on all that is known; False where that is too little."""
        scores = [(t, t.user_attrs[DIVERGENCE]) for t in trials if DIVERGENCE in t.user_attrs]
        starts = self._knowledge.starts
        compared = bool(scores) or (bool(starts) and len(trials) < LEAST)
        if not compared:
            starts, scores = (), [(t, -t.values[0]) for t in trials]
        ends = [(self._config(t), score) for t, score in scores]
        count = len(starts) + len(ends)
        if count < LEAST:
            return False
        links: Sequence[Link] = ("sqrt", "log") if compared else ("identity",)
        setting = None if self._model is None or count >= GROWN * self._chosen_of else self._model.setting
        if setting is not None and setting.link not in links:
            setting = None
        if setting is None:
            self._chosen_of = count
        self._model = AdditiveModel(self._design, starts, ends, setting, links)
        return True

    def _found(self, effects: Effects, front: Sequence[FrozenTrial]) -> PrecisionConfig | None:
        """The config by which the front falls most, in octaves of cost times nats, if the effects are true."""

        def harm(config: PrecisionConfig) -> float:
            return unlinked(effects(config), effects.link)

        known = [(float(t.values[1]), harm(self._config(t))) for t in front]
        configs = self._bred(front) if self._program is None else self._solved(effects, self._gaps(known))
        return max(configs, key=lambda c: fall(known, math.log2(self._cost(c)), harm(c)), default=None)

    def _solved(self, effects: Effects, gaps: Sequence[tuple[float, float]]) -> list[PrecisionConfig]:
        """For each gap, the best config within a budget there."""
        knowledge, random = self._knowledge, self._random
        budgets = [min(2.0 ** (low + (high - low) * random.uniform(0.3, 1.0)), knowledge.budget) for low, high in gaps]
        solved = [
            propose(effects, self._space, self._cost, knowledge.table, self._program, budget, random)
            for budget in budgets
        ]
        return [config for config in solved if config is not None]

    def _bred(self, front: Sequence[FrozenTrial]) -> list[PrecisionConfig]:
        """Children of the front within the budget that are new."""
        parents = self._random.integers(len(front), size=(CHILDREN, 2)).tolist()
        children = [self._children(front[mother].params, front[father].params) for mother, father in parents]
        known = {self._config(t) for t in front}
        configs = [self._space.config_of(child) for child in children]
        return [c for c in configs if c not in known and affordable(self._cost, c, self._knowledge.budget)]

    def _gaps(self, known: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        """Some of the largest gaps, as log2 of their ends' costs; which, is also a matter of chance.

        Args:
            known: (log2 cost, harm) of the front, by rising cost.
        """
        whole = max(harm for _, harm in known) - min(harm for _, harm in known) or 1.0
        cheapest = min(self._cheapest, known[0][0])
        points = [(cheapest, known[0][1] + whole), *known, (max(0.0, known[-1][0] + 0.1), known[-1][1])]
        gaps = [
            ((b - a) * (max(0.0, above - below) + 0.1 * whole), (a, b)) for (a, above), (b, below) in pairwise(points)
        ]
        chance = self._random.exponential(size=len(gaps))
        ranked = sorted(range(len(gaps)), key=lambda i: -gaps[i][0] * chance[i])
        return [gaps[i][1] for i in ranked[:GAPS]]


def fall(known: Sequence[tuple[float, float]], octaves: float, harm: float) -> float:
    """What a front's harm falls by with one more point, over log2 of cost up to that of the reference.

    Left of the front its harm counts as twice as far from the best as its worst is.

    Args:
        known: (log2 cost, harm) of the front, by rising cost.
        octaves: log2 cost of the point.
        harm: of the point.
    """
    worst, best = max(h for _, h in known), min(h for _, h in known)
    ends = [*(o for o, _ in known), max(0.0, known[-1][0])]
    gain, begin, level = 0.0, -math.inf, 2 * worst - best
    for end, (_, following) in zip(ends, [*known, known[-1]], strict=True):
        gain += max(0.0, end - max(begin, octaves)) * max(0.0, level - harm)
        begin, level = end, min(level, following)
    return gain


def attributes(divergence: float | None) -> Mapping[str, float]:
    """What a trial carries for this sampler."""
    return {} if divergence is None else {DIVERGENCE: divergence}
