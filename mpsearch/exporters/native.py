"""The native format: a precision config in JSON and, beside it, weights and scales in safetensors.

`save` writes the folder, `load` gives the model back: same module names, same outputs bit for bit on the same
machine. Reading needs torch and safetensors alone, and nothing is ever unpickled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mpsearch.errors import ExportError, PrecisionError, nearest
from mpsearch.exporters.manifest import NATIVE_MANIFEST, NATIVE_SCHEMA, OpenExport, first_lines, open_export
from mpsearch.exporters.plain import plain_layer, with_layers
from mpsearch.files import filling, sha256, write_json
from mpsearch.graph.facts import LayerInfo
from mpsearch.graph.kinds import kind_of
from mpsearch.graph.products import Product, opened
from mpsearch.precision import PrecisionConfig
from mpsearch.ptq.fold import restructure
from mpsearch.quant.modules import without_quantizers
from mpsearch.quant.network import QuantizedNetwork
from mpsearch.quant.prepare import insert_quantizers, quant_layers
from mpsearch.state_dict import save_tensors, state

SCHEMA = NATIVE_SCHEMA
CONFIG_FILE = NATIVE_MANIFEST
TENSORS_FILE = "model.safetensors"


def save(network: QuantizedNetwork, folder: Path) -> Mapping[str, Any]:
    """Write a quantized network: `precision.json`, which is its manifest, and `model.safetensors`.

    Raises:
        ExportError: the folder holds another export.
        WriteError: it cannot be written.
    """
    with filling(folder):
        for file in (CONFIG_FILE, TENSORS_FILE):
            if (folder / file).exists():
                raise ExportError(f"{folder} already holds {file}: give another folder, or remove it first")
        save_tensors(state(network.model), folder / TENSORS_FILE, metadata={"format": "pt", "schema": SCHEMA})
        document = {
            **network.document(SCHEMA),
            **network_parts(network),
            "tensors": {"file": TENSORS_FILE, "sha256": sha256(folder / TENSORS_FILE)},
        }
        write_json(folder / CONFIG_FILE, document)
    return {}


def plain_state(network: QuantizedNetwork, quantized: bool = False) -> dict[str, Tensor]:
    """The state dict of the network in torch's own layers; `quantized`: with the weights as they are used."""
    return state(with_layers(network.model, lambda _, layer: (plain_layer if quantized else without_quantizers)(layer)))


def network_parts(network: QuantizedNetwork) -> dict[str, Any]:
    """What `restored` needs to know of a network: what its layers' inputs look like, and how it was changed."""
    inputs = {
        name: {"shape": list(info.input_shape), "signed": info.signed_input} for name, info in network.info.items()
    }
    seconds = {
        name: {"shape": list(info.second_shape), "signed": info.signed_second}
        for name, info in network.info.items()
        if info.multiplies_activations
    }
    parts = {"inputs": inputs} | ({"second_inputs": seconds} if seconds else {})
    return parts | ({} if network.structure is None else {"structure": dict(network.structure)})


def load(model: nn.Module, folder: str | Path) -> nn.Module:
    """A quantized copy of the float network `model` with the weights and scales of an export, in eval mode.

    `model` gives the architecture; its own weights do not matter and it is left untouched.

    Raises:
        ExportError: the folder holds no export, a damaged one, one of another schema, or one of another network.
    """
    export = open_export(folder, "native")
    quantized, config = restored(model, export)
    for name, layer in quant_layers(quantized).items():
        layer.set_precision(config[name])
    export.fill(quantized, export.tensors())
    return quantized.eval()


def restored(model: nn.Module, export: OpenExport) -> tuple[nn.Module, PrecisionConfig]:
    """A copy of the float network with the structure of an export, at float precision, and the export's config.

    Raises:
        ExportError: the manifest does not fit the network, or itself.
    """
    config = _checked_config(export)
    model = _restructured(model, export)
    model = opened(model, config)
    modules = dict(model.named_modules())
    infos = [_info(name, modules, export) for name in config]
    return insert_quantizers(model, infos, config.offers), config


def _checked_config(export: OpenExport) -> PrecisionConfig:
    try:
        return PrecisionConfig.from_json(export.document.get("layers"))
    except PrecisionError as error:
        raise ExportError(f"{export.folder / export.manifest}: {error}") from None


def _restructured(model: nn.Module, export: OpenExport) -> nn.Module:
    """The network with the structure that the export has: BatchNorms folded by PTQ, say."""
    if "structure" not in export.document:
        return model
    try:
        return restructure(model, **export.document["structure"])
    except (AttributeError, AssertionError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ExportError(f"{export.folder}: 'structure' does not fit the model given: {first_lines(error)}") from None


def _info(name: str, modules: Mapping[str, nn.Module], export: OpenExport) -> LayerInfo:
    folder = export.folder
    module = modules.get(name)
    if module is None:
        raise ExportError(f"{folder} names a layer '{name}' that the model does not have: {nearest(name, modules)}")
    if kind_of(module) is None:
        raise ExportError(f"layer '{name}' of the model is a {type(module).__name__}, which has no quantized form")
    shape, signed = _input_facts(name, "inputs", export)
    if isinstance(module, Product):
        second, second_signed = _input_facts(name, "second_inputs", export)
        info = LayerInfo(name, "product", (0,), shape, (), 0, 0, 0, signed_input=signed)
        return replace(info, second_shape=second, signed_second=second_signed)
    weight = module.weight
    assert isinstance(weight, Tensor)
    return LayerInfo(name, "", tuple(weight.shape), shape, (), 0, 0, 0, signed_input=signed)


def _input_facts(name: str, key: str, export: OpenExport) -> tuple[tuple[int, ...], bool]:
    """Shape and sign of what a layer reads."""
    try:
        facts = export.document[key][name]
        return tuple(int(size) for size in facts["shape"]), bool(facts["signed"])
    except (KeyError, OverflowError, TypeError, ValueError):
        raise ExportError(f"{export.folder}: '{key}' must give shape and signed for layer '{name}'") from None
