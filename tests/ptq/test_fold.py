"""Folding changes the structure of a network and not its function."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from ptq_nets import MobileNet, normal, shaken
from torch import Tensor, nn

from mpsearch.graph import kinds
from mpsearch.graph.layers import inspect_model
from mpsearch.precision import LayerPrecision
from mpsearch.ptq.fold import fold_batch_norms
from mpsearch.ptq.pipeline import PtqMethod, ptq
from mpsearch.task.networks import CifarResNet


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) for module in model.modules())


NETS = {
    "plain": lambda: nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6)),
    "biased": lambda: nn.Sequential(nn.Conv2d(2, 6, 3, bias=True), nn.BatchNorm2d(6)),
    "depthwise": lambda: nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d(4)),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(2, 5, 3), nn.BatchNorm2d(5)),
    "transposed, grouped": lambda: nn.Sequential(nn.ConvTranspose2d(2, 6, 3, groups=2), nn.BatchNorm2d(6)),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(128, 6, bias=False), nn.BatchNorm1d(6)),
    "without affine": lambda: nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6, affine=False)),
}


@pytest.mark.parametrize("kind", NETS)
def test_folding_keeps_the_function_of_every_kind_of_layer(kind: str) -> None:
    torch.manual_seed(0)
    net = NETS[kind]()
    if kind == "without affine":
        net[1].running_var.uniform_(0.3, 1.5)
        net = net.eval().double()
    else:
        net = shaken(net)
    x = normal(3, 2, 8, 8)
    folded = fold_batch_norms(net, inspect_model(net, x).layers)
    assert norms(folded.model) == 0
    torch.testing.assert_close(folded.model(x), net(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("build", "shape"), [(MobileNet, (3, 1, 8, 8)), (lambda: CifarResNet(8), (2, 3, 16, 16))])
def test_folding_empties_whole_networks_and_remembers_their_statistics(build, shape) -> None:
    torch.manual_seed(0)
    net, x = shaken(build()), normal(*shape)
    layers = inspect_model(net, x).layers
    folded = fold_batch_norms(net, layers)
    assert norms(net) == len(folded.outputs) > 0
    assert norms(folded.model) == 0
    torch.testing.assert_close(folded.model(x), net(x), rtol=1e-10, atol=1e-10)
    for layer, norm in folded.folded.items():
        torch.testing.assert_close(folded.outputs[layer].mean, net.get_submodule(norm).bias.data)
        torch.testing.assert_close(folded.outputs[layer].std, net.get_submodule(norm).weight.data.abs())


def test_a_norm_behind_two_layers_is_left_alone_with_a_note() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.bn = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

        def forward(self, x):
            return self.bn(self.b(self.bn(self.a(x))))

    net, x = shaken(Shared()), normal(2, 2, 4, 4)
    graph = inspect_model(net, x)
    folded = fold_batch_norms(net, graph.layers, x)
    assert norms(folded.model) == 1
    assert graph.notes == ("bn is not folded into a: bn is used 2 times",)
    assert torch.equal(folded.model(x), net(x))


# --------------------------------------------------------------------------- folding follows the flow of the data


class Net(nn.Module):
    """Modules and a function of them and of x."""

    def __init__(self, forward: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.body = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def conv() -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1)


def through_parent(net: Net, x: Tensor) -> Tensor:
    y = net.conv(x)
    net.seen = y  # an attribute, and read after the norm
    return net.bn(y) + net.seen


STAY = {
    "a norm that also reads another tensor (A1)": (
        lambda n, x: F.relu(n.bn(n.conv(x)) + n.bn(F.avg_pool2d(x, 3, 1, 1))),
        "bn is used 2 times",
    ),
    "a shortcut from before the norm": (lambda n, x: n.bn(y := n.conv(x)) + y, "something else reads"),
    "an output read later, by way of an attribute": (through_parent, "something else reads"),
    "an output that the model returns too": (lambda n, x: (n.bn(y := n.conv(x)), y), "something else reads"),
    "a norm whose parameters are read": (
        lambda n, x: n.bn(n.conv(x)) * n.bn.weight.mean(),
        "reads the parameters of bn",
    ),
    "a norm called past its hooks as well": (
        lambda n, x: n.bn(n.conv(x)) + n.bn.forward(x),
        "reads the parameters of bn",
    ),
    "a layer whose weight is read": (lambda n, x: n.bn(n.conv(x)) + n.conv.weight.mean(), "parameters of conv"),
    "a layer used twice": (lambda n, x: n.bn(n.conv(n.conv(x))), "conv is used 2 times"),
}


@pytest.mark.parametrize("kind", STAY)
def test_a_norm_stays_with_a_note_where_folding_would_change_the_function(kind: str) -> None:
    torch.manual_seed(0)
    forward, why = STAY[kind]
    net, x = shaken(Net(forward, conv=conv(), bn=nn.BatchNorm2d(4))), normal(3, 4, 6, 6)
    graph = inspect_model(net, x)
    assert graph.layers[0].batch_norm is None
    (note,) = graph.notes
    assert why in note
    folded = fold_batch_norms(net, graph.layers, x)
    assert norms(folded.model) == 1
    torch.testing.assert_close(folded.model(x), net(x))


def test_an_activation_in_place_between_a_layer_and_a_norm_parts_them() -> None:
    net, x = shaken(nn.Sequential(conv(), nn.ReLU(inplace=True), nn.BatchNorm2d(4))), normal(3, 4, 6, 6)
    graph = inspect_model(net, x)
    assert graph.layers[0].batch_norm is None
    torch.testing.assert_close(fold_batch_norms(net, graph.layers, x).model(x), net(x))


@pytest.mark.parametrize(
    ("net", "shape", "folds"),
    [
        (lambda: nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16)), (5, 8), True),
        (lambda: nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16)), (5, 16, 8), False),  # over positions (A2)
        (lambda: nn.Sequential(nn.Linear(8, 16), nn.BatchNorm2d(16)), (5, 16, 4, 8), False),
        (lambda: nn.Sequential(nn.Conv1d(4, 16, 1), nn.BatchNorm1d(16)), (5, 4, 16), True),
        (lambda: nn.Sequential(nn.Conv1d(4, 16, 1), nn.BatchNorm1d(9)), (4, 9), False),  # one sample: axis 1 is time
    ],
)
def test_a_norm_is_folded_only_along_the_channels_of_the_layer(net, shape: tuple[int, ...], folds: bool) -> None:
    torch.manual_seed(0)
    model, x = shaken(net()), normal(*shape)
    graph = inspect_model(model, x)
    folded = fold_batch_norms(model, graph.layers, x)
    assert (len(folded.folded) == 1) is folds
    assert folds or "normalizes axis 1" in graph.notes[0]
    torch.testing.assert_close(folded.model(x), model(x))


@pytest.mark.parametrize("name", [name for name in STAY if "returns" not in name])
def test_ptq_of_a_network_whose_norm_stays_is_close_to_it(name: str) -> None:
    torch.manual_seed(0)
    net, x = shaken(Net(STAY[name][0], conv=conv(), bn=nn.BatchNorm2d(4))).float(), normal(64, 4, 6, 6).float()
    done = ptq(net, LayerPrecision.shorthand("w8a8"), x, PtqMethod(rounding="nearest"))
    assert any(STAY[name][1] in note for note in done.notes)
    assert float((done.model(x) - net(x)).norm() / net(x).norm()) < 0.02


class NormAct(nn.BatchNorm2d):
    """As timm's `BatchNormAct2d`: a BatchNorm that holds its activation."""

    def __init__(self, features: int, act: type[nn.Module] = nn.SiLU) -> None:
        super().__init__(features)
        self.drop, self.act = nn.Identity(), act()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


def test_a_norm_that_holds_its_activation_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A3: unknown, it stays; known by module and name, it is folded and its activation stays in its place."""
    torch.manual_seed(0)
    net, x = shaken(nn.Sequential(conv(), NormAct(4), conv())), normal(3, 4, 6, 6)
    graph = inspect_model(net, x)
    assert graph.layers[0].batch_norm is None
    assert "its class NormAct is not known" in graph.notes[0]
    assert torch.equal(fold_batch_norms(net, graph.layers, x).model(x), net(x))
    monkeypatch.setattr(kinds, "BATCH_NORM_ACT", (NormAct.__module__, NormAct.__qualname__))
    graph = inspect_model(net, x)
    folded = fold_batch_norms(net, graph.layers, x)
    assert folded.folded == {"0": "1"}
    assert isinstance(folded.model.get_submodule("1.act"), nn.SiLU)
    torch.testing.assert_close(folded.model(x), net(x))


def test_timms_norm_is_the_one_that_is_known() -> None:
    layers = pytest.importorskip("timm.layers")
    assert (layers.BatchNormAct2d.__module__, layers.BatchNormAct2d.__qualname__) == kinds.BATCH_NORM_ACT


class Nosy(nn.Module):
    """Does otherwise where its norm is no BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.good, self.bn1, self.conv, self.bn2 = conv(), nn.BatchNorm2d(4), conv(), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv(self.bn1(self.good(x))))
        return y if isinstance(self.bn2, nn.BatchNorm2d) else 2 * y


def test_a_fold_that_changes_the_answers_is_undone_alone_and_named() -> None:
    torch.manual_seed(0)
    net, x = shaken(Nosy()), normal(3, 4, 6, 6)
    folded = fold_batch_norms(net, inspect_model(net, x).layers, x)
    assert folded.folded == {"good": "bn1"}
    assert folded.notes == ("bn2 is not folded into conv: the network then answers otherwise",)
    torch.testing.assert_close(folded.model(x), net(x))


def test_an_embedding_has_no_bias_for_a_batch_norm_to_go_into() -> None:
    net, tokens = nn.Sequential(nn.Embedding(20, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).eval(), torch.arange(20)
    graph = inspect_model(net, tokens)
    assert graph.notes == ("1 is not folded into 0: 0 is an embedding, which has no bias",)
    result = ptq(net, LayerPrecision.shorthand("w8a8"), tokens, PtqMethod(rounding="nearest"))
    assert isinstance(result.model[1], nn.BatchNorm1d)  # type: ignore[index]
