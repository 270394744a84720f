"""Does each export, loaded or executed by the library that it is for, answer as our network does?

    python benchmarks/export_agreement.py [--only qonnx onnx] [--networks resnet20 digits vit] [--print]
        [--study resnet20-cifar10-jpeg] [--results benchmarks/results/export_agreement.jsonl]

Needs `mpsearch[targets]`, and for `resnet20` the data and the checkpoint that its study file names; `vit` is a small
torchvision VisionTransformer of random weights on the same images. Configs are made by hand, with ranges set and
nothing trained. Prints one table over 1,000 images: in how many the answer (the largest logit) is the same; by how much
we preferred ours where it is another; in how many images any logit differs by more than 1e-3, because another order
of summation has turned the rounding of some input over; and the largest such difference.

Rows that the results file has are not made again; `--print` makes none.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import mpsearch
from mpsearch.graph.facts import ModelGraph
from mpsearch.graph.layers import inspect_model
from mpsearch.precision import LayerPrecision, PrecisionConfig
from mpsearch.study import load_study
from mpsearch.task.load import load_task

IMAGES, CALIBRATION, BATCH = 1000, 512, 250

CONFIGS: dict[str, tuple[list[str], list[str]]] = {
    "mixed": ([f"uniform:{bits}" for bits in range(2, 9)], [f"uniform:{bits}" for bits in range(4, 9)]),
    "types": (["shift:4", "apot:4", "uniform:3"], ["uniform:6", "uniform:8"]),
    "w4a4": (["uniform:4"], ["uniform:4"]),
    "linear": ([f"uniform:{bits}" for bits in range(2, 9)], ["float"]),
}
"""Weights and inputs, round robin over the layers; `linear`: over the linear layers, the others stay float."""

NETWORKS: dict[str, tuple[str, ...]] = {
    "resnet20": ("mixed", "types", "w4a4", "linear"),
    "digits": ("mixed", "types"),
    "vit": ("mixed", "linear"),
}

Run = Callable[[nn.Module, Path, Tensor], Callable[[Tensor], Any]]
"""`(float model, folder, example) -> (images -> logits)`, in the target's own library."""


def _native(model: nn.Module, folder: Path, _: Tensor) -> Callable[[Tensor], Any]:
    return mpsearch.load(model, folder)


def _packed(model: nn.Module, folder: Path, _: Tensor) -> Callable[[Tensor], Any]:
    from mpsearch.exporters import packed

    return packed.load(model, folder)


def _qonnx(_model: nn.Module, folder: Path, _: Tensor) -> Callable[[Tensor], Any]:
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx

    graph = ModelWrapper(str(folder / "model.onnx"))
    name = graph.graph.input[0].name

    def run(x: Tensor) -> Any:
        graph.set_tensor_shape(name, list(x.shape))
        (y,) = execute_onnx(graph, {name: x.numpy()}).values()
        return torch.as_tensor(y)

    return run


def _onnx(_model: nn.Module, folder: Path, _: Tensor) -> Callable[[Tensor], Any]:
    from onnxruntime import InferenceSession

    session = InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    return lambda x: torch.as_tensor(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def _brevitas(model: nn.Module, folder: Path, _: Tensor) -> Callable[[Tensor], Any]:
    from mpsearch.exporters import brevitas

    return brevitas.load(model, folder)


def _torchao(model: nn.Module, folder: Path, _: Tensor) -> Callable[[Tensor], Any]:
    from mpsearch.exporters import torchao

    return torchao.load(model, folder)


def _modelopt(model: nn.Module, folder: Path, _: Tensor) -> Callable[[Tensor], Any]:
    from mpsearch.exporters import modelopt

    return modelopt.load(model, folder)


def _aimet(model: nn.Module, folder: Path, example: Tensor) -> Callable[[Tensor], Any]:
    from mpsearch.exporters import aimet

    return aimet.load(model, folder, example).model  # type: ignore[no-any-return]


TARGETS: dict[str, tuple[Run, str, tuple[str, ...]]] = {
    "native": (_native, "torch", ("mixed", "types", "w4a4")),
    "packed": (_packed, "torch", ("mixed", "types", "w4a4")),
    "qonnx": (_qonnx, "qonnx", ("mixed", "types", "w4a4")),
    "onnx": (_onnx, "onnxruntime", ("mixed", "types", "w4a4")),
    "brevitas": (_brevitas, "brevitas", ("mixed", "w4a4")),
    "torchao": (_torchao, "torchao", ("linear",)),
    "modelopt": (_modelopt, "nvidia-modelopt", ("mixed", "w4a4")),
    "aimet": (_aimet, "aimet-torch", ("mixed", "w4a4")),
}
"""How each runs, the package that runs it, and the configs that it can hold. `mhaq` has no package to run it in."""


class Bench:
    """The networks, quantized once for each config, with our answers."""

    def __init__(self, study: str) -> None:
        self.study = study

    @cache  # noqa: B019 - there is one workbench
    def network(self, name: str) -> tuple[nn.Module, Tensor, Tensor, ModelGraph]:
        """The float network, images to set ranges on, images to compare on, and the layers."""
        task = load_task(load_study("digits" if name == "digits" else self.study).task)
        model = task.float_model()
        if name == "vit":
            from torchvision.models import VisionTransformer

            torch.manual_seed(0)
            model = VisionTransformer(32, 4, 3, 4, 64, 128, num_classes=10)
            nn.init.normal_(model.heads.head.weight)  # torchvision starts the head at zero: every logit would be equal
            model.eval()
        images = task.calibration_input(CALIBRATION + IMAGES)  # digits has 1,078: the two overlap
        calibration, x = images[:CALIBRATION], images[-IMAGES:]
        return model, calibration, x, inspect_model(model, calibration[:32])

    @cache  # noqa: B019
    def quantized(self, name: str, config: str) -> tuple[mpsearch.QuantizedNetwork, Tensor]:
        """A network under a config, and its logits."""
        model, calibration, x, graph = self.network(name)
        weights, inputs = CONFIGS[config]
        layers = [layer for layer in graph.quantizable if config != "linear" or layer.kind == "linear"]
        pairs = zip(layers, cycle(weights), cycle(inputs), strict=False)
        chosen = {layer.name: LayerPrecision.parse(weight, x) for layer, weight, x in pairs}
        rest = {
            layer.name: LayerPrecision.parse("float", "float")
            for layer in graph.quantizable
            if layer.name not in chosen
        }
        prepared = mpsearch.prepare(model, PrecisionConfig(chosen | rest), calibration, graph.layers).eval()
        return mpsearch.QuantizedNetwork(prepared, graph.layers, name, name, example_input=x[:2]), answers(prepared, x)

    def row(self, target: str, name: str, config: str) -> dict[str, Any]:
        """One line of the table."""
        run, package, _ = TARGETS[target]
        model, _, x, _ = self.network(name)
        network, ours = self.quantized(name, config)
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as temporary:
            folder = mpsearch.export(network, target, Path(temporary) / "out").path
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            theirs = answers(run(model, folder, x[:2]), x)
        difference = (ours - theirs).abs()
        preferred = ours.amax(1) - ours.gather(1, theirs.argmax(1, keepdim=True)).squeeze(1)
        return {
            "images": len(x),
            "same_answer": int((ours.argmax(1) == theirs.argmax(1)).sum()),
            "max_preference": float(preferred.max()),
            "turned_over": int((difference.amax(1) > 1e-3).sum()),
            "max_difference": float(difference.max()),
            "median_difference": float(difference.median()),
            "max_logit": float(ours.abs().max()),
            "bytes": size,
            "float_bytes": sum(4 * value.numel() for value in model.state_dict().values()),
            "version": f"{package} {version(package)}",
            "seconds": round(time.perf_counter() - began, 1),
        }


@torch.no_grad()
def answers(run: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    """Logits `(n, classes)`."""
    return torch.cat([run(part).cpu() for part in x.split(BATCH)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--study", default="resnet20-cifar10-jpeg")
    results = Path(__file__).parent / "results" / "export_agreement.jsonl"
    parser.add_argument("--results", type=Path, default=results)
    parser.add_argument("--print", action="store_true", dest="only_print")
    options = parser.parse_args()
    workbench = Bench(options.study)
    for name in [] if options.only_print else options.networks:
        for target in options.only:
            for config in (config for config in NETWORKS[name] if config in TARGETS[target][2]):
                key = {"target": target, "network": name, "config": config}
                if any(all(row[k] == v for k, v in key.items()) for row in read(options.results)):
                    continue
                try:
                    row = key | workbench.row(target, name, config)
                except Exception as error:  # one row's failure is said, the others are made
                    print(f"{target}, {name}, {config}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                    continue
                with options.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{target}, {name}, {config}: {row['same_answer']}", file=sys.stderr, flush=True)
    show(read(options.results))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def show(rows: list[dict[str, Any]]) -> None:
    """The table."""
    table = Table(title="answers of each export, in its own library, compared with ours")
    columns = ("network", "config", "target", ">same answer", ">preferred by", ">images off", ">by up to", ">median")
    for column in (*columns, ">logits up to", ">KiB", ">float32 KiB", "with"):
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
    networks, configs, targets = list(NETWORKS), list(CONFIGS), list(TARGETS)
    for row in sorted(
        rows,
        key=lambda r: (networks.index(r["network"]), configs.index(r["config"]), targets.index(r["target"])),
    ):
        table.add_row(
            row["network"],
            row["config"],
            row["target"],
            f"{row['same_answer']} of {row['images']}",
            "" if row["same_answer"] == row["images"] else f"{row['max_preference']:.2f}",
            str(row["turned_over"]),
            f"{row['max_difference']:.1e}",
            f"{row['median_difference']:.1e}",
            f"{row['max_logit']:.1f}",
            f"{row['bytes'] / 1024:.1f}",
            f"{row['float_bytes'] / 1024:.1f}",
            row["version"],
        )
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
