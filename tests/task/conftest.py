"""What the task tests share: a cache of their own, one thread, and small folders of images."""

from __future__ import annotations

import contextlib
import importlib
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mpsearch.task import hub


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MPSEARCH_CACHE", str(folder))
    return folder


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A hub that takes connections and never answers, as behind many a firewall."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("HF_HUB_OFFLINE", "")  # as it is set back to
        for name in ("huggingface_hub.constants", "datasets.config"):
            with contextlib.suppress(ImportError):
                monkeypatch.setattr(importlib.import_module(name), "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "PATIENCE_S", 0.2)
        yield address


MakeFolder = Callable[..., Path]


@pytest.fixture
def make_folder(tmp_path: Path) -> MakeFolder:
    """Writes `root/<split>/<class>/<i>.png`: class c of n is plain, of brightness 255*c/(n-1)."""

    def make(
        splits: tuple[str, ...] = ("train", "val", "test"),
        classes: tuple[str, ...] = ("ant", "bee"),
        per_class: int = 4,
        size: tuple[int, int] = (8, 8),
    ) -> Path:
        root = tmp_path / "images"
        for split in splits or ("",):
            for label, name in enumerate(classes):
                folder = root / split / name
                folder.mkdir(parents=True)
                for i in range(per_class):
                    value = 255 * label // (len(classes) - 1)
                    pixels = np.full((*size, 3), value, dtype=np.uint8)
                    Image.fromarray(pixels).save(folder / f"{i}.png")
        return root

    return make
