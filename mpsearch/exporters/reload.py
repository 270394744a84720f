"""What the loaders of other libraries' exports share: the float network as it was exported, and the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from mpsearch.errors import ExportError
from mpsearch.exporters.manifest import read_manifest
from mpsearch.exporters.native import restored
from mpsearch.exporters.plain import with_layers
from mpsearch.quant.modules import without_quantizers
from mpsearch.state_dict import load_tensors

TENSORS_FILE = "model.safetensors"


def float_network(model: nn.Module, folder: Path, target: str) -> tuple[nn.Module, Mapping[str, Any]]:
    """A copy of the float network `model` with the weights of an export, in eval mode, and the export's manifest.

    Raises:
        ExportError: the folder holds no export to `target`, a damaged one, or one of another network.
    """
    document = read_manifest(folder, target)
    quantized, _ = restored(model, document, folder)
    plain = with_layers(quantized, lambda _, layer: without_quantizers(layer))
    try:
        load_tensors(plain, load_file(folder / TENSORS_FILE))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ExportError(f"{folder} is damaged, or of another network than the model given: {error}") from None
    return plain.eval(), document
