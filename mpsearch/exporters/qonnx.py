"""QONNX: every uniform width exactly, as `IntQuant` (and `BipolarQuant` for binary weights) nodes in an ONNX graph.

    IntQuant(x, scale, zero_point, bits)   value = scale * (clamp(round(x / scale + zero_point)) - zero_point)
    BipolarQuant(x, scale)                 +-scale

An offset grid, whose code 0 is a real number, is `Sub(x, lower) -> Min(its top) -> IntQuant, unsigned -> Add(lower)`.

Format: github.com/fastmachinelearning/qonnx. Shift and APoT weights are constants on their grid, with their codes in
the metadata.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from torch import Tensor

from mpsearch.exporters.grids import uniform_grid
from mpsearch.exporters.onnx_graph import replace_markers, trace, write
from mpsearch.exporters.plain import per_channel
from mpsearch.quant.modules import QuantLayer
from mpsearch.quant.network import QuantizedNetwork
from mpsearch.quant.prepare import quant_layers

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

QONNX_DOMAIN = "qonnx.custom_op.general"
OPSET = 18


def save(network: QuantizedNetwork, folder: Path) -> Mapping[str, Any]:
    """Write `model.onnx`; returns the manifest's part."""
    from onnx import helper

    proto = trace(network, OPSET)
    replace_markers(proto, quant_layers(network.model), _quantizer)
    _say_shapes(proto)
    proto.opset_import.append(helper.make_opsetid(QONNX_DOMAIN, 1))
    return write(proto, folder)


def _quantizer(
    marker: NodeProto, tensor: str, _name: str, layer: QuantLayer
) -> tuple[list[NodeProto], list[TensorProto]]:
    """The nodes and constants that stand for one quantizer."""
    from onnx import helper, numpy_helper

    is_weight = tensor == "weight"
    grid = uniform_grid(layer.input_quantizer if tensor == "input" else layer.weight_quantizer)
    step = grid.step
    if is_weight and step.numel() > 1:
        step = per_channel(step, cast(Tensor, layer.weight), layer.channel_axis)
    x, y = marker.input[0], marker.output[0]
    if grid.lower is not None:
        return _offset_grid(x, y, step, grid.lower.reshape(step.shape), grid.high, _bits(layer, tensor))
    if is_weight and layer.precision.weight.bits == 1:
        scale = numpy_helper.from_array((step / 2).numpy(), f"{y}_scale")
        return [helper.make_node("BipolarQuant", [x, scale.name], [y], domain=QONNX_DOMAIN)], [scale]
    constants = [
        numpy_helper.from_array(np.asarray(value, dtype=np.float32), f"{y}_{name}")
        for name, value in (("scale", step.numpy()), ("zero_point", grid.zero_point), ("bits", _bits(layer, tensor)))
    ]
    return [_int_quant(x, y, constants, signed=is_weight)], constants


def _offset_grid(
    x: str, y: str, step: Tensor, lower: Tensor, top: int, bits: int
) -> tuple[list[NodeProto], list[TensorProto]]:
    """lower + step * clamp(round((x - lower) / step), 0, top); `IntQuant` clamps below, and at 2^bits - 1."""
    from onnx import helper, numpy_helper

    values = (("lower", lower), ("most", step * top), ("scale", step), ("zero_point", 0.0), ("bits", bits))
    constants = [numpy_helper.from_array(np.asarray(value, dtype=np.float32), f"{y}_{name}") for name, value in values]
    nodes = [
        helper.make_node("Sub", [x, constants[0].name], [f"{y}_raised"]),
        helper.make_node("Min", [f"{y}_raised", constants[1].name], [f"{y}_narrowed"]),
        _int_quant(f"{y}_narrowed", f"{y}_steps", constants[2:], signed=False),
        helper.make_node("Add", [f"{y}_steps", constants[0].name], [y]),
    ]
    return nodes, constants


def _say_shapes(proto: ModelProto) -> None:
    """Give the tensors within an offset grid the shape of its result, in place: qonnx runs no file that lacks one."""
    from onnx import ValueInfoProto

    known = {value.name: value for value in proto.graph.value_info}
    for node in proto.graph.node:
        y, _, part = node.output[0].rpartition("_")
        if node.output[0] not in known and part in ("raised", "narrowed", "steps") and y in known:
            value = ValueInfoProto()
            value.CopyFrom(known[y])
            value.name = node.output[0]
            proto.graph.value_info.append(value)


def _int_quant(x: str, y: str, constants: Sequence[TensorProto], signed: bool) -> NodeProto:
    from onnx import helper

    return helper.make_node(
        "IntQuant",
        [x, *[constant.name for constant in constants]],
        [y],
        domain=QONNX_DOMAIN,
        signed=int(signed),
        narrow=0,
        rounding_mode="ROUND",
    )


def _bits(layer: QuantLayer, tensor: str) -> int:
    return (layer.precision.activation if tensor == "input" else layer.precision.weight).bits
