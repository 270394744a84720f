"""The worked tasks of `examples/`: short, and searched from beginning to end."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from quick import QUICK

import mpsearch

pytestmark = pytest.mark.study

EXAMPLES = Path(mpsearch.__file__).parent.parent / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("own_*.py"))
QUICK_ONES = ("own_segmentation", "own_super_resolution")
MOST_LINES = 15
WORSE = {"miou": 0.6, "psnr": 25.0, "bpc": 4.0, "map50": 0.5}
"""A score that the float network is better than."""


@pytest.mark.parametrize("name", NAMES)
def test_a_task_is_at_most_fifteen_lines_beside_its_model_and_its_training(name: str) -> None:
    """Of the class, without the training of the network, which mpsearch does not ask for."""
    tree = ast.parse((EXAMPLES / f"{name}.py").read_text())
    (task,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Task"]
    methods = [node for node in task.body if isinstance(node, ast.FunctionDef)]
    assert {node.name for node in methods} == {"float_model", "batches", "loss", "train"}
    asked_for = [node for node in task.body if not (isinstance(node, ast.FunctionDef) and node.name == "train")]
    assert sum(node.end_lineno - node.lineno + 1 for node in asked_for) + 1 <= MOST_LINES  # type: ignore[operator]


@pytest.mark.parametrize("name", [n if n in QUICK_ONES else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_a_task_is_searched(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "own_detection":
        pytest.importorskip("torchmetrics")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    (tmp_path / "study.yaml").write_text(
        f"name: {name}\ntask: {{factory: '{name}:task'}}\nspace: uniform\nwarm_start: {{method: none}}\n"
        f"trial: {{distill: {str(name != 'own_detection').lower()}}}\n"
    )
    quick = [part for part in QUICK if not part.startswith("task.")]
    result = mpsearch.run(
        tmp_path / "study.yaml",
        tmp_path / "run",
        trials=2,
        set=[*quick, "warm_start.ilp=false", "warm_start.combinations=0"],
    )
    sys.modules.pop(name)
    metric = result.front.pareto.metric
    best = metric.best_of(*(row.score for row in result.front.pareto.trials))
    assert metric.better(best, WORSE[metric.name])
