"""Products of attention and groups of input features through every stage: a search, an import, PTQ, debug, GDNSQ."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import mpsearch as command
from torch import nn

import mpsearch
from mpsearch.debug.measure import diagnose
from mpsearch.errors import PrecisionError, TaskError
from mpsearch.exporters.verify import Verified
from mpsearch.precision import LayerPrecision, PrecisionConfig
from mpsearch.ptq.pipeline import PtqMethod, PtqResult, ptq
from mpsearch.qat.gdnsq import GdnsqMethod, bit_targets, deployed, gdnsq, hold, learnable, violation
from mpsearch.qat.pipeline import folds
from mpsearch.qat.published import published
from mpsearch.qat.trained import Trained
from mpsearch.quant.gdnsq import GdnsqQuantizer
from mpsearch.quant.prepare import inspect_network, quant_layers
from mpsearch.quant.uniform import UniformQuantizer
from mpsearch.study import TaskSpec, TrialSpec
from mpsearch.task.load import load_task
from mpsearch.task.scoring import metric_of
from mpsearch.task.task import Task
from mpsearch.workbench import Workbench

pytestmark = pytest.mark.study

PRODUCTS = ("product1", "product2")
GROUPED = "uniform:4/group8"
SETTINGS = TrialSpec(steps=8, batch_size=16, compile=False, precision="fp32", calibration_samples=32, bn_batches=0)

SPACE = f"""
name: decoding
products: true
rules:
  - {{match: "*", weight: [uniform:2-8, {GROUPED}], activation: [uniform:3-8]}}
  - {{match: "*", kind: embedding, weight: [uniform:3-8]}}
first: search
last: search
"""

STUDY = """
name: decoding
task: {factory: "own_tasks:decoding"}
space: space.yaml
warm_start: {method: gdnsq, steps: 12, budgets: [0.4], ilp: true, combinations: 0}
search: {prescreen: 4, trials: 5, concurrency: 1}
trial: {steps: 2, batch_size: 16, compile: false, calibration_samples: 32}
final: {pick: 1, epochs: 1, seeds: 1}
storage: none
engine: {address: none}
"""


@pytest.fixture(scope="module")
def task() -> Task:
    torch.set_num_threads(1)
    return load_task(TaskSpec(factory="own_tasks:decoding"))


@pytest.fixture(scope="module")
def net(task: Task) -> nn.Module:
    return task.float_model()


@pytest.fixture(scope="module")
def config(task: Task, net: nn.Module) -> PrecisionConfig:
    """Groups in every weight, products whose factors have other bits."""
    layers = inspect_network(net, task.calibration_input(32), products=True).quantizable
    config = PrecisionConfig.uniform([layer.name for layer in layers], LayerPrecision.parse(GROUPED, "uniform:8"))
    factors = LayerPrecision.parse("uniform:5/tensor", "uniform:6")
    assert set(PRODUCTS) < set(config)
    embed = LayerPrecision.parse(GROUPED, "float")
    return config.replace(embed=embed, **dict.fromkeys(PRODUCTS, factors))


@pytest.fixture(scope="module")
def workbench(task: Task, config: PrecisionConfig) -> Workbench:
    return Workbench(task, SETTINGS, offers=config.offers)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoding")
    (folder / "space.yaml").write_text(SPACE)
    (folder / "study.yaml").write_text(STUDY)
    done = command("run", "study.yaml", "--out", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def exported(result: Trained | PtqResult, task: Task, to: str, out: Path) -> Verified:
    """An export that its own runtime has verified."""
    x = task.calibration_input(16)
    network = replace(
        result.network(name="decoder", task=task.name, metric=metric_of(task), score={}),
        samples=x,
        example_input=x,
        float_model=task.float_model(),
    )
    verified = mpsearch.export(network, to, out).verified
    assert isinstance(verified, Verified)
    assert verified.same_answers == verified.samples
    return verified


@pytest.mark.slow  # a run of its own, which the next test has too
def test_a_search_has_products_and_groups_from_the_warm_start_to_the_export(run: Path) -> None:
    descent = json.loads(next(run.rglob("descent.json")).read_text())
    for product in PRODUCTS:
        bits = [row["bits"] for row in descent["log"]]
        assert all(bits[-1][f"{product}/{side}"] != bits[0][f"{product}/{side}"] for side in ("weight", "activation"))
    records = [json.loads(line) for line in (run / "trials.jsonl").read_text().splitlines()]
    assert [record["state"] for record in records] == ["complete"] * 5
    for step in (("front", "run"), ("finalize", "run"), ("export", "run", "--to", "packed", "--out", "packed")):
        done = command(*step, cwd=run.parent)
        assert done.returncode == 0, f"{step}: {done.stderr}"


@pytest.mark.slow
def test_a_config_with_products_and_groups_is_imported_and_scored(
    run: Path, config: PrecisionConfig, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"layers": config.to_json()}))
    imported = mpsearch.import_config(run, tmp_path / "config.json")
    assert imported.config == config
    assert imported.trial is not None
    assert imported.trial.state == "complete"
    pick = f"trial:{imported.trial.number}"
    done = command("export", "run", "--pick", pick, "--to", "native", "--out", "native", cwd=run.parent)
    assert done.returncode == 0, done.stderr
    again = mpsearch.import_config(run, run.parent / "native", score=False)
    assert again.config == config


@pytest.mark.parametrize("rounding", [pytest.param("adaround", marks=pytest.mark.slow), "nearest"])
def test_ptq_quantizes_products_and_groups(task: Task, config: PrecisionConfig, rounding: str, tmp_path: Path) -> None:
    correction = "empirical" if rounding == "nearest" else "none"
    method = PtqMethod(rounding=rounding, bias_correction=correction, adaround_steps=50)  # type: ignore[arg-type]
    x = task.calibration_input(64)
    result = ptq(task.float_model(), config, x, method)
    layers = quant_layers(result.model)
    assert {name: layer.precision.activation for name, layer in layers.items() if name != "embed"} == {
        name: precision.activation for name, precision in config.items() if name != "embed"
    }
    assert all(layers[name].weight_quantizer.precision.bits == 5 for name in PRODUCTS)
    exported(result, task, "native", tmp_path / "out")
    # Ranges are those of least squared error of what the quantized network feeds its products.
    wide = config.replace(**dict.fromkeys(PRODUCTS, LayerPrecision.parse("uniform:1/tensor", "uniform:1")))
    worse = ptq(task.float_model(), wide, x, method)
    exact = task.float_model()(x)
    error, much_more = (float((r.model(x) - exact).detach().square().mean()) for r in (result, worse))
    assert error < much_more


def test_ptq_without_data_refuses_products_by_name(net: nn.Module, config: PrecisionConfig) -> None:
    with pytest.raises(TaskError, match=r"'product1' is a product .* give calibration data"):
        ptq(net, config)


def test_debug_looks_at_both_factors_of_a_product(task: Task, config: PrecisionConfig) -> None:
    narrow = LayerPrecision.parse("uniform:1/tensor", "uniform:2")
    broken = config.replace(product2=narrow)
    diagnosis = diagnose(task, broken)
    facts = {layer.name: layer for layer in diagnosis.layers}
    assert set(facts) == set(config)
    for side in ("weight", "activation"):
        fine, bad = (facts[name].side(side) for name in PRODUCTS)  # type: ignore[arg-type]
        assert fine is not None
        assert bad is not None
        assert bad.sqnr_db < fine.sqnr_db
    assert "product2" in diagnosis.worst("weight")
    histogram = next(h for h in diagnosis.histograms if (h.layer, h.side) == ("product2", "weight"))
    assert sum(histogram.before) == sum(histogram.after)
    assert sum(count > 0 for count in histogram.after) <= 2
    assert not any("product2" in attempt.layers for attempt in diagnosis.attempts if attempt.action == "per_channel")


@pytest.mark.parametrize("gradual", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gdnsq_learns_the_bits_of_products_and_groups(
    task: Task, workbench: Workbench, config: PrecisionConfig, gradual: bool, tmp_path: Path
) -> None:
    trained = gdnsq(task, config, workbench, 160 if gradual else 40, method=GdnsqMethod(gradual=gradual))
    assert not trained.notes  # it is at its targets
    layers = quant_layers(trained.model)
    for name, layer in layers.items():
        assert isinstance(layer.weight_quantizer, UniformQuantizer)
        assert layer.precision.weight == config[name].weight
    assert layers["qkv"].weight_quantizer.step.shape == (48, 2)
    assert exported(trained, task, "native", tmp_path / "out").max_difference <= 1e-6


def test_what_gdnsq_has_learned_of_products_and_groups_is_deployed_as_it_is(
    task: Task, workbench: Workbench, config: PrecisionConfig
) -> None:
    model = learnable(task.float_model(), workbench.layers, config, workbench.ranges, GdnsqMethod(gradual=True))
    layers = quant_layers(model)
    learned = {
        (name, side)
        for name, layer in layers.items()
        for side, q in (("weight", layer.weight_quantizer), ("activation", layer.input_quantizer))
        if isinstance(q, GdnsqQuantizer)
    }
    assert learned == {(name, side) for name in config for side in ("weight", "activation")} - {("embed", "activation")}
    targets = bit_targets(config, layers)
    assert violation(layers, targets) > 4
    hold(layers, targets)
    assert violation(layers, targets) <= 0
    x = task.calibration_input(16)
    uniform = deployed(model.eval(), config, task.float_model(), workbench.layers)
    torch.testing.assert_close(uniform(x), model(x))


def test_the_published_recipe_refuses_groups_and_products_by_name(
    task: Task, workbench: Workbench, config: PrecisionConfig
) -> None:
    with pytest.raises(PrecisionError, match=r"'embed' is to be uniform:4/group8: GDNSQ as published"):
        published(task, config, workbench, 1)
    channels = config.replace(
        **{name: LayerPrecision.parse("uniform:4", "uniform:4") for name in config if name not in PRODUCTS}
    )
    with pytest.raises(PrecisionError, match=r"does not train products .* 'product1'"):
        published(task, channels, workbench, 1)


def test_a_second_factor_with_one_scale_folds_no_norms(config: PrecisionConfig) -> None:
    assert not folds(config)
    assert folds(config.replace(up=LayerPrecision.parse("uniform:4/tensor", "uniform:4")))


def test_onnxruntime_answers_as_the_trained_network_with_products_and_groups(
    task: Task, workbench: Workbench, config: PrecisionConfig, tmp_path: Path
) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason="needs mpsearch[targets]; `make test-all` installs it")
    exported(gdnsq(task, config, workbench, 20), task, "onnx", tmp_path / "out")
