"""Networks whose sizes depend on their data: a detector's graph answers any number of boxes right, or there is none."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import mpsearch
from mpsearch.errors import ExportError, VerificationError
from mpsearch.exporters import onnx_graph
from mpsearch.exporters import verify as verification
from mpsearch.exporters.answers import Reference, answers, difference, same_answers
from mpsearch.exporters.verify import Verified
from mpsearch.graph.inputs import image_list
from mpsearch.precision import LayerPrecision, PrecisionConfig
from mpsearch.task.networks import small_fcos

MISSING = "needs mpsearch[targets]; `make test-all` installs it"
onnx = pytest.importorskip("onnx", reason=MISSING)
pytest.importorskip("onnxscript", reason=MISSING)
pytest.importorskip("torchvision", reason=MISSING)
ort = pytest.importorskip("onnxruntime", reason=MISSING)


def pictures(count: int, side: int = 64, seed: int = 1) -> list[Tensor]:
    """Noise with 0 to 4 bright squares."""
    random = torch.Generator().manual_seed(seed)
    images = list(0.2 * torch.rand(count, 3, side, side, generator=random))
    for number, image in enumerate(images):
        for _ in range(number % 5):
            x, y = torch.randint(0, side - 16, (2,), generator=random).tolist()
            image[:, y : y + 16, x : x + 16] += torch.rand(3, 1, 1, generator=random)
    return images


def detector() -> nn.Module:
    """With random weights, and scores that are apart: a few boxes an image, by what is in it."""
    torch.manual_seed(0)
    model = small_fcos().eval()
    head = model.head.classification_head  # type: ignore[union-attr]
    with torch.no_grad():
        nn.init.normal_(head.cls_logits.weight, std=0.3)  # type: ignore[union-attr, arg-type]
        nn.init.zeros_(head.cls_logits.bias)  # type: ignore[union-attr, arg-type]
    model.score_thresh = 0.72
    return model


W8A8 = LayerPrecision.shorthand("w8a8")


def prepared(
    model: nn.Module, x: object, samples: object = None, precision: LayerPrecision = W8A8
) -> mpsearch.QuantizedNetwork:
    graph = mpsearch.inspect_model(model, x)
    names = [layer.name for layer in graph.quantizable]
    config = PrecisionConfig.uniform(names, precision)
    quantized = mpsearch.prepare(model, config, x, graph.layers).eval()
    return mpsearch.QuantizedNetwork(quantized, graph.layers, "mine", "noise", example_input=x, samples=samples)


@pytest.fixture
def as_torch_export_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its refusal, which takes it tens of seconds of these networks; that it is one, a slow test asks torch itself."""

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("Could not guard on data-dependent expression")

    monkeypatch.setattr(onnx_graph, "_exported", refuse)


def run(folder: Path, images: list[Tensor]) -> tuple[Tensor, ...]:
    session = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    names = [argument.name for argument in session.get_inputs()]
    return tuple(map(torch.from_numpy, session.run(None, dict(zip(names, [x.numpy() for x in images], strict=True)))))


@pytest.mark.slow
def test_torch_export_refuses_a_detector_which_is_then_traced(tmp_path: Path) -> None:
    network = prepared(detector(), pictures(1), pictures(12))
    with patch.object(onnx_graph, "trace_sizes", wraps=onnx_graph.trace_sizes) as trace_sizes:
        exported = mpsearch.export(network, "onnx", tmp_path / "out")
    assert trace_sizes.call_count == 1
    assert isinstance(exported.verified, Verified)
    assert exported.verified.samples == 12


@pytest.mark.usefixtures("as_torch_export_answers")
def test_a_detector_answers_any_number_of_boxes_and_any_size_right(tmp_path: Path) -> None:
    """At 4 bits, whose opset the exporter that traces does not know; inputs are float, so that no code flips."""
    network = prepared(detector(), pictures(2), pictures(20), LayerPrecision.parse("uniform:4", "float"))
    exported = mpsearch.export(network, "onnx", tmp_path / "out")
    assert isinstance(exported.verified, Verified)
    assert (exported.verified.samples, exported.verified.same_answers) == (20, 20)
    document = json.loads((exported.path / "export.json").read_text())
    assert (document["batch"], document["image_sizes"], document["opset"]["ai.onnx"]) == (2, "any", 21)
    assert document["traced"]["checked_on"] >= 4
    assert len(document["traced"]["rows"]) > 1
    proto = onnx.load(exported.path / "model.onnx")
    assert [x.name for x in proto.graph.input] == ["image_0", "image_1"]
    assert [x.name for x in proto.graph.output][:3] == ["boxes_0", "scores_0", "labels_0"]
    numbers = set()
    for images in (pictures(2, seed=7), pictures(6, seed=8)[4:], pictures(2, side=96, seed=9)):
        ours, count = answers(network.model, images)
        theirs = run(exported.path, images)
        assert [x.shape for x in ours] == [x.shape for x in theirs]
        assert difference(ours, theirs, count).max() < 1e-4
        numbers |= {len(ours[0]), len(ours[3])}
    assert len(numbers) > 1


class Finds(nn.Module):
    """The positions above a threshold, counted in `form`."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.layer, self.form = nn.Conv2d(3, 4, 3, padding=1), form

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        y = self.layer(torch.stack(images))
        return [self.found(scores.flatten()) for scores in y.amax(1)]

    def found(self, scores: Tensor) -> dict[str, Tensor]:
        above = (scores > scores.mean() + 0.05).nonzero()[:, 0]
        found = scores[above]
        if self.form == "value" and float(found.sum()) > 30:  # one arm of it is in the graph
            found = 2 * found
        if self.form == "count":
            found = found + torch.arange(len(found))  # the example's number of them
        return {"scores": found, "boxes": torch.stack([found] * 4, 1)}


@pytest.mark.usefixtures("as_torch_export_answers")
@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("value", r"Nor can it be traced: in the network \(Finds\) Python reads a number that was computed"),
        ("count", "Nor can it be traced: .*(a size was made a constant|onnxruntime, given other inputs)"),
    ],
)
@pytest.mark.parametrize("verify", [True, False])
def test_what_a_trace_makes_a_constant_is_refused_by_name(
    form: str, message: str, verify: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = prepared(Finds(form).eval(), pictures(2), pictures(8))
    with pytest.raises(ExportError, match=message):
        mpsearch.export(network, "onnx", tmp_path / "out", verify=verify)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("as_torch_export_answers")
def test_a_detector_that_finds_as_many_boxes_in_everything_is_refused(tmp_path: Path) -> None:
    model = detector()
    model.score_thresh = 1.0
    with pytest.raises(ExportError, match="sizes inside it are the same on every input at hand"):
        mpsearch.export(prepared(model, pictures(2)), "onnx", tmp_path / "out")


def test_boxes_are_compared_in_any_order_and_all_of_them() -> None:
    boxes, labels = torch.tensor([[0.0, 0, 4, 4], [2, 2, 8, 8], [1, 0, 9, 9]]), torch.tensor([1, 2, 1])
    scores = torch.tensor([0.9, 0.8, 0.7])
    ours, empty = (boxes, labels, scores), (boxes[:0], labels[:0], scores[:0])
    order = torch.tensor([2, 0, 1])
    for theirs, largest, same in (
        (tuple(x[order] for x in ours), 0.0, True),
        (tuple(x[:2] for x in ours), 1.0, False),  # the third is of another label than what is nearest
        ((boxes, torch.tensor([1, 1, 1]), scores), 1.0, False),
        ((boxes + 0.45, labels, scores), 0.05, False),
        (empty, 1.0, False),
    ):
        off = difference((*ours, *ours), (*ours, *theirs), images=2)
        assert off[:4].max() == 0
        assert off.max() <= largest + 1e-6
        assert (off.max() > 0) == (largest > 0)
        assert same_answers((*ours, *ours), (*ours, *theirs), 2).tolist() == [True, same]
    assert difference(empty, ours, images=1).tolist() == [1.0]
    assert difference(empty, empty, images=1).tolist() == [0.0]


def test_noise_that_changes_most_boxes_excuses_nothing() -> None:
    boxes = torch.rand(6, 4, generator=torch.Generator().manual_seed(0))
    expected = Reference((boxes,), torch.ones(4, 7), 1.0, images=1)
    assert verification._compared((boxes,), expected, "it", "1").max_difference == 0
    with pytest.raises(VerificationError, match="the median difference"):
        verification._compared((boxes + 1,), expected, "it", "1")


def test_the_images_of_a_batch_are_its_only_list_of_tensors() -> None:
    images, target = pictures(2), {"boxes": torch.ones(1, 4)}
    for batch in (images, (images,), (images, [target, target])):
        assert image_list(batch) is images
    for batch in (images[0], [target], (images, images[0]), {"x": images}, [torch.ones(3)]):
        assert image_list(batch) is None
