"""A LightningModule and its DataModule as a task; without Lightning where nothing is trained."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mpsearch.errors import TaskError
from mpsearch.study import TaskSpec
from mpsearch.task.load import load_task
from mpsearch.task.scoring import measure


class Lit(nn.Module):
    """As a LightningModule is to those who do not train it."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, 2))

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.model(x), y)

    def twice(self, output: Tensor, target: Tensor) -> Tensor:
        return 2 * nn.functional.cross_entropy(output, target)


class Data:
    """Points on either side of a line."""

    def __init__(self, count: int = 64) -> None:
        self.count, self.stages = count, []

    def setup(self, stage: str) -> None:
        self.stages.append(stage)

    def train_dataloader(self) -> Any:
        x = torch.randn(self.count, 2, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, (x.sum(dim=1) > 0).long()), batch_size=8, shuffle=True)

    val_dataloader = test_dataloader = train_dataloader


class NoTest(Data):
    test_dataloader = None  # type: ignore[assignment]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lit_of_tests", sys.modules[__name__])


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    torch.manual_seed(1)
    torch.save({"epoch": 3, "state_dict": Lit().state_dict()}, tmp_path / "last.ckpt")
    return str(tmp_path / "last.ckpt")


def task(**args: Any) -> Any:
    usual = {"module": "lit_of_tests:Lit", "data": "lit_of_tests:Data", "metric": "top1"}
    return load_task(TaskSpec(factory="lightning", args=usual | args))


def test_a_checkpoint_of_lightning_gives_the_network_inside_the_module(checkpoint: str) -> None:
    of = task(checkpoint=checkpoint)
    model = of.float_model().requires_grad_(False)
    torch.manual_seed(1)
    assert all(map(torch.equal, model.state_dict().values(), Lit().model.state_dict().values()))
    assert (of.name, of.metric.name) == ("Lit/Data", "top1")
    x, y = next(of.train_batches(16, 1, 0))
    assert measure(of, model, "val").values is not None
    assert of.loss(model(x), y) == pytest.approx(float(nn.functional.cross_entropy(model(x), y)))
    assert task(checkpoint=checkpoint, loss="twice").loss(model(x), y) == pytest.approx(2 * float(of.loss(model(x), y)))
    assert of._own._data.stages == ["fit", "test"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"modul": "x"}, "modul: no such key; did you mean 'module'"),
        ({"metric": "top_1"}, r"task\.args\.metric: nothing is known of the metric 'top_1'"),
        ({"module": "lit_of_tests:Data"}, "gave a Data without training_step: expected a LightningModule"),
        ({"data": "lit_of_tests:Lit"}, "gave a Lit without train_dataloader: expected a LightningDataModule"),
        ({"network": "body"}, "the module has no network 'body': it holds model"),
        ({"loss": "thrice"}, "the module has no method 'thrice'"),
        ({"metric": "map"}, "nothing is known of the loss that goes with map"),
    ],
)
def test_what_is_wrong_with_the_arguments_is_told(args: Any, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        task(**args)


def test_a_split_that_is_missing_is_named(checkpoint: str) -> None:
    of = task(checkpoint=checkpoint, data="lit_of_tests:NoTest")
    with pytest.raises(TaskError, match=r"test_dataloader\(\) gave a NoneType, expected a DataLoader"):
        measure(of, of.float_model(), "test")


LIT = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import lightning

class Lit(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))
    def training_step(self, batch, index):
        x, y = batch
        return nn.functional.cross_entropy(self.model(x), y)
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.02)

class Data(lightning.LightningDataModule):
    def train_dataloader(self):
        x = torch.randn(256, 2, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, (x.sum(dim=1) > 0).long()), batch_size=16, shuffle=True)
    val_dataloader = test_dataloader = train_dataloader
"""


def test_lightning_trains_the_float_network_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning", reason="a task for those who have Lightning")
    (tmp_path / "lit_on_disk.py").write_text(LIT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    args = {"module": "lit_on_disk:Lit", "data": "lit_on_disk:Data", "epochs": 8}
    first = task(**args)
    assert measure(first, first.float_model(), "val").score > 0.95
    assert "trained in" in first.float_model_source
    again = task(**args)
    assert measure(again, again.float_model(), "val").score > 0.95
    assert "trained before" in again.float_model_source
