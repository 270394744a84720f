"""Every export that can be loaded, damaged in every file: an ExportError that names it, never a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mpsearch
from mpsearch.errors import ExportError
from mpsearch.exporters import aimet, brevitas, modelopt, native, packed, torchao
from mpsearch.exporters.packages import need
from mpsearch.graph.layers import inspect_model
from mpsearch.precision import LayerPrecision, PrecisionConfig

X = torch.rand(16, 8, generator=torch.Generator().manual_seed(0))
Load = Callable[[nn.Module, Path], Any]
LOAD: dict[str, tuple[Load, str]] = {  # and the activations that the target holds
    "native": (native.load, "uniform:8"),
    "packed": (packed.load, "uniform:8"),
    "brevitas": (brevitas.load, "uniform:8"),
    "torchao": (torchao.load, "float"),
    "modelopt": (modelopt.load, "uniform:8"),
    "aimet": (lambda model, folder: aimet.load(model, folder, X[:2]), "uniform:8"),
}


def network(out: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, out)).eval()


def exported(target: str, folder: Path) -> tuple[Path, Tensor]:
    """The folder of an export, and what its network answers."""
    try:
        need(target)
    except ExportError as error:
        pytest.skip(str(error))
    model = network()
    layers = inspect_model(model, X).layers
    precision = LayerPrecision.parse("uniform:4", LOAD[target][1])
    quantized = mpsearch.prepare(model, PrecisionConfig({"0": precision, "2": precision}), X, layers).eval()
    mpsearch.export(mpsearch.QuantizedNetwork(quantized, layers, "net", "task", example_input=X[:2]), target, folder)
    return folder, quantized(X).detach()


@pytest.mark.parametrize("target", LOAD)
def test_export_is_loaded_and_answers_the_same(target: str, tmp_path: Path):
    folder, answers = exported(target, tmp_path / "out")
    loaded = LOAD[target][0](network(), folder)
    torch.testing.assert_close(getattr(loaded, "model", loaded)(X), answers, rtol=0, atol=1e-5)


def _another_schema(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": "mpsearch/export/9"}))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "torn": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a list": lambda path: path.write_text("[]"),
    "an empty object": lambda path: path.write_text("{}"),
    "nested": lambda path: path.write_text('{"a":' * 100_000),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("target", LOAD)
def test_every_damage_of_every_file_is_an_export_error_that_names_the_folder(target: str, tmp_path: Path):
    load = LOAD[target][0]
    folder, _ = exported(target, tmp_path / "out")
    for file in sorted(folder.iterdir()):
        whole = file.read_bytes()
        for damage in DAMAGES.values():
            damage(file)
            with pytest.raises(ExportError, match=str(folder)):
                load(network(), folder)
            if file.is_dir():
                file.rmdir()
            file.write_bytes(whole)
    load(network(), folder)


@pytest.mark.parametrize("target", LOAD)
def test_foreign_exports_and_networks_are_refused(target: str, tmp_path: Path):
    load = LOAD[target][0]
    folder, _ = exported(target, tmp_path / "out")
    with pytest.raises(ExportError, match="of another network"):
        load(network(out=5), folder)
    with pytest.raises(ExportError, match="holds no export"):
        load(network(), tmp_path)
    other, _ = exported("packed" if target == "native" else "native", tmp_path / "other")
    with pytest.raises(ExportError, match="holds no export"):
        load(network(), other)
    _another_schema(folder / ("precision.json" if target == "native" else "export.json"))
    with pytest.raises(ExportError, match=r"has schema 'mpsearch/export/9', this mpsearch .* reads 'mpsearch/"):
        load(network(), folder)


def test_an_export_to_another_target_is_refused_by_name(tmp_path: Path):
    folder, _ = exported("packed", tmp_path / "out")
    with pytest.raises(ExportError, match="is an export to 'packed', expected 'brevitas'"):
        brevitas.load(network(), folder)
