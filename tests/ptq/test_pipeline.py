"""The pipeline as a whole, on digits: what it keeps, what it rescues, what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from filelock import FileLock
from ptq_nets import MobileNet, scale_badly
from torch import Tensor, nn

import mpsearch
from mpsearch.errors import PrecisionError, TaskError
from mpsearch.exporters import native
from mpsearch.metric import TOP1
from mpsearch.precision import LayerPrecision
from mpsearch.ptq.pipeline import PtqMethod, ptq
from mpsearch.train import FitSettings, fit

pytestmark = pytest.mark.study

PER_TENSOR = LayerPrecision.parse("uniform:8/tensor", "uniform:8")
NAIVE = PtqMethod(equalize=False, rounding="nearest", bias_correction="none", weight_range="min_max")


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels to train on and to score."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x = (torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1)[order]
    y = torch.tensor(data.target)[order]
    return x[:1297], y[:1297], x[1297:], y[1297:]


@pytest.fixture(scope="module")
def trained(digits, shared: Path) -> nn.Module:
    """A small MobileNet, trained once for all workers."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    net, weights = MobileNet(), shared / "ptq-mobilenet.pt"
    with FileLock(f"{weights}.lock"):
        if not weights.exists():
            train(net, *digits[:2])
            torch.save(net.state_dict(), weights)
    net.load_state_dict(torch.load(weights, weights_only=True))
    return net.eval()


def train(net: nn.Module, x: Tensor, y: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    chosen = (torch.randint(len(x), (64,), generator=generator) for _ in range(400))
    fit(
        net,
        ((x[i], y[i]) for i in chosen),
        lambda _s, _x, out, y: nn.functional.cross_entropy(out, y),
        FitSettings(400, 0.1),
    )


@torch.no_grad()
def accuracy(model: nn.Module, digits: tuple[Tensor, ...]) -> float:
    return float((model(digits[2]).argmax(1) == digits[3]).float().mean())


@pytest.fixture
def badly_scaled(trained) -> nn.Module:
    import copy

    net = copy.deepcopy(trained)
    for block in (net.block1, net.block2):
        scale_badly(block)
    return net


def test_equalization_rescues_a_badly_scaled_mobilenet_at_8_bits_per_tensor(trained, badly_scaled, digits) -> None:
    before = accuracy(trained, digits)
    assert before > 0.9
    assert accuracy(badly_scaled, digits) == pytest.approx(before, abs=0.003)  # the function is the same
    naive = ptq(badly_scaled, PER_TENSOR, digits[0][:256], NAIVE)
    assert accuracy(naive.model, digits) < before - 0.1
    repaired = ptq(badly_scaled, PER_TENSOR, digits[0][:256], PtqMethod(rounding="nearest"))
    assert accuracy(repaired.model, digits) >= before - 0.01


def test_data_free_ptq_needs_the_model_alone_and_keeps_the_accuracy(badly_scaled, digits) -> None:
    result = ptq(badly_scaled, PER_TENSOR)
    assert accuracy(result.model, digits) >= accuracy(badly_scaled, digits) - 0.02
    assert (result.method.rounding, result.method.bias_correction) == ("nearest", "analytic")


def test_adaround_beats_nearest_rounding_at_few_bits(trained, digits) -> None:
    w3 = LayerPrecision.shorthand("w3a8")
    learned = ptq(trained, w3, digits[0][:256], PtqMethod(adaround_steps=400))
    nearest = ptq(trained, w3, digits[0][:256], PtqMethod(rounding="nearest", bias_correction="none"))
    assert learned.method.rounding == "adaround"
    errors = [float((r.model(digits[2]) - trained(digits[2])).square().mean()) for r in (learned, nearest)]
    assert errors[0] < errors[1]


def test_the_model_given_is_left_untouched(trained, digits) -> None:
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    ptq(trained, PER_TENSOR, digits[0][:64], PtqMethod(rounding="nearest", bias_correction="empirical"))
    ptq(trained, PER_TENSOR)
    assert before.keys() == trained.state_dict().keys()
    assert all(torch.equal(before[name], value) for name, value in trained.state_dict().items())


def test_every_stage_that_ran_is_timed_in_order(trained, digits) -> None:
    method = PtqMethod(rounding="nearest", bias_correction="empirical", logits_range="cross_entropy")
    result = ptq(trained, PER_TENSOR, digits[0][:64], method)
    stages = ["inspect", "fold", "equalize", "weight_ranges", "bias_correction", "activation_ranges"]
    assert list(result.seconds) == stages


@pytest.mark.parametrize("data_free", [False, True])
def test_an_export_gives_the_model_back(trained, digits, tmp_path: Path, data_free: bool) -> None:
    result = ptq(trained, PER_TENSOR, None if data_free else digits[0][:64], PtqMethod(rounding="nearest"))
    native.save(result.network(name="net", task="digits", metric=TOP1, score={"val": 0.5}), tmp_path / "out")
    loaded = mpsearch.load(MobileNet().eval(), tmp_path / "out")
    assert torch.equal(loaded(digits[2]), result.model(digits[2]))


def test_an_export_of_another_network_is_refused_by_name(trained, digits, tmp_path: Path) -> None:
    result = ptq(trained, PER_TENSOR)
    native.save(result.network(name="net", task="digits", metric=TOP1, score={}), tmp_path / "out")
    with pytest.raises(mpsearch.MpsearchError, match="structure"):
        mpsearch.load(nn.Sequential(nn.Linear(2, 2)), tmp_path / "out")


@pytest.mark.parametrize(
    ("method", "data_free", "words"),
    [
        (PtqMethod(rounding="adaround", bias_correction="analytic"), False, "do not go together"),
        (PtqMethod(rounding="adaround"), True, "adaround needs calibration data"),
        (PtqMethod(bias_correction="empirical"), True, "empirical bias correction needs calibration data"),
        (PtqMethod(rounding="adarond"), False, "did you mean 'adaround'"),  # type: ignore[arg-type]
    ],
)
def test_methods_that_exclude_each_other_are_refused(method: PtqMethod, data_free: bool, words: str) -> None:
    with pytest.raises(PrecisionError, match=words):
        method.resolved(data_free)


def test_data_free_ptq_names_the_layer_that_it_knows_nothing_of() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Softplus(), nn.Linear(4, 2))
    with pytest.raises(TaskError, match=r"layer '2'.*give calibration data"):
        ptq(net, PER_TENSOR)


class MyLinear(nn.Linear):
    pass


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def mlp(last: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8), last
    )
    return net.eval()


def test_data_free_ptq_takes_layers_of_derived_classes_and_names_what_stays_float() -> None:
    """A7."""
    done = ptq(mlp(MyLinear(8, 4)), PER_TENSOR)
    assert list(done.config) == ["0", "5", "6"]
    done = ptq(mlp(Doubled(8, 4)), PER_TENSOR)
    assert list(done.config) == ["0", "5"]
    assert "6 stays float: its class Doubled has a forward of its own" in done.notes


def test_data_free_ptq_does_not_fold_a_norm_whose_axis_it_does_not_know() -> None:
    """A2 without data: features or positions?"""
    net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16)).eval()
    assert ptq(net, PER_TENSOR).net.folded == {}
    assert "1 is not folded into 0: without data" in ptq(net, PER_TENSOR).notes[0]
    known = nn.Sequential(nn.Flatten(), nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(8, 16), nn.BatchNorm1d(16)).eval()
    assert ptq(known, LayerPrecision.parse("uniform:8", "float")).net.folded == {"3": "4"}


def test_data_free_ptq_leaves_a_weight_that_is_read_without_its_layer() -> None:
    """A6 without data."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enc, self.mid = nn.Linear(6, 5), nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.mid(self.enc(x)), self.enc.weight.t())

    done = ptq(Tied().eval(), LayerPrecision.parse("uniform:8", "float"))
    assert list(done.config) == ["mid"]
    assert "enc stays float: the model multiplies by its weight without calling it" in done.notes
