"""Does mpsearch work on networks of other people? torchvision, timm and transformers, random weights, mixed bits.

For each network and stage (inspect, prepare at float, fold, a training step, PTQ, native, packed, ONNX in a default
onnxruntime session): `ok`, a reason that mpsearch gives (`refused`), an export that mpsearch itself says to answer
otherwise (`unverified`), an error that it did not foresee (`crash`), or an answer that is not the network's and that
nobody would have told (`WRONG`), which no network may have. Networks with a row of this commit are not run again. What
stays float is named below the table, with its reason.

`packed` is compared with float inputs: from float noise, a network of 3 and 4 bits and random weights makes answers of
its own, whatever computes it. Where float noise moves the outputs themselves (a detector sorts boxes), what the layers
give is compared. ONNX is W8A8, and compared as `mpsearch export` does: against what noise does to it.

Ranges are the best of a few candidates on a few samples: what is asked is whether it works, not how well. A network of
n parameters needs about 20 n bytes.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from torch import Tensor, nn

import mpsearch
from benchmarks.families import FAMILIES
from benchmarks.options import RESULTS, PrintOnly, Results, several
from benchmarks.printing import say
from benchmarks.rows import Row, Rows
from mpsearch.errors import MpsearchError, VerificationError
from mpsearch.exporters import packed
from mpsearch.exporters.verify import Verified
from mpsearch.graph.agreement import Original, result_points
from mpsearch.graph.facts import ModelGraph
from mpsearch.graph.inputs import map_tensors, tensors
from mpsearch.precision import FLOAT, LayerPrecision, PrecisionConfig
from mpsearch.ptq.fold import fold_batch_norms
from mpsearch.ptq.pipeline import PtqMethod, ptq
from mpsearch.quant import prepare as preparing
from mpsearch.quant import ranges
from mpsearch.quant.prepare import inspect_network, quant_layers
from mpsearch.train import call

STAGES = ("inspect", "prepare", "fold", "train", "ptq", "native", "packed", "onnx")
WEIGHTS = ["uniform:4", "shift:3", "apot:4", "uniform:8/tensor"]
ACTIVATIONS = ["uniform:8", "shift:4", "uniform:4", "apot:5", "uniform:6"]
W8A8 = LayerPrecision.shorthand("w8a8")

FLOAT_NOISE = 1e-4
"""Relative to the norm of the outputs: other orders of float32 sums in networks of some hundred layers."""


def zoo(
    family: Annotated[str, typer.Option(help=f"whose networks: {', '.join(FAMILIES)}")] = "torchvision",
    only: Annotated[Sequence[str], several(str, "beginnings of names; all networks if none is given")] = (),
    stages: Annotated[Sequence[str], several(str, "stages after inspect to run")] = STAGES[1:],
    minutes: Annotated[float, typer.Option(help="minutes after which no network is started")] = float("inf"),
    results: Results = RESULTS / "zoo-families.jsonl",
    only_print: PrintOnly = False,
) -> None:
    if family not in FAMILIES:
        raise MpsearchError(f"there is no family '{family}': choose from {', '.join(FAMILIES)}")
    networks = {} if only_print else FAMILIES[family]()
    cases = [{"family": family, "network": name} for name in networks if not only or name.startswith(tuple(only))]
    rows = Rows(results, key=("family", "network", "commit"))
    began = time.perf_counter()
    for case in rows.missing(cases):
        if time.perf_counter() - began > 60 * minutes:
            break
        clock = time.perf_counter()
        with patch.multiple(ranges, COARSE=2, FINE=1, ENDS=3), patch.object(preparing, "ACTIVATION_SAMPLES", 2048):
            outcome = check(networks[case["network"]], stages)
        row = case | outcome | {"seconds": round(time.perf_counter() - clock)}
        rows.append(row)
        remarks = [f"{stage} {row[stage]}" for stage in STAGES if row.get(stage, "ok") != "ok"]
        say(f"{row['network']}, {row['seconds']} s: {'; '.join(remarks) or 'pass'}")
    show([row for row in rows.read() if row["family"] == family])


def check(make: Callable[[], tuple[nn.Module, Any]], stages: Sequence[str]) -> Row:
    """What becomes of a network at each stage."""
    row: Row = {}

    def stage(name: str, run: Callable[[], Any]) -> Any:
        if name != "inspect" and name not in stages:
            return None
        try:
            result = run()
            row[name] = "ok"
        except VerificationError as error:
            row[name] = f"unverified: {_first_line(error)}"
        except MpsearchError as error:
            row[name] = f"refused: {_first_line(error)}"
        except AssertionError as error:
            row[name] = f"WRONG: {_first_line(error)}"
        except Exception as error:  # one network's failure is a cell of the table
            row[name] = f"crash: {type(error).__name__}: {_first_line(error)}"
        else:
            return result
        return None

    try:
        model, batch = make()
        _call(model, batch)
    except Exception as error:  # the network itself does not run here
        return {"inspect": f"crash: not built: {_first_line(error)}"}
    graph = stage("inspect", lambda: inspect_network(model, batch))
    if graph is None:
        return row
    row |= {"layers": len(graph.quantizable), "float": sorted({f"{x.kind}: {x.reason}" for x in graph.unhandled})}
    names, points = [layer.name for layer in graph.quantizable], result_points(graph.layers)
    floats = PrecisionConfig.uniform(names, LayerPrecision(FLOAT, FLOAT))
    mixed = PrecisionConfig(
        (layer.name, LayerPrecision.parse(weight, activation))
        for layer, weight, activation in zip(graph.quantizable, cycle(WEIGHTS), cycle(ACTIVATIONS), strict=False)
    )

    def prepare() -> nn.Module:
        prepared = mpsearch.prepare(model, floats, batch, graph.layers).eval()
        _same(prepared, model, batch, points)
        return mpsearch.prepare(model, mixed, batch, graph.layers).eval()

    def fold() -> None:
        _same(fold_batch_norms(model, graph.layers, batch).model, model, batch, points)

    quantized = stage("prepare", prepare)
    stage("fold", fold)
    stage("ptq", lambda: ptq(model, W8A8, batch, PtqMethod(rounding="nearest")))
    with tempfile.TemporaryDirectory() as folder:
        verified = stage("onnx", lambda: _onnx(model, batch, graph, Path(folder) / "onnx"))
        if verified is not None:
            row["onnx_difference"] = verified.max_difference
    if quantized is None:
        return row

    def train() -> None:
        training = copy.deepcopy(quantized)
        given: list[Tensor] = []  # by the layers: a detector may find nothing, and give no number that has a gradient
        for name in points:
            training.get_submodule(name).register_forward_hook(lambda _m, _x, y: given.append(y))
        answers = [x for x in tensors(_values(call(training, batch))) if x.requires_grad and x.numel()]
        loss = sum((x.float().square().mean() for x in answers or tensors(given)), torch.zeros(()))
        torch.autograd.backward(loss)
        assert torch.isfinite(loss), "the loss is not finite"
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in training.parameters()), (
            "a gradient is not finite"
        )

    stage("train", train)
    with tempfile.TemporaryDirectory() as folder:
        network = mpsearch.QuantizedNetwork(quantized, graph.layers, "zoo", "noise", example_input=batch)
        answers = _outputs(quantized, batch)

        def native() -> None:
            mpsearch.export(network, "native", Path(folder) / "native", verify=False)
            loaded = mpsearch.load(model, Path(folder) / "native")
            assert torch.equal(_outputs(loaded, batch), answers), "not bit for bit"

        def pack() -> None:
            mpsearch.export(network, "packed", Path(folder) / "packed", verify=False)
            loaded = packed.load(model, Path(folder) / "packed")
            assert _ranges(loaded) == _ranges(quantized), "other input ranges"
            _same(_with_float_inputs(loaded), _with_float_inputs(quantized), batch, points)

        stage("native", native)
        stage("packed", pack)
    return row


def _onnx(model: nn.Module, batch: Any, graph: ModelGraph, folder: Path) -> Verified:
    """Export at W8A8, and what a default session answered."""
    eight = PrecisionConfig.uniform([layer.name for layer in graph.quantizable], W8A8)
    prepared = mpsearch.prepare(model, eight, batch, graph.layers).eval()
    network = mpsearch.QuantizedNetwork(prepared, graph.layers, "zoo", "noise", example_input=batch)
    verified = mpsearch.export(network, "onnx", folder).verified
    assert isinstance(verified, Verified), str(verified)
    return verified


def _ranges(model: nn.Module) -> dict[str, list[list[float]]]:
    """Step and offset of every layer's input."""
    return {
        name: [x.detach().flatten().tolist() for x in layer.input_quantizer.current_range() if x is not None]
        for name, layer in quant_layers(model).items()
    }


def _with_float_inputs(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for layer in quant_layers(model).values():
        layer.input_quantizer.set_precision(FLOAT)
    return model


@torch.no_grad()
def _call(model: nn.Module, batch: Any) -> Any:
    torch.manual_seed(0)
    return call(model, batch)


def _values(output: Any) -> Any:
    """Of a ModelOutput, its values."""
    return tuple(output.values()) if isinstance(output, Mapping) else output


def _outputs(model: nn.Module, batch: Any) -> Tensor:
    """All that a network gives back, as one row of float64."""
    parts = [x.double().flatten() for x in tensors(_values(_call(model, batch))) if x.is_floating_point()]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def _same(net: nn.Module, like: nn.Module, batch: Any, points: Sequence[str]) -> None:
    """Assert that two networks compute the same.

    Where float noise moves the outputs, as it does a detector's, that is: at their `points`.
    """
    distance = _distance(_outputs(net, batch), expected := _outputs(like, batch))
    if distance <= FLOAT_NOISE:
        return
    noisy = map_tensors(lambda x: x * (1 + 1e-6) if x.is_floating_point() else x, batch)
    moved = _distance(_outputs(like, noisy), expected)
    assert moved > FLOAT_NOISE, f"differs by {distance:.2g} of the norm"
    assert Original(like, batch, points).holds(net), f"differs by {distance:.2g} of the norm, and between the layers"


def _distance(given: Tensor, expected: Tensor) -> float:
    """As a share of the norm."""
    if given.shape != expected.shape:
        return float("inf")
    return float((given - expected).norm() / expected.norm().clamp_min(1e-12))


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def show(rows: list[Row]) -> None:
    """A line a network that has anything to say, the totals, and what stays float.

    Of a network with several rows, of some stages each, the last of each stage counts.
    """
    latest: dict[str, Row] = {}
    for row in rows:
        latest[row["network"]] = latest.get(row["network"], {}) | row
    stays: dict[str, list[str]] = defaultdict(list)
    for name, row in latest.items():
        said = {stage: row[stage] for stage in STAGES if row.get(stage, "ok") != "ok"}
        if said:
            print(f"{name}: " + "; ".join(f"{stage}: {text}" for stage, text in said.items()))
        for reason in row.get("float", ()):
            stays[reason].append(name)
    for stage in STAGES:
        outcomes = Counter(row[stage].partition(":")[0] for row in latest.values() if stage in row)
        print(f"{stage:8s} " + ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common()))
    whole = [row for row in latest.values() if all(row.get(stage) == "ok" for stage in STAGES[:-1])]
    tried = [row for row in latest.values() if "onnx" in row]
    print(
        f"{len(whole)} of {len(latest)} pass all but ONNX; {sum(r['onnx'] == 'ok' for r in tried)} of {len(tried)} ONNX"
    )
    print("measured at " + ", ".join(sorted({row["commit"] for row in rows})))
    for reason, names in sorted(stays.items()):
        print(f"float in {len(names)} networks ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''}): {reason}")
