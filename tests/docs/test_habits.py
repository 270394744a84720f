"""The files that a repository has for those who join: each can be read by the program that it is for."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import mpsearch

ROOT = Path(mpsearch.__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_workflows_and_templates_are_yaml_and_run_targets_that_there_are(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert yaml.safe_load(text)
    targets = set(re.findall(r"^([\w.$()/-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    targets |= {target.replace("$(VENV)", ".venv") for target in targets}
    assert set(re.findall(r"run: make (\S+)", text)) <= targets


def test_classifiers_name_the_python_that_ci_runs() -> None:
    workflows = "".join(path.read_text(encoding="utf-8") for path in (ROOT / ".github" / "workflows").glob("*.yml"))
    tested = set(re.findall(r'python-version: "([\d.]+)"', workflows))
    classified = re.findall(r"Programming Language :: Python :: (\d\.\d+)", " ".join(PROJECT["project"]["classifiers"]))
    assert set(classified) == tested


def test_citation_has_the_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == mpsearch.__version__
    assert citation["license"] == PROJECT["project"]["license"]


def test_changelog_fragments_have_a_kind_that_towncrier_knows() -> None:
    kinds = {kind["directory"] for kind in PROJECT["tool"]["towncrier"]["type"]}
    assert kinds == {"added", "changed", "fixed", "removed"}
    names = [path.name for path in (ROOT / "changelog.d").iterdir() if not path.name.startswith(".")]
    assert [name for name in names if not re.fullmatch(rf"[a-z0-9-]+\.({'|'.join(kinds)})\.md", name)] == []
    assert PROJECT["tool"]["towncrier"]["start_string"] in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
