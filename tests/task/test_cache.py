"""The cache: made once, whole or not at all, and never in the way."""

from __future__ import annotations

import multiprocessing
import os
import pwd
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mpsearch import cache
from mpsearch.cache import cache_folder, content_key
from mpsearch.task.cache import cached_tensors


def test_an_entry_is_made_once_and_then_read(cache: Path):
    made = []

    def make() -> dict[str, Tensor]:
        made.append(1)
        return {"a": torch.arange(3)}

    for _ in range(2):
        tensors, path = cached_tensors("entry", make)
        assert torch.equal(tensors["a"], torch.arange(3))
    assert path == cache / "entry.safetensors"
    assert made == [1]


def test_a_damaged_entry_is_made_again(cache: Path):
    (cache / "entry.safetensors").write_bytes(b"half a file")
    tensors, path = cached_tensors("entry", lambda: {"a": torch.ones(2)})
    assert torch.equal(tensors["a"], torch.ones(2))
    assert path.stat().st_size > 11


def test_a_full_disk_costs_the_entry_and_nothing_else(cache: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    tensors, _ = cached_tensors("entry", lambda: {"a": torch.ones(2)})
    assert torch.equal(tensors["a"], torch.ones(2))
    assert [path.name for path in cache.iterdir()] == ["entry.lock"]


def test_a_failure_to_make_leaves_nothing_behind(cache: Path):
    def fail() -> dict[str, Tensor]:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        cached_tensors("entry", fail)
    assert not list(cache.glob("*.safetensors"))


def test_a_folder_that_cannot_be_made_is_replaced_by_a_temporary_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MPSEARCH_CACHE", str(tmp_path / "file" / "below"))
    folder = cache_folder()
    assert folder.is_dir()
    assert tmp_path not in folder.parents


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The temporary folder of a user who has neither a name nor a home."""

    def unknown(uid: int) -> None:
        raise KeyError(f"uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "MPSEARCH_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cache._folder_of_this_process.cache_clear()
    yield tmp_path
    cache._folder_of_this_process.cache_clear()


def test_a_user_without_a_home_has_a_cache_named_by_number(nobody: Path):
    assert cache_folder() == nobody / f"mpsearch-{os.getuid()}"
    assert cache_folder().stat().st_mode & 0o777 == 0o700


def test_a_user_without_a_name_has_a_number_for_a_name():
    without = "import pwd; pwd.getpwuid = {}.__getitem__; import mpsearch, getpass; print(getpass.getuser())"
    bare = {key: os.environ[key] for key in ("PATH", "PYTHONPATH") if key in os.environ}
    done = subprocess.run([sys.executable, "-c", without], env=bare, capture_output=True, text=True, check=False)
    assert done.stdout == f"{os.getuid()}\n", done.stderr


@pytest.mark.parametrize("kind", ["open to others", "a link", "another user's"])
def test_a_temporary_cache_that_is_not_the_users_alone_is_not_used(
    nobody: Path, kind: str, monkeypatch: pytest.MonkeyPatch
):
    folder = nobody / f"mpsearch-{os.getuid()}"
    if kind == "a link":
        (nobody / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(nobody / "elsewhere")
    else:
        folder.mkdir(mode=0o700)
    if kind == "open to others":
        folder.chmod(0o770)
    if kind == "another user's":
        monkeypatch.setattr(os, "getuid", lambda: 54321)
        folder.rename(nobody / "mpsearch-54321")
    used = cache_folder()
    assert used.name not in (folder.name, "mpsearch-54321")
    assert used.stat().st_mode & 0o777 == 0o700
    assert cache_folder() == used  # one a process


def _slow_entry(folder: str, counter: Path) -> None:
    import os
    import time

    os.environ["MPSEARCH_CACHE"] = folder

    def make() -> dict[str, Tensor]:
        with counter.open("a") as file:
            file.write("x")
        time.sleep(0.3)
        return {"a": torch.ones(1)}

    cached_tensors("entry", make)


def test_of_processes_that_start_at_once_one_makes_the_entry(cache: Path, tmp_path: Path):
    fork = multiprocessing.get_context("fork")
    workers = [fork.Process(target=_slow_entry, args=(str(cache), tmp_path / "made"), daemon=True) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(20)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert (tmp_path / "made").read_text() == "x"


def test_the_content_key_depends_on_every_fact_and_not_on_key_order():
    assert content_key({"a": 1, "b": 2}) == content_key({"b": 2, "a": 1})
    assert len({content_key(1, 2), content_key(2, 1), content_key([1, 2]), content_key(1)}) == 4


def test_weights_that_lie_channels_last_are_kept(cache: Path):
    weight = torch.arange(24.0).reshape(2, 3, 2, 2).to(memory_format=torch.channels_last)
    tensors, _ = cached_tensors("entry", lambda: {"weight": weight})
    assert torch.equal(tensors["weight"], weight)
