"""Whether the controller stays fast and whole as a study grows: simulated trials, no network.

Simulated workers hold `--workers` proposals at a time; the oldest ends when the next is asked for. Each trial is asked
for, told and recorded on the disk, as in a run. The process is killed (`kill -9`) in the middle and resumed. Prints one
table: time of a trial (ask + tell + record) as the study grows, memory, repeats, and whether the front of the
interrupted study is that of an uninterrupted one.
"""

from __future__ import annotations

import os
import signal
import statistics
import tempfile
import time
from collections import deque
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import numpy as np
import psutil
import typer

from benchmarks.options import RESULTS, Results
from benchmarks.printing import print_table
from benchmarks.rows import MEASURED, Row, Rows
from mpsearch.metric import TOP1
from mpsearch.precision import PrecisionConfig
from mpsearch.record import RunFolder, TrialRecord
from mpsearch.search.controller import Proposal, SearchController
from mpsearch.search.front import ScoreRange, pareto_front
from mpsearch.space.choices import parse_choices
from mpsearch.space.space import SearchSpace, Slot
from mpsearch.study import SearchSpec


def controller_scale(
    layers: Annotated[int, typer.Option(help="layers of the simulated network", min=1)] = 200,
    trials: Annotated[int, typer.Option(help="number of trials", min=2)] = 10_000,
    workers: Annotated[int, typer.Option(help="trials at a time", min=1)] = 64,
    sampler: Annotated[str, typer.Option(help="sampler, by its name in a study file")] = "additive",
    every: Annotated[int, typer.Option(help="trials between two lines of the table", min=1)] = 1000,
    results: Results = RESULTS / "controller_scale.jsonl",
) -> None:
    study = Simulation(layers, trials, workers, sampler, every)
    rows = Rows(results, key=(*asdict(study), *MEASURED))
    for missing in rows.missing([asdict(study)]):
        rows.append(missing | measure(study))
    for row in rows.select([asdict(study)]):
        show(row)


@dataclass(frozen=True)
class Simulation:
    """A simulated study."""

    layers: int
    trials: int
    workers: int
    sampler: str
    every: int  # trials between two measurements


class Network:
    """A simulated network: layers differ in what a lost bit costs in accuracy and saves in energy."""

    def __init__(self, layers: int) -> None:
        random = np.random.default_rng(0)
        names = tuple(f"layer{i}" for i in range(layers))
        choices = {"weight": ("uniform:2-8",), "activation": ("uniform:2-8",)}
        self.space = SearchSpace(
            "simulated",
            names,
            tuple(
                Slot(tensor, (name,), parse_choices(choices[tensor], tensor))
                for name in names
                for tensor in ("weight", "activation")
            ),
        )
        self._harm = np.exp(random.normal(0, 1.2, layers))
        self._macs = np.exp(random.normal(0, 1.0, layers))

    def cost(self, config: PrecisionConfig) -> float:
        """Relative cost, 1 at w8a8."""
        return float(self._macs @ self._bits(config).prod(axis=1)) / (64 * float(self._macs.sum()))

    def accuracy(self, config: PrecisionConfig, number: int) -> float:
        """With the noise of 5,000 samples, a function of the trial's number."""
        lost = float(self._harm @ (2.0 ** (-1.3 * self._bits(config))).sum(axis=1)) / float(self._harm.sum())
        return min(1.0, max(0.0, 1 - 1.2 * lost + 0.003 * float(np.random.default_rng(number).normal())))

    def _bits(self, config: PrecisionConfig) -> np.ndarray:
        return np.array([(layer.weight.bits, layer.activation.bits) for layer in config.values()], dtype=float)


def drive(folder: Path, study: Simulation, die_at: int | None = None) -> list[tuple[int, float, float]]:
    """Run or resume a study; (trials, milliseconds a trial, MiB) each time that `study.every` trials have ended."""
    network = Network(study.layers)
    run = (
        RunFolder.open(folder)
        if (folder / "run.json").exists()
        else RunFolder.create(folder, "name: simulated\n", metric=TOP1)
    )
    settings = {"sampler": study.sampler, "trials": study.trials, "seed": 0, "stop_dominated": False}
    spec = SearchSpec.model_validate(settings)
    rows, times = list[tuple[int, float, float]](), list[float]()
    with run.driving():
        records = run.records()
        search = SearchController(network.space, network.cost, spec, TOP1, records=records)
        done = len(records)
        held: deque[Proposal] = deque()

        def end() -> None:
            nonlocal done
            proposal = held.popleft()
            accuracy = network.accuracy(proposal.config, proposal.number)
            run.append(search.tell(proposal, TrialRecord(proposal.config, "complete", score=accuracy)))
            done += 1
            if done == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

        while True:
            began = time.perf_counter()
            proposal = search.ask() if len(held) < study.workers else None
            if proposal is not None:
                held.append(proposal)
            if held and (proposal is None or len(held) == study.workers):
                end()
            times.append(time.perf_counter() - began)
            if done and done % study.every == 0 and (not rows or rows[-1][0] != done):
                rows.append((done, 1000 * statistics.median(times[-500:]), psutil.Process().memory_info().rss / 2**20))
            if proposal is None and not held:
                break
    return rows


def measure(study: Simulation) -> Row:
    """The study uninterrupted, and once more with a kill in the middle."""
    with tempfile.TemporaryDirectory() as place:
        whole, broken = Path(place, "whole"), Path(place, "broken")
        growth = drive(whole, study)
        process = get_context("spawn").Process(target=drive, args=(broken, study, study.trials // 2))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL, process.exitcode
        left = len(RunFolder.open(broken).records())
        drive(broken, study)
        records, again = (RunFolder.open(path).records() for path in (whole, broken))
    before = {(r.config.digest, r.score) for r in pareto_front(records[:left], TOP1)}
    kept = {(r.config.digest, r.score) for r in pareto_front(again[:left], TOP1)}
    return {
        "growth": [{"trials": done, "trial_ms": ms, "memory_mib": mib} for done, ms, mib in growth],
        "uninterrupted": facts(records),
        "killed_at": left,
        "resumed": facts(again),
        "same_front_at_kill": before == kept,
    }


def facts(records: list[TrialRecord]) -> Row:
    """How a study ended."""
    front = pareto_front(records, TOP1)
    return {
        "trials": len(records),
        "repeats": len(records) - len({record.config.digest for record in records}),
        "front": len(front),
        "hypervolume": front.hypervolume(
            min(record.cost for record in records if record.cost is not None), ScoreRange(0.0, 1.0)
        ),
    }


def show(row: Row) -> None:
    """The table of one study."""
    print_table(
        f"{row['layers']} layers, {row['workers']} workers, sampler {row['sampler']}",
        ("trials", "ms a trial (median of 500)", "memory, MiB"),
        ((f"{at['trials']:,}", f"{at['trial_ms']:.1f}", f"{at['memory_mib']:.0f}") for at in row["growth"]),
        left=(),
    )
    resumed = f"killed with {row['killed_at']:,} trials on the disk and resumed"
    for name, end in (("uninterrupted", row["uninterrupted"]), (resumed, row["resumed"])):
        print(
            f"{name}: {end['trials']:,} trials, {end['repeats']} repeats, {end['front']} on the front, "
            f"hypervolume {end['hypervolume']:.4f}"
        )
    same = "identical" if row["same_front_at_kill"] else "DIFFERENT"
    print(f"front at the kill, interrupted against uninterrupted: {same}")
