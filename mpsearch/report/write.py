"""Write the report of a run folder, once or again and again while it runs."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mpsearch.errors import RunError
from mpsearch.facts import ProblemFacts, read_facts
from mpsearch.files import is_stream
from mpsearch.record import RunFolder
from mpsearch.report.data import RunData, read_run
from mpsearch.report.page import write_report
from mpsearch.search.answer import gains_in_words, layers_in_words
from mpsearch.search.finals import final_rows, final_table, proxies


def report_of(folder: RunFolder, facts: ProblemFacts | None = None, refresh_s: int | None = None) -> Path:
    """Write `report.html` in a run folder, whole or not at all.

    Args:
        folder: of the run, which may be driven by another process.
        facts: of its problem, where they have been read already.
        refresh_s: the page loads itself again after so many seconds; None: never.

    Raises:
        MpsearchError: the run cannot be read, or the file cannot be written.
    """
    if is_stream(folder.report_html):  # which a user may name, and a folder must not
        raise RunError(f"{folder.report_html} is a pipe or a device, and no file: delete it")
    facts = facts or read_facts(folder)
    run = read_run(folder, facts)
    finalized = final_rows(run.records, folder.finals(), facts.spec.final.pick, facts.metric)
    path = shlex.quote(str(folder.path))
    return write_report(
        folder.report_html,
        run,
        summary=[*facts.summary(), *(f"Warning: {note}" for note in facts.notes)],
        finalized=final_table(finalized, facts.metric),
        remarks=proxies(finalized, facts.metric).lines(),
        commands=[
            f"mpsearch run {shlex.quote(str(folder.study_yaml))} --out NEW_FOLDER",
            f"mpsearch front {path}",
            f"mpsearch finalize {path}",
            f"mpsearch report {path}",
            f"mpsearch export {path} --pick knee --to native -o OUT",
        ],
        refresh_s=refresh_s,
        answer=_answer(run, facts),
    )


def _answer(run: RunData, facts: ProblemFacts) -> tuple[Sequence[str], Sequence[str]]:
    """What the knee gains, and what its layers have, in words."""
    if not run.front.trials or not facts.space.contains(run.front.knee.config):
        return (), ()
    config = run.front.knee.config
    return gains_in_words(config, facts), layers_in_words(config, facts)


def watch(
    folder: RunFolder,
    facts: ProblemFacts | None = None,
    every_s: float = 2.0,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Path]:
    """Write the report now and whenever a trial has ended, until no process drives the run any more.

    The page then loads itself again; the last one no longer does. Yields its path each time it has been written.
    """
    facts = facts or read_facts(folder)
    seen: tuple[int, ...] | None = None
    while folder.driven:
        if (now := sizes(folder)) != seen:
            seen = now
            yield report_of(folder, facts, refresh_s=max(5, round(every_s)))
        sleep(every_s)
    yield report_of(folder, facts)


def sizes(folder: RunFolder) -> tuple[int, ...]:
    """Of the files that grow when a trial or a final training has ended, and when the knee's weights were written."""
    grown = tuple(path.stat().st_size if path.exists() else 0 for path in (folder.trials_jsonl, folder.finals_jsonl))
    return (*grown, folder.knee_json.stat().st_mtime_ns if folder.knee_json.exists() else 0)
