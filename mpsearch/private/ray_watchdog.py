"""Ends what a killed driver leaves of its own Ray cluster: a script that runs beside the driver and imports none of it.

    python ray_watchdog.py FOLDER [SECONDS]

Ray's agents outlive a killed driver by a minute or more: each tells the cluster's head, which is gone too, that its
raylet has died, and Ray waits that long for the head to come back (`gcs_rpc_server_reconnect_timeout_s`). This process
reads its standard input, on which a driver that ends in good order says so. Where it ends without a word the driver was
killed: after a little time, every process that named the folder of the cluster in its command line or environment,
or had a file of it open, is ended, and the folder removed, unless the next driver of the run has it already.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from pathlib import Path

import psutil

GRACE_S = 8.0
"""For what ends by itself: Ray's own processes end their children in good order."""


def processes_of(folder: str) -> list[psutil.Process]:
    """This user's processes that name a folder in their command line or environment, or have a file of it open.

    Ray's agents write a title over the first two, and a log into the folder.
    """
    those = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid == os.getpid() or process.uids().real != os.getuid():
                continue
            named = (*process.cmdline(), *process.environ().values())
            if any(folder in text for text in named) or any(folder in file.path for file in process.open_files()):
                those.append(process)
    return those


def main(folder: str, grace_s: float = GRACE_S) -> None:
    """Wait for the driver's end; where it was killed, see that nothing of its cluster is left."""
    driver = os.getppid()
    if sys.stdin.buffer.read():
        return
    left = processes_of(folder)  # before the next driver of the run can start any
    time.sleep(grace_s)
    for process in left:
        with contextlib.suppress(psutil.Error):  # which knows when another process has got the number
            process.kill()
    with contextlib.suppress(OSError, ValueError, KeyError):
        owner = json.loads(Path(folder, "driver.json").read_text(encoding="utf-8"))
        if owner["pid"] == driver:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(float, sys.argv[2:]))
