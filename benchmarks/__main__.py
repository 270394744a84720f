"""The one command of all benchmarks. Only the module of the benchmark that was asked for is imported."""

from __future__ import annotations

import ast
import functools
import importlib
import pkgutil
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import typer

import benchmarks
from mpsearch.errors import MpsearchError


@functools.cache
def found() -> dict[str, str]:
    """The sentence of every benchmark, by name; none is imported for it."""
    names = [module.name for module in pkgutil.iter_modules(benchmarks.__path__) if not module.ispkg]
    trees = {name: ast.parse((Path(benchmarks.__path__[0]) / f"{name}.py").read_text("utf-8")) for name in names}
    return {
        name: (ast.get_docstring(tree) or "").partition("\n")[0]
        for name, tree in trees.items()
        if any(isinstance(part, ast.FunctionDef) and part.name == name for part in tree.body)
    }


def door(name: str | None) -> typer.Typer:
    """The command: `list`, and every benchmark, of which `name` alone is imported and can be run.

    The others are there to be listed by `--help`.
    """
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    sentences = found()

    @app.callback(no_args_is_help=True)
    def _() -> None:
        """Measure mpsearch: `python -m benchmarks NAME [options]`."""

    @app.command("list")
    def _() -> None:
        """List the benchmarks, a line each."""
        for each, sentence in sentences.items():
            print(f"{each:{max(map(len, sentences))}}  {sentence}")

    for each, sentence in sentences.items():
        module = importlib.import_module(f"benchmarks.{each}") if each == name else None
        benchmark = getattr(module, each) if module else lambda: None
        app.command(each, help=module.__doc__ if module else sentence, short_help=sentence)(benchmark)
    return app


def main(arguments: Sequence[str]) -> int:
    """Run one benchmark, and print the command that repeats it. Returns the exit code: 2 where the input is wrong."""
    name = arguments[0] if arguments and arguments[0] in found() else None
    code: int | str | None = 0
    try:
        door(name)(list(arguments), prog_name="python -m benchmarks")
    except SystemExit as end:  # typer ends so in any case
        code = end.code
    except MpsearchError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    if not code and name and "--help" not in arguments:
        print(f"command: python -m benchmarks {shlex.join(arguments)}")
    return code if isinstance(code, int) else int(code is not None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
