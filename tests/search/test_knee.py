"""What a run keeps of its problem and of its knee's weights, so that it can be looked at without its network."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from quick import QUICK
from safetensors.torch import save_file

import mpsearch
from mpsearch.errors import RunError, WriteError
from mpsearch.facts import read_facts
from mpsearch.metric import TOP1
from mpsearch.problem import open_problem, reopen, with_float_scores, write_facts
from mpsearch.quant.prepare import quant_layers
from mpsearch.record import RunFolder, checkpoint_path
from mpsearch.report.data import read_run
from mpsearch.search.finalize import finalize, float_scores
from mpsearch.search.front import ParetoFront, pareto_front
from mpsearch.search.kept import trained_model
from mpsearch.search.knee import BINS, keep_values
from mpsearch.search.run import resume_study, run_study, score_config
from mpsearch.search.values import read_values
from mpsearch.state_dict import digest

pytestmark = pytest.mark.study

SHORT = (
    *QUICK,
    "task.float_epochs=2",
    "warm_start.method=none",
    "warm_start.ilp=false",
    "warm_start.combinations=0",
    "search.trials=9",
    "final.epochs=0.1",
    "final.seeds=1",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("knee") / "run"
    run_study(mpsearch.load_study("digits", SHORT), path)
    return path


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> RunFolder:
    """A finished run of one's own."""
    return RunFolder.open(shutil.copytree(finished, tmp_path / "run"))


def front_of(folder: RunFolder) -> ParetoFront:
    return pareto_front(folder.records(), TOP1)


def test_values_of_the_knee_are_those_of_its_network(folder: RunFolder) -> None:
    values, knee = read_values(folder), front_of(folder).knee
    assert values is not None
    assert (values.config, values.checkpoint) == (knee.config.digest, f"trial-{knee.number}.safetensors")
    model, _ = trained_model(reopen(folder), folder, knee)
    layers = quant_layers(model)
    assert [(row.layer, row.tensor) for row in values.ranges] == [
        (name, tensor) for name in layers for tensor in ("weight", "activation")
    ]
    for row in values.ranges:
        if row.tensor == "weight":
            weight, quantized = layers[row.layer].weight.detach(), layers[row.layer].quantized_weight().detach()
            assert (row.seen_low, row.seen_high) == (float(weight.min()), float(weight.max()))
            assert row.low <= float(quantized.min()) <= float(quantized.max()) <= row.high
            assert row.weights == quantized.numel()
        else:
            assert (row.seen_low, row.seen_high) == (None, None)
            inside = layers[row.layer].input_quantizer(torch.linspace(-50, 50, 1001)).detach()
            assert (float(inside.min()), float(inside.max())) == pytest.approx((row.low, row.high))
    assert [counted.layer for counted in values.histograms] == list(layers)
    for counted in values.histograms:
        layer = layers[counted.layer]
        for counts, weights in ((counted.before, layer.weight), (counted.after, layer.quantized_weight())):
            ours, _ = np.histogram(weights.detach().double().numpy(), BINS, (-counted.end, counted.end))
            assert sum(counts) == weights.numel()
            assert np.abs(np.cumsum(ours) - np.cumsum(counts)).max() <= 1  # a float32 beside the edge of a bin


def test_values_follow_the_knee(folder: RunFolder) -> None:
    problem, front = reopen(folder), front_of(folder)
    other = next(trial for trial in front if trial is not front.knee)
    keep_values(problem, folder, ParetoFront((other,), front.ladder, TOP1))
    values = read_values(folder)
    assert values is not None
    assert (values.config, values.checkpoint) == (other.config.digest, f"trial-{other.number}.safetensors")
    assert read_run(folder).ranges.empty  # of another config than the knee
    keep_values(problem, folder, front)
    assert not read_run(folder).ranges.empty
    written = folder.knee_json.stat().st_mtime_ns
    keep_values(problem, folder, front)
    assert folder.knee_json.stat().st_mtime_ns == written  # nothing is measured twice


def test_final_training_and_imported_configs_bring_the_knee_up_to_date(folder: RunFolder) -> None:
    problem, knee = reopen(folder), front_of(folder).knee
    finalize(problem, folder, trials=[knee])
    values = read_values(folder)
    assert values is not None
    assert values.checkpoint == f"final-{knee.number}.safetensors"
    folder.knee_json.unlink()
    score_config(problem, folder, problem.space.neighbours(knee.config)[0])
    assert read_values(folder) is not None


def test_float_scores_are_measured_once_a_run(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = reopen(folder)
    scores = float_scores(problem, folder)
    assert scores == {split: problem.task.evaluate(problem.task.float_model(), split) for split in ("val", "test")}
    again = reopen(folder)
    monkeypatch.setattr(type(again.task), "evaluate", None)
    assert float_scores(again, folder) == scores
    assert read_facts(folder).summary()[-1].startswith("The float network: val ")


def test_weights_that_cannot_be_read_cost_the_report_its_figures_alone(
    folder: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    problem, front = reopen(folder), front_of(folder)
    checkpoint = checkpoint_path(folder.checkpoints, front.knee.number)
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    folder.knee_json.write_text("[1]")
    with caplog.at_level(logging.WARNING):
        keep_values(problem, folder, front)
    assert str(checkpoint) in caplog.text
    folder.knee_json.unlink()
    assert read_run(folder).ranges.empty


def test_a_full_disk_costs_the_report_its_figures_alone(
    folder: RunFolder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str, sync: bool) -> None:
        raise WriteError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr("mpsearch.search.values.write_text", full)
    with caplog.at_level(logging.WARNING):
        keep_values(reopen(folder), folder, front_of(folder), anew=True)
    assert "No space left on device" in caplog.text


def test_resume_writes_what_an_older_run_lacks_and_runs_nothing(folder: RunFolder) -> None:
    expected = {path: path.read_bytes() for path in (folder.problem_json, folder.knee_json, folder.trials_jsonl)}
    folder.problem_json.unlink()
    folder.knee_json.write_text("torn")
    resume_study(folder.path, trials=len(folder.records()))
    assert {path: path.read_bytes() for path in expected} == expected


def test_facts_of_a_run_are_those_of_its_problem(folder: RunFolder) -> None:
    facts = read_facts(folder)
    problem = with_float_scores(open_problem(mpsearch.load_study("digits", SHORT)), "val")
    for name in ("task_name", "metric", "graph", "cheapest", "dearest", "float_digest", "layers"):
        assert getattr(facts, name) == getattr(problem, name)
    assert facts.space.slots == problem.space.slots
    assert facts.summary() == problem.summary()
    config = front_of(folder).knee.config
    assert facts.cost.absolute(config) == problem.cost.absolute(config)


def test_a_run_is_not_gone_on_with_under_another_network(tmp_path: Path) -> None:
    checkpoint = tmp_path / "net.safetensors"
    spec = mpsearch.load_study("digits", SHORT)
    weights = open_problem(spec).task.float_model().state_dict()
    save_file(weights, checkpoint)
    spec = spec.model_copy(update={"task": spec.task.model_copy(update={"checkpoint": str(checkpoint)})})
    folder = RunFolder.create(tmp_path / "run", spec.to_yaml(), metric=TOP1)
    write_facts(folder, open_problem(spec))
    assert reopen(folder).float_digest == read_facts(folder).float_digest
    weights["conv1.weight"] = weights["conv1.weight"] + 1e-3
    save_file(weights, checkpoint)
    with pytest.raises(RunError, match=rf"another one than when the run began.*{checkpoint}.*old weights"):
        resume_study(folder.path)
    assert folder.records() == []


def test_a_folder_that_may_only_be_read_is_reopened_without_its_facts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder.create(tmp_path / "run", mpsearch.load_study("digits", SHORT).to_yaml(), metric=TOP1)

    def refused(path: Path, text: str, sync: bool) -> None:
        raise WriteError(f"cannot write {path}")

    monkeypatch.setattr("mpsearch.problem.write_text", refused)
    assert reopen(folder).notes == ()
    assert not folder.problem_json.exists()


def test_digest_names_weights_by_name_type_and_value() -> None:
    def net() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))

    known = digest(net())
    assert digest(net()) == known
    assert digest(net().to(memory_format=torch.preserve_format)) == known
    changed = [net() for _ in range(3)]
    with torch.no_grad():
        changed[0][0].bias[1] += 1e-6  # type: ignore[index]
        changed[1][1].running_mean[0] += 1e-6  # type: ignore[index]
    changed[2].bfloat16()
    assert len({known, *map(digest, changed)}) == 4
