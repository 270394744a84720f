"""Export: a picked config arrives in the library that trains or runs the final model.

`export` fits a network to what the target can hold (`fit`), lets the target write its files, and puts a manifest,
`export.json`, beside them. Then it has them run by what they are meant for and compares the answers (`verify`).
Targets and what they hold: `targets.TARGETS`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mpsearch.errors import ExportError, VerificationError
from mpsearch.exporters import verify as verification
from mpsearch.exporters.answers import reference
from mpsearch.exporters.fit import Conversion, fit
from mpsearch.exporters.manifest import MANIFEST, NATIVE_MANIFEST, SCHEMA
from mpsearch.exporters.targets import find_target
from mpsearch.exporters.verify import Unverified, Verified
from mpsearch.files import filling, write_error, write_json
from mpsearch.graph.inputs import image_list, map_tensors
from mpsearch.private.torch import COMPILED
from mpsearch.quant.network import QuantizedNetwork

VERIFIED_ON = 64
"""Calibration samples that the export of a task's network is verified on."""

NOT_ASKED_FOR = Unverified("it was not asked for")


@dataclass(frozen=True)
class Exported:
    """Where an export is, what was converted for it, and how it answered in its own runtime."""

    path: Path
    conversions: tuple[Conversion, ...] = ()
    verified: Verified | Unverified = NOT_ASKED_FOR


def export(
    network: QuantizedNetwork, to: str, path: str | Path, *, allow_lossy: bool = False, verify: bool = True
) -> Exported:
    """Write a quantized network in the format `to` into the folder `path`, which is made if absent.

    Args:
        network: what to write.
        to: a name in `targets.TARGETS`.
        path: the folder.
        allow_lossy: convert what the format cannot hold, and list it, instead of refusing.
        verify: run it in its own runtime on the network's samples, and compare the answers.

    Raises:
        ExportError: no such format, a package is missing, the folder is not empty, or the format cannot hold the
            config.
        VerificationError: the export does not load or answers otherwise; its files are kept in a folder `*.failed`.
        WriteError: it cannot be written; nothing of it is left.
    """
    target = find_target(to)
    model = copy.deepcopy(getattr(network.model, COMPILED, network.model)).eval()  # a soft quantizer is not exported
    network = _on_cpu(replace(network, model=verification.dense(model)))
    fitted, conversions = fit(network, to, target.holds, allow_lossy)
    path = Path(path)
    try:
        before = set(path.iterdir()) if path.is_dir() else set()
    except OSError as error:
        raise write_error(path, error) from None
    with filling(path):
        if to == "native":
            target.save(fitted, path)
        else:
            if before:
                raise ExportError(f"{path} is not empty: give another folder, or empty it first")
            document = {
                **fitted.document(SCHEMA),
                "target": to,
                "converted": [conversion.to_json() for conversion in conversions],  # the score was measured before this
                **target.save(fitted, path),
            }
            write_json(path / MANIFEST, document)
        manifest = path / (NATIVE_MANIFEST if to == "native" else MANIFEST)
        verified = NOT_ASKED_FOR if not verify else _verified(fitted, to, manifest, before)
        write_json(manifest, json.loads(manifest.read_text(encoding="utf-8")) | {"verified": verified.to_json()})
    return Exported(path, conversions, verified)


def _on_cpu(network: QuantizedNetwork) -> QuantizedNetwork:
    """The network where files are written from and runtimes answer; `network.model` is moved, the rest is copied."""

    def moved(x: Any) -> Any:
        return None if x is None else map_tensors(lambda tensor: tensor.detach().cpu(), x)

    float_model = network.float_model
    if float_model is not None and any(p.device.type != "cpu" for p in float_model.parameters()):
        float_model = copy.deepcopy(float_model).cpu()
    return replace(
        network,
        model=network.model.cpu(),
        example_input=moved(network.example_input),
        samples=moved(network.samples),
        float_model=float_model,
    )


def _verified(network: QuantizedNetwork, to: str, manifest: Path, before: Iterable[Path]) -> Verified | Unverified:
    path = manifest.parent
    samples = network.example_input if network.samples is None else network.samples
    if samples is None:
        return Unverified("there are no samples: give QuantizedNetwork a batch of model input")
    try:
        images = json.loads(manifest.read_text(encoding="utf-8")).get("batch", 0) if image_list(samples) else 0
        expected = reference(network.model, samples, images)
        return verification.verify(to, path, samples, expected, network.float_model)
    except VerificationError as error:
        failed = _set_aside(path, set(path.iterdir()) - set(before))
        raise VerificationError(
            f"{error}\nIts files were moved to {failed}. They are not what was measured: pick another config or "
            "format, or give --no-verify (verify=False) to have them all the same."
        ) from None


def _set_aside(path: Path, files: Iterable[Path]) -> Path:
    """Move the files of a failed export into a new folder beside it, `out.failed`, `out.failed2`, ...; returns it."""
    whole = path.resolve()
    names = (whole.with_name(f"{whole.name}.failed{number}") for number in ("", *range(2, 1000)))
    failed = next(name for name in names if not name.exists())
    try:
        failed.mkdir()
        for file in files:
            file.rename(failed / file.name)
        if not any(path.iterdir()):
            path.rmdir()
    except OSError as error:
        raise write_error(failed, error) from None
    return failed
