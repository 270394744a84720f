"""Does it work on every classification model of torchvision? Random weights, mixed bits and types, smallest first.

For each: inspect, prepare, one forward and backward pass, cost, native export and load with equal outputs. The table
has a line per model: pass, or the reason why not; what stays float is named below the table, with its reason.

    python benchmarks/zoo.py [--only vit swin] [--max-params 50e6] [--minutes 30]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter, defaultdict
from itertools import cycle
from pathlib import Path

import torch
import torchvision
from torch import nn

import mpsearch

WEIGHTS = ["uniform:4", "shift:3", "apot:4", "uniform:8/tensor"]
ACTIVATIONS = ["uniform:8", "shift:4", "uniform:4", "apot:5", "uniform:6"]


def check(name: str, model: nn.Module, reasons: dict[str, set[str]]) -> str:
    """What the model passed with; raises where it does not pass."""
    size = 299 if name == "inception_v3" else 224
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    graph = mpsearch.inspect_model(model, x)
    for layer in graph.unhandled:
        reasons[f"{layer.kind}: {layer.reason}"].add(name)
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
    relative = (
        mpsearch.cost_of(graph.layers, config).total
        / mpsearch.cost_of(graph.layers, mpsearch.PrecisionConfig.uniform(config, W8A8)).total
    )
    model_q.eval()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        network = mpsearch.QuantizedNetwork(model_q, graph.layers, name, "noise")
        mpsearch.export(network, "native", Path(folder) / "out")
        assert torch.equal(mpsearch.load(model, Path(folder) / "out")(x), model_q(x)), "another output after loading"
    return f"{len(graph.quantizable):4d} layers, {len(graph.unhandled):3d} float, cost {relative:.2f} of W8A8"


W8A8 = mpsearch.LayerPrecision.shorthand("w8a8")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", default=[], help="beginnings of names")
    parser.add_argument("--max-params", type=float, default=float("inf"))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no model after this")
    options = parser.parse_args()
    names = torchvision.models.list_models(module=torchvision.models)
    sizes = {
        name: torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"]  # type: ignore[attr-defined]
        for name in names
        if not options.only or name.startswith(tuple(options.only))
    }
    reasons: dict[str, set[str]] = defaultdict(set)
    outcomes: Counter[str] = Counter()
    began = time.perf_counter()
    for name in sorted(sizes, key=sizes.__getitem__):
        if sizes[name] > options.max_params or time.perf_counter() - began > 60 * options.minutes:
            outcomes["not tried"] += 1
            continue
        torch.manual_seed(0)
        model = torchvision.models.get_model(name, weights=None).eval()
        clock = time.perf_counter()
        try:
            outcome, said = "pass", check(name, model, reasons)
        except Exception as error:  # one model's failure is a line of the table
            outcome, said = "FAIL", f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"
        outcomes[outcome] += 1
        seconds = time.perf_counter() - clock
        print(f"{outcome}  {name:24s} {sizes[name] / 1e6:6.1f} M  {seconds:5.0f} s  {said}", flush=True)
    print(", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()))
    for reason, models in sorted(reasons.items()):
        print(f"stays float in {len(models)} models ({min(models)}, ...): {reason}")


if __name__ == "__main__":
    main()
