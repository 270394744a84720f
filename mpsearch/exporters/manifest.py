"""The manifest of an export, `export.json`: its schema, and reading it back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mpsearch.errors import ExportError

SCHEMA = "mpsearch/export/1"
MANIFEST = "export.json"


def read_manifest(folder: str | Path, target: str) -> dict[str, Any]:
    """The manifest of an export, its schema and target checked.

    Raises:
        ExportError: there is none, it cannot be read, its schema is foreign, or it is of another target.
    """
    path = Path(folder) / MANIFEST
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ExportError(f"{folder} holds no export (no {MANIFEST}): give the folder that export wrote") from None
    except (OSError, ValueError) as error:
        raise ExportError(f"cannot read {path}: {error}") from None
    found = (document.get("schema"), document.get("target")) if isinstance(document, dict) else (None, None)
    if found != (SCHEMA, target):
        raise ExportError(f"{path} is of {found[0]!r}, target {found[1]!r}: expected {SCHEMA!r}, target {target!r}")
    assert isinstance(document, dict)
    return document
