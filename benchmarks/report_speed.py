"""How long the report of a large study takes, how much memory, and how large it is: made-up trials, no training.

Prints one table. Each size runs in a process of its own, because memory is its largest resident size, imports included.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from benchmarks.options import RESULTS, Results, several
from benchmarks.printing import print_table
from benchmarks.rows import MEASURED, Row, Rows
from benchmarks.stopwatch import Stopwatch


def report_speed(
    trials: Annotated[Sequence[int], several(int, "numbers of trials, a report each")] = (60, 2000),
    layers: Annotated[int, typer.Option(help="layers of the made-up network", min=1)] = 100,
    results: Results = RESULTS / "report_speed.jsonl",
) -> None:
    rows = Rows(results, key=("trials", "layers", *MEASURED))
    cases = [{"trials": count, "layers": layers} for count in trials]
    for case in rows.missing(cases):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            rows.append(case | process.submit(measure, case["trials"], layers).result())
    columns = ("trials", "layers", "wall, s", "CPU, s", "peak memory, MiB", "of which before, MiB")
    print_table(
        "reports",
        (*columns, "page without plotly, MiB"),
        (
            (
                f"{row['trials']:,}",
                str(row["layers"]),
                f"{row['wall_s']:.1f}",
                f"{row['cpu_s']:.1f}",
                f"{row['peak_mib']:.0f}",
                f"{row['before_mib']:.0f}",
                f"{row['page_mib']:.2f}",
            )
            for row in rows.select(cases)
        ),
        left=(),
    )


def measure(trials: int, layers: int) -> Row:
    """Seconds (wall, CPU), peak memory and size of one report, from the written record to the written page."""
    from plotly.offline import get_plotlyjs

    from mpsearch.cost.model import RelativeCost
    from mpsearch.graph.facts import LayerInfo
    from mpsearch.metric import TOP1
    from mpsearch.precision import LayerPrecision, PrecisionConfig
    from mpsearch.record import Origin, RunFolder, TrialRecord, WallTime
    from mpsearch.report.data import RunData
    from mpsearch.report.page import write_report
    from mpsearch.report.tables import descent_table
    from mpsearch.search.trial import peak_memory_bytes
    from mpsearch.space.choices import parse_choices
    from mpsearch.space.space import Slot

    random = np.random.default_rng(0)
    names = [f"stage{i // 25}.block{i // 3 % 8}.conv{i % 3}.{i}" for i in range(layers)]
    infos = [
        LayerInfo(name, "conv2d", (64, 64, 3, 3), (64, 8, 8), (64, 8, 8), int(macs), 36928, 576)
        for name, macs in zip(names, random.integers(100_000, 10_000_000, layers), strict=True)
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
        folder = RunFolder.create(Path(temporary) / "run", "name: made-up\n", metric=TOP1)
        with folder.driving():
            for number, config in enumerate([*ladder, *drawn]):
                price = cost(config)
                accuracy = float(np.clip(1 - 0.05 / price + 0.02 * random.normal(), 0, 1))
                origin: Origin = "uniform" if number < len(ladder) else "sampler"
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
        before_mib = peak_memory_bytes() / 2**20
        with Stopwatch() as watch:
            run = RunData.of("made-up", folder.records(), infos, cost, 0.05, TOP1, descent=descent_table(log, slots))
            path = write_report(Path(temporary) / "report.html", run)
        size = (len(path.read_bytes()) - len(get_plotlyjs().encode())) / 2**20
    return {
        "wall_s": watch.wall_s,
        "cpu_s": watch.cpu_s,
        "peak_mib": peak_memory_bytes() / 2**20,
        "before_mib": before_mib,
        "page_mib": size,
    }
