"""Does a config trained on in MHAQ arrive there, and come back? Export, its library on a checkout, import; on the CPU.

A mixed config of the study's network (2 to 8 bits in turn; first and last layer and one input float) is exported with
`--to mhaq`; its script `train_in_mhaq.py` then runs in the checkout, on the study's images in the place of MHAQ's own,
and quantizes, sets the targets, calibrates, trains and tests. The table has, layer by layer, the bits that the trained
network uses beside its targets. MHAQ has to be importable: its requirements are not among ours.

The learning rate is fifteen times that of MHAQ's recipe: bits fall by at most the learning rate a step, and a few
hundred steps have to do for its tens of thousands. It falls by 2 % a step once all bits have converged. What is asked
is whether the loop closes, not how good its answers get.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, cast

import torch
import typer
from torch import Tensor

from benchmarks.options import RESULTS, PrintOnly, Results, Set, Study, Threads
from benchmarks.printing import print_table, say
from benchmarks.rows import MEASURED, Row, Rows
from mpsearch.errors import MpsearchError
from mpsearch.exporters.export import export
from mpsearch.exporters.mhaq import CONFIG_FILE, SCRIPT_FILE
from mpsearch.graph.facts import LayerInfo
from mpsearch.graph.layers import inspect_model
from mpsearch.precision import FLOAT, LayerPrecision, Precision, PrecisionConfig
from mpsearch.quant.network import QuantizedNetwork
from mpsearch.quant.prepare import prepare
from mpsearch.study import TrialSpec, load_study
from mpsearch.task.classification import ClassificationTask
from mpsearch.task.load import load_task
from mpsearch.workbench import Workbench

WEIGHT_BITS = (2, 3, 4, 5, 8)
INPUT_BITS = (3, 4)
EPOCHS = 8
ANNEAL = 0.98  # of the learning rate, a step, once all bits have converged
WARMUP_SHARE = 1 / 16
COMPARED = 200  # images on which the imported network has to answer as MHAQ does
IMPORTER = "mpsearch.exporters.from_mhaq"


def mhaq(
    root: Annotated[Path | None, typer.Option(help="a checkout of github.com/aifoundry-org/MHAQ")] = None,
    study: Study = "resnet20-cifar10-jpeg",
    set_: Set = None,
    steps: Annotated[int, typer.Option(help="training steps in MHAQ", min=EPOCHS)] = 640,
    batch: Annotated[int, typer.Option(help="images of a batch", min=1)] = 32,
    images: Annotated[int, typer.Option(help="validation images that MHAQ calibrates and tests on", min=1)] = 1000,
    rate: Annotated[float, typer.Option(help="learning rate in MHAQ")] = 0.03,
    threads: Threads = 1,
    results: Results = RESULTS / "mhaq.jsonl",
    only_print: PrintOnly = False,
) -> None:
    rows = Rows(results, key=("study", "steps", "batch", "images", "rate", "mhaq", *MEASURED))
    if not only_print:
        if root is None:
            raise MpsearchError("a checkout of MHAQ is needed: give --root PATH")
        torch.set_num_threads(threads)
        case = {"study": study, "steps": steps, "batch": batch, "images": images, "rate": rate, "mhaq": version(root)}
        for missing in rows.missing([case]):
            task = load_task(load_study(study, set_ or []).task)
            if not isinstance(task, ClassificationTask):
                raise MpsearchError(f"study '{study}' is not of labelled images: choose one that is")
            rows.append(missing | measure(task, root.resolve(), steps, batch, images, rate))
    show(rows.read())


def version(root: Path) -> str:
    """Ten digits that name the code of a checkout: of its files, as an archive has no history."""
    digest = hashlib.sha256()
    files = sorted((root / "src").rglob("*.py"))
    if not files:
        raise MpsearchError(f"{root} is no checkout of MHAQ: it has no src/*.py")
    for path in files:
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:10]


def measure(task: ClassificationTask, root: Path, steps: int, batch: int, images: int, rate: float) -> Row:
    """Export, train in MHAQ, import: bits of each layer, scores and seconds."""
    task = task.sampled(images)
    network = mixed_network(task)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "mhaq"
        export(network, "mhaq", folder)
        script = load_script(folder)
        settings = [
            f"training.learning_rate={rate}",
            f"training.max_epochs={EPOCHS}",
            "training.val_every_n_epochs=1",
            f"training.callbacks.TemperatureScale.params.scale_anneal={ANNEAL}",
            f"training.callbacks.TemperatureScale.params.warmup={max(1, round(steps * WARMUP_SHARE))}",
            f"training.callbacks.ModelCheckpoint.params.dirpath={work}/checkpoints",
            f"data.batch_size={batch}",
        ]
        say(f"training {task.name} in {root}, {steps} steps")
        began = time.perf_counter()
        torch.manual_seed(0)
        with contextlib.chdir(work):  # it writes its logs there
            trained = script.train(root, settings, steps, data_module(task, batch, steps // EPOCHS))
        seconds = round(time.perf_counter() - began)
        result = json.loads((folder / "trained.json").read_text(encoding="utf-8"))
        comparison = import_back(trained, Path(result["checkpoint"]), folder, task)
    return {
        "float_val": task.evaluate(task.float_model(), "val"),
        "test": result["test"],
        "is_converged": result["converged"],
        "steps_done": result["steps"],
        "seconds": seconds,
        "layers": result["layers"],
        **comparison,
    }


def mixed_network(task: ClassificationTask) -> QuantizedNetwork:
    """The study's network at bits that go round, layer by layer; what MHAQ cannot hold is float."""
    model = task.float_model()
    x = task.calibration_input(64)
    layers = inspect_model(model, x).layers
    model = prepare(model, mixed(layers), x, layers)
    return QuantizedNetwork(model, layers, task.name.partition("/")[0], task.name, example_input=x[:2], samples=x)


def mixed(layers: tuple[LayerInfo, ...]) -> PrecisionConfig:
    """2, 3, 4, 5, 8 bits for weights in turn, 3, 4 for inputs; first and last layer float, and one input."""
    held = [layer for layer in layers[1:-1] if layer.reason is None and layer.kind == "conv2d" and not layer.pointwise]
    config = {layer.name: LayerPrecision(FLOAT, FLOAT) for layer in layers if layer.reason is None}
    for layer, weight, activation in zip(held, cycle(WEIGHT_BITS), cycle(INPUT_BITS), strict=False):
        config[layer.name] = LayerPrecision(
            Precision("uniform", weight, "channel"), Precision("uniform", activation, "tensor")
        )
    middle = held[len(held) // 2].name
    config[middle] = LayerPrecision(config[middle].weight, FLOAT)
    return PrecisionConfig(config)


def load_script(folder: Path) -> ModuleType:
    """The export's own script, as a module."""
    spec = importlib.util.spec_from_file_location(Path(SCRIPT_FILE).stem, folder / SCRIPT_FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.pop("mhaq_adapter", None)  # an earlier export's, of another folder
    spec.loader.exec_module(module)
    return module


class Epoch:
    """Batches that can be gone through again and again; each pass is of other images where `batches` says so."""

    def __init__(self, length: int, batches: Any) -> None:
        self.length, self.batches, self.passes = length, batches, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        return cast(Iterator[tuple[Tensor, Tensor]], self.batches(self.passes))


def data_module(task: ClassificationTask, batch: int, steps: int) -> Any:
    """The study's images as a LightningDataModule: an epoch of `steps` batches, val in the place of all else."""
    from lightning.pytorch import LightningDataModule

    size = 250

    class StudyImages(LightningDataModule):  # type: ignore[misc, unused-ignore]  # untyped where Lightning is missing
        def train_dataloader(self) -> Epoch:
            return Epoch(steps, lambda seed: task.train_batches(batch, steps, seed))

        def val_dataloader(self) -> Epoch:
            return Epoch(-(-task.images.size("val") // size), lambda _: task.images.batches("val", size))

        test_dataloader = predict_dataloader = val_dataloader

    return StudyImages()


def import_back(trained: Any, checkpoint: Path, folder: Path, task: ClassificationTask) -> Row:
    """The checkpoint imported, beside MHAQ's own answers: `imported`, `same_answers`, `max_difference`.

    Both in MHAQ's order of memory: in another, convolutions sum in another order, and a value on the edge between two
    codes falls either way.
    Empty where this version of mpsearch reads no checkpoint of MHAQ.
    """
    if importlib.util.find_spec(IMPORTER) is None:
        return {"imported": False, "same_answers": None, "max_difference": None, "samples": None}
    workbench = Workbench(task, TrialSpec(compile=False, precision="fp32"), torch.device("cpu"))
    layers = [layer.name for layer in workbench.graph.quantizable]
    read_mhaq = importlib.import_module(IMPORTER).read_mhaq
    read_mhaq(checkpoint, folder / CONFIG_FILE, task.float_model(), layers).put_on(workbench)
    x = next(task.images.batches("val", COMPARED))[0].contiguous()
    models: list[Any] = [trained.eval().cpu(), workbench.model.eval()]
    with torch.inference_mode():
        expected, actual = (model.to(memory_format=torch.contiguous_format)(x) for model in models)
    return {
        "imported": True,
        "samples": len(x),
        "same_answers": int((expected.argmax(1) == actual.argmax(1)).sum()),
        "max_difference": float((expected - actual).abs().max()),
    }


def show(rows: list[Row]) -> None:
    """A table for each row, layer by layer, and what holds for the whole network."""
    for row in rows:
        lines = [
            (
                name,
                str(layer["weight_bit"]),
                f"{layer['true_weight']:.3f}",
                "float" if layer["true_act"] is None else str(layer["act_bit"]),
                "" if layer["true_act"] is None else f"{layer['true_act']:.3f}",
            )
            for name, layer in row["layers"].items()
        ]
        print_table(
            f"MHAQ {row['mhaq']}, {row['steps_done']} steps of {row['batch']}, {row['seconds']} s",
            ("layer", "weight target", "true bits", "input target", "true bits of input"),
            lines,
        )
        above = sum(not layer["converged"] for layer in row["layers"].values())
        accuracy = row["test"].get("Accuracy_top1", float("nan"))
        print(
            f"is_converged: {row['is_converged']} ({above} of {len(lines)} layers above their target); top-1 "
            f"{100 * accuracy:.2f} % of {row['images']} val images, float {100 * row['float_val']:.2f} %"
        )
        if row["imported"]:
            print(f"import: {row['same_answers']} of {row['samples']} same answers, {row['max_difference']:.1e} apart")
        else:
            print("import: not measured, this version of mpsearch reads no checkpoint of MHAQ")
