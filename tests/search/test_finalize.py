"""Final rows: the baseline, the paired gain, and what the order of final accuracies says of the trials."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drive import make_space
from quick import QUICK

import mpsearch
from mpsearch.errors import DivergedError
from mpsearch.metric import TOP1
from mpsearch.problem import open_problem
from mpsearch.record import FinalRecord, Origin, RunFolder, TrialRecord, pack
from mpsearch.search.finalize import finalize
from mpsearch.search.finals import final_rows, final_table, proxies
from mpsearch.search.front import pareto_front
from mpsearch.study import read_spec
from mpsearch.workbench import Workbench

pytestmark = pytest.mark.study

COLD = ("warm_start.method=none", "warm_start.ilp=false", "warm_start.combinations=0")
SPACE = make_space()
CONFIGS = [*SPACE.ladder(), *SPACE.neighbours(SPACE.uniform(4))]
RANDOM = np.random.default_rng(0)
HARD = RANDOM.random(2000)  # how hard each test sample is


def trial(number: int, cost: float, accuracy: float, origin: Origin = "sampler") -> TrialRecord:
    return TrialRecord(
        CONFIGS[number], "complete", accuracy, cost, number=number, origin=origin, divergence=1 - accuracy
    )


def final(number: int, seed: int, share: float) -> FinalRecord:
    correct = share > HARD
    return FinalRecord(number, seed, 100, val=share, test=float(correct.mean()), values=pack(correct))


TRIALS = [
    trial(0, 1.0, 0.90, "uniform"),
    trial(1, 0.5, 0.80, "uniform"),
    trial(2, 0.52, 0.70, "uniform"),  # nearer in cost to trial 3, but no baseline: trial 1 beats it
    trial(8, 0.55, 0.82),
    trial(9, 0.60, 0.84),
]


def test_gain_over_the_control_is_paired_and_shown_with_its_interval() -> None:
    finals = [final(1, 1, 0.80), final(1, 2, 0.80), final(8, 1, 0.83), final(8, 2, 0.84)]
    rows = {row.trial.number: row for row in final_rows(TRIALS, finals, 6, TOP1)}
    assert rows[8].baseline == 1
    gain = rows[8].gain
    assert gain is not None
    assert gain.mean == pytest.approx(rows[8].test_mean - rows[1].test_mean)
    assert 0 < gain.low < gain.mean < gain.high < 0.06
    texts = {text["trial"]: text for text in final_table(list(rows.values()), TOP1)}
    assert texts["8"]["test minus baseline, points"] == gain.show(TOP1)
    assert texts["1"]["test minus baseline, points"] == ""
    old = [replace(f, values=None) for f in finals]  # of a run made before correctness was kept
    texts = {text["trial"]: text for text in final_table(final_rows(TRIALS, old, 6, TOP1), TOP1)}
    assert texts["8"]["test minus baseline, points"] == f"{100 * gain.mean:+.2f}"


def test_proxies_have_their_tau_and_misranked_pairs_are_named() -> None:
    in_order = [final(0, 1, 0.91), final(1, 1, 0.80), final(8, 1, 0.83), final(9, 1, 0.86)]
    good = proxies(final_rows(TRIALS, in_order, 6, TOP1), TOP1)
    assert good.tau == {"score": 1.0, "divergence": 1.0}
    assert good.misranked == ()
    swapped = [final(0, 1, 0.91), final(1, 1, 0.80), final(8, 1, 0.86), final(9, 1, 0.83)]
    bad = proxies(final_rows(TRIALS, swapped, 6, TOP1), TOP1)
    assert bad.tau["score"] == pytest.approx(4 / 6)
    assert [(above.number, below.number) for above, below, _ in bad.misranked] == [(9, 8)]
    assert "trial 9 was ranked above trial 8" in bad.lines()[1]


def test_two_rows_have_no_order_to_speak_of() -> None:
    assert proxies(final_rows(TRIALS, [final(0, 1, 0.9), final(1, 1, 0.8)], 6, TOP1), TOP1).lines() == []


def test_final_training_goes_on_from_the_trial_and_is_never_worse_on_val(tmp_path: Path) -> None:
    overrides = [*QUICK, "trial.steps=10", "search.trials=4", "final.seeds=1"]
    spec = mpsearch.load_study("digits", [*overrides, *COLD, "final.epochs=0.1", "final.lr=1e-12"])
    mpsearch.run_study(spec, tmp_path / "run")
    folder = RunFolder.open(tmp_path / "run")
    problem = open_problem(spec)
    trained = [r for r in pareto_front(folder.records(), TOP1) if len(r.curve) > 1][:2]
    assert trained
    finalize(problem, folder, trials=trained)
    assert [f.number for f in folder.finals()] == [r.number for r in trained]
    for record, done in zip(trained, folder.finals(), strict=True):
        assert record.score is not None
        assert done.val >= record.score  # a training that moves nothing ends where the trial did
    harmful = open_problem(spec.model_copy(update={"final": spec.final.model_copy(update={"lr": 50.0, "epochs": 0.2})}))
    finalize(harmful, folder, trials=trained[:1])
    assert folder.finals()[-1].val >= trained[0].score  # type: ignore[operator]


def test_a_final_training_that_diverges_is_an_error_and_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*QUICK, *COLD, "search.trials=2", "final.pick=1", "final.seeds=2", "final.epochs=0.02"]
    mpsearch.run_study(mpsearch.load_study("digits", overrides), tmp_path / "run")
    folder, score = RunFolder.open(tmp_path / "run"), Workbench.score

    def diverged(self: Workbench, split: Any) -> Any:
        return replace(score(self, split), value=float("nan") if folder.finals() else 0.5)

    monkeypatch.setattr(Workbench, "score", diverged)
    with pytest.raises(DivergedError, match=r"came from nan to nan on val and nan on test: lower final\.lr"):
        finalize(open_problem(read_spec(folder)), folder)
    assert len(folder.finals()) == 1
    assert folder.finals()[0].test == 0.5
