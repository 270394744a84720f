"""Tables of README and docs are what the raw rows say; configs are kept once; a stranger can make data and network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks import configs, prepare, tables
from benchmarks.__main__ import main
from benchmarks.rows import RowsError
from mpsearch.precision import LayerPrecision, PrecisionConfig

pytestmark = pytest.mark.study


def test_every_table_of_the_pages_is_what_the_rows_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tables", "--check"]) == 0, capsys.readouterr().out


def test_every_table_has_a_place() -> None:
    texts = [path.read_text(encoding="utf-8") for path in tables.pages()]
    named = {match["name"] for text in texts for match in tables.BLOCK.finditer(text)}
    assert named == set(tables.TABLES)


def test_a_figure_that_was_changed_is_found_and_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "README.md"
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    whole = tables.filled("before\n<!-- table methods -->\n<!-- end -->\nafter\n", "README.md")
    assert "| `ptq-w8a8` |" in whole
    page.write_text(whole.replace("-1.14", "-0.14"))
    assert main(["tables", "--check"]) == 1
    assert "stale: README.md" in capsys.readouterr().out
    assert main(["tables"]) == 0
    assert page.read_text() == whole


def test_a_table_that_there_is_not_is_named() -> None:
    with pytest.raises(RowsError, match=r"README.md: there is no table 'metods': did you mean 'methods'"):
        tables.filled("<!-- table metods -->\n<!-- end -->", "README.md")


def test_tables_budget_is_the_cost_of_the_uniform_config() -> None:
    costs = [tables.budget("resnet20-cifar10-jpeg", bits) for bits in (4, 3, 2)]
    assert costs == pytest.approx([0.38416, 0.28353, 0.20423], abs=1e-5)


def test_configs_are_kept_once_and_read_back(tmp_path: Path) -> None:
    first = PrecisionConfig.uniform(["a", "b", "c"], LayerPrecision.shorthand("w4a8"))
    second = first.replace(b=LayerPrecision.parse("shift:3", "uniform:6"))
    configs.keep([first, second, first], tmp_path)
    configs.keep([second], tmp_path)
    assert len((tmp_path / configs.NAME).read_text().splitlines()) == 2
    assert configs.read(tmp_path) == {first.digest: first, second.digest: second}
    rows = [json.loads(line) for line in (tmp_path / configs.NAME).read_text().splitlines()]
    rows[1]["layers"] = rows[0]["layers"]
    (tmp_path / configs.NAME).write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RowsError, match=f"{second.digest} has layers of digest {first.digest}"):
        configs.read(tmp_path)


def test_shipped_points_name_configs_that_are_there() -> None:
    known = configs.read(tables.RESULTS)
    for name in ("search_quality.csv", "search_quality-dear.csv", "search_quality-first.csv"):
        assert {row["config"] for row in tables.rows(name)} <= set(known)


class _Images(list[tuple[Image.Image, int]]):
    classes = ("cat", "dog")


def test_prepare_writes_folders_and_a_checkpoint_that_the_study_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def images(root: str, train: bool, download: bool) -> Any:
        assert (root, download) == (str(tmp_path), True)
        return _Images((Image.new("RGB", (32, 32), (200 * (i % 2), i, 0)), i % 2) for i in range(12 if train else 8))

    monkeypatch.setattr("torchvision.datasets.CIFAR10", images)
    monkeypatch.setenv("MPSEARCH_CACHE", str(tmp_path / "cache"))
    for name in (prepare.DATA, prepare.CHECKPOINT):
        monkeypatch.setenv(name, "")
    assert main(["prepare", "--folder", str(tmp_path), "--epochs", "1"]) == 0
    out = capsys.readouterr().out
    assert f"export MPSEARCH_CIFAR10_JPEG={tmp_path}/cifar10 MPSEARCH_RESNET20={tmp_path}/resnet20.safetensors" in out
    counts = {split: len(list((tmp_path / "cifar10" / split).rglob("*.png"))) for split in ("train", "val", "test")}
    assert counts == {"train": 12, "val": 4, "test": 4}
    task = prepare.load_task(prepare.load_study(prepare.STUDY).task)
    state = task.float_model().state_dict()
    from safetensors.torch import load_file

    kept = load_file(tmp_path / "resnet20.safetensors")
    assert all(torch.equal(value, kept[name]) for name, value in state.items())


def test_prepare_says_what_to_do_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:

    def unreachable(*_: object, **__: object) -> Any:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", unreachable)
    assert main(["prepare", "--folder", str(tmp_path)]) == 2
    assert "put its cifar-10-python.tar.gz" in capsys.readouterr().err
