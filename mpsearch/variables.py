"""`${NAME}` in a study: read from the environment, written back as a name, and kept out of messages.

What a variable stands for in `storage`, under a key or a name that speaks of secrets (`SECRET`), is shown as `${NAME}`
in every message of ours (`errors.hidden`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote_plus

from mpsearch.errors import StudyError, hide

VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")
SECRET = re.compile(r"pass(?!file)|pwd|secret|token|credential|(api|access|private)_?key|odbc_connect", re.IGNORECASE)
"""What the name of a secret has in it, among a URL's arguments, variables and keys; not that of a file with one."""


def expand(value: Any, where: str, strict: bool = True) -> Any:
    """`value` with what variables stand for in all of its strings.

    Args:
        value: of a document.
        where: its key, for messages.
        strict: else a variable that is not set stays as it is.

    Raises:
        StudyError: a variable is not set, and has no default.
    """
    if isinstance(value, dict):
        return {key: expand(below, f"{where}.{key}", strict) for key, below in value.items()}
    if isinstance(value, list):
        return [expand(below, where, strict) for below in value]
    if not isinstance(value, str):
        return value
    key = where.removeprefix("study.")

    def read(match: re.Match[str]) -> str:
        variable, default = match.groups()
        if (given := os.environ.get(variable)) is not None:
            word = value == match[0] and "://" not in given  # as sqlite
            of_url = key.partition(".")[0] == "storage" and not word
            if of_url or SECRET.search(variable) or SECRET.search(key.rpartition(".")[2]):
                hide(given, f"${{{variable}}}")
            return given
        if default is not None:
            return str(default)
        if not strict:
            return match[0]
        raise StudyError(
            f"{key} is read from the environment variable {variable}, which is not set: "
            f"set it, or give --set {key}=VALUE"
        )

    return VARIABLE.sub(read, value)


def variables(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Where a document has `${NAME}`: the path of keys and positions, and the text."""
    if isinstance(value, str):
        if VARIABLE.search(value):
            yield path, value
    elif isinstance(value, dict | list):
        for key, below in value.items() if isinstance(value, dict) else enumerate(value):
            yield from variables(below, (*path, key))


def holds_password(url: Any) -> bool:
    """Whether a URL has a password in clear, before its host or among its arguments; a variable's default is in clear.

    >>> holds_password("postgresql://me:${DB_PASSWORD}@host/db"), holds_password("postgresql://me:${P:-hunter2}@host/db")
    (False, True)
    """
    if not isinstance(url, str) or "://" not in url:
        return False
    rest = VARIABLE.sub(lambda match: match[2] or "", url).partition("://")[2]
    user, at, _ = rest.rpartition("@")
    return bool(at and user.partition(":")[2]) or any(value for name, value in _arguments(rest) if SECRET.search(name))


def masked(text: str) -> str:
    """A URL, or a message that quotes one, without who logs in there and how.

    >>> masked("cannot open 'mysql://me:hun ter@2@host/db?sslpassword=abc&x=1'")
    "cannot open 'mysql://***@host/db?sslpassword=***&x=1'"
    """
    text = re.sub(r"://.*@", "://***@", text)  # as far as the last @: passwords hold slashes, colons, spaces and @

    def argument(match: re.Match[str]) -> str:
        return f"{match[1]}{match[2]}=***" if SECRET.search(unquote_plus(match[2])) else match[0]

    return re.sub(r"([?&])([^=&'\"]+)=[^&'\"]*", argument, text)


def _arguments(url: str) -> Iterator[tuple[str, str]]:
    """The arguments of a URL. A password may hold a `?`, and what is behind it is looked at too."""
    for argument in re.split("[?&]", url)[1:]:
        name, _, value = argument.partition("=")
        yield unquote_plus(name), value
