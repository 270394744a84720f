"""Tau: scipy's, within strata of cost, with an interval that a seed fixes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import kendalltau

from mpsearch.errors import RunError
from mpsearch.metric import TOP1
from mpsearch.precision import LayerPrecision, PrecisionConfig
from mpsearch.record import FinalRecord, RungScore, TrialRecord
from mpsearch.space.choices import parse_choices
from mpsearch.space.space import SearchSpace, Slot
from mpsearch.warmstart.rank import foreseen_divergence, proxy_tau, trials_frame
from mpsearch.warmstart.table import SensitivityTable


def trials(count: int = 40, seed: int = 0) -> pd.DataFrame:
    """Accuracy rises with cost; `cost_like` knows the cost and nothing else, `wise` the accuracy too."""
    random = np.random.default_rng(seed)
    cost = np.sort(random.uniform(0.1, 1.0, count))
    accuracy = 0.5 + 0.4 * cost + random.normal(0, 0.01, count)
    return pd.DataFrame({"cost": cost, "quality": accuracy, "cost_like": -cost, "wise": -accuracy, "ptq": accuracy**3})


def test_tau_is_that_of_scipy_in_every_stratum() -> None:
    table = trials()
    found = proxy_tau(table, ["cost_like"], strata=4, resamples=0, seed=0)
    quarters = [table, *(table.iloc[10 * i : 10 * i + 10] for i in range(4))]
    assert found.n.tolist() == [40, 10, 10, 10, 10]
    for row, part in zip(found.itertuples(), quarters, strict=True):
        assert row.tau == pytest.approx(kendalltau(part.quality, -part.cost_like).statistic)
    assert found.stratum[0] == "all"
    assert found.stratum[1] == f"{table.cost[0]:.3g}-{table.cost[9]:.3g}"


def test_tau_has_the_sign_that_means_good() -> None:
    found = proxy_tau(trials(), ["wise", "ptq"], more_is_better=["ptq"], resamples=0, seed=0)
    assert found.tau.to_numpy() == pytest.approx(1)
    assert proxy_tau(trials(), ["ptq"], resamples=0, seed=0).tau.to_numpy() == pytest.approx(-1)


def test_tau_within_strata_unmasks_a_proxy_that_knows_only_the_cost() -> None:
    table = trials(400)
    table["cost_like"] = -np.round(table.cost, 1)
    found = proxy_tau(table, ["cost_like"], strata=20, resamples=0, seed=0)
    assert found.tau[0] > 0.8 > 2 * found.tau[1:].mean()


def test_interval_holds_the_tau_shrinks_with_trials_and_repeats_with_the_seed() -> None:
    few, many = (proxy_tau(trials(n), ["cost_like"], strata=1, resamples=200, seed=3) for n in (20, 200))
    for found in (few, many):
        assert (found.low <= found.tau).all()
        assert (found.tau <= found.high).all()
    assert (many.high - many.low)[0] < 0.6 * (few.high - few.low)[0]
    pd.testing.assert_frame_equal(few, proxy_tau(trials(20), ["cost_like"], strata=1, resamples=200, seed=3))
    assert few.low[0] != proxy_tau(trials(20), ["cost_like"], strata=1, resamples=200, seed=4).low[0]


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Two normals of correlation r have tau = 2/pi asin r."""
    truth, covered = 2 / np.pi * np.arcsin(0.5), 0
    for seed in range(40):
        x, noise = np.random.default_rng(seed).normal(size=(2, 60))
        table = pd.DataFrame({"cost": 1.0, "quality": x, "proxy": -(0.5 * x + 0.75**0.5 * noise)})
        (row,) = proxy_tau(table, ["proxy"], strata=1, resamples=100, confidence=0.9, seed=seed).itertuples()
        covered += row.low <= truth <= row.high
    assert 0.75 <= covered / 40 <= 1.0


def test_what_cannot_be_ranked_is_nan_and_missing_values_are_left_out() -> None:
    table = trials(12)
    table["constant"] = 1.0
    table.loc[3, "wise"] = np.nan
    table.loc[4, "quality"] = np.nan
    table.loc[5, "cost"] = np.nan
    found = proxy_tau(table, ["constant", "wise"], strata=5, resamples=10, seed=0)
    assert found[found.proxy == "constant"][["tau", "low", "high"]].isna().all(axis=None)
    overall = found[(found.proxy == "wise") & (found.stratum == "all")].iloc[0]
    assert (overall.tau, overall.n) == (pytest.approx(1), 9)
    assert found[found.n < 3].tau.isna().all()
    empty = proxy_tau(table.iloc[:0], ["wise"], seed=0)
    assert (empty.n[0], len(empty)) == (0, 1)


def test_a_missing_column_is_named() -> None:
    with pytest.raises(RunError, match="no column 'wisse': did you mean 'wise'"):
        proxy_tau(trials(), ["wisse"], seed=0)


def test_what_a_study_knows_of_its_trials_is_ranked() -> None:
    config = PrecisionConfig({"fc": LayerPrecision.shorthand("w4a4")})
    layer = config["fc"]
    entries = {("fc", "weight", layer.weight): 0.25, ("fc", "activation", layer.activation): 0.5}
    table = SensitivityTable("kl", entries, 1, 0.0)
    known = TrialRecord(config, "complete", 0.9, 0.3, curve=((0, 0.5), (75, 0.8), (150, 0.9)), divergence=0.1)
    known = replace(known, start_divergence=0.4)
    brief = TrialRecord(config, "complete", 0.6, 0.3, curve=((0, 0.6),))
    foreign = replace(known, config=PrecisionConfig({"fc": LayerPrecision.shorthand("w5a4")}))
    stopped = replace(known, state="stopped")
    frame = trials_frame([known, brief, foreign, stopped], TOP1, [table], {-1: 0.2}, [FinalRecord(-1, 0, 9, 0.8, 0.7)])
    assert frame.iloc[0].to_dict() == {
        "cost": 0.3, "quality": 0.9, "final": 0.7, "before": 0.5, "halfway": 0.8, "start": 0.4, "additive": 0.2,
        "divergence": 0.1, "kl": 0.75,
    }  # fmt: skip
    assert len(frame) == 3
    assert frame.halfway.isna().tolist() == [False, True, False]
    assert frame.kl.isna().tolist() == [False, False, True]


def test_each_rung_is_a_column_and_no_score_halfway() -> None:
    config = PrecisionConfig({"fc": LayerPrecision.shorthand("w4a4")})
    rungs = (RungScore(60, 0.5, 0.4), RungScore(150, 0.6, 0.3))
    curve = ((0, 0.2), (60, 0.5), (150, 0.6))
    longer = TrialRecord(config, "complete", 0.6, 0.3, rungs=rungs, curve=curve, divergence=0.3)
    short = TrialRecord(config, "complete", 0.5, 0.3, number=1, rungs=rungs[:1], curve=curve[:2], divergence=0.4)
    frame = trials_frame([longer, short], TOP1)
    assert frame["rung 60"].tolist() == [0.4, 0.4]
    assert frame["rung 150"].isna().tolist() == [False, True]
    assert frame.before.tolist() == [0.2, 0.2]
    assert frame.halfway.isna().all()


def test_the_additive_model_ranks_trials_by_the_others_and_finals_are_means_over_seeds() -> None:
    slots = [
        Slot(tensor, (name,), parse_choices(["uniform:2-8"], tensor))  # type: ignore[arg-type]
        for name in ("a", "b", "c")
        for tensor in ("weight", "activation")
    ]
    space = SearchSpace("toy", ("a", "b", "c"), tuple(slots))
    random = np.random.default_rng(0)

    def harm(config: PrecisionConfig) -> float:
        weights = zip((4.0, 1.0, 0.3), config.values(), strict=True)
        return sum(w * (2.0**-p.weight.bits + 2.0**-p.activation.bits) for w, p in weights) ** 2

    configs = list(dict.fromkeys(space.sample(random) for _ in range(60)))
    records = [
        TrialRecord(c, "complete", score=1 - harm(c), cost=0.5, divergence=0.3 * harm(c), number=i)
        for i, c in enumerate(configs[:16])
    ]
    foreseen = foreseen_divergence(records, [(c, harm(c)) for c in configs], space)
    finals = [FinalRecord(i, seed, 9, 0.0, r.score + 0.1 * seed) for i, r in enumerate(records[:5]) for seed in (0, 1)]  # type: ignore[operator]
    table = trials_frame(records, TOP1, (), foreseen, finals)
    assert table.final[:5].to_numpy() == pytest.approx(table.quality[:5] + 0.05)
    assert table.final[5:].isna().all()
    taus = proxy_tau(table, ["additive", "divergence"], strata=1, resamples=0, seed=0).set_index("proxy").tau
    assert taus.additive > 0.8
    assert taus.divergence == pytest.approx(1)
    against_final = proxy_tau(table, ["divergence"], against="final", strata=1, resamples=0, seed=0)
    assert (against_final.n[0], against_final.tau[0]) == (5, pytest.approx(1))
    assert foreseen_divergence(records[:3], [], space) == {}
