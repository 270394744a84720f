"""A quantized network as an ONNX graph with a marker wherever a tensor is quantized: what both ONNX targets start from.

`trace` exports the network with each quantizer replaced by the node `mpsearch::Quantizer(x, name=..., tensor=...)`,
where `tensor` is weight, input, or the second factor of a product; a dialect then replaces every marker by its own
nodes. Weights in the graph are the values that the network uses, so a weight that no dialect has an operator for
(shift, APoT) is an exact constant; its codes are in the model's metadata.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import io
import json
import logging
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mpsearch.errors import ExportError
from mpsearch.exporters.grids import steps, weight_codes
from mpsearch.exporters.onnx_traced import Passed, Traced, trace_sizes
from mpsearch.exporters.packed import pack_bits, terms_of, unsigned_codes
from mpsearch.graph.inputs import arguments, image_list, tensors
from mpsearch.private.torch import one_onnx_registry, tree_leaves, tree_map, tree_map_only
from mpsearch.quant.modules import QuantLayer
from mpsearch.quant.network import QuantizedNetwork
from mpsearch.quant.prepare import places, quant_layers

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

FILE = "model.onnx"
INPUTS = "mpsearch.inputs"
"""The metadata that says what is fixed of the input, and of a traced graph on what it was shown to be right."""

DOMAIN = "mpsearch"


class _Marker(nn.Module):
    """Stands for a quantizer while the network is traced."""

    def __init__(self, layer: str, tensor: str) -> None:
        super().__init__()
        self.attributes: dict[str, Any] = {"layer": layer, "tensor": tensor}
        self.traced = False  # by the older exporter

    def forward(self, x: Tensor) -> Tensor:
        if self.traced:
            passed: Tensor = Passed.apply(x, *self.attributes.values())  # type: ignore[no-untyped-call]
            return passed
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::Quantizer", (x,), self.attributes, dtype=x.dtype, shape=x.shape, version=1
        )


def trace(network: QuantizedNetwork, opset: int) -> ModelProto:
    """The network with markers, and with what ONNX has no place for in its metadata.

    The batch is left open if the network can be traced so; else it has the size of the example. A network whose sizes
    depend on its data is traced otherwise: see `onnx_traced`.

    Raises:
        ExportError: there is no example input, the network does not compute in float32, or it cannot be traced.
    """
    if network.example_input is None:
        raise ExportError("ONNX export traces the network: give QuantizedNetwork an example_input, one batch of input")
    images = image_list(network.example_input)
    args, kwargs = ((images,), {}) if images else arguments(network.model, network.example_input)
    _check_types(network, (args, kwargs))
    model = _marked(network.model)
    inputs: dict[str, Any] = {"batch": len(images)} if images else {}
    try:
        proto = _exported(model, args, kwargs, opset, is_batch=images is None)
    except Exception as error:  # torch.export raises many kinds
        reason = f"torch.onnx cannot export {network.name}{_where(error, model)}: {_reason(error)}"
        traced = _traced(network, model, opset, reason)
        proto, inputs = traced.proto, inputs | traced.to_json()
    config = network.config
    metadata = {"mpsearch.config": json.dumps(config.to_json()), INPUTS: json.dumps(inputs)}
    for name, layer in quant_layers(network.model).items():
        if layer.has_weight and config[name].weight.quantizer in ("shift", "apot"):
            metadata[f"mpsearch.codes.{name}"] = json.dumps(_codes(layer))
    for key, value in metadata.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value
    return proto


def _exported(model: nn.Module, args: tuple[Any, ...], kwargs: Any, opset: int, is_batch: bool) -> ModelProto:
    """By torch.export, with the batch open if it can be."""
    if is_batch:
        args, kwargs = tree_map_only(Tensor, _of_two, (args, kwargs))
        shapes = tree_map(_open_batch, (args, kwargs))
        with contextlib.suppress(Exception):  # control flow over the batch: its size is then fixed
            return _export(model, args, kwargs, opset, (*shapes[0], *shapes[1].values()))
    return _export(model, args, kwargs, opset, None)


def _traced(network: QuantizedNetwork, model: nn.Module, opset: int, reason: str) -> Traced:
    """By the older exporter, if that is shown to be right; else an error of both."""
    for module in model.modules():
        if isinstance(module, _Marker):
            module.traced = True
    try:
        return trace_sizes(model, network.example_input, network.samples, opset, _quiet)
    except ExportError as error:
        raise ExportError(f"{reason}. Nor can it be traced: {error}") from None


def _of_two(x: Tensor) -> Tensor:
    """An example of at least two samples: torch.export takes a batch of one for a constant."""
    x = x.detach().cpu()
    return torch.cat([x, x]) if x.dim() and x.shape[0] == 1 else x


def _open_batch(x: Any) -> Any:
    return {0: torch.export.Dim("batch")} if isinstance(x, Tensor) and x.dim() else None


def _check_types(network: QuantizedNetwork, inputs: Any) -> None:
    """The kernels that onnxruntime has for quantizers and convolutions on a CPU are those of float32."""
    named = {f"input {i}": x for i, x in enumerate(tree_leaves(inputs)) if isinstance(x, Tensor)}
    for name, values in [*network.model.named_parameters(), *network.model.named_buffers(), *named.items()]:
        if values.is_floating_point() and values.dtype != torch.float32:
            raise ExportError(
                f"'{name}' of {network.name} is {values.dtype}, ONNX export expects torch.float32, which onnxruntime "
                "computes in: convert the network with .float() before it is quantized, and give its input so"
            )


def _reason(error: BaseException) -> str:
    """The cause at the root of a failed export, in one line, with the line of the model's code if it is known."""
    text = str(error)
    while error.__cause__ is not None:
        error = error.__cause__
    line = str(error).strip().splitlines()[:1] or [""]
    called = text.partition("The following call raised this error:")[2].strip().splitlines()[:2]
    where = f" ({' '.join(part.strip() for part in called)})" if called else ""
    return f"{type(error).__name__}: {line[0][:300]}{where}"


def _where(error: BaseException, model: nn.Module) -> str:
    """Of the model's modules that ran when tracing failed, the innermost one, in words."""
    names = {module: name for name, module in model.named_modules() if name}
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for raised in reversed(chain):
        selves = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(raised.__traceback__)]
        inside = [module for module in selves if isinstance(module, nn.Module) and module in names]
        if inside:
            return f", in '{names[inside[-1]]}' ({type(inside[-1]).__name__})"
    return ""


def _marked(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model).cpu().eval()
    layers = quant_layers(model)
    with torch.no_grad():
        values = {name: layer.quantized_weight().detach().clone() for name, layer in layers.items() if layer.has_weight}
    model.register_forward_hook(lambda _model, _args, output: _only_known(output))
    for module in [module for module in model.modules() if isinstance(module, nn.RReLU)]:
        for parent, attribute in places(model, module):
            setattr(parent, attribute, nn.LeakyReLU((module.lower + module.upper) / 2))  # what it is in eval mode
    for name, layer in layers.items():
        weight, activation = layer.precision.weight, layer.precision.activation
        layer.input_quantizer = nn.Identity() if activation.is_float else _Marker(name, "input")  # type: ignore[assignment]
        if not layer.has_weight:
            layer.weight_quantizer = nn.Identity() if weight.is_float else _Marker(name, "second")  # type: ignore[assignment]
            continue
        layer.weight = nn.Parameter(values[name], requires_grad=False)  # its own, also where layers shared one
        marked = weight.quantizer == "uniform" or weight.is_cast
        layer.weight_quantizer = _Marker(name, "weight") if marked else nn.Identity()  # type: ignore[assignment]
    return model


def _only_known(output: Any) -> Any:
    """The output without what torch.export does not know, such as a cache of keys and values, if there is any."""
    if all(leaf is None or isinstance(leaf, (Tensor, int, float, bool, str)) for leaf in tree_leaves(output)):
        return output
    if isinstance(output, Mapping):
        return {key: value for key, value in output.items() if next(tensors(value), None) is not None}
    return tuple(tensors(output))


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], opset: int, shapes: tuple[Any, ...] | None
) -> ModelProto:
    # The fused kernel gives other strides than its decomposition in the graph, in which a view of it may not exist.
    with _quiet(), sdpa_kernel(SDPBackend.MATH), _four_axes(), one_onnx_registry():
        program = torch.onnx.export(
            model, args, kwargs=kwargs, dynamo=True, opset_version=opset, dynamic_shapes=shapes, verbose=False
        )
    assert program is not None
    assert program.exported_program is not None
    if shapes is not None and not all(map(_is_open, program.exported_program.range_constraints.values())):
        raise ValueError("the network computes otherwise at other sizes of the batch")  # torch does not say so
    proto: ModelProto = program.model_proto
    for part in (proto.graph, *proto.functions):
        for node in part.node:
            del node.metadata_props[:]  # stack traces with the paths of this machine
    return proto


@contextlib.contextmanager
def _four_axes() -> Iterator[None]:
    """Attention of five axes, as of windows, is traced with four, which is all that torch's exporter knows."""
    functions: Any = F
    attention = functions.scaled_dot_product_attention

    def flattened(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **more: Any
    ) -> Tensor:
        batch = query.shape[:-3]
        if query.dim() <= 4 or key.shape[:-3] != batch or value.shape[:-3] != batch:
            unchanged: Tensor = attention(query, key, value, attn_mask, *rest, **more)
            return unchanged
        if attn_mask is not None and attn_mask.dim() > 2:
            attn_mask = attn_mask.expand(*batch, *attn_mask.shape[-3:]).flatten(0, -4)
        answer: Tensor = attention(*(x.flatten(0, -4) for x in (query, key, value)), attn_mask, *rest, **more)
        return answer.reshape(*batch, *answer.shape[1:])

    functions.scaled_dot_product_attention = flattened
    try:
        yield
    finally:
        functions.scaled_dot_product_attention = attention


def _is_open(sizes: Any) -> bool:
    """Whether a range of sizes leaves out nothing; torch takes 0 and 1 for special in any case."""
    return bool(sizes.lower <= 2 and sizes.upper > 2**31)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on the screen: torch prints whole graphs when it fails, to both streams and by its loggers."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


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


def markers(proto: ModelProto) -> list[tuple[str, str, str]]:
    """Of every marker the tensor that it puts out, the layer's name, and "weight", "input" or "second"."""
    return [(node.output[0], *_attributes(node)) for node in proto.graph.node if node.domain == DOMAIN]


def _attributes(marker: NodeProto) -> tuple[str, str]:
    values = {attribute.name: attribute.s.decode() for attribute in marker.attribute}
    return values["layer"], values["tensor"]


def replace_markers(
    proto: ModelProto,
    layers: Mapping[str, QuantLayer],
    dialect: Callable[[NodeProto, str, str, QuantLayer], tuple[list[NodeProto], list[TensorProto]]],
) -> None:
    """Replace every marker, in place.

    Args:
        proto: what `trace` made.
        layers: the quantized layers by name.
        dialect: (marker, "weight", "input" or "second", the layer's name, layer) -> the nodes that take its place, and
            their constants.
    """
    graph = proto.graph
    nodes: list[NodeProto] = []
    known = {constant.name for constant in graph.initializer}
    for node in graph.node:
        if node.domain != DOMAIN:
            nodes.append(node)
            continue
        name, tensor = _attributes(node)
        new, constants = dialect(node, tensor, name, layers[name])
        nodes += new
        graph.initializer.extend(constant for constant in constants if constant.name not in known)  # once a layer
        known |= {constant.name for constant in constants}
    del graph.node[:]
    graph.node.extend(nodes)
    used = set(_used(nodes)) | {output.name for output in graph.output}
    remaining = [constant for constant in graph.initializer if constant.name in used]
    del graph.initializer[:]
    graph.initializer.extend(remaining)
    others = [entry for entry in proto.opset_import if entry.domain != DOMAIN]
    del proto.opset_import[:]
    proto.opset_import.extend(others)


def _used(nodes: Iterable[NodeProto]) -> Iterator[str]:
    """The tensors that nodes take, those in the arms of an If and the bodies of loops included."""
    for node in nodes:
        yield from node.input
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _used(graph.node)
                yield from (output.name for output in graph.output)


def write(proto: ModelProto, folder: Path) -> dict[str, Any]:
    """Check and write the model; weights over 1.5 GB go into a file of their own. Returns the manifest's part."""
    import onnx

    proto.producer_name = "mpsearch"
    large = sum(len(constant.raw_data) for constant in proto.graph.initializer) > 1.5e9
    onnx.save(proto, folder / FILE, save_as_external_data=large, location=f"{FILE}.data" if large else None)
    onnx.checker.check_model(str(folder / FILE))
    batch = proto.graph.input[0].type.tensor_type.shape.dim[0]
    opsets = {entry.domain or "ai.onnx": entry.version for entry in proto.opset_import}
    inputs: dict[str, Any] = next(
        (json.loads(entry.value) for entry in proto.metadata_props if entry.key == INPUTS), {}
    )
    return {"file": FILE, "opset": opsets, "batch": batch.dim_param or batch.dim_value} | inputs
