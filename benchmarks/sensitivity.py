"""What does a sensitivity table cost, and what does computing each layer's prefix once save?

    python benchmarks/sensitivity.py [--samples 512] [--widths 2-7] [--threads 2] [--batch 64] [--model cifar_resnet20]

Every layer but the first and the last (18 of ResNet-20), its weight and its input, 6 widths; random images and weights,
since time does not depend on them. Prints one table: wall time and CPU time of the process (all threads), which is the
fairer one on a machine that does other things, for range setting (shared by all), a whole forward per entry, a forward
from the layer on, FIT and SQNR. Checks that both ways give the same table.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from mpsearch.graph.layers import inspect_model
from mpsearch.quant.prepare import RangeSetter, insert_quantizers, quant_layers, weight_rows
from mpsearch.space.build import build_space
from mpsearch.space.spec import parse_space
from mpsearch.study import DataSpec, TaskSpec
from mpsearch.task.models import build_model
from mpsearch.warmstart.sensitivity import divergences, fit, sqnr
from mpsearch.warmstart.table import SensitivityTable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cifar_resnet20")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--widths", default="2-7", help="bits of uniform quantizers")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    model = build_model(TaskSpec(model=options.model, data=DataSpec(kind="digits")), num_classes=10).eval()
    x = torch.randn(options.samples, 3, 32, 32)
    layers = inspect_model(model, x[:8]).layers
    rule = {"match": "*", "weight": [f"uniform:{options.widths}"], "activation": [f"uniform:{options.widths}"]}
    end = {"weight": ["float"], "activation": ["float"]}
    space = build_space(parse_space({"name": "workbench", "rules": [rule], "first": end, "last": end}), layers)
    ranges = RangeSetter(model, layers, x)

    def set_ranges() -> None:
        quantized = quant_layers(insert_quantizers(model, layers))
        for slot in space.free:
            for name in slot.layers:
                for choice in slot.choices:
                    if slot.tensor == "weight":
                        ranges.weight(name, choice, weight_rows(quantized[name]))
                    else:
                        ranges.activation(name, choice)

    def kl(reuse: bool) -> SensitivityTable:
        return divergences(model, layers, space, x, ranges=ranges, batch_size=options.batch, reuse=reuse).kl

    cases: dict[str, Callable[[], SensitivityTable | None]] = {
        "range setting": set_ranges,
        "KL, prefix reuse": lambda: kl(True),
        "KL, naive": lambda: kl(False),
        "FIT": lambda: fit(model, layers, space, x, ranges=ranges),
        "SQNR": lambda: sqnr(model, layers, space, x, ranges=ranges),
    }
    table = Table(title=f"{options.model}, {options.samples} samples, {options.threads} threads")
    for column in ("stage", "entries", "wall s", "CPU s"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    results: dict[str, SensitivityTable] = {}
    for name, case in cases.items():
        wall, cpu = time.perf_counter(), time.process_time()
        result = case()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        if result is not None:
            results[name] = result
        table.add_row(name, str(len(result) if result else ""), f"{wall:.1f}", f"{cpu:.1f}")
        print(f"{name}: {wall:.1f} s, CPU {cpu:.1f} s", file=sys.stderr, flush=True)
    reused, naive = results["KL, prefix reuse"], results["KL, naive"]
    Console(width=120).print(table)
    print(f"largest difference between the two: {max(abs(reused[key] - naive[key]) for key in naive):g}")
    print("notes: " + ("; ".join(reused.notes) or "none"))
    print("command: python " + " ".join(sys.argv))


if __name__ == "__main__":
    main()
