"""MHAQ, the GDNSQ training library (github.com/aifoundry-org/MHAQ; arXiv 2508.14004): its YAML, and a small adapter.

Three files:

- `mhaq.yaml` is what MHAQ's schema accepts. MHAQ knows one weight and one activation target for the whole network;
  here they are the widest of the config. The per-layer targets are in a block of our own, `mpsearch`, which stock MHAQ
  ignores without a word: **without the adapter it trains a uniform network**.
- `mhaq_adapter.py` makes the targets of its penalty, relu(b_l - (target - eps)), one number per layer, and its check of
  convergence per layer: `set_targets(qmodel, quantizer)` after `quantizer.quantize(model)`.
- `model.safetensors`: the float network's state dict with our trained weights, to start from.

MHAQ learns its own steps: ours are not carried over. Read from its public code; it is not on PyPI, so the adapter is
tested against a double of the interface that it touches, not against MHAQ itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from mpsearch.documents import to_yaml
from mpsearch.errors import ExportError
from mpsearch.exporters.native import plain_state
from mpsearch.files import write_text
from mpsearch.quant.network import QuantizedNetwork
from mpsearch.state_dict import save_tensors

CONFIG_FILE = "mhaq.yaml"
ADAPTER_FILE = "mhaq_adapter.py"
TENSORS_FILE = "model.safetensors"
IGNORED = "stock MHAQ ignores the per-layer targets: call mhaq_adapter.set_targets(qmodel, quantizer)"


def save(network: QuantizedNetwork, folder: Path) -> Mapping[str, Any]:
    """Write the three files; returns the manifest's part.

    Raises:
        ExportError: some weights have a scale per channel and others per tensor; MHAQ has one scheme for all.
    """
    targets = {
        name: {"weight_bit": layer.weight.bits, "act_bit": layer.activation.bits}
        for name, layer in network.config.items()
        if not (layer.weight.is_float and layer.activation.is_float)
    }
    if not targets:
        raise ExportError("every layer of this config is float: there is nothing for MHAQ to do, pick another config")
    document = {
        "model": {"type": "VISION_CLS", "name": network.name, "params": {}},  # a name that MHAQ's src.models has
        "training": {
            "criterion": "CrossEntropyLoss",
            "optimizer": "RAdam",
            "learning_rate": 0.002,
            "max_epochs": 500,
            "callbacks": {"TemperatureScale": {"params": {"scale_lr": 1, "warmup": 1000}}},
        },
        "data": {"dataset_name": network.task, "batch_size": 1000, "num_workers": 4},  # one that its src.data has
        "quantization": {
            "name": "GDNSQQuant",
            "qscheme": _scheme(network),
            "weight_bit": max(target["weight_bit"] for target in targets.values()),
            "act_bit": max(target["act_bit"] for target in targets.values()),
            "excluded_layers": [layer.name for layer in network.layers if layer.name not in targets],
            "calibration": {"weight_bit": 10, "act_bit": 10},
            "params": {"distillation": True, "distillation_loss": "Symmetrical KL", "qnmethod": "STE"},
        },
        "mpsearch": {"note": IGNORED, "layers": targets},
    }
    write_text(folder / CONFIG_FILE, to_yaml(document))
    adapter = files("mpsearch.exporters").joinpath("mhaq_adapter.py.txt").read_text(encoding="utf-8")
    write_text(folder / ADAPTER_FILE, adapter)
    save_tensors(plain_state(network), folder / TENSORS_FILE)
    return {"file": CONFIG_FILE, "adapter": ADAPTER_FILE, "tensors": {"file": TENSORS_FILE}, "notes": [IGNORED]}


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
