"""Files that are written whole or not at all: all that mpsearch puts on a disk, records apart, goes through here.

A file is written beside the one that it replaces and takes its place when it is whole, so a reader never sees half of
it, and a full disk leaves the old one. Records are appended instead (`record.RunFolder.append`).

What is read may have come from anybody. `read_whole` and `open_own` take regular files alone: a pipe would be waited
for, a device never ends, and a link leads out of the folder that is written.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mpsearch.errors import WriteError

MOST_BYTES = 64 * 2**20
"""Of a document, or a line of a record: what is larger was not written by mpsearch, nor by a person."""

_ADVICE = {
    errno.ENOSPC: "make room on that disk, then do it again",
    errno.EDQUOT: "make room within your quota, then do it again",
    errno.ENOENT: "make its folder first, or give another path",
    errno.ENOTDIR: "a part of the path is a file: give another path",
    errno.EISDIR: "it is a folder: give the path of a file, or remove it",
    errno.ENAMETOOLONG: "give a shorter name",
}


def write_error(path: Path, error: OSError) -> WriteError:
    """The error that says which file could not be written, why, and what to do."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    return WriteError(f"cannot write {path}: {reason}: {_ADVICE.get(error.errno or 0, 'make its folder writable')}")


def read_whole(path: str | Path, most: int = MOST_BYTES) -> bytes:
    """The content of a regular file of at most so many bytes. Raises OSError, where it is none as well."""
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe is not waited for
    with os.fdopen(file, "rb") as stream:
        size = _require_regular(os.fstat(file), path)
        if size > most:
            raise OSError(errno.EFBIG, f"it has {size:,} bytes, and at most {most:,} are read", str(path))
        return stream.read(size)


def read_text(path: str | Path, most: int = MOST_BYTES) -> str:
    """The same, decoded as UTF-8, with every end of a line as a newline. Raises OSError and UnicodeDecodeError."""
    return read_whole(path, most).decode().replace("\r\n", "\n").replace("\r", "\n")


def require_regular(path: str | Path) -> None:
    """Raises OSError: there is no regular file, for a library that would open whatever is there."""
    _require_regular(os.stat(path), path)


def open_own(path: Path, flags: int) -> int:
    """A descriptor of a file that is changed where it lies, never through a link. Raises OSError."""
    try:
        file = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OSError(errno.ELOOP, "it is a link, and only a file of the folder is written", str(path)) from None
    try:
        _require_regular(os.fstat(file), path)
    except OSError:
        os.close(file)
        raise
    return file


def is_stream(path: Path) -> bool:
    """Whether the path leads to something that cannot be replaced: `-o /dev/stdout`."""
    if str(path) in ("/dev/stdout", "/dev/stderr") or path.is_relative_to("/dev/fd"):
        return True
    return path.exists() and not (path.is_file() or path.is_dir())


def _require_regular(status: os.stat_result, path: str | Path) -> int:
    """Its size. Raises OSError where it is no regular file."""
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is a pipe or a device, and no file", str(path))
    return status.st_size


@contextmanager
def replacing(path: str | Path, *, sync: bool = False) -> Iterator[Path]:
    """A temporary neighbour of `path` to be written inside the block; it takes the place of `path` when that ends well.

    It has the permissions that the umask leaves. Where `path` is a pipe or a device, that itself is written to.

    Args:
        path: of the file, which may exist.
        sync: wait until the disk has it.

    Raises:
        WriteError: it could not be written; `path` is as it was and the neighbour is gone.
    """
    path = Path(path)
    try:
        temporary = path if is_stream(path) else path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        if temporary is path:
            yield path
            return
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        try:
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)  # safetensors replaces the file by one that no other user may read
            if sync:
                with temporary.open("rb+") as file:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise write_error(path, error) from None


def write_text(path: str | Path, text: str, *, sync: bool = False) -> Path:
    """Write a text in UTF-8. Raises WriteError."""
    with replacing(path, sync=sync) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(path: str | Path, document: Any, *, sync: bool = False) -> Path:
    """Write a document as JSON, which has finite numbers only. Raises WriteError, and ValueError on NaN."""
    return write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n", sync=sync)


def with_home(path: str | Path) -> Path:
    """A path with the home folder for its `~`; it stays as it is where no home is known, and leads nowhere.

    >>> with_home("~nobody-of-that-name/a").name
    'a'
    """
    return Path(os.path.expanduser(path))


def nameable(path: str | Path) -> Path:
    """The path, where what is written below it can name it. Raises WriteError: its bytes are not UTF-8."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise WriteError(
            f"the path {os.fsencode(path)!r} is not UTF-8, which tables and pages are written in: give another path"
        ) from None
    return Path(path)


def make_folder(path: Path) -> None:
    """Make a folder, if it is missing. Raises WriteError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(path, error) from None


def no_room(error: BaseException) -> bool:
    """Whether an error says that a disk is full, or a quota used up."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def filling(folder: Path) -> Iterator[None]:
    """Make a folder, if it is missing, for the files that the block puts there: all of them or none.

    Raises:
        WriteError: the folder or a file of it cannot be written; what the block had put there is gone.
    """
    new, before = False, set[Path]()
    try:
        new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        before = set(folder.iterdir())
        yield
    except BaseException as error:
        for path in set(folder.iterdir()) - before if os.path.isdir(folder) else ():
            path.unlink() if path.is_file() else shutil.rmtree(path)
        if new and os.path.isdir(folder):
            folder.rmdir()
        if isinstance(error, OSError):
            raise write_error(folder, error) from None
        raise


def sha256(path: str | Path) -> str:
    """Of a regular file's content, 64 hex digits. Raises OSError."""
    require_regular(path)
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_parts(folder: Path, name: str = "*") -> None:
    """Remove what a killed process left of a file called `name`; only where nobody else can be writing it."""
    for part in folder.glob(f".{name}.*.part"):
        with suppress(OSError):
            part.unlink()
