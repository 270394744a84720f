"""A trained network on digits, quantized in any way a test asks for, and a thousand images to compare outputs on."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

import pytest
from torch import Tensor, nn

import mpsearch
from mpsearch.graph.facts import ModelGraph
from mpsearch.graph.layers import inspect_model
from mpsearch.precision import LayerPrecision, PrecisionConfig
from mpsearch.study import load_study
from mpsearch.task.load import load_task

Quantize = Callable[..., mpsearch.QuantizedNetwork]


@pytest.fixture(scope="session")
def digits(cache: object) -> tuple[nn.Module, Tensor, ModelGraph]:
    """The float network, 1,000 images, and its layers."""
    task = load_task(load_study("digits").task)
    model, images = task.float_model(), task.calibration_input(1000)
    assert len(images) == 1000
    return model, images, inspect_model(model, images[:64])


@pytest.fixture
def quantize(digits: tuple[nn.Module, Tensor, ModelGraph]) -> Quantize:
    """`quantize("uniform:4", "uniform:8")`: weights and activations, given round robin to the layers."""
    model, images, graph = digits

    def make(weights: list[str], activations: list[str]) -> mpsearch.QuantizedNetwork:
        names = [layer.name for layer in graph.quantizable]
        pairs = zip(names, cycle(weights), cycle(activations), strict=False)
        config = PrecisionConfig({name: LayerPrecision.parse(weight, act) for name, weight, act in pairs})
        prepared = mpsearch.prepare(model, config, images[:256], graph.layers).eval()
        return mpsearch.QuantizedNetwork(prepared, graph.layers, "digits_cnn", "digits", example_input=images[:2])

    return make
