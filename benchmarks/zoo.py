"""Does it work on every classification model of torchvision? Random weights, mixed bits and types, smallest first.

For each: inspect, prepare, one forward and backward pass, cost, native export and load with equal outputs. The table
has a line per model: pass, or the reason why not; what stays float is named below the table, with its reason.

    python benchmarks/zoo.py [--only vit swin] [--max-params 300e6] [--minutes 30] [--print]
        [--results benchmarks/results/zoo.jsonl]

Models that passed according to the results file are not run again; `--print` runs none. Images are of 64 pixels where
the network takes them, and ranges are the best of a few candidates: what is asked is whether it works, not how well.
A network of n parameters needs about 20 n bytes: itself, its quantized copy, gradients, and the copies of an export.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter, defaultdict
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

import mpsearch
from mpsearch.quant import ranges

WEIGHTS = ["uniform:4", "shift:3", "apot:4", "uniform:8/tensor"]
ACTIVATIONS = ["uniform:8", "shift:4", "uniform:4", "apot:5", "uniform:6"]
W8A8 = mpsearch.LayerPrecision.shorthand("w8a8")

SIZES = {"inception_v3": 299, "maxvit_t": 224, "vit_h_14": 56}
"""Where 64 does not do: auxiliary classifiers, windows of a fixed number, patches of 14."""

ranges.COARSE, ranges.FINE, ranges.ENDS = 4, 1, 4


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A network of random weights and a batch of two for it."""
    size = SIZES.get(name, 64)
    torch.manual_seed(0)
    options: dict[str, Any] = {"image_size": size} if name.startswith("vit") else {}
    model = torchvision.models.get_model(name, weights=None, **options).eval()
    return model, torch.randn(2, 3, size, size)


def check(name: str) -> dict[str, Any]:
    """What the model passed with; raises where it does not pass."""
    model, x = build(name)
    graph = mpsearch.inspect_model(model, x)
    layers = zip(graph.quantizable, cycle(WEIGHTS), cycle(ACTIVATIONS), strict=False)
    config = mpsearch.PrecisionConfig(
        (layer.name, mpsearch.LayerPrecision.parse(weight, activation)) for layer, weight, activation in layers
    )
    model_q = mpsearch.prepare_for_training(model, config, x, graph.layers)
    output = model_q(x)
    logits = output if isinstance(output, torch.Tensor) else output.logits  # Inception and GoogLeNet have more outputs
    loss = logits.square().mean()
    loss.backward()
    gradients = [parameter.grad for parameter in model_q.parameters() if parameter.grad is not None]
    assert torch.isfinite(loss), "the loss is not finite"
    assert all(torch.isfinite(gradient).all() for gradient in gradients), "a gradient is not finite"
    del gradients, output, logits, loss
    model_q.zero_grad(set_to_none=True)
    relative = (
        mpsearch.cost_of(graph.layers, config).total
        / mpsearch.cost_of(graph.layers, mpsearch.PrecisionConfig.uniform(config, W8A8)).total
    )
    model_q.eval()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        network = mpsearch.QuantizedNetwork(model_q, graph.layers, name, "noise")
        mpsearch.export(network, "native", Path(folder) / "out")
        expected = model_q(x)
        del model_q, network
        assert torch.equal(mpsearch.load(model, Path(folder) / "out")(x), expected), "another output after loading"
    return {
        "size": x.shape[-1],
        "layers": len(graph.quantizable),
        "float": sorted({f"{layer.kind}: {layer.reason}" for layer in graph.unhandled}),
        "cost": relative,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="beginnings of names")
    parser.add_argument("--max-params", type=float, default=float("inf"))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no model after this")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "zoo.jsonl")
    parser.add_argument("--print", action="store_true", dest="only_print")
    options = parser.parse_args()
    sizes = {
        name: torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"]  # type: ignore[attr-defined]
        for name in torchvision.models.list_models(module=torchvision.models)
    }
    passed = {name for name, row in read(options.results).items() if row["outcome"] == "pass"}
    began = time.perf_counter()
    for name in sorted(sizes, key=sizes.__getitem__):
        late = time.perf_counter() - began > 60 * options.minutes
        unwanted = options.only and not name.startswith(tuple(options.only))
        if options.only_print or late or unwanted or name in passed or sizes[name] > options.max_params:
            continue
        clock = time.perf_counter()
        row: dict[str, Any] = {"model": name, "params": sizes[name]}
        try:
            row |= {"outcome": "pass", **check(name)}
        except Exception as error:  # one model's failure is a line of the table
            row |= {"outcome": "FAIL", "reason": f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"}
        row |= {"seconds": round(time.perf_counter() - clock), "torchvision": torchvision.__version__}
        with options.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{row['outcome']}  {name}, {row['seconds']} s  {row.get('reason', '')}", file=sys.stderr, flush=True)
    show(read(options.results), sizes)


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The last row of each model."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {row["model"]: row for row in map(json.loads, lines)}


def show(rows: dict[str, dict[str, Any]], sizes: dict[str, int]) -> None:
    """The table."""
    stays: dict[str, set[str]] = defaultdict(set)
    for name, params in sorted(sizes.items(), key=lambda item: item[1]):
        row = rows.get(name, {"outcome": "not run", "reason": ""})
        said = (
            f"{row['layers']:4d} layers, {row['size']} pixels, cost {row['cost']:.2f} of W8A8"
            if row["outcome"] == "pass"
            else row["reason"]
        )
        print(f"{row['outcome']:8s}{name:24s}{params / 1e6:6.1f} M  {said}")
        for reason in row.get("float", ()):
            stays[reason].add(name)
    outcomes = Counter(rows[name]["outcome"] if name in rows else "not run" for name in sizes)
    print(", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()), f"of {len(sizes)}")
    for reason, models in sorted(stays.items()):
        print(f"layers stay float in {len(models)} models ({', '.join(sorted(models))}): {reason}")


if __name__ == "__main__":
    main()
