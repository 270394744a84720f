"""What the task tests share: a cache of their own, one thread, and small folders of images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


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
