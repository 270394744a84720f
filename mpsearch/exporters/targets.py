"""Every export target: what it can hold, what it needs, and the function that writes it.

This table is the only place that says what a target can represent; `fit` refuses or converts by it. A target is one
module with one function `save(network, folder)`, which returns what its manifest has to say, and one entry here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpsearch.errors import ExportError, nearest
from mpsearch.exporters import aimet, brevitas, mhaq, modelopt, native, onnx_qdq, packed, qonnx, torchao
from mpsearch.exporters.fit import Holds
from mpsearch.exporters.packages import need
from mpsearch.graph.facts import KIND_NAMES
from mpsearch.precision import BITS
from mpsearch.quant.network import QuantizedNetwork

EVERY_KIND = frozenset(KIND_NAMES)
WITH_INPUTS = EVERY_KIND - {"product", "embedding"}
UNIFORM = {"uniform": range(1, 9)}
TWO_UP = {"uniform": range(2, 9)}  # their 1-bit grid is {-s, 0}, ours -s/2 and s/2
ALL_TYPES = {name: widths for name, widths in BITS.items() if name != "float"}
WEIGHTS = {"uniform": range(1, 9), "shift": BITS["shift"], "apot": BITS["apot"]}
"""What is a constant in a file: uniform codes, or values on a grid of powers of two."""
HALF = {"float16": BITS["float16"]}


@dataclass(frozen=True)
class Target:
    """One format."""

    save: Callable[[QuantizedNetwork, Path], Mapping[str, Any]]
    holds: Holds


TARGETS: dict[str, Target] = {
    "native": Target(native.save, Holds(ALL_TYPES, ALL_TYPES, EVERY_KIND, offset_grids=True, groups=True)),
    "packed": Target(packed.save, Holds(ALL_TYPES, ALL_TYPES, EVERY_KIND, offset_grids=True, groups=True)),
    # Shift and APoT weights are constants on their grid. The lower end of an offset grid is added as a real number.
    "qonnx": Target(qonnx.save, Holds(WEIGHTS, UNIFORM, EVERY_KIND, offset_grids=True)),
    "onnx": Target(
        onnx_qdq.save,
        Holds(WEIGHTS | HALF, UNIFORM | HALF | {"uniform": range(1, 17)}, EVERY_KIND, offset_grids=True, groups=True),
    ),
    # Bits alone: MHAQ learns its own scales and lower ends.
    "mhaq": Target(mhaq.save, Holds(UNIFORM, UNIFORM, frozenset({"conv2d"}), mhaq.cannot, offset_grids=True)),
    "brevitas": Target(brevitas.save, Holds(UNIFORM, UNIFORM, WITH_INPUTS)),
    # Weights alone: its static activations are symmetric int8. It has no 1-bit grid without zero.
    "torchao": Target(torchao.save, Holds(TWO_UP, {}, frozenset({"linear"}))),
    "modelopt": Target(modelopt.save, Holds(TWO_UP, UNIFORM, WITH_INPUTS)),
    "aimet": Target(aimet.save, Holds(TWO_UP, UNIFORM, WITH_INPUTS)),
}
"""Name of a format -> what it is."""


def find_target(name: str) -> Target:
    """The target of that name, its packages present.

    Raises:
        ExportError: there is none, or a package that it needs is not installed.
    """
    if name not in TARGETS:
        raise ExportError(f"unknown export format '{name}': {nearest(name, TARGETS)}")
    need(name)
    return TARGETS[name]
