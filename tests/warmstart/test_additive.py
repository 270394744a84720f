"""The additive model on landscapes that are known: what it foresees, that bits help, and what two fidelities share."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import kendalltau

from mpsearch.precision import PrecisionConfig
from mpsearch.space.choices import parse_choices
from mpsearch.space.space import SearchSpace, Slot
from mpsearch.warmstart.additive import LEAST, AdditiveModel, Design, Scores, unlinked
from mpsearch.warmstart.propose import propose
from mpsearch.warmstart.table import SensitivityTable

Truth = Callable[[PrecisionConfig], float]


def make_space(layers: int = 8) -> SearchSpace:
    names = tuple(f"layer{i}" for i in range(layers))
    slots = [
        slot
        for name in names
        for slot in (
            Slot("weight", (name,), parse_choices(["uniform:1-6", "shift:2-4"], "weight")),
            Slot("activation", (name,), parse_choices(["uniform:2-6"], "activation")),
        )
    ]
    return SearchSpace("toy", names, tuple(slots))


def landscape(space: SearchSpace, seed: int = 0) -> Truth:
    """sqrt(D) is a sum over slots, each with a weight of its own; shift weights do a little more harm."""
    factor = np.random.default_rng(seed).lognormal(sigma=0.8, size=len(space.slots)) / len(space.slots)

    def truth(config: PrecisionConfig) -> float:
        harm = 0.0
        for slot, weight in zip(space.slots, factor, strict=True):
            choice = getattr(config[slot.layers[0]], slot.tensor)
            harm += weight * 2.0**-choice.bits * (1.3 if choice.quantizer == "shift" else 1.0)
        return float(4 * harm) ** 2

    return truth


def sampled(space: SearchSpace, truth: Truth, count: int, seed: int, noise: float = 0.05) -> Scores:
    random = np.random.default_rng(seed)
    configs = [space.sample(random) for _ in range(count)]
    return [(config, truth(config) * math.exp(noise * random.normal())) for config in configs]


def table_of(space: SearchSpace, seed: int = 0) -> SensitivityTable:
    """What each tensor does alone, each number within a factor of two or so."""
    truth, random = landscape(space, seed), np.random.default_rng(7)
    best = space.uniform(6)
    entries = {}
    for slot in space.slots:
        for choice in slot.choices:
            changed = dict(best.items())
            layer = changed[slot.layers[0]]
            pair = {"weight": layer.weight, "activation": layer.activation} | {slot.tensor: choice}
            changed[slot.layers[0]] = type(layer)(pair["weight"], pair["activation"])
            entries[slot.layers[0], slot.tensor, choice] = truth(PrecisionConfig(changed.items())) * float(
                random.lognormal(sigma=0.5)
            )
    return SensitivityTable("kl", entries, 1, 0.0)


def test_it_foresees_configs_that_it_never_saw() -> None:
    space = make_space()
    truth = landscape(space)
    model = AdditiveModel(Design(space, table_of(space)), sampled(space, truth, 80, seed=1))
    new = sampled(space, truth, 60, seed=2, noise=0.0)
    mean = model.mean()
    assert kendalltau([d for _, d in new], [mean(config) for config, _ in new]).statistic > 0.85
    errors = [math.log(unlinked(mean(config), mean.link) / d) for config, d in new]
    assert np.median(np.abs(errors)) < 0.15


def test_scores_are_foreseen_without_themselves() -> None:
    space = make_space()
    scores = sampled(space, landscape(space), 60, seed=1)
    spoiled = [(scores[0][0], 50.0), *scores[1:]]
    first = AdditiveModel(Design(space), scores)
    other = AdditiveModel(Design(space), spoiled, setting=first.setting)
    assert kendalltau([d for _, d in scores], first.left_out()).statistic > 0.7
    seen = unlinked(other.mean()(scores[0][0]), other.setting.link)
    blind = unlinked(float(other.left_out()[0]), other.setting.link)
    assert abs(blind - scores[0][1]) < 0.5 * abs(seen - scores[0][1])


def test_in_every_draw_more_bits_of_a_type_never_do_more_harm() -> None:
    space = make_space()
    model = AdditiveModel(Design(space), sampled(space, landscape(space), LEAST, seed=1))
    random = np.random.default_rng(0)
    draws = [model.draw(random) for _ in range(10)]
    assert draws[0].values["layer0/weight"].tolist() != draws[1].values["layer0/weight"].tolist()
    for draw in draws:
        for slot in space.slots:
            for kind in ("uniform", "shift"):
                effects = [e for e, c in zip(draw.values[slot.name], slot.choices, strict=True) if c.quantizer == kind]
                assert effects == sorted(effects, reverse=True)


def test_draws_scatter_less_the_more_is_known() -> None:
    space = make_space()
    truth, design, config = landscape(space), Design(space), space.uniform(3)

    def spread(count: int) -> float:
        model = AdditiveModel(design, sampled(space, truth, count, seed=1))
        random = np.random.default_rng(0)
        return float(np.std([model.draw(random)(config) for _ in range(60)]))

    assert spread(200) < spread(12)


def test_a_few_trials_shift_what_hundreds_of_start_scores_say() -> None:
    space = make_space()
    truth = landscape(space)
    starts = sampled(space, truth, 120, seed=1)
    trials = [(config, 0.3 * truth(config) ** 0.8) for config, _ in sampled(space, truth, 10, seed=3)]
    model = AdditiveModel(Design(space), starts, trials)
    new = sampled(space, truth, 40, seed=4, noise=0.0)
    mean = model.mean()
    foreseen = np.array([unlinked(mean(config), mean.link) for config, _ in new])
    expected = np.array([0.3 * d**0.8 for _, d in new])
    assert kendalltau(foreseen, expected).statistic > 0.85
    assert np.median(np.abs(np.log(foreseen / expected))) < 0.25
    assert len(model.left_out()) == len(trials)


@pytest.mark.parametrize("link", ["sqrt", "log"])
def test_the_link_that_holds_is_chosen(link: str) -> None:
    space = make_space()
    truth = landscape(space)

    def other(config: PrecisionConfig) -> float:
        return truth(config) if link == "sqrt" else math.exp(6 * math.sqrt(truth(config)) - 8)

    model = AdditiveModel(Design(space), sampled(space, other, 120, seed=1, noise=0.02))
    assert model.setting.link == link


def test_too_few_scores_are_refused() -> None:
    space = make_space()
    with pytest.raises(ValueError, match=f"needs {LEAST} scores, got {LEAST - 1}"):
        AdditiveModel(Design(space), sampled(space, landscape(space), LEAST - 1, seed=1))


def test_without_a_program_what_is_proposed_is_new_and_builds_on_the_best_that_is_known() -> None:
    space = make_space()
    effects = AdditiveModel(Design(space), sampled(space, landscape(space), 60, 0)).mean()

    def cost(config: PrecisionConfig) -> float:
        return max(layer.weight.bits * layer.activation.bits for layer in config.values()) / 36

    known: dict[PrecisionConfig, float] = {}
    random, found = np.random.default_rng(3), []
    for _ in range(15):
        config = propose(effects, space, cost, None, None, 0.5, random, known)
        assert config is not None
        assert config not in known
        assert cost(config) <= 0.5
        known[config] = effects(config)
        found.append(effects(config))
    assert min(found) < found[0]
    blind = [propose(effects, space, cost, None, None, 0.5, random) for _ in range(15)]
    assert min(found) < min(effects(config) for config in blind if config is not None)
