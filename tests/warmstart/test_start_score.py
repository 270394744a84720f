"""The start score: what it is by a plain computation, and that caches do not change it."""

from __future__ import annotations

import pytest
import torch
from quick import FEW_IMAGES
from torch import nn

import mpsearch
from mpsearch.precision import LayerPrecision, PrecisionConfig
from mpsearch.problem import Problem, open_problem
from mpsearch.quant.prepare import prepare
from mpsearch.train import jeffreys
from mpsearch.warmstart.start_score import BATCH, StartScorer
from mpsearch.workbench import Workbench, agrees, channels_last

pytestmark = pytest.mark.study


@pytest.fixture(scope="module")
def problem() -> Problem:
    torch.set_num_threads(1)
    settings = [*FEW_IMAGES, "space=digits_mixed", "trial.compile=false", "trial.precision=fp32", "trial.batch_size=64"]
    return open_problem(mpsearch.load_study("digits", settings))


@pytest.fixture(scope="module")
def workbench(problem: Problem) -> Workbench:
    return Workbench(problem.task, problem.spec.trial, offers=problem.space.offers, graph=problem.graph)


def by_batch(model: nn.Module) -> nn.Module:
    for module in model.eval().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    return model


def plain_score(problem: Problem, config: PrecisionConfig, batches: int) -> float:
    """By its definition, from a network that is made for this config alone."""
    settings = problem.spec.trial
    x = problem.task.calibration_input(settings.calibration_samples)
    model = by_batch(prepare(channels_last(problem.task.float_model()), config, x))
    teacher = by_batch(channels_last(problem.task.float_model()))
    scores = []
    with torch.no_grad():
        for x, _ in problem.task.train_batches(BATCH, batches, settings.seed + 1):
            x = x.contiguous(
                memory_format=torch.channels_last
            )  # the same sums, or a value between two codes goes astray
            scores.append(float(jeffreys(model(x), teacher(x))))
    return sum(scores) / batches


def test_the_score_is_the_divergence_with_the_batches_own_statistics(problem: Problem, workbench: Workbench) -> None:
    scorer = StartScorer(workbench, problem.space.offers)
    for config in (problem.space.uniform(4), problem.space.combinations()[5]):
        assert scorer(config, 2) == pytest.approx(plain_score(problem, config, 2), rel=1e-4)


def test_a_score_does_not_depend_on_what_was_scored_before(problem: Problem, workbench: Workbench) -> None:
    scorer, space = StartScorer(workbench, problem.space.offers), problem.space
    first = scorer(space.uniform(3), 1)
    other = scorer(space.combinations()[-1], 1)
    assert scorer(space.uniform(3), 1) == first
    assert StartScorer(workbench, space.offers, room_bytes=0)(space.combinations()[-1], 1) == pytest.approx(other)


def test_a_score_on_more_batches_goes_on_from_that_on_fewer(problem: Problem, workbench: Workbench) -> None:
    config = problem.space.uniform(4)
    scorer = StartScorer(workbench, problem.space.offers, most_batches=5)
    begun = (2, scorer(config, 2))
    assert scorer(config, 5, begun) == pytest.approx(scorer(config, 5), rel=1e-6)
    made_again = StartScorer(workbench, problem.space.offers, most_batches=5, room_bytes=0)
    assert made_again(config, 5, begun) == pytest.approx(scorer(config, 5), rel=1e-6)


def test_fewer_bits_and_no_quantizers_score_as_they_must(problem: Problem, workbench: Workbench) -> None:
    scorer, space = StartScorer(workbench, problem.space.offers), problem.space
    floats = PrecisionConfig((name, LayerPrecision.parse("float:32", "float:32")) for name in space.layers)
    scores = [scorer(config, 1) for config in (floats, space.uniform(8), space.uniform(4), space.uniform(2))]
    assert scores[0] < 1e-9
    assert scores == sorted(scores)


def test_bfloat16_agrees_only_where_size_and_order_are_kept() -> None:
    assert agrees([(0.1, 0.11), (0.5, 0.49), (2.0, 2.05)])
    assert not agrees([(0.1, 0.11), (0.5, 0.8)])
    assert not agrees([(0.100, 0.110), (0.105, 0.100)])
    assert not agrees([(0.1, float("nan"))])
