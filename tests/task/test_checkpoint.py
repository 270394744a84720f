"""Checkpoints: what is understood, and what is refused in which words."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mpsearch.errors import TaskError
from mpsearch.task.checkpoint import load_checkpoint


def network(classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, classes))


@pytest.fixture
def trained() -> nn.Module:
    torch.manual_seed(1)
    return network()


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"epoch": 3, "state_dict": state},
        lambda state: {"model": state, "optimizer": {"lr": 0.1}},
        lambda state: prefixed(state, "module."),
        lambda state: {"state_dict": prefixed(state, "_orig_mod.")},
        lambda state: {k: v for k, v in state.items() if "num_batches" not in k},
    ],
    ids=["bare", "state_dict", "model", "data-parallel", "compiled", "old"],
)
def test_checkpoints_of_usual_forms_are_loaded(trained: nn.Module, tmp_path: Path, wrap: Any):
    torch.save(wrap(dict(trained.state_dict())), tmp_path / "a.pth")
    model = network()
    load_checkpoint(model, tmp_path / "a.pth")
    assert same(model, trained)


def test_safetensors_are_loaded(trained: nn.Module, tmp_path: Path):
    save_file(trained.state_dict(), tmp_path / "a.safetensors")
    model = network()
    load_checkpoint(model, tmp_path / "a.safetensors")
    assert same(model, trained)


def refusal(model: nn.Module, path: Path) -> str:
    with pytest.raises(TaskError) as caught:
        load_checkpoint(model, path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path):
    assert "no checkpoint" in refusal(network(), tmp_path / "gone.pt")


def test_another_ending_is_refused(tmp_path: Path):
    (tmp_path / "a.onnx").write_bytes(b"x")
    assert "ends in '.onnx': give a .pt, .pth or .safetensors" in refusal(network(), tmp_path / "a.onnx")


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", bytes(range(256)) * 20])
def test_a_damaged_file_is_said_to_be_damaged(tmp_path: Path, ending: str, content: bytes):
    path = tmp_path / f"a.{ending}"
    path.write_bytes(content)
    assert "it is damaged" in refusal(network(), path)


def test_half_a_file_is_said_to_be_damaged(trained: nn.Module, tmp_path: Path):
    path = tmp_path / "a.pt"
    torch.save(trained.state_dict(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "it is damaged" in refusal(network(), path)


class _Runs:
    """A pickle that makes a file when it is read carelessly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path: Path, zipped: bool):
    evidence = tmp_path / "it-ran"
    torch.save({"w": _Runs(evidence)}, tmp_path / "evil.pt", _use_new_zipfile_serialization=zipped)
    assert "refused: it holds `posix.mkdir`" in refusal(network(), tmp_path / "evil.pt")
    assert not evidence.exists()


def test_a_whole_pickled_model_is_refused_with_the_way_out(trained: nn.Module, tmp_path: Path):
    torch.save(trained, tmp_path / "a.pt")
    message = refusal(network(), tmp_path / "a.pt")
    assert "torch.nn.modules.container.Sequential" in message
    assert "save `model.state_dict()`" in message


def test_a_file_without_a_state_dict_says_what_it_holds(tmp_path: Path):
    torch.save({"epoch": 3, "history": [1.0]}, tmp_path / "a.pt")
    assert "holds a dict of epoch (int), history (list)" in refusal(network(), tmp_path / "a.pt")


def test_keys_that_do_not_match_are_counted_and_named(trained: nn.Module, tmp_path: Path):
    state = dict(trained.state_dict())
    state["head.weight"] = state.pop("3.weight")
    torch.save(state, tmp_path / "a.pt")
    message = refusal(network(), tmp_path / "a.pt")
    assert "1 of the model's 9 keys are missing (3.weight), 1 keys are unexpected (head.weight)" in message


def test_another_number_of_classes_is_named_as_a_shape(tmp_path: Path):
    torch.save(network(classes=5).state_dict(), tmp_path / "a.pt")
    message = refusal(network(classes=3), tmp_path / "a.pt")
    assert "3.weight: (5, 4) instead of (3, 4)" in message
    assert "another number of classes" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(trained: nn.Module, tmp_path: Path, value: float):
    state = dict(trained.state_dict())
    state["0.weight"] = state["0.weight"].clone()
    state["0.weight"][0, 0, 0, 0] = value
    torch.save(state, tmp_path / "a.pt")
    assert "NaN or infinite values in 1 tensors: 0.weight" in refusal(network(), tmp_path / "a.pt")
