"""Which configs go on to longer rungs, and what a trial is that did."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
from drive import drive, make_space, relative_cost, truth
from quick import QUICK

import mpsearch
from mpsearch.metric import TOP1
from mpsearch.precision import PrecisionConfig
from mpsearch.record import RunFolder, TrialRecord, WallTime, checkpoint_path, rung_path, state_path
from mpsearch.search.controller import Proposal, SearchController
from mpsearch.search.front import ScoreRange, gains_over_baselines, hypervolume_over_time, pareto_front
from mpsearch.search.kept import FrontWeights
from mpsearch.search.rungs import Contender, ended_first_rung, ended_next_rung, goes_on, promotion, strata
from mpsearch.study import SearchSpec, TrialSpec, load_study

LENGTHS = (60, 150, 400)
CONFIGS = make_space().ladder()


def contender(number: int, cost: float, *values: float, open: bool = True) -> Contender:
    return Contender(number, cost, values, open)


def test_one_in_eta_of_a_rung_goes_on_the_best_first() -> None:
    three = [contender(0, 0.5, 0.1), contender(1, 0.5, 0.3), contender(2, 0.5, 0.2)]
    assert promotion(three[:2], 3, 3, ()) is None  # of two, none is the best third
    assert promotion(three, 3, 3, ()) == three[1]
    assert promotion(three, 3, 3, (), running=[1]) is None  # it goes on now, and is one in three
    five = [*three, contender(3, 0.5, 0.0), contender(4, 0.5, 0.25)]
    assert promotion(five, 3, 2, (), running=[1]) == five[4]


def test_the_longest_rung_is_looked_at_first() -> None:
    first = [contender(i, 0.5, i / 10) for i in range(6)]
    longer = [contender(i, 0.5, 1.0, i / 10) for i in (6, 7, 8)]
    assert promotion([*first, *longer], 3, 3, ()) == longer[2]
    ended = replace(longer[2], values=(1.0, 0.8, 0.9))
    assert promotion([*first, *longer[:2], ended], 3, 3, ()) is None  # three in nine have gone on


def test_every_stratum_of_cost_has_candidates_however_good_the_dear_ones_are() -> None:
    dear = [contender(i, 0.9, 0.90 + i / 100) for i in range(6)]
    cheap = [contender(6 + i, 0.2, 0.10 + i / 100) for i in range(3)]
    assert strata(0.1, 0.9, 2) == (pytest.approx(0.3),)
    assert promotion([*dear, *cheap], 2, 3, (0.3,)) == cheap[2]  # of two strata that have sent none on, the cheaper
    assert promotion([*dear, *cheap], 2, 3, (0.3,), running=[8]) == dear[5]


def test_who_is_beaten_at_no_higher_cost_comes_after_those_who_are_not() -> None:
    beaten = contender(0, 0.50, 0.80)
    beats = contender(1, 0.45, 0.81)
    cheap = contender(2, 0.40, 0.60)
    assert promotion([beaten, beats, cheap], 2, 3, ()) == beats
    assert promotion([beaten, beats, cheap], 2, 2, ()) == beats
    assert promotion([beaten, beats, cheap, contender(3, 0.41, 0.1)], 2, 2, (), running=[1]) == cheap  # though worse


def test_what_was_stopped_or_failed_counts_and_does_not_go_on() -> None:
    stopped = contender(0, 0.5, -math.inf, open=False)
    failed = contender(1, 0.5, 0.9, open=False)
    assert promotion([stopped, failed, contender(2, 0.5, 0.5)], 2, 3, ()) is None  # the best has had its chance


def hypervolume(points: list[tuple[float, float]]) -> float:
    records = [TrialRecord(CONFIGS[0], "complete", score, cost, number=i) for i, (score, cost) in enumerate(points)]
    return pareto_front(records, TOP1).hypervolume(1 / 16, ScoreRange(0.0, 1.0))


def test_it_comes_nearer_to_the_known_front_than_promotion_by_chance() -> None:
    """Configs whose worth after the last rung is known; shorter rungs show it with noise, and all of them too low."""
    gaps: dict[str, list[float]] = {"rungs": [], "chance": []}
    edges = strata(1 / 16, 1)
    for seed in range(20):
        random = np.random.default_rng(seed)
        cost = 2 ** random.uniform(-4, 0, 60)
        worth = 0.8 + 0.05 * np.log2(cost) + random.normal(0, 0.05, 60)
        shown = np.stack([worth - 0.1 + random.normal(0, 0.03, 60), worth - 0.04 + random.normal(0, 0.01, 60), worth])
        best = hypervolume(list(zip(worth, cost, strict=True)))
        for how in gaps:
            reached = np.zeros(60, int)
            started = 0
            for _ in range(60 + 20 + 6):  # as many trainings for both
                known = [
                    contender(i, cost[i], *(shown[: reached[i] + 1, i] if how == "rungs" else random.random(3)))
                    for i in range(started)
                ]
                known = [replace(c, values=c.values[: reached[c.number] + 1]) for c in known]
                chosen = promotion(known, 3, 3, edges)
                if chosen is not None:
                    reached[chosen.number] += 1
                elif started < 60:
                    started += 1
            front = [(shown[reached[i], i], cost[i]) for i in range(started)]
            gaps[how].append(best - hypervolume(front))
    assert np.mean(gaps["rungs"]) < 0.7 * np.mean(gaps["chance"])


# -------------------------------------------------------------------------------------------- one trial, many rungs


def ended(config: PrecisionConfig, score: float, steps: int, began: float = 0.0, **more: object) -> TrialRecord:
    record = TrialRecord(config, "complete", score=score, curve=((steps, score),), wall=WallTime(0, 9, 1))
    return replace(record, started_s=began, **more)  # type: ignore[arg-type]


def climbed(number: int = 3) -> TrialRecord:
    """A trial of 60 steps from 100 s on, and of 150 from 300 s on."""
    first = ended(CONFIGS[3], 0.5, 60, 100.0, curve=((0, 0.3), (60, 0.5)), divergence=0.4, start_divergence=2.0)
    first = ended_first_rung(replace(first, number=number, cost=0.5, origin="sampler", values="2:wA=="))
    return ended_next_rung(first, ended(CONFIGS[3], 0.7, 150, 300.0, divergence=0.2, values="2:gA=="), 150)


def test_a_trial_is_worth_what_its_longest_rung_is_and_remembers_the_others() -> None:
    record = climbed()
    assert (record.score, record.divergence, record.values, record.steps) == (0.7, 0.2, "2:gA==", 150)
    assert (record.number, record.cost, record.origin, record.started_s) == (3, 0.5, "sampler", 100.0)
    assert record.start_divergence == 2.0
    assert record.curve == ((0, 0.3), (60, 0.5), (150, 0.7))
    assert (record.wall.total_s, record.ended_s) == (20.0, 310.0)
    first = record.at_rung(0)
    assert (first.score, first.divergence, first.steps, first.ended_s) == (0.5, 0.4, 60, 110.0)
    assert first.curve == ((0, 0.3), (60, 0.5))
    assert first.wall.total_s == pytest.approx(10.0)


def test_a_rung_that_fails_leaves_the_trial_what_it_was() -> None:
    lost = TrialRecord(CONFIGS[3], "failed", reason="out of memory", started_s=500.0)
    record = ended_next_rung(climbed(), lost, 400)
    assert (record.state, record.score, record.steps) == ("complete", 0.7, 150)
    assert record.reason == "the rung of 400 steps failed: out of memory"
    assert [rung.score for rung in record.rungs] == [0.5, 0.7, None]


def test_a_longer_rung_takes_the_place_of_the_shorter_one_in_the_record(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "name: a\n", metric=TOP1)
    other = replace(climbed(4), number=4)
    with folder.driving():
        for record in (climbed().at_rung(0), other.at_rung(0), climbed()):
            folder.append(record)
    assert folder.records() == [climbed(), other.at_rung(0)]


def test_hypervolume_over_time_has_every_rung_and_ends_at_the_front() -> None:
    worse = ended_next_rung(climbed(5).at_rung(0), ended(CONFIGS[3], 0.4, 150, 400.0), 150)
    records = [replace(climbed(), cost=1 / 4), replace(worse, cost=1 / 8)]
    steps = hypervolume_over_time(records, 1 / 16, TOP1, ScoreRange(0.0, 1.0))
    assert [(step.elapsed_s, step.rung) for step in steps] == [(10.0, 0), (10.0, 0), (210.0, 1), (310.0, 1)]
    expected = [0.5 * 2 / 4, 0.5 * 3 / 4, 0.5 * 3 / 4 + 0.2 * 2 / 4, 0.4 * 3 / 4 + 0.3 * 2 / 4]
    assert [step.hypervolume for step in steps] == pytest.approx(expected)
    assert steps[-1].hypervolume == pytest.approx(pareto_front(records, TOP1).hypervolume(1 / 16, ScoreRange(0.0, 1.0)))


def test_a_baseline_of_another_length_is_no_baseline() -> None:
    uniform = replace(climbed(0).at_rung(0), number=0, origin="uniform", values="2:wA==")
    mixed = replace(climbed(1), cost=0.49)
    gains = gains_over_baselines(pareto_front([uniform, mixed], TOP1))
    assert gains == {1: "none: 150 steps, and 60 of trial 0 at 0.98x"}


# --------------------------------------------------------------------------------------------------- the controller


def trained(proposal: Proposal) -> TrialRecord:
    """As the toy's runner has it: what is missing to the truth halves with every rung."""
    score = 1 - (1 - truth(proposal.config)) * (1 + 2.0**-proposal.rung)
    return ended(proposal.config, max(0.0, score), LENGTHS[proposal.rung])


def search(trials: int, records: list[TrialRecord] | None = None, **more: object) -> SearchController:
    spec = SearchSpec(trials=trials, **more)  # type: ignore[arg-type]
    return SearchController(make_space(), relative_cost, spec, TOP1, records=records or (), rungs=LENGTHS)


def test_promising_configs_train_longer_and_the_number_of_configs_is_what_was_asked_for() -> None:
    controller = search(30)
    told: dict[int, TrialRecord] = {}
    lengths: list[int] = []
    while (proposal := controller.ask()) is not None:
        if proposal.rung:
            assert proposal.before == told[proposal.number]
        lengths.append(proposal.rung)
        told[proposal.number] = controller.tell(proposal, trained(proposal))
    assert lengths.count(0) == 30 == len(told)
    assert 6 <= lengths.count(1) <= 15  # who went on early need not be among the best third at the end
    assert 1 <= lengths.count(2) <= 5
    by_cost = sorted(told.values(), key=lambda r: r.cost or 0.0)
    longer = [i for i, r in enumerate(by_cost) if len(r.rungs) > 1]
    assert longer[0] < 10  # cheap ones too
    assert longer[-1] >= 20
    assert controller.stop_reason == "30 trials were wanted"


def test_without_rungs_nothing_is_promoted() -> None:
    controller = SearchController(make_space(), relative_cost, SearchSpec(trials=12), TOP1)
    records = []
    while (proposal := controller.ask()) is not None:
        records.append(controller.tell(proposal, trained(proposal)))
    assert len(records) == 12
    assert {record.rungs for record in records} == {()}


def test_a_worker_waits_where_a_trial_that_runs_may_send_a_config_on() -> None:
    controller = search(3, sampler="random")
    proposals = [controller.ask() for _ in range(3)]
    assert controller.ask() is None
    assert controller.stop_reason is None  # ask again
    for proposal in proposals:
        assert proposal is not None
        controller.tell(proposal, trained(proposal))
    while (proposal := controller.ask()) is not None:
        controller.tell(proposal, trained(proposal))
    assert controller.stop_reason == "3 trials were wanted"


def test_a_resumed_search_goes_on_with_what_was_promising() -> None:
    controller = search(12)
    records: dict[int, TrialRecord] = {}
    promoted: Proposal | None = None
    while (proposal := controller.ask()) is not None:
        if proposal.rung:
            promoted = proposal  # killed while it ran
            break
        records[proposal.number] = controller.tell(proposal, trained(proposal))
    again = search(12, list(records.values())).ask()
    assert promoted is not None
    assert again is not None
    assert (again.number, again.rung, again.before) == (promoted.number, promoted.rung, promoted.before)


def test_a_rung_that_fails_counts_as_a_failure_and_is_not_tried_again() -> None:
    controller = search(9, sampler="none", max_failures_in_row=2)
    failed = []
    while (proposal := controller.ask()) is not None:
        if proposal.rung:
            failed.append(proposal.number)
            record = controller.tell(proposal, TrialRecord(proposal.config, "failed", reason="no memory"))
            assert record.score == proposal.before.score  # type: ignore[union-attr]
        else:
            controller.tell(proposal, trained(proposal))
    assert failed
    assert len(set(failed)) == len(failed)


def test_weights_and_states_on_the_disk_are_those_of_the_record(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "name: a\n", metric=TOP1)
    there = folder.checkpoints
    there.mkdir()
    first = climbed().at_rung(0)
    checkpoint_path(there, 3).write_text("of 60 steps")
    state_path(there, 3, 0).write_text("to go on from")
    state_path(there, 9, 0).write_text("of a trial that was killed")
    rung_path(there, 3, 1).write_text("of a rung that was killed")
    weights = FrontWeights(folder, [first], len(LENGTHS))
    assert checkpoint_path(there, 3).read_text() == "of 60 steps"
    assert sorted(p.name for p in there.iterdir()) == ["trial-3.safetensors", "trial-3.state-0.safetensors"]
    rung_path(there, 3, 1).write_text("of 150 steps")
    state_path(there, 3, 1).write_text("to go on from")
    with folder.driving():
        folder.append(climbed())
    weights.keep(climbed())
    assert checkpoint_path(there, 3).read_text() == "of 150 steps"
    assert sorted(p.name for p in there.iterdir()) == ["trial-3.safetensors", "trial-3.state-1.safetensors"]


@pytest.mark.parametrize("seed", range(8))
def test_what_comes_back_to_the_front_has_its_weights_there(tmp_path: Path, seed: int) -> None:
    """Scores rise and fall from rung to rung, and costs and scores are often the same."""
    folder = RunFolder.create(tmp_path / "run", "name: a\n", metric=TOP1)
    folder.checkpoints.mkdir()
    random, known, came_back = Random(seed), dict[int, TrialRecord](), 0
    was = set[int]()
    weights = FrontWeights(folder, [], len(LENGTHS))
    for number in range(200):
        before = known.get(random.randrange(number)) if number > 5 and random.random() < 0.6 else None
        score, origin = random.randrange(30) / 30, "uniform" if number < 3 else "sampler"
        record = ended(CONFIGS[0], score, 60, 100.0)
        if random.random() < 0.1:
            record = replace(record, state="failed", score=None)
        if before is None or not goes_on(before) or len(before.rungs) == len(LENGTHS):
            cost = random.randrange(1, 40) / 40
            record = ended_first_rung(replace(record, number=number, origin=origin, cost=cost))  # type: ignore[arg-type]
            path = checkpoint_path(folder.checkpoints, number)
        else:
            record = ended_next_rung(before, record, LENGTHS[len(before.rungs)])
            path = rung_path(folder.checkpoints, record.number, len(record.rungs) - 1)
        if record.rungs[-1].score is not None:
            path.write_text(f"{len(record.rungs) - 1}")
        known[record.number] = record
        weights.keep(record)
        front = pareto_front(list(known.values()), TOP1)
        assert weights.front == front
        for trial in (*front, *front.ladder):
            last = max(i for i, rung in enumerate(trial.rungs) if rung.score is not None)
            assert checkpoint_path(folder.checkpoints, trial.number).read_text() == str(last)
        there = sorted(folder.checkpoints.iterdir())
        if random.random() < 0.2:  # resumed
            weights = FrontWeights(folder, list(known.values()), len(LENGTHS))
            assert sorted(folder.checkpoints.iterdir()) == there
        numbers = {trial.number for trial in front}
        came_back += bool(numbers - was - {record.number})
        was = numbers
    assert came_back  # or nothing is tested
    assert len(list(folder.checkpoints.iterdir())) < len(known) / 2  # what cannot come back is gone


def test_killed_between_the_record_and_the_weights_nothing_is_mixed_up(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "name: a\n", metric=TOP1)
    folder.checkpoints.mkdir()
    checkpoint_path(folder.checkpoints, 3).write_text("of 60 steps")
    rung_path(folder.checkpoints, 3, 1).write_text("of 150 steps")
    FrontWeights(folder, [climbed()], len(LENGTHS))
    assert checkpoint_path(folder.checkpoints, 3).read_text() == "of 150 steps"


def test_specs_of_rungs_are_checked() -> None:
    spec = TrialSpec.model_validate({"rungs": [60, 150, 400]})
    assert (spec.steps, spec.lengths) == (60, LENGTHS)
    assert TrialSpec.model_validate(spec.model_dump(mode="json")) == spec
    assert TrialSpec(steps=100).lengths == (100,)
    assert load_study("digits", ["trial.rungs=[4, 8]"]).trial.lengths == (4, 8)  # in place of the file's `steps`
    assert load_study("digits", ["trial.rungs=[4, 8]", "trial.steps=5"]).trial.lengths == (5,)
    for wrong, words in (
        ({"rungs": [60]}, "one rung is no choice"),
        ({"rungs": [60, 60]}, "each more than the one before"),
        ({"rungs": [0, 60]}, "from 2 on"),
        ({"rungs": [60, 150], "steps": 100}, "leave `steps` out"),
    ):
        with pytest.raises(ValueError, match=words):
            TrialSpec.model_validate(wrong)


def test_a_run_without_ray_trains_by_rungs_and_shows_them_all(tmp_path: Path) -> None:
    controller = drive(tmp_path, trials=12, rungs=LENGTHS)
    records = RunFolder.open(tmp_path).records()
    assert controller.stop_reason == "12 trials were wanted"
    assert sorted(r.number for r in records) == list(range(12))
    assert any(len(r.rungs) == 2 for r in records)


QUICK_RUNGS = (*QUICK, "trial.rungs=[4, 8, 16]", "warm_start.method=none", "warm_start.ilp=false")


@pytest.mark.slow
def test_a_study_trains_by_rungs_shows_them_and_exports_the_longest(tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = mpsearch.run("digits", run, trials=9, set=[*QUICK_RUNGS, "search.eta=2", "warm_start.combinations=0"])
    records = RunFolder.open(run).records()
    longer = [record for record in records if len(record.rungs) > 1]
    assert longer
    for record in longer:
        assert [rung.steps for rung in record.rungs] == [4, 8, 16][: len(record.rungs)]
        assert [step for step, _ in record.curve if step not in (0, 2)] == [4, 8, 16][: len(record.rungs)]
    status = mpsearch.status(run)
    assert sum(status.counts.values()) == 9
    assert sum(status.rungs.values()) == status.counts["complete"]
    assert set(status.rungs) <= {0, 4, 8, 16}
    steps = {row["number"]: row["steps"] for row in result.front.to_json()["front"]}
    assert steps == {trial.number: trial.steps for trial in result.front.pareto}
    assert "training steps" in result.report.read_text()
    states = sorted(path.name for path in (run / "checkpoints").glob("*.state-*"))
    assert states == sorted(state_path(run, r.number, len(r.rungs) - 1).name for r in records if may_go_on(r))
    resumed = mpsearch.resume(run, trials=10)
    assert sum(resumed.counts.values()) == 10
    picked = max(longer, key=lambda record: record.steps)
    exported = mpsearch.export_run(run, tmp_path / "out", pick=f"trial:{picked.number}")
    assert exported.trial == picked


def may_go_on(record: TrialRecord) -> bool:
    return 0 < record.steps < 16
