"""Does mpsearch work on every classification model of torchvision?

Random weights, mixed bits and types, smallest first. For each: inspect, prepare, one forward and backward pass, cost,
native export and load with equal outputs. The table has a line per model: pass, or the reason why not; what stays float
is named below the table, with its reason.

Models that passed according to the results file are not run again. Images are of 64 pixels where the network takes
them, and ranges are the best of a few candidates: what is asked is whether it works, not how well. A network of n
parameters needs about 20 n bytes: itself, its quantized copy, gradients, and the copies of an export.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import torchvision
import typer
from torch import nn

import mpsearch
from benchmarks.options import RESULTS, PrintOnly, Results, several
from benchmarks.printing import say
from benchmarks.rows import Row, Rows
from mpsearch.quant import ranges

WEIGHTS = ["uniform:4", "shift:3", "apot:4", "uniform:8/tensor"]
ACTIVATIONS = ["uniform:8", "shift:4", "uniform:4", "apot:5", "uniform:6"]
W8A8 = mpsearch.LayerPrecision.shorthand("w8a8")

SIZES = {"inception_v3": 299, "maxvit_t": 224, "vit_h_14": 56}
"""Where 64 does not do: auxiliary classifiers, windows of a fixed number, patches of 14."""


def zoo(
    only: Annotated[Sequence[str], several(str, "beginnings of model names; all models if none is given")] = (),
    max_params: Annotated[float, typer.Option(help="largest number of parameters")] = float("inf"),
    minutes: Annotated[float, typer.Option(help="minutes after which no model is started")] = float("inf"),
    results: Results = RESULTS / "zoo.jsonl",
    only_print: PrintOnly = False,
) -> None:
    sizes = {
        name: torchvision.models.get_model_weights(name).DEFAULT.meta["num_params"]
        for name in torchvision.models.list_models(module=torchvision.models)
    }
    wanted = [
        {"model": name, "params": sizes[name]}
        for name in sorted(sizes, key=sizes.__getitem__)
        if (not only or name.startswith(tuple(only))) and sizes[name] <= max_params
    ]
    rows = Rows(results, key=("model",))
    began = time.perf_counter()
    for case in rows.missing([] if only_print else wanted, done=lambda row: bool(row["outcome"] == "pass")):
        if time.perf_counter() - began > 60 * minutes:
            break
        name = case["model"]
        clock = time.perf_counter()
        try:
            with patch.multiple(ranges, COARSE=4, FINE=1, ENDS=4):
                outcome = {"outcome": "pass", **check(name)}
        except Exception as error:  # one model's failure is a line of the table
            outcome = {"outcome": "FAIL", "reason": f"{type(error).__name__}: {str(error).partition(chr(10))[0][:150]}"}
        seconds = round(time.perf_counter() - clock)
        rows.append(case | outcome | {"seconds": seconds, "torchvision": torchvision.__version__})
        say(f"{outcome['outcome']}  {name}, {seconds} s  {outcome.get('reason', '')}")
    show({row["model"]: row for row in rows.read()}, sizes)


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A network of random weights and a batch of two for it."""
    size = SIZES.get(name, 64)
    torch.manual_seed(0)
    options: dict[str, Any] = {"image_size": size} if name.startswith("vit") else {}
    model = torchvision.models.get_model(name, weights=None, **options).eval()
    return model, torch.randn(2, 3, size, size)


def check(name: str) -> Row:
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


def show(rows: dict[str, Row], sizes: dict[str, int]) -> None:
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
