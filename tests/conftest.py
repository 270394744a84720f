"""What tests share: a cache and a working folder of their own, and a small trained task."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Workers that share two cores must not spin-wait for each other; set before torch starts its threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of the test run: nothing is read from, or left in, the user's."""
    folder = Path(os.environ.get("MPSEARCH_TEST_CACHE") or tmp_path_factory.mktemp("cache"))
    before = os.environ.get("MPSEARCH_CACHE")
    os.environ["MPSEARCH_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["MPSEARCH_CACHE"]
    else:
        os.environ["MPSEARCH_CACHE"] = before
