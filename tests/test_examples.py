"""What the README and the docstrings show works; every study and space that ships can be read."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import runpy
from pathlib import Path

import pytest
import torch
from quick import FEW_IMAGES

import mpsearch
from mpsearch.documents import parse_yaml
from mpsearch.shipped import shipped_folder, shipped_names
from mpsearch.space.spec import parse_space
from mpsearch.study import load_study, parse_study
from mpsearch.task.load import TASKS

pytestmark = pytest.mark.study

ROOT = Path(mpsearch.__file__).parent.parent


def test_docstring_examples_hold() -> None:
    examples = 0
    for module in pkgutil.walk_packages(mpsearch.__path__, "mpsearch."):
        if module.name.startswith("mpsearch.api."):  # these make runs: test_api.py
            continue
        result = doctest.testmod(importlib.import_module(module.name))
        assert result.failed == 0, module.name
        examples += result.attempted
    assert examples >= 2


QUICK = [
    *FEW_IMAGES,
    "trial.compile=false",
    "trial.steps=2",
    "warm_start.steps=4",
    "warm_start.ilp=false",
    "warm_start.combinations=0",
    "search.trials=2",
    "search.prescreen=9",
    "trial.bn_batches=1",
]
GUIDES = [
    path
    for folder in ("tutorials", "concepts", "how-to")
    for path in sorted((ROOT / "docs" / folder).glob("*.md"))
    if "```python" in path.read_text(encoding="utf-8")
]


def python_blocks(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def briefly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty working directory, and studies that take seconds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "mpsearch.study.load_study", lambda study, overrides=(): load_study(study, [*overrides, *QUICK])
    )


@pytest.mark.usefixtures("briefly")
def test_python_of_readme_and_of_the_page_on_the_report_runs() -> None:
    report = python_blocks(ROOT / "docs" / "how-to" / "dashboard.md")
    blocks = [*python_blocks(ROOT / "README.md"), *report]  # the report is of the run that README makes
    assert len(blocks) == 3
    names = {"model": torch.nn.Sequential(torch.nn.Linear(4, 2)), "batch": torch.randn(8, 4), "mpsearch": mpsearch}
    for block in blocks:
        exec(re.sub(r"trials=\d+", "trials=3", block), names)
    assert names["quantized"](names["batch"]).shape == (8, 2)  # type: ignore[operator]


@pytest.mark.usefixtures("briefly")
@pytest.mark.parametrize("path", [path for path in GUIDES if path.stem != "dashboard"], ids=lambda path: path.stem)
def test_python_of_a_guide_runs(path: Path) -> None:
    names: dict[str, object] = {}
    for block in python_blocks(path):
        if "exporters import brevitas" in block:
            pytest.importorskip("brevitas", reason="an export target's library: make test-all installs it")
        exec(block, names)


def test_own_model_of_the_tutorial_is_checked_and_searched(tmp_path: Path) -> None:
    from commands import mpsearch

    page = ROOT / "docs" / "tutorials" / "own-model.md"
    (tmp_path / "mynet.py").write_text(python_blocks(page)[0])
    (study,) = re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "mynet.yaml").write_text(study)
    quick = ["task.float_epochs=1", "trial.steps=2", "search.trials=3", "engine.address=none", "search.prescreen=0"]
    sets = [part for value in quick for part in ("--set", value)]
    done = mpsearch("run", "mynet.yaml", "--out", "run", *sets, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "knee" in done.stdout


def test_study_of_readme_is_valid() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    spec = parse_study(parse_yaml(text))
    assert spec.space in shipped_names("search_spaces")


def test_space_of_the_guide_is_valid() -> None:
    page = (ROOT / "docs" / "how-to" / "space.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert [rule.depthwise for rule in parse_space(parse_yaml(text)).rules] == [None, True]


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_plain_loop_example_gains_by_training() -> None:
    scope = runpy.run_path(str(ROOT / "examples" / "train_plain.py"))
    in_float, before, after = scope["main"](epochs=4)
    assert in_float > 0.85
    assert after > before + 0.03


def test_lightning_example_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning", reason="an example for those who have Lightning")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    assert runpy.run_path(str(ROOT / "examples" / "train_lightning.py"))["main"](epochs=2) > 0.6


def test_hugging_face_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="an example for those who have transformers and accelerate")
    pytest.importorskip("accelerate", reason="an example for those who have transformers and accelerate")
    monkeypatch.chdir(tmp_path)
    assert 0 < runpy.run_path(str(ROOT / "examples" / "train_hf_trainer.py"))["main"](steps=3) < 2


def test_every_shipped_study_is_valid_and_names_a_shipped_space(monkeypatch: pytest.MonkeyPatch) -> None:
    for path in shipped_folder("studies").glob("*.yaml"):
        for variable in re.findall(r"\$\{(\w+)\}", path.read_text()):
            monkeypatch.setenv(variable, "/somewhere")
        spec = load_study(path.stem)
        assert spec.name == path.stem
        assert spec.space in shipped_names("search_spaces")


def test_the_tasks_of_the_documentation_without_python_are_valid_and_short() -> None:
    page = (ROOT / "docs" / "without-python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    kinds = set()
    for block in blocks:
        assert len(block.splitlines()) <= 15
        spec = parse_study({"name": "documented", "space": "uniform"} | parse_yaml(block))
        assert spec.task.data is not None
        kinds.add(type(spec.task.data))
    assert kinds == set(TASKS)  # one example for each


def test_the_task_of_the_documentation_is_searched(tmp_path: Path) -> None:
    from commands import mpsearch

    page = (ROOT / "docs" / "own-task.md").read_text(encoding="utf-8")
    code, metric = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (study,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "denoising.py").write_text(code)
    (tmp_path / "study.yaml").write_text(study)
    scope: dict[str, object] = {}
    exec(metric, scope)
    assert scope["within_50_cents"].show(0.9155) == "91.55 %"  # type: ignore[attr-defined]
    quick = ["trial.steps=2", "search.trials=3", "engine.address=none", "warm_start.method=none"]
    sets = [part for value in quick for part in ("--set", value)]
    done = mpsearch("run", "study.yaml", "--out", "run", *sets, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Maximize psnr on the validation split" in done.stderr
    assert re.search(r"\d\.\d\d dB", done.stdout)
