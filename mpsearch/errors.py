"""The errors that mpsearch raises on purpose.

Every message tells its reader three things: what was given, what was expected, and what to do. The CLI prints the
message alone (no traceback) and exits with 2, because these errors are about the input and never about our code.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_HIDDEN: dict[str, str] = {}
"""Secrets of this process -> what is shown instead."""

SHORTEST_SECRET = 3
"""Characters: what is shorter would be found in every other message."""


def hide(secret: str, instead: str) -> None:
    """From now on no message shows a secret."""
    if len(secret) >= SHORTEST_SECRET:
        _HIDDEN[secret] = instead


def hidden(text: str) -> str:
    """A text with the names of secrets in place of what they are.

    >>> hide("s3cr et", "${PASSWORD}")
    >>> hidden("cannot reach u:s3cr et@host")
    'cannot reach u:${PASSWORD}@host'
    """
    for secret in sorted(_HIDDEN, key=len, reverse=True):
        text = text.replace(secret, _HIDDEN[secret])
    return text


class MpsearchError(Exception):
    """The input is wrong: the base of every error that the CLI turns into exit code 2. Its message shows no secret.

    >>> import mpsearch
    >>> try:
    ...     mpsearch.load_study("digts")
    ... except mpsearch.MpsearchError as error:
    ...     print("digits" in str(error))
    True
    """

    def __str__(self) -> str:
        return hidden(super().__str__())


class StudyError(MpsearchError):
    """A study file, or a value set over it, cannot be used."""


class TaskError(MpsearchError):
    """The model, its checkpoint or its data cannot be used."""


class SpaceError(MpsearchError):
    """A search space does not fit the model or itself."""


class HardwareError(MpsearchError):
    """A hardware profile or its table cannot be used, or does not fit the network."""


class PrecisionError(MpsearchError):
    """A precision, or a file of precisions, is not one that mpsearch knows."""


class CostError(MpsearchError):
    """A cost cannot be computed, or a budget cannot be met."""


class RunError(MpsearchError):
    """A run folder cannot be used: taken by another driver, unwritable, foreign, or without what was asked of it."""


class GaveUpError(RunError):
    """A search ended because its trials failed, one after another: the CLI exits with 1."""


class WriteError(MpsearchError):
    """A file cannot be written: no room, or no permission. What was there before is still there."""


class DivergedError(MpsearchError, FloatingPointError):
    """A training's loss, or a score, became NaN or infinite."""


class ExportError(MpsearchError):
    """A configuration cannot be written to, or read from, the format that was asked for."""


class VerificationError(ExportError):
    """What was exported does not answer in its own runtime as the network does: the CLI exits with 1."""


def nearest(word: str, valid: Iterable[str]) -> str:
    """The tail of an error message: the valid names, the most similar one first if any is similar.

    >>> nearest("trails", ["trials", "seed"])
    "did you mean 'trials'? valid: seed, trials"
    """
    names = sorted(valid)
    listed = f"valid: {', '.join(names)}" if names else "there is none"
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'? {listed}" if close else listed
