"""AIMET: an encodings file (format 0.6.1) for `QuantizationSimModel.load_encodings`, and weights.

    value = scale * (code + offset),   0 <= code < 2^bitwidth

for weights with offset = -2^(b-1), one encoding per output channel or one per tensor; for inputs with offset = the grid
shift round(beta/s), whole and not positive.

AIMET's documentation names 4 to 32 bits; aimet-torch 2.42 simulates fewer as well, which is what was verified. Whether
a runtime takes them is another matter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from mpsearch.errors import ExportError
from mpsearch.exporters.grids import UniformGrid, uniform_grid
from mpsearch.exporters.native import network_parts, plain_state
from mpsearch.exporters.packages import need
from mpsearch.exporters.reload import TENSORS_FILE, float_network
from mpsearch.files import write_json
from mpsearch.private.torch import ConvTransposeNd
from mpsearch.quant.network import QuantizedNetwork
from mpsearch.quant.prepare import quant_layers
from mpsearch.state_dict import save_tensors

ENCODINGS_FILE = "aimet.encodings"


def save(network: QuantizedNetwork, folder: Path) -> Mapping[str, Any]:
    """Write the encodings and the weights; returns the manifest's part.

    Raises:
        ExportError: the range of an input lies above zero.
    """
    parameters, activations = {}, {}
    for name, layer in quant_layers(network.model).items():
        weight, activation = layer.precision.weight, layer.precision.activation
        if not weight.is_float:
            parameters[f"{name}.weight"] = _encodings(uniform_grid(layer.weight_quantizer), weight.bits, signed=True)
        if not activation.is_float:
            grid = uniform_grid(layer.input_quantizer)
            if grid.shift > 0:
                raise ExportError(
                    f"layer '{name}': its input begins at {grid.shift:.0f} steps above zero, AIMET's ranges contain "
                    "zero: export to qonnx, or set the range again so that it contains zero"
                )
            activations[name] = {"input": {"0": _encodings(grid, activation.bits, signed=False)[0]}}
    document = {
        "version": "0.6.1",
        "param_encodings": parameters,
        "activation_encodings": activations,
        "excluded_layers": [],
    }
    write_json(folder / ENCODINGS_FILE, document)
    save_tensors(plain_state(network), folder / TENSORS_FILE)
    return {**network_parts(network), "file": ENCODINGS_FILE}


def load(model: nn.Module, folder: str | Path, dummy_input: Any) -> Any:
    """A `QuantizationSimModel` with the quantizers and ranges of an export; `model` is left untouched.

    Args:
        model: the float network.
        folder: what the export wrote.
        dummy_input: a batch of model input, which AIMET runs once.

    Raises:
        ExportError: AIMET is not installed, or the folder holds no such export or one of another network.
    """

    need("aimet")
    from aimet_torch import QuantizationSimModel
    from aimet_torch.quantization.affine import QuantizeDequantize

    network, export = float_network(model, folder, "aimet")
    export.json(ENCODINGS_FILE)  # AIMET's own message would be a traceback
    with _leaving_unknown_classes_alone():
        sim: Any = QuantizationSimModel(network, dummy_input=dummy_input)
    layers = export.document["layers"]
    for name, module in sim.model.named_modules():
        if not hasattr(module, "param_quantizers"):
            continue
        # AIMET puts quantizers where its defaults say; ours are at the weight and the input of each layer.
        for role in ("input_quantizers", "output_quantizers"):
            setattr(module, role, nn.ModuleList([None] * len(getattr(module, role))))  # type: ignore[list-item]
        for parameter in module.param_quantizers:
            module.param_quantizers[parameter] = None
        weight, activation = (layers.get(name, _FLOAT)[role] for role in ("weight", "activation"))
        if weight["quantizer"] != "float":
            shape = _scale_shape(module, weight["granularity"])
            module.param_quantizers["weight"] = QuantizeDequantize(shape, weight["bits"], symmetric=True)
        if activation["quantizer"] != "float":
            module.input_quantizers[0] = QuantizeDequantize((), activation["bits"], symmetric=False)
    with export.fitting():
        sim.load_encodings(str(export.folder / ENCODINGS_FILE), strict=True, partial=False)
    return sim


@contextlib.contextmanager
def _leaving_unknown_classes_alone() -> Iterator[None]:
    """Otherwise AIMET refuses a network with a module of a class of its own, though nothing in it is quantized."""
    from aimet_torch.nn import QuantizationMixin

    before = QuantizationMixin._ignore_unknown_modules
    QuantizationMixin.ignore_unknown_modules(True)
    try:
        yield
    finally:
        QuantizationMixin.ignore_unknown_modules(before)


_FLOAT = {"weight": {"quantizer": "float"}, "activation": {"quantizer": "float"}}


def _scale_shape(module: nn.Module, granularity: str) -> tuple[int, ...]:
    if granularity == "tensor":
        return ()
    weight = cast(Tensor, module.weight)
    axis = 1 if isinstance(module, ConvTransposeNd) else 0
    return tuple(size if i == axis else 1 for i, size in enumerate(weight.shape))


def _encodings(grid: UniformGrid, bits: int, signed: bool) -> list[dict[str, Any]]:
    """One encoding for each step."""
    offset = grid.low if signed else int(grid.shift)
    return [
        {
            "bitwidth": bits,
            "dtype": "int",
            "is_symmetric": str(signed),
            "min": step * offset,
            "max": step * (offset + 2**bits - 1),
            "offset": offset,
            "scale": step,
        }
        for step in grid.step.tolist()
    ]
