"""Results files: what has a row is not measured again, provenance, and files that were cut off."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pandas as pd
import pytest
import torch

from benchmarks import rows as module
from benchmarks.options import RESULTS
from benchmarks.rows import MEASURED, Rows, RowsError
from mpsearch.errors import WriteError

PROVENANCE = {"commit", "processor", "mpsearch_version", "torch_version", "python_version", "threads", "date"}
SUFFIXES = pytest.mark.parametrize("suffix", [".jsonl", ".csv"])


def rows_of(path: Path) -> Rows:
    return Rows(path, key=("model", "seed"))


@SUFFIXES
def test_rows_append_keeps_earlier_rows_to_the_letter(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"results{suffix}"
    text = {".jsonl": '{"model": "a", "seed": 0,   "loss": 0.10}\n', ".csv": "model,seed,loss\na,0,0.10\n"}[suffix]
    path.write_text(text)
    rows_of(path).append({"model": "b", "seed": 1, "loss": 0.1 + 0.2})
    kept = path.read_text()
    assert kept.startswith(text) if suffix == ".jsonl" else kept.splitlines()[1].startswith("a,0,0.10,")
    old, new = rows_of(path).read()
    assert old == {"model": "a", "seed": 0, "loss": 0.1}  # no provenance is made up for it
    assert new["loss"] == 0.1 + 0.2


@SUFFIXES
def test_rows_missing_skips_what_is_there_also_from_another_process(tmp_path: Path, suffix: str) -> None:
    rows = rows_of(tmp_path / f"results{suffix}")
    cases = [{"model": "a", "seed": seed} for seed in range(4)]
    rows.append(cases[1] | {"loss": 1.0})
    asked = []
    for case in rows.missing(cases):
        asked.append(case["seed"])
        rows_of(rows.path).append(case, {"model": "a", "seed": 2})
    assert asked == [0, 3]
    assert [row["seed"] for row in rows.select(cases)] == [0, 1, 2, 3]
    assert not list(rows.missing(cases))


def test_rows_missing_asks_again_until_a_row_is_done(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "results.jsonl")
    case = {"model": "a", "seed": 0}
    rows.append(case | {"outcome": "FAIL"})
    assert list(rows.missing([case], done=lambda row: row["outcome"] == "pass")) == [case]
    rows.append(case | {"outcome": "pass"})
    assert not list(rows.missing([case], done=lambda row: row["outcome"] == "pass"))
    assert rows.select([case])[0]["outcome"] == "pass"


def test_rows_missing_tells_lists_and_numbers_apart_as_json_does(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "results.jsonl")
    rows.append({"model": ["a", "b"], "seed": 1.0})
    assert not list(rows.missing([{"model": ("a", "b"), "seed": 1}]))
    assert list(rows.missing([{"model": ["b", "a"], "seed": 1}]))


@SUFFIXES
def test_rows_carry_provenance(tmp_path: Path, suffix: str) -> None:
    rows = rows_of(tmp_path / f"results{suffix}")
    rows.append({"model": "a", "seed": 0, "threads": 7})
    (row,) = rows.read()
    assert set(row) >= PROVENANCE
    assert row["threads"] == 7  # measured elsewhere: the row's own word wins
    assert row["torch_version"] == torch.__version__
    assert row["processor"].strip()


def test_rows_of_another_commit_or_processor_do_not_stand_for_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = Rows(tmp_path / "results.jsonl", key=("model", *MEASURED))
    rows.append({"model": "a"})
    assert not list(rows.missing([{"model": "a"}]))
    for name in MEASURED:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda: "another")
            assert list(rows.missing([{"model": "a"}])), name


def test_commit_changes_with_every_change_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mpsearch").mkdir()
    code = tmp_path / "mpsearch" / "code.py"
    monkeypatch.setattr(module, "ROOT", tmp_path)
    commits = []

    def look(text: str) -> None:
        code.write_text(text)
        commits.append(module.commit.__wrapped__())

    look("one")
    assert commits[0].startswith("source-")  # no repository
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    for command in (("init", "-q"), ("add", "."), (*identity, "commit", "-qm", "one")):
        assert module._git(*command) is not None
    for text in ("one", "two", "three", "one"):
        look(text)
    clean, two, three, again = commits[1:]
    assert len(clean) == 40
    assert clean == again
    assert two.startswith(f"{clean}-dirty-")
    assert len({clean, two, three}) == 3


@SUFFIXES
def test_rows_a_broken_last_line_is_said_and_measured_again(
    tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of(tmp_path / f"results{suffix}")
    cases = [{"model": "a", "seed": seed} for seed in range(2)]
    for case in cases:
        rows.append(case | {"loss": 0.25, "date": "2026-01-01"})
    whole = rows.path.read_text()
    rows.path.write_text(whole[:-3])
    assert [row["seed"] for row in rows.read()] == [0]
    assert "cut off" in capsys.readouterr().err
    (missing,) = rows.missing(cases)
    rows.append(missing | {"loss": 0.25, "date": "2026-01-01"})
    assert rows.path.read_text() == whole


def test_rows_a_last_line_without_newline_counts_if_it_is_whole(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "results.jsonl")
    rows.path.write_text('{"model": "a", "seed": 0}')
    rows.append({"model": "a", "seed": 1})
    assert [row["seed"] for row in rows.read()] == [0, 1]


@pytest.mark.parametrize("line", ['{"model": "a", "se', "[1]", ""])
def test_rows_a_broken_line_within_is_an_error_that_names_it(tmp_path: Path, line: str) -> None:
    rows = rows_of(tmp_path / "results.jsonl")
    rows.path.write_text('{"model": "a", "seed": 0}\n' + line + '\n{"model": "a", "seed": 1}\n')
    with pytest.raises(RowsError, match="line 2"):
        rows.read()


def test_rows_append_is_all_or_nothing_where_the_disk_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(tmp_path / "results.jsonl")
    rows.append({"model": "a", "seed": 0})
    before = rows.path.read_text()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(WriteError, match="No space left on device"):
            rows.append({"model": "a", "seed": 1}, {"model": "a", "seed": 2})
    assert rows.path.read_text() == before
    assert {path.name for path in tmp_path.iterdir()} <= {"results.jsonl", ".results.jsonl.lock"}


def _append_ten(path: Path, first: int) -> None:
    for seed in range(first, first + 10):
        rows_of(path).append({"model": "a", "seed": seed, "commit": "", "processor": ""})


def test_rows_of_two_processes_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    processes = [
        multiprocessing.get_context("fork").Process(target=_append_ten, args=(path, first)) for first in (0, 10)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert sorted(row["seed"] for row in rows_of(path).read()) == list(range(20))


def test_rows_need_the_fields_of_their_key_and_a_known_suffix(tmp_path: Path) -> None:
    with pytest.raises(RowsError, match="seed is missing"):
        rows_of(tmp_path / "results.jsonl").append({"model": "a"})
    with pytest.raises(RowsError, match=r"\.jsonl or \.csv"):
        rows_of(tmp_path / "results.txt")


@pytest.mark.parametrize("path", sorted(RESULTS.glob("[!.]*.*")), ids=lambda path: path.name)
def test_shipped_rows_read_as_they_are_written(path: Path) -> None:
    read = Rows(path, key=()).read()
    if path.suffix == ".jsonl":
        assert read == [json.loads(line) for line in path.read_text().splitlines()]
    else:
        pd.testing.assert_frame_equal(pd.DataFrame(read), pd.read_csv(path))
    assert read
