"""Fitting a network to what a target can hold: refused by layer name, or converted and listed; never in silence.

A weight on a shift or APoT grid, or on a narrower uniform one, often lies on a wider uniform grid too: levels 0, 1/4,
1/2 and 1 are the integers 0, 1, 2 and 4 of a step a quarter as large. Such a conversion costs bits and changes no
value. Where no grid of the target holds the values, they are rounded to the nearest of the widest one. An offset grid,
which begins at a real value, becomes a uniform one of the same bits: few formats can add a real number to their codes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from mpsearch.errors import ExportError
from mpsearch.exporters.grids import integer_levels, steps, uniform_grid
from mpsearch.precision import FLOAT, Precision
from mpsearch.quant.modules import QuantLayer
from mpsearch.quant.nearest import magnitudes
from mpsearch.quant.network import QuantizedNetwork
from mpsearch.quant.prepare import quant_layers, weight_rows
from mpsearch.quant.quantizer import Quantizer
from mpsearch.quant.ranges import weight_step
from mpsearch.quant.switch import make_quantizer
from mpsearch.quant.uniform import code_range

Widths = Mapping[str, range]  # quantizer type -> bits


def no_layers(network: QuantizedNetwork) -> dict[str, str]:
    """The layers that a target cannot hold for a reason of their own, where there is none."""
    return {}


@dataclass(frozen=True)
class Holds:
    """What a target can represent: quantizer types with their bits, and layer kinds. Float is always held.

    `cannot` gives, for a network, the layers that the target has to leave float, each with the reason: what bits and
    kinds do not tell.
    """

    weight: Widths
    activation: Widths
    kinds: frozenset[str]
    cannot: Callable[[QuantizedNetwork], Mapping[str, str]] = no_layers
    offset_grids: bool = False  # a uniform tensor whose codes begin at a real value, and may end before 2^bits - 1
    groups: bool = False  # a weight with a scale for each group of its input features


@dataclass(frozen=True)
class Conversion:
    """What was changed for a target: one tensor of one layer."""

    layer: str
    tensor: Literal["weight", "activation", "second factor"]
    before: Precision
    after: Precision
    same_values: bool  # no number changed, only how many bits it is stored in
    from_offset_grid: bool = False
    reason: str = ""  # why the target cannot hold the layer, where bits and kinds do not tell

    def __str__(self) -> str:
        effect = "same values" if self.same_values else "values change"
        why = f" ({self.reason})" if self.reason else ""
        return f"{self.layer} {self.tensor}: {self.old} becomes {self.after}, {effect}{why}"

    @property
    def old(self) -> str:
        """What it was, in words."""
        return f"{self.before} on an offset grid" if self.from_offset_grid else str(self.before)

    def to_json(self) -> dict[str, Any]:
        """For the export's manifest."""
        return {
            "layer": self.layer,
            "tensor": self.tensor,
            "wanted": str(self.before),
            "given": str(self.after),
            "same_values": self.same_values,
            **({"from_offset_grid": True} if self.from_offset_grid else {}),
            **({"reason": self.reason} if self.reason else {}),
        }


def fit(
    network: QuantizedNetwork, target: str, holds: Holds, allow_lossy: bool
) -> tuple[QuantizedNetwork, tuple[Conversion, ...]]:
    """The network as the target can hold it, and what had to be converted for that.

    Raises:
        ExportError: something has to be converted and `allow_lossy` is not set; each layer is named with its
            alternative.
    """
    kinds = {name: info.kind for name, info in network.info.items()}
    products = [name for name, info in network.info.items() if info.multiplies_activations]
    if products and "product" not in holds.kinds:
        raise ExportError(
            f"{target} has no place for quantized products of two activations, and this network has {len(products)}, "
            f"'{products[0]}' first: export to {', '.join(HOLD_PRODUCTS)}, or use a config without products"
        )
    reasons = holds.cannot(network)
    conversions = tuple(
        replace(conversion, reason=reasons.get(name, ""))
        for name, layer in quant_layers(network.model).items()
        for conversion in _conversions(
            name, layer, holds if kinds[name] in holds.kinds and name not in reasons else _NOTHING
        )
    )
    if not conversions:
        return network, ()
    if not allow_lossy:
        raise ExportError(_refusal(target, holds, conversions, kinds))
    model = copy.deepcopy(network.model)
    layers = quant_layers(model)
    for conversion in conversions:
        _convert(layers[conversion.layer], conversion)
    return replace(network, model=model), conversions


_NOTHING = Holds({}, {}, frozenset())

HOLD_PRODUCTS = ("native", "packed", "qonnx", "onnx")
"""The targets that hold products of two activations, for the message that refuses one."""

HOLD_OFFSET_GRIDS = ("native", "packed", "qonnx", "onnx")
"""The targets that hold offset grids, for the message that refuses one."""

HOLD_GROUPS = ("native", "packed", "onnx")
"""The targets that hold groups of input features, for the message that refuses one."""


def _refusal(target: str, holds: Holds, conversions: tuple[Conversion, ...], kinds: Mapping[str, str]) -> str:
    lines = [
        f"  {c.layer} ({kinds[c.layer]}) {c.tensor} {c.old}: "
        f"{c.after} would hold it, {'the same values' if c.same_values else 'with other values'}"
        + (f"; {c.reason}" if c.reason else "")
        for c in conversions[:20]
    ]
    if len(conversions) > len(lines):
        lines.append(f"  and {len(conversions) - len(lines)} more")
    held = ", ".join(
        f"{role} {_widths(widths)}" for role, widths in (("weights", holds.weight), ("activations", holds.activation))
    )
    if any(c.from_offset_grid for c in conversions):
        lines.append(f"Offset grids, which begin at a real value, are held by {', '.join(HOLD_OFFSET_GRIDS)}.")
    if not holds.groups and any(c.before.group is not None for c in conversions):
        lines.append(f"A scale for each group of input features is held by {', '.join(HOLD_GROUPS)}.")
    return (
        f"{target} cannot hold this config; it holds {held} in {', '.join(sorted(holds.kinds))} layers:\n"
        + "\n".join(lines)
        + "\nPick another config or target, or give --allow-lossy (allow_lossy=True) to convert them as listed."
    )


def _widths(widths: Widths) -> str:
    texts = [f"{name}:{w.start}-{w.stop - 1}" for name, w in widths.items()]
    return " or ".join([*texts, "float"])


def _conversions(name: str, layer: QuantLayer, holds: Holds) -> list[Conversion]:
    conversions = []
    weight, activation = layer.precision.weight, layer.precision.activation
    offset_w, offset_a = (_on_offset_grid(q) for q in (layer.weight_quantizer, layer.input_quantizer))
    in_groups = weight.group is not None and not holds.groups
    if not layer.has_weight:  # a second activation
        if not _held(weight, holds.activation) or (offset_w and not holds.offset_grids):
            alternative = FLOAT if weight.is_cast else _alternative(weight.bits, holds.activation)
            conversions.append(Conversion(name, "second factor", weight, alternative, False, offset_w))
    elif not _held(weight, holds.weight) or (offset_w and not holds.offset_grids) or in_groups:
        alternative = _weight_alternative(weight, holds)
        same = alternative.is_float or _keeps_values(layer.weight_quantizer, alternative)
        conversions.append(Conversion(name, "weight", weight, alternative, same, offset_w))
    if not _held(activation, holds.activation) or (offset_a and not holds.offset_grids):
        alternative = FLOAT if activation.is_cast else _alternative(activation.bits, holds.activation)
        conversions.append(Conversion(name, "activation", activation, alternative, False, offset_a))
    return conversions


def _on_offset_grid(quantizer: Quantizer) -> bool:
    return not quantizer.precision.is_float and quantizer.top is not None


def _held(precision: Precision, widths: Widths) -> bool:
    return precision.is_float or precision.bits in widths.get(precision.quantizer, ())


def _weight_alternative(precision: Precision, holds: Holds) -> Precision:
    if precision.is_cast:  # float has all its values
        return FLOAT
    granularity = "channel" if precision.group is not None and not holds.groups else precision.granularity
    return replace(_alternative(_bits_of_same_values(precision), holds.weight), granularity=granularity)


def _keeps_values(old: Quantizer, new: Precision) -> bool:
    """Whether a precision other than float has every value of a weight's grid."""
    same_steps = old.precision.granularity == new.granularity
    return same_steps and not _on_offset_grid(old) and new.bits >= _bits_of_same_values(old.precision)


def _alternative(bits: int, widths: Widths) -> Precision:
    """The narrowest uniform precision of at least `bits`, else the widest, else float."""
    uniform = widths.get("uniform", range(0))
    if not uniform:
        return FLOAT
    return Precision("uniform", next((b for b in uniform if b >= bits), uniform[-1]), "tensor")


def _bits_of_same_values(weight: Precision) -> int:
    """The bits of a signed uniform grid that has every value of this weight grid.

    >>> [_bits_of_same_values(Precision.parse(text, "channel")) for text in ("uniform:1", "shift:3", "shift:4")]
    [2, 4, 8]
    """
    if weight.quantizer == "uniform":
        return max(weight.bits, 2)  # -1 and 1, which stand for -s/2 and s/2, need two bits
    return integer_levels(weight, signed=True)[0][-1].bit_length() + 1


@torch.no_grad()
def _convert(layer: QuantLayer, conversion: Conversion) -> None:
    """Give one tensor of a layer its new quantizer, in place."""
    if conversion.tensor == "weight":
        _convert_weight(layer, conversion.after)
    elif conversion.tensor == "activation":
        layer.input_quantizer = _converted(layer.input_quantizer, conversion.after)
    else:
        layer.weight_quantizer = _converted(layer.weight_quantizer, conversion.after)


def _convert_weight(layer: QuantLayer, precision: Precision) -> None:
    old = layer.weight_quantizer
    values, step = layer.quantized_weight().detach().clone(), old.current_range()[0]
    if old.precision.quantizer == "uniform":
        factor = 0.5 if old.precision.bits == 1 else 1.0
    else:
        factor = integer_levels(old.precision, signed=True)[1]
    same = precision.is_float or _keeps_values(old, precision)
    layer.weight = nn.Parameter(values)  # its own, also where layers shared one: their grids may differ
    layer.weight_quantizer = _fresh(old, precision)
    if not precision.is_float:
        step = step * factor if same else weight_step(weight_rows(layer), precision)
        layer.weight_quantizer.set_range(step)


def _converted(old: Quantizer, precision: Precision) -> Quantizer:
    """The quantizer of an activation, with the same range on the new grid."""
    new = _fresh(old, precision)
    if precision.is_float:
        return new
    if old.precision.quantizer == "uniform":
        grid = uniform_grid(old)
        lower = 0.0 if grid.lower is None else float(grid.lower[0])
        least, most = (float(grid.step[0]) * (code + grid.shift) + lower for code in (grid.low, grid.high))
        least = least if old.offset else 0.0
    else:
        two_sided = old.offset
        most = float(steps(old)[0]) * magnitudes(old.precision, two_sided)[-1]
        least = -most if two_sided else 0.0
    low, high = code_range(precision.bits, signed=False)
    step = torch.tensor((most - least) / (high - low))
    new.set_range(step, torch.tensor(least))
    return new


def _fresh(old: Quantizer, precision: Precision) -> Quantizer:
    """A quantizer of the same tensor at another precision."""
    new = make_quantizer(
        [precision.quantizer],
        old.channels,
        old.dims,
        signed=old.signed,
        offset=old.offset,
        elements=old.elements,
        channel_axis=old.channel_axis,
    ).to(old.step.device)
    new.set_precision(precision)
    return new.train(old.training)
