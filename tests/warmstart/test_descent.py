"""The descent on digits: what its quantizer and its cost are, that layers come apart, and that it can be resumed."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quick import QUICK

import mpsearch
from mpsearch.cost.model import RelativeCost
from mpsearch.errors import DivergedError, SpaceError, StudyError
from mpsearch.observer import Observer
from mpsearch.precision import Precision, PrecisionConfig
from mpsearch.problem import Problem, open_problem
from mpsearch.quant.uniform import UniformQuantizer
from mpsearch.record import RunFolder
from mpsearch.search.run import resume_study
from mpsearch.warmstart import start
from mpsearch.warmstart.descent import BitCost, BitQuantizer, Descent, descend, on_budget, reachable_budgets
from mpsearch.warmstart.start import rounded, warm_start
from mpsearch.workbench import Workbench

pytestmark = pytest.mark.study

BUDGETS = (0.5, 0.25)
STEPS = 40
WITHOUT_CONTROLS = ("warm_start.ilp=false", "warm_start.combinations=0")


@pytest.fixture(scope="module")
def problem() -> Problem:
    torch.set_num_threads(1)
    overrides = [*QUICK, f"warm_start.steps={STEPS}", *WITHOUT_CONTROLS]
    return open_problem(mpsearch.load_study("digits", [*overrides, f"warm_start.budgets={list(BUDGETS)}"]))


@pytest.fixture(scope="module")
def workbench(problem: Problem) -> Workbench:
    return Workbench(problem.task, problem.spec.trial)


@pytest.fixture(scope="module")
def descent(problem: Problem, workbench: Workbench) -> Descent:
    return descend(workbench, problem.space, problem.cost, BUDGETS, STEPS)


def quantizer(bits: float, *, signed: bool, betas: bool = False) -> BitQuantizer:
    table = torch.log2(torch.tensor([0.8, 0.5, 0.3, 0.16, 0.08, 0.04, 0.02, 0.01]))
    learned = BitQuantizer(table, -torch.linspace(0.3, 1, 8) if betas else None, 1, signed=signed)
    learned.bits.data.fill_(bits)
    return learned


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("signed", "betas"), [(True, False), (False, False), (False, True)])
def test_at_whole_bits_it_is_the_uniform_quantizer(bits: int, signed: bool, betas: bool) -> None:
    learned = quantizer(bits, signed=signed, betas=betas)
    uniform = UniformQuantizer(1, 0, signed=signed, offset=betas, elements=1)
    uniform.set_precision(Precision("uniform", bits, "tensor"))
    uniform.set_range(
        torch.exp2(learned.log_steps[bits - 1]), None if learned.betas is None else learned.betas[bits - 1]
    )
    x = torch.randn(500, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(learned(x), uniform(x))


def test_the_step_is_geometric_between_whole_bits() -> None:
    learned = quantizer(3.5, signed=True)
    torch.testing.assert_close(torch.exp2(learned.between(learned.log_steps)), torch.tensor(math.sqrt(0.3 * 0.16)))


def test_more_bits_lower_the_squared_error_and_the_gradient_says_so() -> None:
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    errors, slopes = [], []
    for bits in (1.5, 2.5, 3.5, 4.5, 5.5):
        learned = quantizer(bits, signed=True)
        error = (learned(x) - x).square().mean()
        error.backward()
        errors.append(float(error.detach()))
        slopes.append(float(learned.bits.grad))  # type: ignore[arg-type]
    assert errors == sorted(errors, reverse=True)
    assert max(slopes) < 0


def test_the_cost_of_whole_bits_is_the_cost_models_and_its_gradient_a_difference(problem: Problem) -> None:
    price = BitCost(problem.cost, problem.space)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        bits = torch.randint(1, 9, (len(problem.space.slots),), generator=generator)
        chosen = zip(problem.space.slots, bits.tolist(), strict=True)
        config = problem.space.config_of({slot.parameter: b for slot, b in chosen})
        assert float(price(bits.double())) == pytest.approx(problem.cost(config), rel=1e-9)
    bits = 1.3 + 6 * torch.rand(len(problem.space.slots), generator=generator, dtype=torch.float64)
    small = 1e-4 * torch.eye(len(bits), dtype=torch.float64)
    differences = torch.stack([(price(bits + e) - price(bits - e)) / 2e-4 for e in small])
    torch.testing.assert_close(price.gradient(bits), differences, rtol=1e-4, atol=1e-7)


def test_a_cost_that_is_no_sum_is_refused(problem: Problem) -> None:
    with pytest.raises(SpaceError, match="no sum over layers"):
        BitCost(RelativeCost(problem.graph.layers, "activation_bytes_peak"), problem.space)


def test_bits_are_moved_onto_the_budget_within_their_ends(problem: Problem) -> None:
    price = BitCost(problem.cost, problem.space)
    low, high = torch.ones(22, dtype=torch.float64), torch.full((22,), 8.0, dtype=torch.float64)
    bits = torch.linspace(0, 9, 22, dtype=torch.float64)
    for budget in (0.9, 0.4, 0.15):
        moved = on_budget(price, bits, low, high, budget)
        assert float(price(moved)) == pytest.approx(budget, abs=1e-6)
        assert bool(((moved >= low) & (moved <= high)).all())
        assert bool((moved.diff() >= 0).all())


def test_every_budget_leaves_a_snapshot_at_its_cost(problem: Problem, descent: Descent) -> None:
    price = BitCost(problem.cost, problem.space)
    assert [snapshot.budget for snapshot in descent.snapshots] == list(BUDGETS)
    for snapshot in descent.snapshots:
        bits = torch.tensor([snapshot.bits[slot.name] for slot in problem.space.slots], dtype=torch.float64)
        assert float(price(bits)) == pytest.approx(snapshot.budget, rel=0.05)  # that of the step, just below it
    assert descent.log[-1]["step"] == STEPS - 1


def test_layers_come_apart_and_marginals_come_together(
    problem: Problem, workbench: Workbench, descent: Descent
) -> None:
    uniform = descend(workbench, problem.space, problem.cost, BUDGETS, STEPS, spread=0.0)
    last, baseline = descent.snapshots[-1], uniform.snapshots[-1]
    assert torch.tensor(list(baseline.bits.values())).std() < 1e-6
    assert torch.tensor(list(last.bits.values())).std() > 0.3
    assert last.imbalance < baseline.imbalance


@pytest.mark.slow
def test_the_same_seed_descends_the_same_way(problem: Problem, workbench: Workbench, descent: Descent) -> None:
    again = descend(workbench, problem.space, problem.cost, BUDGETS, STEPS)
    assert [s.bits for s in again.snapshots] == [s.bits for s in descent.snapshots]


def test_budgets_that_nothing_can_meet_are_said_and_others_are_taken(problem: Problem) -> None:
    """Hardware on which W8A8 is the cheapest leaves nothing below 1, where a study's budgets usually are."""
    price = BitCost(problem.cost, problem.space)
    assert reachable_budgets(price, problem.space, [0.3, 1e-3, 0.6]) == [0.6, 0.3]
    taken = reachable_budgets(price, problem.space, [1e-3, 2e-3])
    ratios = [1 / taken[0], taken[0] / taken[1], taken[1] / problem.cheapest]
    assert ratios == pytest.approx([ratios[0]] * 3)
    settings = problem.spec.warm_start.model_copy(update={"budgets": (1e-3, 2e-3)})
    said = replace(problem, spec=problem.spec.model_copy(update={"warm_start": settings})).warnings()
    (about,) = [text for text in said if "warm_start.budgets" in text]
    assert "0.001, 0.002 cannot be met" in about
    assert about.endswith("; the descent takes as many, spread over what there is")


def test_a_space_whose_uniform_configs_cost_the_same_is_refused_by_check_too() -> None:
    study = mpsearch.load_study("digits", [*QUICK, "space=full", "hardware=int8-fp16"])
    with pytest.raises(SpaceError, match=r"there is no budget to descend to; do without the descent \(warm_start"):
        mpsearch.check(study)


def test_a_saved_descent_is_read_back_whole(descent: Descent, tmp_path: Path) -> None:
    descent.save(tmp_path)
    again = Descent.load(tmp_path)
    assert again.log == descent.log
    assert again.snapshots == descent.snapshots
    assert [path.name for path in tmp_path.iterdir()] == ["descent.json"]  # weights that nobody reads are not written


def test_whole_bits_stay_within_the_budget_and_near_what_was_learned(problem: Problem, descent: Descent) -> None:
    for snapshot in descent.snapshots:
        configs = rounded(descent, snapshot.budget, problem.space, problem.cost, 3)
        assert len(set(configs)) == 3
        assert all(problem.cost(config) <= snapshot.budget for config in configs)
        assert problem.cost(configs[0]) > 0.97 * snapshot.budget
        moved = [
            abs(configs[0][name].weight.bits - snapshot.bits[slot.name])
            for slot in problem.space.slots
            if slot.tensor == "weight"
            for name in slot.layers
        ]
        assert max(moved) < 1


def test_a_warm_start_is_paid_for_once(problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = problem.spec.warm_start.model_copy(update={"ilp": True, "steps": 4})
    spec = problem.spec.model_copy(update={"warm_start": both})

    def once() -> list[tuple[str, PrecisionConfig]]:
        return [*warm_start(spec, problem.task, problem.graph, problem.space, problem.cost, tmp_path / "warmstart")]

    initial_configs = once()
    first = ["descent", "descent", "uniform", "ilp", "ilp"]
    assert [origin for origin, _ in initial_configs] == [*first, *["descent"] * 4]
    assert initial_configs[2][1] == problem.space.ladder()[-1]
    monkeypatch.setattr(start, "descend", None)
    monkeypatch.setattr(start, "measure", None)
    assert once() == initial_configs
    settings = spec.warm_start.model_copy(update={"combinations": 2})
    spec = spec.model_copy(update={"warm_start": settings})
    assert [origin for origin, _ in once()] == [*first, *["uniform"] * 2, *["descent"] * 4]


def test_a_search_goes_on_without_a_descent_that_diverged(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def descend(*_: Any, **__: Any) -> None:
        raise DivergedError("the training loss became nan at step 3 of 20")

    monkeypatch.setattr(start, "descend", descend)
    spec = mpsearch.load_study("digits", [*QUICK, *WITHOUT_CONTROLS, "warm_start.ilp=true"])
    initial_configs = warm_start(spec, problem.task, problem.graph, problem.space, problem.cost, tmp_path)
    assert {origin for origin, _ in initial_configs} == {"ilp"}
    assert "the search goes on without its descent: the training loss became nan" in caplog.text


@pytest.mark.slow  # sensitivities of all types
def test_the_cheap_end_of_several_types_is_tried_after_the_snapshots(tmp_path: Path) -> None:
    overrides = [*QUICK, "warm_start.steps=4", "warm_start.budgets=[0.4]", *WITHOUT_CONTROLS]
    problem = open_problem(mpsearch.load_study("digits", ["space=digits_mixed", *overrides]))
    folder = tmp_path / "warmstart"
    initial_configs = warm_start(problem.spec, problem.task, problem.graph, problem.space, problem.cost, folder)
    assert [origin for origin, _ in initial_configs[:2]] == ["descent", "uniform"]
    cheapest = initial_configs[1][1]
    assert problem.cost(cheapest) == pytest.approx(problem.cheapest)
    assert problem.cost(cheapest) < min(map(problem.cost, problem.space.ladder()))


@pytest.mark.slow
def test_a_study_tries_what_was_learned_and_resumes_without_a_second_descent(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*QUICK, "search.trials=10"]
    warm = [
        *WITHOUT_CONTROLS,
        "warm_start.steps=20",
        "warm_start.budgets=[0.5]",
        "warm_start.neighbours=2",
    ]
    stages: list[tuple[str, int, int]] = []

    class Stages(Observer):
        def on_stage(self, stage: str, done: int, total: int) -> None:
            stages.append((stage, done, total))

    mpsearch.run_study(mpsearch.load_study("digits", [*overrides, *warm]), tmp_path / "run", Stages())
    assert stages[0] == ("descent", 0, 20)
    assert stages[-1] == ("descent", 20, 20)
    monkeypatch.setattr(start, "descend", None)
    resume_study(tmp_path / "run", trials=11)
    origins = [record.origin for record in RunFolder.open(tmp_path / "run").records()]
    assert origins == ["uniform", "uniform", "descent", "descent"] + ["uniform"] * 6 + ["sampler"]


@pytest.mark.parametrize("setting", ["budgets=[]", "budgets=[0.5,-1]", "steps=0", "method=hawq"])
def test_a_warm_start_that_makes_no_sense_is_refused(setting: str) -> None:
    with pytest.raises(StudyError, match="warm_start"):
        mpsearch.load_study("digits", [f"warm_start.{setting}"])
