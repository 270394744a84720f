"""How much slower is a quantized training step than a float one?

Prints one table: images/s of the float step, of the quantized step and of the quantized step with the teacher's
forward pass, all bfloat16 and channels last, with the same loop (`mpsearch.train.fit`) in the same run. The float step
is compiled as a whole, the quantized one as trials are: its quantizers alone. On a card a round of enough steps
captures either of them as CUDA graphs, and its time has that in it, as a trial's has; the row has the time of the steps
that follow, too, and there a float step that is not compiled stands beside the others. Rounds alternate, so that a
machine whose speed drifts slows all of them alike. In a search the teacher is computed for the first trial of
a worker only; here it is computed at every step.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Annotated, cast

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from benchmarks.options import RESULTS, Model, Results, Shape, Threads
from benchmarks.printing import print_table
from benchmarks.rows import MEASURED, Row, Rows
from mpsearch.compiler import compiler_missing
from mpsearch.graph.layers import inspect_model
from mpsearch.precision import LayerPrecision, PrecisionConfig
from mpsearch.quant.fused import fuse
from mpsearch.quant.prepare import prepare
from mpsearch.study import DataSpec, TaskSpec
from mpsearch.task.models import build_model
from mpsearch.train import FitSettings, Teacher, bf16_in_hardware, fit, jeffreys
from mpsearch.workbench import channels_last

CPU = torch.device("cpu")
BEGINNING = 5
"""Steps in which passes and update are captured on a card."""


def train_step(
    model: Model = "cifar_resnet20",
    shape: Shape = (3, 32, 32),
    threads: Threads = 2,
    batch: Annotated[int, typer.Option(help="images of a batch", min=1)] = 128,
    steps: Annotated[int, typer.Option(help="steps of one round", min=1)] = 8,
    rounds: Annotated[int, typer.Option(help="rounds of all kinds of step", min=1)] = 5,
    bits: Annotated[str, typer.Option(help="precision of every layer, as w4a4")] = "w4a4",
    eager: Annotated[bool, typer.Option(help="without torch.compile")] = False,
    results: Results = RESULTS / "train_step.jsonl",
) -> None:
    torch.set_num_threads(threads)
    case = {"model": model, "shape": list(shape), "threads": threads, "batch": batch, "steps": steps, "rounds": rounds}
    case |= {"bits": bits, "eager": eager}
    rows = Rows(results, key=(*case, *MEASURED))
    for missing in rows.missing([case]):
        rows.append(missing | measure(model, shape, batch, steps, rounds, bits, eager))
    for row in rows.select([case]):
        show(row)


def measure(
    model: str,
    shape: Sequence[int],
    batch: int,
    steps: int,
    rounds: int,
    bits: str,
    eager: bool,
    device: torch.device = CPU,
) -> Row:
    """Seconds of a step in each round, by kind of step; and of one after the BEGINNING, where a round is longer."""
    torch.manual_seed(0)
    spec = TaskSpec(model=model, data=DataSpec(kind="digits"))
    network = channels_last(build_model(spec, num_classes=10)).to(device)
    x = torch.randn(batch, *shape).to(device)
    y = torch.randint(0, 10, (batch,)).to(device)
    layers = inspect_model(network.eval(), x[:8]).layers
    config = PrecisionConfig.uniform([layer.name for layer in layers], LayerPrecision.shorthand(bits))
    quantized = prepare(network, config, x, layers).to(device)
    bf16 = bf16_in_hardware()

    eager = eager or bool(compiler_missing())
    baseline = copy.deepcopy(network)
    if not eager:
        baseline = cast(nn.Module, torch.compile(baseline, dynamic=False))
    quantized = quantized if eager else fuse(quantized)
    teacher = Teacher(copy.deepcopy(network), lambda logits: logits, bf16=bf16, limit_bytes=0)

    def cross_entropy(step: int, x: Tensor, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.float(), target)

    def distilled(step: int, x: Tensor, output: Tensor, target: Tensor) -> Tensor:
        return jeffreys(output, teacher(0, step, x))

    cases: dict[str, tuple[nn.Module, Callable[[int, Tensor, Tensor, Tensor], Tensor]]] = {
        "float": (baseline, cross_entropy),
        f"quantized {bits}": (quantized, cross_entropy),
        f"quantized {bits} + teacher": (copy.deepcopy(quantized), distilled),
    }
    if device.type == "cuda":
        cases["float, not compiled"] = (copy.deepcopy(network), cross_entropy)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield x, y

    settings = FitSettings(steps, lr=1e-4, bf16=bf16)
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    steady: dict[str, list[float]] = {name: [] for name in cases}
    for trained, loss in cases.values():  # compile, warm up
        fit(trained, batches(), loss, FitSettings(2, lr=1e-4, bf16=bf16))
    for _ in range(rounds):
        for name, (trained, loss) in cases.items():
            finish(device)
            ends = Ends()
            began = time.perf_counter()
            fit(trained, batches(), loss, settings, ends)
            finish(device)
            seconds[name].append((time.perf_counter() - began) / steps)
            if steps > BEGINNING + 1:
                steady[name].append(statistics.median(b - a for a, b in pairwise(ends[BEGINNING:])))
    return {"bf16": bf16, "compiled": not eager, "step_s": seconds, "steady_s": steady}


class Ends(list[float]):
    """When each step ended."""

    def __call__(self, _step: int, _loss: float) -> None:
        self.append(time.perf_counter())


def finish(device: torch.device) -> None:
    """Wait for what a GPU still has to do: calls only queue it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def show(row: Row) -> None:
    """The table of one run."""

    def line(name: str, times: list[float]) -> tuple[str, ...]:
        ratio = statistics.median(t / f for t, f in zip(times, row["step_s"]["float"], strict=True))
        middle = statistics.median(times)
        range_ms = f"{1e3 * middle:.0f} ({1e3 * min(times):.0f}-{1e3 * max(times):.0f})"
        return name, f"{row['batch'] / middle:.0f}", range_ms, f"{ratio:.2f}"

    print_table(
        f"{row['model']}, batch {row['batch']}, {row['threads']} threads, bf16 {row['bf16']}",
        ("step", "images/s", "ms a step, median (min-max)", "times float, median of rounds"),
        (line(name, times) for name, times in row["step_s"].items()),
    )
