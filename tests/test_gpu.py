"""Every stage on a CUDA card gives what it gives on the CPU; skipped where there is no card."""

from __future__ import annotations

import copy
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.gpu import FORWARD_GOAL, GRADIENT_GOAL, HALFWAY, difference
from mpsearch.debug.measure import diagnose
from mpsearch.exporters.export import export
from mpsearch.graph.layers import inspect_model
from mpsearch.metric import find_metric
from mpsearch.precision import BITS, LayerPrecision, Precision, PrecisionConfig
from mpsearch.problem import Problem, open_problem
from mpsearch.ptq.pipeline import PtqMethod, ptq
from mpsearch.qat.gdnsq import gdnsq
from mpsearch.qat.pipeline import qat
from mpsearch.quant.fused import fuse
from mpsearch.quant.network import QuantizedNetwork
from mpsearch.quant.prepare import prepare, quant_layers
from mpsearch.quant.ranges import activation_range, weight_step
from mpsearch.quant.shift import ShiftQuantizer
from mpsearch.quant.switch import make_quantizer
from mpsearch.record import RunFolder
from mpsearch.search.finalize import finalize
from mpsearch.search.run import run_study
from mpsearch.search.trial import run_trial
from mpsearch.study import load_study
from mpsearch.task.scoring import comparison_of
from mpsearch.train import ForwardPass, Teacher, autocast, steps
from mpsearch.warmstart.descent import descend
from mpsearch.warmstart.sensitivity import measure
from mpsearch.warmstart.start_score import StartScorer
from mpsearch.workbench import AGREES_NATS, AGREES_SHARE, Workbench

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
QUICK = ["trial.steps=6", "trial.bn_batches=2", "trial.compile=false", "trial.precision=fp32", "engine.address=none"]
PRECISIONS = [
    Precision(quantizer, bits, granularity)  # type: ignore[arg-type]
    for quantizer in ("uniform", "shift", "apot")
    for bits in BITS[quantizer]
    if bits <= 8 or bits in (12, 16)
    for granularity in ("channel", "tensor")
    if quantizer == "uniform" or bits > 1
]


@pytest.fixture(scope="module")
def problem() -> Problem:
    """The digits study, with quick trials."""
    return open_problem(load_study("digits", QUICK))


@pytest.fixture
def mixed(problem: Problem) -> PrecisionConfig:
    """A config with every quantizer type."""
    kinds = ["uniform:4", "shift:3", "apot:4"]
    layers = [layer.name for layer in problem.graph.quantizable]
    return PrecisionConfig((name, LayerPrecision.parse(kinds[i % 3], "uniform:5")) for i, name in enumerate(layers))


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_quantizer_answers_as_on_the_cpu(precision: Precision, compiled: bool) -> None:
    worst = difference(precision, precision.granularity == "channel", CUDA, compiled)
    assert worst.forward <= FORWARD_GOAL
    assert worst.gradient <= GRADIENT_GOAL
    assert worst.moved <= HALFWAY


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_ranges_are_found_as_on_the_cpu(precision: Precision) -> None:
    rows = torch.randn(8, 90, generator=torch.Generator().manual_seed(0))
    assert weight_step(rows.cuda(), precision).device.type == "cuda"
    torch.testing.assert_close(weight_step(rows.cuda(), precision).cpu(), weight_step(rows, precision))
    if precision.granularity == "tensor":
        for signed in (False, True):
            there = activation_range(rows.cuda(), precision, signed=signed)
            for one, other in zip(there, activation_range(rows, precision, signed=signed), strict=True):
                torch.testing.assert_close(one.cpu(), other)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("gradient", ["sigmoid", "dsq", "ste"])
def test_soft_shift_quantizer_trains_as_on_the_cpu(gradient: str, compiled: bool) -> None:
    x = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    results = []
    for device in ("cpu", "cuda"):
        quantizer = make_quantizer(["shift"], 8, 4, signed=True, offset=False, elements=36).to(device)
        assert isinstance(quantizer, ShiftQuantizer)
        quantizer.gradient = gradient  # type: ignore[assignment]
        quantizer.set_precision(Precision("shift", 4, "channel"))
        quantizer.set_range(torch.full((8,), 1.7, device=device))
        if compiled and device == "cuda":
            fuse(quantizer)
        there = x.detach().to(device).requires_grad_()  # a leaf on every device
        y = quantizer.train()(there)
        y.square().sum().backward()
        assert there.grad is not None
        assert quantizer.step.grad is not None
        results.append((y.detach().cpu(), there.grad.cpu(), quantizer.step.grad.cpu()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_quantizer_keeps_the_type_and_layout_of_images(dtype: torch.dtype) -> None:
    x = torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    results = []
    for device in ("cpu", "cuda"):
        quantizer = make_quantizer(["uniform"], 1, 0, signed=False, offset=True, elements=288).to(device)
        quantizer.set_precision(Precision("uniform", 4, "tensor"))
        quantizer.set_range(torch.tensor(0.3), torch.tensor(-2.0))
        if device == "cuda":
            fuse(quantizer)
        y = quantizer(x.to(device)).detach()
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=torch.channels_last)
        results.append(y.cpu())
    assert float((results[0] != results[1]).double().mean()) < HALFWAY


def test_network_that_lies_on_the_card_is_quantized_there(problem: Problem, mixed: PrecisionConfig) -> None:
    x = problem.task.calibration_input(64)
    here = prepare(problem.task.float_model(), mixed, x).eval()
    there = prepare(problem.task.float_model().cuda(), mixed, x.cuda()).eval()
    assert {tensor.device.type for tensor in (*there.parameters(), *there.buffers())} == {"cuda"}
    with torch.no_grad():
        torch.testing.assert_close(there(x.cuda()).cpu(), here(x), rtol=1e-2, atol=1e-2)
    assert inspect_model(problem.task.float_model().cuda(), x.cuda()).layers == problem.graph.layers


def test_trial_scores_as_on_the_cpu(problem: Problem, mixed: PrecisionConfig) -> None:
    records = []
    for device in ("cpu", "cuda"):
        workbench = Workbench(problem.task, problem.spec.trial, torch.device(device), mixed.offers, graph=problem.graph)
        record = run_trial(problem.task, mixed, problem.spec.trial, workbench=workbench)
        assert next(workbench.model.parameters()).device.type == device
        records.append(record)
    here, there = records
    assert there.start_divergence == pytest.approx(here.start_divergence, rel=0.05)
    assert there.score == pytest.approx(here.score, abs=0.03)


def test_trial_with_compiled_quantizers_and_bfloat16_runs(problem: Problem, mixed: PrecisionConfig) -> None:
    settings = problem.spec.trial.model_copy(update={"compile": True, "precision": "bf16"})
    workbench = Workbench(problem.task, settings, CUDA, mixed.offers, graph=problem.graph)
    eager = Workbench(problem.task, problem.spec.trial, CUDA, mixed.offers, graph=problem.graph)
    compiled_record = run_trial(problem.task, mixed, settings, workbench=workbench)
    record = run_trial(problem.task, mixed, problem.spec.trial, workbench=eager)
    assert compiled_record.score == pytest.approx(record.score, abs=0.03)


@pytest.mark.parametrize("proxy", ["kl", "fit", "sqnr"])
def test_sensitivities_are_those_of_the_cpu(problem: Problem, proxy: str) -> None:
    x = problem.task.calibration_input(32)
    comparison = comparison_of(problem.task)
    model, layers, space = problem.task.float_model(), problem.graph.layers, problem.space
    here = measure(proxy, copy.deepcopy(model), layers, space, x, comparison)
    there = measure(proxy, model.cuda(), layers, space, x.cuda(), comparison)
    pairs = [(here.of(*key), there.of(*key)) for key in here.entries]
    close = [abs(a - b) <= 0.1 * abs(a) + 1e-5 for a, b in pairs]
    assert sum(close) >= 0.9 * len(close)


def test_start_scores_are_those_of_the_cpu(problem: Problem, mixed: PrecisionConfig) -> None:
    scores = []
    for device in ("cpu", "cuda"):
        workbench = Workbench(
            problem.task, problem.spec.trial, torch.device(device), problem.space.offers, graph=problem.graph
        )
        scorer = StartScorer(workbench, problem.space.offers)
        scorer.choose_arithmetic(problem.space.ladder()[:2])
        scorer.bf16 = False
        with torch.backends.cudnn.flags(allow_tf32=False):
            scores.append([scorer(config) for config in problem.space.ladder()])
    # A value halfway between two levels goes either way, and what follows with it: as bfloat16 may differ from float32.
    assert scores[1] == pytest.approx(scores[0], rel=AGREES_SHARE, abs=AGREES_NATS)


def test_batches_are_made_on_the_card(problem: Problem) -> None:
    there = Workbench(problem.task, problem.spec.trial, CUDA, problem.space.offers, graph=problem.graph)
    batches = zip(there.train_batches(5, 3), problem.task.train_batches(there.settings.batch_size, 5, 3), strict=True)
    for (x, labels), (y, others) in batches:
        assert {x.device.type, labels.device.type} == {"cuda"}
        assert torch.equal(labels.cpu(), others)
        torch.testing.assert_close(x.cpu(), y)
    assert there.task.calibration_input(4).device.type == "cpu"


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_captured_pass_answers_as_its_kernels_one_by_one(
    problem: Problem, mixed: PrecisionConfig, compiled: bool, bf16: bool
) -> None:
    x = problem.task.calibration_input(96)
    batches = [part.cuda() for part in x.split(32)]
    model = prepare(problem.task.float_model(), mixed, x).cuda().train()
    plain = copy.deepcopy(model)
    results = []
    for network, capture in ((plain, False), (model, True)):
        forward = ForwardPass(fuse(network) if compiled else network, bf16=bf16, capture=capture)
        for batch in (*batches, batches[0][:7]):  # the last one is of another shape
            network.zero_grad(set_to_none=True)
            output = forward(batch)
            output.float().square().mean().backward()
            gradients = {n: None if p.grad is None else p.grad.clone() for n, p in network.named_parameters()}
            results.append((output.detach().float().clone(), gradients))
        assert (forward._captured is not None) == capture
    tolerance = {"rtol": 0.05, "atol": 0.05} if bf16 else {"rtol": 1e-2, "atol": 1e-3}
    for (one, expected), (other, gradients) in zip(results[:4], results[4:], strict=True):
        torch.testing.assert_close(other, one, **tolerance)
        for name, gradient in expected.items():
            captured = gradients[name]
            assert (captured is None) == (gradient is None), name
            if gradient is not None and captured is not None and gradient.dim() > 1:
                similar = torch.nn.functional.cosine_similarity(gradient.flatten(), captured.flatten(), dim=0)
                assert similar > 0.98, name
    for one, other in zip(plain.buffers(), model.buffers(), strict=True):  # the warm-up has left no trace
        torch.testing.assert_close(other.float(), one.float(), **tolerance)


def test_training_long_enough_to_be_captured_ends_as_without(
    problem: Problem, mixed: PrecisionConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = []
    for least in (1000, 10):
        monkeypatch.setattr(import_module("mpsearch.train"), "CAPTURE_STEPS", least)  # `mpsearch.train` is a command
        workbench = Workbench(problem.task, problem.spec.trial, CUDA, mixed.offers, graph=problem.graph)
        workbench.reset(mixed)
        result = workbench.fit(40, 0)
        losses.append((result.start_loss, result.end_loss))
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


def test_captured_update_clips_and_follows_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    """With momentum and decay, and a batch of another size among the others."""
    monkeypatch.setattr(import_module("mpsearch.train"), "CAPTURE_STEPS", 10)
    random = torch.Generator().manual_seed(0)
    sizes = [32] * 7 + [20] + [32] * 12
    batches = [(torch.randn(n, 4, generator=random), torch.randint(0, 2, (n,), generator=random)) for n in sizes]
    trainings = []
    for capture in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)).cuda()
        optimizer = torch.optim.SGD(
            model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01, fused=True
        )

        def schedule(step: int, group: dict[str, Any] = optimizer.param_groups[0]) -> None:
            group["lr"] = 0.1 / (1 + step)

        def loss(step: int, x: Tensor, output: Tensor, target: Tensor) -> Tensor:
            return 40 * torch.nn.functional.cross_entropy(output, target)  # clipped

        taken = steps(model, batches, loss, [optimizer], len(batches), schedule, capture=capture)
        values = [(value, [p.grad.clone() for p in model.parameters() if p.grad is not None]) for _, value in taken]
        trainings.append((values, copy.deepcopy(model.state_dict())))
        assert optimizer.param_groups[0]["lr"] == 0.1 / len(batches)  # a number still
    (values, weights), (of_captured, weights_of_captured) = trainings
    for (value, gradients), (other, others) in zip(values, of_captured, strict=True):
        assert other == pytest.approx(value, rel=1e-4)
        for one, another in zip(gradients, others, strict=True):
            torch.testing.assert_close(another, one, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(weights_of_captured, weights, rtol=1e-4, atol=1e-5)


def test_teacher_answers_each_batch_by_its_own_values(problem: Problem) -> None:
    model = problem.task.float_model().cuda()
    teacher = Teacher(model, lambda logits: logits, bf16=False)
    batches = [part.cuda() for part in problem.task.calibration_input(96).split(32)]
    answers = [teacher(0, step, batch) for step, batch in enumerate(batches)]  # all are kept
    with torch.no_grad():
        for batch, answer in zip(batches, answers, strict=True):
            torch.testing.assert_close(answer, model(batch), rtol=1e-3, atol=1e-3)


def test_descent_ends_on_its_budgets(problem: Problem) -> None:
    workbench = Workbench(problem.task, problem.spec.trial, CUDA, graph=problem.graph)
    descent = descend(workbench, problem.space, problem.cost, [0.4, 0.3], 12)
    assert [snapshot.budget for snapshot in descent.snapshots] == [0.4, 0.3]


METHODS = {
    "nearest": PtqMethod(rounding="nearest", equalize=False, bias_correction="none"),
    "adaround": PtqMethod(rounding="adaround", adaround_steps=20, logits_range="cross_entropy"),
    "empirical": PtqMethod(rounding="nearest", bias_correction="empirical", activation_range="min_max"),
    "analytic": PtqMethod(rounding="nearest", bias_correction="analytic"),
}


@pytest.mark.parametrize("name", METHODS)
def test_ptq_on_the_card_answers_as_on_the_cpu(problem: Problem, name: str) -> None:
    x, method = problem.task.calibration_input(64), METHODS[name]
    w4a8 = LayerPrecision.shorthand("w4a8")
    there = ptq(problem.task.float_model().cuda(), w4a8, x.cuda(), method).model
    here = ptq(problem.task.float_model(), w4a8, x, method).model
    with torch.no_grad():
        same = there(x.cuda()).argmax(1).cpu() == here(x).argmax(1)
    assert float(same.float().mean()) > 0.9


@pytest.mark.parametrize("method", ["qat", "gdnsq"])
def test_training_of_one_config_runs(problem: Problem, method: str) -> None:
    names = [layer.name for layer in problem.graph.quantizable]
    config, settings = PrecisionConfig.uniform(names, LayerPrecision.shorthand("w4a4")), problem.spec.trial
    if method == "qat":
        trained = qat(problem.task, config, settings)
    else:
        trained = gdnsq(problem.task, config, Workbench(problem.task, settings, graph=problem.graph), 6)
    assert next(trained.model.parameters()).device.type == "cuda"
    assert problem.task.evaluate(trained.model, "val") > 0.5


def test_study_is_run_finalized_and_exported(tmp_path: Path) -> None:
    sets = [*QUICK, "search.trials=5", "search.prescreen=20", "warm_start.steps=12", "warm_start.budgets=[0.4]"]
    spec = load_study("digits", [*sets, "final.pick=1", "final.epochs=0.2", "final.seeds=1"])
    front = run_study(spec, tmp_path / "run")
    folder = RunFolder.open(tmp_path / "run")
    assert [record.reason for record in folder.records() if record.state == "failed"] == []
    assert front.trials
    problem = open_problem(spec)
    assert finalize(problem, folder)


@pytest.mark.parametrize("target", ["native", "packed"])
def test_network_on_the_card_is_exported(problem: Problem, mixed: PrecisionConfig, target: str, tmp_path: Path) -> None:
    x = problem.task.calibration_input(64)
    model = prepare(problem.task.float_model().cuda(), mixed, x.cuda()).eval()
    network = QuantizedNetwork(
        model,
        problem.graph.layers,
        "digits_cnn",
        problem.task.name,
        find_metric("top1", "digits"),
        example_input=x[:2],
        samples=x,
        float_model=problem.task.float_model(),
    )
    exported = export(network, target, tmp_path / target)
    assert exported.path.exists()


def test_diagnosis_of_a_config_is_made(problem: Problem) -> None:
    diagnosis = diagnose(problem.task, LayerPrecision.shorthand("w3a3"))
    assert diagnosis.sane
    assert len(diagnosis.layers) == len(problem.graph.quantizable)


def test_mixed_precision_step_is_finite_channels_last(problem: Problem) -> None:
    names = [layer.name for layer in problem.graph.quantizable]
    config = PrecisionConfig.uniform(names, LayerPrecision.shorthand("w4a4"))
    x = problem.task.calibration_input(32)
    model: nn.Module = prepare(problem.task.float_model(), config, x).cuda().train()
    batch: Tensor = x.cuda().contiguous(memory_format=torch.channels_last)
    with autocast(batch, True):
        output = model(batch)
    output.float().square().mean().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    assert all(layer.weight_quantizer.step.grad is not None for layer in quant_layers(model).values())


def test_groups_of_input_features_are_quantized_as_on_the_cpu() -> None:
    layer = nn.Linear(32, 8)
    config = PrecisionConfig([("0", LayerPrecision.shorthand("w4a8/group8"))])
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(layer)
    here, there = prepare(model, config, x), prepare(copy.deepcopy(model).cuda(), config, x.cuda())
    fuse(there)
    torch.testing.assert_close(there(x.cuda()).cpu(), here(x), rtol=1e-3, atol=1e-3)
