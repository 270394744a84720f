"""An export folder, opened and checked: the one way in for every `load`.

A manifest is `export.json`, or `precision.json` of the native format. `open_export` checks its schema and target; what
is then asked of it (a JSON file, tensors, a network that they must fit) is checked when it is asked for, so that an
export that is foreign, damaged or of another network is always an ExportError which names the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mpsearch.errors import ExportError
from mpsearch.files import read_whole, require_regular, sha256
from mpsearch.state_dict import load_tensors

SCHEMA = "mpsearch/export/1"
MANIFEST = "export.json"
NATIVE_SCHEMA = "mpsearch/precision-config/1"
NATIVE_MANIFEST = "precision.json"


@dataclass(frozen=True)
class OpenExport:
    """An export folder whose manifest is of the right schema and target."""

    folder: Path
    manifest: str  # its name
    document: Mapping[str, Any]

    def json(self, name: str) -> dict[str, Any]:
        """The object in a JSON file of the export. Raises ExportError where there is none."""
        return _read_object(self.folder / name)

    def tensors(self, name: str | None = None) -> dict[str, Tensor]:
        """The tensors in a safetensors file of the export.

        Args:
            name: of the file; default: the one that the manifest names under `tensors`. Where the manifest gives its
                SHA-256, as that of the native format must, the file has to have it.

        Raises:
            ExportError: it cannot be read, is not in the folder, or is not the file that the manifest was written with.
        """
        entry = self.document.get("tensors") if name is None else {"file": name}
        file = entry.get("file") if isinstance(entry, Mapping) else None
        if not isinstance(entry, Mapping) or not isinstance(file, str) or Path(file).name != file:
            raise ExportError(
                f"{self.folder / self.manifest}: 'tensors.file' must be a file name in the same folder, got {file!r}"
            )
        path = self.folder / file
        try:
            require_regular(path)
            signed = "sha256" in entry or (name is None and self.manifest == NATIVE_MANIFEST)
            if signed and entry.get("sha256") != sha256(path):
                raise ExportError(
                    f"{path} is not the file that {self.manifest} was written with: its SHA-256 differs; export again"
                )
            return load_file(path)
        except OSError as error:
            raise ExportError(f"cannot read {path}: {error.strerror or error}") from None
        except SafetensorError as error:
            raise ExportError(f"{path} is damaged: {error}; export again") from None

    def fill(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Load tensors into a model, in place. Raises ExportError where they are not those of the model."""
        with self.fitting():
            load_tensors(model, tensors)

    @contextmanager
    def fitting(self) -> Iterator[None]:
        """What goes wrong inside is the export's or the model's fault.

        Raises:
            ExportError: with what went wrong, in a line or three.
        """
        try:
            yield
        except ExportError:
            raise
        except (
            ArithmeticError,
            AssertionError,
            AttributeError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else first_lines(error)
            raise ExportError(f"{self.folder} is damaged, or of another network than the model given: {what}") from None


def open_export(folder: str | Path, target: str) -> OpenExport:
    """Open an export folder.

    Args:
        folder: that `export` wrote.
        target: the format that it must have.

    Raises:
        ExportError: there is no export, it cannot be read, its schema is foreign, or it is of another target.
    """
    name, schema = (NATIVE_MANIFEST, NATIVE_SCHEMA) if target == "native" else (MANIFEST, SCHEMA)
    path = Path(folder) / name
    if not path.exists():
        raise ExportError(f"{folder} holds no export (no {name}): give the folder that export wrote")
    document = _read_object(path)
    if document.get("schema") != schema:
        raise ExportError(
            f"{path} has schema {document.get('schema')!r}, this mpsearch {version('mpsearch')} reads {schema!r}"
        )
    if target != "native" and document.get("target") != target:
        raise ExportError(f"{path} is an export to {document.get('target')!r}, expected {target!r}: load it with that")
    return OpenExport(Path(folder), name, document)


def first_lines(error: Exception, count: int = 3) -> str:
    """The beginning of what an error says, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:count])[:400]


def _read_object(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(read_whole(path))  # not by `documents`: torch and safetensors are all that is needed
    except OSError as error:
        raise ExportError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{path} is damaged, it is no JSON: {error}; export again") from None
    if not isinstance(document, dict):
        raise ExportError(
            f"{path} must hold an object, got {type(document).__name__}: give the folder that export wrote"
        )
    return document
