"""The YAML files and pages that ship with mpsearch: beside the package in a checkout, inside it in a wheel."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from mpsearch.errors import MpsearchError, nearest

Folder = Literal["studies", "search_spaces", "dashboards"]


def shipped_folder(folder: Folder) -> Path:
    """Where the shipped files of one kind are."""
    package = Path(__file__).parent
    installed = package / "_shipped" / folder
    return installed if installed.is_dir() else package.parent / folder


def shipped_names(folder: Folder) -> list[str]:
    """The names that can be used instead of a path."""
    return sorted(path.stem for path in shipped_folder(folder).glob("*.yaml"))


def shipped(folder: Folder, name: str, error: type[MpsearchError]) -> Path:
    """The file that `name` stands for: a path if there is such a file, else a shipped name.

    Raises:
        error: neither exists; the message lists the shipped names.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.suffix in ("", ".yaml") and path.name == name:
        candidate = shipped_folder(folder) / f"{path.stem if path.suffix == '.yaml' else name}.yaml"
        if candidate.is_file():
            return candidate
    what = {"studies": "study", "search_spaces": "search space", "dashboards": "dashboard"}[folder]
    raise error(
        f"no {what} '{name}': give the path of a YAML file or a shipped name; {nearest(name, shipped_names(folder))}"
    )
