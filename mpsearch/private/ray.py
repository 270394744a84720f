"""Ray 2.60: what it prints, and where it keeps its files."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpsearch.private import ray_watchdog


def files_in(folder: Path, shared_memory: bool = True) -> dict[str, Any]:
    """For `ray.init`: a new cluster keeps sockets and logs there instead of in `/tmp/ray`.

    Objects too, where there is no shared memory that can be written: Ray would wait for it in vain.
    """
    return {"_temp_dir": str(folder)} | ({} if shared_memory else {"_plasma_directory": str(folder)})


def mute_workers(ray: Any) -> None:
    """Do not print what the workers of a cluster print, their deaths too: we report those."""
    ray._private.worker._worker_logs_enabled = False


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[None]:
    """For the time of the block a watchdog sees that the cluster in `folder` ends with this process, even if killed."""
    watchdog = subprocess.Popen(
        [sys.executable, ray_watchdog.__file__, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C, and whoever ends the driver's process group, must not end it first
    )
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # it was killed
            watchdog.communicate(b"in good order")


@contextlib.contextmanager
def handler_of_sigterm_kept() -> Iterator[None]:
    """Have `ray.init` leave the process's handler of SIGTERM alone.

    First it sets one that ends the process with exit code 15, then its C++ one that ends it with a dump; the first is
    kept from it, so that a signal in the seconds which it takes ends in good order, and the second is taken back.
    """
    if threading.current_thread() is not threading.main_thread():  # Ray leaves it alone there, and Python forbids it
        yield
        return
    from ray._private import utils

    before, theirs = signal.getsignal(signal.SIGTERM), utils.set_sigterm_handler
    utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = theirs
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)
