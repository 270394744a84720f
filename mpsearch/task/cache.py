"""Tensors that are made once and kept on disk: decoded images, trained float models.

They are in `cache_folder()`. Entries are named by the content that they were made of, so they never go stale;
deleting the folder is always safe.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mpsearch.cache import cache_folder
from mpsearch.errors import WriteError
from mpsearch.state_dict import save_tensors

logger = logging.getLogger(__name__)


def cached_tensors(name: str, make: Callable[[], dict[str, Tensor]]) -> tuple[dict[str, Tensor], Path]:
    """The tensors kept under `name`, or `make()`, then kept; and the file.

    They are memory-mapped: processes that read the same entry share its pages. Of processes that start at once, one
    makes the entry and the others wait. Where the disk is full, the tensors are returned all the same.
    """
    path = cache_folder() / f"{name}.safetensors"
    if (tensors := _load(path)) is not None:
        return tensors, path
    with FileLock(path.with_suffix(".lock")):
        if (tensors := _load(path)) is not None:
            return tensors, path
        tensors = make()
        try:
            save_tensors(tensors, path)
        except WriteError as error:
            logger.warning("nothing is kept in the cache: %s", error)
            return tensors, path
    return _load(path) or tensors, path


def _load(path: Path) -> dict[str, Tensor] | None:
    try:
        return dict(load_file(path)) if path.is_file() else None
    except (SafetensorError, OSError) as error:
        logger.warning("%s is damaged (%s) and is made again", path, error)
        return None
