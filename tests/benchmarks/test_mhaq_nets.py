"""MHAQ's networks as tasks, on a checkout of stand-ins that have its files' places, names and forms of output."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import mpsearch
from benchmarks.__main__ import main
from benchmarks.mhaq_nets import STUDIES
from benchmarks.mhaq_tasks import rfdn, yolo11n
from mpsearch.errors import TaskError

pytestmark = pytest.mark.study

RFDN = """
from torch import nn

class RFDN(nn.Module):
    def __init__(self, scale=4):
        super().__init__()
        self.fea_conv = nn.Conv2d(3, 8, 3, padding=1)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.upsampler = nn.Sequential(nn.Conv2d(8, 3 * scale**2, 3, padding=1), nn.PixelShuffle(scale))

    def forward(self, x):
        x = self.fea_conv(x)
        return self.upsampler(x + self.middle(x).relu())
"""

YOLO = """
import torch
from torch import nn

class Network(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 32, 1), nn.BatchNorm2d(8), nn.SiLU())
        self.middle = nn.Conv2d(8, 8, 1)
        self.head = nn.Module()
        self.head.out = nn.Conv2d(8, 64 + classes, 1)
        self.head.dfl = nn.Module()
        self.head.dfl.conv = nn.Conv2d(16, 1, 1, bias=False).requires_grad_(False)
        self.head.dfl.conv.weight.data[:] = torch.arange(16.0).view(1, 16, 1, 1)

    def forward(self, x):
        y = self.head.out(self.middle(self.stem(x)))
        if self.training:
            return [y]
        box, cls = y.flatten(2).split([64, y.shape[1] - 64], 1)
        box = self.head.dfl.conv(box.unflatten(1, (4, 16)).transpose(1, 2).softmax(1)).flatten(1, 2)
        return torch.cat([32 * box, cls.sigmoid()], 1)

yolo_v11_n = Network
"""

QUICK = ["task.args.side=32", "task.args.samples=4", "search.trials=6", "search.sampler=nsga2"]
QUICK += ["trial.steps=2", "trial.batch_size=4", "trial.calibration_samples=8"]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    for folder, code in (("src/models/sr/rfdn", RFDN), ("src/models/od", YOLO)):
        (root / folder).mkdir(parents=True)
        (root / folder / "__init__.py").write_text(code)
    (root / "data/models").mkdir(parents=True)
    torch.manual_seed(0)
    names: dict[str, type[torch.nn.Module]] = {}
    exec(RFDN, names)
    torch.save(names["RFDN"]().state_dict(), root / "data/models/RFDN_AIM.pth")
    return root


@pytest.mark.slow
def test_both_networks_are_searched_and_gone_on_with(
    checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    sets = [part for override in QUICK for part in ("--set", override)]
    command = ["mhaq_nets", "--root", str(checkout), "--runs", str(runs), *sets]
    outputs = []
    for arguments in (command, command, ["mhaq_nets", "--print", "--runs", str(runs)]):
        assert main(arguments) == 0
        outputs.append(capsys.readouterr().out.partition("command:")[0])
    assert outputs[0] == outputs[1] == outputs[2]
    assert "psnr, dB" in outputs[0]
    assert "relative_error, %" in outputs[0]
    assert len(mpsearch.front(runs / "rfdn").records) == 6


def test_constants_of_the_box_decoder_stay_float(checkout: Path) -> None:
    study = STUDIES / "mhaq-yolo11n.yaml"
    layers = mpsearch.inspect(study, set=[f"task.args.root={checkout}", *QUICK]).layers.set_index("layer")
    assert "constant" in layers.reason["head.dfl.conv"]
    assert layers.weight["head.dfl.conv"] == ()
    assert layers.reason.drop("head.dfl.conv").isna().all()


def test_relative_error_is_none_of_the_float_network_and_one_of_its_mean(checkout: Path) -> None:
    task = yolo11n(str(checkout), side=32, samples=8, classes=5)

    class Mean(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = task.float_model()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output = self.network(x)
            means = output[:, :4].mean(0), output[:, 4:].logit().mean(0).sigmoid()
            return torch.cat(means).expand_as(output)

    with torch.no_grad():
        assert task.evaluate(task.float_model(), "val") == 0
        assert task.evaluate(Mean(), "val") == pytest.approx(1, rel=1e-3)


def test_the_score_of_upscaling_is_the_mean_psnr_of_patches_by_hand(checkout: Path) -> None:
    task = rfdn(str(checkout), side=16, samples=3)
    _, images = task.batch("val", 3, seed=0)

    class Answers(torch.nn.Conv2d):
        def __init__(self, answers: torch.Tensor) -> None:
            super().__init__(3, 3, 1)
            self.answers = answers

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.answers

    errors = torch.tensor([1.0, 2.0, 10.0])
    middling = images.clamp(16, 239)
    off = middling + errors.view(3, 1, 1, 1) + 0.2  # which 8 bits do not hold
    squares = np.square(middling.numpy() + errors.view(3, 1, 1, 1).numpy() - images.numpy(), dtype=np.float64)
    by_hand = [10 * math.log10(255**2 / image.mean()) for image in squares]
    assert task.evaluate(Answers(off), "val") == pytest.approx(sum(by_hand) / 3, rel=1e-5)
    assert task.evaluate(Answers(images), "val") == pytest.approx(100)
    assert 10 < task.bicubic("val") < 60


def test_probabilities_of_one_compare_too(checkout: Path) -> None:
    task = yolo11n(str(checkout), side=32, samples=8, classes=5)
    model = task.float_model()
    with torch.no_grad():
        model.get_submodule("head.out").bias[64:66] += 100  # type: ignore[index, operator]
        assert task.evaluate(model, "val") > 1
        assert task.logits(model(task.batch("val", 2, 0)[0])).isfinite().all()


def test_wrong_checkouts_are_refused_in_words(checkout: Path) -> None:
    with pytest.raises(TaskError, match="root is missing"):
        rfdn()
    with pytest.raises(TaskError, match="no src/models/od"):
        yolo11n(str(checkout / "data"))
    (checkout / "data/models/RFDN_AIM.pth").write_text("version https://git-lfs")
    with pytest.raises(TaskError, match="Git LFS"):
        rfdn(str(checkout))
