"""Runtimes that layers and networks are measured in: what pairs each has kernels for, and how it runs one.

A layer is measured as the short sub-graph that the runtime fuses: a convolution or linear layer with its bias, the
BatchNorm folded into it, and a ReLU where there was a BatchNorm. An int8 layer has 8-bit codes as input and output, as
between two of its kind. A runtime joins by one class here and one entry in `RUNTIMES`.
"""

from __future__ import annotations

import copy
import io
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from mpsearch.errors import HardwareError, nearest
from mpsearch.graph.facts import LayerInfo
from mpsearch.graph.inputs import call
from mpsearch.graph.kinds import kind_of
from mpsearch.precision import FLOAT, LayerPrecision

FLOAT32 = LayerPrecision(FLOAT, FLOAT)
W8A8 = LayerPrecision.shorthand("w8a8")
BFLOAT16 = LayerPrecision.shorthand("bfloat16")

Call = Callable[[], object]

PROFILED = 100
"""Runs of a layer whose profile tells its share from that of nodes that reorder data."""


class Runtime(Protocol):
    """What is measured in."""

    name: str
    version: str

    def pairs(self, layer: LayerInfo) -> Sequence[LayerPrecision]:
        """The pairs for which it has kernels."""

    def layer(self, layer: LayerInfo, module: nn.Module, pair: LayerPrecision) -> tuple[Call, float]:
        """A call that runs a layer once on one sample, and the share of its time that is the layer's in a network."""

    def network(self, model: nn.Module, x: Any, precisions: Sequence[LayerPrecision]) -> Call:
        """A call that runs a whole network once on one sample, the layers in execution order at these precisions.

        Raises:
            HardwareError: it cannot.
        """

    def empty(self) -> Call | None:
        """A call that runs nothing: what calling takes by itself, if that is no part of a layer."""


class OnnxRuntime:
    """onnxruntime on the CPU with its default session: float, and int8 by QLinearConv and QGemm."""

    name = "onnxruntime"

    def __init__(self, threads: int) -> None:
        try:
            import onnx  # noqa: F401
            import onnxruntime
        except ImportError as error:
            raise HardwareError(f"--runtime onnxruntime needs {error.name}: pip install 'mpsearch[onnx]'") from None
        self.version = str(onnxruntime.__version__)
        self._threads = threads

    def pairs(self, layer: LayerInfo) -> Sequence[LayerPrecision]:
        """Float and W8A8 of convolutions and linear layers."""
        if layer.kind in ("conv1d", "conv2d", "conv3d", "linear"):
            return (FLOAT32,) if layer.reason is not None else (FLOAT32, W8A8)
        return (FLOAT32,) if layer.kind.startswith("conv_transpose") else ()

    def layer(self, layer: LayerInfo, module: nn.Module, pair: LayerPrecision) -> tuple[Call, float]:
        """One node, with Relu where there was a BatchNorm; int8 by codes in and out.

        In a network neighbours pass their data on in the layout of blocked channels: the nodes that reorder it belong
        to no layer, and their share, as the session's own profile has it, is taken off.
        """
        from onnx import TensorProto, helper, numpy_helper

        weight = _weight(module)
        bias = np.zeros(layer.output_shape[0 if layer.kind != "linear" else -1], dtype=np.float32)
        int8 = pair == W8A8
        shape = [1, *layer.input_shape]
        constants, nodes = [], []

        def constant(name: str, values: Any) -> str:
            constants.append(numpy_helper.from_array(np.asarray(values), name))
            return name

        def node(op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
            nodes.append(helper.make_node(op, list(inputs), [output], **attributes))
            return output

        x, w, b = "x", constant("w", weight), constant("b", bias)
        if int8:
            scale, zero = constant("x_scale", np.float32(0.05)), constant("x_zero", np.uint8(0))
            x = node("DequantizeLinear", ["x", scale, zero], "x_float")
            channels = weight.shape[0]
            codes = constant("w_codes", np.random.default_rng(0).integers(-63, 64, weight.shape).astype(np.int8))
            w_scale = constant("w_scale", np.full(channels, 0.01, dtype=np.float32))
            w_zero = constant("w_zero", np.zeros(channels, np.int8))
            w = node("DequantizeLinear", [codes, w_scale, w_zero], "wf", axis=0)
            b_scale = constant("b_scale", np.full(channels, 0.0005, dtype=np.float32))
            b_zero = constant("b_zero", np.zeros(channels, np.int32))
            b_codes = constant("b_codes", np.zeros(channels, np.int32))
            b = node("DequantizeLinear", [b_codes, b_scale, b_zero], "bf", axis=0)
        if layer.kind == "linear":
            y = node("Gemm", [x, w, b], "y_float", transB=1) if len(shape) == 2 else _matmul(node, x, w, b)
        else:
            conv: Any = module
            op = "ConvTranspose" if layer.kind.startswith("conv_transpose") else "Conv"
            y = node(op, [x, w, b], "y_float", **_attributes(conv, op))
        y = node("Relu", [y], "y_relu") if layer.batch_norm else y
        if int8:
            y = node("QuantizeLinear", [y, constant("y_scale", np.float32(0.05)), constant("y_zero", np.uint8(0))], "y")
        kind, dtype = (TensorProto.UINT8, np.uint8) if int8 else (TensorProto.FLOAT, np.float32)
        graph = helper.make_graph(
            nodes,
            "layer",
            [helper.make_tensor_value_info("x", kind, shape)],
            [helper.make_tensor_value_info(y, kind, None)],
            constants,
        )
        feed = {"x": (np.random.default_rng(1).random(shape) * 20).astype(dtype)}
        return self._call(_model(graph), feed), self._share(_model(graph), feed)

    def _share(self, model: bytes, feed: Mapping[str, Any]) -> float:
        """The time of all nodes but those that reorder data, as a share of that of all."""
        import onnxruntime

        with tempfile.TemporaryDirectory() as folder:
            options = self._options()
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "profile")
            session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            for _ in range(PROFILED):
                session.run(None, feed)
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        spent: dict[tuple[str, bool], list[float]] = {}
        for event in events:
            if event.get("cat") == "Node" and str(event.get("name", "")).endswith("_kernel_time"):
                reorders = str(event["args"].get("op_name", "")).startswith("Reorder")
                spent.setdefault((str(event["name"]), reorders), []).append(float(event["dur"]))
        return _share_of_layer(spent)

    def network(self, model: nn.Module, x: Any, precisions: Sequence[LayerPrecision]) -> Call:
        """The exported network, its int8 layers (and what lies between two of them) by onnxruntime's own quantizer."""
        import onnx
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        if not isinstance(x, Tensor):
            raise HardwareError("whole networks are measured where their input is one tensor")
        with tempfile.TemporaryDirectory() as folder:
            path, whole, quantized = (Path(folder) / name for name in ("a.onnx", "b.onnx", "c.onnx"))
            _export(model, x, path)
            quant_pre_process(str(path), str(whole), skip_symbolic_shape=True)  # folds BatchNorm
            proto = onnx.load(str(whole))
            multiplying = [n.name for n in proto.graph.node if n.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")]
            if len(multiplying) != len(precisions):
                raise HardwareError(
                    f"the exported network has {len(multiplying)} nodes that multiply for {len(precisions)} layers: "
                    "it cannot be told which is which"
                )
            chosen = whole
            if W8A8 in precisions:

                class Reader(CalibrationDataReader):  # type: ignore[misc]
                    def __init__(self) -> None:
                        self.samples = iter([{proto.graph.input[0].name: x.detach().cpu().numpy()}])

                    def get_next(self) -> Any:
                        return next(self.samples, None)

                outside = [name for name, pair in zip(multiplying, precisions, strict=True) if pair != W8A8]
                quantize_static(
                    str(whole),
                    str(quantized),
                    Reader(),
                    quant_format=QuantFormat.QDQ,
                    per_channel=True,
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                    nodes_to_exclude=outside,
                )
                chosen = quantized
            return self._call(chosen.read_bytes(), {proto.graph.input[0].name: x.detach().cpu().numpy()})

    def empty(self) -> Call | None:
        """A session of one node that copies one number."""
        from onnx import TensorProto, helper

        ends = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y"))
        graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "empty", *([end] for end in ends))
        return self._call(_model(graph), {"x": np.zeros(1, dtype=np.float32)})

    def _call(self, model: bytes, feed: Mapping[str, Any]) -> Call:
        import onnxruntime

        # A default session rounds the weights of a float layer between two of int8, and runs it in int8 too.
        session = onnxruntime.InferenceSession(
            model,
            self._options(),
            providers=["CPUExecutionProvider"],
            disabled_optimizers=["WeightBiasQuantization"],
        )
        return lambda: session.run(None, feed)

    def _options(self) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        return options


class OpenVino(OnnxRuntime):
    """OpenVINO on the CPU, from the same ONNX: float, and int8 by its low-precision transformations.

    Whole int8 networks are written by onnxruntime's quantizer, which is needed beside it.
    """

    name = "openvino"

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        try:
            import openvino
        except ImportError:
            raise HardwareError("--runtime openvino needs openvino: pip install 'mpsearch[openvino]'") from None
        self.version = str(openvino.__version__)

    def _compiled(self, model: bytes, **more: Any) -> Any:
        import openvino

        core = openvino.Core()
        settings = {"INFERENCE_NUM_THREADS": self._threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
        return core.compile_model(core.read_model(io.BytesIO(model)), "CPU", {**settings, **more})

    def _call(self, model: bytes, feed: Mapping[str, Any]) -> Call:
        request = self._compiled(model).create_infer_request()
        return lambda: [*request.infer(dict(feed)).values()]

    def _share(self, model: bytes, feed: Mapping[str, Any]) -> float:
        request = self._compiled(model, PERF_COUNT=True).create_infer_request()
        spent: dict[tuple[str, bool], list[float]] = {}
        for _ in range(PROFILED):
            request.infer(dict(feed))
            for node in request.profiling_info:
                reorders = node.node_type == "Reorder"
                spent.setdefault((node.node_name, reorders), []).append(node.real_time.total_seconds() * 1e6)
        return _share_of_layer(spent)


class TorchRuntime:
    """PyTorch's eager kernels on the CPU: float and bfloat16."""

    name = "torch"

    def __init__(self, threads: int) -> None:
        self.version = str(torch.__version__)
        torch.set_num_threads(threads)

    def pairs(self, layer: LayerInfo) -> Sequence[LayerPrecision]:
        """Float and bfloat16 of every layer with a weight."""
        if layer.multiplies_activations or layer.looks_up:
            return ()
        return (FLOAT32,) if layer.reason is not None else (FLOAT32, BFLOAT16)

    def layer(self, layer: LayerInfo, module: nn.Module, pair: LayerPrecision) -> tuple[Call, float]:
        """The module, and a ReLU where there was a BatchNorm."""
        dtype = _dtype(pair)
        parts: list[nn.Module] = [copy.deepcopy(module).to(dtype)]
        model = nn.Sequential(*parts, *([nn.ReLU()] if layer.batch_norm else [])).eval()
        x = torch.rand(1, *layer.input_shape, dtype=dtype)
        return _without_gradients(model, x), 1.0

    def network(self, model: nn.Module, x: Any, precisions: Sequence[LayerPrecision]) -> Call:
        """The network with its layers in float or bfloat16; each casts its input, and what follows computes in kind."""
        if not isinstance(x, Tensor):
            raise HardwareError("whole networks are measured where their input is one tensor")
        if len(set(precisions)) == 1:
            dtype = _dtype(precisions[0])
            return _without_gradients(copy.deepcopy(model).to(dtype).eval(), x.to(dtype))
        model = copy.deepcopy(model).eval()
        layers = [module for module in execution_order(model, x) if kind_of(module) is not None]
        if len(layers) != len(precisions) or len(set(layers)) != len(layers):
            raise HardwareError(
                f"the network makes {len(layers)} calls of {len(set(layers))} layers where there are precisions for "
                f"{len(precisions)}: it cannot be told which is which"
            )
        for layer, precision in zip(layers, precisions, strict=True):
            layer.to(_dtype(precision))
            layer.register_forward_pre_hook(partial(_cast, _dtype(precision)))
        return _without_gradients(model, x)

    def empty(self) -> Call | None:
        """Nothing: in eager mode a call is a part of every layer."""
        return None


RUNTIMES: Mapping[str, Callable[[int], Runtime]] = {
    "onnxruntime": OnnxRuntime,
    "openvino": OpenVino,
    "torch": TorchRuntime,
}


def find_runtime(name: str, threads: int) -> Runtime:
    """The runtime of that name, with so many threads. Raises HardwareError if there is none, or it is not installed."""
    if name not in RUNTIMES:
        raise HardwareError(f"unknown runtime '{name}': {nearest(name, RUNTIMES)}")
    return RUNTIMES[name](threads)


def execution_order(model: nn.Module, x: Tensor) -> list[nn.Module]:
    """The modules of a network without modules of their own, a call each, in the order in which they are called."""
    called: list[nn.Module] = []
    handles = [
        module.register_forward_pre_hook(lambda module, _: called.append(module))
        for module in model.modules()
        if not any(True for _ in module.children())
    ]
    with torch.inference_mode():
        model(x)
    for handle in handles:
        handle.remove()
    return called


def _share_of_layer(spent: Mapping[tuple[str, bool], Sequence[float]]) -> float:
    """The share of nodes that reorder no data, of (node, reorders) -> what it took in each run, in microseconds.

    By node, as one that was interrupted says nothing; profiles count whole microseconds, hence the half.
    """
    medians = {node: statistics.median(durations) + 0.5 for node, durations in spent.items()}
    of_layer = sum(median for (_, reorders), median in medians.items() if not reorders)
    return of_layer / sum(medians.values()) if of_layer else 1.0


def _dtype(pair: LayerPrecision) -> torch.dtype:
    return torch.bfloat16 if pair == BFLOAT16 else torch.float32


def _cast(dtype: torch.dtype, _module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value for value in args
    )


def _model(graph: Any) -> bytes:
    from onnx import helper

    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


def _weight(module: nn.Module) -> Any:
    return module.weight.detach().cpu().float().numpy()  # type: ignore[operator]


def _attributes(conv: Any, op: str) -> dict[str, Any]:
    padding = list(conv.padding) if not isinstance(conv.padding, str) else None
    attributes: dict[str, Any] = {
        "strides": list(conv.stride),
        "dilations": list(conv.dilation),
        "group": conv.groups,
    }
    if padding is None:
        attributes["auto_pad"] = "SAME_UPPER" if conv.padding == "same" else "VALID"
    else:
        attributes["pads"] = padding + padding
    if op == "ConvTranspose":
        attributes["output_padding"] = list(conv.output_padding)
    return attributes


def _matmul(node: Callable[..., str], x: str, w: str, b: str) -> str:
    return node("Add", [node("MatMul", [x, node("Transpose", [w], "w_t", perm=[1, 0])], "y_product"), b], "y_float")


def _export(model: nn.Module, x: Tensor, path: Path) -> None:
    import contextlib
    import warnings

    model = copy.deepcopy(model).cpu().eval()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(model, (x.cpu(),), dynamo=True, opset_version=18, verbose=False)
    if program is None:
        raise HardwareError("torch.onnx cannot export the network")
    program.save(str(path))


def _without_gradients(model: nn.Module, x: Tensor) -> Call:
    def run() -> object:
        with torch.inference_mode():
            return call(model, x)

    return run
