"""What the loaders of other libraries' exports share: the float network as it was exported."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from mpsearch.exporters.manifest import OpenExport, open_export
from mpsearch.exporters.native import restored
from mpsearch.exporters.plain import with_layers
from mpsearch.quant.modules import without_quantizers

TENSORS_FILE = "model.safetensors"


def float_network(model: nn.Module, folder: str | Path, target: str) -> tuple[nn.Module, OpenExport]:
    """A copy of the float network `model` with the weights of an export, in eval mode, and the export.

    Raises:
        ExportError: the folder holds no export to `target`, a damaged one, or one of another network.
    """
    export = open_export(folder, target)
    quantized, _ = restored(model, export)
    plain = with_layers(quantized, lambda _, layer: without_quantizers(layer))
    export.fill(plain, export.tensors(TENSORS_FILE))
    return plain.eval(), export
