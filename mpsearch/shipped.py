"""The studies, search spaces, hardware profiles, pages and weights that ship with mpsearch: beside the package in a
checkout, in a wheel inside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from mpsearch.errors import MpsearchError, nearest
from mpsearch.files import with_home

Folder = Literal["studies", "search_spaces", "hardware", "dashboards", "checkpoints"]

_KINDS: Mapping[Folder, tuple[str, str, str]] = {
    "studies": ("study", ".yaml", "a YAML file"),
    "search_spaces": ("search space", ".yaml", "a YAML file"),
    "hardware": ("hardware profile", ".yaml", "a YAML file"),
    "dashboards": ("dashboard", ".yaml", "a YAML file"),
    "checkpoints": ("checkpoint", ".safetensors", "a file with a state dict"),
}
"""What a folder's files are called, how they end, and what else can be given."""


def shipped_folder(folder: Folder) -> Path:
    """Where the shipped files of one kind are."""
    package = Path(__file__).parent
    installed = package / "_shipped" / folder
    return installed if installed.is_dir() else package.parent / folder


def shipped_names(folder: Folder) -> list[str]:
    """The names that can be used instead of a path."""
    return sorted(path.stem for path in shipped_folder(folder).glob(f"*{_KINDS[folder][1]}"))


def where(path: Path) -> str:
    """A path for an error message; with the folder that it is relative to, if it is."""
    return f"'{path}'" if path.is_absolute() else f"'{path}' in {Path.cwd()}"


def shipped(folder: Folder, name: str, error: type[MpsearchError]) -> Path:
    """The file that `name` stands for: a path if there is such a file, else a shipped name.

    Raises:
        error: neither exists; the message lists the shipped names.
    """
    path = with_home(name)
    if path.is_file():
        return path
    what, suffix, file = _KINDS[folder]
    if path.suffix in ("", suffix) and path.name == name:
        candidate = shipped_folder(folder) / f"{name.removesuffix(suffix)}{suffix}"
        if candidate.is_file():
            return candidate
    names = nearest(name, shipped_names(folder))
    raise error(f"no {what} {where(path)}: give the path of {file} or a shipped name; {names}")
