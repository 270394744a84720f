"""Where `--out` may write: a run's own files are its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from mpsearch.cli import app
from mpsearch.cli.base import outside_runs
from mpsearch.errors import RunError
from mpsearch.metric import TOP1
from mpsearch.record import RunFolder

COMMANDS = {
    (*group, name): command
    for group, commands in (
        ((), typer.main.get_command(app).commands),  # type: ignore[attr-defined]
        (("hardware",), typer.main.get_command(app).commands["hardware"].commands),  # type: ignore[attr-defined]
    )
    for name, command in commands.items()
    if any("--out" in parameter.opts for parameter in command.params)
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = RunFolder.create(tmp_path / "run", "name: a\n", "name: b\n", metric=TOP1)
    folder.checkpoints.mkdir()
    return folder.path


@pytest.mark.parametrize(
    "name",
    [
        "",
        "trials.jsonl",  # not there yet
        "study.yaml/",
        "study.db-wal",
        "driver.lock",
        "space.csv",  # beside which a profile is written: space.yaml
        "checkpoints",
        "checkpoints/export",
        "warmstart/export",
        "../run/report.html",
    ],
)
def test_out_is_no_part_of_a_run(run: Path, name: str) -> None:
    with pytest.raises(RunError, match=r"--out: '.*' belongs to the run in .*run: give another path"):
        outside_runs(run / name)


def test_out_through_a_link_is_where_that_leads(run: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run)
    with pytest.raises(RunError, match="belongs to the run"):
        outside_runs(tmp_path / "link" / "front.json")
    (tmp_path / "dead").symlink_to(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"dead' is a link to .*nowhere, which does not exist"):
        outside_runs(tmp_path / "dead")


def test_out_may_be_a_new_name_in_a_run_folder_and_anything_elsewhere(run: Path, tmp_path: Path) -> None:
    for path in (run / "knee", run / "export" / "trials.jsonl", tmp_path / "trials.jsonl", tmp_path):
        assert outside_runs(path) == path
    assert outside_runs(None) is None


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != ("run",)], ids=" ".join)
def test_every_out_is_looked_at(command: tuple[str, ...], run: Path) -> None:
    given = [*command, "--out", str(run)]
    for parameter in COMMANDS[command].params:
        if parameter.required and "--out" not in parameter.opts:
            given += ["1"] if isinstance(parameter, typer.core.TyperArgument) else [parameter.opts[0], "1"]
    refused = CliRunner().invoke(app, given)
    assert isinstance(refused.exception, RunError), refused.output
    assert "belongs to the run" in str(refused.exception)
