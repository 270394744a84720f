"""Sensitivity tables: equal to what the definition says, entry by entry, and the same after a file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from warm_nets import Branching, inspected, space_of

from mpsearch.errors import MpsearchError, PrecisionError, RunError, TaskError, WriteError
from mpsearch.precision import FLOAT, LayerPrecision, Precision, PrecisionConfig
from mpsearch.quant.prepare import RangeSetter, insert_quantizers, quant_layers, set_precision, weight_rows
from mpsearch.quant.ranges import activation_range, weight_step
from mpsearch.task.networks import DigitsCNN
from mpsearch.warmstart.sensitivity import divergences, fit, measure, sqnr
from mpsearch.warmstart.table import SensitivityTable


@torch.no_grad()
def naive(model: nn.Module, layers, x: Tensor, ranges: RangeSetter, key) -> tuple[float, float]:
    """KL and Jeffreys divergence by definition: a network with one tensor quantized, all of it run."""
    name, tensor, precision = key
    one = LayerPrecision(precision, FLOAT) if tensor == "weight" else LayerPrecision(FLOAT, precision)
    free = [layer.name for layer in layers if layer.reason is None]
    config = PrecisionConfig.uniform(free, LayerPrecision(FLOAT, FLOAT)).replace(**{name: one})
    quantized = insert_quantizers(model, layers, config.offers)
    set_precision(quantized, config, ranges)
    p, q = (net(x).double().softmax(dim=1) for net in (model, quantized))
    kl = (p * (p / q).log()).sum(dim=1).mean()
    return float(kl), float(kl + (q * (q / p).log()).sum(dim=1).mean())


@pytest.mark.parametrize("network", ["digits", "residual"])
def test_divergences_equal_the_naive_full_forward(network: str, residual: nn.Module, images: Tensor) -> None:
    torch.manual_seed(2)
    model = residual if network == "residual" else DigitsCNN().eval()
    layers = inspected(model, images)
    space = space_of(layers, *(["uniform:3"] if network == "digits" else ["uniform:4", "shift:3", "apot:4"]))
    ranges = RangeSetter(model, layers, images)
    found = divergences(model, layers, space, images, ranges=ranges, batch_size=24)
    assert found.kl.notes == ()
    assert len(found.kl) == 2 * len(space.slots[0].choices) * len(space.layers)
    assert list(found.kl) == list(found.jeffreys)
    for key in list(found.kl)[:: 3 if network == "digits" else 1]:
        kl, jeffreys = naive(model, layers, images, ranges, key)
        assert found.kl[key] == pytest.approx(kl, rel=1e-3, abs=1e-6), key
        assert found.jeffreys[key] == pytest.approx(jeffreys, rel=1e-3, abs=1e-6), key
        assert found.kl[key] > 0


def test_divergences_are_the_same_to_the_bit_with_and_without_reuse(residual: nn.Module, images: Tensor) -> None:
    layers = inspected(residual, images)
    space = space_of(layers, "uniform:3", "uniform:6")
    one, other = (divergences(residual, layers, space, images, batch_size=7, reuse=reuse) for reuse in (True, False))
    assert dict(one.kl) == dict(other.kl)
    assert dict(one.jeffreys) == dict(other.jeffreys)
    assert one.kl.samples == 24


def test_divergences_do_not_depend_on_the_batch_size(residual: nn.Module, images: Tensor) -> None:
    layers = inspected(residual, images)
    space = space_of(layers, "uniform:3")
    whole, split = (divergences(residual, layers, space, images, batch_size=size).kl for size in (24, 5))
    for key in whole:
        assert split[key] == pytest.approx(whole[key], rel=1e-4, abs=1e-9)


def test_divergences_of_a_model_that_cannot_be_traced_say_so(residual: nn.Module, images: Tensor) -> None:
    model = Branching().eval()
    model.load_state_dict(residual.state_dict())
    layers = inspected(model, images)
    space = space_of(layers, "uniform:3")
    found = divergences(model, layers, space, images).kl
    (note,) = found.notes
    assert "cannot trace Branching" in note
    assert dict(found) == dict(divergences(residual, layers, space, images).kl)


def test_divergences_leave_the_model_alone(residual: nn.Module, images: Tensor) -> None:
    before, output = {k: v.clone() for k, v in residual.state_dict().items()}, residual(images)
    layers = inspected(residual, images)
    space = space_of(layers, "uniform:2")
    divergences(residual, layers, space, images)
    fit(residual, layers, space, images[:2])
    assert all(torch.equal(before[k], v) for k, v in residual.state_dict().items())
    assert torch.equal(residual(images), output)
    assert all(p.grad is None and p.requires_grad for p in residual.parameters())


def test_divergences_refuse_logits_that_are_no_matrix(residual: nn.Module, images: Tensor) -> None:
    layers = inspected(residual, images)
    with pytest.raises(TaskError, match=r"logits \(n, classes\)"):
        divergences(residual, layers, space_of(layers, "uniform:4"), images, logits=lambda y: y[:, None])


def linear_case() -> tuple[nn.Module, Tensor, Tensor]:
    """Two samples through one linear layer of two classes, and their labels."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    model[0].weight = nn.Parameter(torch.tensor([[1.0, 0.3], [-0.5, 0.7]]))
    return model.eval(), torch.tensor([[1.0, 2.0], [0.5, -1.0]]), torch.tensor([0, 1])


def test_fit_equals_hand_arithmetic_on_a_linear_layer() -> None:
    model, x, y = linear_case()
    layers = inspected(model, x)
    space = space_of(layers, "uniform:3")
    w = model[0].weight.detach().double()
    p = (x.double() @ w.T).softmax(dim=1)
    error = p - nn.functional.one_hot(y, 2)  # d -log p(y) / d logits
    # Of the weight, the gradient of a sample is error x^T, of the input W^T error.
    trace_w = float((error.square().sum(1) * x.double().square().sum(1)).mean())
    trace_x = float((error @ w).square().sum(1).mean())
    precision = Precision("uniform", 3, "channel"), Precision("uniform", 3, "tensor")
    quantized = insert_quantizers(model, layers)
    layer = quant_layers(quantized)["0"]
    layer.set_precision(LayerPrecision(*precision))
    layer.weight_quantizer.set_range(weight_step(weight_rows(layer), precision[0]))
    samples = torch.cat([x.flatten(), x.min()[None], x.max()[None]])  # the extremes count twice among range samples
    layer.input_quantizer.set_range(*activation_range(samples, precision[1], signed=True))
    noise_w = float((layer.quantized_weight().detach().double() - w).square().mean())
    noise_x = float((layer.input_quantizer(samples).detach() - samples).double().square().mean())

    table = fit(model, layers, space, x, labels=y)
    assert table["0", "weight", precision[0]] == pytest.approx(trace_w * noise_w, rel=1e-5)
    assert table["0", "activation", precision[1]] == pytest.approx(trace_x * noise_x, rel=1e-5)


def test_fit_of_batches_estimates_what_single_samples_give(residual: nn.Module, images: Tensor) -> None:
    layers = inspected(residual, images)
    space = space_of(layers, "uniform:4")
    images, labels = images[:12], torch.arange(12) % 5
    ranges = RangeSetter(residual, layers, images)
    exact = fit(residual, layers, space, images, labels=labels, ranges=ranges)
    means = [
        fit(residual, layers, space, images, labels=labels, ranges=ranges, batch_size=4, seed=seed)
        for seed in range(30)
    ]
    for key in exact:
        estimate = sum(table[key] for table in means) / len(means)
        assert estimate == pytest.approx(exact[key], rel=1e-4 if key[1] == "activation" else 0.25), key


def test_fit_is_the_same_for_the_same_seed_and_ranks_bits(residual: nn.Module, images: Tensor) -> None:
    layers = inspected(residual, images)
    space = space_of(layers, "uniform:2", "uniform:4", "uniform:8")
    one, again, other = (fit(residual, layers, space, images[:6], seed=seed) for seed in (0, 0, 1))
    assert dict(one) == dict(again) != dict(other)
    for layer in space.layers:
        two, four, eight = (one[layer, "weight", Precision("uniform", bits, "channel")] for bits in (2, 4, 8))
        assert two > 2 * four > 4 * eight > 0


def test_sqnr_of_an_8_bit_tensor_is_near_the_textbook() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64)).eval()
    with torch.no_grad():
        model[0].weight.uniform_(-1, 1)
    x = torch.rand(64, 64)
    layers = inspected(model, x)
    table = sqnr(model, layers, space_of(layers, "uniform:5", "uniform:8"), x)
    for tensor, granularity in (("weight", "channel"), ("activation", "tensor")):
        for bits in (5, 8):
            decibels = -10 * math.log10(table["0", tensor, Precision("uniform", bits, granularity)])
            # A uniform density with b bits: 6.02 b dB; over [0, 1] the power is that of the full range, 6.02 more.
            assert decibels == pytest.approx(6.02 * bits + (6.02 if tensor == "activation" else 0), abs=1.0)


def test_measure_knows_every_proxy_and_no_other(residual: nn.Module, images: Tensor) -> None:
    layers = inspected(residual, images)
    space = space_of(layers, "uniform:4")
    for proxy in ("kl", "jeffreys", "fit", "sqnr"):
        table = measure(proxy, residual, layers, space, images[:4])
        assert table.proxy == proxy
        assert len(table) == 2 * len(space.layers)
    with pytest.raises(MpsearchError, match="did you mean 'fit'"):
        measure("fits", residual, layers, space, images)


@pytest.fixture
def table() -> SensitivityTable:
    channel, tensor = Precision("uniform", 4, "channel"), Precision("shift", 3, "tensor")
    entries = {
        ("a.b", "weight", channel): 0.125,
        ("a.b", "activation", tensor): math.nan,
        ("c", "weight", tensor): 2e-9,
    }
    return SensitivityTable("kl", entries, 512, 1.5, ("a note",))


@pytest.mark.parametrize("ending", ["json", "parquet"])
def test_a_table_survives_its_file(table: SensitivityTable, ending: str, tmp_path) -> None:
    table.save(tmp_path / f"t.{ending}")
    again = SensitivityTable.load(tmp_path / f"t.{ending}")
    assert (again.proxy, again.samples, again.seconds, again.notes) == ("kl", 512, 1.5, ("a note",))
    pd.testing.assert_frame_equal(again.to_frame(), table.to_frame())
    assert list(again) == list(table)


def _json(change: Callable[[dict], object]) -> Callable[[str], str]:
    def edit(text: str) -> str:
        document = json.loads(text)
        change(document)
        return json.dumps(document)

    return edit


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda text: text[:40], "cannot be used"),
        (lambda text: "[]", "must hold an object"),
        (_json(lambda d: d.update(schema="x")), "expected 'mpsearch/sensitivity/1'"),
        (_json(lambda d: d.pop("proxy")), "'proxy' is missing"),
        (_json(lambda d: d["rows"][0].update(precision="uniform:99")), "99-bit"),
        (_json(lambda d: d["rows"][0].update(tensor="bias")), "bias"),
        (_json(lambda d: d["rows"][0].update(value="much")), "much"),
    ],
)
def test_a_broken_file_is_refused_by_reason(table: SensitivityTable, edit, reason: str, tmp_path) -> None:
    path = tmp_path / "t.json"
    table.save(path)
    path.write_text(edit(path.read_text()))
    with pytest.raises(RunError, match=reason):
        SensitivityTable.load(path)


def test_a_table_file_needs_a_known_ending_and_must_exist(table: SensitivityTable, tmp_path) -> None:
    with pytest.raises(RunError, match=r"\.json or \.parquet"):
        table.save(tmp_path / "t.pickle")
    with pytest.raises(RunError, match="cannot read"):
        SensitivityTable.load(tmp_path / "none.json")
    with pytest.raises(WriteError, match="cannot write"):
        table.save(tmp_path / "no" / "t.json")


def test_total_adds_up_a_config_and_float_costs_nothing(residual: nn.Module, images: Tensor) -> None:
    layers = inspected(residual, images)
    kl = divergences(residual, layers, space_of(layers, "uniform:3", "uniform:4"), images[:4]).kl
    config = PrecisionConfig.uniform([layer.name for layer in layers], LayerPrecision.shorthand("w4a3"))
    expected = sum(v for (_, tensor, p), v in kl.items() if p.bits == (4 if tensor == "weight" else 3))
    assert kl.total(config) == pytest.approx(expected)
    assert kl.total(PrecisionConfig.uniform(config, LayerPrecision(FLOAT, FLOAT))) == 0
    with pytest.raises(PrecisionError, match="has no entry for layer 'stem' with weight uniform:5/channel"):
        kl.total(PrecisionConfig.uniform(config, LayerPrecision.shorthand("w5a3")))
