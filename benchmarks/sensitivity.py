"""What does a sensitivity table cost, and what does computing each layer's prefix once save?

Every layer but the first and the last (18 of ResNet-20), its weight and its input, 6 widths; random images and weights,
since time does not depend on them. Prints one table: wall time and CPU time of the process (all threads), which is the
fairer one on a machine that does other things, for range setting (shared by all), a whole forward per entry, a forward
from the layer on, FIT and SQNR. Checks that both ways give the same table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated

import torch
import typer

from benchmarks.options import RESULTS, Model, Results, Shape, Threads
from benchmarks.printing import print_table, say
from benchmarks.rows import MEASURED, Row, Rows
from benchmarks.stopwatch import Stopwatch
from mpsearch.graph.layers import inspect_model
from mpsearch.quant.prepare import RangeSetter, insert_quantizers, quant_layers, weight_rows
from mpsearch.space.build import build_space
from mpsearch.space.spec import parse_space
from mpsearch.study import DataSpec, TaskSpec
from mpsearch.task.models import build_model
from mpsearch.warmstart.sensitivity import divergences, fit, sqnr
from mpsearch.warmstart.table import SensitivityTable


def sensitivity(
    model: Model = "cifar_resnet20",
    shape: Shape = (3, 32, 32),
    samples: Annotated[int, typer.Option(help="number of images", min=8)] = 512,
    widths: Annotated[str, typer.Option(help="bits of uniform quantizers")] = "2-7",
    batch: Annotated[int, typer.Option(help="images of a batch", min=1)] = 64,
    threads: Threads = 2,
    results: Results = RESULTS / "sensitivity.jsonl",
) -> None:
    torch.set_num_threads(threads)
    case = {"model": model, "shape": list(shape), "samples": samples, "widths": widths, "batch": batch}
    case |= {"threads": threads}
    rows = Rows(results, key=(*case, *MEASURED))
    for missing in rows.missing([case]):
        rows.append(missing | measure(model, shape, samples, widths, batch))
    for row in rows.select([case]):
        print_table(
            f"{row['model']}, {row['samples']} samples, {row['threads']} threads",
            ("stage", "entries", "wall s", "CPU s"),
            (
                (name, str(stage["entries"] or ""), f"{stage['wall_s']:.1f}", f"{stage['cpu_s']:.1f}")
                for name, stage in row["stages"].items()
            ),
        )
        print(f"largest difference between the two: {row['largest_difference']:g}")
        print("notes: " + ("; ".join(row["notes"]) or "none"))


def measure(model: str, shape: Sequence[int], samples: int, widths: str, batch: int) -> Row:
    """Seconds and entries by stage, and how far the two ways to the KL table come apart."""
    torch.manual_seed(0)
    network = build_model(TaskSpec(model=model, data=DataSpec(kind="digits")), num_classes=10).eval()
    x = torch.randn(samples, *shape)
    layers = inspect_model(network, x[:8]).layers
    rule = {"match": "*", "weight": [f"uniform:{widths}"], "activation": [f"uniform:{widths}"]}
    end = {"weight": ["float"], "activation": ["float"]}
    space = build_space(parse_space({"name": "benchmark", "rules": [rule], "first": end, "last": end}), layers)
    ranges = RangeSetter(network, layers, x)

    def set_ranges() -> None:
        quantized = quant_layers(insert_quantizers(network, layers))
        for slot in space.free:
            for name in slot.layers:
                for choice in slot.choices:
                    if slot.tensor == "weight":
                        ranges.weight(name, choice, weight_rows(quantized[name]))
                    else:
                        ranges.activation(name, choice)

    def kl(reuse: bool) -> SensitivityTable:
        return divergences(network, layers, space, x, ranges=ranges, batch_size=batch, reuse=reuse).kl

    cases: dict[str, Callable[[], SensitivityTable | None]] = {
        "range setting": set_ranges,
        "KL, prefix reuse": lambda: kl(True),
        "KL, naive": lambda: kl(False),
        "FIT": lambda: fit(network, layers, space, x, ranges=ranges),
        "SQNR": lambda: sqnr(network, layers, space, x, ranges=ranges),
    }
    stages: dict[str, Row] = {}
    tables: dict[str, SensitivityTable] = {}
    for name, case in cases.items():
        with Stopwatch() as watch:
            table = case()
        if table is not None:
            tables[name] = table
        stages[name] = {"entries": len(table) if table else 0, "wall_s": watch.wall_s, "cpu_s": watch.cpu_s}
        say(f"{name}: {watch.wall_s:.1f} s, CPU {watch.cpu_s:.1f} s")
    reused, naive = tables["KL, prefix reuse"], tables["KL, naive"]
    difference = max(abs(reused[key] - naive[key]) for key in naive)
    return {"stages": stages, "largest_difference": difference, "notes": list(reused.notes)}
