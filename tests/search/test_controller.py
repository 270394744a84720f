"""The controller: what it proposes, in which order, and when it stops. Every sampler passes the contract."""

import itertools
import math
from dataclasses import replace

import moocore
import numpy as np
import pytest
from drive import make_space, relative_cost, truth
from optuna.trial import TrialState

from mpsearch.errors import CostError
from mpsearch.metric import TOP1
from mpsearch.precision import LayerPrecision, PrecisionConfig
from mpsearch.record import TrialRecord
from mpsearch.search.additive import NOTHING
from mpsearch.search.controller import SAMPLERS, Proposal, SearchController
from mpsearch.search.stopping import OPTIMISM, SLACK, UNWATCHED
from mpsearch.space.order import ends_first
from mpsearch.study import SearchSpec

pytestmark = pytest.mark.study

LADDER = 8  # rungs of the toy's ladder, from 8 bits to 1

slow_ones = {"gp": pytest.mark.slow}  # a second a proposal
every_sampler = pytest.mark.parametrize(
    "sampler", [pytest.param(name, marks=slow_ones.get(name, ())) for name in SAMPLERS]
)


def controller(
    space=None, sampler="nsga2", trials=40, budget=None, initial_configs=(), records=(), warm_start=None, **spec
) -> SearchController:
    search = SearchSpec(sampler=sampler, trials=trials, **spec)
    space = space or make_space()
    return SearchController(space, relative_cost, search, TOP1, budget, initial_configs, records, warm_start=warm_start)


def answer(search: SearchController, proposal: Proposal) -> TrialRecord:
    return search.tell(proposal, TrialRecord(proposal.config, "complete", score=truth(proposal.config)))


def run(search: SearchController, limit: int = 10**6) -> list[TrialRecord]:
    records = []
    while len(records) < limit and (proposal := search.ask()) is not None:
        records.append(answer(search, proposal))
    return records


def fail(search: SearchController, reason: str = "no memory") -> TrialRecord:
    proposal = search.ask()
    assert proposal is not None
    return search.tell(proposal, TrialRecord(proposal.config, "failed", reason=reason))


class WarmStart:
    """Answers with configs, and counts how often it is asked."""

    def __init__(self, *configs: PrecisionConfig) -> None:
        self.configs, self.calls = configs, 0

    def __call__(self):
        self.calls += 1
        return [("descent", config) for config in self.configs], NOTHING


def test_the_warm_start_is_made_when_every_worker_has_tried_a_config_of_the_ladder():
    space = make_space()
    found = space.sample(np.random.default_rng(1))
    warm = WarmStart(found)
    search = controller(space, trials=12, concurrency=2, warm_start=warm)
    first, second = search.ask(), search.ask()
    ladder = ends_first([("uniform", config) for config in space.ladder()])
    assert [(p.origin, p.config) for p in (first, second)] == ladder[:2]
    assert search.ask() is None
    assert search.stop_reason is None
    answer(search, first)
    assert search.ask() is None
    assert not warm.calls
    answer(search, second)
    assert (search.ask().config, warm.calls) == (found, 1)
    assert [search.ask().config for _ in range(3)] == [config for _, config in ladder[2:5]]
    assert warm.calls == 1


def test_a_resumed_run_begins_with_its_warm_start():
    space = make_space()
    records = run(controller(space, trials=2, warm_start=WarmStart()))
    warm = WarmStart(found := space.sample(np.random.default_rng(1)))
    assert controller(space, records=records, warm_start=warm).ask().config == found


def test_no_warm_start_is_made_for_trials_that_are_not_wanted_or_come_too_late():
    warm = WarmStart()
    assert len(run(controller(trials=2, warm_start=warm))) == 2
    assert not warm.calls
    now = 0.0

    def late():
        nonlocal now
        now = 100.0
        return warm()

    search = SearchController(
        make_space(),
        relative_cost,
        SearchSpec(time_limit_s=50, concurrency=1),
        TOP1,
        clock=lambda: now,
        warm_start=late,
    )
    assert len(run(search)) == 1
    assert warm.calls == 1
    assert search.stop_reason == "the time limit of 50 s is reached"


def test_a_warm_start_follows_a_ladder_that_is_shorter_than_there_are_workers():
    space = make_space()
    warm = WarmStart(found := space.sample(np.random.default_rng(1)))
    records = run(controller(space, trials=LADDER + 1, concurrency=20, warm_start=warm))
    assert [record.origin for record in records] == ["uniform"] * LADDER + ["descent"]
    assert records[-1].config == found


def test_ladder_and_anchors_take_turns_then_the_sampler_proposes():
    space = make_space()
    initial_config = space.sample(np.random.default_rng(1))
    records = run(
        controller(space, trials=12, initial_configs=[("manual", space.ladder()[3]), ("manual", initial_config)])
    )
    rungs = [r.config for r in records if r.origin == "uniform"]
    assert rungs == ends_first(space.ladder())  # the one that was asked for too: it is a baseline
    assert [r.origin for r in records] == ["uniform", "manual"] + ["uniform"] * (LADDER - 1) + ["sampler"] * 3
    assert records[1].config == initial_config
    assert [r.number for r in records] == list(range(12))


def test_each_rung_of_the_ladder_is_followed_by_three_anchors():
    space, random = make_space(), np.random.default_rng(1)
    initial_configs = [("descent", space.sample(random)) for _ in range(5)]
    records = run(controller(space, trials=9, initial_configs=initial_configs))
    assert [r.origin for r in records] == ["uniform", *["descent"] * 3, "uniform", *["descent"] * 2, *["uniform"] * 2]
    assert [r.config for r in records if r.origin == "descent"] == [config for _, config in initial_configs]


def test_tell_fills_in_what_the_controller_knows():
    search = controller()
    proposal = search.ask()
    given = TrialRecord(proposal.config, "complete", score=0.5, seed=3)
    assert search.tell(proposal, given) == replace(given, number=0, origin="uniform", cost=proposal.cost)
    assert proposal.cost == relative_cost(proposal.config) == 1


@pytest.mark.parametrize("accuracy", [math.nan, math.inf, None])
def test_accuracy_that_is_no_number_is_a_failure(accuracy):
    search = controller()
    record = search.tell(proposal := search.ask(), TrialRecord(proposal.config, "complete", score=accuracy))
    assert (record.state, record.score, record.cost) == ("failed", None, None)
    assert record.reason == f"top1 is {accuracy}"


@every_sampler
def test_proposals_are_distinct_members_of_the_space(sampler):
    space = make_space()
    configs = [r.config for r in run(controller(space, sampler, trials=25))]
    assert len(set(configs)) == 25
    assert all(space.contains(config) for config in configs)


@every_sampler
def test_same_seed_gives_the_same_proposals_and_another_seed_others(sampler):
    first, again, other = ([r.config for r in run(controller(sampler=sampler, trials=22, seed=s))] for s in (5, 5, 6))
    assert first == again
    assert first[LADDER:] != other[LADDER:]


@every_sampler
def test_workers_at_the_same_time_never_share_a_config(sampler):
    search = controller(sampler=sampler, trials=30)
    waiting: list[Proposal] = []
    proposed = []
    while (proposal := search.ask()) is not None:
        waiting.append(proposal)
        proposed.append(proposal)
        if len(waiting) == 7:
            answer(search, waiting.pop(3))  # trials do not end in the order in which they started
    assert len({p.config for p in proposed}) == len({p.number for p in proposed}) == 30


@every_sampler
def test_small_space_is_searched_to_its_last_config(sampler):
    space = make_space(2, ["uniform:2-4"])
    search = controller(space, sampler, trials=100)
    assert len({r.config for r in run(search)}) == space.size == 9
    assert search.stop_reason == "no config is left to try after 9"
    assert search.ask() is None


@pytest.mark.parametrize("sampler", ["nsga2", "random"])
def test_space_is_searched_to_its_last_config_where_chance_would_hardly_find_it(sampler):
    space = make_space(3, ["uniform:1-8"])
    search = controller(space, sampler, trials=1000)
    while (proposal := search.ask()) is not None:  # without a front, whose neighbours would help
        search.tell(proposal, TrialRecord(proposal.config, "complete", score=0.0))
    assert search.stop_reason == f"no config is left to try after {space.size}"


@every_sampler
def test_space_with_nothing_to_choose_has_one_trial_and_says_so(sampler):
    space = make_space(2, ["uniform:4"])
    records = run(search := controller(space, sampler))
    assert [r.config for r in records] == space.ladder()
    assert search.stop_reason == "the space leaves nothing to choose, and its one config has been tried"
    assert run(controller(space, sampler, records=records)) == []  # resumed


@every_sampler
def test_budget_is_never_exceeded_and_still_explored(sampler):
    search = controller(sampler=sampler, trials=30, budget=0.3)  # uniformly drawn configs cost 0.56 +- 0.12
    records = run(search)
    assert len(records) == 30
    assert max(r.cost for r in records) <= 0.3
    assert [r.cost for r in records if r.origin == "uniform"] == [0.125, 0.25]
    assert search.over_budget == 6
    assert len({r.cost for r in records}) > 10


def test_budget_that_only_few_configs_meet_finds_all_of_them():
    space = make_space(3, ["uniform:1-4"])
    budget = 1.4 / 8
    within = [c for c in every_config(space) if relative_cost(c) <= budget]
    assert len(within) > 3
    search = controller(space, budget=budget, trials=100)
    assert {r.config for r in run(search)} == set(within)
    assert "within the budget of 0.175" in search.stop_reason


def test_budget_below_the_ladder_is_met_by_mixing():
    space = make_space(2, ["shift:3", "uniform:4-6"])  # the ladder is of uniform quantizers, 4 bits and more
    search = controller(space, budget=0.45, trials=5)
    records = run(search)
    assert search.over_budget == 3
    assert {r.config for r in records} == {c for c in every_config(space) if relative_cost(c) <= 0.45}


def test_cheapest_config_need_not_have_the_fewest_bits():
    def cost(config):  # a shift is cheaper than any product
        return sum({"shift": 1, "uniform": layer.weight.bits}[layer.weight.quantizer] for layer in config.values()) / 16

    space = make_space(2, ["uniform:2-8", "shift:4"])
    records = run(SearchController(space, cost, SearchSpec(), TOP1, budget=1 / 8))
    assert [{layer.weight.quantizer for layer in r.config.values()} for r in records] == [{"shift"}]


def test_budget_below_the_cheapest_config_is_refused():
    with pytest.raises(CostError, match=r"cost\.budget is 0\.1, but the cheapest config costs 0\.125"):
        controller(budget=0.1)
    controller(budget=0.125)


def test_gaussian_process_proposes_within_the_budget():
    records = run(controller(sampler="gp", trials=12, budget=0.3))  # the first 10 are random
    assert len({r.config for r in records}) == 12
    assert max(r.cost for r in records) <= 0.3


@every_sampler
def test_budget_that_was_lowered_since_leaves_the_sampler_working(sampler):
    before = run(controller(sampler=sampler, trials=16))
    assert max(r.cost for r in before) > 0.4
    after = run(controller(sampler=sampler, trials=28, budget=0.4, records=before))
    assert len(after) == 12
    assert max(r.cost for r in after) <= 0.4


@every_sampler
def test_resumed_search_repeats_no_config_and_counts_what_was_done(sampler):
    before = run(controller(sampler=sampler, trials=20), limit=13)
    after = run(controller(sampler=sampler, trials=20, records=before))
    assert [r.number for r in after] == list(range(13, 20))
    assert not {r.config for r in before} & {r.config for r in after}
    assert run(controller(sampler=sampler, trials=20, records=before + after)) == []


def test_resumed_search_proposes_anew_what_never_ended_under_its_old_number():
    search = controller()
    first, second, third = search.ask(), search.ask(), search.ask()
    records = [answer(search, third), answer(search, first)]  # killed while the second ran
    again = controller(records=records)
    assert again.ask() == second
    assert again.ask().number == 3


@pytest.mark.parametrize("sampler", ["nsga2", "random"])
def test_resume_between_generations_goes_on_as_if_never_interrupted(sampler):
    at = SAMPLERS[sampler].every * (3 if sampler == "nsga2" else 1)
    whole = run(controller(sampler=sampler, trials=at + 10))
    resumed = run(controller(sampler=sampler, trials=at + 10, records=whole[:at]))
    assert resumed == whole[at:]


def test_resumed_search_draws_anew():
    space = make_space()
    ladder = run(controller(sampler="random"), limit=LADDER)
    other = replace(ladder[0], config=space.sample(np.random.default_rng(0)), number=LADDER)
    first = controller(sampler="random", records=ladder).ask()
    later = controller(sampler="random", records=[*ladder, other]).ask()
    assert first.config != later.config


def test_failed_config_counts_as_a_trial_and_is_tried_again_when_a_run_is_resumed():
    search = controller(make_space(1), trials=10)
    failed = fail(search)
    assert (failed.state, failed.reason, failed.cost) == ("failed", "no memory", None)
    records = run(search)
    assert failed.config not in {r.config for r in records}
    assert len(records) == 7  # of 8 configs
    again = controller(make_space(1), trials=10, records=[*records, failed])
    (retried,) = run(again)
    assert (retried.number, retried.config, retried.state) == (failed.number, failed.config, "complete")
    assert controller(make_space(1), trials=10, records=[*records, retried]).ask() is None


def test_failures_in_a_row_stop_the_search_with_the_last_reason():
    search = controller(max_failures_in_row=3)
    records = [fail(search), fail(search)]
    answer(search, search.ask())
    records += [fail(search), fail(search)]
    assert not search.broken
    records.append(fail(search, "disk on fire"))
    assert search.broken
    assert search.ask() is None
    assert search.stop_reason == "3 trials failed in a row, the last one because of: disk on fire"
    resumed = controller(max_failures_in_row=3, records=records)
    assert resumed.ask() is not None  # whoever resumes has mended something


def test_time_limit_starts_no_new_trial():
    now = 100.0
    search = SearchController(make_space(), relative_cost, SearchSpec(time_limit_s=10.0), TOP1, clock=lambda: now)
    proposal = search.ask()
    now += 10
    assert search.ask() is None
    assert search.stop_reason == "the time limit of 10 s is reached"
    assert answer(search, proposal).state == "complete"


def test_trials_that_run_count_towards_those_wanted():
    search = controller(trials=3)
    proposals = [search.ask(), search.ask(), search.ask()]
    assert search.pending == 3
    assert search.ask() is None
    assert search.stop_reason == "3 trials were wanted"
    answer(search, proposals[1])
    assert search.pending == 2


def test_record_of_a_config_outside_the_space_is_kept_in_mind_but_not_learned_from():
    config = PrecisionConfig.uniform(make_space().layers, LayerPrecision.parse("shift:3", "uniform:8"))
    known = TrialRecord(config, "complete", score=0.9, cost=0.4, number=0, origin="manual")
    records = run(controller(trials=20, initial_configs=[("manual", config)], records=[known]))
    assert [r.number for r in records] == list(range(1, 20))
    assert config not in {r.config for r in records}


def test_stopped_trial_keeps_what_it_had():
    search = controller()
    proposal = search.ask()
    record = search.tell(proposal, TrialRecord(proposal.config, "stopped", score=0.25, reason="dominated"))
    assert (record.state, record.score, record.cost) == ("stopped", 0.25, 1.0)


def test_nsga2_proposes_children_of_its_best():
    # Layer 0 must be at 8 bits to be accurate at all: after some generations nearly every proposal has it there.
    space = make_space(6)

    def accuracy(config):
        return truth(config) if config["layer0"].weight.bits == 8 else 0.0

    search = controller(space, trials=120)
    configs = []
    while (proposal := search.ask()) is not None:
        configs.append(proposal.config)
        search.tell(proposal, TrialRecord(proposal.config, "complete", score=accuracy(proposal.config)))
    share = np.mean([config["layer0"].weight.bits == 8 for config in configs[-60:]])
    assert share > 0.6  # 1 in 8 by chance


def every_config(space):
    choices = {slot.parameter: [slot.value(choice) for choice in slot.choices] for slot in space.free}
    for values in itertools.product(*choices.values()):
        yield space.config_of(dict(zip(choices, values, strict=True)))


def hypervolume(points):
    """Of rows (accuracy, cost): error against log2 cost, from (1, 0)."""
    accuracy, cost = np.asarray(points).T
    return moocore.hypervolume(np.column_stack([1 - accuracy, np.log2(cost)]), ref=[1, 0])


@pytest.mark.parametrize("sampler", ["nsga2", pytest.param("tpe", marks=pytest.mark.slow)])
def test_sampler_comes_nearer_to_the_known_optimum_than_random_search(sampler):
    space = make_space(5)
    bits = np.array(list(itertools.product(range(1, 9), repeat=5)))  # every config there is
    losses, weights = 2.0 ** -np.arange(5), np.arange(1, 6)
    accuracy = 1 - 2.0 ** (1 - bits) @ losses / losses.sum()
    cost = bits @ weights / weights.sum() / 8
    optimum = hypervolume(np.column_stack([accuracy, cost]))

    def gap(name, seed):
        records = run(controller(space, name, trials=120, seed=seed))
        return optimum - hypervolume([(r.score, r.cost) for r in records])

    gaps = {name: [gap(name, seed) for seed in range(5)] for name in (sampler, "random")}
    assert min(gaps[sampler]) >= 0
    assert np.mean(gaps[sampler]) < 0.7 * np.mean(gaps["random"]), gaps  # 0.5 when this was written


def test_without_a_sampler_the_controls_and_anchors_are_all():
    space = make_space()
    initial_config = space.sample(np.random.default_rng(1))
    search = controller(space, sampler="none", trials=100, initial_configs=[("ilp", initial_config)])
    rung, *rungs = ends_first(space.ladder())
    assert [record.config for record in run(search)] == [rung, initial_config, *rungs]
    assert "no sampler" in search.stop_reason


def test_a_trial_is_told_the_bars_it_must_pass_and_a_control_is_not():
    search = controller(trials=LADDER + 2)
    while (proposal := search.ask()).origin == "uniform":
        assert proposal.thresholds == UNWATCHED
        end = truth(proposal.config)
        ended = TrialRecord(proposal.config, "complete", score=end, start_divergence=1 - end)
        search.tell(proposal, replace(ended, curve=((0, 0.1), (75, end - 0.125), (150, end))))
    best = max(truth(rung) for rung in make_space().ladder() if relative_cost(rung) <= proposal.cost)
    assert proposal.thresholds.halfway == pytest.approx(best - OPTIMISM * 0.125)
    assert proposal.thresholds.start == pytest.approx(SLACK * (1 - best))
    off = controller(trials=LADDER + 2, stop_dominated=False, records=[answer_of(search, proposal)])
    assert all(p.thresholds == UNWATCHED for p in iter(off.ask, None))


@pytest.mark.parametrize(("more", "rungs"), [({"stop_dominated": False}, (0,)), ({}, (60, 150))])
def test_no_score_is_asked_for_halfway_where_no_trial_stops_there(more, rungs):
    search = SearchController(make_space(), relative_cost, SearchSpec(trials=12, **more), TOP1, rungs=rungs)
    proposals = []
    while len(proposals) < 12 and (proposal := search.ask()) is not None:
        proposals.append(proposal)
        search.tell(proposal, TrialRecord(proposal.config, "complete", score=0.5, curve=((60, 0.5),)))
    assert not any(proposal.thresholds.watched for proposal in proposals if not proposal.rung)


def test_a_stopped_trial_is_never_on_the_front_that_bars_are_made_from():
    search = controller(trials=LADDER + 3)
    for _ in range(LADDER):
        rung = search.ask()
        curve = ((0, 0.1), (75, 0.2), (150, 0.5))
        search.tell(rung, TrialRecord(rung.config, "complete", score=0.5, curve=curve))
    stopped = search.ask()
    search.tell(stopped, TrialRecord(stopped.config, "stopped", score=0.45, curve=((0, 0.45),)))
    assert max(point.quality for point in search._front) == 0.5  # not the 0.85 that it is foreseen to reach
    assert search._latest[-1].quality == pytest.approx(0.85)


def answer_of(search: SearchController, proposal: Proposal) -> TrialRecord:
    record = TrialRecord(proposal.config, "complete", score=0.5, curve=((0, 0.1), (75, 0.2), (150, 0.5)))
    return search.tell(proposal, record)


def told(search: SearchController, accuracy: float, divergence: float | None, **more) -> float:
    """What the sampler is told of a trial with these scores: the larger of its objectives' first."""
    proposal = search.ask()
    record = TrialRecord(proposal.config, "complete", score=accuracy, divergence=divergence)
    search.tell(proposal, replace(record, **more))
    return search._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))[-1].values[0]


def test_the_sampler_improves_the_divergence_or_the_metric_as_asked():
    assert told(controller(), 0.9, 0.5) == pytest.approx(math.exp(-0.5))
    assert told(controller(objective="metric"), 0.9, 0.5) == 0.9
    assert told(controller(), 0.9, None) == 0.9


def test_a_stopped_trial_counts_with_the_divergence_it_might_have_reached():
    search = controller(objective="divergence")
    told(search, 0.9, 0.2, start_divergence=0.8)
    assert told(search, 0.3, None, state="stopped", start_divergence=2.0) == pytest.approx(math.exp(-0.5))
