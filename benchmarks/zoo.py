"""Does mpsearch work on networks of other people? torchvision, timm and transformers, random weights, mixed bits.

For each network and stage (inspect, prepare at float, fold, a training step, PTQ, native, packed, ONNX in a default
onnxruntime session): `ok`, a reason that mpsearch gives (`refused`), an export that mpsearch itself says to answer
otherwise (`unverified`), an error that it did not foresee (`crash`), or an answer that is not the network's and that
nobody would have told (`WRONG`), which no network may have. Networks with a row of this commit are not run again. What
stays float is named below the table, with its reason.

`packed` is compared with float inputs: from float noise, a network of 3 and 4 bits and random weights makes answers of
its own, whatever computes it. Where float noise moves the outputs themselves (a detector sorts boxes), what the layers
give is compared. ONNX is W8A8, and compared as `mpsearch export` does: against what noise does to it.

What is asked is whether it works, not how well, so inputs are as small as an architecture takes, and ranges are the
best of a few candidates on a few samples and a part of each weight. A network of n parameters needs about 16 n bytes,
and twice that for ONNX, which is the last stage; with `--limit-s` and `--limit-gb` a network that needs more is stopped
and has the stages before that, and `not measured` for the one that it was in.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import psutil
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
from mpsearch.ptq import pipeline
from mpsearch.ptq.fold import fold_batch_norms
from mpsearch.ptq.pipeline import PtqMethod, ptq
from mpsearch.quant import prepare as preparing
from mpsearch.quant import ranges
from mpsearch.quant.modules import QuantLayer
from mpsearch.quant.prepare import inspect_network, quant_layers, weight_rows
from mpsearch.train import call

STAGES = ("inspect", "fold", "ptq", "prepare", "train", "native", "packed", "onnx")
WEIGHTS = ["uniform:4", "shift:3", "apot:4", "uniform:8/tensor"]
ACTIVATIONS = ["uniform:8", "shift:4", "uniform:4", "apot:5", "uniform:6"]
W8A8 = LayerPrecision.shorthand("w8a8")

FLOAT_NOISE = 1e-4
"""Relative to the norm of the outputs: other orders of float32 sums in networks of some hundred layers."""

COLUMNS = 256
"""Of a weight `(channels, n)`, how many of the n the search for its range sees."""


def zoo(
    family: Annotated[str, typer.Option(help=f"whose networks: {', '.join(FAMILIES)}")] = "torchvision",
    only: Annotated[Sequence[str], several(str, "names, or beginnings of them; all networks if none is given")] = (),
    stages: Annotated[Sequence[str], several(str, "stages after inspect to run")] = STAGES[1:],
    minutes: Annotated[float, typer.Option(help="minutes after which no network is started")] = math.inf,
    limit_s: Annotated[float, typer.Option(help="seconds that a network may take")] = math.inf,
    limit_gb: Annotated[float, typer.Option(help="10^9 bytes of memory that a network may take")] = math.inf,
    rest: Annotated[bool, typer.Option("--rest", help="only networks that have no such stages at any commit")] = False,
    results: Results = RESULTS / "zoo-families.jsonl",
    only_print: PrintOnly = False,
) -> None:
    if family not in FAMILIES:
        raise MpsearchError(f"there is no family '{family}': choose from {', '.join(FAMILIES)}")
    networks = {} if only_print else FAMILIES[family]()
    beginnings = tuple(name for name in only if name not in networks)
    named = [name for name in networks if not only or name in only or name.startswith(beginnings)]
    cases = [{"family": family, "network": name} for name in named]
    rows = Rows(results, key=("family", "network", "commit"))
    if rest:
        earlier = _latest([row for row in rows.read() if row["family"] == family])
        cases = [case for case in cases if not set(stages) <= earlier.get(case["network"], {}).keys()]
    began = time.perf_counter()
    if not math.isinf(min(limit_s, limit_gb)):
        check(lambda: (nn.Sequential(nn.Linear(2, 2)).eval(), torch.ones(2, 2)), stages)  # imports what the stages need
    for case in rows.missing(cases):
        if time.perf_counter() - began > 60 * minutes:
            break
        clock = time.perf_counter()
        with quick_ranges():
            outcome = check_within(networks[case["network"]], stages, limit_s, limit_gb)
        row = case | outcome | {"seconds": round(time.perf_counter() - clock)}
        rows.append(row)
        remarks = [f"{stage} {row[stage]}" for stage in STAGES if row.get(stage, "ok") != "ok"]
        say(f"{row['network']}, {row['seconds']} s: {'; '.join(remarks) or 'pass'}")
    show([row for row in rows.read() if row["family"] == family])


@contextmanager
def quick_ranges() -> Iterator[None]:
    """Ranges of few candidates on few values."""

    def some_columns(layer: QuantLayer) -> Tensor:
        rows = weight_rows(layer)
        return rows[:, :: max(1, rows.shape[1] // COLUMNS)].contiguous()

    with (
        patch.multiple(ranges, COARSE=2, FINE=1, ENDS=3),
        patch.multiple(preparing, ACTIVATION_SAMPLES=2048, weight_rows=some_columns),
        patch.object(pipeline, "weight_rows", some_columns),
    ):
        yield


def check_within(
    make: Callable[[], tuple[nn.Module, Any]], stages: Sequence[str], limit_s: float, limit_gb: float
) -> Row:
    """`check`; with limits in a process of its own, which is stopped where it takes more."""
    if math.isinf(min(limit_s, limit_gb)):
        return check(make, stages)
    # Forked, so that torch, the family's package and what exports are imported once.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_check_and_send, args=(make, stages, sender))
    process.start()
    sender.close()
    row: Row = {}
    at, why = "inspect", ""
    began = time.perf_counter()
    while True:
        try:
            if receiver.poll(0.5):
                at, row = receiver.recv()
                if not at:
                    break
        except EOFError:
            process.join()
            why = f"crash: its process ended with {process.exitcode}"
            break
        if time.perf_counter() - began > limit_s:
            why = f"not measured: too large: over {limit_s:g} s"
        elif not math.isinf(limit_gb) and process.is_alive() and _memory_gb(process.pid) > limit_gb:
            why = f"not measured: too large: over {limit_gb:g} GB"
        if why:
            process.kill()
            break
    process.join()
    receiver.close()
    return row | ({at: why} if why else {})


def _check_and_send(make: Callable[[], tuple[nn.Module, Any]], stages: Sequence[str], sender: Connection) -> None:
    """Send the stage that begins, and the row before it; at the end "" and the whole row."""
    threading.Thread(target=_end_after, args=(os.getppid(),), daemon=True).start()
    row = check(make, stages, lambda at, so_far: sender.send((at, dict(so_far))))
    sender.send(("", row))
    sender.close()


def _end_after(parent: int) -> None:
    """End this process when its parent has ended: nobody would wait for its row, and some hold gigabytes."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _memory_gb(pid: int | None) -> float:
    """What a process and those that it started hold, in 10^9 bytes."""
    try:
        process = psutil.Process(pid)
        return sum(part.memory_info().rss for part in (process, *process.children(recursive=True))) / 1e9
    except psutil.NoSuchProcess:
        return 0.0


def check(
    make: Callable[[], tuple[nn.Module, Any]],
    stages: Sequence[str],
    begins: Callable[[str, Row], None] = lambda stage, row: None,
) -> Row:
    """What becomes of a network at each stage; `begins` is told each one and the row before it."""
    row: Row = {}

    def stage(name: str, run: Callable[[], Any]) -> Any:
        if name != "inspect" and name not in stages:
            return None
        begins(name, row)
        clock = time.process_time()
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
        finally:
            row.setdefault("cpu_s", {})[name] = round(time.process_time() - clock, 1)
        return None

    try:
        model, batch = make()
        _call(model, batch)
    except Exception as error:  # the network itself does not run here
        return {"inspect": f"crash: not built: {_first_line(error)}"}
    graph = stage("inspect", lambda: inspect_network(model, batch))
    if graph is None:
        return row
    row |= {
        "layers": len(graph.quantizable),
        "float": sorted({f"{x.kind}: {x.reason}" for x in graph.unhandled}),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "input": [list(x.shape) for x in tensors(batch)],
        "weight_columns": COLUMNS,
    }
    points = result_points(graph.layers)

    def fold() -> None:
        _same(fold_batch_norms(model, graph.layers, batch).model, model, batch, points)

    def post_training() -> None:
        ptq(model, W8A8, batch, PtqMethod(rounding="nearest"))

    stage("fold", fold)
    stage("ptq", post_training)
    with tempfile.TemporaryDirectory() as folder:
        _as_prepared(model, batch, graph, stage, Path(folder))
        verified = stage("onnx", lambda: _onnx(model, batch, graph, Path(folder) / "onnx"))
    if verified is not None:
        row |= {"onnx_difference": verified.max_difference, "onnx_same": [verified.same_answers, verified.samples]}
    return row


def _as_prepared(
    model: nn.Module, batch: Any, graph: ModelGraph, stage: Callable[[str, Callable[[], Any]], Any], folder: Path
) -> None:
    """The stages of one network of mixed precisions. It is not copied for each of them, because some are large."""
    names, points = [layer.name for layer in graph.quantizable], result_points(graph.layers)
    floats = PrecisionConfig.uniform(names, LayerPrecision(FLOAT, FLOAT))
    mixed = PrecisionConfig(
        (layer.name, LayerPrecision.parse(weight, activation))
        for layer, weight, activation in zip(graph.quantizable, cycle(WEIGHTS), cycle(ACTIVATIONS), strict=False)
    )

    def prepare() -> nn.Module:
        _same(mpsearch.prepare(model, floats, batch, graph.layers).eval(), model, batch, points)
        return mpsearch.prepare(model, mixed, batch, graph.layers).eval()

    quantized = stage("prepare", prepare)
    if quantized is None:
        return

    def train() -> None:
        given: list[Tensor] = []  # by the layers: a detector may find nothing, and give no number that has a gradient
        hooks = [
            quantized.get_submodule(name).register_forward_hook(lambda _m, _x, y: given.append(y)) for name in points
        ]
        try:
            answers = [x for x in tensors(_values(call(quantized, batch))) if x.requires_grad and x.numel()]
            loss = sum((x.float().square().mean() for x in answers or tensors(given)), torch.zeros(()))
            torch.autograd.backward(loss)
            assert torch.isfinite(loss), "the loss is not finite"
            assert all(p.grad is None or torch.isfinite(p.grad).all() for p in quantized.parameters()), (
                "a gradient is not finite"
            )
        finally:
            quantized.zero_grad(set_to_none=True)
            for hook in hooks:
                hook.remove()

    stage("train", train)
    network = mpsearch.QuantizedNetwork(quantized, graph.layers, "zoo", "noise", example_input=batch)

    def native() -> None:
        mpsearch.export(network, "native", folder / "native", verify=False)
        loaded = mpsearch.load(model, folder / "native")
        assert torch.equal(_outputs(loaded, batch), _outputs(quantized, batch)), "not bit for bit"

    def pack() -> None:
        mpsearch.export(network, "packed", folder / "packed", verify=False)
        loaded = packed.load(model, folder / "packed")
        assert _ranges(loaded) == _ranges(quantized), "other input ranges"
        with _float_inputs(loaded), _float_inputs(quantized):
            _same(loaded, quantized, batch, points)

    stage("native", native)
    stage("packed", pack)


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


@contextmanager
def _float_inputs(model: nn.Module) -> Iterator[None]:
    """The inputs of its layers stay as they come."""
    quantizers = [layer.input_quantizer for layer in quant_layers(model).values()]
    hooks = [quantizer.register_forward_hook(lambda _m, args, _y: args[0]) for quantizer in quantizers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


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


def _latest(rows: list[Row]) -> dict[str, Row]:
    """Network -> the last that its rows say of each stage."""
    latest: dict[str, Row] = {}
    for row in rows:
        latest[row["network"]] = latest.get(row["network"], {}) | row
    return latest


def show(rows: list[Row]) -> None:
    """A line a network that has anything to say, the totals, and what stays float.

    Of a network with several rows, of some stages each, the last of each stage counts.
    """
    latest = _latest(rows)
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
