"""The native format: a precision config in JSON and, beside it, weights and scales in safetensors.

`save` writes the folder, `load` gives the model back: same module names, same outputs bit for bit on the same
machine. Reading needs torch and safetensors alone, and nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mpsearch.errors import ExportError, PrecisionError, nearest
from mpsearch.exporters.plain import plain_layer, with_layers
from mpsearch.files import filling, write_json
from mpsearch.graph.attention import open_attention
from mpsearch.graph.facts import LayerInfo
from mpsearch.graph.kinds import kind_of
from mpsearch.precision import PrecisionConfig
from mpsearch.ptq.fold import restructure
from mpsearch.quant.modules import without_quantizers
from mpsearch.quant.network import QuantizedNetwork
from mpsearch.quant.prepare import insert_quantizers, quant_layers
from mpsearch.state_dict import load_tensors, save_tensors, state

SCHEMA = "mpsearch/precision-config/1"
CONFIG_FILE = "precision.json"
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
            "tensors": {"file": TENSORS_FILE, "sha256": _sha256(folder / TENSORS_FILE)},
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
    return {"inputs": inputs} | ({} if network.structure is None else {"structure": dict(network.structure)})


def load(model: nn.Module, folder: str | Path) -> nn.Module:
    """A quantized copy of the float network `model` with the weights and scales of an export, in eval mode.

    `model` gives the architecture; its own weights do not matter and it is left untouched.

    Raises:
        ExportError: the folder holds no export, a damaged one, one of another schema, or one of another network.
    """
    folder = Path(folder)
    document = read_document(folder)
    quantized, config = restored(model, document, folder)
    for name, layer in quant_layers(quantized).items():
        layer.set_precision(config[name])
    tensors = _read_tensors(folder, document)
    try:
        load_tensors(quantized, tensors)
    except RuntimeError as error:
        raise ExportError(f"{folder} is of another network than the model given: {_first_lines(error)}") from None
    return quantized.eval()


def restored(model: nn.Module, document: Mapping[str, Any], folder: Path) -> tuple[nn.Module, PrecisionConfig]:
    """A copy of the float network with the structure of an export, at float precision, and the export's config.

    Raises:
        ExportError: the document does not fit the network, or itself.
    """
    config = _checked_config(document, folder)
    model = _restructured(model, document, folder)
    model = open_attention(model)
    modules = dict(model.named_modules())
    infos = [_info(name, modules, document, folder) for name in config]
    return insert_quantizers(model, infos, config.offers), config


def read_document(folder: str | Path) -> dict[str, Any]:
    """The JSON of an export (its folder, or the file itself), its schema checked.

    Raises:
        ExportError: there is none, it cannot be read, or its schema is foreign or of another version.
    """
    path = _config_file(Path(folder))
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ExportError(f"{folder} holds no export (no {CONFIG_FILE}): give the folder that export wrote") from None
    except (OSError, ValueError) as error:
        raise ExportError(f"cannot read {path}: {error}") from None
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise ExportError(f"{path} has schema {schema!r}, this mpsearch {version('mpsearch')} reads {SCHEMA!r}")
    assert isinstance(document, dict)
    return document


def _checked_config(document: Mapping[str, Any], folder: Path) -> PrecisionConfig:
    try:
        return PrecisionConfig.from_json(document.get("layers"))
    except PrecisionError as error:
        raise ExportError(f"{_config_file(folder)}: {error}") from None


def _config_file(path: Path) -> Path:
    return path if path.is_file() else path / CONFIG_FILE


def _restructured(model: nn.Module, document: Mapping[str, Any], folder: Path) -> nn.Module:
    """The network with the structure that the export has: BatchNorms folded by PTQ, say."""
    if "structure" not in document:
        return model
    try:
        return restructure(model, **document["structure"])
    except (AttributeError, AssertionError, TypeError, RuntimeError) as error:
        raise ExportError(f"{folder}: 'structure' does not fit the model given: {_first_lines(error)}") from None


def _info(name: str, modules: Mapping[str, nn.Module], document: Mapping[str, Any], folder: Path) -> LayerInfo:
    module = modules.get(name)
    if module is None:
        raise ExportError(f"{folder} names a layer '{name}' that the model does not have: {nearest(name, modules)}")
    if kind_of(module) is None:
        raise ExportError(f"layer '{name}' of the model is a {type(module).__name__}, which has no quantized form")
    try:
        facts = document["inputs"][name]
        shape, signed = tuple(int(size) for size in facts["shape"]), bool(facts["signed"])
    except (KeyError, TypeError, ValueError):
        raise ExportError(f"{folder}: 'inputs' must give shape and signed for layer '{name}'") from None
    weight = module.weight
    assert isinstance(weight, Tensor)
    return LayerInfo(name, "", tuple(weight.shape), shape, (), 0, 0, 0, signed_input=signed)


def _read_tensors(folder: Path, document: Mapping[str, Any]) -> dict[str, Tensor]:
    entry = document.get("tensors")
    file = entry.get("file") if isinstance(entry, Mapping) else None
    if not isinstance(file, str) or Path(file).name != file:
        raise ExportError(
            f"{folder / CONFIG_FILE}: 'tensors.file' must be a file name in the same folder, got {file!r}"
        )
    path = folder / file
    try:
        if _sha256(path) != entry["sha256"]:  # type: ignore[index]
            raise ExportError(f"{path} is not the file that {CONFIG_FILE} was written with: its SHA-256 differs")
        return load_file(path)
    except (OSError, KeyError, SafetensorError) as error:
        raise ExportError(f"cannot read {path}: {error}") from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_lines(error: Exception, count: int = 3) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:count])[:400]
