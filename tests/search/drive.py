"""A search in a process of its own, for tests that kill it: `python drive.py FOLDER ADDRESS TRIALS SLEEP_S RUNGS`.

The problem is a toy whose accuracy is known: `truth(config)`. What befalls trials is set by files in the folder
`FOLDER/fate`: `nan-3`, `raise-3`, `die-3` (each attempt), `die_once-3` for trial 3.
"""

import functools
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mpsearch.errors import TaskError
from mpsearch.metric import TOP1
from mpsearch.observer import SILENT, Observer
from mpsearch.precision import PrecisionConfig
from mpsearch.record import RunFolder, RunningTrial, TrialRecord
from mpsearch.search.controller import SearchController
from mpsearch.search.engine import run_trials
from mpsearch.search.job import Job, Outcome, Runner
from mpsearch.search.view import open_view
from mpsearch.space.choices import parse_choices
from mpsearch.space.space import SearchSpace, Slot
from mpsearch.study import EngineSpec, SearchSpec


def make_space(
    layers: int = 6, weights: Sequence[str] = ("uniform:1-8",), activation: str = "uniform:8"
) -> SearchSpace:
    """Every layer has the weight choices and one activation precision."""
    names = tuple(f"layer{i}" for i in range(layers))
    slots = [
        slot
        for name in names
        for slot in (
            Slot("weight", (name,), parse_choices(weights, "weight")),
            Slot("activation", (name,), parse_choices([activation], "activation")),
        )
    ]
    return SearchSpace("toy", names, tuple(slots))


def relative_cost(config: PrecisionConfig) -> float:
    """Mean weight bits, the later layers counting more; 1 at 8 bits."""
    weights = range(1, len(config) + 1)
    return sum(w * layer.weight.bits for w, layer in zip(weights, config.values(), strict=True)) / sum(weights) / 8


def truth(config: PrecisionConfig) -> float:
    """Accuracy: a layer loses half as much with every bit, the earlier layers most."""
    losses = [2.0**-i for i in range(len(config))]
    error = sum(s * 2.0 ** (1 - layer.weight.bits) for s, layer in zip(losses, config.values(), strict=True))
    return 1 - error / sum(losses)


def make_runner(path: Path, sleep_s: float) -> Runner:
    fate = path / "fate"
    (path / f"worker-{os.getpid()}-{time.time_ns()}").touch()

    def run(job: Job) -> Outcome:
        proposal = job.proposal
        time.sleep(sleep_s)
        number = proposal.number
        if (fate / f"raise-{number}").exists():
            raise ValueError(f"trial {number} will not do")
        if (fate / f"die_once-{number}").exists():
            (fate / f"die_once-{number}").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if (fate / f"die-{number}").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        accuracy = float("nan") if (fate / f"nan-{number}").exists() else truth(proposal.config)
        curve = ((100 * (proposal.rung + 1), accuracy),) if math.isfinite(accuracy) else ()
        return Outcome(TrialRecord(proposal.config, "complete", score=accuracy, started_s=time.time(), curve=curve))

    return run


def refuse() -> Runner:
    raise TaskError("no such checkpoint")


def crash() -> Runner:
    raise KeyError("x")


def drive(
    path: Path,
    address: str = "none",
    trials: int = 12,
    sleep_s: float = 0.0,
    concurrency: int = 2,
    storage: str = "sqlite",
    observer: Observer = SILENT,
    rungs: Sequence[int] = (0,),
) -> SearchController:
    """Start a run in `path`, or go on with it."""
    there = (path / "run.json").exists()
    folder = RunFolder.open(path) if there else RunFolder.create(path, "name: toy\n", metric=TOP1)
    with folder.driving():
        records = folder.records()
        space = make_space()
        controller = SearchController(
            space, relative_cost, SearchSpec(trials=trials), TOP1, records=records, rungs=rungs
        )
        said = functools.partial(setattr, folder, "trouble")
        view = open_view(storage, folder, "toy", space, TOP1, records=records, on_trouble=said)
        runner = functools.partial(make_runner, path, sleep_s)
        run_trials(controller, folder, view, runner, EngineSpec(address=address), concurrency, observer)
    return controller


class Printed(Observer):
    """A line per event."""

    def on_trial_started(self, trial: RunningTrial) -> None:
        print(f"started {trial.number}", flush=True)

    def on_trial_ended(self, record: TrialRecord) -> None:
        print(f"ended {record.number}", flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever starts tests in the background has it ignored
    lengths = [int(steps) for steps in (sys.argv[5] if len(sys.argv) > 5 else "0").split(",")]
    drive(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), observer=Printed(), rungs=lengths)
