"""Whether the controller stays fast and whole as a study grows: simulated trials, no network.

    python benchmarks/controller_scale.py [--layers 200] [--trials 10000] [--workers 64] [--sampler surrogate]

Simulated workers hold `--workers` proposals at a time; the oldest ends when the next is asked for. Each trial is asked
for, told and recorded on the disk, as in a run. The process is killed (`kill -9`) in the middle and resumed. Prints one
table: time of a trial (ask + tell + record) as the study grows, memory, repeats, and whether the front of the
interrupted study is that of an uninterrupted one.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from mpsearch.precision import PrecisionConfig
from mpsearch.record import RunFolder, TrialRecord
from mpsearch.search.controller import Proposal, SearchController
from mpsearch.search.front import pareto_front
from mpsearch.space.choices import parse_choices
from mpsearch.space.space import SearchSpace, Slot
from mpsearch.study import SearchSpec


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


def drive(folder: Path, options: argparse.Namespace, die_at: int | None = None) -> list[tuple[int, float, float]]:
    """Run or resume a study; (trials, milliseconds a trial, MiB) for each of its last thousands."""
    network = Network(options.layers)
    run = RunFolder.open(folder) if (folder / "run.json").exists() else RunFolder.create(folder, "name: simulated\n")
    spec = SearchSpec(sampler=options.sampler, trials=options.trials, seed=0, stop_dominated=False)
    rows, times = [], list[float]()
    with run.driving():
        records = run.records()
        search = SearchController(network.space, network.cost, spec, records=records)
        done = len(records)
        held: deque[Proposal] = deque()

        def end() -> None:
            nonlocal done
            proposal = held.popleft()
            accuracy = network.accuracy(proposal.config, proposal.number)
            run.append(search.tell(proposal, TrialRecord(proposal.config, "complete", accuracy=accuracy)))
            done += 1
            if done == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

        while True:
            began = time.perf_counter()
            proposal = search.ask() if len(held) < options.workers else None
            if proposal is not None:
                held.append(proposal)
            if held and (proposal is None or len(held) == options.workers):
                end()
            times.append(time.perf_counter() - began)
            if proposal is None and not held:
                break
            if done and done % 1000 == 0 and (not rows or rows[-1][0] != done):
                rows.append((done, 1000 * statistics.median(times[-500:]), psutil.Process().memory_info().rss / 2**20))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=200)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--sampler", default="surrogate")
    parser.add_argument("--resume", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--die-at", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.resume is not None:
        drive(options.resume, options, options.die_at)
        return
    with tempfile.TemporaryDirectory() as place:
        whole, broken = Path(place, "whole"), Path(place, "broken")
        rows = drive(whole, options)
        command = [sys.executable, *sys.argv, "--resume", str(broken)]
        killed = subprocess.run([*command, "--die-at", str(options.trials // 2)], check=False)
        assert killed.returncode == -signal.SIGKILL, killed.returncode
        left = len(RunFolder.open(broken).records())
        subprocess.run(command, check=True)
        records, again = (RunFolder.open(path).records() for path in (whole, broken))
    table = Table(title=f"{options.layers} layers, {options.workers} workers, sampler {options.sampler}")
    for column in ("trials", "ms a trial (median of 500)", "memory, MiB"):
        table.add_column(column, justify="right")
    for trials, milliseconds, memory in rows:
        table.add_row(f"{trials:,}", f"{milliseconds:.1f}", f"{memory:.0f}")
    console = Console(width=120)
    console.print(table)
    for name, found in (("uninterrupted", records), (f"killed with {left:,} trials on the disk and resumed", again)):
        cheapest = min(r.cost for r in found if r.cost is not None)
        console.print(
            f"{name}: {len(found):,} trials, {len(found) - len({r.config.digest for r in found})} repeats, "
            f"{len(pareto_front(found))} on the front, hypervolume {pareto_front(found).hypervolume(cheapest):.4f}"
        )
    before = {(r.config.digest, r.accuracy) for r in pareto_front(records[:left])}
    kept = {(r.config.digest, r.accuracy) for r in pareto_front(again[:left])}
    console.print(
        f"front at the kill, interrupted against uninterrupted: {'identical' if before == kept else 'DIFFERENT'}"
    )
    assert not math.isnan(rows[-1][1])
    print("command: python " + " ".join(sys.argv))


if __name__ == "__main__":
    main()
