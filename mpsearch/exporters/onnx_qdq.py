"""ONNX in QDQ form: integer weights behind `DequantizeLinear`, inputs through `QuantizeLinear`, `DequantizeLinear`.

    | bits of the tensor | container      | since opset |
    |--------------------|----------------|-------------|
    | 1, 2               | INT2 or UINT2  | 25          |
    | 3, 4               | INT4 or UINT4  | 21          |
    | 5 to 8             | INT8 or UINT8  | 18 (what torch.onnx starts from) |

An odd width is in the next container, and so are 1 and 2 bits of a layer that becomes a MatMul (`least_container`):
codes stay in their own range (`Max` and `Min` before `QuantizeLinear` see to it) and the true width is in the metadata.
Binary weights -s/2 and +s/2 are the codes -1 and 1 of the scale s/2.
The opset is the lowest that has the containers in use.

Rounding differs from ours in one point: ONNX rounds x/s half to even and then adds the zero point, we add it first, so
that a value exactly halfway goes the other way where the zero point is odd.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpsearch.errors import ExportError
from mpsearch.exporters.grids import uniform_grid, weight_codes
from mpsearch.exporters.onnx_graph import replace_markers, trace, write
from mpsearch.graph.facts import LayerInfo
from mpsearch.quant.modules import QuantLayer
from mpsearch.quant.network import QuantizedNetwork
from mpsearch.quant.prepare import quant_layers

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto

SINCE = {2: 25, 4: 21, 8: 18}
"""Container bits -> the opset that has it."""


def container(bits: int) -> int:
    """The bits of the container that holds `bits`.

    >>> [container(bits) for bits in (1, 2, 3, 4, 5, 8)]
    [2, 2, 4, 4, 8, 8]
    """
    return next(size for size in SINCE if size >= bits)


def least_container(layer: LayerInfo) -> int:
    """The bits of the smallest container that weight and input of a layer can be in.

    4 where a linear layer sees more than one vector a sample: that is a MatMul, and onnxruntime 1.31 makes of one with
    INT2 or UINT2 an operator that does not take them.
    """
    return 4 if layer.kind == "linear" and len(layer.input_shape) > 1 else 2


def save(network: QuantizedNetwork, folder: Path) -> Mapping[str, Any]:
    """Write `model.onnx`; returns the manifest's part.

    Raises:
        ExportError: a zero point lies outside what its container can hold.
    """
    from onnx import helper

    layers = quant_layers(network.model)
    least = {name: least_container(info) for name, info in network.info.items()}
    sizes = {
        f"{name} {tensor}": (precision.bits, container(max(precision.bits, least[name])))
        for name, layer in network.config.items()
        for tensor, precision in (("weight", layer.weight), ("activation", layer.activation))
        if precision.quantizer == "uniform"
    }
    for name, layer in layers.items():
        _check_zero_point(name, layer, least[name])
    proto = trace(network, max((SINCE[size] for _, size in sizes.values()), default=SINCE[8]))
    replace_markers(proto, layers, partial(_quantizer, {layers[name]: size for name, size in least.items()}))
    proto.ir_version = max(proto.ir_version, helper.find_min_ir_version_for(proto.opset_import))
    odd = {what: {"bits": bits, "container": size} for what, (bits, size) in sizes.items() if size != bits}
    return {**write(proto, folder), "in_wider_containers": odd}


def _check_zero_point(name: str, layer: QuantLayer, least: int) -> None:
    precision = layer.precision.activation
    if precision.quantizer != "uniform":
        return
    zero = uniform_grid(layer.input_quantizer).zero_point
    most = 2 ** container(max(precision.bits, least)) - 1
    if not 0 <= zero <= most:
        raise ExportError(
            f"layer '{name}': the zero point of its input is {zero:.0f}, ONNX holds 0 to {most} for {precision}: "
            "export to qonnx, or set the range again so that it contains zero"
        )


def _quantizer(
    least: Mapping[QuantLayer, int], marker: NodeProto, tensor: str, layer: QuantLayer
) -> tuple[list[NodeProto], list[TensorProto]]:
    """The nodes and constants that stand for one quantizer; `least`: bits of the smallest container of each layer."""
    return (_weight if tensor == "weight" else _activation)(marker, layer, least[layer])


def _weight(marker: NodeProto, layer: QuantLayer, least: int) -> tuple[list[NodeProto], list[TensorProto]]:
    from onnx import helper, numpy_helper

    bits, y = layer.precision.weight.bits, marker.output[0]
    codes, step = weight_codes(layer).cpu(), uniform_grid(layer.weight_quantizer).step.cpu()
    if bits == 1:
        codes, step = 2 * codes + 1, step / 2
    size = container(max(bits, least))
    scale = step.numpy() if step.numel() > 1 else step.numpy().reshape(())
    constants = [
        _integers(f"{y}_codes", f"INT{size}", codes.numpy()),
        numpy_helper.from_array(scale, f"{y}_scale"),
        _integers(f"{y}_zero_point", f"INT{size}", np.zeros(scale.shape)),
    ]
    node = helper.make_node("DequantizeLinear", [constant.name for constant in constants], [y], axis=layer.channel_axis)
    return [node], constants


def _activation(marker: NodeProto, layer: QuantLayer, least: int) -> tuple[list[NodeProto], list[TensorProto]]:
    from onnx import helper, numpy_helper

    bits, (x,), y = layer.precision.activation.bits, marker.input, marker.output[0]
    grid = uniform_grid(layer.input_quantizer)
    size = container(max(bits, least))
    step = grid.step.cpu().numpy().reshape(())
    constants = [
        numpy_helper.from_array(step, f"{y}_scale"),
        _integers(f"{y}_zero_point", f"UINT{size}", np.asarray(grid.zero_point)),
    ]
    scale, zero_point = (constant.name for constant in constants)
    nodes = []
    if bits != size:
        ends = [
            numpy_helper.from_array(np.asarray(step * np.float32(code + grid.shift), dtype=np.float32), f"{y}_{name}")
            for name, code in (("least", grid.low), ("most", grid.high))
        ]
        constants += ends
        for operator, end in zip(("Max", "Min"), ends, strict=True):  # onnxruntime 1.31 fails on Clip before UINT4
            nodes.append(helper.make_node(operator, [x, end.name], [f"{end.name}_clipped"]))
            x = f"{end.name}_clipped"
    nodes.append(helper.make_node("QuantizeLinear", [x, scale, zero_point], [f"{y}_codes"]))
    nodes.append(helper.make_node("DequantizeLinear", [f"{y}_codes", scale, zero_point], [y]))
    return nodes, constants


def _integers(name: str, kind: str, values: Any) -> TensorProto:
    """Integers in as many bits as they have; as a list of numbers, each negative one would take ten bytes."""
    from onnx import TensorProto, helper, numpy_helper

    dtype = helper.tensor_dtype_to_np_dtype(getattr(TensorProto, kind))
    return numpy_helper.from_array(np.asarray(values).astype(dtype), name)
