"""How long the report of a large study takes, how much memory, and how large it is: made-up trials, no training.

    python benchmarks/report_speed.py --trials 2000 --layers 100

Prints one table. Each size runs in a process of its own, because memory is its largest resident size, imports included.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def measure(trials: int, layers: int) -> list[str]:
    """Seconds (wall, CPU), peak memory and size of one report, from the written record to the written page."""
    from plotly.offline import get_plotlyjs

    from mpsearch.cost.model import RelativeCost
    from mpsearch.graph.facts import LayerInfo
    from mpsearch.precision import LayerPrecision, PrecisionConfig
    from mpsearch.record import RunFolder, TrialRecord, WallTime
    from mpsearch.report.data import RunData
    from mpsearch.report.page import write_report
    from mpsearch.report.tables import descent_table
    from mpsearch.space.choices import parse_choices
    from mpsearch.space.space import Slot

    random = np.random.default_rng(0)
    names = [f"stage{i // 25}.block{i // 3 % 8}.conv{i % 3}.{i}" for i in range(layers)]
    infos = [
        LayerInfo(name, "conv2d", (64, 64, 3, 3), (64, 8, 8), (64, 8, 8), int(random.integers(1e5, 1e7)), 36928, 576)
        for name in names
    ]
    cost = RelativeCost(infos)
    choices = [
        LayerPrecision.parse(f"{q}:{w}", f"uniform:{a}")
        for q in ("uniform", "shift")
        for w in (2, 3, 4, 5)
        for a in (4, 6, 8)
    ]
    ladder = [PrecisionConfig.uniform(names, LayerPrecision.shorthand(f"w{bits}a{bits}")) for bits in range(8, 0, -1)]
    drawn = [
        PrecisionConfig(
            (name, choices[i]) for name, i in zip(names, random.integers(len(choices), size=layers), strict=True)
        )
        for _ in range(trials - len(ladder))
    ]
    with tempfile.TemporaryDirectory() as temporary:
        folder = RunFolder.create(Path(temporary) / "run", "name: made-up\n")
        with folder.driving():
            for number, config in enumerate([*ladder, *drawn]):
                price = cost(config)
                accuracy = float(np.clip(1 - 0.05 / price + 0.02 * random.normal(), 0, 1))
                origin = "uniform" if number < len(ladder) else "sampler"
                wall = WallTime(train_s=9.0)
                folder.append(
                    TrialRecord(
                        config,
                        "complete",
                        accuracy,
                        price,
                        number=number,
                        origin=origin,
                        wall=wall,
                        started_s=10.0 * number,
                    )
                )
        slots = [
            Slot(tensor, (name,), parse_choices(["uniform:1-8"], tensor))
            for name in names
            for tensor in ("weight", "activation")
        ]
        log = [
            {"step": step, "loss": 1.0, "cost": 0.99**step, "bits": {slot.name: 8 * 0.99**step for slot in slots}}
            for step in range(200)
        ]
        before_mib = _peak_mib()
        wall, cpu = time.perf_counter(), time.process_time()
        run = RunData.of("made-up", folder.records(), infos, cost, 0.05, descent=descent_table(log, slots))
        path = write_report(Path(temporary) / "report.html", run)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        size = (len(path.read_bytes()) - len(get_plotlyjs().encode())) / 2**20
    return [
        f"{trials:,}",
        f"{layers}",
        f"{wall:.1f}",
        f"{cpu:.1f}",
        f"{_peak_mib():.0f}",
        f"{before_mib:.0f}",
        f"{size:.2f}",
    ]


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, nargs="+", default=[60, 2000])
    parser.add_argument("--layers", type=int, default=100)
    parser.add_argument("--one", action="store_true", help="measure in this process and print the row alone")
    given = parser.parse_args()
    if given.one:
        print(" | ".join(measure(given.trials[0], given.layers)))
        return
    print("| trials | layers | wall, s | CPU, s | peak memory, MiB | of which before, MiB | page without plotly, MiB |")
    print("|--:|--:|--:|--:|--:|--:|--:|")
    for trials in given.trials:
        command = [sys.executable, __file__, "--one", "--trials", str(trials), "--layers", str(given.layers)]
        print(f"| {subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()} |", flush=True)


if __name__ == "__main__":
    main()
