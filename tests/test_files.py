"""Files whole or not at all: what a full disk, a killed process and a wrong path leave behind, whoever writes."""

from __future__ import annotations

import importlib
import os
import resource
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from commands import mpsearch as mpsearch_command
from quick import QUICK
from torch import nn

import mpsearch
from mpsearch.errors import MpsearchError, WriteError
from mpsearch.exporters.export import export
from mpsearch.exporters.packages import need
from mpsearch.exporters.targets import TARGETS
from mpsearch.files import read_whole, replacing, write_json, write_text
from mpsearch.graph.layers import inspect_model
from mpsearch.metric import TOP1
from mpsearch.precision import LayerPrecision, Precision, PrecisionConfig
from mpsearch.record import RunFolder, TrialRecord
from mpsearch.report.parts import write_page
from mpsearch.search.book import attempt
from mpsearch.state_dict import save_tensors, save_weights
from mpsearch.warmstart.descent import Descent, Snapshot
from mpsearch.warmstart.table import SensitivityTable

CONFIG = PrecisionConfig.uniform(["0", "3"], LayerPrecision.parse("uniform:4", "uniform:8"))
TABLE = SensitivityTable("kl", {("0", "weight", Precision("uniform", 4, "channel")): 0.5}, 8, 1.0)
SNAPSHOT = Snapshot(0.5, 1, {"0": 4.0}, {}, {}, 0.1)


def network() -> mpsearch.QuantizedNetwork:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 8)).eval()
    x = torch.rand(16, 1, 8, 8)
    layers = inspect_model(model, x).layers
    prepared = mpsearch.prepare(model, CONFIG, x, layers).eval()
    return mpsearch.QuantizedNetwork(prepared, layers, "net", "task", example_input=x[:2])


def run_folder(path: Path) -> RunFolder:
    folder = RunFolder(path)
    if not folder.trials_jsonl.exists():
        RunFolder.create(path, "name: a\n", metric=TOP1)
        with folder.driving():
            folder.append(TrialRecord(CONFIG, "complete", 0.5, 0.25, number=0))
    return folder


def write_state(path: Path) -> None:
    run_folder(path).running = ()


WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: write_text(path / "a.txt", "a" * 9999),
    "json": lambda path: write_json(path / "a.json", ["a" * 9999], sync=True),
    "tensors": lambda path: save_tensors({"a": torch.ones(64, 64)}, path / "a.safetensors"),
    "weights": lambda path: save_weights(nn.Linear(64, 64), path / "trial-0.safetensors"),
    "study": lambda path: RunFolder.create(path, f"name: a\n# {'x' * 9999}", metric=TOP1),
    "state": write_state,
    "front": lambda path: run_folder(path).write_front({"a": 1}),
    "parquet": lambda path: run_folder(path).write_parquet(),
    "page": lambda path: write_page(path / "report.html", "a", ["b"], ["c"]),
    "table.json": lambda path: TABLE.save(path / "table.json"),
    "table.parquet": lambda path: TABLE.save(path / "table.parquet"),
    "descent": lambda path: Descent((SNAPSHOT,), (), 1.0).save(path),
}
NEW_RUN = {"study"}  # writes into an empty folder only


@contextmanager
def no_byte_may_be_written() -> Iterator[None]:
    """The operating system refuses every write into a file of this process; pipes and devices still work."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Disk:
    """A folder on a disk that can be filled."""

    def __init__(self, path: Path, reason: str, full: Callable[[Path], AbstractContextManager[None]]) -> None:
        self.path, self.reason, self._full = path, reason, full

    def full(self) -> AbstractContextManager[None]:
        return self._full(self.path)

    def files(self) -> dict[str, bytes]:
        files = (path for path in self.path.rglob("*") if path.is_file() and path.name not in ("filler", "driver.lock"))
        return {str(path.relative_to(self.path)): path.read_bytes() for path in files}


@contextmanager
def filled(path: Path) -> Iterator[None]:
    filler = path / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    try:
        yield
    finally:
        filler.unlink()


@pytest.fixture(params=["limit", "tmpfs"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    """Full in two ways: by a limit of the process, which anybody has, and in earnest, which takes root."""
    if request.param == "limit":
        yield Disk(tmp_path, "File too large", lambda _: no_byte_may_be_written())
        return
    mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(tmp_path)]
    if sys.platform != "linux" or os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a file system can be mounted by root on Linux only")
    try:
        yield Disk(tmp_path, "No space left on device", filled)
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.mark.parametrize("writer", WRITERS)
def test_full_disk_leaves_what_was_there_and_says_which_file(disk: Disk, writer: str):
    write = WRITERS[writer]
    if writer not in NEW_RUN:
        write(disk.path)
    before = disk.files()
    with disk.full(), pytest.raises(WriteError, match=rf"cannot write {disk.path}/.*: {disk.reason}: \w+"):
        write(disk.path)
    assert disk.files() == before
    assert not list(disk.path.rglob("*.part"))
    write(disk.path)  # there is room again


@pytest.mark.parametrize("target", TARGETS)
def test_export_to_a_full_disk_leaves_nothing(disk: Disk, target: str):
    try:
        need(target)
    except mpsearch.errors.ExportError as error:
        pytest.skip(str(error))
    net = network()
    export(net, target, disk.path / "warm", allow_lossy=True)  # what is imported and compiled comes before the limit
    with disk.full(), pytest.raises(WriteError, match=rf"cannot write {disk.path}/out.*: {disk.reason}: \w+"):
        export(net, target, disk.path / "out", allow_lossy=True)
    assert not (disk.path / "out").exists()
    export(net, target, disk.path / "out", allow_lossy=True)


@pytest.mark.parametrize("target", ["native", "packed"])
def test_export_to_a_name_that_is_too_long_says_so(tmp_path: Path, target: str):
    with pytest.raises(WriteError, match="File name too long: give a shorter name"):
        export(network(), target, tmp_path / ("x" * 256), allow_lossy=True, verify=False)


def test_file_with_a_name_that_is_too_long_says_so(tmp_path: Path):
    with pytest.raises(WriteError, match="File name too long: give a shorter name"):
        write_text(tmp_path / ("x" * 256), "")


def test_file_that_is_larger_than_any_of_its_kind_is_not_read(tmp_path: Path):
    with (tmp_path / "a").open("wb") as file:
        file.truncate(2**40)  # of which nothing is on the disk
    with pytest.raises(OSError, match="it has 1,099,511,627,776 bytes, and at most 67,108,864 are read"):
        read_whole(tmp_path / "a")


def test_failure_of_the_block_leaves_the_old_file(tmp_path: Path):
    write_text(tmp_path / "a", "old")
    with suppress(KeyError), replacing(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise KeyError
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_missing_folder_and_folder_in_the_place_are_refused_with_advice(tmp_path: Path):
    with pytest.raises(WriteError, match=r"missing/a: No such file or directory: make its folder first"):
        write_text(tmp_path / "missing" / "a", "")
    (tmp_path / "folder").mkdir()
    with pytest.raises(WriteError, match=r"folder: Is a directory: it is a folder: give the path of a file"):
        write_text(tmp_path / "folder", "")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_follow_the_umask(tmp_path: Path, umask: int):
    before = os.umask(umask)
    try:
        write_text(tmp_path / "a", "")
        save_tensors({"a": torch.ones(2)}, tmp_path / "b")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o666 & ~umask}


def test_standard_output_is_written_to_and_not_replaced():
    code = "from mpsearch.files import write_text; write_text('/dev/stdout', 'text')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "text"
    assert Path("/dev/stdout").is_symlink()


def test_driver_removes_what_a_killed_one_was_writing(tmp_path: Path):
    folder = run_folder(tmp_path)
    folder.checkpoints.mkdir()
    torn = [tmp_path / ".front.json.ab12.part", folder.checkpoints / ".trial-3.safetensors.ab12.part"]
    for path in torn:
        path.write_bytes(b"half")
    with folder.driving():
        assert not any(path.exists() for path in torn)


def test_trial_whose_weights_find_no_room_ends_the_run_and_is_on_no_record(tmp_path: Path):
    def full(_: object) -> TrialRecord:
        write_text(tmp_path / "missing" / "trial-0.safetensors", "")
        raise AssertionError

    with pytest.raises(WriteError):
        attempt(full, None)  # type: ignore[arg-type]


@contextmanager
def no_room_from(write: int, folder: Path) -> Iterator[list[str]]:
    """The disk of `folder` is full from the so-manieth file on that is opened there to be written; yields their names.

    The file that is being opened is still made, as on a disk that has inodes and no blocks left.
    """
    opened: list[str] = []
    really = os.open

    with ExitStack() as stack:

        def opening(path: object, flags: int, *rest: object, **options: object) -> int:
            name = Path(os.path.abspath(str(path)))
            if flags & (os.O_WRONLY | os.O_RDWR) and folder in name.parents and name.suffix != ".lock":
                opened.append(name.name)
                if len(opened) == write:
                    stack.enter_context(filled(folder))
            return really(path, flags, *rest, **options)  # type: ignore[arg-type]

        stack.enter_context(patch.object(os, "open", opening))
        yield opened


@pytest.mark.parametrize("disk", ["tmpfs"], indirect=True)
@pytest.mark.parametrize("target", ["native", "packed"])
def test_export_whose_disk_is_full_at_any_write_leaves_nothing(disk: Disk, target: str):
    """The last write puts what verifying found into a manifest that is there already."""
    net = network()
    for count in (1, 2, 3):
        with pytest.raises(WriteError), no_room_from(count, disk.path):
            export(net, target, disk.path / "out")
        assert not (disk.path / "out").exists()
    export(net, target, disk.path / "out")


@pytest.mark.parametrize("disk", ["tmpfs"], indirect=True)
def test_search_whose_disk_is_full_at_any_write_tears_nothing_and_is_resumed(disk: Disk, monkeypatch):
    """Of a search with a toy for a task, whose every write fails in its turn."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "search"))
    drive = importlib.import_module("drive")
    count = 0
    while True:
        count += 1
        path = disk.path / f"run-{count}"
        with suppress(MpsearchError), no_room_from(count, disk.path) as opened:
            drive.drive(path, trials=3, storage="none")
        assert not list(path.rglob("*.part"))
        if len(opened) < count:
            break
        assert [record.number for record in RunFolder(path).records()] == list(range(len(RunFolder(path).records())))
        drive.drive(path, trials=3, storage="none")
        assert sorted(record.number for record in RunFolder.open(path).records()) == [0, 1, 2]
    assert count > 10


@pytest.mark.slow
@pytest.mark.study
@pytest.mark.parametrize("disk", ["tmpfs"], indirect=True)
def test_study_whose_disk_is_full_at_any_write_says_so_and_is_resumed(disk: Disk):
    """Of a whole command: study, facts, weights, front, table, report, log and the Optuna study."""
    cold = ("warm_start.method=none", "warm_start.ilp=false", "warm_start.combinations=0", "search.trials=2")
    sets = [part for override in (*QUICK, *cold, "storage=sqlite") for part in ("--set", override)]
    tried, refused = 0, 0
    for count in range(1, 100, 2):  # every second one: each takes seconds
        shutil.rmtree(disk.path / "run", ignore_errors=True)
        with no_room_from(count, disk.path) as opened:
            done = mpsearch_command("run", "digits", "--out", "run", *sets, cwd=disk.path)
        if len(opened) < count:
            break
        assert "Traceback" not in done.stderr, done.stderr
        assert not list(disk.path.rglob("*.part"))
        if done.returncode:
            refused += 1
            assert done.returncode == 2, done.stderr
            assert "No space left on device" in done.stderr, done.stderr
        begun = (disk.path / "run" / "run.json").exists()
        again = ["resume", "run"] if begun else ["run", "digits", "--out", "run", *sets]
        done = mpsearch_command(*again, cwd=disk.path)
        assert done.returncode == 0, done.stderr
        folder = RunFolder.open(disk.path / "run")
        assert [record.state for record in folder.records()] == ["complete", "complete"]
        for file in (folder.front_json, folder.problem_json, folder.report_html, folder.trials_parquet):
            assert file.stat().st_size
        tried += 1
    assert tried > 5
    assert refused > 3
