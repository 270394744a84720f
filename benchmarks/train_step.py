"""How much slower is a quantized training step than a float one?

    python benchmarks/train_step.py [--threads 2] [--batch 128] [--rounds 5] [--model cifar_resnet20]

Prints one table: images/s of the float step, of the quantized step and of the quantized step with the teacher's
forward pass, all bfloat16 and channels last, with the same loop (`mpsearch.train.fit`) in the same run. The float step
is compiled as a whole, the quantized one as trials are: its quantizers alone. Rounds of the three alternate, so that a
machine whose speed drifts slows all of them alike. In a search the teacher is computed for the first trial of a worker
only; here it is computed at every step.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mpsearch.compiler import compiler_missing
from mpsearch.graph.layers import inspect_model
from mpsearch.precision import LayerPrecision, PrecisionConfig
from mpsearch.quant.fused import fuse
from mpsearch.quant.prepare import prepare
from mpsearch.study import DataSpec, TaskSpec
from mpsearch.task.models import build_model
from mpsearch.train import FitSettings, Teacher, bf16_is_fast, fit, jeffreys
from mpsearch.workbench import channels_last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cifar_resnet20")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8, help="steps of one round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bits", default="w4a4")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    spec = TaskSpec(model=options.model, data=DataSpec(kind="digits"))
    network = channels_last(build_model(spec, num_classes=10))
    x = torch.randn(options.batch, 3, 32, 32)
    y = torch.randint(0, 10, (options.batch,))
    layers = inspect_model(network.eval(), x[:8]).layers
    config = PrecisionConfig.uniform([layer.name for layer in layers], LayerPrecision.shorthand(options.bits))
    quantized = prepare(network, config, x, layers)
    bf16 = bf16_is_fast()

    eager = options.eager or compiler_missing()
    baseline = copy.deepcopy(network)
    baseline = baseline if eager else torch.compile(baseline, dynamic=False)
    quantized = quantized if eager else fuse(quantized)
    teachers = copy.deepcopy(network)

    def cross_entropy(step: int, x: Tensor, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.float(), target)

    def distilled(step: int, x: Tensor, output: Tensor, target: Tensor) -> Tensor:
        teacher = Teacher(teachers, lambda logits: logits, bf16=bf16, limit_bytes=0)
        return jeffreys(output, teacher(0, step, x))

    cases: dict[str, tuple[nn.Module, Callable[[int, Tensor, Tensor, Tensor], Tensor]]] = {
        "float": (baseline, cross_entropy),
        f"quantized {options.bits}": (quantized, cross_entropy),
        f"quantized {options.bits} + teacher": (copy.deepcopy(quantized), distilled),
    }

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield x, y

    settings = FitSettings(options.steps, lr=1e-4, bf16=bf16)
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for model, loss in cases.values():  # compile, warm up
        fit(model, batches(), loss, FitSettings(2, lr=1e-4, bf16=bf16))
    for _ in range(options.rounds):
        for name, (model, loss) in cases.items():
            began = time.perf_counter()
            fit(model, batches(), loss, settings)
            seconds[name].append((time.perf_counter() - began) / options.steps)

    table = Table(title=f"{options.model}, batch {options.batch}, {options.threads} threads, bf16 {bf16}")
    for column in ("step", "images/s", "ms a step, median (min-max)", "times float, median of rounds"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for name, times in seconds.items():
        ratio = statistics.median(t / f for t, f in zip(times, seconds["float"], strict=True))
        middle = statistics.median(times)
        table.add_row(
            name,
            f"{options.batch / middle:.0f}",
            f"{1e3 * middle:.0f} ({1e3 * min(times):.0f}-{1e3 * max(times):.0f})",
            f"{ratio:.2f}",
        )
    Console(width=120).print(table)
    print("command: python " + " ".join(sys.argv))


if __name__ == "__main__":
    main()
