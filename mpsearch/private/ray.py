"""Ray 2.60: what it prints, where it keeps its files, and where Tune runs."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

TUNE_HERE: dict[str, Any] = {"_remote": False}
"""For `tune.run`: with ray:// too, the controller runs in this process, where the run folder is."""


def files_in(folder: Path) -> dict[str, Any]:
    """For `ray.init`: a new cluster keeps sockets and logs there instead of in `/tmp/ray`."""
    return {"_temp_dir": str(folder)}


def mute_workers(ray: Any) -> None:
    """Do not print what the workers of a cluster print, their deaths too: we report those."""
    ray._private.worker._worker_logs_enabled = False


@contextlib.contextmanager
def session_of_client(ray: Any) -> Iterator[None]:
    """With ray://, a place for Tune's files: they go beside those of this machine's Ray node, and here is none.

    Tune's own answer is to move the whole search to the cluster, away from the run folder.
    """
    if not ray.util.client.ray.is_connected():
        yield
        return
    with tempfile.TemporaryDirectory(prefix="mpsearch-") as path:
        ray._private.worker._global_node = SimpleNamespace(get_session_dir_path=lambda: path)
        try:
            yield
        finally:
            ray._private.worker._global_node = None
