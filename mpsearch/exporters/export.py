"""Export: a picked config arrives in the library that trains or runs the final model.

`export` fits a network to what the target can hold (`fit`), lets the target write its files, and puts a manifest,
`export.json`, beside them. Targets and what they hold: `targets.TARGETS`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path

from mpsearch.errors import ExportError
from mpsearch.exporters.fit import Conversion, fit
from mpsearch.exporters.manifest import MANIFEST, SCHEMA
from mpsearch.exporters.targets import find_target
from mpsearch.files import filling, write_json
from mpsearch.private.torch import COMPILED
from mpsearch.quant.network import QuantizedNetwork


@dataclass(frozen=True)
class Exported:
    """Where an export is, and what was converted for it."""

    path: Path
    conversions: tuple[Conversion, ...] = ()


def export(network: QuantizedNetwork, to: str, path: str | Path, *, allow_lossy: bool = False) -> Exported:
    """Write a quantized network in the format `to` into the folder `path`, which is made if absent.

    Args:
        network: what to write.
        to: a name in `targets.TARGETS`.
        path: the folder.
        allow_lossy: convert what the format cannot hold, and list it, instead of refusing.

    Raises:
        ExportError: no such format, a package is missing, the folder is not empty, or the format cannot hold the
            config.
        WriteError: it cannot be written; nothing of it is left.
    """
    target = find_target(to)
    model = copy.deepcopy(getattr(network.model, COMPILED, network.model)).eval()  # a soft quantizer is not exported
    network = replace(network, model=model)
    fitted, conversions = fit(network, to, target.holds, allow_lossy)
    path = Path(path)
    if to == "native":
        target.save(fitted, path)
        return Exported(path)
    with filling(path):
        if any(path.iterdir()):
            raise ExportError(f"{path} is not empty: give another folder, or empty it first")
        document = {
            **fitted.document(SCHEMA),
            "target": to,
            "converted": [conversion.to_json() for conversion in conversions],  # accuracy was measured before this
            **target.save(fitted, path),
        }
        write_json(path / MANIFEST, document)
    return Exported(path, conversions)
