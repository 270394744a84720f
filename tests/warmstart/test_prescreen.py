"""The prescreen on digits: what it keeps, that a kill costs one score, and where there is none."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from quick import QUICK

import mpsearch
from mpsearch.errors import TaskError
from mpsearch.metric import TOP1
from mpsearch.observer import Observer
from mpsearch.problem import Problem, open_problem
from mpsearch.record import RunFolder
from mpsearch.search.run import resume_study
from mpsearch.warmstart import prescreen as module
from mpsearch.warmstart.additive import start_scores
from mpsearch.warmstart.prescreen import AGAIN, KEPT, prescreen, prescreens
from mpsearch.warmstart.start import sensitivity_table
from mpsearch.warmstart.start_score import BATCHES

pytestmark = pytest.mark.study

SETTINGS = (*QUICK, "warm_start.method=none", "warm_start.budgets=[0.4,0.2]")
COUNT = 40


@pytest.fixture(scope="module")
def problem() -> Problem:
    torch.set_num_threads(1)
    return open_problem(mpsearch.load_study("digits", [*SETTINGS, f"search.prescreen={COUNT}"]))


class Known:
    """Start scores that are known: the harm of a slot falls to a quarter with every bit, later layers do less."""

    def __init__(self, *_: object) -> None:
        self.calls = 0

    def choose_arithmetic(self, _configs: object) -> bool:
        return False

    def __call__(
        self, config: mpsearch.PrecisionConfig, batches: int = BATCHES, begun: tuple[int, float] = (0, 0.0)
    ) -> float:
        harms = [4.0 ** (1 - p.weight.bits) + 4.0 ** (1 - p.activation.bits) for p in config.values()]
        return sum(harm / (1 + i) for i, harm in enumerate(harms)) + 0.001 / batches


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> type[Known]:
    """Scores that cost nothing."""
    monkeypatch.setattr(module, "StartScorer", Known)
    monkeypatch.setattr(module, "Workbench", lambda *_args, **_more: None)
    return Known


@pytest.fixture(scope="module")
def sensitivities(problem: Problem, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("warmstart")
    sensitivity_table("kl", problem.task, problem.graph, problem.space, path)
    return path


@pytest.fixture
def folder(problem: Problem, sensitivities: Path, tmp_path: Path) -> Iterator[RunFolder]:
    shutil.copytree(sensitivities, tmp_path / "run" / "warmstart")
    with RunFolder.create(tmp_path / "run", problem.spec.to_yaml(), metric=problem.metric).driving() as folder:
        yield folder


def test_the_best_of_each_budget_are_kept_and_differ(problem: Problem, folder: RunFolder, known: type[Known]) -> None:
    manual = problem.space.neighbours(problem.space.uniform(4))[0]
    picked = prescreen(problem, folder, [("manual", manual)])
    assert ("manual", manual) in picked
    of_prescreen = [config for origin, config in picked if origin == "prescreen"]
    assert 0 < len(of_prescreen) <= 2 * KEPT
    scores = start_scores(folder.prescreened())
    assert len(scores) == len({config for config, _ in scores}) == COUNT
    again = {r.config: r.divergence for r in folder.prescreened() if r.batches == AGAIN[-1][1]}
    within = {config: score for config, score in again.items() if problem.cost(config) <= 0.2}
    assert min(within, key=lambda config: within[config] or 0.0) in of_prescreen
    assert {"ladder", "manual", "combination", "ilp", "model"} <= {r.source for r in folder.prescreened()}


def test_the_models_proposals_score_better_than_others_at_their_budget(
    problem: Problem, folder: RunFolder, known: type[Known]
) -> None:
    prescreen(problem, folder, [])
    near = [r for r in folder.prescreened() if r.batches == BATCHES and 0.18 < r.cost <= 0.2]
    ours = sorted(r.divergence for r in near if r.source == "model" and r.divergence is not None)
    theirs = sorted(r.divergence for r in near if r.source != "model" and r.divergence is not None)
    assert ours[0] < theirs[0]


@pytest.mark.slow
def test_a_prescreen_that_was_killed_goes_on_where_it_was(
    problem: Problem, folder: RunFolder, known: type[Known], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def dies(scorer: Known, config: mpsearch.PrecisionConfig, batches: int = BATCHES, *begun: object) -> float:
        nonlocal calls
        calls += 1
        if calls > COUNT // 2:
            raise KeyboardInterrupt
        return score(scorer, config, batches)

    score = Known.__call__
    monkeypatch.setattr(Known, "__call__", dies)
    with pytest.raises(KeyboardInterrupt):
        prescreen(problem, folder, [])
    done = folder.prescreened()
    assert len(done) == COUNT // 2
    calls = -10_000
    picked = prescreen(problem, folder, [])
    assert folder.prescreened()[: len(done)] == done
    assert len(start_scores(folder.prescreened())) == COUNT
    monkeypatch.setattr(module, "StartScorer", None)  # everything is there: no network is needed
    assert prescreen(problem, folder, []) == picked


def test_a_torn_line_is_cut_off_and_scored_again(problem: Problem, folder: RunFolder) -> None:
    record = module.PrescreenRecord(problem.space.uniform(4), 0.4, None, BATCHES, "ladder")
    folder.append_prescreened(record)
    with folder.prescreen_jsonl.open("a") as file:
        file.write('{"cost": 0.2, "conf')
    assert folder.prescreened() == [record]
    with RunFolder.create(folder.path.with_name("other"), "name: x\n", metric=TOP1).driving() as other:
        other.prescreen_jsonl.write_bytes(folder.prescreen_jsonl.read_bytes())
    with RunFolder.open(other.path).driving() as again:
        assert again.prescreen_jsonl.read_bytes().endswith(b"\n")


def test_a_task_that_cannot_be_compared_has_no_prescreen_and_says_so(
    problem: Problem, folder: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise TaskError("`logits` gave the shape (3,)")

    monkeypatch.setattr(module, "StartScorer", refuse)
    initial = [("manual", problem.space.uniform(5))]
    with caplog.at_level(logging.WARNING):
        assert prescreen(problem, folder, initial) == initial  # type: ignore[arg-type]
    assert "no prescreen: `logits` gave the shape (3,)" in caplog.text


def test_a_cold_search_has_none() -> None:
    cold = ["warm_start.method=none", "warm_start.ilp=false", "warm_start.combinations=0"]
    assert not prescreens(mpsearch.load_study("digits", cold))
    assert not prescreens(mpsearch.load_study("digits", ["search.prescreen=0"]))
    assert prescreens(mpsearch.load_study("digits"))


@pytest.mark.slow  # its parts are above; README's example, which runs with all, has a prescreen too
def test_a_run_tries_what_was_prescreened_counts_it_and_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AGAIN", ((2, 8), (1, 16)))
    stages: list[tuple[str, int, int]] = []

    class Stages(Observer):
        def on_stage(self, stage: str, done: int, total: int) -> None:
            if stage == "prescreen":
                stages.append((stage, done, total))

    run = tmp_path / "run"
    small = ["search.prescreen=16", "search.trials=4", "warm_start.ilp=false"]
    spec = mpsearch.load_study("digits", [*SETTINGS, *small])
    mpsearch.run_study(spec, run, Stages())
    assert stages[0] == ("prescreen", 0, 16)
    assert stages.count(("prescreen", 16, 16)) == 1
    assert mpsearch.status(run).to_json()["prescreened"] == 16
    records = RunFolder.open(run).records()
    assert "prescreen" in [record.origin for record in records]
    assert "proposed by the model" in mpsearch.report(run).read_text(encoding="utf-8")
    taus = mpsearch.rank(run, proxies="sqnr", strata=1)
    assert taus[taus.proxy == "additive"].n.max() >= 3
    with pytest.raises(mpsearch.MpsearchError, match="mpsearch finalize"):
        mpsearch.rank(run, proxies="sqnr", strata=1, against="final")
    before = RunFolder.open(run).prescreened()
    resume_study(run, trials=5)
    assert RunFolder.open(run).prescreened() == before
