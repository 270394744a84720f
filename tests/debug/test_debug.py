"""The debugging flow, on digits: it finds the layer that was broken, and what repairs it."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from mpsearch.debug.advice import Advice, advise, document
from mpsearch.debug.diagnosis import Attempt, Diagnosis, LayerFacts, Score, TensorFacts
from mpsearch.debug.measure import channel_ratio, diagnose
from mpsearch.errors import PrecisionError, TaskError
from mpsearch.metric import TOP1
from mpsearch.precision import FLOAT, LayerPrecision, Precision, PrecisionConfig
from mpsearch.quant.prepare import prepare
from mpsearch.study import load_study
from mpsearch.task import ClassificationTask, load_task

pytestmark = pytest.mark.study


class Broken(ClassificationTask):
    """A task whose float model is another one."""

    def float_model(self) -> nn.Module:
        return copy.deepcopy(self.other)

    def evaluate(self, model: nn.Module, split: str) -> float:
        assert split == "val"  # the test split is never looked at
        return super().evaluate(model, split)


def with_model(task: ClassificationTask, model: nn.Module) -> Broken:
    broken = copy.copy(task)
    broken.__class__ = Broken
    broken.other = model
    return broken


@pytest.fixture(scope="module")
def task() -> ClassificationTask:
    loaded = load_task(load_study("digits").task)
    assert isinstance(loaded, ClassificationTask)
    return loaded


@pytest.fixture(scope="module")
def net(task: ClassificationTask) -> nn.Module:
    return task.float_model()


@pytest.fixture(scope="module")
def fine(task: ClassificationTask, net: nn.Module) -> Diagnosis:
    return diagnose(with_model(task, net), LayerPrecision.shorthand("w8a8"))


@pytest.fixture(scope="module")
def badly_scaled(task: ClassificationTask, net: nn.Module) -> Diagnosis:
    """Two of block2's channels are made large, and small again behind the ReLU: the function stays."""
    net = copy.deepcopy(net)
    block, s = net.block2, torch.ones(24)
    s[:2] = 200.0
    with torch.no_grad():
        block.bn1.weight.mul_(s)
        block.bn1.bias.mul_(s)
        block.conv2.weight.div_(s.view(1, -1, 1, 1))
    return diagnose(with_model(task, net), LayerPrecision.shorthand("w6a32/tensor"))


def named(found: Diagnosis) -> dict[str, Advice]:
    return {item.action: item for item in advise(found, "digits")}


def test_a_layer_with_badly_scaled_channels_is_named_and_equalization_recommended(badly_scaled: Diagnosis) -> None:
    found = badly_scaled
    assert found.sane
    assert found.harmful("weights")
    assert not found.harmful("activations")
    assert found.worst("weight")[0] == "block2.conv1"
    ratios = {layer.name: layer.channel_ratio for layer in found.layers}
    assert ratios["block2.conv1"] > 100
    assert max(ratio for name, ratio in ratios.items() if name != "block2.conv1") < 8
    advice = named(found)
    assert advice["cle"].layers == advice["per_channel"].layers == ("block2.conv1",)
    scores = {attempt.action: attempt.score for attempt in found.attempts}
    assert f"{100 * scores['per_channel'].value:.2f} % instead of" in advice["per_channel"].text
    for action in ("cle", "per_channel"):
        assert scores[action].divergence < 0.1 * found.parts["weights"].divergence
    assert advice["cle"].command == "mpsearch ptq digits --bits w6a32/tensor"
    assert advice["per_channel"].command == "mpsearch debug digits w6a32"


def test_the_broken_weight_is_shown_before_and_after(badly_scaled: Diagnosis) -> None:
    first = badly_scaled.histograms[0]
    assert (first.layer, first.side) == ("block2.conv1", "weight")
    weights = 24 * 24 * 9
    assert sum(first.before) == sum(first.after) == weights
    assert sum(count > 0 for count in first.after) < 2**6
    assert max(first.after) > 0.9 * weights  # the other channels have become zero
    weight = next(layer.weight for layer in badly_scaled.layers if layer.name == "block2.conv1")
    assert weight is not None
    assert weight.sqnr_db > 20  # whose error does not show in a mean over all channels


def test_a_config_that_costs_nothing_is_left_alone(fine: Diagnosis) -> None:
    assert fine.sane
    assert fine.sanity.changed == 0
    assert [item.action for item in advise(fine)] == ["none"]
    assert fine.attempts == ()
    assert all(layer.weight.sqnr_db > 30 and layer.activation.sqnr_db > 30 for layer in fine.layers)


def test_scores_are_those_of_the_prepared_network(task: ClassificationTask, net: nn.Module, fine: Diagnosis) -> None:
    """W8A8 per channel does not depend on folding, up to the last bit of a step."""
    assert fine.samples == task.images.size("val")
    assert fine.float_score == task.evaluate(net, "val")
    quantized = prepare(net, fine.config, task.calibration_input(512))
    assert fine.parts["all"].value == pytest.approx(task.evaluate(quantized, "val"), abs=1.5 / fine.samples)


def test_sqnr_follows_the_bits(task: ClassificationTask, net: nn.Module, fine: Diagnosis) -> None:
    """Each bit less costs about 6 dB of a uniform quantizer's SQNR."""
    coarse = diagnose(with_model(task, net), LayerPrecision.shorthand("w6a6"))
    for eight, six in zip(fine.layers, coarse.layers, strict=True):
        assert 8 < eight.weight.sqnr_db - six.weight.sqnr_db < 15
        assert 8 < eight.activation.sqnr_db - six.activation.sqnr_db < 15


def test_only_the_tensors_that_a_config_quantizes_are_measured(task: ClassificationTask, net: nn.Module) -> None:
    precision = LayerPrecision(Precision("shift", 3, "channel"), FLOAT)
    config = PrecisionConfig.uniform(
        [name for name, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)], LayerPrecision(FLOAT, FLOAT)
    ).replace(**{"conv2": precision})
    found = diagnose(with_model(task, net), config)
    assert [layer.name for layer in found.layers if layer.weight] == ["conv2"]
    assert not any(layer.activation for layer in found.layers)
    assert found.parts["weights"] == found.parts["all"]
    assert found.parts["all"].divergence > found.parts["activations"].divergence


def test_remedies_are_tried_on_the_side_that_needs_them(task: ClassificationTask, net: nn.Module) -> None:
    found = diagnose(with_model(task, net), LayerPrecision.shorthand("w3a2"))
    assert found.harmful("weights")
    assert found.harmful("activations")
    scores = {(attempt.side, attempt.action): attempt.score for attempt in found.attempts}
    assert list(scores) == [
        *(("weight", action) for action in ("cle", "bias_correction", "more_bits")),
        *(("activation", action) for action in ("cle", "min_max", "more_bits")),
    ]
    for side, action in (("weight", "bias_correction"), ("weight", "more_bits"), ("activation", "more_bits")):
        part = "weights" if side == "weight" else "activations"
        assert scores[side, action].divergence < 0.9 * found.parts[part].divergence
    # Two bits over the whole range of an activation are worse than two bits over most of its values.
    assert scores["activation", "min_max"].divergence > found.parts["activations"].divergence


class AsksForItsClass(nn.Module):
    """Computes something else as soon as its layer is no plain one: what the sanity check is for."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x.flatten(1))
        return y if type(self.linear) is nn.Linear else -y


def test_a_network_that_changes_with_quantizers_at_32_bits_stops_the_flow(task: ClassificationTask) -> None:
    with pytest.raises(TaskError, match=r"no layer of AsksForItsClass.*does not answer as before"):
        diagnose(with_model(task, AsksForItsClass()), LayerPrecision.shorthand("w8a8"))


def test_a_config_of_another_network_is_refused(task: ClassificationTask, net: nn.Module) -> None:
    config = PrecisionConfig({"conv3": LayerPrecision.shorthand("w8a8")})
    with pytest.raises(PrecisionError, match=r"'conv3'.*did you mean 'conv2'"):
        diagnose(with_model(task, net), config)


def facts(weights: float, activations: float, everything: float) -> Diagnosis:
    """A network of one layer, float accuracy 0.9, with the accuracies given."""
    config = PrecisionConfig({"fc": LayerPrecision.shorthand("w4a4")})
    scores = [Score(accuracy, 0.5, 0.1) for accuracy in (weights, activations, everything)]
    layer = LayerFacts(
        "fc",
        "linear",
        1.5,
        TensorFacts(config["fc"].weight, 20.0, scores[0]),
        TensorFacts(config["fc"].activation, 20.0, scores[1]),
    )
    parts = dict(zip(("weights", "activations", "all"), scores, strict=True))
    return Diagnosis(config, TOP1, 1000, 0.9, "nats", Score(0.9, 0.0, 0.0), parts, (layer,), (), (), (), 1.0)


@pytest.mark.parametrize(
    ("accuracies", "actions"),
    [
        ((0.9, 0.9, 0.895), ["none"]),
        ((0.893, 0.893, 0.85), ["qat"]),  # each is fine, together they are not
        ((0.80, 0.90, 0.80), ["adaround", "qat"]),
        ((0.90, 0.80, 0.80), ["qat"]),
        ((0.90, math.nan, math.nan), ["qat"]),
    ],
)
def test_the_decision_tree(accuracies: tuple[float, float, float], actions: list[str]) -> None:
    assert [item.action for item in advise(facts(*accuracies))] == actions


def test_advice_says_what_is_left_and_names_the_layer() -> None:
    together, stuck, broken = (
        advise(facts(*accuracies))[-1] for accuracies in ((0.893, 0.893, 0.85), (0.9, 0.8, 0.8), (0.9, math.nan, 0.8))
    )
    assert "are fine, together they are not" in together.text
    for advice in (stuck, broken):
        assert advice.text.startswith("Nothing that was tried helps the activations, which lose most in fc.")
        assert advice.layers == ("fc",)
    assert advise(facts(0.8, 0.9, 0.8))[-1].text == "Train with the quantizers in place (QAT) if that is not enough."
    assert together.command == "mpsearch train STUDY --method qat --target w4a4"


@pytest.mark.parametrize(
    ("score", "advised"),
    [
        (Score(0.88, 0.1, 0.0), True),
        (Score(0.88, 0.48, 0.0), False),  # hardly closer to the float model
        (Score(0.79, 0.1, 0.0), False),  # closer, and yet less accurate
        (Score(math.nan, math.nan, 0.0), False),
    ],
)
def test_a_remedy_is_advised_if_it_helped(score: Score, advised: bool) -> None:
    found = replace(facts(0.9, 0.8, 0.8), attempts=(Attempt("min_max", "activation", (), score),))
    assert ("min_max" in {item.action for item in advise(found)}) is advised


def test_a_drop_is_known_to_the_answers_that_changed() -> None:
    found = facts(0.9, 0.9, 0.8)
    assert found.drop(found.parts["all"]) == pytest.approx(0.1)
    assert found.drop_error(found.parts["all"]) == pytest.approx(0.01)  # sqrt(0.1 / 1000)


def test_worst_layers_hold_half_of_the_divergence() -> None:
    found = facts(0.8, 0.8, 0.7)

    def layer(name: str, divergence: float) -> LayerFacts:
        weight = TensorFacts(Precision("uniform", 4, "channel"), 20.0, Score(0.9, divergence, 0.0))
        return LayerFacts(name, "linear", 1.0, weight, None)

    found = replace(found, layers=tuple(map(layer, "abcde", (0.1, 0.4, 0.3, 0.1, 0.1))))
    assert found.worst("weight") == ("b", "c")
    assert found.worst("activation") == ()
    broken = replace(found, layers=(*found.layers, layer("f", math.nan)))
    assert broken.worst("weight")[0] == "f"


def test_the_channel_ratio_is_of_the_largest_channel_to_the_median_one() -> None:
    rows = torch.tensor([[1.0, -2.0], [0.5, 0.0], [-8.0, 1.0], [0.0, 0.0]])  # the last is dead
    assert channel_ratio(rows) == 4.0
    assert channel_ratio(torch.zeros(2, 2)) == 1.0


def test_the_document_is_json_in_percent(badly_scaled: Diagnosis) -> None:
    text = json.dumps(document(badly_scaled, "digits"), allow_nan=False)
    read = json.loads(text)
    assert read["float_val"] == badly_scaled.float_score
    part = read["parts"]["weights"]
    assert part["drop"] == pytest.approx(read["float_val"] - part["score"])
    assert part["harmful"]
    assert read["layers"][0]["activation"] is None
    assert read["worst"]["weight"][0] == "block2.conv1"
    assert [item["action"] for item in read["advice"]] == [item.action for item in advise(badly_scaled)]
