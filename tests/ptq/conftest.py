"""One thread for the PTQ tests, as everywhere layers are small; and where their helpers are."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Of every test here."""
