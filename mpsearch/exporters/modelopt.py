"""NVIDIA ModelOpt: the ordered `quant_cfg` list of `mtq.quantize`, weights, and the ranges of every quantizer.

    weights           num_bits b, signed, not narrow:           amax = s * (2^(b-1) - 1)
    inputs >= 0       num_bits b, unsigned:                     amax = s * (2^b - 1)
    inputs otherwise  num_bits b, signed, with a static bias:   amax as for weights, bias = s * (o + 2^(b-1))

In the last line o is the grid shift round(beta/s): shifted by the bias, our unsigned codes are its signed ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from mpsearch.errors import ExportError
from mpsearch.exporters.grids import uniform_grid
from mpsearch.exporters.native import network_parts, plain_state
from mpsearch.exporters.packages import need
from mpsearch.exporters.plain import per_channel
from mpsearch.exporters.reload import TENSORS_FILE, float_network
from mpsearch.files import write_json
from mpsearch.quant.modules import QuantLayer
from mpsearch.quant.network import QuantizedNetwork
from mpsearch.quant.prepare import quant_layers
from mpsearch.state_dict import save_tensors

CONFIG_FILE = "quant_cfg.json"
RANGES_FILE = "ranges.safetensors"


def save(network: QuantizedNetwork, folder: Path) -> Mapping[str, Any]:
    """Write `quant_cfg.json`, weights and ranges; returns the manifest's part.

    Raises:
        ExportError: the input of a layer takes negative values in one bit.
    """
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    ranges: dict[str, Tensor] = {}
    for name, layer in quant_layers(network.model).items():
        for quantizer, (cfg, values) in _quantizers(name, layer).items():
            entries.append({"quantizer_name": f"{name}.{quantizer}", "cfg": cfg, "enable": True})
            ranges |= {f"{name}.{quantizer}.{key}": value for key, value in values.items()}
    document = {"quant_cfg": entries, "algorithm": None}
    write_json(folder / CONFIG_FILE, document)
    save_tensors(plain_state(network), folder / TENSORS_FILE)
    save_tensors(ranges, folder / RANGES_FILE)
    return {**network_parts(network), "file": CONFIG_FILE}


def load(model: nn.Module, folder: str | Path) -> nn.Module:
    """The ModelOpt network of an export, in eval mode; `model` is the float network and is left untouched.

    Raises:
        ExportError: ModelOpt is not installed, or the folder holds no such export or one of another network.
    """

    need("modelopt")
    import modelopt.torch.quantization as mtq

    network, export = float_network(model, folder, "modelopt")
    config, ranges = export.json(CONFIG_FILE), export.tensors(RANGES_FILE)
    with export.fitting():
        for entry in config["quant_cfg"]:
            if bias := entry.get("cfg", {}).get("bias"):  # JSON has no numbers as keys
                entry["cfg"]["bias"] = {int(k) if k.lstrip("-").isdigit() else k: v for k, v in bias.items()}
        quantized: nn.Module = mtq.quantize(network, config, forward_loop=None)
        for name, value in ranges.items():
            path, _, attribute = name.rpartition(".")
            setattr(quantized.get_submodule(path), attribute, value)
    return quantized.eval()


def _quantizers(name: str, layer: QuantLayer) -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
    """ModelOpt's quantizer -> its attributes, and its ranges."""
    weight, activation = layer.precision.weight, layer.precision.activation
    quantizers: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {}
    if not weight.is_float:
        step = uniform_grid(layer.weight_quantizer).step * (2 ** (weight.bits - 1) - 1)
        by_channel = weight.granularity == "channel"
        amax = per_channel(step, cast(Tensor, layer.weight), layer.channel_axis) if by_channel else step.reshape(())
        axis = layer.channel_axis if by_channel else None
        cfg = {"num_bits": weight.bits, "axis": axis, "narrow_range": False}
        quantizers["weight_quantizer"] = (cfg, {"amax": amax.contiguous()})
    if not activation.is_float:
        quantizers["input_quantizer"] = _input_quantizer(name, layer)
    return quantizers


def _input_quantizer(name: str, layer: QuantLayer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    grid, bits = uniform_grid(layer.input_quantizer), layer.precision.activation.bits
    step = grid.step.reshape(()).clone()
    cfg: dict[str, Any] = {"num_bits": bits, "axis": None, "narrow_range": False}
    if layer.input_quantizer.beta is None:
        return {**cfg, "unsigned": True}, {"amax": step * (2**bits - 1)}
    if bits == 1:
        raise ExportError(
            f"layer '{name}': ModelOpt has no 1-bit form for an input that takes negative values: give it 2 bits"
        )
    bias = {"-1": None, "type": "static", "method": "max_min"}
    half = 2 ** (bits - 1)
    return {**cfg, "bias": bias}, {"amax": step * (half - 1), "bias_value": step * (grid.shift + half)}
