"""Replay: what it computes is what the whole network computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpsearch.task.networks import CifarResNet, DigitsCNN
from mpsearch.warmstart.replay import CannotReplay, Replay


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}


@torch.no_grad()
def check(model: nn.Module, x: Tensor) -> int:
    """Compare every replay to the whole forward, bit for bit; returns how many layers were run again in all."""
    layers = layers_of(model)
    replay = Replay(model, layers.values())
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    assert torch.equal(replay.record(x), model(x))
    handles = [layer.register_forward_hook(count) for layer in layers.values()]
    outputs = {}
    for name, layer in layers.items():
        layer.bias = nn.Parameter(torch.full((layer.weight.shape[0],), 0.25))  # a change with an effect everywhere
        outputs[name] = replay.after(layer)
        layer.bias = None
    for handle in handles:
        handle.remove()
    unchanged = model(x)
    for name, layer in layers.items():
        layer.bias = nn.Parameter(torch.full((layer.weight.shape[0],), 0.25))
        assert torch.equal(outputs[name], model(x)), name
        assert not torch.equal(outputs[name], unchanged), name
        layer.bias = None
    return calls


@pytest.mark.parametrize("network", [DigitsCNN, lambda: CifarResNet(8, in_channels=1)])
def test_replay_equals_the_whole_forward_and_runs_half_of_it(network, images: Tensor) -> None:
    torch.manual_seed(0)
    model = network().eval()
    for layer in layers_of(model).values():
        layer.bias = None
    count = len(layers_of(model))
    assert check(model, images) == count * (count + 1) // 2


def test_replay_survives_updates_in_place_and_layers_that_run_twice(residual: nn.Module, images: Tensor) -> None:
    for layer in layers_of(residual).values():
        layer.bias = None
    check(residual, images)


def test_replay_of_a_second_batch_forgets_the_first(residual: nn.Module, images: Tensor) -> None:
    replay = Replay(residual, layers_of(residual).values())
    with torch.no_grad():
        replay.record(images[:16])
        replay.record(images[16:])
        assert torch.equal(replay.after(residual.fc), residual(images[16:]))


class Inner(nn.Module):
    def __init__(self, step) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.late = nn.Conv2d(2, 2, 1)
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.step(self, x)


def late_update(net: Inner, x: Tensor) -> Tensor:
    y = net.conv(x)
    z = net.late(y) + y
    torch.relu_(y)
    return (z + y).mean(dim=(2, 3))


def old_name(net: Inner, x: Tensor) -> Tensor:
    y = net.conv(x)
    z = y
    z += net.late(x.expand(-1, 2, -1, -1)[:, :, 1:-1, 1:-1])
    return y.mean(dim=(2, 3))  # eagerly y is z


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (lambda net, x: net.conv(x) if x.sum() > 0 else net.conv(-x), "cannot trace Inner"),
        (late_update, "in place"),
        (old_name, "computes something else"),
    ],
)
def test_replay_refuses_what_it_would_get_wrong(step, reason: str, images: Tensor) -> None:
    torch.manual_seed(0)
    model = Inner(step).eval()
    with torch.no_grad(), pytest.raises(CannotReplay, match=reason):
        Replay(model, [model.conv, model.late]).record(images)


def test_replay_takes_several_and_named_arguments(images: Tensor) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.left(a) * F.relu(self.right(b))

    model = Two().eval()
    a, b = images[:, 0, 0], images[:, 0, 1]
    for x in ((a, b), {"b": b, "a": a}):
        replay = Replay(model, [model.left, model.right])
        with torch.no_grad():
            assert torch.equal(replay.record(x), model(a, b))
            assert torch.equal(replay.after(model.right), model(a, b))
