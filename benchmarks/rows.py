"""Results files of benchmarks: rows with a key, appended whole, that say where and with what they were measured.

A file holds a JSON object a line (`.jsonl`) or is a table (`.csv`); both read alike. A benchmark names the fields that
make a row's key and asks `missing` which of its cases have no row yet: that is how an interrupted one goes on. Where
the machine or the code decides the result, `MEASURED` is part of the key: a row of another processor or commit does not
stand for this one. Rows of before there was provenance do not have its fields.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import platform
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import filelock

import mpsearch
from benchmarks.printing import say
from mpsearch.errors import MpsearchError
from mpsearch.files import write_error, write_text

Row = dict[str, Any]

MEASURED = ("commit", "processor")
"""Fields of the provenance that are part of the key where the machine and the code decide the result."""

ROOT = Path(mpsearch.__file__).parent.parent
FOLDERS = ("mpsearch", "benchmarks", "search_spaces", "studies", "checkpoints")  # what decides a result
SUFFIXES = (".py", ".yaml", ".safetensors")


class RowsError(MpsearchError):
    """A results file, or a row for it, is not what its benchmark expects."""


class Rows:
    """The rows of one results file. Nothing is kept in memory: a row that another process appends counts at once."""

    def __init__(self, path: Path, key: Sequence[str]) -> None:
        """`key` are the fields that tell what a row is about.

        Raises:
            RowsError: the suffix is not `.jsonl` or `.csv`.
        """
        if path.suffix not in (".jsonl", ".csv"):
            raise RowsError(f"{path}: expected a results file that ends in .jsonl or .csv; rename it")
        self.path = path
        self.key = tuple(key)

    def read(self) -> list[Row]:
        """Every row, in the order of the file. A broken last line, of a write that was cut off, is named and left out.

        Raises:
            RowsError: another line is broken, or the file cannot be read.
        """
        text = self._text()
        if self.path.suffix == ".csv":
            return _from_csv(text)
        lines = enumerate(text.split("\n")[:-1], start=1)
        return [_object(line, f"{self.path}, line {number}") for number, line in lines]

    def select(self, cases: Iterable[Mapping[str, Any]]) -> list[Row]:
        """The last row of each case that has one, in the order of the cases."""
        latest = {self._of(row): row for row in self.read()}
        return [latest[key] for case in cases if (key := self._of(self._provenanced(case))) in latest]

    def missing(
        self, cases: Iterable[Mapping[str, Any]], done: Callable[[Row], bool] = lambda row: True
    ) -> Iterator[Row]:
        """The cases that have no row, or whose last row is not `done`; each is looked up when its turn comes.

        Raises:
            RowsError: a case lacks a field of the key, or as `read`.
        """
        for case in cases:
            if any(done(row) for row in self.select([case])):
                say(f"{', '.join(f'{k}={v}' for k, v in case.items())}: has a row in {self.path}, not measured again")
            else:
                yield dict(case)

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Put rows on the disk with their provenance: all of them or, if that fails, none; earlier rows are untouched.

        The whole file is written, because a kill in the middle of an append would leave some of the rows, or half of
        one. A broken last line is dropped. Processes wait for each other.

        Raises:
            RowsError: a row lacks a field of the key, or as `read`.
            WriteError: the file cannot be written.
        """
        self.append_bare(*(self._provenanced(row) for row in rows))

    def append_bare(self, *rows: Mapping[str, Any]) -> None:
        """As `append`, of rows that were not measured: they get no provenance."""
        add = _with_csv if self.path.suffix == ".csv" else _with_json
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(self.path.with_name(f".{self.path.name}.lock")):
                write_text(self.path, add(self._text(), [dict(row) for row in rows]), sync=True)
        except OSError as error:
            raise write_error(self.path, error) from None

    def _text(self) -> str:
        """The file's whole lines."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""
        except (OSError, UnicodeDecodeError) as error:
            raise RowsError(f"cannot read {self.path}: {error}") from None
        whole, newline, last = text.rpartition("\n")
        if not last:
            return text
        if self.path.suffix == ".jsonl" and _is_object(last):  # whole, and an editor took the newline away
            return text + "\n"
        say(f"{self.path}: the last line is cut off and counts as no row: {last[:60]}")
        return whole + newline

    def _provenanced(self, row: Mapping[str, Any]) -> Row:
        """The row with provenance after its own fields, which win: a row measured elsewhere says so itself."""
        result = dict(row) | {name: value for name, value in provenance().items() if name not in row}
        if lacking := [name for name in self.key if name not in result]:
            raise RowsError(f"{self.path}: expected a row with {', '.join(self.key)}; {', '.join(lacking)} is missing")
        return result

    def _of(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(_hashable(row.get(name)) for name in self.key)


def provenance() -> Row:
    """Where and with what a row is measured: code, processor, versions, threads, date (UTC)."""
    import torch

    return {
        "commit": commit(),
        "processor": processor(),
        "mpsearch_version": version("mpsearch"),
        "torch_version": torch.__version__,
        "python_version": platform.python_version(),
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@cache
def commit() -> str:
    """The commit of the code, as it was when first asked.

    `SHA-dirty-DIGEST` where files differ from it, `source-DIGEST` without git: the digest is of the code itself, so
    that what was measured before a change never stands for what comes after.
    """
    folders = [name for name in FOLDERS if (ROOT / name).exists()]
    top = _git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != ROOT.resolve():  # installed: a repository around it is another project's
        return f"source-{_digest(folders)}"
    changed = _git("status", "--porcelain", "--", *folders, ":!benchmarks/results")
    sha = _git("rev-parse", "HEAD")
    return f"{sha}-dirty-{_digest(folders)}" if changed else str(sha)


@cache
def processor() -> str:
    """The processor's name, and the widest instructions that PyTorch uses on it."""
    import torch

    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _digest(folders: Sequence[str]) -> str:
    """Eight digits of all code, YAML and weights of the folders."""
    digest = hashlib.sha256()
    paths = (path for name in folders for path in (ROOT / name).rglob("*") if path.suffix in SUFFIXES)
    for path in sorted(paths):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, (list, tuple)) else value


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _object(line: str, where: str) -> Row:
    if not _is_object(line):
        raise RowsError(f"{where}: expected a JSON object, found {line[:60]!r}. Restore the file, or delete this line")
    row: Row = json.loads(line)
    return row


def _from_csv(text: str) -> list[Row]:
    """A column is of numbers if all its cells are; empty cells are fields that a row does not have."""
    table = csv.DictReader(io.StringIO(text))
    rows = list(table)
    names = table.fieldnames or ()
    columns = [_column([row[name] for row in rows]) for name in names]
    return [
        {name: value for name, value in zip(names, values, strict=True) if value is not None}
        for values in zip(*columns, strict=True)
    ]


def _column(cells: Sequence[str]) -> Sequence[Any]:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return [kind(cell) if cell else None for cell in cells]
    return [cell or None for cell in cells]


def _with_json(text: str, rows: Sequence[Row]) -> str:
    return text + "".join(json.dumps(row) + "\n" for row in rows)


def _with_csv(text: str, rows: Sequence[Row]) -> str:
    """The cells of earlier rows stay as they are written; a new column is empty in them."""
    table = csv.DictReader(io.StringIO(text))
    earlier = list(table)
    columns = list(dict.fromkeys([*(table.fieldnames or ()), *(name for row in rows for name in row)]))
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows([*earlier, *rows])
    return file.getvalue()
