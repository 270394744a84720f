"""Checkpoints: what is understood, and what is refused in which words."""

from __future__ import annotations

import argparse
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
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


def old_save(state: Any, path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


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
        lambda state: {"state_dict": prefixed(state, "model."), "epoch": 3, "pytorch-lightning_version": "2.5"},
        lambda state: {"state_dict": prefixed(state, "model.") | {"criterion.weight": torch.ones(3)}},
        lambda state: {"model": prefixed(state, "module._orig_mod.")},
        lambda state: {key.replace("1.", "1._orig_mod.", 1): value for key, value in state.items()},
        lambda state: {"train": {"params": {"encoder": state}}, "step": torch.tensor(3)},
        lambda state: {"best": np.float64(0.9), "epoch": np.int64(3), "state_dict": state},
        lambda state: {"model": state, "args": argparse.Namespace(lr=0.1)},
        lambda state: {"state_dict": state, "state_dict_ema": {k: 0 * v for k, v in state.items()}},
    ],
    ids=[
        "bare",
        "state_dict",
        "model",
        "data-parallel",
        "compiled",
        "old",
        "lightning",
        "loss",
        "both",
        "part",
        "deep",
        "numpy",
        "options",
        "average",
    ],
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


@pytest.mark.parametrize("name", ["a.th", "a.bin", "a.ckpt", "a.pt", "a.PTH", "a.safetensors", "a.v2", "weights"])
@pytest.mark.parametrize("write", [torch.save, save_file, old_save], ids=["zip", "safetensors", "pickle"])
def test_a_checkpoint_is_read_by_its_content_under_any_name(
    trained: nn.Module, tmp_path: Path, write: Callable[[Any, Path], None], name: str
):
    write(trained.state_dict(), tmp_path / name)
    model = network()
    assert load_checkpoint(model, tmp_path / name) == ""
    assert same(model, trained)


def test_safetensors_are_known_whatever_the_length_of_their_header(trained: nn.Module, tmp_path: Path):
    begins = set()
    for length in range(0, 256, 8):
        save_file(trained.state_dict(), tmp_path / "a.pt", metadata={"note": "x" * length})
        begins.add((tmp_path / "a.pt").read_bytes()[:1])
        model = network()
        load_checkpoint(model, tmp_path / "a.pt")
        assert same(model, trained)
    assert b"\x08" in begins  # as ONNX begins


def test_where_the_weights_were_and_what_else_would_fit_is_told(trained: nn.Module, tmp_path: Path):
    state = dict(trained.state_dict())
    torch.save({"state_dict": state, "state_dict_ema": {k: 0 * v for k, v in state.items()}}, tmp_path / "a.pth")
    assert load_checkpoint(network(), tmp_path / "a.pth") == "'state_dict' (not state_dict_ema, which would fit too)"
    torch.save({"state_dict": prefixed(state, "model.") | {"loss.weight": torch.ones(3)}}, tmp_path / "a.pth")
    assert load_checkpoint(network(), tmp_path / "a.pth") == "'state_dict/model.*'"


def test_two_networks_that_fit_are_refused_unless_one_is_usual(trained: nn.Module, tmp_path: Path):
    state = dict(trained.state_dict())
    torch.save({"state_dict": prefixed(state, "student.") | prefixed(state, "teacher.")}, tmp_path / "a.pth")
    message = refusal(network(), tmp_path / "a.pth")
    assert "holds 2 networks that fit, state_dict/student.*, state_dict/teacher.*: save the one" in message


def test_of_two_networks_the_one_of_the_right_shapes_is_taken(trained: nn.Module, tmp_path: Path):
    other = prefixed(dict(network(classes=5).state_dict()), "teacher.")
    torch.save(other | prefixed(dict(trained.state_dict()), "student."), tmp_path / "a.pth")
    model = network()
    load_checkpoint(model, tmp_path / "a.pth")
    assert same(model, trained)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer .* `git lfs pull`"),
        (b"<!DOCTYPE html><html>", "text .*: download the file again"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"\x08\x0a\x12\x07pytorch", "probably ONNX"),
        (b"\x1f\x8b\x08", "compressed by gzip: unpack it"),
    ],
)
def test_another_kind_of_file_is_named_with_what_to_do(tmp_path: Path, content: bytes, said: str):
    (tmp_path / "a.pt").write_bytes(content)
    assert re.search(f"is no checkpoint: it is {said}", refusal(network(), tmp_path / "a.pt"))


def test_a_folder_is_no_checkpoint_and_what_it_holds_is_named(tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").touch()
    assert "it is a folder that holds model.safetensors" in refusal(network(), tmp_path / "model")


def test_a_torchscript_archive_is_refused(trained: nn.Module, tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(trained.eval(), torch.zeros(1, 1, 3, 3)).save(tmp_path / "a.pt")
    assert "TorchScript archive, which holds code" in refusal(network(), tmp_path / "a.pt")


def test_integers_in_the_place_of_float_weights_are_refused_by_name(trained: nn.Module, tmp_path: Path):
    state = dict(trained.state_dict())
    state["0.weight"] = state["0.weight"].to(torch.int8)
    torch.save(state, tmp_path / "a.pt")
    assert "in 1 tensors: 0.weight: int8 instead of float32" in refusal(network(), tmp_path / "a.pt")


def test_half_precision_weights_are_taken(trained: nn.Module, tmp_path: Path):
    torch.save(trained.half().state_dict(), tmp_path / "a.pt")
    model = network()
    load_checkpoint(model, tmp_path / "a.pt")
    assert same(model, trained.float())


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
@pytest.mark.parametrize("content", [b"", b"weights", bytes(range(256)) * 20])
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
    assert "it holds" not in message
    torch.save({"model": state, "optimizer": {"lr": 0.1}, "epoch": 3}, tmp_path / "a.pt")
    message = refusal(network(), tmp_path / "a.pt")
    assert "1 keys are unexpected (head.weight); it holds a dict of model (dict), optimizer (dict), epoch" in message


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
