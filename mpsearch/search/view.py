"""OptunaView: the trials of a run as an Optuna study, for the Optuna dashboard and Optuna's own tools.

A view and not the truth, which is the run folder's `trials.jsonl`: every trial is written once, when it has ended, so
no trial is ever RUNNING here, whatever is killed. What is missing is added when the view is opened. A database that
goes away in the middle of a run is tried again now and then, and the run goes on.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.pool import QueuePool

from mpsearch.cost.model import RelativeCost
from mpsearch.errors import RunError
from mpsearch.metric import Metric
from mpsearch.record import RunFolder, TrialRecord
from mpsearch.search.controller import constraints
from mpsearch.space.space import SearchSpace
from mpsearch.variables import expand, masked

progress = logging.getLogger("mpsearch.progress")

RETRY_S = 10.0
"""Seconds after which a storage that failed is tried again."""

SHOWN_LAYERS = 5  # in the cost breakdown of a trial; the others are summed

ARTIFACTS: Mapping[str, tuple[str, str]] = {
    "0": ("config.json", "application/json"),
    "1": ("bits.svg", "image/svg+xml"),
    "2": ("training.svg", "image/svg+xml"),
}
"""Kind -> file name and type of what the Optuna dashboard offers of a trial. Their content is made when it is asked for
(`mpsearch.report.artifacts`); the study holds their names, because a trial that has ended takes no more of them."""

MOST_WAITING = 16  # trials that are not shown because one before them has not ended

_STATES = {"complete": TrialState.COMPLETE, "failed": TrialState.FAIL, "stopped": TrialState.PRUNED}
_ENDED_WELL = (TrialState.COMPLETE, TrialState.PRUNED)


class OptunaView:
    """An Optuna study that shows a run.

    Values are the score, in its unit and direction, and log2 of relative cost; a failed or stopped trial has none. User
    attributes hold the rest of the record, among it `number` and `rung`, by which a trial is known here: Optuna counts
    in the order of adding. As Optuna's trials do not change once they have ended, each rung of ours is one of them, and
    a trial that failed and was tried again is there twice. Budget and limits are constraints, in octaves (at most 0 is
    within), under Optuna's key and the older one that optuna-dashboard reads.
    """

    def __init__(
        self,
        storage: BaseStorage,
        name: str,
        space: SearchSpace,
        metric: Metric,
        budget: float | None,
        records: Iterable[TrialRecord],
        cost: RelativeCost | None = None,
        on_trouble: Callable[[str | None], None] = lambda words: None,
    ) -> None:
        self._storage = storage
        self._space = space
        self._cost = cost
        self._budget = math.inf if budget is None else budget
        self._distributions = space.distributions()
        directions = [metric.direction, "minimize"]
        self.study = optuna.create_study(storage=storage, study_name=name, directions=directions, load_if_exists=True)
        if self.study.metric_names is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                unit = "share" if metric.unit == "%" else metric.unit
                score = f"{metric.name} on val" + (f" ({unit})" if unit else "")
                self.study.set_metric_names([score, "cost (log2 of the reference's)"])
        self._behind: list[TrialRecord] = []  # ended, and not shown because the storage failed
        self._retry_at = 0.0
        self._on_trouble = on_trouble
        self._waiting: dict[int, TrialRecord] = {}  # by number: ended, but not one before them
        self._longer: dict[int, list[TrialRecord]] = {}  # those of them that ended a longer rung meanwhile
        self._next = 0
        self.catch_up(records)

    def catch_up(self, records: Iterable[TrialRecord], until: Callable[[], bool] = lambda: False) -> None:
        """Show those of the trials that are not shown yet; `until` is asked before each, and leaves out the rest."""
        shown: dict[tuple[Any, int], TrialState] = {}  # by number and rung
        for trial in self.study.get_trials(deepcopy=False):
            one = (trial.user_attrs.get("number"), trial.user_attrs.get("rung", 0))
            shown[one] = trial.state if shown.get(one, TrialState.FAIL) == TrialState.FAIL else shown[one]
        each = {(r.number, rung): r for r in records for rung in range(max(1, len(r.rungs)))}
        behind = [one for one, r in each.items() if shown.get(one) not in (_state(r, one[1]), *_ENDED_WELL)]
        missing = sorted(behind, key=lambda one: (one[1], one[0]))
        for number, rung in missing:
            if until():
                return
            self.study.add_trial(self._trial(each[number, rung], rung))
        self._next = len({number for number, _ in (*shown, *missing)})

    def add(self, record: TrialRecord) -> None:
        """Show a trial that has ended and is on the disk, once those before it are shown, or many are waiting.

        Optuna numbers trials as they are added; so its numbers are ours, unless a run was killed or a trial is slow.
        """
        if len(record.rungs) > 1:
            if record.number in self._waiting:
                self._longer.setdefault(record.number, []).append(record)
            else:
                self._show(record)
            return
        self._waiting[record.number] = record
        while self._waiting and (min(self._waiting) <= self._next or len(self._waiting) > MOST_WAITING):
            self._show_waiting(min(self._waiting))

    def flush(self) -> None:
        """Show every trial that waits."""
        for number in sorted(self._waiting):
            self._show_waiting(number)
        if self._behind:
            self._reconnect()

    def close(self) -> None:
        """Let go of the storage: SQLite then writes its log into the one file that people copy."""
        if isinstance(self._storage, RDBStorage):
            self._storage.remove_session()
            self._storage.engine.dispose()

    def _show_waiting(self, number: int) -> None:
        for record in (self._waiting.pop(number), *self._longer.pop(number, ())):
            self._show(record)

    def _show(self, record: TrialRecord) -> None:
        self._next = max(self._next, record.number + 1)
        if self._behind:
            self._behind.append(record)
            if time.monotonic() >= self._retry_at:
                self._reconnect()
            return
        try:
            self.study.add_trial(self._trial(record, max(0, len(record.rungs) - 1)))
        except Exception as error:  # of whatever database: a run does not end because nobody can watch it
            self._behind.append(record)
            self._retry_at = time.monotonic() + RETRY_S
            words = f"the Optuna study is not updated ({_said(error)}); the run goes on, and it is tried again"
            progress.warning(words)
            self._on_trouble(words)

    def _reconnect(self) -> None:
        """Show what could not be shown; where that fails again, later."""
        after = self._next
        try:
            self.catch_up(self._behind)
        except Exception:  # as above; it has been said
            self._retry_at = time.monotonic() + RETRY_S
            return
        self._next = max(self._next, after)
        self._behind = []
        progress.info("the Optuna study is up to date again")
        self._on_trouble(None)

    def _trial(self, record: TrialRecord, rung: int) -> FrozenTrial:
        """What Optuna is told of a trial at the end of one of its rungs."""
        state = _state(record, rung)
        record = record.at_rung(rung)
        within = self._space.contains(record.config)
        kept = None
        if record.cost is not None and (within or self._cost is None or not self._cost.limits):
            kept = constraints(record.cost, self._budget, self._cost, record.config)
        values = None
        if state == TrialState.COMPLETE and record.score is not None and record.cost is not None:
            values = [record.score, math.log2(record.cost)]
        trial = create_trial(
            state=state,
            values=values,
            params=dict(self._space.params_of(record.config)) if within else {},
            distributions=self._distributions if within else {},
            user_attrs=_attributes(record, rung) | self._breakdown(record),
            system_attrs=_artifacts(record) | ({"constraints": [*kept.values()]} if kept else {}),
            constraints=kept,
            intermediate_values=dict(record.curve),
        )
        wall_s = record.rungs[-1].wall_s if record.rungs else record.wall.total_s
        trial.datetime_complete = datetime.fromtimestamp(record.ended_s)
        trial.datetime_start = trial.datetime_complete - timedelta(seconds=wall_s)
        return trial

    def _breakdown(self, record: TrialRecord) -> dict[str, Any]:
        """Which layers cost most, in percent of the trial's cost; nothing where the config is of another network."""
        if self._cost is None or not self._space.contains(record.config):
            return {}
        cost = self._cost.absolute(record.config)
        most = sorted(cost.per_layer.items(), key=lambda item: -item[1])
        shares = {layer: round(100 * value / cost.total, 1) for layer, value in most[:SHOWN_LAYERS]}
        if rest := sum(value for _, value in most[SHOWN_LAYERS:]):
            shares[f"{len(most) - SHOWN_LAYERS} others"] = round(100 * rest / cost.total, 1)
        return {"cost by layer (%)": shares, f"cost ({cost.unit})": float(f"{cost.total:.6g}")}


def open_view(
    storage: str,
    folder: RunFolder,
    name: str,
    space: SearchSpace,
    metric: Metric,
    budget: float | None = None,
    records: Iterable[TrialRecord] = (),
    cost: RelativeCost | None = None,
    on_trouble: Callable[[str | None], None] = lambda words: None,
) -> OptunaView | None:
    """The view that a study file asks for, with all of `records` in it.

    Args:
        storage: `sqlite` or `journal` (a file in the run folder), a SQLAlchemy URL, or `none` (returns None).
        folder: of the run.
        name: of the study; at a URL the run's id follows, because others keep their studies there too.
        space: the configs that there are.
        metric: what scores are.
        budget: the largest relative cost that is acceptable.
        records: the trials that have ended.
        cost: prices the layers of each trial.
        on_trouble: told in words when the view cannot be written, and None when it can again.

    A file in the run folder that is damaged is made again from `records`.

    Raises:
        RunError: the storage cannot be opened.
    """
    if storage == "none":
        return None
    storage = expand(storage, "storage")  # what secrets a run has are not in its folder
    if storage not in ("sqlite", "journal"):
        name = f"{name}-{folder.id}"
        with _explained(storage):
            return OptunaView(open_storage(storage), name, space, metric, budget, records, cost, on_trouble)
    records = list(records)
    try:
        return OptunaView(open_storage(storage, folder), name, space, metric, budget, records, cost, on_trouble)
    except Exception as error:  # of SQLite, SQLAlchemy, Optuna or its journal
        path = folder.study_db if storage == "sqlite" else folder.study_journal
        _refuse_locked(path, error)
        if folder.driven and not folder.driving_here:
            raise RunError(
                f"{path} is damaged ({_said(error)}): it is made again when the run is over and resumed, or looked at"
            ) from None
        progress.warning("%s is damaged (%s): it is made again from the trials' record", path, _said(error))
    with _explained(storage):
        for part in path.parent.glob(f"{path.name}*"):  # SQLite's write-ahead log, and the journal's lock, too
            part.unlink()
        return OptunaView(open_storage(storage, folder), name, space, metric, budget, records, cost, on_trouble)


def _refuse_locked(path: Path, error: Exception) -> None:
    """Raises RunError: the file is whole, but another program holds it, or it cannot be reached."""
    said = str(error)
    if "locked" in said or isinstance(error, RunError | OSError) or "unable to open" in said or "full" in said:
        raise RunError(
            f"cannot open {path} ({_said(error)}): end the program that holds it, or see that it can be written; or "
            "remove it, for it is made again from the record; or go on without it with `--set storage=none`"
        ) from None


def open_storage(storage: str, folder: RunFolder | None = None) -> BaseStorage:
    """The Optuna storage that `sqlite` or `journal` (files in a run folder) or a URL means.

    Raises:
        RunError: a URL cannot be opened.
        Exception: a file in a run folder cannot; of many kinds.
    """
    if storage == "journal" and folder is not None:
        return JournalStorage(JournalFileBackend(str(folder.study_journal)))
    if storage == "sqlite" and folder is not None:
        # No URL has the path: there `?`, `%` and braces mean other things, and Optuna fills braces in.
        connect = functools.partial(sqlite3.connect, folder.study_db, check_same_thread=False)
        return _sqlite("sqlite://", {"creator": connect, "poolclass": QueuePool})
    with _explained(storage):
        return _sqlite(storage) if storage.startswith("sqlite") else RDBStorage(storage, {"pool_pre_ping": True})


@contextlib.contextmanager
def _explained(storage: str) -> Iterator[None]:
    try:
        yield
    except RunError:
        raise
    except Exception as error:  # every database has its own errors
        raise RunError(
            f"cannot open the storage '{masked(storage)}' ({_said(error)}): check that it is there and may be "
            "written, or use `--set storage=sqlite` or `--set storage=none`"
        ) from None


def _attributes(record: TrialRecord, rung: int) -> dict[str, Any]:
    attributes = {
        "number": record.number,
        "rung": rung,
        "steps": record.steps,
        "origin": record.origin,
        "config": record.config.digest,
        "cost / reference": record.cost,
        **record.costs,
        "reason": record.reason,
        "mean weight bits": _mean(layer.weight.bits for layer in record.config.values()),
        "mean activation bits": _mean(layer.activation.bits for layer in record.config.values()),
        "seed": record.seed,
        "loss, start": record.start_loss,
        "loss, end": record.end_loss,
        "divergence from float": record.divergence,
        "wall time (s)": round(record.wall.total_s, 3),
        "prepare (s)": round(record.wall.prepare_s, 3),
        "train (s)": round(record.wall.train_s, 3),
        "evaluate (s)": round(record.wall.evaluate_s, 3),
        "peak memory (MiB)": round(record.peak_memory_bytes / 2**20),
    }
    return {name: value for name, value in attributes.items() if value is not None}


def _state(record: TrialRecord, rung: int) -> TrialState:
    """How a rung of a trial ended."""
    failed = rung < len(record.rungs) and record.rungs[rung].score is None
    return TrialState.FAIL if failed else _STATES[record.state]


def _artifacts(record: TrialRecord) -> dict[str, str]:
    """What can be looked at of a trial, in the form of `optuna.artifacts`."""
    kinds = [kind for kind in ARTIFACTS if kind != "2" or len(record.curve) > 1]
    artifacts = {artifact_id(record.number, kind): ARTIFACTS[kind] for kind in kinds}
    return {
        f"artifacts:{key}": json.dumps({"artifact_id": key, "filename": name, "mimetype": mime, "encoding": None})
        for key, (name, mime) in artifacts.items()
    }


def artifact_id(number: int, kind: str) -> str:
    """What a kind of `ARTIFACTS` of a trial is called in the study: hexadecimal, as Optuna's dashboard wants it."""
    return f"{number:08x}-{kind}"


def _mean(bits: Iterable[int]) -> float:
    values = list(bits)
    return round(sum(values) / len(values), 3) if values else 0.0


def _said(error: Exception) -> str:
    """What an error of whatever database says, in a line without passwords."""
    return f"{type(error).__name__}: {masked(str(error).strip().partition(chr(10))[0])}"


def _sqlite(url: str, options: dict[str, Any] | None = None) -> RDBStorage:
    """SQLite that does not wait for the disk at every write: what goes with the power comes back from the record."""
    from sqlalchemy import event

    storage = RDBStorage(url, options)

    def fast(connection: Any, _: object) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        (whole,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if whole != "ok":
            raise sqlite3.DatabaseError(f"database disk image is malformed: {whole}")

    event.listen(storage.engine, "connect", fast)
    storage.engine.dispose()  # connections made before the listener
    return storage
