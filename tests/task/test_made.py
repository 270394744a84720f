"""Data that is made here: what it promises, and that studies with it need no folder."""

from __future__ import annotations

import pytest
import torch

from mpsearch.errors import StudyError
from mpsearch.study import DataSpec, PatchesSpec, TaskSpec, load_study
from mpsearch.task.load import load_task
from mpsearch.task.made import MELODIES, SHAPES, SIDE, TOPICS, docstrings, halved, melodies, shapes, tiles

pytestmark = pytest.mark.study


def test_melodies_are_the_same_for_a_seed_and_say_their_notes_in_order() -> None:
    sounds, labels = melodies(40, seed=0)
    again, _ = melodies(40, seed=0)
    other, _ = melodies(40, seed=1)
    assert torch.equal(sounds, again)
    assert not torch.equal(sounds, other)
    assert sounds.shape == (40, 1, 2000)
    assert sounds.abs().max() <= 1
    assert set(labels.tolist()) <= set(range(len(MELODIES)))


def test_shapes_lie_in_their_boxes_and_nowhere_else() -> None:
    pixels, boxes, labels = shapes(30, seed=0)
    assert pixels.shape == (30, 3, SIDE, SIDE)
    for picture, its_boxes, its_labels in zip(pixels.float(), boxes, labels, strict=True):
        assert len(its_boxes) == len(its_labels) > 0
        assert its_labels.min() >= 1
        assert its_labels.max() <= len(SHAPES)
        outside = torch.ones(SIDE, SIDE, dtype=torch.bool)
        for x1, y1, x2, y2 in its_boxes.round().int().tolist():
            assert 0 <= x1 < x2 <= SIDE
            assert 0 <= y1 < y2 <= SIDE
            outside[max(0, y1 - 1) : y2 + 1, max(0, x1 - 1) : x2 + 1] = False
        # What is outside of all boxes is the ground and noise of 0.05.
        assert picture[:, outside].std(dim=1).max() < 255 * 0.07


def test_docstrings_are_of_every_topic_and_no_two_are_the_same() -> None:
    rows = docstrings()
    assert {package for _, package in rows} == set(TOPICS)
    assert len({text for text, _ in rows}) == len(rows) > 1000


def test_tiles_cut_an_image_and_halving_is_the_mean() -> None:
    image = torch.arange(2 * 5 * 4, dtype=torch.uint8).reshape(2, 5, 4)
    squares = tiles(image, 2)
    assert squares.shape == (4, 2, 2, 2)
    assert squares[1, 0].tolist() == [[2, 3], [6, 7]]
    assert halved(squares, 2)[1, 0].tolist() == [[4]]  # 4.5, to even


@pytest.mark.parametrize("name", ["keyword-tones", "super-resolution"])
def test_the_task_of_a_study_answers_as_its_targets_are(name: str) -> None:
    task = load_task(load_study(name, ["task.float_epochs=1"]).task)
    x, target = next(task.train_batches(4, 1, 0))
    output = task.float_model()(x) if name == "super-resolution" else None
    if output is not None:
        assert output.shape == target.shape == (4, 3, 32, 32)
        assert 25 < task.evaluate(task.float_model(), "val") < 60
    else:
        assert x.shape == (4, 1, 2000)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{kind: melodies, root: here}", "melodies reads no file|melodies reads no folder"),
        ("{kind: audio}", "give `root`"),
        ("{kind: melodies, rate: 8000}", "leave `rate` and `seconds` out"),
        ("{kind: shapes, root: here}", "shapes reads no folder"),
        ("{kind: coco}", "give `root`"),
        ("{kind: docstrings, root: here}", "docstrings reads no file"),
        ("{kind: patches, side: 33}", "multiple of `scale`"),
    ],
)
def test_data_that_contradicts_itself_is_refused(
    data: str, message: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("study") / "study.yaml"
    path.write_text(f"name: s\ntask: {{model: wave_cnn, data: {data}}}\nspace: uniform\n")
    with pytest.raises(StudyError, match=message):
        load_study(path)


def test_squares_of_ones_own_images_are_read_by_split(tmp_path_factory: pytest.TempPathFactory) -> None:
    from PIL import Image

    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 3), ("val", 1), ("test", 1)):
        (root / split).mkdir()
        for i in range(count):
            Image.new("RGB", (16, 8), (40 * i, 0, 255)).save(root / split / f"{i}.png")
    spec = TaskSpec(model="espcn", data=PatchesSpec(kind="patches", root=str(root), side=8), float_epochs=1)
    task = load_task(spec)
    assert task.steps_per_epoch(2) == 3  # 3 images of 2 squares
    assert not isinstance(spec.data, DataSpec)
