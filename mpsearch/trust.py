"""Which runs may have code imported that their study names: those that were made here, and those that somebody trusts.

A study may name functions (`module:function`) for its model, its data or its whole task. Whoever writes a study runs
what it names by running it. A run folder that comes from elsewhere names them too, and `resume`, `finalize`, `export`,
`import` and `rank` would import them: they do so only after its user has said so. What was trusted is noted in the
user's cache, by the run and by all that its task says; nothing that a run folder holds can forge it.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpsearch.errors import RunError, WriteError
from mpsearch.files import cache_folder, write_text
from mpsearch.record import RunFolder
from mpsearch.study import StudySpec
from mpsearch.task.cache import content_key

_FUNCTION = re.compile(r"[A-Za-z_]\w*(?:\.\w+)*:[A-Za-z_]\w*")

LIBRARIES = ("timm:", "torchvision:", "hf:", "torchcrepe:")
"""What `task.model` begins with where a library makes it, which imports nothing that the study's writer wrote."""


def imports(spec: StudySpec) -> tuple[str, ...]:
    """Every `module:function` that the task of a study names, wherever it does, and those of its costs."""

    def strings(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            for below in value.values():
                yield from strings(below)
        elif isinstance(value, list):
            for below in value:
                yield from strings(below)

    names = itertools.chain(strings(spec.task.model_dump(mode="json")), [spec.cost.model, *spec.cost.limits])
    return tuple(dict.fromkeys(name for name in names if _FUNCTION.fullmatch(name) and not name.startswith(LIBRARIES)))


def untrusted(folder: RunFolder, spec: StudySpec) -> tuple[str, ...]:
    """What would be imported for a run that was neither made nor trusted here; empty: nothing, or it is trusted."""
    names = imports(spec)
    return () if not names or _note(folder, spec).exists() else names


def trust(folder: RunFolder, spec: StudySpec) -> None:
    """Note that the run may have imported what its task names now."""
    if not imports(spec):
        return
    try:
        write_text(_note(folder, spec), json.dumps({"run": folder.id, "imports": imports(spec)}) + "\n")
    except WriteError as error:
        raise RunError(f"it cannot be noted that {folder.path} is trusted: {error}") from None


def require_trust(folder: RunFolder, spec: StudySpec) -> None:
    """Raises RunError: the run was made elsewhere, and its task names code."""
    if names := untrusted(folder, spec):
        raise RunError(
            f"{folder.path} was not made here, or its task was changed since, and its study has {', '.join(names)} "
            "imported and run: read that code, and give --trust if you trust it (in Python: mpsearch.trust(run)); "
            "status, front, report and dashboard need none of it"
        )


def _note(folder: RunFolder, spec: StudySpec) -> Path:
    task = spec.task.model_dump(mode="json")
    data = {key: value for key, value in (task.get("data") or {}).items() if key not in ("root", "download")}
    costs = [name for name in (spec.cost.model, *spec.cost.limits) if _FUNCTION.fullmatch(name)]
    key = content_key(folder.id, {**task, "checkpoint": None, "data": data} | ({"costs": costs} if costs else {}))
    place = cache_folder() / "trusted"
    place.mkdir(mode=0o700, exist_ok=True)
    return place / f"{key}.json"
