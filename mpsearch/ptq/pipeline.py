"""Post-training quantization in the order that the white paper recommends (arXiv 2106.08295, §3.6, figure 6):

    fold BatchNorm -> equalize -> weight ranges -> AdaRound, or bias correction -> activation ranges

Each stage is a function from model to model, or one that fills in what the quantized model still lacks. With data the
rounding is learned; without any, ranges and bias correction come from BatchNorm statistics, which only needs a model
that torch.fx can trace.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import nn

from mpsearch.errors import PrecisionError, TaskError, nearest
from mpsearch.graph.attention import open_attention
from mpsearch.graph.facts import LayerInfo
from mpsearch.graph.kinds import kind_of
from mpsearch.graph.products import named_products
from mpsearch.metric import Metric
from mpsearch.precision import LayerPrecision, Precision, PrecisionConfig, per_tensor
from mpsearch.ptq.adaround import STEPS, adaround, input_of
from mpsearch.ptq.bias import correct_bias_analytically, correct_bias_empirically
from mpsearch.ptq.equalize import equalize
from mpsearch.ptq.flow import Normal, trace
from mpsearch.ptq.fold import FloatNet, fold_batch_norms, structure_of
from mpsearch.ptq.ranges import cross_entropy_range, min_max_step, normal_range, range_to_grid
from mpsearch.quant.network import QuantizedNetwork
from mpsearch.quant.prepare import (
    check_names,
    insert_quantizers,
    inspect_network,
    quant_layers,
    sample_factors,
    weight_rows,
)
from mpsearch.quant.ranges import activation_range, weight_step
from mpsearch.train import timed

Rounding = Literal["adaround", "nearest"]
BiasCorrection = Literal["none", "analytic", "empirical"]
RangeMethod = Literal["mse", "min_max"]
LogitsRange = Literal["same", "cross_entropy"]

UNIT_INPUT = (0.0, 0.5)
"""Mean and deviation assumed of a model's input where there is no data: six deviations span [-3, 3], which holds
normalized images."""


@dataclass(frozen=True)
class PtqMethod:
    """What the pipeline does; what is None is as the white paper recommends.

    With data: AdaRound and no bias correction, or analytic correction where the rounding is nearest. Without: nearest
    rounding and analytic correction.
    """

    equalize: bool = True
    replace_relu6: bool = True
    weight_range: RangeMethod = "mse"
    rounding: Rounding | None = None
    adaround_steps: int = STEPS
    bias_correction: BiasCorrection | None = None
    activation_range: RangeMethod = "mse"  # with data; without, ranges come from BatchNorm
    logits_range: LogitsRange = "same"  # of the input of the last layer

    def resolved(self, data_free: bool) -> PtqMethod:
        """This with nothing left open.

        Raises:
            PrecisionError: a choice that does not exist, needs data that there is not, or excludes another.
        """
        for name, kinds in (
            ("rounding", Rounding),
            ("bias_correction", BiasCorrection),
            ("weight_range", RangeMethod),
            ("activation_range", RangeMethod),
            ("logits_range", LogitsRange),
        ):
            value = getattr(self, name)
            if value is not None and value not in get_args(kinds):
                raise PrecisionError(f"unknown {name} '{value}': {nearest(value, get_args(kinds))}")
        nearest_fits = data_free or self.bias_correction not in (None, "none")
        rounding: Rounding = self.rounding or ("nearest" if nearest_fits else "adaround")
        correction: BiasCorrection = self.bias_correction or ("analytic" if rounding == "nearest" else "none")
        needs_data = [
            name
            for name, needs in (
                ("adaround", rounding == "adaround"),
                ("empirical bias correction", correction == "empirical"),
                ("the cross-entropy range", self.logits_range == "cross_entropy"),
            )
            if needs
        ]
        if data_free and needs_data:
            raise PrecisionError(f"{needs_data[0]} needs calibration data: give some, or leave it out")
        if rounding == "adaround" and correction != "none":
            raise PrecisionError(
                f"adaround and {correction} bias correction do not go together: AdaRound's rounding already minimizes "
                "the error of the output, its mean included; choose rounding nearest, or bias correction none"
            )
        return replace(self, rounding=rounding, bias_correction=correction)


@dataclass(frozen=True)
class PtqResult:
    """A quantized model, and how it came about."""

    model: nn.Module  # in eval mode
    layers: tuple[LayerInfo, ...]
    config: PrecisionConfig
    method: PtqMethod  # with nothing left open
    net: FloatNet  # the float model after folding and equalization: what the quantized model stands for
    seconds: dict[str, float] = field(default_factory=dict)  # by stage
    notes: tuple[str, ...] = ()  # what was left out and why, in words

    def network(self, *, name: str, task: str, metric: Metric, score: Mapping[str, float | None]) -> QuantizedNetwork:
        """What `mpsearch.export` takes."""
        structure = structure_of(self.net, self.model)
        return QuantizedNetwork(self.model, self.layers, name, task, metric, score, structure=structure)


def ptq(
    model: nn.Module,
    config: PrecisionConfig | LayerPrecision,
    calibration_input: Any | None = None,
    method: PtqMethod | None = None,
) -> PtqResult:
    """Quantize a trained network without training it; `model` itself is left untouched.

    Args:
        model: the float model.
        config: a precision for each quantizable layer, or one for all of them.
        calibration_input: a batch of model input, some 500 samples, no labels; None: the data-free mode.
        method: which stages, and how.

    Raises:
        PrecisionError: the config does not fit the model, or the method does not fit itself.
        TaskError: the model cannot be inspected, or not be quantized without data.
    """
    method = (method or PtqMethod()).resolved(data_free=calibration_input is None)
    seconds: dict[str, float] = {}
    with timed(seconds, "inspect"):
        layers, seen = _layers(model, calibration_input, named_products(config) if isinstance(config, Mapping) else [])
    with timed(seconds, "fold"):
        net = fold_batch_norms(model, layers, calibration_input)
    if method.equalize:
        with timed(seconds, "equalize"):
            net = equalize(net, method.replace_relu6, calibration_input)
    notes = [*seen, *net.notes]
    with timed(seconds, "weight_ranges"):
        inputs = _distributions(net)
        if calibration_input is None:
            layers = _with_signs(layers, inputs)
        quantized = insert_quantizers(net.model, layers)
        config = _config(config, quantized)
        set_weight_ranges(quantized, config, method.weight_range)
    if method.rounding == "adaround":
        with timed(seconds, "adaround"):
            left = adaround(quantized, net.model, calibration_input, method.adaround_steps)
            notes += [f"{name} keeps the nearest rounding: AdaRound treats linear, conv1d and conv2d" for name in left]
    if method.bias_correction != "none":
        with timed(seconds, "bias_correction"):
            if method.bias_correction == "empirical":
                correct_bias_empirically(quantized, net.model, calibration_input)
            else:
                left = correct_bias_analytically(quantized, inputs)
                notes += [f"the bias of {name} is not corrected: no statistics of its input" for name in left]
    with timed(seconds, "activation_ranges"):
        if calibration_input is None:
            set_normal_ranges(quantized, config, inputs)
        else:
            set_activation_ranges(quantized, config, calibration_input, method.activation_range)
        if method.logits_range == "cross_entropy":
            last = [layer.name for layer in layers if layer.reason is None][-1]
            set_logits_range(quantized, last, config[last].activation, calibration_input)
    return PtqResult(quantized.eval(), layers, config, method, net, seconds, tuple(notes))


@torch.no_grad()
def set_weight_ranges(model: nn.Module, config: PrecisionConfig, method: RangeMethod = "mse") -> None:
    """Quantize the weights of a model that has quantizers, in place; its activations stay float."""
    search = {"mse": weight_step, "min_max": min_max_step}[method]
    for name, layer in quant_layers(model).items():
        if not layer.has_weight:
            continue
        layer.weight_quantizer.set_precision(config[name].weight)
        if not config[name].weight.is_float:
            layer.weight_quantizer.set_range(search(weight_rows(layer), config[name].weight))


@torch.no_grad()
def set_activation_ranges(
    model: nn.Module, config: PrecisionConfig, calibration_input: Any, method: RangeMethod = "mse"
) -> None:
    """Quantize activations, both factors of products among them, in place, by what flows through the model as it is."""
    layers = quant_layers(model)
    inputs, seconds = sample_factors(model, list(layers), calibration_input)
    activations = [
        (layer.input_quantizer, config[name].activation, inputs[name])
        for name, layer in layers.items()
        if kind_of(layer) != "embedding"
    ]
    activations += [
        (layers[name].weight_quantizer, per_tensor(config[name].weight), values) for name, values in seconds.items()
    ]
    for quantizer, precision, values in activations:
        if precision.is_float:
            continue
        if method == "mse":
            grid = activation_range(values, precision, signed=quantizer.beta is not None)
        else:
            grid = range_to_grid(float(values.min()), float(values.max()), precision)
        quantizer.set_precision(precision)
        quantizer.set_range(*grid)


@torch.no_grad()
def set_normal_ranges(model: nn.Module, config: PrecisionConfig, inputs: dict[str, Normal]) -> None:
    """Quantize the activations of a model, in place, by how its layers' inputs are distributed: no data.

    Raises:
        TaskError: a layer's input has no known distribution.
    """
    for name, layer in quant_layers(model).items():
        precision = config[name].activation
        if precision.is_float:
            continue
        if name not in inputs:
            raise TaskError(
                f"nothing is known of the input of layer '{name}' without data: no BatchNorm stands before it, or what "
                "lies between is not understood; give calibration data"
            )
        layer.input_quantizer.set_precision(precision)
        layer.input_quantizer.set_range(*normal_range(inputs[name], precision))


@torch.no_grad()
def set_logits_range(model: nn.Module, name: str, precision: Precision, calibration_input: Any) -> None:
    """Set the input range of layer `name`, which makes the logits, by their cross-entropy, in place.

    Nothing changes where its input stays float, or where it is not linear.
    """
    layer = quant_layers(model)[name]
    if kind_of(layer) == "linear" and not precision.is_float:
        x = input_of(model, name, calibration_input)
        layer.input_quantizer.set_range(*cross_entropy_range(layer, x, precision))


def _layers(
    model: nn.Module, calibration_input: Any | None, products: Sequence[str]
) -> tuple[tuple[LayerInfo, ...], tuple[str, ...]]:
    """The layers, products among them as they are named, and in words what is to be known of them."""
    if calibration_input is not None:
        graph = inspect_network(model, calibration_input, products=products or False)
        return graph.layers, graph.notes
    if products:
        raise TaskError(
            f"'{products[0]}' is a product of two activations, of which nothing is known without data: give "
            "calibration data, or a config without products"
        )
    flow = trace(copy.deepcopy(open_attention(model)).eval())
    layers = () if flow is None else flow.layers()
    if flow is None or all(layer.reason is not None for layer in layers):
        raise TaskError(
            f"{type(model).__name__} cannot be quantized without data: torch.fx "
            + ("cannot trace it" if flow is None else "finds no layer in it that can be quantized")
            + "; give calibration data"
        )
    stay = (f"{layer.name} stays float: {layer.reason}" for layer in layers if layer.reason is not None)
    return layers, (*stay, *flow.notes())


def _distributions(net: FloatNet) -> dict[str, Normal]:
    flow = trace(net.model)
    return {} if flow is None else flow.input_distributions(net.outputs, UNIT_INPUT)


def _with_signs(layers: Sequence[LayerInfo], inputs: dict[str, Normal]) -> tuple[LayerInfo, ...]:
    """The layers with whether their input takes negative values, as far as its distribution tells."""
    return tuple(
        replace(layer, signed_input=layer.name not in inputs or inputs[layer.name].extent()[0] < 0) for layer in layers
    )


def _config(config: PrecisionConfig | LayerPrecision, quantized: nn.Module) -> PrecisionConfig:
    layers = quant_layers(quantized)
    if isinstance(config, LayerPrecision):
        config = PrecisionConfig.uniform(layers, config)
    check_names(config, layers)
    for name, precision in config.items():
        for kind in (precision.weight.quantizer, precision.activation.quantizer):
            if kind not in ("uniform", "float"):
                raise PrecisionError(f"layer '{name}' is to be {kind}: PTQ has the uniform quantizer only")
    return config
