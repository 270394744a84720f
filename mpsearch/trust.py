"""Which runs may have done what their study names: those that were made here, and those that somebody trusts.

A study may name functions (`module:function`) for its model, its data or its whole task. Whoever writes a study runs
what it names by running it. A run folder that comes from elsewhere names them too, and `resume`, `finalize`, `export`,
`import` and `rank` would import them: they do so only after its user has said so. A database that its study names, with
whatever secrets in the URL, is reached only then, too. What was trusted is noted in the user's cache, by the run and by
all that its task says; nothing that a run folder holds can forge it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpsearch.cache import cache_folder, content_key
from mpsearch.errors import RunError, WriteError
from mpsearch.files import write_text
from mpsearch.record import RunFolder
from mpsearch.study import StudySpec, names_function
from mpsearch.variables import masked

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

    task = spec.task.model_dump(mode="json")
    if str(task["model"]).startswith(LIBRARIES):
        task["model"] = None
    names = itertools.chain(strings(task), [spec.cost.model, *spec.cost.limits])
    return tuple(dict.fromkeys(name for name in names if names_function(name)))


def database(spec: StudySpec) -> str | None:
    """The URL of the database that shows a study, with names in place of secrets; None: a file of the run, or none."""
    storage = str(spec.document()["storage"])
    return storage if "://" in storage else None


def untrusted(folder: RunFolder, spec: StudySpec) -> tuple[str, ...]:
    """What would be imported, or reached, for a run that was neither made nor trusted here; empty: nothing."""
    names = imports(spec)
    reached = () if database_trusted(folder, spec) else (masked(str(database(spec))),)
    return (*(() if not names or _note_of_code(folder, spec).exists() else names), *reached)


def database_trusted(folder: RunFolder, spec: StudySpec) -> bool:
    """Whether the database of a run may be reached; one without a database has none that may not."""
    return database(spec) is None or _note_of_database(folder, spec).exists()


def trust(folder: RunFolder, spec: StudySpec) -> None:
    """Note that the run may do what its study names now."""
    if names := imports(spec):
        _write(_note_of_code(folder, spec), folder, names)
    trust_database(folder, spec)


def trust_database(folder: RunFolder, spec: StudySpec) -> None:
    """Note that the database which a study names now may be reached for the run."""
    if (url := database(spec)) is not None:
        _write(_note_of_database(folder, spec), folder, (masked(url),))


def require_trust(folder: RunFolder, spec: StudySpec) -> None:
    """Raises RunError: the run was made elsewhere, and its study names code or a database."""
    if names := untrusted(folder, spec):
        raise RunError(
            f"{folder.path} was not made here, or its study was changed since, and it has {', '.join(names)} imported "
            "and run, or reached: read that code, and give --trust if you trust it (in Python: mpsearch.trust(run)); "
            "status, front, report and dashboard need none of it"
        )


def _note_of_code(folder: RunFolder, spec: StudySpec) -> Path:
    task = spec.task.model_dump(mode="json")
    data = {key: value for key, value in (task.get("data") or {}).items() if key not in ("root", "download")}
    costs = [name for name in (spec.cost.model, *spec.cost.limits) if names_function(name)]
    return _note(folder, {**task, "checkpoint": None, "data": data} | ({"costs": costs} if costs else {}))


def _note_of_database(folder: RunFolder, spec: StudySpec) -> Path:
    return _note(folder, {"storage": database(spec)})


def _note(folder: RunFolder, of: dict[str, Any]) -> Path:
    place = cache_folder() / "trusted"
    place.mkdir(mode=0o700, exist_ok=True)
    return place / f"{content_key(folder.id, of)}.json"


def _write(note: Path, folder: RunFolder, names: tuple[str, ...]) -> None:
    try:
        write_text(note, json.dumps({"run": folder.id, "trusted": names}) + "\n")
    except WriteError as error:
        raise RunError(f"it cannot be noted that {folder.path} is trusted: {error}") from None
