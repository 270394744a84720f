"""The Optuna dashboard of a run: its study with notes, our figures and artifacts, kept current while the run goes on.

The study is the view that the search writes (`search/view.py`); here it gets what only a spectator needs: a note, the
figures that `dashboards/layout.yaml` puts on the dashboard, and a note for each trial. `report/serve.py` serves it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage

from mpsearch.errors import RunError
from mpsearch.facts import ProblemFacts, read_facts
from mpsearch.private.optuna import storage_of, study_id
from mpsearch.private.optuna_dashboard import replace_trial_note
from mpsearch.record import RunFolder, TrialRecord
from mpsearch.report.artifacts import RunArtifacts
from mpsearch.report.data import RunData, read_run
from mpsearch.report.gallery import shown, words
from mpsearch.report.gate import Application
from mpsearch.report.write import sizes
from mpsearch.search.view import OptunaView, open_storage, open_view
from mpsearch.trust import database_trusted
from mpsearch.variables import masked

logger = logging.getLogger(__name__)
progress = logging.getLogger("mpsearch.progress")

EVERY_S = 2.0  # how often is looked for trials that have ended
NOTES = 200  # trials with a note: the front, the uniform ladder and the latest
_HEIGHT = 440  # of the place that Optuna's dashboard has for a figure, in pixels
_INK = "#808080"  # of texts in figures: read on light and on dark paper, between which the page's reader chooses


@contextlib.contextmanager
def application(target: str, caught_up: threading.Event) -> Iterator[Application]:
    """The dashboard of a run, or of any Optuna storage, for the time of the block.

    Args:
        target: a run folder, or the URL of a storage.
        caught_up: set once all that was on the run's record is shown.

    Raises:
        MpsearchError: no such run or storage, or it is damaged.
    """
    from optuna_dashboard import wsgi

    if "://" in target:
        caught_up.set()
        yield wsgi(_existing(target))
        return
    folder = RunFolder.open(target)
    facts = read_facts(folder)
    read_run(folder, facts)  # what is damaged is refused
    with _kept_current(folder, facts, caught_up) as study:
        yield wsgi(storage_of(study), artifact_store=RunArtifacts(folder, facts))


class Prepared:
    """What a spectator needs of a study: written once, and again where it has changed.

    Args:
        study: of the run, in whatever storage.
        folder: of the run.
        facts: of its problem.
    """

    def __init__(self, study: optuna.Study, folder: RunFolder, facts: ProblemFacts) -> None:
        self._study = study
        self._folder = folder
        self._facts = facts
        self._written: dict[str, str] = {}  # key -> digest of what was written last

    def refresh(self) -> RunData:
        """Bring note, figures and notes of trials up to the record."""
        from optuna_dashboard import get_note, save_note, save_plotly_graph_object

        run = read_run(self._folder, self._facts)
        note = study_note(run, self._facts, self._folder)
        if self._ours(get_note(self._study)) and self._changed("note", note):
            save_note(self._study, note)
            storage_of(self._study).set_study_system_attr(study_id(self._study), _OUR_NOTE, _digest(note))
        for name, value in study_attributes(run, self._facts).items():
            if self._changed(f"attribute {name}", str(value)):
                self._study.set_user_attr(name, value)
        for name, drawn in dashboard_figures(run).items():
            if self._changed(f"figure {name}", drawn.to_json()):
                save_plotly_graph_object(self._study, drawn, graph_object_id=name)
        self._note_trials(run)
        return run

    def _ours(self, note: str) -> bool:
        """Whether the study's note is what we wrote, or nothing: what somebody else has written stays."""
        attributes = storage_of(self._study).get_study_system_attrs(study_id(self._study))
        return not note or attributes.get(_OUR_NOTE) == _digest(note)

    def _changed(self, key: str, text: str) -> bool:
        before = self._written.get(key)
        self._written[key] = _digest(text)
        return before != self._written[key]

    def _note_trials(self, run: RunData) -> None:
        by_number = {record.number: record for record in run.records}
        latest = [record.number for record in run.records[-NOTES:]]
        candidates = [*(r.number for r in (*run.front.trials, *run.front.ladder)), *reversed(latest)]
        numbers = set(list(dict.fromkeys(candidates))[:NOTES])
        for trial in self._study.get_trials(deepcopy=False):
            record = by_number.get(trial.user_attrs.get("number", -1))
            if record is None or record.number not in numbers:
                continue
            note = trial_note(record, run, self._folder)
            if self._changed(f"trial {record.number}, rung {trial.user_attrs.get('rung', 0)}", note):
                replace_trial_note(self._study, trial, note, ours=_TRIAL_NOTE)


_OUR_NOTE = "mpsearch:note"
_TRIAL_NOTE = "**Trial "


def dashboard_figures(run: RunData) -> dict[str, Any]:
    """The figures of the Optuna dashboard by name, as it shows them: small, and with their title on them."""
    figures = {}
    trials = run.trials.assign(config=run.trials.config.where(run.trials.on_front, ""))
    for item, drawn in shown(replace(run, trials=trials), "dashboard"):
        title: dict[str, Any] = {
            "text": words(item.title or item.caption, run),
            "x": 0.01,
            "y": 0.985,
            "yanchor": "top",
        }
        title["font"] = {"size": 15}
        margin = {"l": 8, "r": 8, "t": 126 if item.figure == "front" else 70, "b": 8}  # a legend of four lines, or one
        drawn.update_layout(height=_HEIGHT, autosize=True, title=title, margin=margin, font={"color": _INK, "size": 12})
        figures[item.figure] = drawn
    return figures


def study_attributes(run: RunData, facts: ProblemFacts) -> dict[str, str | float]:
    """What holds for all trials."""
    spec, reference = facts.spec, run.cost.reference
    return {
        "task": facts.task_name,
        "metric": f"{facts.metric.name} on val, {facts.metric.direction}d",
        "cost model": spec.cost.model,
        "reference": f"{spec.cost.reference}, {reference.total:.4g} {reference.unit} a sample",
        "search space": facts.space.name,
        "layers": len(run.layers),
        "sampler": spec.search.sampler,
        "cheapest config (cost)": run.cheapest,
    }


def study_note(run: RunData, facts: ProblemFacts, folder: RunFolder) -> str:
    """What was asked, what is best so far, and how to go on, in Markdown."""
    spec = facts.spec
    lines = [f"## {run.name}", "", *(f"{_plain(line)}\n" for line in facts.summary())]
    lines += [f"**Warning**: {_plain(note)}\n" for note in facts.notes]
    states = [record.state for record in run.records]
    ended = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    lines += [f"**Trials**: {ended or 'none has ended yet'}, of {spec.search.trials} wanted.", ""]
    if run.front.trials:
        lines += [
            f"| trial | origin | {_plain(run.metric.name)}, val | cost | weight bits | activation bits | |",
            "|--:|--|--:|--:|--:|--:|--|",
        ]
        for trial in run.front.trials:
            bits = " | ".join(f"{mean:.2f}" for mean in trial.config.mean_bits)
            place = "knee" if trial is run.front.knee else ""
            origin, score = _plain(trial.origin), _plain(run.metric.show(trial.score))
            lines.append(f"| {trial.number} | {origin} | {score} | {trial.cost:.4f} | {bits} | {place} |")
        reached = f"Hypervolume {run.front.hypervolume(run.cheapest, run.scores):.4f}"
        lines += ["", f"{reached}, {_plain(run.scores.said(run.metric))}.", ""]
    lines += [
        "A trial's number here is its attribute `number`; Optuna counts in the order of ending.",
        "",
        "```",
        f"mpsearch finalize {folder.path}",
        f"mpsearch export {folder.path} --pick knee --to native -o OUT",
        f"mpsearch report {folder.path}",
        "```",
    ]
    return "\n".join(lines)


def trial_note(record: TrialRecord, run: RunData, folder: RunFolder) -> str:
    """What became of a trial, in Markdown."""
    place = "dominated"
    if any(trial is record for trial in run.front.trials):
        place = "the knee of the front" if run.front.trials and record is run.front.knee else "on the front"
    if record.state != "complete":
        place = f"{record.state}: {record.reason or 'no reason given'}"
    weight, inputs = record.config.mean_bits
    lines = [f"{_TRIAL_NOTE}{record.number}**, proposed by {_plain(record.origin)}: {_plain(place)}.", ""]
    if record.score is not None and record.cost is not None:
        trained = f" after {record.steps} training steps" if record.rungs else ""
        score = _plain(f"{run.metric.name} on val {run.metric.show(record.score)}{trained}")
        lines.append(f"- {score}, relative cost {record.cost:.4f}")
    lines += [
        f"- mean bits: weights {weight:.2f}, inputs {inputs:.2f}",
        f"- {record.wall.total_s:.1f} s, of which {record.wall.train_s:.1f} s training",
    ]
    final = run.finals[run.finals.number == record.number]
    if len(final):
        row = final.iloc[0]
        spread = "" if row.test_std != row.test_std else f" ± {run.metric.show(row.test_std)}"
        score = _plain(f"{run.metric.show(row.test)}{spread}")
        lines.append(f"- after final training: test {score}, {row.seeds:.0f} seeds")
    if record.state == "complete":
        lines += ["", f"`mpsearch export {folder.path} --pick trial:{record.number} --to native -o OUT`"]
    return "\n".join(lines)


@contextlib.contextmanager
def _kept_current(folder: RunFolder, facts: ProblemFacts, caught_up: threading.Event) -> Iterator[optuna.Study]:
    """The study of a run, brought up to the record and followed in the background for the time of the block.

    Trials that it lacks are added, unless the process that drives the run does that. Of thousands of trials this takes
    minutes, and their figures seconds: a visitor sees what is there already.
    """
    view, ended = _view(folder, facts), threading.Event()
    prepared = Prepared(view.study, folder, facts)
    in_memory = _in_memory(folder, facts)  # no other process writes to a study there

    def in_vain() -> bool:
        return ended.is_set() or (folder.driven and not in_memory)

    def follow() -> None:
        seen: tuple[int, ...] | None = None
        while not ended.is_set():
            if (now := sizes(folder)) != seen:
                try:
                    if seen is None:
                        prepared.refresh()  # note and figures are of the record, and need no trial in the study
                    if in_memory or seen is None:
                        view.catch_up([] if in_vain() else folder.records(), until=in_vain)
                    prepared.refresh()
                    seen = now
                    caught_up.set()
                except Exception:  # of whatever database: the next look may succeed
                    logger.warning("the study could not be brought up to date; trying again", exc_info=True)
            ended.wait(EVERY_S)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield view.study
    finally:
        ended.set()
        thread.join(timeout=10)


def _view(folder: RunFolder, facts: ProblemFacts) -> OptunaView:
    """The run's study as it is."""
    spec, space, budget = facts.spec, facts.space, facts.spec.cost.budget
    if _in_memory(folder, facts):
        if spec.storage != "none":
            progress.warning(
                "the database of %s is not reached, as the run was not made here: trials are shown from the record and "
                "notes are not kept; mpsearch.trust(run) or `mpsearch resume --trust` lets it be reached",
                folder.path,
            )
        storage = optuna.storages.InMemoryStorage()
        return OptunaView(storage, spec.name, space, facts.metric, budget, (), facts.cost)
    view = open_view(spec.storage, folder, spec.name, space, facts.metric, budget, (), facts.cost)
    assert view is not None
    return view


def _in_memory(folder: RunFolder, facts: ProblemFacts) -> bool:
    """Whether a run's study is made here from the record: it has none, or one in a database that nobody trusts."""
    return facts.spec.storage == "none" or not database_trusted(folder, facts.spec)


def _existing(url: str) -> BaseStorage:
    """The storage at a URL, which holds studies already. Raises RunError if it does not."""
    path = url.partition(":///")[2].partition("?")[0]
    if url.startswith("sqlite") and not Path(path).is_file():  # SQLite would make an empty one
        raise RunError(
            f"{masked(url)} names no file: give the path of a database, as in sqlite:///runs/digits/study.db"
        )
    storage = open_storage(url)
    if not storage.get_all_studies():
        raise RunError(f"{masked(url)} holds no study: start one with `mpsearch run STUDY --set storage=URL`")
    return storage


def _plain(text: str) -> str:
    """A text of the run in one line of Markdown that shows it as it is: neither Markdown nor HTML."""
    return re.sub(r"[\\`*_{}\[\]<>#|~&$]", r"\\\g<0>", " ".join(text.split()))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
