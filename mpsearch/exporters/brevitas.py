"""Brevitas: a model of Brevitas layers, ready to train, each with its own bits; weights and scales carried over.

    weights, b >= 2   RescalingIntQuant, signed, not narrow, learned scale       (our grid: n = -2^(b-1))
    weights, b = 1    ClampedBinaryQuant, learned scale s/2                      (-s/2 and +s/2)
    inputs            RescalingIntQuant, unsigned, learned scale and zero point  (-beta is the learned value)

What is learned goes on being learned: Brevitas has straight-through gradients like ours, without LSQ's gradient scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mpsearch.errors import ExportError
from mpsearch.exporters.grids import steps
from mpsearch.exporters.manifest import open_export
from mpsearch.exporters.native import network_parts, restored
from mpsearch.exporters.packages import need
from mpsearch.exporters.plain import per_channel, plain_layer, with_layers
from mpsearch.quant.modules import QUANT_LAYERS, QuantLayer, plain_class, without_quantizers
from mpsearch.quant.network import QuantizedNetwork
from mpsearch.quant.prepare import quant_layers
from mpsearch.state_dict import save_tensors, state

TENSORS_FILE = "model.safetensors"


def to_brevitas(model: nn.Module) -> nn.Module:
    """A copy of a quantized model (uniform or float everywhere) in Brevitas layers, in eval mode.

    Raises:
        ExportError: brevitas is not installed, or the offset of an input is positive.
    """

    need("brevitas")
    return with_layers(model, _brevitas_layer).eval()


def save(network: QuantizedNetwork, folder: Path) -> Mapping[str, Any]:
    """Write the state dict of the Brevitas model; returns the manifest's part."""
    save_tensors(state(to_brevitas(network.model)), folder / TENSORS_FILE)
    return {**network_parts(network), "tensors": {"file": TENSORS_FILE}}


def load(model: nn.Module, folder: str | Path) -> nn.Module:
    """The Brevitas model of an export, in eval mode; `model` is the float network and is left untouched.

    Raises:
        ExportError: the folder holds no such export, a damaged one, or one of another network.
    """
    export = open_export(folder, "brevitas")
    quantized, config = restored(model, export)
    for name, layer in quant_layers(quantized).items():
        layer.set_precision(config[name])
    model = to_brevitas(quantized)
    export.fill(model, export.tensors())
    return model


def _brevitas_layer(name: str, layer: QuantLayer) -> nn.Module:
    import brevitas.nn as qnn

    kinds = {
        nn.Conv1d: qnn.QuantConv1d,
        nn.Conv2d: qnn.QuantConv2d,
        nn.Conv3d: qnn.QuantConv3d,
        nn.ConvTranspose1d: qnn.QuantConvTranspose1d,
        nn.ConvTranspose2d: qnn.QuantConvTranspose2d,
        nn.ConvTranspose3d: qnn.QuantConvTranspose3d,
        nn.Linear: qnn.QuantLinear,
    }
    precision = layer.precision
    if precision.weight.is_float and precision.activation.is_float:
        return plain_layer(layer)
    plain = next((base for base in type(layer).__mro__ if base in kinds), None)
    if plain is None:
        raise ExportError(f"layer '{name}': Brevitas has no form of {plain_class(layer).__name__}; leave it float")
    if "Transpose" in plain.__name__ and layer.groups != 1 and precision.weight.granularity == "channel":
        raise ExportError(
            f"layer '{name}': Brevitas wants a scale for each of its {layer.out_channels} outputs; a transposed "
            f"convolution of {layer.groups} groups has one for each output of a group: give its weight one scale "
            "(granularity tensor), leave it float, or export to qonnx"
        )
    names = ["in_features", "out_features"] if plain is nn.Linear else _CONV_ARGUMENTS
    if "Transpose" in plain.__name__:
        names = [*names, "output_padding"]
    with torch.random.fork_rng(devices=[]):  # the new layer's own initialisation is thrown away
        made: nn.Module = kinds[plain](
            **{argument: getattr(layer, argument) for argument in names},
            bias=layer.bias is not None,
            weight_quant=None if precision.weight.is_float else _weight_quant(layer),
            input_quant=None if precision.activation.is_float else _input_quant(name, layer),
        )
    made.weight = cast(nn.Parameter, layer.weight)
    made.register_parameter("bias", cast(nn.Parameter | None, layer.bias))
    _keep_class(made, layer)
    return made.to(cast(Tensor, layer.weight).device).train(layer.training)


def _keep_class(made: nn.Module, layer: QuantLayer) -> None:
    """Give a layer of Brevitas what else the class of the layer that it stands for has: methods and attributes."""
    plain = plain_class(layer)
    if plain in QUANT_LAYERS:
        return
    made.__class__ = type(f"Quant{plain.__name__}", (type(made), plain), {"__module__": __name__})
    for name, value in vars(without_quantizers(layer)).items():
        if name in ("_parameters", "_buffers", "_modules"):
            vars(made)[name] |= {key: entry for key, entry in value.items() if key not in vars(made)[name]}
        else:
            vars(made).setdefault(name, value)


_CONV_ARGUMENTS = [
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
]  # fmt: skip


def _weight_quant(layer: QuantLayer) -> Any:
    from brevitas.core.scaling import PowerOfTwoIntScaling
    from brevitas.inject.enum import ScalingImplType, ScalingPerOutputType
    from brevitas.quant import Int8WeightPerChannelFloat, Int8WeightPerTensorFloat
    from brevitas.quant.binary import SignedBinaryWeightPerTensorConst

    weight, step = layer.precision.weight, steps(layer.weight_quantizer)
    per_tensor = step.numel() == 1 and weight.granularity == "tensor"
    scale = step.reshape(()) if per_tensor else per_channel(step, cast(Tensor, layer.weight), layer.channel_axis)
    if weight.bits == 1:
        return SignedBinaryWeightPerTensorConst.let(
            scaling_impl_type=ScalingImplType.PARAMETER,
            scaling_init=scale / 2,
            scaling_per_output_type=ScalingPerOutputType.TENSOR if per_tensor else ScalingPerOutputType.CHANNEL,
        )
    # Brevitas learns the end of the range, scale * 2^(b-1): a power of two, so that nothing is rounded.
    return (Int8WeightPerTensorFloat if per_tensor else Int8WeightPerChannelFloat).let(
        bit_width=weight.bits,
        narrow_range=False,
        scaling_impl_type=ScalingImplType.PARAMETER,
        scaling_init=scale * 2 ** (weight.bits - 1),
        int_scaling_impl=PowerOfTwoIntScaling,
    )


def _input_quant(name: str, layer: QuantLayer) -> Any:
    from brevitas.core.scaling import PowerOfTwoIntScaling
    from brevitas.core.zero_point import ParameterZeroPoint
    from brevitas.inject.enum import ScalingImplType
    from brevitas.quant import ShiftedUint8ActPerTensorFloat, Uint8ActPerTensorFloat

    bits, beta = layer.precision.activation.bits, layer.input_quantizer.beta
    shared = {
        "bit_width": bits,
        "scaling_impl_type": ScalingImplType.PARAMETER,
        "scaling_init": steps(layer.input_quantizer).reshape(()) * 2**bits,
        "int_scaling_impl": PowerOfTwoIntScaling,
    }
    if beta is None:
        return Uint8ActPerTensorFloat.let(**shared)
    if float(beta.detach()) > 0:
        raise ExportError(
            f"layer '{name}': the offset of its input is {float(beta.detach()):g}, Brevitas has none above zero: "
            "export to qonnx, or set the range again so that it contains zero"
        )
    return ShiftedUint8ActPerTensorFloat.let(
        **shared, zero_point_impl=ParameterZeroPoint, zero_point_init=-beta.detach().reshape(())
    )
