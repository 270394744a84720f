"""What tests share: a cache and a folder of the whole run, tiers, and a compiler that is not asked twice."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # `commands`

# Workers that share two cores must not spin-wait for each other; set before torch starts its threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

TIERS = ("study", "compile", "ray", "browser", "gpu", "slow")
"""Markers of what takes long or needs a tool; a test that has none of them is in the tier `unit`."""


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not any(map(item.get_closest_marker, TIERS)):
            item.add_marker("unit")
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)  # the longest and mostly waiting: first


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What collecting made, half a million objects, is there to the end: the garbage collector need not walk it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this test run that all its workers have."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session", autouse=True)
def cache(shared: Path) -> Iterator[Path]:
    """The cache of the test run, one for all workers: nothing is read from, or left in, the user's.

    Compiled code lies in torch's own folder, which workers share too and which is kept: its names are its content.
    """
    folder = Path(os.environ.get("MPSEARCH_TEST_CACHE") or shared / "cache")
    before = os.environ.get("MPSEARCH_CACHE")
    os.environ["MPSEARCH_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["MPSEARCH_CACHE"]
    else:
        os.environ["MPSEARCH_CACHE"] = before


@pytest.fixture(autouse=True)
def _compiler(request: pytest.FixtureRequest) -> None:
    """Tests marked `compile` are skipped where there is no compiler; vector units are not tried out: 30 s a process."""
    if request.node.get_closest_marker("compile"):
        from mpsearch.compiler import compiler_missing, part_caches, trust_vector_units

        if reason := compiler_missing():
            pytest.skip(reason)
        part_caches()
        trust_vector_units()


@pytest.fixture(autouse=True)
def _card(request: pytest.FixtureRequest) -> None:
    """Tests marked `gpu` are skipped where there is no card."""
    if request.node.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("there is no CUDA card")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For networks whose layers are too small to share out."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
