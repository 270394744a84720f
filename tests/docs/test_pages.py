"""The documentation says what the code says: generated pages are complete, commands exist, messages are real."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import mpsearch
from mpsearch.cli import app
from mpsearch.record import RunFolder
from mpsearch.study import StudySpec

ROOT = Path(mpsearch.__file__).parent.parent
DOCS = ROOT / "docs"
WRITTEN = ("reference", "examples", "gallery", "results")  # by the build, or by `benchmarks tables`
PAGES = sorted(
    path
    for path in (ROOT / "README.md", *DOCS.rglob("*.md"))
    if path.parent == ROOT or path.relative_to(DOCS).parts[0] not in WRITTEN
)
COMMANDS: Any = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def reference() -> dict[str, str]:
    sys.path.insert(0, str(DOCS))
    try:
        import reference_pages
    finally:
        sys.path.remove(str(DOCS))
    pages: dict[str, str] = reference_pages.pages()
    return pages


def test_reference_is_written_into_a_folder_that_is_made(tmp_path: Path, reference: dict[str, str]) -> None:
    import reference_pages

    reference_pages.write(tmp_path / "reference")
    assert {path.stem for path in (tmp_path / "reference").glob("*.md")} == set(reference)


def test_reference_has_every_command_with_every_option(reference: dict[str, str]) -> None:
    for name, command in COMMANDS.items():
        section = reference["cli"].partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        assert all(f"\n## {name} {below}\n" in reference["cli"] for below in getattr(command, "commands", ()))
        for parameter in command.params:
            for option in parameter.opts:
                assert option.startswith("-") is False or option == "--help" or f"`{option}`" in section, (name, option)


def sections(spec: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in spec.model_fields.items():
        below = field.annotation
        if hasattr(below, "model_fields"):
            yield from sections(below, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def test_reference_describes_every_key_of_a_study(reference: dict[str, str]) -> None:
    keys = dict(sections(StudySpec))
    assert {"search.trials", "trial.lr", "task.model"} <= set(keys)
    for key in keys:
        (row,) = (line for line in reference["study"].splitlines() if f"| `{key}` |" in line)
        assert len(row.split(" | ")[-1].strip(" |")) > 3, f"{key} has no description"


def test_reference_describes_every_file_of_a_run(reference: dict[str, str]) -> None:
    paths = [value for value in vars(RunFolder(Path("run"))).values() if isinstance(value, Path)][1:]
    assert len(paths) > 10
    for path in paths:
        assert f"| `{path.name}` |" in reference["run-folder"]


def test_reference_has_every_public_name_once(reference: dict[str, str]) -> None:
    for name in mpsearch.__all__:
        assert reference["api"].count(f":: mpsearch.{name}\n") == (name != "__version__"), name


def test_public_classes_have_a_worked_example() -> None:
    classes = [name for name in mpsearch.__all__ if isinstance(getattr(mpsearch, name), type)]
    assert [name for name in classes if ">>>" not in (getattr(mpsearch, name).__doc__ or "")] == []


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_of_a_page_exist_with_their_options(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    for line in lines + re.findall(r"`(mpsearch [^`]+)`", text):
        words = line.partition("#")[0].split()
        if words[:1] != ["mpsearch"] or not re.fullmatch("[a-z]+", words[1]):
            continue
        command = COMMANDS[words[1]]
        command = getattr(command, "commands", {}).get(words[2], command) if len(words) > 2 else command
        options = {option for parameter in command.params for option in parameter.opts}
        options |= {option for parameter in command.params for option in parameter.secondary_opts}
        for word in words[2:]:
            assert not re.fullmatch(r"--?[a-z-]+", word) or word in options, f"{line}: no option {word}"


def test_troubleshooting_quotes_messages_of_the_code() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "mpsearch").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # texts that are written over several lines
    rows = re.findall(
        r"^\| (`.*?) \|", (DOCS / "how-to" / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    messages = [message for row in rows for message in re.findall(r"`([^`]+)`", row)]
    assert len(messages) > 15
    assert [message for message in messages if message not in source] == []
