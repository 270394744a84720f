"""The prescreen: hundreds of untrained configs scored before any trial, the best of them tried first.

A start score (`start_score.py`) costs a hundredth of a trial and ranks configs of one cost as trials do. First come the
configs that others propose: the uniform ladder, global combinations, integer programming over sensitivities, the
descent's roundings and the neighbours of these. Then an additive model of the scores so far (`additive.py`) proposes:
a draw from its posterior, and what is best under it within a budget.

Whoever searches hard on one score overfits it. So the best of each budget are scored again on more batches, fewer of
them on many, and the second that is kept differs from the first in several slots; what the warm start itself proposes
is tried all the same.

Every score is on the disk at once (`RunFolder.append_prescreened`): a run that was killed goes on where it was.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, zip_longest

import numpy as np
import torch

from mpsearch.cost.model import RelativeCost, affordable
from mpsearch.errors import TaskError
from mpsearch.observer import SILENT, Observer
from mpsearch.precision import PrecisionConfig
from mpsearch.problem import Problem
from mpsearch.program import program_of
from mpsearch.record import InitialConfig, PrescreenRecord, RunFolder
from mpsearch.space.order import ends_first
from mpsearch.space.space import SearchSpace
from mpsearch.study import StudySpec
from mpsearch.warmstart.additive import LEAST, AdditiveModel, Design
from mpsearch.warmstart.allocate import ilp_ladder
from mpsearch.warmstart.propose import propose, variant
from mpsearch.warmstart.start import global_combinations, least_cost, sensitivity_table, warms
from mpsearch.warmstart.start_score import BATCHES, StartScorer
from mpsearch.warmstart.table import SensitivityTable
from mpsearch.workbench import Workbench

logger = logging.getLogger(__name__)

SEEDS = 0.5  # share of the scores at most that go to configs of others
AGAIN = ((12, 8), (4, 16))  # so many of the best of a budget are scored again, on so many batches
KEPT = 2  # configs of a budget that become initial configs
DISTANCE = 4  # slots in which they differ at least
TEMPERATURES = (0.0, 0.25, 0.5)  # of the draws in turn: at 1 hundreds of scores go to what nobody has tried
ROUND = 3  # proposals of one model
SETTLED = 8  # rounds for which a choice of link and noise holds
SHARE_OF_TIME = 0.25  # of search.time_limit_s, where there is one
STALLED = 40  # proposals in a row that are known: there are hardly others


def prescreens(spec: StudySpec) -> bool:
    """Whether a study has a prescreen: it is a part of the warm start, and a cold search has none."""
    return spec.search.prescreen > 0 and warms(spec)


def prescreen(
    problem: Problem, folder: RunFolder, initial_configs: Sequence[InitialConfig], observer: Observer = SILENT
) -> list[InitialConfig]:
    """Score `search.prescreen` untrained configs; the initial configs with the best of these in between.

    A task whose outputs are no logits that could be compared has no prescreen: the log says so.

    Args:
        problem: of the study.
        folder: of its run, inside its `driving`; scores that are there are not computed again.
        initial_configs: what the warm start proposes, most telling first.
        observer: told of the stage `prescreen`.

    Raises:
        MpsearchError: a score could not be recorded, or the sensitivities cannot be measured.
    """
    spec, space, cost = problem.spec, problem.space, problem.cost
    limit = math.inf if spec.cost.budget is None else spec.cost.budget
    time_s = math.inf if spec.search.time_limit_s is None else SHARE_OF_TIME * spec.search.time_limit_s
    try:
        scores = _Scores(problem, folder)
    except TaskError as reason:
        logger.warning("no prescreen: %s", reason)
        return list(initial_configs)
    table = sensitivity_table("kl", problem.task, problem.graph, space, folder.warmstart)
    budgets = [b for b in spec.warm_start.budgets if least_cost(space, cost) <= b <= limit] or [min(1.0, limit)]
    count, began = spec.search.prescreen, time.monotonic()
    logger.info("prescreen of %d configs in this process, with %d threads", count, torch.get_num_threads())
    observer.on_stage("prescreen", 0, count)
    proposals = _proposals(spec, space, cost, table, budgets, initial_configs, scores)
    for source, config in proposals:
        if len(scores) >= count or time.monotonic() - began > 0.6 * time_s:
            break
        if config not in scores and affordable(cost, config, limit):
            scores.add(config, source)
            observer.on_stage("prescreen", min(len(scores), count - 1), count)  # the last part is to score again
    picked = _picked(space, cost, budgets, scores, lambda: time.monotonic() - began > time_s)
    observer.on_stage("prescreen", count, count)
    logger.info("prescreen: %d configs scored in %.0f s", len(scores), time.monotonic() - began)
    origin = {config: origin for origin, config in reversed(initial_configs)}
    firsts: list[InitialConfig] = [(origin.get(config, "prescreen"), config) for config in picked]
    others = [initial for initial in initial_configs if initial[1] not in set(picked)]
    turns = zip_longest(firsts[::2], firsts[1::2], others)
    return [initial for turn in turns for initial in turn if initial is not None]


class _Scores:
    """The start scores of a run: from its folder, or computed and put there."""

    def __init__(self, problem: Problem, folder: RunFolder) -> None:
        self._problem, self._folder = problem, folder
        self._scorer: StartScorer | None = None
        self._known: dict[tuple[PrecisionConfig, int], float] = {
            (record.config, record.batches): math.inf if record.divergence is None else record.divergence
            for record in folder.rebuild_prescreened()
        }
        if not self._known:
            self._scorer = self._make()  # which refuses a task that cannot be compared

    def __len__(self) -> int:
        return sum(batches == BATCHES for _, batches in self._known)

    def __contains__(self, config: object) -> bool:
        return (config, BATCHES) in self._known

    def items(self) -> list[tuple[PrecisionConfig, float]]:
        """Each config with its score, in the order of scoring."""
        return [(config, score) for (config, batches), score in self._known.items() if batches == BATCHES]

    def known(self, config: PrecisionConfig, batches: int) -> bool:
        """Whether it has been scored on so many batches."""
        return (config, batches) in self._known

    def add(self, config: PrecisionConfig, source: str, batches: int = BATCHES) -> float:
        """The score of a config on so many batches."""
        if (config, batches) not in self._known:
            self._scorer = self._scorer or self._make()
            fewer = [n for n in (BATCHES, *(n for _, n in AGAIN)) if n < batches and (config, n) in self._known]
            begun = (max(fewer), self._known[config, max(fewer)]) if fewer else (0, 0.0)
            score = self._scorer(config, batches, begun)
            finite = score if math.isfinite(score) else None
            record = PrescreenRecord(config, self._problem.cost(config), finite, batches, source)
            self._folder.append_prescreened(record)
            self._known[config, batches] = score if finite is not None else math.inf
        return self._known[config, batches]

    def _make(self) -> StartScorer:
        problem = self._problem
        workbench = Workbench(problem.task, problem.spec.trial, offers=problem.space.offers, graph=problem.graph)
        scorer = StartScorer(workbench, problem.space.offers, AGAIN[-1][1])
        ladder = problem.space.ladder()
        scorer.choose_arithmetic(ladder[len(ladder) // 2 :][:3])
        return scorer


def _proposals(
    spec: StudySpec,
    space: SearchSpace,
    cost: RelativeCost,
    table: SensitivityTable,
    budgets: Sequence[float],
    initial_configs: Sequence[InitialConfig],
    scores: _Scores,
) -> Iterator[tuple[str, PrecisionConfig]]:
    """Configs to score with where they are from, without an end as long as there are new ones."""
    count = spec.search.prescreen
    random = np.random.default_rng([spec.search.seed, 2])
    seeds = [("ladder", config) for config in space.ladder()]
    seeds += [(str(origin), config) for origin, config in initial_configs]
    seeds += [("combination", config) for config in global_combinations(space, cost, table, count // 10)]
    program = program_of(space, cost)
    if program is not None:
        between = [math.sqrt(a * b) for a, b in pairwise(budgets)]
        seeds += [("ilp", a.config) for a in ilp_ladder(space, cost, table, [*budgets, *between])]
    neighbours = [
        ("neighbour", config)
        for origin, parent in initial_configs
        if origin in ("descent", "ilp") and space.contains(parent)
        for config in space.neighbours(parent)
    ]
    seeds += [neighbours[i] for i in random.permutation(len(neighbours))]
    yield from dict.fromkeys(seeds[: max(LEAST, round(SEEDS * count))])
    design, setting, rounds = Design(space, table), None, 0
    stalled = 0
    while stalled < STALLED and space.free:
        finite = [(config, score) for config, score in scores.items() if math.isfinite(score)]
        random = np.random.default_rng([spec.search.seed, 3, len(scores), stalled])
        if len(finite) < LEAST:
            yield "random", space.sample(random)
            stalled += 1
            continue
        model = AdditiveModel(design, finite, setting=setting)
        rounds += 1
        setting = None if rounds % SETTLED == 0 else model.setting
        for turn in range(ROUND):
            budget = budgets[int(random.integers(len(budgets)))]
            effects = model.draw(random, TEMPERATURES[turn % len(TEMPERATURES)])
            config = propose(effects, space, cost, table, program, budget, random, known=dict(finite))
            if config is None or config in scores:
                config = variant(space, cost, config, scores, budget, random)
            new = config is not None and config not in scores
            stalled = 0 if new else stalled + 1
            if new and config is not None:
                yield "model", config


def _picked(
    space: SearchSpace, cost: RelativeCost, budgets: Sequence[float], scores: _Scores, late: Callable[[], bool]
) -> list[PrecisionConfig]:
    """The best of each budget, those of the ends first, then the second of each; those of the ladder are left out."""
    ladder = set(space.ladder())
    distance = min(DISTANCE, max(1, len(space.free) // 4))
    by_score = sorted((score, i, config) for i, (config, score) in enumerate(scores.items()) if math.isfinite(score))
    kept: list[list[PrecisionConfig]] = []
    for budget in ends_first(list(budgets)):
        ranked = [config for _, _, config in by_score if cost(config) <= budget][: AGAIN[0][0]]
        for count, batches in AGAIN:
            best = ranked[:count]
            if late() and not all(scores.known(config, batches) for config in best):
                break
            again = {config: scores.add(config, "again", batches) for config in best}
            ranked = [*sorted(best, key=again.__getitem__), *ranked[count:]]
        of_budget: list[PrecisionConfig] = []
        for config in ranked:
            if len(of_budget) < KEPT and all(_distance(space, config, other) >= distance for other in of_budget):
                of_budget.append(config)
        kept.append(of_budget)
    in_turn = [config for turn in zip_longest(*kept) for config in turn if config is not None]
    return [config for config in dict.fromkeys(in_turn) if config not in ladder]


def _distance(space: SearchSpace, one: PrecisionConfig, other: PrecisionConfig) -> int:
    """Slots in which two configs differ."""
    return sum(
        getattr(one[slot.layers[0]], slot.tensor) != getattr(other[slot.layers[0]], slot.tensor) for slot in space.free
    )
