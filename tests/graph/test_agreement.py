"""Two networks agree to rounding or they do not; what does not hold is found."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from mpsearch.graph.agreement import Original, difference, holds, largest_subset, outputs
from mpsearch.graph.inputs import call, first_samples, tensors
from mpsearch.ptq.fold import fold_batch_norms
from mpsearch.quant.prepare import inspect_network


def test_rounding_is_agreement_and_a_thousandth_is_not():
    y = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert difference([y * (1 + 1e-5)], [y]) < 1
    assert difference([y * (1 + 1e-3)], [y]) > 1
    assert difference([y.double() * (1 + 1e-7)], [y.double()]) > 1  # half of its digits are more
    assert difference([y[:50]], [y]) == float("inf")


def test_values_that_are_not_finite_must_be_so_in_both():
    y = torch.tensor([1.0, float("nan"), float("-inf")])
    assert difference([y], [y.clone()]) == 0
    assert difference([torch.tensor([1.0, 0.0, float("-inf")])], [y]) == float("inf")


def test_a_network_that_fails_does_not_hold():
    net, x = nn.Sequential(nn.Linear(3, 3)), torch.randn(4, 3)
    reference = outputs(net, x)
    assert holds(net, x, reference)
    assert not holds(nn.Sequential(nn.Linear(4, 3)), x, reference)


@pytest.mark.parametrize("bad", [set(), {0}, {7}, {3, 4}, set(range(8))])
def test_the_largest_subset_leaves_out_what_is_bad_and_no_more(bad: set[int]):
    asked: list[Any] = []

    def good(items: Any) -> bool:
        asked.append(items)
        return bad.isdisjoint(items)

    assert largest_subset(range(8), good) == [i for i in range(8) if i not in bad]
    assert len(asked) <= 1 + 2 * 4 * max(len(bad), 1)


def test_a_mapping_goes_in_by_name_where_the_model_takes_the_names():
    class ByName(nn.Module):
        def forward(self, a: Any, b: Any = 0) -> Any:
            return a if isinstance(a, dict) else a + b

    assert call(ByName(), {"a": 1, "b": 2}) == 3
    assert call(ByName(), {"c": 1}) == {"c": 1}
    assert call(ByName(), ((1,), {"b": 3})) == 4
    assert call(ByName(), (1, 2)) == 3


def test_the_first_samples_are_taken_only_of_tensors_of_one_length():
    x = torch.zeros(10, 3)
    assert [len(t) for t in tensors(first_samples({"a": x, "b": (x, 1)}, 4))] == [4, 4]
    assert [len(t) for t in tensors(first_samples((x, x[:5]), 4))] == [10, 5]


class Detector(nn.Module):
    """Gives the best 3 of 64 places, by a score that the last digits decide."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.score, self.box = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 1, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.stem(x))
        best = (1e7 * self.score(h)).sin().flatten(1).topk(3).indices
        return self.box(h).flatten(2).gather(2, best[:, None].expand(-1, 4, -1))


def test_a_network_whose_outputs_follow_noise_is_compared_between_its_layers():
    torch.manual_seed(0)
    net, x = Detector().eval(), torch.randn(4, 3, 8, 8)
    same, wrong, unlike = (copy.deepcopy(net) for _ in range(3))
    with torch.no_grad():
        same.stem.weight.mul_(1 + 1e-6)
        wrong.box.weight.mul_(1.01)
    unlike.score = nn.Identity()
    original = Original(net, x, ["stem", "score", "box"])
    assert difference(outputs(same, x), outputs(net, x)) > 1
    assert [original.holds(other) for other in (net, same, wrong, unlike)] == [True, True, False, False]
    # Where noise leaves the outputs alone, they are what counts.
    steady = Original(nn.Sequential(net.stem), x, ["0"])
    assert not steady.holds(nn.Sequential(net.stem, nn.ReLU()))


def test_a_detector_keeps_its_folded_norms_and_loses_a_wrong_one():
    torch.manual_seed(0)
    net, x = Detector(), torch.randn(8, 3, 8, 8)
    net.stem = nn.Sequential(net.stem, nn.BatchNorm2d(8))
    net(x)
    net.eval()
    graph = inspect_network(net, x)
    assert [layer.batch_norm for layer in graph.quantizable] == ["stem.1", None, None]
    folded = fold_batch_norms(net, graph.layers, x)
    assert (dict(folded.folded), folded.notes) == ({"stem.0": "stem.1"}, ())
