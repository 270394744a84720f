"""Reference pages that are written from the code: commands, study file, search space, run folder, Python API.

A Sphinx extension: before a build it writes `docs/reference/{cli,study,space,hardware,run-folder,config,api}.md`, which
git ignores. What a page says is what the code says, so that a page cannot be out of date.
"""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

import mpsearch
from mpsearch import record
from mpsearch.cli import app
from mpsearch.hardware.profile import PriceSpec, Profile
from mpsearch.shipped import shipped_folder
from mpsearch.space.spec import EndSpec, FixedSpec, RuleSpec, SpaceSpec
from mpsearch.study import AudioSpec, BoxesSpec, DataSpec, MasksSpec, StudySpec, TextSpec

if TYPE_CHECKING:
    from sphinx.application import Sphinx

FOLDER = Path(__file__).parent / "reference"
DATA = (DataSpec, MasksSpec, BoxesSpec, TextSpec, AudioSpec)


def setup(sphinx: Sphinx) -> dict[str, bool]:
    """Sphinx's entry point."""
    sphinx.connect("builder-inited", lambda _: write(FOLDER))
    return {"parallel_read_safe": True}


def write(folder: Path) -> None:
    """Write every page that has changed."""
    folder.mkdir(exist_ok=True)
    for name, text in pages().items():
        path = folder / f"{name}.md"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """Name of the page -> its text in Markdown."""
    return {
        "cli": cli_page(),
        "study": study_page(),
        "space": space_page(),
        "hardware": hardware_page(),
        "run-folder": run_folder_page(),
        "config": config_page(),
        "api": api_page(),
    }


# Commands


def cli_page() -> str:
    """Every command with its arguments, options and defaults."""
    import typer

    commands = {
        name: command
        for first, top in typer.main.get_command(app).commands.items()  # type: ignore[attr-defined]
        for name, command in {
            first: top,
            **{f"{first} {below}": c for below, c in getattr(top, "commands", {}).items()},
        }.items()
    }
    parts = [
        "# Commands",
        "`mpsearch COMMAND --help` prints the same. Exit codes: 0 done; 2 the input is wrong, and the message says "
        "what was given, what was expected and what to do; 1 our fault, an export that failed its verification, or a "
        "search that gave up; 130 interrupted by Ctrl-C; 143 terminated.",
        table(
            ("command", "what it does"),
            ([f"[`{name}`](#{name.replace(' ', '-')})", _first(c.help)] for name, c in commands.items()),
        ),
    ]
    for name, command in commands.items():
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name != "argument" and p.name != "help"]
        usage = " ".join(["mpsearch", name, *(_argument(p) for p in arguments), "[OPTIONS]"])
        parts += [f"## {name}", f"```sh\n{usage}\n```", _paragraph(command.help)]
        if arguments:
            parts.append(table(("argument", "what it is"), ((f"`{_argument(p)}`", p.help) for p in arguments)))
        parts.append(table(("option", "default", "what it is"), map(_option, options)))
    return join(parts)


def _argument(parameter: Any) -> str:
    name = parameter.name.rstrip("_").upper()
    return name if parameter.required else f"[{name}]"


def _option(parameter: Any) -> tuple[str, str, str]:
    names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
    if parameter.required:
        default = "required"
    elif getattr(parameter, "is_flag", False):
        default = "on" if parameter.default else "off"
    else:
        default = "" if parameter.default is None else f"`{parameter.default}`"
    return names, default, parameter.help or ""


# Study file and search space


def study_page() -> str:
    """Every key of a study file."""
    parts = [
        "# Study file",
        "YAML 1.2. Unknown keys, keys that are given twice and values out of range are refused by name, before "
        "anything starts. `mpsearch check STUDY` prints the study with every default. Strings may hold `${NAME}` "
        "or `${NAME:-default}`, read from the environment. A worked example with a comment at each section:",
        f"```yaml\n{(shipped_folder('studies') / 'digits.yaml').read_text(encoding='utf-8')}```",
        "## Top level",
        keys(StudySpec),
    ]
    for name, field in StudySpec.model_fields.items():
        section = _model(field.annotation)
        if section is not None:
            parts += [f"## {name}", _paragraph(section.__doc__), keys(section, f"{name}.")]
        if name == "task":
            parts.append("### task.data")
            parts.append("What data a study has is told by `kind`; these keys are common to all kinds:")
            common = _common(DataSpec)
            parts.append(keys(DataSpec, "task.data.", only=common))
            for data in DATA:
                own = [key for key in data.model_fields if key not in common]
                parts += [f"**{data.__name__.removesuffix('Spec')}.** {_paragraph(data.__doc__)}"]
                parts.append(keys(data, "task.data.", only=own))
    return join(parts)


def space_page() -> str:
    """Every key of a search space, and the spaces that ship."""
    parts = [
        "# Search space file",
        _paragraph(SpaceSpec.__doc__),
        "Rules are read in order, and a later rule overrides the keys that it gives. How to write one: "
        "[a search space of your own](../how-to/space.md).",
        "## Top level",
        keys(SpaceSpec),
    ]
    for name, spec in (("rules", RuleSpec), ("fixed", FixedSpec), ("first and last", EndSpec)):
        parts += [f"## {name}", _paragraph(spec.__doc__), keys(spec)]
    parts += ["## Precisions", table(("quantizer", "bits"), _widths())]
    parts += ["## Spaces that ship"]
    for path in sorted(shipped_folder("search_spaces").glob("*.yaml")):
        parts += [f"### {path.stem}", f"```yaml\n{path.read_text(encoding='utf-8')}```"]
    return join(parts)


def hardware_page() -> str:
    """Every key of a hardware profile, and the profiles that ship."""
    parts = [
        "# Hardware profile",
        "What a profile means: [hardware](../hardware.md).",
        "## Top level",
        keys(Profile),
        "## cost",
        _paragraph(PriceSpec.__doc__),
        keys(PriceSpec, "cost."),
        "## Profiles that ship",
    ]
    for path in sorted(shipped_folder("hardware").glob("*.yaml")):
        parts += [f"### {path.stem}", f"```yaml\n{path.read_text(encoding='utf-8')}```"]
    return join(parts)


def _widths() -> Iterator[tuple[str, str]]:
    from mpsearch.precision import BITS

    for quantizer, bits in BITS.items():
        yield f"`{quantizer}`", f"{bits.start} to {bits.stop - 1}" if len(bits) > 1 else str(bits.start)


def keys(spec: type[BaseModel], prefix: str = "", only: Sequence[str] | None = None) -> str:
    """A table of the keys of a section: type, default and description."""
    fields = {name: field for name, field in spec.model_fields.items() if only is None or name in only}
    rows = [(f"`{prefix}{name}`", kind(field), default(field), described(field)) for name, field in fields.items()]
    return table(("key", "type", "default", "what it is"), rows)


def kind(field: FieldInfo) -> str:
    """The type of a key in words, with its bounds."""
    bounds = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most", "min_length": "length at least"}
    said = [
        f"{word} {getattr(part, key)}" for part in field.metadata for key, word in bounds.items() if hasattr(part, key)
    ]
    return ", ".join([_type(field.annotation), *said])


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type(part) for part in arguments if part is not type(None)))
    if origin in (tuple, list):
        return f"list of {_type(arguments[0])}s".replace("texts", "text")
    if origin is dict or origin is Mapping:
        return "keys and values"
    if origin is not None and arguments:  # Annotated
        return _type(arguments[0])
    if (section := _model(annotation)) is not None:
        return "keys and values" if section in DATA or section.__module__ != "mpsearch.study" else "section"
    names = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    return names.get(annotation, "any")


def _model(annotation: Any) -> type[BaseModel] | None:
    return annotation if inspect.isclass(annotation) and issubclass(annotation, BaseModel) else None


def default(field: FieldInfo) -> str:
    """What holds where a key is left out."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined or value is None or isinstance(value, BaseModel) or value in ({}, ()):
        return ""
    if isinstance(value, bool):
        return "`true`" if value else "`false`"
    return f"`{list(value)}`" if isinstance(value, tuple) else f"`{value}`"


def described(field: FieldInfo) -> str:
    """The description of a key; that of a section is its first line."""
    section = _model(field.annotation)
    if field.description:
        return field.description
    return _first(section.__doc__) if section is not None else ""


def _common(spec: type[BaseModel]) -> list[str]:
    """The keys that a section has from its base."""
    return list(spec.__bases__[0].model_fields)  # type: ignore[attr-defined]


# Run folder


FILES = {
    "run.json": "schema, id of the run, version that made it, time, metric; written last when a run is made",
    "study.yaml": "the study with every default filled in; `${NAME}` stays a name",
    "space.yaml": "a copy of the search space: a run means the configs that there were when it began",
    "hardware.yaml": "a copy of the hardware profile",
    "hardware.csv": "a copy of the profile's table of measured costs, where it has one",
    "trials.jsonl": "**the record**: a line for each trial that has ended, on the disk before the next one starts",
    "finals.jsonl": "a line for each final training of `mpsearch finalize`",
    "prescreen.jsonl": "a line for each untrained config that was scored",
    "front.json": "the Pareto front with its hypervolume",
    "problem.json": "layers, space, cost model and a digest of the float network's weights: what `report` and "
    "`dashboard` draw without loading the network",
    "knee.json": "ranges and histograms of the knee's tensors",
    "trials.parquet": "the record as a table: a row for each trial, two columns for each layer",
    "study.db": "the run as an Optuna study (`storage: sqlite`)",
    "study.journal": "the same (`storage: journal`)",
    "warmstart": "folder: sensitivities, snapshots of the descent and configs of the warm start",
    "checkpoints": "folder: weights of the trials that an export may need",
    "report.html": "the report, one file that opens without a network",
    "log.txt": "what was logged",
    "state.json": "while a process drives the run: which process, and which trials it runs",
    "driver.lock": "lock of the operating system: one process at a time drives a run",
}
"""What each file is for; `run_folder_page` fails where the code has another one."""


def run_folder_page() -> str:
    """The files of a run folder and the fields of its records."""
    folder = record.RunFolder(Path("run"))
    names = {Path(value).name for value in vars(folder).values() if isinstance(value, Path)} - {"run"}
    if names | {"driver.lock"} != set(FILES):
        raise ValueError(f"the run folder has {sorted(names ^ set(FILES))}, and FILES says otherwise: describe them")
    parts = [
        "# Run folder",
        f"Schema `{record.SCHEMA}`; folders of `{record.FIRST_SCHEMA}` are read too. The record alone is the truth "
        "about a run: `front.json`, `trials.parquet`, the Optuna study and the report are written again from it. A "
        "process that dies leaves at most one torn last line, which readers skip and the next driver cuts off.",
        table(("file", "what it holds"), ((f"`{name}`", text) for name, text in FILES.items())),
        "From Python, `mpsearch.front(RUN).trials` is the record as a DataFrame.",
    ]
    for spec, file in (
        (record.TrialRecord, "trials.jsonl"),
        (record.FinalRecord, "finals.jsonl"),
        (record.PrescreenRecord, "prescreen.jsonl"),
    ):
        rows = ((f"`{name}`", f"`{kind}`", text) for name, kind, text in _commented(spec))
        parts += [f"## {file}", _paragraph(spec.__doc__), table(("field", "type", "what it is"), rows)]
    return join(parts)


def _commented(spec: type) -> Iterator[tuple[str, str, str]]:
    """Name, type and comment of each field of a dataclass."""
    for line in inspect.getsource(spec).splitlines():
        if match := re.fullmatch(r"    (\w+): ([^=#]+?)(?: = [^#]+?)?(?:  # (.*))?", line):
            yield match[1], match[2], match[3] or ""


def config_page() -> str:
    """The published JSON schema of a precision config."""
    schema = json.loads((Path(mpsearch.__file__).parent / "schema" / "precision-config-1.json").read_text("utf-8"))
    rows = [
        (f"`{name}`", "yes" if name in schema["required"] else "", _schema_type(below), below.get("description", ""))
        for name, below in schema["properties"].items()
    ]
    precision = schema["$defs"]["precision"]["properties"]
    return join(
        [
            "# Precision config",
            f"{schema['description']} `mpsearch export --to native` writes one; `mpsearch.read_config` and `mpsearch "
            "train --target` read it. A file of another version is refused by name.",
            table(("key", "required", "type", "what it is"), rows),
            "Each entry of `layers` has a `weight` and an `activation`, both with:",
            table(
                ("key", "values", "what it is"),
                ((f"`{name}`", _schema_type(below), below.get("description", "")) for name, below in precision.items()),
            ),
            "## JSON schema",
            f"```json\n{json.dumps(schema, indent=1)}\n```",
        ]
    )


def _schema_type(schema: Mapping[str, Any]) -> str:
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "pattern" in schema:
        return "`" + schema["pattern"].replace("|", "\\|") + "`"
    return str(schema.get("type", "object"))


# Python API


API: dict[str, tuple[str, tuple[str, ...]]] = {
    "Commands as functions": (
        "Each has the arguments of its command. `import` is `import_config`, `export` is `export_run`.",
        (
            *("check", "inspect", "run", "resume", "status", "front", "rank", "finalize", "ptq", "train", "debug"),
            *("export_run", "import_config", "report", "dashboard", "trust"),
        ),
    ),
    "Networks": (
        "Without a study: the layers of a network, its cost, its quantizers, its exports.",
        (
            *("inspect_model", "open_attention", "cost_of", "prepare", "prepare_for_training"),
            *("QuantizedNetwork", "export", "load", "read_config"),
        ),
    ),
    "Precisions": ("From tensor to network.", ("Precision", "LayerPrecision", "PrecisionConfig")),
    "Studies and hardware": (
        "",
        ("load_study", "run_study", "hardware_list", "hardware_show", "hardware_import_vela", "measure"),
    ),
    "Scores, events, errors": ("", ("Metric", "Observer", "MpsearchError")),
}
RETURNED = {
    "mpsearch.api.studies": ("Check", "Inspection", "Sensitivities"),
    "mpsearch.api.runs": ("RunResult", "Front", "Status", "Finals"),
    "mpsearch.api.networks": ("ScoredNetwork", "PtqScores", "TrainScores", "DebugResult"),
    "mpsearch.api.results": ("ExportedTrial", "ImportedConfig"),
    "mpsearch.api.hardware": ("Hardware",),
}
"""What the functions return; not imported by name."""


def api_page() -> str:
    """Every public name with its docstring."""
    parts = ["# Python API", _paragraph(inspect.getdoc(mpsearch))]
    for title, (text, names) in API.items():
        parts += [f"## {title}", text]
        parts += [f"### {name}\n\n{_autodoc(f'mpsearch.{name}', getattr(mpsearch, name))}" for name in names]
    parts += ["## Values that functions return"]
    for module, names in RETURNED.items():
        parts += [f"### {name}\n\n{_autodoc(f'{module}.{name}', None)}" for name in names]
    return join(parts)


def _autodoc(path: str, value: Any) -> str:
    directive = "autofunction" if inspect.isfunction(value) else "autoclass"
    return f"```{{eval-rst}}\n.. {directive}:: {path}\n```"


# Text


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", " ".join((text or "").split())).replace("<", "&lt;" if "`" not in text else "<")


def _paragraph(text: str | None) -> str:
    return inspect.cleandoc(text or "")


def _first(text: str | None) -> str:
    return _paragraph(text).partition("\n")[0]


def join(parts: Iterable[str]) -> str:
    """Blocks of Markdown, one under the other, with a note on where they come from."""
    return "\n\n".join(["<!-- Written from the code by docs/reference_pages.py. -->", *(p for p in parts if p)]) + "\n"
