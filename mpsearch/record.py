"""TrialRecord and the run folder: the only file that reads or writes a run.

The truth about a run is `trials.jsonl` (and `finals.jsonl`, once it is finalized): one line for every trial that has
ended, appended with a single write and synced to the disk before the next trial starts. A process that dies at any
point leaves at most one torn last line, which readers skip and the next driver cuts off; everything else in the folder
(the Optuna study, `front.json`, `trials.parquet`, the report) is a view that can be written again from it.

One process at a time drives a run (`RunFolder.driving`); any number may read it meanwhile.

A folder may have come from anybody: every value of a line is checked against the types of its record, which say what
it can be, and then against its run: scores that the metric can have, the layers and the samples of the other lines.
"""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import os
import re
import socket
import time
import uuid
import zlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

import filelock
import psutil
from pydantic import (
    AfterValidator,
    AliasChoices,
    ConfigDict,
    Field,
    PlainValidator,
    TypeAdapter,
    ValidationError,
)

from mpsearch.documents import clip, first_fault, parse_json
from mpsearch.errors import PrecisionError, RunError, TaskError, WriteError
from mpsearch.files import MOST_BYTES, is_stream, open_own, read_whole, remove_parts, replacing, write_json, write_text
from mpsearch.metric import METRICS, Metric
from mpsearch.precision import LayerPrecision, PrecisionConfig

if TYPE_CHECKING:
    from numpy.typing import NDArray

progress = logging.getLogger("mpsearch.progress")

TrialState = Literal["complete", "failed", "stopped"]
Origin = Literal[
    "uniform", "ilp", "descent", "prescreen", "sampler", "manual", "import"
]  # who proposed a config, or trained it
InitialConfig = tuple[Origin, PrecisionConfig]

SCHEMA = "mpsearch/run/2"
FIRST_SCHEMA = "mpsearch/run/1"
"""Of runs, still read, whose records call a score `accuracy`; their metric is in `problem.json`, by its name alone."""

MOST_RECORDED_BYTES = 2 * 2**30
"""Of a file of records."""

Record = TypeVar("Record", "TrialRecord", "FinalRecord", "PrescreenRecord")


@lru_cache(maxsize=4096)  # thousands of trials share a handful of precisions
def _layer_precision(text: str) -> LayerPrecision:
    weight, separator, activation = text.partition(" x ")
    if not separator:
        raise PrecisionError(f"cannot read layer precision '{text}'")
    return LayerPrecision.parse(weight, activation)


def _config(layers: Any) -> PrecisionConfig:
    if not isinstance(layers, dict) or not layers or not all(isinstance(text, str) for text in layers.values()):
        raise ValueError(f"expected layers and their precisions, got {clip(layers)}")
    try:
        return PrecisionConfig((layer, _layer_precision(text)) for layer, text in layers.items())
    except PrecisionError as error:
        raise ValueError(str(error)) from None


def _packed(text: str) -> str:
    _bytes_of(text)
    return text


Config = Annotated[PrecisionConfig, PlainValidator(_config)]  # in JSON layer -> text form
Count = Annotated[int, Field(ge=0, lt=2**63)]
Seconds = Annotated[float, Field(ge=0, lt=2.5e11)]  # before the year 9999, where they are a time
Cost = Annotated[float, Field(gt=0, lt=1e30)]  # relative
Amount = Annotated[float, Field(ge=0, lt=1e30)]  # of a cost, in its unit
Packed = Annotated[str, AfterValidator(_packed)]

_CHECKED = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
"""A value is of its type and no other is made into it; there is no other value."""


@dataclass(frozen=True, slots=True)
class WallTime:
    """Where a trial's wall time went, in seconds."""

    __pydantic_config__: ClassVar[ConfigDict] = _CHECKED

    prepare_s: Seconds = 0.0  # setting precisions, range setting
    train_s: Seconds = 0.0
    evaluate_s: Seconds = 0.0  # BatchNorm re-estimation and scoring

    @property
    def total_s(self) -> float:
        """All of it."""
        return self.prepare_s + self.train_s + self.evaluate_s


@dataclass(frozen=True, slots=True)
class RungScore:
    """What a config was worth at the end of one rung."""

    __pydantic_config__: ClassVar[ConfigDict] = _CHECKED

    steps: Count  # of training in all, since the float network; 0: it was not trained, being as good as float
    score: float | None  # None: the rung failed
    divergence: float | None = None
    wall_s: Seconds = 0.0
    ended_s: Seconds = 0.0  # since the epoch


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """One config and what became of it: everything that is known of a trial once it has ended.

    `score` is the task's metric on the validation split, in the metric's own unit (`RunFolder.metric` says which).
    `cost` is relative to the study's reference config. A failed trial has neither and gives its `reason`; a stopped one
    has the score at which it was stopped, and no more than that.

    Where trials train by rungs, `rungs` has what it was worth after each, and `score`, `divergence` and `values` are of
    the longest that did not fail.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _CHECKED

    config: Config  # layer name -> text form, as "uniform:4/channel x uniform:8/tensor"
    state: TrialState  # complete, failed or stopped
    score: Annotated[float | None, Field(validation_alias=AliasChoices("score", "accuracy"))] = None  # on val
    cost: Cost | None = None  # relative
    reason: str | None = None  # why it failed, in words
    number: Count = -1  # position in the study; -1 outside one
    origin: Origin = "manual"  # who proposed the config: uniform, ilp, descent, prescreen, sampler, import, manual
    seed: Count = 0  # of its batches
    start_loss: float | None = None  # training loss over the first steps of the fine-tune
    end_loss: float | None = None  # training loss over its last steps
    start_divergence: float | None = None  # from the float network on a sample of val before the fine-tune
    curve: tuple[tuple[Count, float], ...] = ()  # (step, score), from before the fine-tune to its end
    divergence: float | None = None  # mean divergence from the float network on val (`Comparison`)
    values: Annotated[Packed | None, Field(validation_alias=AliasChoices("values", "correct"))] = None
    # by sample of val, of which the score is the mean: `pack`
    wall: WallTime = WallTime()  # prepare_s, train_s and evaluate_s
    started_s: Seconds = 0.0  # since the epoch
    peak_memory_bytes: Count = 0  # of the process that ran it, so far
    costs: Mapping[str, Amount] = field(default_factory=dict, hash=False)  # of every cost model, each in its unit
    rungs: tuple[RungScore, ...] = ()  # steps, score, divergence, wall_s, ended_s of each; none where one length is all

    @property
    def steps(self) -> int:
        """Training steps behind the score."""
        done = [rung.steps for rung in self.rungs if rung.score is not None]
        return done[-1] if done else self.curve[-1][0] if self.curve else 0

    @property
    def ended_s(self) -> float:
        """When it ended, its longest rung included, in seconds since the epoch."""
        return self.rungs[-1].ended_s if self.rungs else self.started_s + self.wall.total_s

    def at_rung(self, index: int) -> TrialRecord:
        """The record as it was at the end of a rung; values by sample are known of the longest alone."""
        if index >= len(self.rungs) - 1:
            return self
        rung = self.rungs[index]
        share = sum(r.wall_s for r in self.rungs[: index + 1]) / (self.wall.total_s or 1.0)
        return replace(
            self,
            score=rung.score,
            divergence=rung.divergence,
            values=None,
            reason=None,
            curve=tuple(point for point in self.curve if point[0] <= rung.steps),
            wall=WallTime(*(share * seconds for seconds in asdict(self.wall).values())),
            rungs=self.rungs[: index + 1],
        )


@dataclass(frozen=True, slots=True)
class FinalRecord:
    """One longer training of a picked trial's config: the scores on both splits."""

    __pydantic_config__: ClassVar[ConfigDict] = _CHECKED

    number: Count  # of the trial
    seed: Count  # of its batches
    steps: Count  # of the training
    val: float  # score, in the metric's unit
    test: float  # score, in the metric's unit
    values: Annotated[Packed | None, Field(validation_alias=AliasChoices("values", "correct"))] = None
    # by sample of test: `pack`


@dataclass(frozen=True, slots=True)
class PrescreenRecord:
    """An untrained config that was scored before the trials."""

    __pydantic_config__: ClassVar[ConfigDict] = _CHECKED

    config: Config  # as in TrialRecord
    cost: Cost  # relative
    divergence: float | None  # from the float network on training batches; None: no finite number
    batches: Count  # that the divergence is the mean of
    source: str  # who proposed it: ladder, descent, ilp, neighbour, model, ...; again: it was scored before on fewer


_FIELDS = tuple(f.name for f in fields(TrialRecord))


def record_to_json(record: TrialRecord) -> str:
    """One line of JSON from which `record_from_json` makes an equal record; a layer is written as its text form.

    Raises:
        RunError: a number of the record is NaN or infinite.
    """
    document: dict[str, Any] = {name: getattr(record, name) for name in _FIELDS}
    document["config"] = {layer: str(precision) for layer, precision in record.config.items()}
    document["wall"] = asdict(record.wall)
    document["rungs"] = [asdict(rung) for rung in record.rungs]
    document["costs"] = dict(record.costs)
    try:
        return json.dumps(document, allow_nan=False, ensure_ascii=False)
    except ValueError:
        bad = next(name for name in _FIELDS if not _is_json(document[name]))
        raise RunError(
            f"trial {record.number} has {bad} = {document[bad]}: a record holds finite numbers; record it as failed"
        ) from None


def prescreen_to_json(record: PrescreenRecord) -> str:
    """One line of JSON from which `prescreen_from_json` makes an equal record."""
    layers = {layer: str(precision) for layer, precision in record.config.items()}
    known = {f.name: getattr(record, f.name) for f in fields(record) if f.name != "config"}
    return json.dumps({**known, "config": layers}, allow_nan=False, ensure_ascii=False)


def prescreen_from_json(text: str | bytes) -> PrescreenRecord:
    """Read what `prescreen_to_json` wrote. Raises RunError: the text is no such record."""
    return _checked(_PRESCREEN, text, "a prescreen record")


def final_from_json(text: str | bytes) -> FinalRecord:
    """Read a line of `finals.jsonl`, today's or that of the first schema. Raises RunError: it is no such record."""
    return _checked(_FINAL, text, "a final training")


def record_from_json(text: str | bytes) -> TrialRecord:
    """Read what `record_to_json` wrote, today's or that of the first schema.

    Raises:
        RunError: the text is not a record; the message says what is wrong with it.
    """
    record = _checked(_TRIAL, text, "a trial record")
    if record.state == "complete" and (record.score is None or record.cost is None):
        raise RunError("not a trial record: it is complete, and score or cost is missing")
    return record


_TRIAL, _FINAL, _PRESCREEN = TypeAdapter(TrialRecord), TypeAdapter(FinalRecord), TypeAdapter(PrescreenRecord)


def _checked(kind: TypeAdapter[Record], text: str | bytes, what: str) -> Record:
    """Raises RunError: the text is not `what`."""
    if len(text) > MOST_BYTES:
        raise RunError(f"not {what}: it has {len(text):,} bytes, and at most {MOST_BYTES:,} are read")
    try:
        parse_json(text)  # refuses a key that is given twice, of which the next line would take the last
        return kind.validate_json(text)
    except ValidationError as error:
        raise RunError(f"not {what}: {first_fault(error)}") from None
    except ValueError as error:
        raise RunError(f"not {what}: {error}") from None


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class RunningTrial:
    """A trial that is under way: it has no record yet."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, allow_inf_nan=False)

    number: Count
    origin: Origin
    cost: Cost  # relative
    started_s: Seconds  # since the epoch
    rung: Count = 0  # that it trains to, from 0


@dataclass(frozen=True, slots=True)
class _State:
    """`state.json`: what a driver says while it lives; what another version says beside it is left out."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True)

    driver: dict[str, Any] | None = None  # `this_process`
    running: tuple[RunningTrial, ...] = ()
    trouble: str | None = None


@dataclass(frozen=True, slots=True)
class WrittenFront:
    """What is asked of `front.json`, which can be written again: of a damaged one nothing is known."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, allow_inf_nan=False)

    trials: Count = 0  # that had ended
    hypervolume: float | None = None


_STATE, _FRONT = TypeAdapter(_State), TypeAdapter(WrittenFront)


class RunFolder:
    """The folder of one run: `create` a new one or `open` an existing one; append to it inside `driving`.

    `metric` says what the scores of its records are; before that they may be any.
    """

    metric: Metric = Metric("score")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.id = uuid.uuid4().hex[:8]  # of the run, whatever its folder is called
        self._troubles: dict[str, str] = {}  # by what they are of
        self.study_yaml = path / "study.yaml"
        self.space_yaml = path / "space.yaml"
        self.hardware_yaml = path / "hardware.yaml"
        self.hardware_csv = path / "hardware.csv"
        self.trials_jsonl = path / "trials.jsonl"
        self.trials_parquet = path / "trials.parquet"
        self.finals_jsonl = path / "finals.jsonl"
        self.prescreen_jsonl = path / "prescreen.jsonl"
        self.front_json = path / "front.json"
        self.problem_json = path / "problem.json"
        self.knee_json = path / "knee.json"
        self.study_db = path / "study.db"
        self.study_journal = path / "study.journal"
        self.warmstart = path / "warmstart"
        self.checkpoints = path / "checkpoints"
        self.report_html = path / "report.html"
        self.log_txt = path / "log.txt"
        self._run_json = path / "run.json"
        self._state_json = path / "state.json"
        self._lock = filelock.FileLock(path / "driver.lock")

    @classmethod
    def create(
        cls,
        path: str | Path,
        study_yaml: str,
        space_yaml: str | None = None,
        *,
        metric: Metric,
        hardware: tuple[str, str | None] | None = None,
    ) -> RunFolder:
        """Make the folder of a new run of the resolved study `study_yaml`, whose search space was `space_yaml`.

        `metric` is what its records' scores are, `hardware` the text of its profile and of the profile's table.

        Both are copied because a run means the configs that there were when it began, whatever its file says later.

        Raises:
            RunError: the folder already holds a run, or cannot be made.
            WriteError: a file of it cannot be written.
        """
        folder = cls(Path(path))
        if folder._run_json.exists() or folder.trials_jsonl.exists():
            raise RunError(
                f"{path} already holds a run: go on with it by `mpsearch resume {path}`, or give another --out"
            )
        folder.metric = metric
        about = {
            "schema": SCHEMA,
            "id": folder.id,
            "mpsearch": version("mpsearch"),
            "created_s": time.time(),
            "metric": metric.to_json(),
        }
        with _explained(f"cannot write the run folder {path}", "give another --out, or make it writable"):
            folder.path.mkdir(parents=True, exist_ok=True)
        write_text(folder.study_yaml, study_yaml, sync=True)
        if space_yaml is not None:
            write_text(folder.space_yaml, space_yaml, sync=True)
        profile, table = hardware or (None, None)
        for file, text in ((folder.hardware_yaml, profile), (folder.hardware_csv, table)):
            if text is not None:
                write_text(file, text, sync=True)
        write_text(folder._run_json, json.dumps(about) + "\n", sync=True)  # last: a folder with it is whole
        return folder

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """The folder of an existing run, to read or to drive.

        Raises:
            RunError: there is no run, or another version's.
        """
        folder = cls(Path(path))
        try:
            about = parse_json(read_whole(folder._run_json))
            schema = about["schema"]
        except FileNotFoundError:
            if folder.trials_jsonl.exists():
                raise RunError(
                    f"{path} holds a run whose run.json is gone, which says what its scores are: restore the file from "
                    f"a copy, or start a new run with `mpsearch run {folder.study_yaml} --out NEW_FOLDER`"
                ) from None
            raise RunError(
                f"{path} holds no run (no run.json): start one with `mpsearch run STUDY --out {path}`"
            ) from None
        except OSError as error:
            raise _unreadable(folder._run_json, error) from None
        except (ValueError, KeyError, TypeError):
            raise RunError(
                f'{folder._run_json} is not mpsearch\'s: expected an object with "schema": "{SCHEMA}"; restore the '
                "file from a copy, or start a new run"
            ) from None
        if schema not in (SCHEMA, FIRST_SCHEMA):
            writer = f"mpsearch {about['mpsearch']!s:.40}" if "mpsearch" in about else "something else"
            raise RunError(
                f"{path} was written by {writer} with schema {clip(schema)}, this is mpsearch {version('mpsearch')} "
                f"with {SCHEMA!r}: read it with the version that wrote it, or start a new run"
            )
        try:
            folder.id = about["id"]
            if not (isinstance(folder.id, str) and re.fullmatch(r"[\w-]{1,40}", folder.id)):
                raise ValueError(f"id: expected a short name, got {clip(folder.id)}")
            folder.metric = Metric.from_json(about["metric"]) if schema == SCHEMA else folder._first_metric()
        except (KeyError, ValueError, TaskError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise RunError(f"{folder._run_json}: {what}; restore the file from a copy, or start a new run") from None
        return folder

    def _first_metric(self) -> Metric:
        """The metric of a run of the first schema: by its name in `problem.json`; more of it was always better."""
        try:
            name = parse_json(read_whole(self.problem_json))["metric"]
        except (OSError, ValueError, KeyError, TypeError):
            name = "top1"
        return METRICS[name] if name in ("top1", "top5") else Metric(str(name))

    @contextlib.contextmanager
    def driving(self) -> Iterator[RunFolder]:
        """Be the one process that runs trials here. A lock of the operating system: it ends with its process.

        Raises:
            RunError: another process drives this run (the message gives its id), or the folder cannot be written.
        """
        action = "make it writable, restore it from a copy, or copy the run elsewhere and resume the copy"
        try:
            self._lock.acquire(timeout=0.5)
        except filelock.Timeout:
            driver = self._state().driver or {}
            who = f"process {driver.get('pid', '?')} on {driver.get('host', '?')}"
            raise RunError(
                f"{self.path} is being driven by {who}: wait for it or end it, or start another run with another --out"
            ) from None
        except OSError as error:
            name = Path(self._lock.lock_file).name
            raise RunError(
                f"cannot write the run folder {self.path}: {name}: {error.strerror or error}: make it writable, or "
                f"copy the run elsewhere and resume the copy; if {name} is no file, delete it"
            ) from None
        try:
            self._require_files()
            for read in (self.records, self.finals):  # before anything is cut off: a damaged file is refused as it is
                read()
            with _explained(f"cannot write the run folder {self.path}", action):
                for path in (self.trials_jsonl, self.finals_jsonl, self.prescreen_jsonl):
                    _end_last_line(path)
            for folder, name in ((self.path, "*.json"), (self.path, "*.parquet"), (self.checkpoints, "*")):
                remove_parts(folder, name)  # of a driver that was killed
            self.running = ()
            yield self
        finally:
            with contextlib.suppress(OSError):
                self._state_json.unlink()
            self._lock.release()

    def _require_files(self) -> None:
        """Raises RunError: what lies in a file's place cannot be written, or leads out of the folder."""
        changed = {self.trials_jsonl, self.finals_jsonl, self.prescreen_jsonl, self.log_txt}
        changed |= {self.study_db, self.study_journal}
        for path in (*self.path.glob("*"), *self.path.glob("*/*")):
            if is_stream(path) or (path in changed and path.is_symlink()):
                what = "a link" if path.is_symlink() else "a pipe or a device"
                raise RunError(
                    f"{path} is {what}, and only a file of the folder is written: delete it, or restore it from a copy"
                )

    def append(self, record: TrialRecord) -> None:
        """Put a trial that has ended on the disk; when this returns, it is there.

        Of a trial that was on the disk already, and has ended a longer rung, this record takes the place.

        Raises:
            RunError: it could not be written (disk full?); the earlier trials are safe and the file stays readable.
        """
        line = record_to_json(record)
        record_from_json(line)  # what cannot be read back is not written
        self._append(self.trials_jsonl, line, f"trial {record.number}")

    def records(self) -> list[TrialRecord]:
        """Every trial that has ended, in the order of ending (of the first rung, where there are several).

        Raises:
            RunError: a line is corrupt (the message gives its number), or the file has lost trials.
        """
        recorded = self.written_front.trials  # before the file is read, to which another process may append meanwhile
        records = _read_lines(
            self.trials_jsonl,
            self._of_this_run(record_from_json),
            lambda record: record.number,
            f"restore the file from a copy, or delete this line and {self.front_json.name} (only that trial is lost)",
        )
        if len(records) < recorded:
            raise RunError(
                f"{self.trials_jsonl} has {len(records)} trials, and {recorded} had ended when {self.front_json.name} "
                f"was written: restore the file from a copy, or delete {self.front_json} to go on with those that "
                "are left"
            )
        return records

    @property
    def written_front(self) -> WrittenFront:
        """What `front.json` says, which is written after each trial."""
        try:
            return _FRONT.validate_json(read_whole(self.front_json))
        except (OSError, ValueError):
            return WrittenFront()

    def _of_this_run(self, parse: Callable[[bytes], Record]) -> Callable[[bytes], Record]:
        """`parse`, which raises RunError also where a record is none of this run, or of other layers or samples."""
        known: dict[str, Hashable] = {}

        def read(line: bytes) -> Record:
            record = parse(line)
            for score in _scores(record):
                if not self.metric.possible(score):
                    low, high = self.metric.bounds
                    raise RunError(f"it has a {self.metric.name} of {score:g}, which is between {low:g} and {high:g}")
            for what, value in _constants(record):
                if known.setdefault(what, value) != value:
                    raise RunError(f"its {what} are not those of an earlier line")
            return record

        return read

    def append_final(self, record: FinalRecord) -> None:
        """Put a final training that has ended on the disk. Raises RunError as `append` does."""
        self._append(self.finals_jsonl, json.dumps(asdict(record)), f"the final training of trial {record.number}")

    def finals(self) -> list[FinalRecord]:
        """Every final training that has ended, in that order. Raises RunError as `records` does."""
        return _read_lines(
            self.finals_jsonl,
            self._of_this_run(final_from_json),
            lambda final: (final.number, final.seed, final.steps),
            f"delete this line, and let `mpsearch finalize {self.path}` train it again",
        )

    def append_prescreened(self, record: PrescreenRecord) -> None:
        """Put the score of an untrained config on the disk. Raises RunError as `append` does."""
        self._append(self.prescreen_jsonl, prescreen_to_json(record), "the score of an untrained config")

    def prescreened(self) -> list[PrescreenRecord]:
        """Every score of an untrained config, in that order. Raises RunError as `records` does."""
        return _read_lines(
            self.prescreen_jsonl,
            self._of_this_run(prescreen_from_json),
            lambda record: (record.config, record.batches),
            f"delete the file, and let `mpsearch resume {self.path}` score these configs again",
        )

    def rebuild_prescreened(self) -> list[PrescreenRecord]:
        """As `prescreened`, by a driver: a file that says what is wrong is removed, for its scores are made again."""
        try:
            return self.prescreened()
        except RunError as error:
            try:
                self.prescreen_jsonl.unlink()
            except OSError:
                raise error from None
            progress.warning("%s: that is done now", error)
            return []

    def _append(self, path: Path, line: str, what: str) -> None:
        if not self._lock.is_locked:
            raise RuntimeError("only a driver writes the record: append inside driving()")
        try:
            _append_line(path, line)
        except OSError as error:
            safe = len(self.records())
            raise RunError(
                f"cannot record {what} in {path}: {error.strerror}. The {safe} trials recorded before are safe: make "
                f"room, then `mpsearch resume {self.path}`"
            ) from None

    @property
    def driving_here(self) -> bool:
        """Whether this folder is inside its `driving`."""
        return self._lock.is_locked

    @property
    def driven(self) -> bool:
        """Whether a process drives the run now."""
        return alive(self._state().driver)

    @property
    def running(self) -> Sequence[RunningTrial]:
        """The trials under way; none where no driver lives. Set by the driver."""
        state = self._state()
        return list(state.running) if alive(state.driver) else []

    @running.setter
    def running(self, trials: Sequence[RunningTrial]) -> None:
        state = {"driver": this_process(), "running": [asdict(trial) for trial in trials], "trouble": self._trouble_now}
        write_text(self._state_json, json.dumps(state))

    @property
    def _trouble_now(self) -> str | None:
        return "; ".join(self._troubles.values()) or None

    @property
    def trouble(self) -> str | None:
        """What goes wrong beside the search now, in words; None: nothing, or no driver lives. Set by the driver."""
        state = self._state()
        return state.trouble if alive(state.driver) else None

    @trouble.setter
    def trouble(self, words: str | None) -> None:
        self.note_trouble("storage", words)

    def note_trouble(self, of: str, words: str | None) -> None:
        """Have `trouble` say this of a thing beside what it says of others; None: it is well again. By the driver."""
        if words is None:
            self._troubles.pop(of, None)
        else:
            self._troubles[of] = words
        with contextlib.suppress(WriteError):  # of no weight beside a disk that is full
            self.running = self.running

    def write_front(self, front: Mapping[str, Any]) -> None:
        """Write `front.json`, whole or not at all. Raises WriteError where it cannot."""
        write_json(self.front_json, front, sync=True)

    def read_file(self, path: Path) -> bytes | None:
        """The content of a file of the folder; None where there is none. Raises RunError where it cannot be read."""
        try:
            return read_whole(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unreadable(path, error) from None

    def write_parquet(self) -> Path:
        """Write `trials.parquet` from the record: a row per trial, two text columns per layer.

        Columns are the fields of TrialRecord, `steps`, `wall.*` in seconds, `cost.*` in each cost's unit, and
        `NAME.weight` and `NAME.activation` for every layer. Raises WriteError where it cannot be written.
        """
        import pandas as pd

        rows = [_row(record) for record in self.records()]
        table = pd.DataFrame(rows).convert_dtypes()
        with replacing(self.trials_parquet) as temporary:
            table.to_parquet(temporary, index=False)
        return self.trials_parquet

    def _state(self) -> _State:
        try:
            return _STATE.validate_json(read_whole(self._state_json))
        except (OSError, ValueError):  # there is none, or the driver writes it anew with the next trial
            return _State()


def _append_line(path: Path, line: str) -> None:
    """Add a line and wait until the disk has it; where that fails, the file is as it was. Raises OSError."""
    file = open_own(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    try:
        end = os.fstat(file).st_size
        try:
            rest = memoryview(f"{line}\n".encode())
            while rest:  # one turn, unless the disk is full: then the next one raises
                rest = rest[os.write(file, rest) :]
            os.fsync(file)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(file, end)
            raise
    finally:
        os.close(file)


def _read_lines(
    path: Path, parse: Callable[[bytes], Record], key: Callable[[Record], Hashable], advice: str
) -> list[Record]:
    """What the whole lines of a file stand for; a line that is there twice counts once.

    A trial that failed, or that has ended a longer rung since, may be followed by one of the same number and config,
    which takes its place.

    Raises:
        RunError: a line stands for nothing, or for what an earlier one gives otherwise; with its number and `advice`.
    """
    try:
        lines = read_whole(path, MOST_RECORDED_BYTES).split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unreadable(path, error) from None
    records: dict[Hashable, Record] = {}
    for number, line in enumerate(lines[:-1] if _is_torn(lines[-1]) else lines, start=1):
        try:
            record = parse(line)
            if (before := records.get(key(record), record)) != record and not _takes_the_place(before, record):
                raise RunError("an earlier line gives it otherwise")
            records[key(record)] = record
        except RunError as error:
            raise RunError(f"{path}, line {number}: {error}; {advice}") from None
    return list(records.values())


def _takes_the_place(before: object, record: object) -> bool:
    """Whether a trial was tried again after it failed, or ended a longer rung."""
    return (
        isinstance(before, TrialRecord)
        and isinstance(record, TrialRecord)
        and (before.state == "failed" or len(record.rungs) > len(before.rungs) > 0)
        and before.config == record.config
    )


def _unreadable(path: Path, error: OSError) -> RunError:
    return RunError(f"cannot read {path}: {error.strerror}; let it be read, or restore it from a copy")


def _is_torn(last: bytes) -> bool:
    """Whether what follows the last newline is nothing, or a part of a line: an object ends where it is whole."""
    if not last.endswith(b"}"):
        return True
    try:
        if len(last) <= MOST_BYTES:
            json.loads(last, parse_int=str)  # of thousands of digits it would refuse, and the object is whole
    except ValueError:
        return True
    except RecursionError:
        pass
    return False


def _end_last_line(path: Path) -> None:
    """Cut off what a killed driver was writing, whose trial never ended; a line that only lacks its newline gets it.

    Raises OSError.
    """
    if path.exists():
        with os.fdopen(open_own(path, os.O_RDWR), "rb+") as file:
            text = file.read()
            whole = text.rfind(b"\n") + 1
            if _is_torn(text[whole:]):
                file.truncate(whole)
            else:
                file.write(b"\n")


def _scores(record: TrialRecord | FinalRecord | PrescreenRecord) -> Iterator[float]:
    match record:
        case TrialRecord():
            scores = (record.score, *(score for _, score in record.curve), *(rung.score for rung in record.rungs))
            yield from (score for score in scores if score is not None)
        case FinalRecord():
            yield from (record.val, record.test)


def _constants(record: TrialRecord | FinalRecord | PrescreenRecord) -> Iterator[tuple[str, Hashable]]:
    """What is the same in all lines of a file, by what it is called."""
    match record:
        case TrialRecord(config=config) | PrescreenRecord(config=config):
            yield "layers", frozenset(config)
    match record:
        case TrialRecord(values=str(packed)) | FinalRecord(values=str(packed)):
            yield "samples", packed.partition(":")[0]


def _row(record: TrialRecord) -> dict[str, Any]:
    left_out = ("config", "wall", "curve", "values", "costs", "rungs")
    row = {name: getattr(record, name) for name in _FIELDS if name not in left_out}
    row["steps"] = record.steps
    row |= {f"cost.{name}": value for name, value in record.costs.items()}
    row["digest"] = record.config.digest
    row |= {f"wall.{name}": value for name, value in asdict(record.wall).items()}
    for name, layer in record.config.items():
        row |= {f"{name}.weight": str(layer.weight), f"{name}.activation": str(layer.activation)}
    return row


def this_process() -> dict[str, Any]:
    """What names this process for as long as there are computers, as JSON."""
    # A process id comes round again; together with the time of its start it does not.
    return {"pid": os.getpid(), "host": socket.gethostname(), "started_s": psutil.Process().create_time()}


def alive(driver: Any) -> bool:
    """Whether the process that `this_process` named lives, as far as can be known from here."""
    if not isinstance(driver, dict) or not {"pid", "host", "started_s"} <= driver.keys():
        return False
    if driver["host"] != socket.gethostname():
        return True  # nothing can be known from here
    try:
        return bool(psutil.Process(driver["pid"]).create_time() == driver["started_s"])
    except (psutil.Error, TypeError, ValueError, OverflowError):
        return False


@contextlib.contextmanager
def _explained(what: str, action: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        file = "" if error.filename is None or str(error.filename) in what else f"{error.filename}: "
        raise RunError(f"{what}: {file}{error.strerror or error}: {action}") from None


def pack(values: NDArray[Any]) -> str:
    """`(n,)` values of samples as text.

    Booleans take n / 6 characters, `N:base64 of the bits`; numbers some 5 n, `Nf:base64 of deflated float32`.
    """
    import numpy as np  # here, because a run's status needs nothing of it

    if values.dtype == bool:
        return f"{len(values)}:{base64.b64encode(np.packbits(values).tobytes()).decode()}"
    packed = zlib.compress(values.astype("<f4").tobytes())
    return f"{len(values)}f:{base64.b64encode(packed).decode()}"


def unpack(text: str) -> NDArray[Any]:
    """The inverse of `pack`: `(n,)` booleans, or float32. Raises ValueError: the text is none of its."""
    import numpy as np

    count, content = _bytes_of(text)
    if text.partition(":")[0].endswith("f"):
        return np.frombuffer(content, dtype="<f4")
    return np.unpackbits(np.frombuffer(content, dtype=np.uint8), count=count).astype(bool)


def _bytes_of(text: str) -> tuple[int, bytes]:
    """Number of values, and the bytes that they were: as many as these values take, whatever the text unfolds to."""
    match = re.match(r"([0-9]{1,10})(f?):", text)
    if match is None:
        raise ValueError(f"expected N:base64 or Nf:base64 of the samples' values, got {clip(text)}")
    count, content = int(match[1]), base64.b64decode(text[match.end() :], validate=True)
    size = -(-count // 8)
    if match[2]:
        size, unfolding = 4 * count, zlib.decompressobj()
        try:
            content = unfolding.decompress(content, min(size, 1100 * len(content)) + 1)  # it unfolds to no more
        except zlib.error as error:
            raise ValueError(str(error)) from None
    if len(content) != size:
        raise ValueError(f"{count} samples are {size} bytes, and there are {len(content)}")
    return count, content


def checkpoint_path(folder: Path, number: int) -> Path:
    """Where the weights and scales of a trial are, as long as it is on the front."""
    return folder / f"trial-{number}.safetensors"


def rung_path(folder: Path, number: int, rung: int) -> Path:
    """Where the weights and scales of a trial are from the end of a longer rung until that is on the record."""
    return folder / f"trial-{number}.rung-{rung}.safetensors"


def state_path(folder: Path, number: int, rung: int) -> Path:
    """Where the training of a trial is as a rung left it, from which the next one goes on."""
    return folder / f"trial-{number}.state-{rung}.safetensors"


def final_path(folder: Path, number: int) -> Path:
    """Where the finally trained weights and scales of a trial are: those of the seed that is best on val."""
    return folder / f"final-{number}.safetensors"
