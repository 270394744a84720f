"""What a user reads and types: help of every option, the version, completion."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

import mpsearch
from mpsearch.cli import app

GROUP: Any = typer.main.get_command(app)
COMMANDS: dict[str, Any] = {
    f"{name}_{below}" if inner else name: (inner[below] if inner else command)
    for name, command in GROUP.commands.items()
    for inner in (getattr(command, "commands", {}),)
    for below in (inner or [name])
}
FUNCTIONS = {
    name: {"export": "export_run", "import": "import_config"}.get(name, name.replace("-", "_")) for name in COMMANDS
}
OF_THE_SHELL = {
    "json",
    "csv",
    "costs",
    "help",
    "trust",
    "token_file",
}  # printing, and questions that Python does not ask
EVENTS = {"observer"}  # and a command's observer is its progress bar


def names(parameter: Any) -> list[str]:
    return [option.lstrip("-").replace("-", "_") for option in parameter.opts if option.startswith("--")] or [
        parameter.name
    ]


def parameters(command: Any) -> dict[str, Any]:
    return {names(parameter)[0]: parameter for parameter in command.params}


def module(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mpsearch", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "COLUMNS": "140", **environment},
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_is_and_its_default(name: str) -> None:
    command = COMMANDS[name]
    assert re.match(r"[A-Z].{20,}", command.help), name
    for option, parameter in parameters(command).items():
        text = parameter.help or ""
        assert re.fullmatch(r"[A-Za-z].*\.", text, re.DOTALL), f"{name} --{option}: a sentence, got {text!r}"
        flag = getattr(parameter, "is_flag", False)
        assert flag or parameter.required or parameter.default is not None or "default" in text, f"{name} --{option}"


def test_help_is_plain_words() -> None:
    texts = [parameter.help or "" for command in COMMANDS.values() for parameter in command.params]
    texts += [command.help for command in COMMANDS.values()]
    quaint = re.compile(r"\bover (search|the study file)\b|\bwanted\b|without labels|\banchor|\bcontrols?\b")
    assert [text for text in texts if quaint.search(text)] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_python_function_has_the_arguments_and_defaults_of_its_command(name: str) -> None:
    def plain(value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value if value not in ((), []) else None

    command = {
        option: "required" if parameter.required else plain(parameter.default)
        for option, parameter in parameters(COMMANDS[name]).items()
        if option not in OF_THE_SHELL
    }
    function = {
        parameter.name: "required" if parameter.default is parameter.empty else plain(parameter.default)
        for parameter in inspect.signature(getattr(mpsearch, FUNCTIONS[name])).parameters.values()
        if parameter.name not in EVENTS
    }
    assert function == command


def test_version_is_the_package_and_the_wheel_has_it_too() -> None:
    from importlib.metadata import version

    done = module("--version")
    assert done.stdout.strip() == f"mpsearch {mpsearch.__version__}"
    assert version("mpsearch") == mpsearch.__version__


def test_module_runs_commands_and_refuses_as_the_script_does() -> None:
    done = module("check", "digts")
    assert done.returncode == 2
    assert "did you mean 'digits'" in done.stderr


def test_shell_completes_commands_options_and_shipped_studies() -> None:
    def completed(line: str) -> list[str]:
        script = Path(sys.executable).with_name("mpsearch")
        words = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1), "_MPSEARCH_COMPLETE": "complete_bash"}
        return subprocess.run(
            [script], capture_output=True, text=True, timeout=60, env={**os.environ, **words}
        ).stdout.split()

    assert completed("mpsearch fin") == ["finalize"]
    assert "--time-limit" in completed("mpsearch run digits --ti")
    assert "digits" in completed("mpsearch check di")


def test_glossary_has_each_word_once_in_order() -> None:
    text = (Path(mpsearch.__file__).parent.parent / "docs" / "glossary.md").read_text()
    words = re.findall(r"^\| ([^|]+?) \| [A-Z`][^|]*\. \|$", text, re.MULTILINE)
    assert len(words) == text.count("\n|") - 2  # all rows but the head, each with a sentence
    assert words == sorted(set(words), key=str.lower)
    assert {"activation", "baseline", "initial config", "workbench", "threshold", "warning", "metric", "score"} < set(
        words
    )
