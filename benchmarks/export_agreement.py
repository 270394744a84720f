"""Does each export, loaded or executed by the library that it is for, answer as our network does?

Needs `mpsearch[targets]`, and for `resnet20` the data and the checkpoint that its study file names; `vit` is a small
torchvision VisionTransformer of random weights on the same images. `mobilenet` (ReLU6, depthwise layers), `convnext`
(depthwise layers with biases, GELU, LayerNorm) and `encoder` (attention, linear layers with biases) are small networks
of torchvision, trained on digits, enlarged to 32 pixels and three channels. Configs are made by hand, with ranges set
and nothing trained under them. Prints one table over 1,000 images: in how many the answer (the largest logit) is the
same; by how much we preferred ours where it is another; in how many images any logit differs by more than 1e-3, because
another order of summation has turned the rounding of some input over; and the largest such difference.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

import mpsearch
from benchmarks.options import RESULTS, PrintOnly, Results, Study, several
from benchmarks.printing import print_table, say
from benchmarks.rows import Row, Rows
from benchmarks.stopwatch import Stopwatch
from mpsearch.errors import nearest
from mpsearch.graph.facts import ModelGraph
from mpsearch.graph.layers import inspect_model
from mpsearch.precision import LayerPrecision, PrecisionConfig
from mpsearch.study import load_study
from mpsearch.task.load import load_task
from mpsearch.task.task import Task

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
    "mobilenet": ("mixed",),
    "convnext": ("mixed",),
    "encoder": ("mixed",),
}

STEPS, LEARNING_RATE = 300, 1e-3
"""Of the training of the networks of torchvision, in batches of 64."""


def _mobilenet() -> nn.Module:
    from torchvision.models import mobilenet_v2

    return mobilenet_v2(num_classes=10, width_mult=0.25)  # type: ignore[no-any-return]


def _convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(24, 48, 2), CNBlockConfig(48, None, 2)], num_classes=10)  # type: ignore[no-any-return]


def _vision_transformer() -> nn.Module:
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(32, 4, 3, 4, 64, 128, num_classes=10)
    nn.init.normal_(model.heads.head.weight)  # torchvision starts the head at zero: every logit would be equal
    return model  # type: ignore[no-any-return]


ON_DIGITS: dict[str, Callable[[], nn.Module]] = {
    "mobilenet": _mobilenet,
    "convnext": _convnext,
    "encoder": _vision_transformer,
}
"""Networks that are trained here."""


def enlarged(x: Tensor) -> Tensor:
    """`(n, 1, 8, 8)` digits as `(n, 3, 32, 32)` images."""
    return F.interpolate(x, 32).expand(-1, 3, -1, -1).contiguous()


def trained(make: Callable[[], nn.Module], task: Task) -> nn.Module:
    """A network that has learned digits, in eval mode."""
    torch.manual_seed(0)
    model = make().train()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, STEPS)
    for x, y in task.train_batches(64, STEPS, 0):
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(enlarged(x)), y))
        optimizer.step()
        schedule.step()
    return model.eval()


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


class Networks:
    """The networks, quantized once for each config, with our answers."""

    def __init__(self, study: str) -> None:
        self.study = study

    @cache  # noqa: B019 - there is one Networks
    def network(self, name: str) -> tuple[nn.Module, Tensor, Tensor, ModelGraph]:
        """The float network, images to set ranges on, images to compare on, and the layers."""
        task = load_task(load_study("digits" if name in ("digits", *ON_DIGITS) else self.study).task)
        model = trained(ON_DIGITS[name], task) if name in ON_DIGITS else task.float_model()
        model = _vision_transformer().eval() if name == "vit" else model
        images = task.calibration_input(CALIBRATION + IMAGES)  # digits has 1,078: the two overlap
        images = enlarged(images) if name in ON_DIGITS else images
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

    def row(self, target: str, network: str, config: str) -> Row:
        """One line of the table."""
        run, package, _ = TARGETS[target]
        model, _, x, _ = self.network(network)
        quantized, ours = self.quantized(network, config)
        with Stopwatch() as watch, tempfile.TemporaryDirectory() as temporary:
            folder = mpsearch.export(quantized, target, Path(temporary) / "out").path
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
            "seconds": round(watch.wall_s, 1),
        }


def export_agreement(
    only: Annotated[Sequence[str], several(str, "export targets")] = tuple(TARGETS),
    networks: Annotated[Sequence[str], several(str, "networks")] = tuple(NETWORKS),
    study: Study = "resnet20-cifar10-jpeg",
    results: Results = RESULTS / "export_agreement.jsonl",
    only_print: PrintOnly = False,
) -> None:
    for names, valid in ((only, TARGETS), (networks, NETWORKS)):
        if unknown := [name for name in names if name not in valid]:
            raise typer.BadParameter(f"unknown {unknown[0]}: {nearest(unknown[0], valid)}")
    rows = Rows(results, key=("target", "network", "config"))
    cases = [
        {"target": target, "network": name, "config": config}
        for name in networks
        for target in only
        for config in NETWORKS[name]
        if config in TARGETS[target][2]
    ]
    quantized = Networks(study)
    for case in rows.missing([] if only_print else cases):
        names = ", ".join(case.values())
        try:
            row = quantized.row(**case)
        except Exception as error:  # one row's failure is said, the others are made
            say(f"{names}: {type(error).__name__}: {error}")
            continue
        rows.append(case | row)
        say(f"{names}: {row['same_answer']}")
    show(rows.read())


@torch.no_grad()
def answers(run: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    """Logits `(n, classes)`."""
    return torch.cat([run(part).cpu() for part in torch.split(x, BATCH)])


def show(rows: list[Row]) -> None:
    """The table."""
    words = ("network", "config", "target", "with")
    columns = ("same answer", "preferred by", "images off", "by up to", "median", "logits up to", "KiB", "float32 KiB")
    networks, configs, targets = list(NETWORKS), list(CONFIGS), list(TARGETS)
    print_table(
        "answers of each export, in its own library, compared with ours",
        (*words[:3], *columns, words[3]),
        (
            (
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
            for row in sorted(
                rows,
                key=lambda r: (networks.index(r["network"]), configs.index(r["config"]), targets.index(r["target"])),
            )
        ),
        left=words,
    )
