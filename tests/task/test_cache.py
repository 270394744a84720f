"""The cache: made once, whole or not at all, and never in the way."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mpsearch.task.cache import cache_folder, cached_tensors, content_key


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
