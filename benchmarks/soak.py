"""Whether kills lose anything: a search whose driver, or one of whose workers, is killed (`kill -9`) again and again.

About every `--every` seconds (half as many to half as many again) a process is killed, chosen at random: the driver,
which is then resumed, at once or when nothing of it is left, or a worker, which the driver has to replace. While
nothing has been recorded since the last kill they are spared three times in four: a slow machine would not get beyond
the start. At the end the driver is told to end (SIGTERM), resumed once more for a few trials, and the run is audited:
every line that was on the disk before a kill is still there, no trial has ended twice or was started again after its
end, no more trials were begun again than kills can have interrupted, the Optuna study shows the same, the front's
weights are whole, and 30 seconds after each kill of the driver none of its processes was left. Exits with 1 where one
of these does not hold.
"""

from __future__ import annotations

import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
import yaml

from benchmarks.options import RESULTS, Results, Set, Study
from benchmarks.printing import print_table, say
from benchmarks.rows import MEASURED, Row, Rows
from mpsearch.errors import MpsearchError
from mpsearch.record import RunFolder, TrialRecord, checkpoint_path, record_from_json
from mpsearch.search.front import pareto_front
from mpsearch.state_dict import read_tensors

GONE_S = 30.0
"""After a kill of the driver, how long processes of it may still be there."""

LAST_TRIALS = 4
"""That the run gets after the last kill, to end in good order."""

WORKER = "ray::Worker"
"""How the command line of a process begins that runs trials."""

STARTED = re.compile(r"trial (\d+), rung (\d+) starts on node")
ENDED = re.compile(r"trial (\d+), rung (\d+) \(\w+\) is (?:complete|stopped)")

NOTHING = ("lost_lines", "numbers_missing", "ended_twice", "configs_twice", "started_after_end", "begun_in_vain")
NOTHING_MORE = ("not_in_view", "weights_missing", "failed_trials", "processes_left", "driver_errors")
"""Fields of a row that are zero where nothing was lost."""


def soak(
    study: Study = "digits",
    set_: Set = None,
    minutes: Annotated[float, typer.Option(help="how long processes are killed", min=0.1)] = 60,
    every: Annotated[float, typer.Option(help="seconds between two kills, on average", min=1)] = 60,
    seed: Annotated[int, typer.Option(help="random seed of who is killed, and when")] = 0,
    results: Results = RESULTS / "soak.jsonl",
) -> None:
    rows = Rows(results, key=("study", "set", "minutes", "every", "seed", *MEASURED))
    case = {"study": study, "set": set_ or [], "minutes": minutes, "every": every, "seed": seed}
    for missing in rows.missing([case]):
        rows.append(missing | measure(study, set_ or [], minutes, every, seed))
    for row in rows.select([case]):
        show(row)
        if not whole(row):
            raise typer.Exit(1)


def whole(row: Row) -> bool:
    """Whether nothing was lost, nothing done twice, and the run came to its end."""
    return row["exit_codes_at_the_end"] == [128 + signal.SIGTERM, 0] and not any(
        row[name] for name in (*NOTHING, *NOTHING_MORE)
    )


def measure(study: str, set_: list[str], minutes: float, every: float, seed: int) -> Row:
    """Kill for so many minutes, then look what is left; the run is kept where that is not all."""
    place = Path(tempfile.mkdtemp(prefix="mpsearch-soak-"))
    killer = Killer(place / "run", study, set_, random.Random(seed))
    try:
        killer.kill_for(60 * minutes, every)
        codes = killer.end()
    finally:
        killer.end_all()
    row = killer.counts() | audit(RunFolder.open(place / "run"), killer.may_be_begun_again)
    row["exit_codes_at_the_end"] = codes
    if whole(row):
        shutil.rmtree(place, ignore_errors=True)
    else:
        say(f"the run, and what its drivers said, is kept in {place}")
    return row


@dataclass
class Left:
    """What a killed driver left behind."""

    processes: list[psutil.Process]
    until_s: float  # by when they should be gone


@dataclass
class Killer:
    """Starts drivers of one run, and kills them and their workers."""

    run: Path
    study: str
    set_: list[str]
    random: random.Random
    drivers: int = 0  # killed
    workers: int = 0
    before_trials: int = 0  # drivers that were killed while nothing was on the record
    resumed_at_once: int = 0
    lost_lines: int = 0
    may_be_begun_again: int = 0  # trials, at most: those that ran when their process was killed
    left: list[Left] = field(default_factory=list)
    processes_left: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    seen: bytes = b""  # of the record, whole lines
    seen_at_kill: int = 0  # bytes of it, at the last kill
    driver: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        """What drivers said."""
        return self.run.parent / "drivers.log"

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """A driver: of a new run or, where there is one, of the next part of it."""
        if (self.run / "run.json").exists():
            command = ["resume", str(self.run), *arguments]
        else:
            shutil.rmtree(self.run, ignore_errors=True)  # a folder without run.json is no run yet
            sets = [part for override in self.set_ for part in ("--set", override)]
            command = ["run", self.study, "--out", str(self.run), "--trials", "1000000", *sets]
        with self.log.open("ab") as log:
            self.driver = subprocess.Popen(
                [sys.executable, "-m", "mpsearch", *command], stdout=log, stderr=log, start_new_session=True
            )
        return self.driver

    def kill_for(self, seconds: float, every: float) -> None:
        """Have the run driven, and kill; ends sooner where the search has no more configs."""
        end = time.monotonic() + seconds
        driver = self.start()
        while (now := time.monotonic()) < end:
            at = min(end, now + every * self.random.uniform(0.5, 1.5))
            while time.monotonic() < at and driver.poll() is None:
                time.sleep(0.1)
                self.look()
            if driver.poll() == 0:
                say("the search has come to its end")
                return
            if driver.returncode is not None:
                self.errors.append(f"exit {driver.returncode}: {self.log.read_text(errors='replace')[-500:]}")
                say(f"a driver ended by itself, {self.errors[-1]}")
                driver = self.start()
                continue
            if time.monotonic() >= end:
                return
            driver = self.kill(driver)

    def kill(self, driver: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
        """Kill somebody; returns the driver that there is afterwards."""
        self.remember()
        if len(self.seen) == self.seen_at_kill and self.random.random() < 0.75:
            say("nothing has been recorded since the last kill: spared")
            return driver
        self.seen_at_kill = len(self.seen)
        family = descendants(driver.pid)
        workers = [process for process in family if command_line(process).startswith(WORKER)]
        if workers and self.random.random() < 0.5:
            self.random.choice(workers).kill()
            self.workers += 1
            self.may_be_begun_again += 1
            say(f"killed a worker, of {len(workers)}")
            return driver
        driver.kill()
        driver.wait()
        self.drivers += 1
        self.before_trials += not self.seen
        self.may_be_begun_again += len(workers)
        self.left.append(Left(family, time.monotonic() + GONE_S))
        at_once = self.random.random() < 0.5
        self.resumed_at_once += at_once
        say(f"killed the driver with {len(workers)} workers and {self.seen.count(b'%c' % 10)} lines on the record")
        while not at_once and self.left:
            time.sleep(0.1)
            self.look()
        self.remember()
        return self.start()

    def remember(self) -> None:
        """See whether what was on the record is there still, and what has come since."""
        path = self.run / "trials.jsonl"
        text = path.read_bytes() if path.exists() else b""
        lines = text[: text.rfind(b"\n") + 1]
        if not lines.startswith(self.seen):
            self.lost_lines += len(set(self.seen.splitlines()) - set(lines.splitlines())) or 1
            say("lines of the record are lost")
        self.seen = lines

    def look(self) -> None:
        """See whether the processes of killed drivers are gone in time."""
        for left in [*self.left]:
            living = [process for process in left.processes if lives(process)]
            if living and time.monotonic() < left.until_s:
                continue
            self.left.remove(left)
            self.processes_left += [command_line(process)[:200] for process in living]

    def end(self) -> list[int]:
        """Tell the driver to end, then let the run come to its end; both exit codes."""
        driver, codes = self.driver, list[int]()
        if driver is not None and driver.poll() is None:
            until = time.monotonic() + 300
            while not self.driven() and time.monotonic() < until:
                time.sleep(0.1)  # a process that imports yet has no handler of signals
            driver.terminate()
            codes.append(driver.wait(300))
        self.remember()
        while self.left:
            time.sleep(0.1)
            self.look()
        trials = len(RunFolder.open(self.run).records()) + LAST_TRIALS
        codes.append(self.start("--trials", str(trials)).wait(1200))
        self.remember()
        return codes

    def driven(self) -> bool:
        """Whether a driver has begun its work."""
        return (self.run / "run.json").exists() and RunFolder.open(self.run).driven

    def end_all(self) -> None:
        """Leave no process behind, whatever happened."""
        if self.driver is not None and self.driver.poll() is None:
            family = descendants(self.driver.pid)
            self.driver.kill()
            self.driver.wait()
            for process in family:
                if lives(process):
                    process.kill()

    def counts(self) -> Row:
        """What was killed."""
        return {
            "kills": self.drivers + self.workers,
            "drivers_killed": self.drivers,
            "drivers_killed_before_any_trial": self.before_trials,
            "drivers_resumed_at_once": self.resumed_at_once,
            "workers_killed": self.workers,
            "lost_lines": self.lost_lines,
            "processes_left": len(self.processes_left),
            "processes_left_are": self.processes_left[:10],
            "driver_errors": len(self.errors),
            "driver_errors_are": self.errors[:3],
        }


def descendants(pid: int) -> list[psutil.Process]:
    """The processes that a process has started, and those that they have."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def lives(process: psutil.Process) -> bool:
    """Whether it is there, and more than an entry that its parent has not read."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def command_line(process: psutil.Process) -> str:
    """With its arguments; empty where it is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def audit(folder: RunFolder, may_be_begun_again: int) -> Row:
    """What a run that has ended says of itself, by its record, its log, its view and its weights.

    Args:
        folder: the run.
        may_be_begun_again: trials that may have been started without coming to an end.
    """
    records = folder.records()
    lines = [record_from_json(line) for line in folder.trials_jsonl.read_text(encoding="utf-8").splitlines()]
    ends = Counter((line.number, max(1, len(line.rungs))) for line in lines if line.state != "failed")
    log = folder.log_txt.read_text(encoding="utf-8", errors="replace") if folder.log_txt.exists() else ""
    starts, after_end, ended = Counter[str](), 0, set[str]()
    for line in log.splitlines():
        if match := STARTED.search(line):
            job = f"{match[1]}, {match[2]}"
            starts[job] += 1
            after_end += job in ended
        elif match := ENDED.search(line):
            ended.add(f"{match[1]}, {match[2]}")
    again = sum(starts.values()) - len(starts)
    failed = [record for record in records if record.state == "failed"]
    numbers = {record.number for record in records}
    return {
        "trials": len(records),
        "trainings_ended": len(lines),
        "trainings_begun": sum(starts.values()),
        "numbers_missing": max(numbers, default=-1) + 1 - len(numbers),
        "ended_twice": sum(count - 1 for count in ends.values()),
        "configs_twice": len(records) - len({record.config for record in records}),
        "started_after_end": after_end,
        "begun_again": again,
        "begun_in_vain": max(0, again - may_be_begun_again),
        "failed_trials": len(failed),
        "failed_trials_are": [f"{record.number}: {record.reason}" for record in failed[:10]],
        "not_in_view": not_in_view(folder, records),
        "weights_missing": weights_missing(folder, records),
    }


def not_in_view(folder: RunFolder, records: list[TrialRecord]) -> int:
    """Trainings that the Optuna study of the run does not show as the record has them, or shows twice."""
    import optuna

    if not folder.study_db.exists():
        return 0  # the run keeps none
    name = yaml.safe_load(folder.study_yaml.read_text(encoding="utf-8"))["name"]
    shown: Counter[tuple[Any, ...]] = Counter(
        (trial.user_attrs.get("number"), trial.user_attrs.get("rung"), trial.values and trial.values[0])
        for trial in optuna.load_study(study_name=name, storage=f"sqlite:///{folder.study_db}").get_trials()
        if trial.state == optuna.trial.TrialState.COMPLETE
    )
    expected: Counter[tuple[Any, ...]] = Counter(
        (record.number, rung, at.score)
        for record in records
        if record.state == "complete"
        for rung, at in enumerate(record.at_rung(index) for index in range(max(1, len(record.rungs))))
    )
    return ((shown - expected) + (expected - shown)).total()


def weights_missing(folder: RunFolder, records: list[TrialRecord]) -> int:
    """Trials of the front whose weights are not there, are damaged, or are not finite."""
    missing = 0
    for record in pareto_front(records, folder.metric).trials:
        try:
            tensors = read_tensors(checkpoint_path(folder.checkpoints, record.number), "there is none")
        except MpsearchError:
            missing += 1
        else:
            missing += not all(bool(t.isfinite().all()) for t in tensors.values() if t.is_floating_point())
    return missing


def show(row: Row) -> None:
    """The table of one soak."""
    names = (
        "kills",
        "drivers_killed",
        "drivers_killed_before_any_trial",
        "drivers_resumed_at_once",
        "workers_killed",
        "trials",
        "trainings_ended",
        "begun_again",
    )
    print_table(
        f"{row['study']}: {row['minutes']:g} minutes, a kill about every {row['every']:g} s, seed {row['seed']}",
        ("", "number", "expected"),
        [
            *((name.replace("_", " "), f"{row[name]:,}", "") for name in names),
            *((name.replace("_", " "), f"{row[name]:,}", "0") for name in (*NOTHING, *NOTHING_MORE)),
        ],
    )
    print("nothing was lost" if whole(row) else f"NOT WHOLE; exit codes at the end: {row['exit_codes_at_the_end']}")
