"""The run folder: what has been appended is there, whatever happens afterwards."""

import errno
import json
import math
import os
import resource
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import pandas as pd
import pytest

from mpsearch.errors import RunError, WriteError
from mpsearch.metric import TOP1
from mpsearch.precision import LayerPrecision, PrecisionConfig
from mpsearch.record import (
    SCHEMA,
    FinalRecord,
    RunFolder,
    RunningTrial,
    TrialRecord,
    WallTime,
    record_from_json,
    record_to_json,
)

CONFIG = PrecisionConfig(
    {
        "conv1": LayerPrecision.parse("uniform:8", "uniform:8"),
        "layer1.0.conv": LayerPrecision.parse("shift:4/tensor", "apot:3"),
        "größe/fc": LayerPrecision.parse("float", "uniform:1"),
    }
)


def record(number: int = 0, **changes) -> TrialRecord:
    return replace(TrialRecord(CONFIG, "complete", score=0.5, cost=0.25, number=number), **changes)


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(tmp_path / "runs" / "a", "name: a\n", metric=TOP1)


def script(code: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


FULL = TrialRecord(
    CONFIG,
    "complete",
    score=0.1 + 0.2,  # no short decimal form
    cost=1 / 3,
    number=7,
    origin="sampler",
    seed=3,
    start_loss=1e-308,
    end_loss=2.5,
    wall=WallTime(0.1, 2.3, 4.7),
    started_s=time.time(),
    peak_memory_bytes=2**40 + 1,
)
FAILED = TrialRecord(CONFIG, "failed", reason='ValueError: "two\nlines" \u2028 and \\ more', number=8)


@pytest.mark.parametrize("given", [FULL, FAILED], ids=["full", "failed"])
def test_record_survives_json_exactly(given):
    text = record_to_json(given)
    assert "\n" not in text
    back = record_from_json(text)
    assert back == given
    assert list(back.config) == list(given.config)  # layer order too


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_record_with_a_number_that_is_none_is_refused(bad):
    with pytest.raises(RunError, match=r"trial 0 has score = (nan|inf)"):
        record_to_json(record(score=bad))
    with pytest.raises(RunError, match="wall"):
        record_to_json(record(wall=WallTime(train_s=bad)))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.pop("config"), "'config' is missing"),
        (lambda d: d.update(colour=1), "unknown key 'colour'"),
        (lambda d: d.update(state="running"), "'state': input should be .*, got 'running'"),
        (lambda d: d["config"].update(conv1="uniform:17 x uniform:8"), "uniform has no 17-bit form"),
        (lambda d: d["config"].update(conv1="uniform:8"), "cannot read layer precision"),
    ],
)
def test_record_that_is_none_is_refused_with_what_is_wrong(edit, message):
    document = json.loads(record_to_json(FULL))
    edit(document)
    with pytest.raises(RunError, match=message):
        record_from_json(json.dumps(document))


def test_appended_records_come_back_in_order(folder):
    with folder.driving():
        for number in (1, 0, 2):
            folder.append(record(number))
        folder.append_final(FinalRecord(1, 0, 100, 0.5, 0.25))
    again = RunFolder.open(folder.path)
    assert again.records() == [record(1), record(0), record(2)]
    assert again.finals() == [FinalRecord(1, 0, 100, 0.5, 0.25)]
    assert again.id == folder.id
    assert again.study_yaml.read_text() == "name: a\n"


def test_append_outside_driving_is_a_mistake_of_ours(folder):
    with pytest.raises(RuntimeError, match="driving"):
        folder.append(record())


def test_append_is_on_the_disk_before_it_returns(folder, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    with folder.driving():
        folder.append(record())
    assert synced[-1] == folder.trials_jsonl.stat().st_size > 0


def test_torn_last_line_is_skipped_by_readers_and_cut_off_by_the_next_driver(folder):
    with folder.driving():
        folder.append(record(0))
        folder.append(record(1))
    whole = folder.trials_jsonl.read_bytes()
    for cut in (2, 40, len(record_to_json(record(1)))):
        folder.trials_jsonl.write_bytes(whole[:-cut])
        assert RunFolder.open(folder.path).records() == [record(0)]
        with folder.driving():
            folder.append(record(2))
        assert folder.records() == [record(0), record(2)]


def test_last_line_that_only_lacks_its_newline_is_whole(folder):
    with folder.driving():
        folder.append(record(0))
        folder.append_final(FinalRecord(0, 0, 100, 0.5, 0.25))
    for path in (folder.trials_jsonl, folder.finals_jsonl):
        path.write_bytes(path.read_bytes()[:-1])
    assert RunFolder.open(folder.path).records() == [record(0)]
    with folder.driving():
        folder.append(record(1))
    assert folder.records() == [record(0), record(1)]
    assert folder.finals() == [FinalRecord(0, 0, 100, 0.5, 0.25)]


def test_last_line_that_is_whole_and_wrong_is_not_cut_off(folder):
    folder.trials_jsonl.write_text('{"state": "complete"}')
    with pytest.raises(RunError, match=r"line 1: .*'config' is missing"), folder.driving():
        pass
    assert folder.trials_jsonl.read_text() == '{"state": "complete"}'


@pytest.mark.parametrize("name", ["trials.jsonl", "finals.jsonl", "prescreen.jsonl", "study.db"])
def test_link_is_not_written_through(folder, tmp_path, name):
    (tmp_path / "elsewhere").write_text("somebody's")
    (folder.path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match=rf"{name} is a link, .* delete it, or restore it from a copy"), folder.driving():
        pass
    assert (tmp_path / "elsewhere").read_text() == "somebody's"


def test_corrupt_line_is_named(folder):
    with folder.driving():
        for number in range(3):
            folder.append(record(number))
    lines = folder.trials_jsonl.read_text().splitlines(keepends=True)
    for damage in ("}{\n", lines[1][:50] + "\n", "\x00\x00\n"):
        folder.trials_jsonl.write_text(lines[0] + damage + lines[2])
        with pytest.raises(RunError, match=r"line 2: .* delete this line"):
            folder.records()
    folder.trials_jsonl.write_bytes(b"\xff\xfe\n")
    with pytest.raises(RunError, match="line 1"):
        folder.records()


@pytest.mark.parametrize("fails", ["write", "partly", "fsync"])
def test_disk_full_leaves_a_readable_file_and_says_what_is_safe(folder, monkeypatch, fails):
    write, fsync = os.write, os.fsync
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def broken_write(file, data):
        if fails == "write" or (fails == "partly" and len(data) <= 100):
            raise full
        return write(file, bytes(data)[:100] if fails == "partly" else data)

    def broken_fsync(file):
        if fails == "fsync":
            raise full
        fsync(file)

    with folder.driving():
        folder.append(record(0))
        before = folder.trials_jsonl.read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", broken_write)
            patch.setattr(os, "fsync", broken_fsync)
            with pytest.raises(RunError, match=r"trial 1 .*No space left.* 1 trials .*safe.*mpsearch resume"):
                folder.append(record(1))
        assert folder.trials_jsonl.read_bytes() == before
        folder.append(record(1))  # there is room again
    assert folder.records() == [record(0), record(1)]


def test_file_that_may_not_grow_in_earnest(folder):
    with folder.driving():
        folder.append(record(0))
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
        try:
            with pytest.raises(RunError, match=r"final training of trial 0 .*File too large.* 1 trials"):
                folder.append_final(FinalRecord(0, 0, 1, 0.5, 0.5))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert folder.finals() == []


def test_folder_that_holds_a_run_is_refused(folder):
    with pytest.raises(RunError, match=r"already holds a run.*mpsearch resume.*--out"):
        RunFolder.create(folder.path, "name: b\n", metric=TOP1)
    assert folder.study_yaml.read_text() == "name: a\n"


def test_folder_half_made_by_a_killed_process_is_made_again(folder):
    (folder.path / "run.json").unlink()
    RunFolder.create(folder.path, "name: b\n", metric=TOP1)
    assert RunFolder.open(folder.path).study_yaml.read_text() == "name: b\n"


def test_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot write the run folder .*Not a directory.*--out"):
        RunFolder.create(tmp_path / "file" / "run", "", metric=TOP1)
    with pytest.raises(RunError, match="cannot write the run folder"):
        RunFolder.create("/proc/run", "", metric=TOP1)


def test_folder_that_turned_unwritable_is_not_driven(folder, monkeypatch):
    def refuse(path, flags, *_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("filelock._unix.os.open", refuse)
    with pytest.raises(RunError, match=r"cannot write the run folder .*Permission denied"), folder.driving():
        pass


def test_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"holds no run.*mpsearch run STUDY --out"):
        RunFolder.open(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            json.dumps({"schema": "mpsearch/run/0", "mpsearch": "0.0.1"}),
            r"mpsearch 0\.0\.1 with schema 'mpsearch/run/0'",
        ),
        (json.dumps({"schema": "mpsearch/run/3", "mpsearch": "9.0"}), r"mpsearch 9\.0 .*read it with the version"),
        (json.dumps({"schema": SCHEMA}), "'id' is missing; restore"),
        (json.dumps({"schema": SCHEMA, "id": "a", "metric": {"name": "<"}}), "metric's name is letters, digits"),
        (json.dumps({"schema": "other/7"}), r"something else with schema 'other/7'"),
        ("{}", SCHEMA),
        ("[]", SCHEMA),
        ("no json", SCHEMA),
    ],
)
def test_foreign_schema_is_refused(folder, content, message):
    (folder.path / "run.json").write_text(content)
    with pytest.raises(RunError, match=message):
        RunFolder.open(folder.path)


def test_second_driver_is_refused_by_the_id_of_the_first(folder):
    with (
        folder.driving(),
        pytest.raises(RunError, match=rf"driven by process {os.getpid()} on "),
        RunFolder.open(folder.path).driving(),
    ):
        pass
    with RunFolder.open(folder.path).driving():
        pass


HOLD = """
    import sys, time
    from mpsearch.record import RunFolder, RunningTrial
    folder = RunFolder.open(sys.argv[1])
    with folder.driving():
        folder.running = [RunningTrial(4, "uniform", 0.5, 1.0)]
        print("holds", flush=True)
        time.sleep(60)
"""


def test_lock_and_running_trials_die_with_their_process(folder):
    driver = script(HOLD, folder.path)
    try:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "holds\n"
        with pytest.raises(RunError, match=f"process {driver.pid} "), folder.driving():
            pass
        assert folder.running == [RunningTrial(4, "uniform", 0.5, 1.0)]
    finally:
        driver.kill()
        driver.wait()
    assert folder.running == []  # although state.json still names one
    with folder.driving():
        assert folder.running == []


def test_front_is_replaced_whole_or_not_at_all(folder, monkeypatch):
    folder.write_front({"schema": "x", "trials": [1]})
    with pytest.raises(ValueError, match="JSON"):
        folder.write_front({"bad": math.nan})

    def fail(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(WriteError, match=r"cannot write .*front\.json: No space left"):
            folder.write_front({"schema": "y"})
    assert json.loads(folder.front_json.read_text()) == {"schema": "x", "trials": [1]}
    assert [path.name for path in folder.path.glob(".*")] == []  # no temporary file is left


def test_parquet_has_a_row_per_trial_and_the_precision_of_every_layer(folder):
    with folder.driving():
        folder.append(FULL)
        folder.append(FAILED)
    table = pd.read_parquet(folder.write_parquet())
    assert list(table["number"]) == [7, 8]
    assert table["score"][0] == FULL.score
    assert pd.isna(table["score"][1])
    assert table["reason"][1] == FAILED.reason
    assert table["wall.train_s"][0] == 2.3
    assert table["layer1.0.conv.weight"][0] == "shift:4/tensor"
    assert table["digest"][0] == CONFIG.digest


def test_file_that_cannot_be_written_is_named_when_a_run_is_driven(tmp_path):
    folder = RunFolder.create(tmp_path / "run", "", metric=TOP1)
    folder.finals_jsonl.mkdir()
    with (
        pytest.raises(RunError, match=r"cannot read .*finals\.jsonl: Is a directory; .* restore it from a copy"),
        folder.driving(),
    ):
        pass
