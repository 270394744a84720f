"""Putting quantizers into a model, and setting what precision each layer has.

Structure and precision are separate steps, because a search does the first once and the second for every trial:

    model = insert_quantizers(float_model, layers)    # QuantConv2d for Conv2d, ...; everything still float
    ranges = RangeSetter(float_model, layers, batch)  # remembers activation samples, and each range it has searched
    set_precision(model, config, ranges)              # bits and ranges, in place: nothing is rebuilt or recompiled

`prepare` does all three for those who want one model.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn

from mpsearch.errors import PrecisionError, TaskError, nearest
from mpsearch.graph.agreement import Original, largest_subset, result_points
from mpsearch.graph.facts import LayerInfo, ModelGraph
from mpsearch.graph.inputs import call, evaluating, factors, layer_input
from mpsearch.graph.layers import inspect_model
from mpsearch.graph.products import Product, named_products, opened
from mpsearch.precision import Offer, Precision, PrecisionConfig, per_tensor
from mpsearch.private.torch import without_compiled_prefix
from mpsearch.quant.modules import UNIFORM, QuantLayer, quantized
from mpsearch.quant.ranges import activation_range, weight_step

ACTIVATION_SAMPLES = 16_384
"""Values kept of each layer's input for range setting."""


def insert_quantizers(
    model: nn.Module, layers: Sequence[LayerInfo], offers: Mapping[str, Offer] = MappingProxyType({})
) -> nn.Module:
    """A copy of `model` whose quantizable layers are quantized layers at float precision: it computes the same.

    Layers with a `reason` are left as they are. A module used under two names stays one module. See `opened`.

    Args:
        model: the float model.
        layers: its layers.
        offers: layer name -> the quantizer types that it can switch between; only uniform where none are given.
    """
    model = copy.deepcopy(opened(model, [layer.name for layer in layers if layer.reason is None]))
    modules = dict(model.named_modules())
    home = next((parameter.device for parameter in model.parameters()), None)  # of products, which have no weight
    for layer in layers:
        if layer.reason is not None:
            continue
        twin = quantized(
            modules[layer.name],
            signed_input=layer.signed_input and not layer.looks_up,
            input_elements=math.prod(layer.input_shape),
            offer=offers.get(layer.name, UNIFORM),
            signed_second=layer.signed_second,
            second_elements=math.prod(layer.second_shape),
        )
        device = cast(Tensor, twin.weight).device if twin.has_weight else home
        twin.weight_quantizer.to(device)
        twin.input_quantizer.to(device)
        for parent, name in places(model, modules[layer.name]):
            setattr(parent, name, twin)
    return model


def inspect_network(
    model: nn.Module,
    calibration_input: Any,
    batch_size: int | None = None,
    products: bool | Collection[str] = False,
) -> ModelGraph:
    """`inspect_model`, and a check of what follows from it: with quantizers at float precision it computes the same.

    A layer for which this does not hold stays float, with that as its reason. Arguments and errors as there.
    """
    graph = inspect_model(model, calibration_input, batch_size, products)
    original = Original(model, calibration_input, result_points(graph.layers))

    def same(some: Sequence[LayerInfo]) -> bool:
        return original.holds(insert_quantizers(model, some))

    names = {layer.name for layer in largest_subset(graph.quantizable, same)}
    if len(names) == len(graph.quantizable):
        return graph
    why = "with quantizers in it, at float precision, the network does not answer as before"
    layers = tuple(
        replace(layer, reason=layer.reason or why) if layer.name not in names else layer for layer in graph.layers
    )
    notes = [f"{layer.name} stays float: {why}" for layer in layers if layer.reason == why]
    graph = replace(graph, layers=layers, notes=(*graph.notes, *notes))
    if not graph.quantizable:
        raise TaskError(f"no layer of {type(model).__name__} can be quantized: {why}")
    return graph


def quant_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """The quantized layers of a model by name; names are the same whether or not the model is compiled."""
    return {without_compiled_prefix(n): m for n, m in model.named_modules() if isinstance(m, QuantLayer)}


class RangeSetter:
    """MSE range setting for the layers of one float model; every range is searched once and remembered.

    Args:
        model: the float model.
        layers: its layers.
        calibration_input: a batch of model input; activations are sampled from one forward pass over it.
    """

    def __init__(self, model: nn.Module, layers: Sequence[LayerInfo], calibration_input: Any) -> None:
        self._signed = {layer.name: layer.signed_input for layer in layers if layer.reason is None}
        self._inputs, self._seconds = sample_factors(model, list(self._signed), calibration_input)
        self._signed_second = {layer.name: layer.signed_second for layer in layers}
        self._second: dict[tuple[str, Precision], tuple[Tensor, Tensor]] = {}
        self._activation: dict[tuple[str, Precision], tuple[Tensor, Tensor]] = {}
        self._weight: dict[tuple[str, Precision], tuple[Tensor, Tensor]] = {}

    def samples(self, name: str) -> Tensor:
        """Values `(n,)` that a layer's input takes on the calibration input."""
        return self._inputs[name]

    def seconds(self, name: str) -> Tensor:
        """Values `(n,)` that the second factor of a product takes on the calibration input."""
        return self._seconds[name]

    def second(self, name: str, precision: Precision) -> tuple[Tensor, Tensor]:
        """Step and offset of the second factor of a product, both of shape (); it has one scale in any case."""
        key = (name, per_tensor(precision))
        if key not in self._second:
            signed = self._signed_second[name]
            self._second[key] = activation_range(self._seconds[name], key[1], signed=signed)
        return self._second[key]

    def for_weight(self, name: str, precision: Precision, layer: QuantLayer) -> tuple[Tensor, ...]:
        """The range of `layer.weight_quantizer`: the step of a weight, or step and offset of a second factor."""
        if not layer.has_weight:
            return self.second(name, precision)
        return (self.weight(name, precision, weight_rows(layer)),)

    def activation(self, name: str, precision: Precision) -> tuple[Tensor, Tensor]:
        """Step and offset of a layer's input, both of shape ()."""
        key = (name, precision)
        if key not in self._activation:
            self._activation[key] = activation_range(self._inputs[name], precision, signed=self._signed[name])
        return self._activation[key]

    def ends(self, name: str) -> tuple[float, float]:
        """The smallest and the largest value seen of a layer's input."""
        return float(self._inputs[name].min()), float(self._inputs[name].max())

    def weight(self, name: str, precision: Precision, rows: Tensor) -> Tensor:
        """Step of a layer's weight `rows` (channels, n): searched anew only if the weight is not the one seen last."""
        key = (name, precision)
        seen = self._weight[key][0] if key in self._weight else None
        if seen is None or seen.device != rows.device or not torch.equal(seen, rows):
            self._weight[key] = (rows.detach().clone(), weight_step(rows, precision))
        return self._weight[key][1]


@torch.no_grad()
def set_precision(model: nn.Module, config: PrecisionConfig, ranges: RangeSetter) -> None:
    """Give every quantized layer the precision that `config` names, and ranges of least squared error.

    Raises:
        PrecisionError: the config and the model do not name the same layers, or a quantizer cannot be applied.
    """
    layers = quant_layers(model)
    check_names(config, layers)
    for name, layer in layers.items():
        precision = config[name]
        try:
            layer.set_precision(precision)
        except PrecisionError as error:
            raise PrecisionError(f"layer '{name}': {error}") from None
        if not precision.weight.is_float:
            layer.weight_quantizer.set_range(*ranges.for_weight(name, precision.weight, layer))
        if not layer.precision.activation.is_float:
            layer.input_quantizer.set_range(*ranges.activation(name, precision.activation))


def check_names(config: Mapping[str, Any], layers: Mapping[str, Any]) -> None:
    """Refuse a config that names other layers than the model has."""
    for name in config:
        if name not in layers:
            raise PrecisionError(
                f"the config names a layer '{name}' that the model does not have: {nearest(name, layers)}"
            )
    missing = [name for name in layers if name not in config]
    if missing:
        raise PrecisionError(
            f"the config has no precision for {len(missing)} of the model's {len(layers)} layers, '{missing[0]}' "
            "first: give each layer a precision, float:32 to leave it alone"
        )


def layers_for(model: nn.Module, config: Mapping[str, Any], calibration_input: Any) -> tuple[LayerInfo, ...]:
    """The layers of a model, with those products of two activations that a config names."""
    return inspect_network(model, calibration_input, products=named_products(config) or False).layers


def prepare(
    model: nn.Module, config: PrecisionConfig, calibration_input: Any, layers: Sequence[LayerInfo] | None = None
) -> nn.Module:
    """A quantized copy of `model` under `config`, ready to train or evaluate; `model` itself is left untouched.

    Args:
        model: a float model.
        config: a precision for each quantizable layer.
        calibration_input: a batch of model input (a few hundred samples): activation ranges are set on it.
        layers: what `inspect_model` found, where it has been called already.

    Raises:
        PrecisionError: the config does not fit the model.
        TaskError: the model cannot be inspected.
    """
    if layers is None:
        layers = layers_for(model, config, calibration_input)
    prepared = insert_quantizers(model, layers, config.offers)
    set_precision(prepared, config, RangeSetter(model, layers, calibration_input))
    return prepared


def prepare_for_training(
    model: nn.Module, config: PrecisionConfig, calibration_input: Any, layers: Sequence[LayerInfo] | None = None
) -> nn.Module:
    """A drop-in replacement for `model` in any training loop: `prepare`, in train mode, safe under DDP.

    Parameters that no gradient reaches (the steps of tensors that stay float, offsets that a grid does not have) are
    frozen, because DistributedDataParallel waits for every gradient. The parameters of `model` keep their names in the
    state dict, quantizers are beside them, so that a float checkpoint loads with `strict=False`.

    Arguments and errors as for `prepare`.
    """
    prepared = prepare(model, config, calibration_input, layers)
    for layer in quant_layers(prepared).values():
        for quantizer in (layer.weight_quantizer, layer.input_quantizer):
            precision = quantizer.precision
            quantizer.step.requires_grad_(precision.has_scale)
            if quantizer.beta is not None:
                quantizer.beta.requires_grad_(precision.quantizer == "uniform")
    return prepared.train()


def without_products(layers: Iterable[LayerInfo], what: str) -> None:
    """Refuse layers that have no weight. Raises PrecisionError that names the first."""
    names = [layer.name for layer in layers if layer.multiplies_activations and layer.reason is None]
    if names:
        raise PrecisionError(
            f"{what} does not train products of two activations, and '{names[0]}' is one: use the method of the "
            "trials, or a config without products"
        )


def weight_rows(layer: QuantLayer) -> Tensor:
    """The weight as `(channels, n)`, a row for each output channel."""
    weight = cast(Tensor, layer.weight).detach().float()
    return weight.movedim(layer.channel_axis, 0).flatten(1)


def sample_inputs(model: nn.Module, names: Sequence[str], calibration_input: Any) -> dict[str, Tensor]:
    """Up to ACTIVATION_SAMPLES values of each named layer's input, taken at even strides from one forward pass."""
    return sample_factors(model, names, calibration_input)[0]


def sample_factors(
    model: nn.Module, names: Sequence[str], calibration_input: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`sample_inputs`, and the same of the second factor of each product among the layers."""
    model = opened(model, names)
    modules = dict(model.named_modules())
    inputs: dict[str, list[Tensor]] = {name: [] for name in names}
    seconds: dict[str, list[Tensor]] = {name: [] for name in names if isinstance(modules[name], Product)}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs[name].extend(_some(layer_input(args, kwargs)))
            if name in seconds:
                seconds[name].extend(_some(factors(args, kwargs)[1]))

        return hook

    handles = [modules[name].register_forward_pre_hook(keep(name), with_kwargs=True) for name in names]
    try:
        with evaluating(model):
            call(model, calibration_input)
    finally:
        for handle in handles:
            handle.remove()

    def joined(samples: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
        return {name: torch.cat(values) if values else torch.zeros(1) for name, values in samples.items()}

    return joined(inputs), joined(seconds)


def _some(x: Tensor) -> list[Tensor]:
    """Some of the values of a tensor; none of one that is empty."""
    flat = x.detach().float().flatten()
    if not flat.numel():
        return []
    ends = torch.stack([flat.min(), flat.max()])  # the extremes are always among the samples
    # An odd stride walks through all channels and positions, whatever the shape.
    stride = max(1, flat.numel() // ACTIVATION_SAMPLES) | 1
    return [torch.cat([flat[::stride], ends])]


def places(model: nn.Module, module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every (parent, attribute) under which a module hangs."""
    # Not named_children(): it leaves out the second name of a module that it has already given.
    return [(parent, name) for parent in model.modules() for name, child in parent._modules.items() if child is module]
