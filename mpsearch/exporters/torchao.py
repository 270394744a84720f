"""torchao: integer weights for its `quantize_`, one `IntxWeightOnlyConfig` per layer in an `FqnToConfig`.

- `torchao.json` is that config, as `torchao.core.config.config_to_dict` writes it. It names layers, those of
  `mpsearch.open_attention(model)` where a model packs the projections of its attention.
- `model.safetensors` is the float network's state dict, its weights on their grid; `scales.safetensors` our scales.

`quantize_` would take each scale from the largest weight; `load` hands it ours instead: its codes are our codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mpsearch.exporters.grids import steps
from mpsearch.exporters.native import network_parts, plain_state
from mpsearch.exporters.packages import need
from mpsearch.exporters.reload import TENSORS_FILE, float_network
from mpsearch.files import write_json
from mpsearch.quant.modules import QuantLayer
from mpsearch.quant.network import QuantizedNetwork
from mpsearch.quant.prepare import quant_layers
from mpsearch.state_dict import save_tensors

CONFIG_FILE = "torchao.json"
SCALES_FILE = "scales.safetensors"


def save(network: QuantizedNetwork, folder: Path) -> Mapping[str, Any]:
    """Write the three files; returns the manifest's part."""
    from torchao.core.config import config_to_dict
    from torchao.quantization import FqnToConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerAxis

    quantized = {
        name: layer for name, layer in quant_layers(network.model).items() if not layer.precision.weight.is_float
    }
    config = FqnToConfig(
        {
            name: IntxWeightOnlyConfig(
                weight_dtype=getattr(torch, f"int{layer.precision.weight.bits}"), granularity=PerAxis(0)
            )
            for name, layer in quantized.items()
        }
    )
    write_json(folder / CONFIG_FILE, config_to_dict(config))
    save_tensors(plain_state(network, quantized=True), folder / TENSORS_FILE)
    scales = {name: _per_row(layer) for name, layer in quantized.items()}
    save_tensors(scales, folder / SCALES_FILE)
    return {**network_parts(network), "file": CONFIG_FILE}


def _per_row(layer: QuantLayer) -> Tensor:
    """The scale of every row of a linear layer's weight `(out,)`, one per tensor repeated."""
    weight = cast(Tensor, layer.weight)
    return steps(layer.weight_quantizer).expand(weight.shape[0]).clone()


def load(model: nn.Module, folder: str | Path) -> nn.Module:
    """The torchao network of an export, in eval mode; `model` is the float network and is left untouched.

    Raises:
        ExportError: torchao is not installed, or the folder holds no such export or one of another network.
    """

    need("torchao")
    from torchao.core.config import config_from_dict

    network, export = float_network(model, folder, "torchao")
    document, scales = export.json(CONFIG_FILE), export.tensors(SCALES_FILE)
    with export.fitting():
        config: Any = config_from_dict(document)
        for name, layer_config in config.fqn_to_config.items():
            layer: Any = network.get_submodule(name)
            layer.weight = nn.Parameter(_quantized(layer.weight, layer_config, scales[name]), requires_grad=False)
    return network


@torch.no_grad()
def _quantized(weight: Tensor, config: Any, scale: Tensor) -> Tensor:
    """What `quantize_` makes of a weight, with a scale `(out,)` that is given instead of taken from the weight."""
    from torchao.quantization import IntxUnpackedToInt8Tensor

    made: Tensor = IntxUnpackedToInt8Tensor.from_hp(
        weight,
        (1, weight.shape[1]),
        config.weight_dtype,
        mapping_type=config.mapping_type,
        custom_scale=scale[:, None],
        intx_choose_qparams_algorithm=None,
        custom_zero_point=torch.zeros(len(scale), 1, dtype=torch.int8),
    )
    return made
