"""QONNX: every uniform width exactly, as `IntQuant` (and `BipolarQuant` for binary weights) nodes in an ONNX graph.

    IntQuant(x, scale, zero_point, bits)   value = scale * (clamp(round(x / scale + zero_point)) - zero_point)
    BipolarQuant(x, scale)                 +-scale

Format: github.com/fastmachinelearning/qonnx. Shift and APoT weights are constants on their grid, with their codes in
the metadata.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    from onnx import NodeProto, TensorProto

QONNX_DOMAIN = "qonnx.custom_op.general"
OPSET = 18


def save(network: QuantizedNetwork, folder: Path) -> Mapping[str, Any]:
    """Write `model.onnx`; returns the manifest's part."""
    from onnx import helper

    proto = trace(network, OPSET)
    replace_markers(proto, quant_layers(network.model), _quantizer)
    proto.opset_import.append(helper.make_opsetid(QONNX_DOMAIN, 1))
    return write(proto, folder)


def _quantizer(
    marker: NodeProto, tensor: str, _name: str, layer: QuantLayer
) -> tuple[list[NodeProto], list[TensorProto]]:
    """The nodes and constants that stand for one quantizer."""
    from onnx import helper, numpy_helper

    is_weight = tensor == "weight"
    grid = uniform_grid(layer.weight_quantizer if is_weight else layer.input_quantizer)
    step = grid.step
    if is_weight and step.numel() > 1:
        step = per_channel(step, cast(Tensor, layer.weight), layer.channel_axis)
    x, y = marker.input[0], marker.output[0]
    if is_weight and layer.precision.weight.bits == 1:
        scale = numpy_helper.from_array((step / 2).numpy(), f"{y}_scale")
        return [helper.make_node("BipolarQuant", [x, scale.name], [y], domain=QONNX_DOMAIN)], [scale]
    bits = (layer.precision.weight if is_weight else layer.precision.activation).bits
    constants = [
        numpy_helper.from_array(np.asarray(value, dtype=np.float32), f"{y}_{name}")
        for name, value in (("scale", step.numpy()), ("zero_point", grid.zero_point), ("bits", bits))
    ]
    node = helper.make_node(
        "IntQuant",
        [x, *[constant.name for constant in constants]],
        [y],
        domain=QONNX_DOMAIN,
        signed=int(is_weight),
        narrow=0,
        rounding_mode="ROUND",
    )
    return [node], constants
