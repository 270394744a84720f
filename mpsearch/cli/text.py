"""Texts of others as they may be printed: they command no terminal, and begin no line."""

from __future__ import annotations

import unicodedata


def visible(text: str) -> str:
    r"""A text with an escape for each character that a terminal obeys or hides: controls, line ends, bidi marks.

    >>> visible("boom\x1b[2J\nmpsearch: fine")
    'boom\\x1b[2J\\nmpsearch: fine'
    """
    return "".join(
        char if char.isprintable() or unicodedata.category(char) == "Zs" else char.encode("unicode_escape").decode()
        for char in text
    )


def indented(text: str) -> str:
    """A text of several lines, each of them `visible`, with those after the first indented: none looks like another."""
    first, *others = map(visible, text.split("\n"))
    return "\n".join([first, *(line if line.startswith(" ") or not line else f"  {line}" for line in others)])
