"""The app that every command joins, its entry point, and the arguments that commands have in common."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from mpsearch import __version__, api
from mpsearch.cli.printing import LineFormatter, print_error, print_lines, replace_unprintable
from mpsearch.cli.text import indented
from mpsearch.errors import GaveUpError, MpsearchError, RunError, VerificationError

app = typer.Typer(
    name="mpsearch",
    help="Search the bit-widths and quantizer types of a network's layers: quality against hardware cost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _studies(incomplete: str) -> list[str]:
    """Shipped studies, for the completion of a shell, which completes paths by itself."""
    from mpsearch.shipped import shipped_names

    return [name for name in shipped_names("studies") if name.startswith(incomplete)]


Study = Annotated[
    str,
    typer.Argument(help="A shipped study by name (digits), or the path of a study file.", autocompletion=_studies),
]
Run = Annotated[Path, typer.Argument(help="A run folder.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Value for one key of the study file, as search.trials=20; may be repeated (default: the file's values).",
    ),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="Import the code that the study of a run names, though the run was made elsewhere; read it first.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of text.")]


def no_dead_link(out: Path | None) -> Path | None:
    """An `--out` that can be written to. Raises RunError where it is a link to nothing."""
    if out is not None and out.is_symlink() and not out.exists():
        raise RunError(
            f"--out: '{out}' is a link to {out.readlink()}, which does not exist: make that, or remove the link"
        )
    return out


def outside_runs(out: Path | None) -> Path | None:
    """An `--out` that replaces no file of a run, and puts none among them; a new name in a run folder is free.

    Raises:
        RunError: it is a run folder, or a file or folder of a run, or a link to nothing.
    """
    from mpsearch.record import RunFolder

    if out is None or no_dead_link(out) is None:
        return None
    whole = out.resolve()
    for folder in (whole, *whole.parents):
        if not ((folder / "run.json").is_file() and (folder / "study.yaml").is_file()):
            continue
        own = {path.name for path in vars(RunFolder(folder)).values() if isinstance(path, Path)}
        name = "" if whole == folder else whole.relative_to(folder).parts[0]
        beside = Path(name).stem + ".yaml"  # `measure` writes a profile there
        if not name or {name, beside} & own or name.startswith(("study.", "driver.")):
            raise RunError(f"--out: '{out}' belongs to the run in {folder}: give another path")
    return out


def ask_for_trust(run: Path, trust: bool) -> None:
    """Trust a run that was made elsewhere, where `--trust` was given or who sits at the terminal says so."""
    names = api.runs.untrusted(run)
    if not names:
        return
    if not trust and sys.stdin.isatty():
        named = ", ".join(names)
        print_lines([f"mpsearch: {run} was not made here, and its study has imported and run, or reached: {named}"])
        trust = typer.confirm("Do you trust that code?", default=False)
    if trust:
        api.runs.trust(run)


def _print_version(asked: bool) -> None:
    if asked:
        print_lines([f"mpsearch {__version__}"])
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass  # the help text of the app is above


def main() -> None:
    """The `mpsearch` command."""
    _open_missing_streams()
    replace_unprintable()
    _print_progress()
    try:
        with _sigterm_raised():
            app(standalone_mode=True)
    except MpsearchError as error:
        print_error(str(error))
        sys.exit(1 if isinstance(error, VerificationError | GaveUpError) else 2)
    except SystemExit as end:
        if end.__context__ is None or not isinstance(end.__context__.__cause__, KeyboardInterrupt):
            raise
        print_error(how_it_ended())  # typer takes KeyboardInterrupt and says nothing
        sys.exit(exit_code())
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception:
        sys.stderr.write(f"{indented(traceback.format_exc())}")
        print_error("this is our fault, not yours: please report it with the lines above")
        sys.exit(1)


def _open_missing_streams() -> None:
    """Open the null device for each standard stream that is closed: files would get its number, and Ray needs it."""
    for number, (name, mode) in enumerate({"stdin": "r", "stdout": "w", "stderr": "w"}.items()):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115


_terminated = threading.Event()
"""Set by SIGTERM, which ends as Ctrl-C does, with an exit code of its own."""


@contextlib.contextmanager
def _sigterm_raised() -> Iterator[None]:
    """For the time of the block SIGTERM raises KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(signum: int, frame: object) -> None:
        _terminated.set()
        raise KeyboardInterrupt

    _terminated.clear()
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def end_if_terminated() -> None:
    """Raise KeyboardInterrupt after SIGTERM: one that is raised in a destructor is dropped by Python."""
    if _terminated.is_set():
        raise KeyboardInterrupt


def how_it_ended() -> str:
    """What a KeyboardInterrupt was, in a word."""
    return "terminated" if _terminated.is_set() else "interrupted"


def exit_code() -> int:
    """128 and the number of the signal, as shells have it."""
    return 128 + (signal.SIGTERM if _terminated.is_set() else signal.SIGINT)


def _print_progress() -> None:
    """Print what is waited for while a study is opened, and warnings that no log takes, on stderr."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(LineFormatter())
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter("mpsearch: %(message)s"))
    logger = logging.getLogger("mpsearch.progress")
    logger.handlers = [handler]  # one, of today's stderr: a process may run several commands
    logger.setLevel(logging.INFO)
