"""The app that every command joins, its entry point, and the arguments that commands have in common."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mpsearch.errors import MpsearchError

if TYPE_CHECKING:
    from mpsearch.problem import Problem
    from mpsearch.study import StudySpec

app = typer.Typer(
    name="mpsearch",
    help="Search the bit-widths and quantizer types of a network's layers: accuracy against hardware cost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Study = Annotated[str, typer.Argument(help="a shipped study by name (digits), or the path of a study file")]
Run = Annotated[Path, typer.Argument(help="a run folder")]
Set = Annotated[list[str] | None, typer.Option("--set", help="KEY.PATH=VALUE over the study file; may be repeated")]
Json = Annotated[bool, typer.Option("--json", help="print JSON for programs instead of a table")]


def main() -> None:
    """The `mpsearch` command."""
    _print_progress()
    try:
        app(standalone_mode=True)
    except MpsearchError as error:
        print(f"mpsearch: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("mpsearch: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception:
        traceback.print_exc()
        print("mpsearch: this is our fault, not yours: please report it with the lines above", file=sys.stderr)
        sys.exit(1)


def _print_progress() -> None:
    """Print what is waited for while a study is opened, on stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("mpsearch: %(message)s"))
    logger = logging.getLogger("mpsearch.progress")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


def open_study(study: str, set_: Sequence[str] | None) -> tuple[StudySpec, Problem]:
    """The study of that name or path, with its overrides, and the problem that it states."""
    from mpsearch.problem import open_problem
    from mpsearch.study import load_study

    spec = load_study(study, set_ or ())
    return spec, open_problem(spec)
