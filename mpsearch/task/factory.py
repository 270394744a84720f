"""`module:function` in a study file: how people bring their own model, data or task."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from mpsearch.errors import TaskError, nearest
from mpsearch.study import names_function


def call_factory(what: str, name: str, args: Mapping[str, Any]) -> Any:
    """Import the function that `name` (`module:function`) stands for and call it with keyword arguments `args`.

    Raises:
        TaskError: no such module or function, or it raised; the message says which.
    """
    function = find_function(what, name)
    try:
        return function(**args)
    except Exception as error:
        arguments = ", ".join(f"{key}={value!r}" for key, value in args.items())
        raise TaskError(f"{what}: {name}({arguments}) raised {_said(error)}") from error


def find_function(what: str, name: str) -> Callable[..., Any]:
    """Import the function that `name` (`module:function`) stands for.

    Modules are looked for where Python looks and in the working directory. `what` is the study key, for the messages.

    Raises:
        TaskError: no such module or function, or one of the standard library, whoever hands it on; the message says so.
    """
    module_name, _, attribute = name.partition(":")
    if not names_function(name):  # what `trust` does not ask about is not imported
        raise TaskError(f"{what}: cannot read '{name}': write module:function, as in my_package.models:build")
    _refuse_standard(what, name, module_name)
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and module_name.startswith(str(error.name)):
            raise TaskError(
                f"{what}: no module '{error.name}' for '{name}': install it, or run from the folder that "
                f"holds it ({here})"
            ) from None
        raise TaskError(f"{what}: module '{module_name}' cannot be imported: {_said(error)}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise TaskError(f"{what}: module '{module_name}' has no function '{attribute}': {nearest(attribute, public)}")
    if inspect.isroutine(function) or inspect.isclass(function):
        _refuse_standard(what, name, getattr(function, "__module__", None) or "")
    return cast("Callable[..., Any]", function)


def _refuse_standard(what: str, name: str, module: str) -> None:
    if (package := module.partition(".")[0]) in sys.stdlib_module_names:
        raise TaskError(
            f"{what}: '{name}' is of Python's standard library, whose functions make nothing that a study needs: write "
            f"a function of your own or of an installed package (those of {package} are never called for a study)"
        )


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
