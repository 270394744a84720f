"""ONNX in QDQ form, such that onnxruntime with all its graph optimizations gives the answers of the PyTorch network.

    weights   codes (INT2, INT4, INT8) -> Cast to INT8 -> DequantizeLinear -> layer
    inputs    Min(x, top of the grid) -> QuantizeLinear to UINT8 -> DequantizeLinear -> layer

An optimizing runtime looks for DequantizeLinear -> layer -> QuantizeLinear and puts an integer operator in its place.
That changes answers: a float bias is rounded to step_x * step_w, float weights to 8 bits, a ReLU is lost; or the file
does not load, for want of a kernel (INT2, UINT4). onnxruntime 1.31 does all of it. So the form leaves it no choice:

- **`Min` stands before every QuantizeLinear.** No layer, ReLU or Clip meets one, so none of these patterns is there
  (`WeightBiasQuantization`, `ReluQuantFusion`, `ClipQuantFusion`, QLinearConv). It is also what narrows the grid: codes
  stop at 0 because UINT8 does, and at 2^bits - 1 because of `Min`.
- **At run time all codes are of 8 bits**, for which every kernel exists. The file holds weights in the smallest
  container; `Cast` of a constant is computed once, when the file is loaded.
- **The bias of a linear layer is an `Add`**, so that Gemm and MatMul may become integer operators with float output
  (QGemm, MatMulIntegerToFloat): sums of whole numbers, then the same scale. Convolutions compute in float.
- **8-bit weights of 8-bit inputs are UINT8**, zero point 128: x86 processors without VNNI add two products
  UINT8 x INT8 in 16 bits, where 2 * 255 * 128 does not fit. Narrower ones fit.
- **Weights beside a float input are Cast -> Mul**: from DequantizeLinear -> MatMul the runtime makes MatMulNBits, which
  rounds the *input* to 8 bits. So are those whose input is reshaped or padded between its quantizer and the layer.

- **Weights in groups are Cast -> Mul -> Reshape**: their codes lie as `(channels, groups, size)`, the last group filled
  up with zeros that a Slice takes away, and are cut to the weight's shape after the scale. DequantizeLinear has a
  `block_size` since opset 21, but before a MatMul the runtime makes MatMulNBits of it (above), and blocks run along
  one axis, where a group of a convolution runs along several. Their layers compute in float; all of it is constant.
- **The lower end of an offset grid is added**: no whole zero point stands for it. Inputs are
  Sub -> Min -> QuantizeLinear -> DequantizeLinear -> Add with zero point 0, weights Cast -> Add -> Mul -> Add, which
  are constants and computed once. Their layers compute in float.

    | bits of the weight | container | since opset |
    |--------------------|-----------|-------------|
    | 1, 2               | INT2      | 25          |
    | 3, 4               | INT4      | 21          |
    | 5 to 8             | INT8      | 18 (what torch.onnx starts from) |

- **Activations of 9 to 16 bits are UINT16** (since opset 21), for which there are no integer operators: their layers
  compute in float, and their weights are Cast -> Mul. `float16` weights and inputs are FLOAT16 that is cast to float32
  before its layer, so that sums are kept in float32.

The true widths are in the metadata. Binary weights -s/2 and +s/2 are the codes -1 and 1 of the scale s/2.
The opset is the lowest that has the containers in use.

Rounding differs from ours in one point: ONNX rounds x/s half to even and then adds the zero point, we add it first. A
value halfway between two codes, or within a rounding error of that, may go the other way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from torch import Tensor

from mpsearch.errors import ExportError
from mpsearch.exporters.grids import UniformGrid, uniform_grid, weight_codes
from mpsearch.exporters.onnx_graph import markers, replace_markers, trace, write
from mpsearch.exporters.plain import per_channel
from mpsearch.precision import Precision
from mpsearch.quant.groups import to_groups
from mpsearch.quant.modules import QuantLayer
from mpsearch.quant.network import QuantizedNetwork
from mpsearch.quant.prepare import quant_layers
from mpsearch.quant.quantizer import Quantizer

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

SINCE = {2: 25, 4: 21, 8: 18}
"""Container bits -> the opset that has it."""

SINCE_UINT16 = 21
"""The opset since which QuantizeLinear has UINT16."""

PAIR_BITS = 15
"""Bits of weight and input together, up to which two products fit into 16 bits with a sign."""


def container(bits: int) -> int:
    """The bits of the container that holds `bits`.

    >>> [container(bits) for bits in (1, 2, 3, 4, 5, 8)]
    [2, 2, 4, 4, 8, 8]
    """
    return next(size for size in SINCE if size >= bits)


def activation_container(bits: int) -> int:
    """The bits of the container that holds an activation of `bits`."""
    return 8 if bits <= 8 else 16


def save(network: QuantizedNetwork, folder: Path) -> Mapping[str, Any]:
    """Write `model.onnx`; returns the manifest's part.

    Raises:
        ExportError: the network does not compute in float32, cannot be traced, or a zero point is none of UINT8.
    """
    from onnx import helper

    layers = quant_layers(network.model)
    for name, layer in layers.items():
        _check_zero_point(name, layer)
    uniform = {
        name: layer.precision.weight.bits
        for name, layer in layers.items()
        if layer.has_weight and layer.precision.weight.quantizer == "uniform"
    }
    activations = {
        f"{name} {what}": precision.bits
        for name, layer in layers.items()
        for what, precision, _ in _activations(layer)
        if precision.quantizer == "uniform"
    }
    wide = any(bits > 8 for bits in activations.values())
    opsets = [SINCE[container(bits)] for bits in uniform.values()] + [SINCE_UINT16] * wide
    proto = trace(network, max(opsets, default=SINCE[8]))
    _free_biases(proto)
    in_float = {
        name
        for name, q in layers.items()
        if q.weight_quantizer.top is not None
        or q.input_quantizer.top is not None
        or q.precision.weight.group is not None
        or q.precision.activation.bits > 8
    }
    replace_markers(proto, layers, partial(_quantizer, _integer_layers(proto) - in_float))
    proto.ir_version = max(proto.ir_version, helper.find_min_ir_version_for(proto.opset_import))
    sizes = {f"{name} weight": (bits, container(bits)) for name, bits in uniform.items()} | {
        what: (bits, activation_container(bits)) for what, bits in activations.items()
    }
    odd = {what: {"bits": bits, "container": size} for what, (bits, size) in sizes.items() if size != bits}
    return {**write(proto, folder), "in_wider_containers": odd}


def _activations(layer: QuantLayer) -> list[tuple[str, Precision, Quantizer]]:
    """Of the input, and of the second factor of a product: what it is called, its precision and its quantizer."""
    second = [] if layer.has_weight else [("second factor", layer.precision.weight, layer.weight_quantizer)]
    return [("activation", layer.precision.activation, layer.input_quantizer), *second]


def _check_zero_point(name: str, layer: QuantLayer) -> None:
    for what, precision, quantizer in _activations(layer):
        if precision.quantizer != "uniform":
            continue
        zero, most = uniform_grid(quantizer).zero_point, 2 ** activation_container(precision.bits) - 1
        if not 0 <= zero <= most:  # 0 of an offset grid
            tensor = "input" if what == "activation" else what
            raise ExportError(
                f"layer '{name}': the zero point of its {tensor} is {zero:.0f}, ONNX holds 0 to {most} for "
                f"{precision}: export to qonnx, or set the range again so that it contains zero"
            )


def _free_biases(proto: ModelProto) -> None:
    """Give every Gemm of quantized matrices an `Add` for its bias, in place."""
    from onnx import helper

    quantized = {y for y, _, _ in markers(proto)}
    nodes: list[NodeProto] = []
    for node in proto.graph.node:
        nodes.append(node)
        plain = all(attribute.name.startswith("trans") or attribute.f == 1 for attribute in node.attribute)
        if node.op_type == "Gemm" and plain and len(node.input) == 3 and quantized.issuperset(node.input[:2]):
            bias, (y,) = node.input.pop(), node.output
            node.output[0] = f"{y}_unbiased"
            nodes.append(helper.make_node("Add", [node.output[0], bias], [y]))
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def _integer_layers(proto: ModelProto) -> frozenset[str]:
    """The layers whose quantized input goes straight into their operator."""
    inputs = {y: layer for y, layer, tensor in markers(proto) if tensor == "input"}
    away = {
        inputs[x]
        for node in proto.graph.node
        for x in node.input
        if x in inputs and node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul")
    }
    return frozenset(inputs.values()) - away


def _quantizer(
    integer: frozenset[str], marker: NodeProto, tensor: str, name: str, layer: QuantLayer
) -> tuple[list[NodeProto], list[TensorProto]]:
    """The nodes and constants that stand for one quantizer; `integer`: the layers that may compute in integers."""
    if tensor == "weight":
        return _weight(marker, layer, name in integer)
    return _activation(marker, layer.input_quantizer if tensor == "input" else layer.weight_quantizer)


def _weight(marker: NodeProto, layer: QuantLayer, integer: bool) -> tuple[list[NodeProto], list[TensorProto]]:
    from onnx import TensorProto, helper, numpy_helper

    (w,), (y,) = marker.input, marker.output  # a layer that is used twice has two markers of one weight
    precision = layer.precision
    if precision.weight.is_cast:
        stored = numpy_helper.from_array(cast(Tensor, layer.weight).detach().cpu().half().numpy(), f"{w}_half")
        return [helper.make_node("Cast", [stored.name], [y], to=TensorProto.FLOAT)], [stored]
    bits, axis = precision.weight.bits, layer.channel_axis
    grid = uniform_grid(layer.weight_quantizer)
    codes, step = weight_codes(layer).cpu(), grid.step.cpu()
    if grid.lower is not None:
        return _offset_weight(w, y, layer, codes, grid)
    if bits == 1:
        codes, step = 2 * codes + 1, step / 2
    if precision.weight.group is not None:
        return _weight_in_groups(w, y, layer, codes, step)
    unsigned = integer and bits + precision.activation.bits > PAIR_BITS
    kind = "UINT8" if unsigned else f"INT{container(bits)}"
    stored = _integers(f"{w}_codes", kind, (codes + 128 * unsigned).numpy())
    if not integer:
        scale = numpy_helper.from_array(per_channel(step, cast(Tensor, layer.weight), axis).numpy(), f"{w}_scale")
        nodes = [
            helper.make_node("Cast", [stored.name], [f"{y}_codes"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{y}_codes", scale.name], [y]),
        ]
        return nodes, [stored, scale]
    numbers = step.numpy() if step.numel() > 1 else step.numpy().reshape(())
    scale = numpy_helper.from_array(numbers, f"{w}_scale")
    zero_point = _integers(
        f"{w}_zero_point", "UINT8" if unsigned else "INT8", np.full(numbers.shape, 128 * int(unsigned))
    )
    nodes, source = [], stored.name
    if container(bits) != 8:
        nodes, source = [helper.make_node("Cast", [source], [f"{y}_codes"], to=TensorProto.INT8)], f"{y}_codes"
    nodes.append(helper.make_node("DequantizeLinear", [source, scale.name, zero_point.name], [y], axis=axis))
    return nodes, [stored, scale, zero_point]


def _weight_in_groups(
    w: str, y: str, layer: QuantLayer, codes: Tensor, step: Tensor
) -> tuple[list[NodeProto], list[TensorProto]]:
    """step * code, the codes `(channels, groups, size)`: cut to rows, then in the order of the weight's axes."""
    from onnx import TensorProto, helper, numpy_helper

    precision, axis = layer.precision.weight, layer.channel_axis
    assert precision.group is not None
    channels = codes.shape[axis]
    rows = to_groups(codes, axis, precision.group).view(channels, step.numel() // channels, -1)
    features, moved = codes.numel() // channels, codes.movedim(axis, 0).shape
    stored = _integers(f"{w}_codes", f"INT{container(precision.bits)}", rows.numpy())
    scale = numpy_helper.from_array(step.view(channels, -1, 1).numpy(), f"{w}_scale")
    constants = [stored, scale]
    nodes = [
        helper.make_node("Cast", [stored.name], [f"{y}_codes"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{y}_codes", scale.name], [f"{y}_groups"]),
    ]
    out = f"{y}_groups"

    def then(operator: str, numbers: dict[str, Sequence[int]], name: str, **attributes: Any) -> None:
        nonlocal out
        given = [numpy_helper.from_array(np.asarray(v, dtype=np.int64), f"{w}_{k}") for k, v in numbers.items()]
        constants.extend(given)
        nodes.append(helper.make_node(operator, [out, *(constant.name for constant in given)], [name], **attributes))
        out = name

    if rows[0].numel() > features:
        then("Reshape", {"filled": [channels, -1]}, f"{y}_filled")
        then("Slice", {"from": [0], "to": [features], "axes": [1]}, f"{y}_rows")
    transposed = axis != 0
    then("Reshape", {"shape": list(moved)}, f"{y}_moved" if transposed else y)
    if transposed:
        order = [*range(1, axis + 1), 0, *range(axis + 1, codes.dim())]
        nodes.append(helper.make_node("Transpose", [out], [y], perm=order))
    return nodes, constants


def _offset_weight(
    w: str, y: str, layer: QuantLayer, codes: Tensor, grid: UniformGrid
) -> tuple[list[NodeProto], list[TensorProto]]:
    """step * code + lower; the codes lie in the container of signed ones, 2^(bits-1) lower."""
    from onnx import TensorProto, helper, numpy_helper

    assert grid.lower is not None
    bits = layer.precision.weight.bits
    half = 2 ** (bits - 1)
    scale, lower = (
        per_channel(values.cpu(), cast(Tensor, layer.weight), layer.channel_axis) for values in (grid.step, grid.lower)
    )
    stored = _integers(f"{w}_codes", f"INT{container(bits)}", (codes - half).numpy())
    constants = [
        numpy_helper.from_array(np.asarray(values, dtype=np.float32), f"{w}_{name}")
        for name, values in (("half", half), ("scale", scale), ("lower", lower))
    ]
    nodes = [helper.make_node("Cast", [stored.name], [f"{y}_codes"], to=TensorProto.FLOAT)]
    for operator, constant, x, out in zip(
        ("Add", "Mul", "Add"), constants, ("codes", "unsigned", "steps"), ("unsigned", "steps", ""), strict=True
    ):
        nodes.append(helper.make_node(operator, [f"{y}_{x}", constant.name], [f"{y}_{out}" if out else y]))
    return nodes, [stored, *constants]


def _activation(marker: NodeProto, quantizer: Quantizer) -> tuple[list[NodeProto], list[TensorProto]]:
    from onnx import TensorProto, helper, numpy_helper

    (x,), (y,) = marker.input, marker.output
    if quantizer.precision.is_cast:
        largest = np.float32(np.finfo(np.float16).max)
        ends = [
            numpy_helper.from_array(np.asarray(s * largest), f"{y}_{name}") for s, name in ((-1, "low"), (1, "top"))
        ]
        return [
            helper.make_node("Clip", [x, *(end.name for end in ends)], [f"{y}_held"]),
            helper.make_node("Cast", [f"{y}_held"], [f"{y}_half"], to=TensorProto.FLOAT16),
            helper.make_node("Cast", [f"{y}_half"], [y], to=TensorProto.FLOAT),
        ], ends
    grid = uniform_grid(quantizer)
    step = grid.step.cpu().numpy().reshape(())
    top = np.asarray(step * np.float32(grid.high + grid.shift), dtype=np.float32)
    constants = [
        numpy_helper.from_array(step, f"{y}_scale"),
        _integers(
            f"{y}_zero_point",
            f"UINT{activation_container(quantizer.precision.bits)}",
            np.asarray(grid.zero_point),
        ),
        numpy_helper.from_array(top, f"{y}_top"),
    ]
    scale, zero_point, most = (constant.name for constant in constants)
    raised, steps = (x, y) if grid.lower is None else (f"{y}_raised", f"{y}_steps")
    nodes = [
        helper.make_node("Min", [raised, most], [f"{y}_narrowed"]),
        helper.make_node("QuantizeLinear", [f"{y}_narrowed", scale, zero_point], [f"{y}_codes"]),
        helper.make_node("DequantizeLinear", [f"{y}_codes", scale, zero_point], [steps]),
    ]
    if grid.lower is None:
        return nodes, constants
    lower = numpy_helper.from_array(grid.lower.cpu().numpy().reshape(()), f"{y}_lower")
    before, after = (
        helper.make_node(op, pair, [out])
        for op, pair, out in (("Sub", [x, lower.name], raised), ("Add", [steps, lower.name], y))
    )
    return [before, *nodes, after], [*constants, lower]


def _integers(name: str, kind: str, values: Any) -> TensorProto:
    """Integers in as many bits as they have; as a list of numbers, each negative one would take ten bytes."""
    from onnx import TensorProto, helper, numpy_helper

    dtype = helper.tensor_dtype_to_np_dtype(getattr(TensorProto, kind))
    return numpy_helper.from_array(np.asarray(values).astype(dtype), name)
