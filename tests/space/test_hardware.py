"""Hardware profiles: what they leave of a space, and that whoever proposes keeps to their pairs."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

import mpsearch
from mpsearch.cost.model import RelativeCost
from mpsearch.documents import to_yaml
from mpsearch.errors import HardwareError, SpaceError
from mpsearch.graph.facts import LayerInfo
from mpsearch.hardware.profile import Profile, kinds_of_pair, load_profile, profile_copy, profile_names
from mpsearch.metric import TOP1
from mpsearch.precision import LayerPrecision, PrecisionConfig
from mpsearch.problem import check_reference
from mpsearch.program import Program
from mpsearch.record import TrialRecord
from mpsearch.search.controller import SearchController
from mpsearch.space.build import build_space
from mpsearch.space.space import SearchSpace
from mpsearch.space.spec import load_space, parse_space
from mpsearch.study import SearchSpec, parse_study
from mpsearch.warmstart.descent import BitCost


def layer(name: str, macs: int, kind: str = "conv2d", **more) -> LayerInfo:
    facts = {"input_group": name, "weight_group": name, "signed_input": False} | more
    shape = (8, 36) if kind == "linear" else (8, 1, 3, 3) if "groups" in facts else (8, 4, 3, 3)
    return LayerInfo(name, kind, shape, (4, 6, 6), (8, 6, 6), macs, 288, 36, **facts)


LAYERS = [
    layer("stem", 9_000),
    layer("b1.one", 4_000),
    layer("b1.two", 5_000, input_group="b1.one"),  # fed by the same tensor
    layer("b2.one", 3_000, groups=4),
    layer("head", 500, "linear"),
]
OFFERED = ["uniform:2", "uniform:4", "uniform:8"]


def profile(**more) -> Profile:
    return Profile.model_validate({"name": "p", "about": "a", "source": "s", "pairs": ["w8a8", "w4a4", "w4a8"], **more})


def space_for(hardware: Profile | None, *choices: str, **more) -> SearchSpace:
    rule = {"match": "*", "weight": list(choices or OFFERED), "activation": list(choices or OFFERED)}
    document = {"name": "test", "rules": [rule], "first": "search", "last": "search", **more}
    return build_space(parse_space(document), LAYERS, hardware)


def every_config(space: SearchSpace) -> list[PrecisionConfig]:
    values = [[slot.value(choice) for choice in slot.choices] for slot in space.free]
    names = [slot.parameter for slot in space.free]
    return list(dict.fromkeys(space.config_of(dict(zip(names, chosen, strict=True))) for chosen in product(*values)))


def runs(config: PrecisionConfig, *pairs: str) -> bool:
    allowed = frozenset().union(*map(kinds_of_pair, pairs))
    return all(
        ((p.weight.quantizer, p.weight.bits), (p.activation.quantizer, p.activation.bits)) in allowed
        for p in config.values()
    )


HARD = [
    profile(),
    profile(pairs=["w8a8", "w4a4"]),
    profile(alike="block"),
    profile(alike="network", pairs=["w8a8", "w2a2"]),
    profile(first=["w8a8"], last=["w4a8"], kinds={"depthwise": ["w8a8"]}),
]
every_profile = pytest.mark.parametrize("hardware", HARD, ids=["pairs", "lockstep", "block", "network", "ends"])


@every_profile
def test_every_config_of_the_space_runs_and_all_are_counted(hardware: Profile) -> None:
    space = space_for(hardware)
    configs = every_config(space)
    allowed = [*hardware.pairs, *(hardware.first or ()), *(hardware.last or ()), *hardware.kinds.get("depthwise", ())]
    assert all(runs(config, *allowed) for config in configs)
    assert all(space.contains(config) for config in configs)
    assert space.size == len(configs) > 1
    assert space.combined >= space.size
    if hardware.first:
        assert all(config["stem"] == LayerPrecision.shorthand("w8a8") for config in configs)
    if hardware.alike == "block":
        assert all(config["b1.one"] == config["b1.two"] for config in configs)
        assert len({config["stem"] != config["b1.one"] for config in configs}) == 2


@every_profile
def test_all_ways_to_propose_keep_to_the_pairs_and_reach_every_config(hardware: Profile) -> None:
    space = space_for(hardware)
    random = np.random.default_rng(0)
    proposed = [*space.ladder(), *space.combinations(), *(space.sample(random) for _ in range(50))]
    assert all(space.contains(config) for config in proposed)
    reached, waiting = set[PrecisionConfig](), [space.ladder()[0]]
    while waiting:
        config = waiting.pop()
        if config not in reached:
            reached.add(config)
            neighbours = space.neighbours(config)
            assert config not in neighbours
            waiting += neighbours
    assert reached == set(every_config(space))
    for config in proposed:
        assert space.config_of(space.params_of(config)) == config


@every_profile
def test_the_program_is_exact_among_the_configs_that_run(hardware: Profile) -> None:
    space = space_for(hardware)
    cost = RelativeCost(LAYERS, "bops")
    random = np.random.default_rng(1)
    values = [list(random.lognormal(size=len(slot.choices))) for slot in space.slots]

    def value(config: PrecisionConfig) -> float:
        return sum(
            values[i][slot.choices.index(getattr(config[slot.layers[0]], slot.tensor))]
            for i, slot in enumerate(space.slots)
        )

    configs = every_config(space)
    for budget in sorted(map(cost, configs))[:: max(1, len(configs) // 4)]:
        within = [config for config in configs if cost(config) <= budget]
        (found,) = Program(space, cost).solve(values, budget)
        assert found.value == pytest.approx(min(map(value, within)))
        assert found.config in within
    assert cost(Program(space, cost).cheapest()) == pytest.approx(min(map(cost, configs)))
    low, high = cost.bounds(space.options)
    assert low <= min(map(cost, configs))
    assert high >= max(map(cost, configs))


@pytest.mark.parametrize("sampler", ["additive", "surrogate", "nsga2", "random"])
def test_samplers_propose_only_what_runs(sampler: str) -> None:
    space, cost = space_for(HARD[1]), RelativeCost(LAYERS, "bops")
    search = SearchController(space, cost, SearchSpec(sampler=sampler, trials=20), TOP1)
    configs = []
    while (proposal := search.ask()) is not None:
        configs.append(proposal.config)
        search.tell(proposal, TrialRecord(proposal.config, "complete", score=proposal.cost))
    assert len(configs) == len(set(configs)) >= 10
    assert all(runs(config, "w8a8", "w4a4") for config in configs)


def test_the_descent_prices_a_pair_that_is_excluded_as_the_next_wider_one() -> None:
    space, cost = space_for(profile(pairs=["w8a8", "w8a16"]), "uniform:8", "uniform:16"), RelativeCost(LAYERS, "bops")
    price = BitCost(cost, space)
    low, high = (
        [min(c.bits for c in s.choices) for s in space.slots],
        [max(c.bits for c in s.choices) for s in space.slots],
    )
    assert float(price(torch.tensor(low, dtype=torch.float64))) == pytest.approx(cost(space.uniform(8)))
    assert float(price(torch.tensor(high, dtype=torch.float64))) == pytest.approx(2.0)
    lockstep = BitCost(cost, space_for(HARD[1]))
    mixed = torch.tensor([4.0 if slot.tensor == "weight" else 8.0 for slot in space_for(HARD[1]).slots]).double()
    assert float(lockstep(mixed)) == pytest.approx(1.0)  # W4A8 runs as W8A8


def test_fused_kinds_share_a_precision_and_granularity_is_kept() -> None:
    hardware = profile(fused=[["conv2d", "depthwise"]], granularity={"weight": "tensor"})
    weight = ["uniform:4/tensor", "uniform:8/tensor", "uniform:4/channel"]
    space = space_for(hardware, rules=[{"match": "*", "weight": weight, "activation": ["uniform:4", "uniform:8"]}])
    configs = every_config(space)
    assert all(config["b1.two"] == config["b2.one"] for config in configs)
    assert {p.weight.granularity for config in configs for p in config.values()} == {"tensor"}


def test_what_excludes_everything_is_refused_by_layer() -> None:
    with pytest.raises(SpaceError, match=r"hardware 'p' runs nothing that space 'test' offers layer 'head' \(linear\)"):
        space_for(profile(kinds={"linear": ["float16"]}))
    fixed = {"b1.one": {"weight": "uniform:4"}, "b1.two": {"weight": "uniform:8"}}
    with pytest.raises(SpaceError, match=r"must share one activation precision .* none in common: 'b1\.one'"):
        space_for(profile(pairs=["w8a8", "w4a4"]), fixed=fixed)  # which one input feeds


def test_a_profile_that_excludes_the_reference_is_refused() -> None:
    study = parse_study({"name": "s", "task": {"factory": "m:f"}, "space": "full", "cost": {"reference": "w8a8"}})
    with pytest.raises(HardwareError, match=r"cost\.reference is w8a8, which hardware 'p' does not run: it runs w4a4"):
        check_reference(study, profile(pairs=["w4a4"]), LAYERS)


@pytest.mark.parametrize("name", profile_names())
def test_every_shipped_profile_says_its_source_and_runs_w8a8(name: str) -> None:
    hardware = load_profile(name)
    assert hardware.source
    space = build_space(load_space("full"), LAYERS, hardware)
    assert space.contains(PrecisionConfig.uniform(space.layers, LayerPrecision.shorthand("w8a8")))
    text, _ = profile_copy(name)
    assert name in text


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"pairs": ["w9x8"]}, "cannot read 'w9x8'"),
        ({"pairs": []}, "there is no pair"),
        ({"kinds": {"conv9d": ["w8a8"]}}, "did you mean 'conv1d'|valid"),
        ({"granularity": {"weight": ["chanel"]}}, "unknown granularity 'chanel'"),
        ({"cost": {}}, "give `table` or `macs_per_cycle`"),
        ({"cost": {"macs_per_cycle": {"w8a8": -1}}}, "a number above 0"),
        ({"cost": {"macs_per_cycle": {"w8a8": float("nan")}}}, "finite"),
        ({"pears": ["w8a8"]}, "unknown key|pears"),
    ],
)
def test_a_wrong_profile_is_refused_in_words(wrong: dict, words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(to_yaml({"name": "p", "about": "a", "source": "s", "pairs": ["w8a8"], **wrong}))
    with pytest.raises(HardwareError, match=words):
        load_profile(path)
    with pytest.raises(HardwareError, match="no hardware profile"):
        load_profile("mpci")


def test_a_profile_whose_table_is_no_text_is_not_shown(tmp_path: Path) -> None:
    profile = {"name": "p", "about": "a", "source": "s", "pairs": ["w8a8"], "cost": {"table": "mine.csv"}}
    (tmp_path / "mine.yaml").write_text(to_yaml(profile))
    (tmp_path / "mine.csv").write_bytes(b"\xff\xfe")
    with pytest.raises(HardwareError, match=r"cannot read the table .*mine\.csv: 'utf-8' codec"):
        mpsearch.hardware_show(tmp_path / "mine.yaml")
