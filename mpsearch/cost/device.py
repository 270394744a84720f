"""Cost models of devices and of users: measured rows, MACs in a cycle, a function, or prices that were written down.

All of them know only the pairs that they have a number for. A pair without one raises CostError by layer and pair:
nothing is interpolated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from mpsearch.cost.model import CostModel, Part
from mpsearch.errors import CostError
from mpsearch.graph.facts import LayerInfo
from mpsearch.hardware.profile import PriceSpec, kinds_of_pair
from mpsearch.hardware.table import Table, key_of
from mpsearch.precision import LayerPrecision

Prices = Mapping[str, Mapping[str, float]]
"""Layer -> text of a pair -> cost."""


def table_model(table: Table, price: PriceSpec) -> CostModel:
    """The times of a table, in microseconds, with the fixed costs of its profile."""

    def of(layer: LayerInfo, pair: LayerPrecision) -> float:
        row = table.row(layer, pair)
        if row is None:
            key = ", ".join(filter(None, key_of(layer)))
            raise CostError(
                f"the table {table.source} has no row for layer '{layer.name}' ({key}) "
                f"at {pair}: measure it (`mpsearch measure STUDY -o TABLE`), or leave that pair out"
            )
        return row.median_us + table.rest_us(pair) + price.layer

    return CostModel("us", (Part(of),), change=price.change, rows_only=True)


def cycles_model(price: PriceSpec) -> CostModel:
    """MACs over the MACs that the device does in a cycle at a pair."""
    speeds = {kinds: speed for text, speed in (price.macs_per_cycle or {}).items() for kinds in kinds_of_pair(text)}

    def of(layer: LayerInfo, pair: LayerPrecision) -> float:
        weight, activation = pair.weight, pair.activation
        speed = speeds.get(((weight.quantizer, weight.bits), (activation.quantizer, activation.bits)))
        if speed is None and layer.macs:
            raise CostError(
                f"macs_per_cycle says nothing of layer '{layer.name}' at {pair}: add it to the profile, or leave that "
                "pair out"
            )
        return layer.macs / (speed or 1.0) + price.layer

    return CostModel("cycles", (Part(of),), change=price.change, rows_only=True)


def function_model(name: str, function: Callable[[LayerInfo, LayerPrecision], float]) -> CostModel:
    """What a user's function returns for a layer and its precision; it raises, or returns None, for what is not run."""

    def of(layer: LayerInfo, pair: LayerPrecision) -> float:
        value = function(layer, pair)
        if value is None:
            raise CostError(f"{name} has no cost for layer '{layer.name}' at {pair}: leave that pair out")
        if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value >= 0):
            raise CostError(
                f"{name} returned {value!r} for layer '{layer.name}' at {pair}: return a number that is not negative, "
                "or None for a pair that is not run"
            )
        return float(value)

    return CostModel("units", (Part(of),), rows_only=True)


def written_model(unit: str, prices: Prices, change: float, fixed: float) -> CostModel:
    """The model that `written` was made of, for whoever looks at a run."""

    def of(layer: LayerInfo, pair: LayerPrecision) -> float:
        value = prices.get(layer.name, {}).get(str(pair))
        if value is None:
            raise CostError(f"nothing is known of the cost of layer '{layer.name}' at {pair}")
        return value

    return CostModel(unit, (Part(of),), change=change, fixed=fixed, rows_only=True)
