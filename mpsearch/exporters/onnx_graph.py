"""A quantized network as an ONNX graph with a marker wherever a tensor is quantized: what both ONNX targets start from.

`trace` exports the network with each quantizer replaced by the node `mpsearch::Quantizer(x, name=..., tensor=...)`; a
dialect then replaces every marker by its own nodes. Weights in the graph are the values that the network uses, so a
weight that no dialect has an operator for (shift, APoT) is an exact constant; its codes are in the model's metadata.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import io
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mpsearch.errors import ExportError
from mpsearch.exporters.grids import steps, weight_codes
from mpsearch.exporters.packed import pack_bits, terms_of, unsigned_codes
from mpsearch.quant.modules import QuantLayer
from mpsearch.quant.network import QuantizedNetwork
from mpsearch.quant.prepare import quant_layers

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

FILE = "model.onnx"
DOMAIN = "mpsearch"


class _Marker(nn.Module):
    """Stands for a quantizer while the network is traced."""

    def __init__(self, layer: str, tensor: str) -> None:
        super().__init__()
        self.attributes: dict[str, Any] = {"layer": layer, "tensor": tensor}

    def forward(self, x: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::Quantizer", (x,), self.attributes, dtype=x.dtype, shape=x.shape, version=1
        )


def trace(network: QuantizedNetwork, opset: int) -> ModelProto:
    """The network with markers, and with what ONNX has no place for in its metadata.

    Raises:
        ExportError: there is no example input, or torch.onnx cannot export the network.
    """
    if network.example_input is None:
        raise ExportError("ONNX export traces the network: give QuantizedNetwork an example_input, one batch of input")
    args = network.example_input if isinstance(network.example_input, tuple) else (network.example_input,)
    args = tuple(arg.cpu() if isinstance(arg, Tensor) else arg for arg in args)
    model = _marked(network.model)
    batch = torch.export.Dim("batch")
    shapes = tuple({0: batch} if isinstance(arg, Tensor) else None for arg in args)
    try:
        proto = _export(model, args, opset, shapes)
    except Exception as dynamic:  # torch.export raises many kinds
        try:
            proto = _export(model, args, opset, None)  # control flow over the batch: its size is then fixed
        except Exception as error:
            raise ExportError(
                f"torch.onnx cannot export {network.name}: {type(error).__name__}: {str(error)[:300]}"
            ) from dynamic
    config = network.config
    metadata = {"mpsearch.config": json.dumps(config.to_json())}
    for name, layer in quant_layers(network.model).items():
        if config[name].weight.quantizer in ("shift", "apot"):
            metadata[f"mpsearch.codes.{name}"] = json.dumps(_codes(layer))
    for key, value in metadata.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value
    return proto


def _marked(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model).cpu().eval()
    layers = quant_layers(model)
    with torch.no_grad():
        values = {name: layer.quantized_weight().detach().clone() for name, layer in layers.items()}
    for name, layer in layers.items():
        weight, activation = layer.precision.weight, layer.precision.activation
        layer.weight = nn.Parameter(values[name], requires_grad=False)  # its own, also where layers shared one
        layer.weight_quantizer = _Marker(name, "weight") if weight.quantizer == "uniform" else nn.Identity()  # type: ignore[assignment]
        layer.input_quantizer = nn.Identity() if activation.is_float else _Marker(name, "input")  # type: ignore[assignment]
    return model


def _export(model: nn.Module, args: tuple[Any, ...], opset: int, shapes: Any) -> ModelProto:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, args, dynamo=True, opset_version=opset, dynamic_shapes=shapes, verbose=False)
    assert program is not None
    proto: ModelProto = program.model_proto
    return proto


def _codes(layer: QuantLayer) -> dict[str, Any]:
    """A shift or APoT weight as the numbers that it is made of; bits and fields are those of the packed format."""
    weight = layer.precision.weight
    packed = pack_bits(unsigned_codes(weight_codes(layer).flatten(), weight), weight.bits)
    return {
        "weight": str(weight),
        "shape": list(layer.weight.shape),  # type: ignore[arg-type]
        "exponents": [list(term) for term in terms_of(weight)],
        "step": steps(layer.weight_quantizer).tolist(),
        "packed": base64.b64encode(packed.numpy().tobytes()).decode(),
    }


def replace_markers(
    proto: ModelProto,
    layers: Mapping[str, QuantLayer],
    dialect: Callable[[NodeProto, str, QuantLayer], tuple[list[NodeProto], list[TensorProto]]],
) -> None:
    """Replace every marker, in place.

    Args:
        proto: what `trace` made.
        layers: the quantized layers by name.
        dialect: (marker, "weight" or "input", layer) -> the nodes that take its place, and their constants.
    """
    graph = proto.graph
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.domain != DOMAIN:
            nodes.append(node)
            continue
        attributes = {attribute.name: attribute.s.decode() for attribute in node.attribute}
        new, constants = dialect(node, attributes["tensor"], layers[attributes["layer"]])
        nodes += new
        graph.initializer.extend(constants)
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input} | {output.name for output in graph.output}
    kept = [constant for constant in graph.initializer if constant.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    others = [entry for entry in proto.opset_import if entry.domain != DOMAIN]
    del proto.opset_import[:]
    proto.opset_import.extend(others)


def write(proto: ModelProto, folder: Path) -> dict[str, Any]:
    """Check and write the model; weights over 1.5 GB go into a file of their own. Returns the manifest's part."""
    import onnx

    proto.producer_name = "mpsearch"
    large = sum(len(constant.raw_data) for constant in proto.graph.initializer) > 1.5e9
    onnx.save(proto, folder / FILE, save_as_external_data=large, location=f"{FILE}.data" if large else None)
    onnx.checker.check_model(str(folder / FILE))
    batch = proto.graph.input[0].type.tensor_type.shape.dim[0]
    opsets = {entry.domain or "ai.onnx": entry.version for entry in proto.opset_import}
    return {"file": FILE, "opset": opsets, "batch": batch.dim_param or batch.dim_value}
