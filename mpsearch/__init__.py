"""mpsearch: AutoML search for mixed-precision quantization.

Bit-widths and quantizer types, per layer, on the Pareto front of accuracy against hardware cost.

    import mpsearch
    front = mpsearch.run_study(mpsearch.load_study("digits"))
    print(front.knee.accuracy, front.knee.cost)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpsearch.cost.model import cost_of as cost_of
    from mpsearch.errors import MpsearchError as MpsearchError
    from mpsearch.exporters.export import export as export
    from mpsearch.exporters.native import load as load
    from mpsearch.exporters.read import read_config as read_config
    from mpsearch.graph.attention import open_attention as open_attention
    from mpsearch.graph.layers import inspect_model as inspect_model
    from mpsearch.precision import LayerPrecision as LayerPrecision
    from mpsearch.precision import Precision as Precision
    from mpsearch.precision import PrecisionConfig as PrecisionConfig
    from mpsearch.quant.network import QuantizedNetwork as QuantizedNetwork
    from mpsearch.quant.prepare import prepare as prepare
    from mpsearch.quant.prepare import prepare_for_training as prepare_for_training
    from mpsearch.search.run import run_study as run_study
    from mpsearch.study import load_study as load_study

# Imported when first used: `import mpsearch` costs nothing, and `mpsearch.load` needs neither optuna nor ray.
_PUBLIC = {
    "LayerPrecision": "mpsearch.precision",
    "MpsearchError": "mpsearch.errors",
    "Precision": "mpsearch.precision",
    "PrecisionConfig": "mpsearch.precision",
    "QuantizedNetwork": "mpsearch.quant.network",
    "cost_of": "mpsearch.cost.model",
    "export": "mpsearch.exporters.export",
    "inspect_model": "mpsearch.graph.layers",
    "load": "mpsearch.exporters.native",
    "load_study": "mpsearch.study",
    "open_attention": "mpsearch.graph.attention",
    "prepare": "mpsearch.quant.prepare",
    "prepare_for_training": "mpsearch.quant.prepare",
    "read_config": "mpsearch.exporters.read",
    "run_study": "mpsearch.search.run",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'mpsearch' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
