"""SearchController: which config to try next. Plain ask and tell; it knows neither Ray nor torch nor files.

Two objectives, as the sampler sees them: exp(-D) or the task's quality (maximized; the score, or its negative where
less is better), D being the divergence from the float network, and log2 of relative cost (minimized; one unit is a
halving). D is the smoother one: over pairs of configs within 10 % of cost, Kendall's tau of a trial's divergence to the
accuracy after final training is 0.78 and 0.79 on two networks, that of its accuracy 0.68 and 0.64. Front, knee and
report are in the metric all the same.

What is known lives in the trial records; the sampler works on an Optuna study in memory that holds the front and the
latest of them, and is made anew from time to time. So its time and memory do not grow with the run, and a resumed run
goes on as one that has just been made anew.

Costs are known before training, hence a hard budget or limit is never a trial's surprise: a config above one is moved
towards one within all of them before it is proposed. Samplers are told of them as constraints all the same, because
records of an earlier run may lie above a budget that was lowered since. The study's limits come with its `cost`.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, TypeVar

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from mpsearch.cost.model import Bound, RelativeCost, affordable
from mpsearch.errors import CostError
from mpsearch.metric import Metric
from mpsearch.pareto import non_dominated
from mpsearch.precision import PrecisionConfig
from mpsearch.private.optuna import generation_key
from mpsearch.program import program_of
from mpsearch.record import InitialConfig, Origin, TrialRecord
from mpsearch.search.additive import NOTHING, AdditiveSampler, Knowledge, attributes
from mpsearch.search.front import BETTER
from mpsearch.search.rungs import Contender, ended_first_rung, ended_next_rung, goes_on, promotion, strata
from mpsearch.search.stopping import BASELINES, NO_THRESHOLDS, UNWATCHED, Stopping, Thresholds
from mpsearch.search.surrogate import Children, SurrogateSampler
from mpsearch.space.order import ends_first
from mpsearch.space.space import SearchSpace
from mpsearch.study import SearchSpec

optuna.logging.set_verbosity(optuna.logging.WARNING)  # it announces every study and trial on stderr

INITIAL_CONFIGS_PER_UNIFORM = 3  # what a warm start has paid for comes before most of the baseline
_T = TypeVar("_T")

Cost = Callable[[PrecisionConfig], float]  # relative to the study's reference
WarmStart = Callable[[], tuple[Sequence[InitialConfig], Knowledge]]

DIRECTIONS = [StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE]
ENUMERABLE = 100_000  # configs; a larger space is not searched to its last one

GENERATION = 12  # children of NSGA-II before it chooses parents anew; more of them gain less on studies of 1,000 trials


@dataclass(frozen=True)
class SamplerKind:
    """How a sampler is made from a seed, how often that happens, what it learns from, and how often it is asked."""

    make: Callable[[int, SearchSpace, Cost, Knowledge], BaseSampler]
    every: int  # records after which it is made anew
    memory: int  # latest records that it is told, beside the front
    draws: int = 20  # known configs in a row after which the front's neighbours are tried instead


SAMPLERS: Mapping[str, SamplerKind] = {
    "additive": SamplerKind(
        lambda seed, space, cost, knowledge: AdditiveSampler(space, cost, knowledge, seed),
        every=100,
        memory=300,
        draws=5,
    ),
    "surrogate": SamplerKind(
        lambda seed, space, cost, _: SurrogateSampler(space, lambda p: math.log2(cost(space.config_of(p))), seed),
        every=100,
        memory=300,
    ),
    "nsga2": SamplerKind(
        lambda seed, space, *_: NSGAIISampler(
            population_size=GENERATION, child_generation_strategy=_Breed(space, seed), seed=seed
        ),
        every=GENERATION,
        memory=2 * GENERATION,
    ),
    "tpe": SamplerKind(lambda seed, *_: TPESampler(multivariate=True, seed=seed), every=100, memory=500),
    "gp": SamplerKind(lambda seed, *_: GPSampler(seed=seed), every=50, memory=150, draws=2),
    "random": SamplerKind(lambda seed, *_: RandomSampler(seed=seed), every=1000, memory=0),
}

# NSGA-II counts generations by an attribute of its trials. All that it is told are of generation 0, so that what it
# proposes are children of the best of them.
_GENERATION = {generation_key(): 0}


class _Breed:
    """How NSGA-II makes a child: `Children` of two parents, each the winner of a tournament of two."""

    def __init__(self, space: SearchSpace, seed: int) -> None:
        self._children = Children(space, seed)

    def __call__(self, study: optuna.Study, search_space: object, parents: list[FrozenTrial]) -> dict[str, Any]:
        return self._children(self._winner(parents).params, self._winner(parents).params)

    def _winner(self, parents: list[FrozenTrial]) -> FrozenTrial:
        """The better of two parents that are drawn; either of them where neither dominates."""
        first, second = map(int, self._children.random.integers(len(parents), size=2))
        one, other = parents[first], parents[second]
        (quality, cost), (its_quality, its_cost) = one.values, other.values
        return other if its_quality >= quality and its_cost <= cost else one


class _Learned(FrozenTrial):
    """A trial that the sampler is told of. Its copies share what it holds: copying hundreds of parameters took most of
    the time of `ask` and `tell`.
    """

    def __deepcopy__(self, memo: object) -> _Learned:
        return copy.copy(self)


class _WholeSpace(BaseSampler):
    """A sampler that is told the search space instead of working it out from all trials, and draws it in one go."""

    def __init__(self, sampler: BaseSampler, distributions: dict[str, BaseDistribution]) -> None:
        self._sampler = sampler
        self._distributions = distributions

    def infer_relative_search_space(self, *_: object) -> dict[str, BaseDistribution]:
        return self._distributions

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)


@dataclass(frozen=True)
class Proposal:
    """A config to be tried: the number its trial will have, and its cost relative to the reference."""

    number: int
    config: PrecisionConfig
    origin: Origin
    cost: float
    thresholds: Thresholds = NO_THRESHOLDS  # what its trial must pass to go on
    rung: int = 0  # that it is to train to
    before: TrialRecord | None = field(default=None, repr=False)  # what came of the shorter rungs


@dataclass(frozen=True)
class _Point:
    """What the sampler learns from a trial, and the form in which it is told."""

    config: PrecisionConfig
    quality: float
    value: float  # what the sampler improves
    cost: float
    trial: FrozenTrial


class SearchController:
    """Proposes configs until the study is over; every config at most once, whatever became of it.

    First come trials of `records` that failed, under their old numbers: what they lacked may be there now. Then the
    order is: the uniform ladder of the space (the baseline), ends first, each of its configs followed by three
    `initial_configs`, then the sampler. Those above `budget` or a limit are left out and counted in `over_budget`.
    A `warm_start`, which takes minutes, is made once every worker has tried one config of the ladder: what is wrong
    with trials shows before it, and nothing runs meanwhile, so that all that has ended is on the disk.
    `records` are the trials that have ended before, when a run is resumed; but for failed ones they count towards
    `search.trials`, while failures in a row and the time limit start anew.

    Where trials train by rungs, a config that is good enough for a longer one goes before all new ones (`rungs.py`). It
    keeps its number, and counts as one trial. Samplers learn from the first rung alone, where all configs have been:
    they compare like with like.

    The same arguments and the same order of asks and tells give the same proposals.

    Args:
        space: the configs there are.
        cost: relative cost of a config, more than 0; a `RelativeCost` may have limits.
        search: sampler, trials, seed and limits.
        metric: what scores are.
        budget: the largest relative cost that is acceptable; None: any.
        initial_configs: configs to try after the ladder, each with who proposed it.
        warm_start: makes initial configs in place of these, and what is known then; called at most once.
        records: what is known already.
        clock: seconds, monotonic.
        started: when the time limit began to run, by the clock; default: now.
        knowledge: what is known before the first trial, for the sampler `additive`.
        rungs: training steps in all of each rung (`TrialSpec.lengths`); one of them: all trials have one length.
        priced: every cost of a config in its unit, by name, for its record.

    Raises:
        CostError: no config is within the budget and the limits.
    """

    stop_reason: str | None = None  # set once `ask` has returned None for good
    over_budget: int = 0  # uniform and initial configs that were left out

    def __init__(
        self,
        space: SearchSpace,
        cost: Cost,
        search: SearchSpec,
        metric: Metric,
        budget: float | None = None,
        initial_configs: Sequence[InitialConfig] = (),
        records: Iterable[TrialRecord] = (),
        clock: Callable[[], float] = time.monotonic,
        started: float | None = None,
        knowledge: Knowledge = NOTHING,
        rungs: Sequence[int] = (0,),
        priced: Callable[[PrecisionConfig], Mapping[str, float]] = lambda config: {},
        warm_start: WarmStart | None = None,
    ) -> None:
        self._space = space
        self._cost = cost
        self._priced = priced
        self._search = search
        self._metric = metric
        self._budget = math.inf if budget is None else budget
        self._knowledge = replace(knowledge, budget=self._budget)
        self._distributions = space.distributions()
        self._sampler = SAMPLERS["random" if search.sampler == "none" else search.sampler]
        self._clock = clock
        self._start = clock() if started is None else started
        self._failures: list[str] = []  # reasons of the trials that failed since the last that did not

        self._seen: set[str] = set()  # digests of all configs proposed or recorded
        self._numbers: set[int] = set()
        self._next = 0
        self._front: list[_Point] = []
        self._stopping = Stopping(metric)
        self._latest: deque[_Point] = deque(maxlen=self._sampler.memory)
        self._ended = 0
        self._asked: dict[int, optuna.Trial | None] = {}  # proposals that have not ended, by number
        self._untried = self._enumerate()  # the last resort, gone through once
        self._no_more: str | None = None  # why no new config is proposed

        self._rungs = tuple(rungs)
        self._contenders: dict[int, Contender] = {}  # for longer rungs, by number
        self._records: dict[int, TrialRecord] = {}  # theirs
        self._promoted: set[int] = set()  # of those asked: on a longer rung

        self._again: deque[TrialRecord] = deque()
        for record in records:
            self._seen.add(record.config.digest)
            self._numbers.add(record.number)
            if record.state == "failed":
                self._again.append(record)
            else:
                self._remember(record.at_rung(0))
                self._contend(record)
        self._warm_start = warm_start
        self._line_up(initial_configs)
        self._cheapest = self._find_cheapest()
        self._strata = strata(cost(space.config_of(self._cheapest)), min(1.0, self._budget))
        self._renew()

    def _line_up(self, initial_configs: Sequence[InitialConfig]) -> None:
        """Put the ladder and initial configs in the order in which they are tried."""
        ladder: list[InitialConfig] = [("uniform", config) for config in self._space.ladder()]
        uniform = {config for _, config in ladder}  # baselines, whoever else asks for them
        others = [initial for initial in initial_configs if initial[1] not in uniform]
        in_turn = [others[i::INITIAL_CONFIGS_PER_UNIFORM] for i in range(INITIAL_CONFIGS_PER_UNIFORM)]
        ordered = list(_alternate(ends_first(ladder), *in_turn))
        self._initial_configs = deque(initial for initial in ordered if self._affordable(initial[1]))
        self.over_budget = len(ordered) - len(self._initial_configs)

    @property
    def _ladder_begun(self) -> bool:
        """Whether each worker has had a config of the ladder, or all of it is known."""
        waiting = any(config.digest not in self._seen for _, config in self._initial_configs)
        return len(self._seen) >= self._search.concurrency or not waiting

    def _warm_up(self, warm_start: WarmStart) -> None:
        initial_configs, knowledge = warm_start()
        self._warm_start = None
        self._line_up(initial_configs)
        self._knowledge = replace(knowledge, budget=self._budget)
        self._renew()

    @property
    def broken(self) -> bool:
        """Whether so many trials in a row have failed that the search is given up."""
        return len(self._failures) >= self._search.max_failures_in_row

    @property
    def pending(self) -> int:
        """Proposals whose trial has not ended."""
        return len(self._asked)

    def ask(self) -> Proposal | None:
        """The next config to try, or to train longer.

        None: there is none and there will be none, for `stop_reason`; or, without a `stop_reason`, there is none before
        a trial that is running has ended, which may send a config to a longer rung.
        """
        self.stop_reason = self.stop_reason or self._limit()
        if self.stop_reason:
            return None
        if (proposal := self._promote() or (None if self._no_more else self._new())) is not None:
            return proposal
        if len(self._rungs) == 1 or not self._asked:
            self.stop_reason = self._no_more
        return None

    def _promote(self) -> Proposal | None:
        """A config that goes on to a longer rung, if one does."""
        if len(self._rungs) == 1:
            return None
        running = tuple(self._promoted)
        best = promotion(tuple(self._contenders.values()), len(self._rungs), self._search.eta, self._strata, running)
        if best is None:
            return None
        self._promoted.add(best.number)
        self._asked[best.number] = None
        record = self._records[best.number]
        return Proposal(best.number, record.config, record.origin, best.cost, rung=best.rung + 1, before=record)

    def _new(self) -> Proposal | None:
        """A config that has not been tried; None: there is none, for the reason `_no_more`."""
        if self._ended + len(self._asked.keys() - self._promoted) >= self._search.trials:
            self._no_more = f"{self._search.trials} trials were wanted"
            return None
        if self._again:
            failed = self._again.popleft()
            return self._propose(failed.config, failed.origin, None, failed.number)
        if self._warm_start is not None and self._ladder_begun:
            if self._asked:  # what runs would not be recorded meanwhile
                return None
            self._warm_up(self._warm_start)
            self._no_more = self._limit()
            if self._no_more:
                return None
        while self._initial_configs:
            origin, config = self._initial_configs.popleft()
            if config.digest not in self._seen:
                return self._propose(config, origin, None)
        if self._search.sampler == "none":
            self._no_more = "all baselines and initial configs have been tried, and there is no sampler"
            return None
        if not self._space.free:
            self._no_more = "the space leaves nothing to choose, and its one config has been tried"
            return None
        for _ in range(self._sampler.draws):
            trial = self._study.ask()
            # A sampler answers with all parameters, or with none before it has learned anything.
            params = trial.relative_params or self._space.params_of(self._space.sample(self._random))
            config = self._within_budget(params)
            if config.digest not in self._seen:
                return self._propose(config, "sampler", trial)
            # A known config is answered by what the sampler has been told of it. Telling it twice would only breed
            # more repeats (NSGA-II and TPE weigh by count), so the question is closed and it draws again.
            self._study.tell(trial, state=TrialState.FAIL)
        for config in itertools.chain(self._beyond_sampler(), self._untried):
            if config.digest not in self._seen and self._affordable(config):
                return self._propose(config, "sampler", None)
        limits = bounds_of(self._cost)
        bounds = [f"the budget of {self._budget:g}"] if self._budget < math.inf else []
        bounds += ["the limits"] if limits else []
        self._no_more = f"no config is left to try after {len(self._seen)}" + (
            f" within {' and '.join(bounds)}" if bounds else ""
        )
        return None

    def tell(self, proposal: Proposal, record: TrialRecord) -> TrialRecord:
        """Learn what became of a proposal; the record with its number, origin and cost, as it belongs on the disk.

        A trial that ended well but whose score is no finite number comes back as failed. Of a longer rung, the record
        is that of the whole trial; where the rung failed, the trial is worth what it was before.
        """
        record = replace(record, number=proposal.number, origin=proposal.origin, config=proposal.config)
        if record.state != "failed" and not (record.score is not None and math.isfinite(record.score)):
            record = replace(record, state="failed", reason=f"{self._metric.name} is {record.score}")
        if record.state == "failed":
            record = replace(record, score=None, cost=None)
            self._failures.append(record.reason or "no reason given")
        else:
            record = replace(record, cost=proposal.cost, costs=self._priced(proposal.config))
            self._failures.clear()
        trial = self._asked.pop(proposal.number)
        if proposal.before is not None:
            self._promoted.remove(proposal.number)
            record = ended_next_rung(proposal.before, record, self._rungs[proposal.rung])
            self._contend(record)
            return record
        if len(self._rungs) > 1 and record.state == "complete":
            record = ended_first_rung(record)
        self._contend(record)
        if trial is not None:  # the question is closed; the answer is added below, as that of any record
            self._study.tell(trial, state=TrialState.FAIL)
        point = self._remember(record)
        if self._ended % self._sampler.every == 0:
            self._renew()
        elif point is not None:
            self._study.add_trial(point.trial)
        return record

    def abandon(self, proposal: Proposal, reason: str) -> TrialRecord | None:
        """Take note that a proposal could not be tried, which says nothing of its config: no failure in a row.

        Returns:
            a failed record, which a resumed run tries again. None: it was to go on to a longer rung; its trial is worth
            what it was before, and goes on in a resumed run.
        """
        if proposal.before is not None:
            del self._asked[proposal.number]
            self._promoted.remove(proposal.number)
            self._contenders[proposal.number] = replace(self._contenders[proposal.number], open=False)
            return None
        failures = [*self._failures]
        record = self.tell(proposal, TrialRecord(proposal.config, "failed", reason=reason, started_s=time.time()))
        self._failures = failures
        return record

    def _limit(self) -> str | None:
        if self.broken:
            return f"{len(self._failures)} trials failed in a row, the last one because of: {self._failures[-1]}"
        limit = self._search.time_limit_s
        if limit is not None and self._clock() - self._start >= limit:
            return f"the time limit of {limit:g} s is reached"
        return None

    def _propose(
        self, config: PrecisionConfig, origin: Origin, trial: optuna.Trial | None, number: int | None = None
    ) -> Proposal:
        while self._next in self._numbers:  # the numbers of trials that never ended are given again
            self._next += 1
        number = self._next if number is None else number
        self._numbers.add(number)
        self._seen.add(config.digest)
        self._asked[number] = trial
        cost = self._cost(config)
        return Proposal(number, config, origin, cost, self._thresholds(origin, cost))

    def _thresholds(self, origin: Origin, cost: float) -> Thresholds:
        if not self._search.stop_dominated or origin in BASELINES:
            return UNWATCHED
        best = max((p.quality for p in self._front if p.cost <= cost), default=None)
        thresholds = self._stopping.thresholds(cost, None if best is None else self._metric.quality(best))
        if len(self._rungs) > 1:  # a short rung is no dearer than half of one that is long enough to be stopped
            return replace(thresholds, halfway=None, watched=False)
        return thresholds

    def _remember(self, record: TrialRecord) -> _Point | None:
        self._ended += 1
        within = self._space.contains(record.config)
        if not within or affordable(self._cost, record.config, math.inf):  # what breaks a limit is no rival to stop for
            self._stopping.learn(record)
        score = self._stopping.foreseen(record)
        if score is None or record.cost is None or not within:
            return None
        quality, now = self._metric.quality(score), datetime.now()
        value = self._value(record, quality)
        divergence = record.divergence if self._search.objective == "divergence" else None
        trial = _Learned(
            number=-1,  # the study gives it one
            trial_id=-1,
            state=TrialState.COMPLETE,
            value=None,
            values=[value, math.log2(record.cost)],
            datetime_start=now,
            datetime_complete=now,
            params=dict(self._space.params_of(record.config)),
            distributions=self._distributions,
            user_attrs=dict(attributes(divergence)),
            system_attrs=dict(_GENERATION),
            intermediate_values={},
        )
        for name, value in (constraints(record.cost, self._budget, self._cost, record.config) or {}).items():
            trial.set_constraint(name, value)
        point = _Point(record.config, quality, value, record.cost, trial)
        self._latest.append(point)
        reached = record.state == "complete" and self._affordable(record.config)
        if reached:
            front = [*self._front, point]
            self._front = [front[i] for i in non_dominated([(p.value, p.cost) for p in front], BETTER)]
        return point

    def _contend(self, record: TrialRecord) -> None:
        """Let a trial that has ended compete for longer rungs."""
        if len(self._rungs) == 1 or record.cost is None or record.state == "failed" or record.origin == "import":
            return
        ended = [record.at_rung(i) for i, rung in enumerate(record.rungs) if rung.score is not None] or [record]
        values = tuple(self._value(r, self._metric.quality(r.score)) for r in ended if r.score is not None)
        if record.state == "stopped":
            values = (-math.inf,)
        self._records[record.number] = record
        within = self._space.contains(record.config) and self._affordable(record.config)
        self._contenders[record.number] = Contender(record.number, record.cost, values, goes_on(record) and within)

    def _value(self, record: TrialRecord, quality: float) -> float:
        """What the sampler improves: exp(-D), or the quality where there is no D or it is asked for."""
        divergence = self._stopping.foreseen_divergence(record) if self._search.objective == "divergence" else None
        return quality if divergence is None else math.exp(-divergence)

    def _renew(self) -> None:
        """Make sampler and study anew from the front and the latest records."""
        seed, *state = np.random.SeedSequence([self._search.seed, self._ended]).generate_state(5).tolist()
        self._random = np.random.default_rng(state)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = self._sampler.make(seed, self._space, self._cost, self._knowledge)
        self._study = optuna.create_study(sampler=_WholeSpace(sampler, self._distributions), directions=DIRECTIONS)
        latest = {point.config.digest for point in self._latest}
        points = [*(point for point in self._front if point.config.digest not in latest), *self._latest]
        self._study.add_trials([point.trial for point in points])
        self._asked = dict.fromkeys(self._asked)  # their questions went with the old study

    def _affordable(self, config: PrecisionConfig) -> bool:
        return affordable(self._cost, config, self._budget)

    def _within_budget(self, params: dict[str, Any]) -> PrecisionConfig:
        """The config of `params`, crossed over with one within budget and limits as far as these demand.

        The partner is of the front (else the cheapest config there is), and its slots are taken over in random order.
        """
        config = self._space.config_of(params)
        if self._affordable(config):
            return config
        front = self._front
        partner = self._space.params_of(front[self._random.integers(len(front))].config) if front else self._cheapest
        order = [
            str(name) for name in self._random.permutation([name for name in params if params[name] != partner[name]])
        ]
        above, within = 0, len(order)  # so many slots taken over leave the config above, or bring it within
        while within - above > 1:
            middle = (above + within) // 2
            config = self._space.config_of(params | {name: partner[name] for name in order[:middle]})
            above, within = (above, middle) if self._affordable(config) else (middle, within)
        return self._space.config_of(params | {name: partner[name] for name in order[:within]})

    def _find_cheapest(self) -> dict[str, Any]:
        """Parameters of the cheapest uniform config or, where that is above a bound, of a config within all."""

        def cost_of(params: dict[str, Any]) -> float:
            return self._cost(self._space.config_of(params))

        def within(params: dict[str, Any]) -> bool:
            return self._affordable(self._space.config_of(params))

        choices = self._choices()
        first = {name: values[0] for name, values in choices.items()}
        uniform = [first, *map(self._space.params_of, self._space.ladder())]
        params = min(uniform, key=lambda params: (not within(params), cost_of(params)))
        if not within(params):
            for name, values in choices.items():
                params = min(({**params, name: value} for value in values), key=cost_of)
        if not within(params) and isinstance(self._cost, RelativeCost):
            program = program_of(self._space, self._cost)
            if program is not None and self._cost.limits:
                params = self._space.params_of(program.least_excess(self._budget)[1])
        if not within(params):
            limits = "".join(f"; {bound}" for bound in bounds_of(self._cost))
            raise CostError(
                f"cost.budget is {self._budget:g}{limits}, but the cheapest config costs {cost_of(params):g} of the "
                "reference: raise the budget, or allow lower precisions in the search space"
            )
        return params

    def _beyond_sampler(self) -> Iterator[PrecisionConfig]:
        """Configs for a sampler that repeats itself: the front's neighbours, then random ones."""
        for index in self._random.permutation(len(self._front))[:8]:
            neighbours = list(self._space.neighbours(self._front[index].config))
            yield from (neighbours[i] for i in self._random.permutation(len(neighbours)))
        for _ in range(20):
            yield self._within_budget(self._space.params_of(self._space.sample(self._random)))

    def _enumerate(self) -> Iterator[PrecisionConfig]:
        """Every config of a space that is not too large."""
        if self._space.combined <= ENUMERABLE:
            choices = self._choices()
            for values in itertools.product(*choices.values()):
                yield self._space.config_of(dict(zip(choices, values, strict=True)))

    def _choices(self) -> dict[str, list[int | str]]:
        return {slot.parameter: [slot.value(choice) for choice in slot.choices] for slot in self._space.free}


def _alternate(*groups: Sequence[_T]) -> Iterator[_T]:
    """One of each group in turn, so that a run that time ends early has some of all."""
    for turn in itertools.zip_longest(*groups):
        yield from (item for item in turn if item is not None)


def bounds_of(cost: object) -> tuple[Bound, ...]:
    """The limits that come with a cost."""
    return cost.limits if isinstance(cost, RelativeCost) else ()


def constraints(cost: float, budget: float, limits: object, config: PrecisionConfig) -> dict[str, float] | None:
    """Budget and limits as Optuna has them, in octaves: at most 0 is within; None where there are none.

    Args:
        cost: of the config, relative.
        budget: the most that it may be; infinite: there is none.
        limits: the cost that has the limits.
        config: of the limits' network.
    """
    named = {"budget": math.log2(cost / budget)} if budget < math.inf else {}
    named |= {bound.name: bound.octaves(config) for bound in bounds_of(limits)}
    return named or None
