"""MHAQ, the GDNSQ training library (github.com/aifoundry-org/MHAQ; arXiv 2508.14004): its YAML, weights, and a script.

Files:

- `mhaq.yaml` is what MHAQ's schema accepts: its network, data, callbacks and recipe (`mhaq_networks`). MHAQ knows one
  weight and one input target for the whole network; here they are the widest of the config. The targets of each layer
  are in a block of our own, `mpsearch`, which stock MHAQ ignores without a word.
- `mhaq_adapter.py` makes the targets of its penalty, relu(b_l - (target - eps)), one number per layer, and its check of
  convergence per layer: `set_targets(qmodel, quantizer)` after `quantizer.quantize(model)`.
- `train_in_mhaq.py MHAQ_ROOT` does all of it: loads the weights and checks that they are there, quantizes, sets the
  targets, calibrates, trains, tests, and writes `trained.json` with the bits of every layer.
- `model.pth` are our trained weights, from which it starts; `model.safetensors` the same for everybody else.

MHAQ learns its own steps: ours are not carried over. It quantizes convolutions with a kernel above 1x1 alone; `cannot`
says of each other layer why, and `fit` refuses it or leaves it float. Read from its public code of February 2026, and
run in it (`python -m benchmarks mhaq`); it is not on PyPI.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.documents import to_yaml
from mpsearch.errors import ExportError
from mpsearch.exporters.mhaq_networks import CLASSES, MhaqNetwork, Recipe, dataset, recognize
from mpsearch.exporters.plain import with_layers
from mpsearch.files import write_text
from mpsearch.quant.modules import without_quantizers
from mpsearch.quant.network import QuantizedNetwork
from mpsearch.quant.prepare import quant_layers
from mpsearch.state_dict import save_tensors, state

CONFIG_FILE = "mhaq.yaml"
ADAPTER_FILE = "mhaq_adapter.py"
SCRIPT_FILE = "train_in_mhaq.py"
WEIGHTS_FILE = "model.pth"
TENSORS_FILE = "model.safetensors"
IGNORED = (
    f"stock MHAQ ignores the per-layer targets and trains a uniform network: run {SCRIPT_FILE}, or call "
    "mhaq_adapter.set_targets(qmodel, quantizer)"
)
CALIBRATION_BITS = 10
FLOAT_INPUT = -1  # MHAQ's act_bit of inputs that are passed through
TOP_K = ("top1", "top5")


def cannot(network: QuantizedNetwork) -> dict[str, str]:
    """The layers that MHAQ cannot train as the config has them, each with the reason; it can leave them all float."""
    last = list(_plain(network).named_modules())[-1][0]
    reasons = {}
    for name, layer in quant_layers(network.model).items():
        info, weight, activation = network.info[name], layer.precision.weight, layer.precision.activation
        if weight.is_float and activation.is_float:
            continue
        if info.kind != "conv2d":
            reasons[name] = "MHAQ quantizes conv2d layers alone"
        elif info.pointwise:
            reasons[name] = "MHAQ leaves 1x1 convolutions float"
        elif name == last:
            reasons[name] = (
                "it is the module that the network registers last, where MHAQ looks for a next one and stops; register "
                "any module after it, as nn.Identity, to have it quantized"
            )
        elif weight.is_float:
            reasons[name] = "MHAQ has no quantized input beside a float weight: quantize both, or the weight alone"
    return reasons


def save(network: QuantizedNetwork, folder: Path) -> Mapping[str, Any]:
    """Write the files; returns the manifest's part.

    Raises:
        ExportError: nothing is quantized; some weights have a scale per channel and others per tensor; the network was
            changed before it was quantized; or MHAQ has no recipe for what it does.
    """
    plain = _plain(network)
    weights = state(plain)
    _check_structure(network)
    known = recognize(weights)
    recipe = known.recipe if known is not None else _recipe_of_others(network)
    targets = {
        name: {
            "weight_bit": layer.weight.bits,
            "act_bit": FLOAT_INPUT if layer.activation.is_float else layer.activation.bits,
        }
        for name, layer in network.config.items()
        if not layer.weight.is_float
    }
    if not targets:
        raise ExportError("every layer of this config is float: there is nothing for MHAQ to do, pick another config")
    data = known.data if known is not None and known.data else dataset(network.task)
    document = {
        "model": {
            "type": recipe.model_type,
            "name": known.name if known is not None else _identifier(network.name),
            "cpt_url": f"file://{(folder / WEIGHTS_FILE).resolve()}",
            "params": _params(known, weights, network),
        },
        "training": recipe.training(),
        "data": _data(data or _identifier(network.task), recipe),
        "quantization": _quantization(network, plain, targets, recipe),
        "mpsearch": {"note": IGNORED, "layers": targets},
    }
    write_text(folder / CONFIG_FILE, to_yaml(document))
    for file in (ADAPTER_FILE, SCRIPT_FILE):
        text = files("mpsearch.exporters").joinpath(f"{file}.txt").read_text(encoding="utf-8")
        write_text(folder / file, text)
    torch.save({name: tensor.detach().cpu().clone() for name, tensor in weights.items()}, folder / WEIGHTS_FILE)
    save_tensors(weights, folder / TENSORS_FILE)
    return {
        "file": CONFIG_FILE,
        "adapter": ADAPTER_FILE,
        "script": SCRIPT_FILE,
        "tensors": {"file": TENSORS_FILE},
        "notes": [IGNORED, *_notes(document, known, data)],
    }


def _plain(network: QuantizedNetwork) -> nn.Module:
    """The network in torch's own layers with the weights that training left, modules in the order of registration."""
    return with_layers(network.model, lambda _, layer: without_quantizers(layer))


def _check_structure(network: QuantizedNetwork) -> None:
    changed = network.structure or {}
    parts = [f"{what} ({len(names)})" for what, names in changed.items() if names and what != "biased"]
    if parts:
        raise ExportError(
            f"MHAQ trains the network as its code defines it, and this one was changed before it was quantized: "
            f"{', '.join(parts)}. Export a trial of a search, or a training without folding"
        )


def _recipe_of_others(network: QuantizedNetwork) -> Recipe:
    metric = None if network.metric is None else network.metric.name
    if metric not in (None, *TOP_K):
        raise ExportError(
            f"MHAQ trains classifiers, its RFDN and its yolo_v11_n; '{network.name}' is none of these networks and is "
            f"scored by {metric}: export to another format, as native or onnx"
        )
    return CLASSES


def _params(known: MhaqNetwork | None, weights: Mapping[str, Tensor], network: QuantizedNetwork) -> dict[str, Any]:
    if known is not None:
        return known.params(weights)
    multiplying = [layer for layer in network.layers if layer.macs] or list(network.layers)
    return {"num_classes": multiplying[-1].weight_shape[0]}


def _data(name: str, recipe: Recipe) -> dict[str, Any]:
    data: dict[str, Any] = {"dataset_name": name, "batch_size": recipe.batch_size, "num_workers": 4}
    return data if recipe.data_params is None else data | {"params": dict(recipe.data_params)}


def _quantization(
    network: QuantizedNetwork, plain: nn.Module, targets: Mapping[str, Mapping[str, int]], recipe: Recipe
) -> dict[str, Any]:
    scheme = _scheme(network)
    of_classes = [name for name, module in plain.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    return {
        "name": "GDNSQQuant",
        "qscheme": scheme,
        "weight_bit": max(target["weight_bit"] for target in targets.values()),
        "act_bit": max(target["act_bit"] for target in targets.values()),
        "excluded_layers": [name for name in of_classes if name not in targets],
        # Calibration of one scale per tensor stops at a shape; its start is 2^-12 then.
        "calibration": {"weight_bit": CALIBRATION_BITS if scheme else 0, "act_bit": CALIBRATION_BITS},
        "params": recipe.distilled(),
    }


def _scheme(network: QuantizedNetwork) -> int:
    """MHAQ's qscheme: 0 for one scale per tensor, 1 for one per channel."""
    by_granularity = {
        layer.weight.granularity: name for name, layer in network.config.items() if not layer.weight.is_float
    }
    if len(by_granularity) > 1:
        raise ExportError(
            f"MHAQ has one scheme for all weights, but '{by_granularity['channel']}' has a scale per channel and "
            f"'{by_granularity['tensor']}' per tensor: pick a config with one granularity"
        )
    return int("tensor" not in by_granularity)


def _identifier(name: str) -> str:
    """A name that MHAQ looks up in a module: the part after the colon, letters, digits and underscores."""
    return re.sub(r"\W+", "_", name.rpartition(":")[2]).strip("_") or "network"


def _notes(document: Mapping[str, Any], known: MhaqNetwork | None, data: str | None) -> Iterator[str]:
    """What MHAQ's checkout lacks for this export, and what it does in its own way."""
    if known is None:
        yield (
            f"MHAQ has no network with these weights: give its src/models/__init__.py an entry "
            f"'{document['model']['name']}', a function with the argument num_classes, whose state dict has the names "
            f"in {WEIGHTS_FILE}"
        )
    if data is None:
        yield (
            "MHAQ has no such data: give its src/data/compose/vision/__init__.py an entry "
            f"'{document['data']['dataset_name']}', or write CIFAR10, CIFAR100, MNIST or IMAGENET into {CONFIG_FILE}"
        )
    else:
        yield (
            f"MHAQ reads and normalizes {data} in its own way: the accuracy that it prints before it quantizes has to "
            "be that of the float network"
        )
