"""The user's folder for what is made once and kept: decoded data, float networks, what was trusted."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

from mpsearch.errors import WriteError

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """The user's folder for what is made once and kept, created and writable.

    It is `$MPSEARCH_CACHE`, else `~/.cache/mpsearch`. Where that cannot be written, or the user has no home, it is
    `mpsearch-UID` in the system's temporary folder, and where that is not this user's alone, one of this process.

    Raises:
        WriteError: none of them can be written.
    """
    try:
        folder = Path(os.environ.get("MPSEARCH_CACHE") or Path.home() / ".cache" / "mpsearch").expanduser()
        return _writable(folder)
    except RuntimeError:
        logger.info("this user has no home: the cache is in the temporary folder")
    except OSError as error:
        logger.warning("the cache folder cannot be written: %s", error)
    try:
        folder = Path(tempfile.gettempdir()) / f"mpsearch-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        about = folder.lstat()
        if stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid() and not about.st_mode & 0o077:
            return _writable(folder)
        logger.warning("the cache folder %s is not used: it is not this user's alone", folder)
    except OSError as error:
        logger.warning("the cache folder cannot be written: %s", error)
    return _folder_of_this_process()


def _writable(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryFile(dir=folder):
        return folder


@functools.cache
def _folder_of_this_process() -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix="mpsearch-"))
    except OSError as error:
        raise WriteError(
            f"no folder for the cache can be written ({error}): set MPSEARCH_CACHE to one that can"
        ) from None


def content_key(*facts: Any) -> str:
    """24 hex digits that name what `facts` (JSON values) describe."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
