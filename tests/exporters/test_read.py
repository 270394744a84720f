"""Configs made elsewhere are read back: exports of ours, AIMET encodings, tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import mpsearch
from mpsearch.errors import ExportError, PrecisionError
from mpsearch.exporters.read import complete, read_config
from mpsearch.graph.layers import inspect_model
from mpsearch.precision import LayerPrecision, PrecisionConfig

CONFIG = PrecisionConfig(
    {
        "0": LayerPrecision.parse("uniform:4", "uniform:8"),
        "2": LayerPrecision.parse("uniform:2/tensor", "float"),
        "3": LayerPrecision.parse("float", "float"),
    }
)


def write(path: Path, document: object) -> Path:
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


@pytest.mark.parametrize("to", ["native", "packed"])
def test_exports_of_ours_come_back(to: str, tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(8, 4)
    layers = inspect_model(model, x).layers
    network = mpsearch.QuantizedNetwork(mpsearch.prepare(model, CONFIG, x, layers), layers, "net", "noise")
    assert read_config(mpsearch.export(network, to, tmp_path / "out").path) == CONFIG


def test_aimet_encodings_come_back(tmp_path: Path) -> None:
    encoding = {"bitwidth": 4, "dtype": "int", "is_symmetric": "True", "offset": -8, "scale": 0.1}
    document = {
        "version": "0.6.1",
        "param_encodings": {"0.weight": [encoding] * 4, "2.weight": [{**encoding, "bitwidth": 2}]},
        "activation_encodings": {
            "0": {"input": {"0": {**encoding, "bitwidth": 8}}, "output": {"0": encoding}},
            "1": {"output": {"0": encoding}},
        },
    }
    config = read_config(write(tmp_path / "x.encodings", document))
    assert complete(config, ["0", "2", "3"]) == CONFIG
    document["activation_encodings"] = [{"name": "tensor", "bw": 8}]  # type: ignore[assignment]
    with pytest.raises(ExportError, match=r"version '0\.6\.1', which name tensors and not layers"):
        read_config(write(tmp_path / "new.encodings", document))


def test_our_aimet_export_is_an_aimet_import(tmp_path: Path) -> None:
    from mpsearch.exporters import aimet

    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(8, 4)
    layers = inspect_model(model, x).layers
    network = mpsearch.QuantizedNetwork(mpsearch.prepare(model, CONFIG, x, layers), layers, "net", "noise")
    aimet.save(network, tmp_path)
    assert complete(read_config(tmp_path / "aimet.encodings"), ["0", "2", "3"]) == CONFIG


def test_tables_are_read_in_json_and_yaml(tmp_path: Path) -> None:
    table = "conv1: {weight_bit_width: 4, input_bit_width: 8}\nlayer1.conv: 3\nfc: {input_bit_width: 6}\n"
    expected = PrecisionConfig(
        {
            "conv1": LayerPrecision.parse("uniform:4", "uniform:8"),
            "layer1.conv": LayerPrecision.parse("uniform:3", "float"),
            "fc": LayerPrecision.parse("float", "uniform:6"),
        }
    )
    assert read_config(write(tmp_path / "table.yaml", table)) == expected


@pytest.mark.parametrize(
    ("document", "error", "words"),
    [
        ({"conv1": "four"}, ExportError, "layer 'conv1' has 'four'"),
        ({"conv1": {"bits": 4}}, ExportError, "input_bit_width and weight_bit_width"),
        ({"conv1": 17}, PrecisionError, "layer 'conv1': uniform has no 17-bit form"),
        ({"conv1": {"weight_bit_width": 4.0}}, PrecisionError, "whole number"),
        ([1, 2], ExportError, "no table of layers"),
        ({"param_encodings": {"a.weight": [{}]}}, ExportError, "layer 'a' are not of AIMET's format"),
    ],
)
def test_what_cannot_be_read_is_named(document: object, error: type[Exception], words: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=words):
        read_config(write(tmp_path / "x.json", document))


def test_unknown_layers_and_empty_places_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="'convl', which is no quantizable layer here: did you mean 'conv1'"):
        complete(PrecisionConfig({"convl": CONFIG["0"]}), ["conv1", "fc"])
    with pytest.raises(ExportError, match=r"holds neither precision\.json nor export\.json"):
        read_config(tmp_path)
    with pytest.raises(ExportError, match="cannot read"):
        read_config(tmp_path / "nothing.json")
