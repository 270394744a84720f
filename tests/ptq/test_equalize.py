"""Equalization levels channel ranges, and absorption lowers biases, without changing the function."""

from __future__ import annotations

import torch
from ptq_nets import InvertedResidual, MobileNet, normal, scale_badly, shaken
from torch import Tensor, nn

from mpsearch.graph.layers import inspect_model
from mpsearch.ptq.equalize import absorb_high_bias, equalize, equalize_pair
from mpsearch.ptq.flow import Normal, trace
from mpsearch.ptq.fold import FloatNet, fold_batch_norms


def out_ranges(weight: Tensor) -> Tensor:
    return weight.abs().amax(dim=tuple(range(1, weight.dim())))


def in_ranges(weight: Tensor) -> Tensor:
    return out_ranges(weight.transpose(0, 1))


def test_a_pair_ends_with_equal_ranges_and_the_same_function() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).double()
    x = normal(2, 3, 9, 9)
    y, r1, r2 = net(x), out_ranges(net[0].weight), in_ranges(net[2].weight)
    s = equalize_pair(net[0], net[2])
    torch.testing.assert_close(s, (r1 * r2).sqrt() / r2)
    torch.testing.assert_close(out_ranges(net[0].weight), (r1 * r2).sqrt())
    torch.testing.assert_close(in_ranges(net[2].weight), (r1 * r2).sqrt())
    torch.testing.assert_close(net(x), y, rtol=1e-12, atol=1e-12)


def test_a_dead_channel_keeps_its_weights() -> None:
    first, second = nn.Linear(3, 2), nn.Linear(2, 3)
    first.weight.data[1] = 0
    assert equalize_pair(first, second)[1] == 1
    assert first.weight.isfinite().all()
    assert second.weight.isfinite().all()


def test_a_depthwise_triple_ends_at_the_cube_root_of_its_ranges() -> None:
    torch.manual_seed(0)
    net, x = shaken(nn.Sequential(InvertedResidual(4, 8))), normal(2, 4, 6, 6)
    folded = fold_batch_norms(net, inspect_model(net, x).layers)
    block = folded.model[0]  # type: ignore[index]
    root = (out_ranges(block.expand.weight) * out_ranges(block.depthwise.weight) * in_ranges(block.project.weight)) ** (
        1 / 3
    )
    done = equalize(folded)
    block = done.model[0]  # type: ignore[index]
    for ranges in (
        out_ranges(block.expand.weight),
        out_ranges(block.depthwise.weight),
        in_ranges(block.project.weight),
    ):
        torch.testing.assert_close(ranges, root, rtol=1e-2, atol=0)


def test_bad_scales_vanish_and_the_function_stays() -> None:
    torch.manual_seed(0)
    net, x = shaken(MobileNet()), normal(4, 1, 8, 8)
    plain = equalize(fold_batch_norms(net, inspect_model(net, x).layers))
    for block in (net.block1, net.block2):
        scale_badly(block)
    y = net(x)
    bad = fold_batch_norms(net, inspect_model(net, x).layers)
    bad.outputs.clear()  # type: ignore[attr-defined]  # without statistics nothing is absorbed: scaling alone is exact
    done = equalize(bad)
    torch.testing.assert_close(done.model(x), y, rtol=1e-9, atol=1e-9)
    for name in ("block1.expand", "block1.depthwise", "block2.project"):
        torch.testing.assert_close(
            done.model.get_submodule(name).weight.abs(),
            plain.model.get_submodule(name).weight.abs(),
            rtol=0.02,
            atol=1e-6,
        )


def test_statistics_follow_the_scales() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    bias = torch.tensor([0.1, 0.2, -0.1])
    known = FloatNet(net, {"0": Normal(bias, torch.ones(3))})
    done = equalize(known)
    s = out_ranges(net[0].weight) / out_ranges(done.model[0].weight)  # type: ignore[index]
    torch.testing.assert_close(done.outputs["0"].mean, bias / s, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(done.outputs["0"].std, 1 / s, rtol=1e-3, atol=1e-6)


def test_absorption_moves_what_is_above_three_deviations_and_keeps_the_function() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 2, bias=False)).double()
    net[0].bias.data = torch.tensor([50.0, 0.0, 4.0]).double()
    x = normal(2, 2, 6, 6).clamp(-1, 1)
    y = net(x)
    after = absorb_high_bias(net[0], net[2], Normal(torch.tensor([50.0, 0.0, 4.0]), torch.tensor([1.0, 1.0, 1.0])))
    torch.testing.assert_close(net[0].bias.data, torch.tensor([3.0, 0.0, 3.0]).double())
    torch.testing.assert_close(after.mean, torch.tensor([3.0, 0.0, 3.0]))
    torch.testing.assert_close(net(x), y, rtol=1e-12, atol=1e-12)


def test_nothing_is_absorbed_where_zeros_pad() -> None:
    for padding, absorbed in ((0, True), (1, False)):
        net = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=padding))
        done = equalize(FloatNet(net, {"0": Normal(torch.full((2,), 9.0), torch.ones(2))}))
        deviations = done.outputs["0"].mean / done.outputs["0"].std
        torch.testing.assert_close(deviations, torch.full((2,), 3.0 if absorbed else 9.0))


def test_relu6_is_replaced_where_it_is_a_module_and_left_alone_where_not() -> None:
    net = shaken(MobileNet(nn.ReLU6))
    folded = fold_batch_norms(net, trace(net).layers())  # type: ignore[union-attr]
    done = equalize(folded)
    assert done.relu6 == ("block1.act1", "block1.act2", "block2.act1", "block2.act2")
    assert isinstance(done.model.act, nn.ReLU6)  # a shortcut follows: no chain, and no reason to change it
    kept = equalize(folded, replace_relu6=False)
    assert kept.relu6 == ()
    assert len(kept.notes) == 4
    x = normal(2, 1, 8, 8)
    assert torch.equal(kept.model(x), folded.model(x))


def test_chains_end_where_a_tensor_has_two_readers() -> None:
    net = shaken(MobileNet())
    flow = trace(fold_batch_norms(net, trace(net).layers()).model)  # type: ignore[union-attr]
    assert flow is not None
    assert [(chain.first, chain.second) for chain in flow.chains()] == [
        ("block1.expand", "block1.depthwise"),
        ("block1.depthwise", "block1.project"),
        ("block2.expand", "block2.depthwise"),
        ("block2.depthwise", "block2.project"),
    ]


def test_a_model_that_cannot_be_traced_is_left_alone_with_a_note() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x):
            return self.fc(x) if x.sum() > 0 else x

    net = FloatNet(Branching())
    done = equalize(net)
    assert "torch.fx cannot trace" in done.notes[0]
    assert torch.equal(done.model.fc.weight, net.model.fc.weight)


def test_layers_that_read_along_other_axes_are_no_chain() -> None:
    """As many places as channels: sizes alone do not tell."""
    for net in (
        nn.Sequential(nn.Conv1d(3, 8, 1), nn.ReLU(), nn.Linear(8, 4)),  # over places
        nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.AvgPool1d(3, 1, 1), nn.Linear(8, 4)),  # pools features
        nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Conv1d(8, 4, 1)),  # over positions
        nn.Sequential(nn.Conv1d(3, 8, 1), nn.ReLU(), nn.Flatten(0), nn.Linear(8, 4)),
    ):
        flow = trace(net)
        assert flow is not None
        assert flow.chains() == []
    x = normal(2, 3, 8)
    for net in (
        nn.Sequential(nn.Conv1d(3, 8, 1), nn.ReLU(), nn.AvgPool1d(8), nn.Flatten(), nn.Linear(8, 4)),
        nn.Sequential(nn.Conv1d(3, 8, 1), nn.ReLU(), nn.Conv1d(8, 4, 1)),
    ):
        net = net.double()
        done = equalize(FloatNet(net), calibration_input=x)
        assert not torch.equal(done.model[0].weight, net[0].weight)  # type: ignore[index]
        torch.testing.assert_close(done.model(x), net(x))


def test_a_weight_that_the_model_reads_itself_is_not_scaled() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x))) + self.b.weight.sum()

    net, x = Reads().double(), normal(5, 3)
    torch.testing.assert_close(equalize(FloatNet(net), calibration_input=x).model(x), net(x))


def test_an_equalization_that_changes_the_answers_is_undone_and_named() -> None:
    class Sums(nn.Module):
        """Answers by the size of a weight, which no trace sees."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(3, 8), nn.Linear(8, 4), nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(self.b(torch.relu(self.a(x))))
            return self.d(torch.relu(self.c(y))) * self.size()

        def size(self) -> float:
            return float(self._modules["d"]._parameters["weight"].detach().abs().max())  # type: ignore[union-attr]

    torch.manual_seed(0)
    net, x = Sums().double(), normal(5, 3)
    done = equalize(FloatNet(net), calibration_input=x)
    assert done.notes == ("c and d are not equalized: the network then answers otherwise",)
    torch.testing.assert_close(done.model(x), net(x))


def test_relu6_that_clips_much_stays_and_is_named() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU6(), nn.Linear(8, 3)).double(), normal(50, 4)
    gentle = equalize(FloatNet(net), calibration_input=x)
    assert gentle.relu6 == ("1",)
    net[0].weight.data.mul_(30)
    done = equalize(FloatNet(net), calibration_input=x)
    assert done.relu6 == ()
    assert any("ReLU6 stays" in note for note in done.notes)
    torch.testing.assert_close(done.model(x), net(x))
