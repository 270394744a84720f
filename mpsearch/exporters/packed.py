"""The packed format: every weight in the bits that it is said to have, in one safetensors file, and a manifest.

`model.safetensors` holds what `mpsearch.cost.memory` counts as weight bytes, and little else, so its size is the
network's:

    codes       uint8    the codes of all layers, without gaps, each layer from a whole byte on
    scales      float32  a step per output channel (or tensor) of each layer, or one for each group of its input
                         features, channel by channel; and the lower ends of offset grids
    biases      float32  of the layers that have one
    ranges      float32  step and offset beta of each quantized layer input, and the top code of an offset grid
    others      float32  what belongs to no layer (norms, embeddings), if there is any

`export.json` says where each layer's part begins. Codes are unsigned numbers of `bits` bits, the lowest bit first:

    uniform  code - n                        value = step * (code + shift)
    offset   code                            value = step * code + lower, where `lower` has a place in `scales`
    shift    sign << (bits-1) | field        value = step * +-2^exponents[field-1], field 0: zero
    float16, bfloat16    the format's 16 bits
    apot     sign << (bits-1) | fields       value = step * +-(the sum of one such power per term), first term lowest

A BatchNorm behind a layer with a scale per channel is folded into its scales and bias, as the cost model counts it.
Reading needs torch and safetensors alone.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mpsearch.exporters.grids import steps, uniform_grid, weight_codes
from mpsearch.exporters.manifest import open_export
from mpsearch.exporters.native import network_parts, restored
from mpsearch.exporters.plain import per_channel
from mpsearch.precision import FLOAT, Precision
from mpsearch.ptq.fold import affine, foldable
from mpsearch.quant.cast import FORMATS
from mpsearch.quant.levels import apot_terms, shift_exponents
from mpsearch.quant.modules import QuantLayer
from mpsearch.quant.nearest import magnitudes
from mpsearch.quant.network import QuantizedNetwork
from mpsearch.quant.prepare import quant_layers
from mpsearch.quant.quantizer import Quantizer
from mpsearch.quant.uniform import code_range, grid_shift
from mpsearch.state_dict import load_tensors, save_tensors

TENSORS_FILE = "model.safetensors"


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """`(n,)` numbers below 2^bits -> `(ceil(n * bits / 8),)` uint8, no gaps, the lowest bit first.

    >>> pack_bits(torch.tensor([1, 2, 3]), bits=3).tolist()
    [209, 0]
    """
    dtype = torch.uint8 if bits <= 8 else torch.int32
    ones = (codes.to(dtype)[:, None] >> torch.arange(bits, dtype=dtype)) & 1
    ones = torch.nn.functional.pad(ones.to(torch.uint8).flatten(), (0, -codes.numel() * bits % 8)).view(-1, 8)
    return (ones << torch.arange(8, dtype=torch.uint8)).sum(dim=1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` numbers that `pack_bits` packed, `(count,)`, int16 up to 8 bits, else int32."""
    dtype = torch.int16 if bits <= 8 else torch.int32
    ones = ((packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten()[: count * bits].view(count, bits)
    return (ones.to(dtype) << torch.arange(bits, dtype=dtype)).sum(dim=1, dtype=dtype)


def unsigned_codes(codes: Tensor, weight: Precision) -> Tensor:
    """The codes of a weight, as its quantizer gives them on no offset grid, as the unsigned numbers that are packed."""
    if weight.quantizer == "uniform":
        return codes - code_range(weight.bits, signed=True)[0]
    fields = torch.tensor(_fields(weight))[codes.abs().long()]
    return fields | ((codes < 0).long() << (weight.bits - 1))


def values_of(unsigned: Tensor, weight: Precision) -> Tensor:
    """What unsigned codes stand for, in steps, float32: the formulas at the module's top."""
    if weight.quantizer == "uniform":
        return unsigned + float(code_range(weight.bits, signed=True)[0]) + grid_shift(weight.bits, signed=True)
    sign_bit = 1 << (weight.bits - 1)
    by_field = torch.zeros(sign_bit)
    by_field[torch.tensor(_fields(weight))] = torch.tensor(magnitudes(weight, signed=True))
    value = by_field[(unsigned & (sign_bit - 1)).long()]
    return torch.where((unsigned & sign_bit) > 0, -value, value)


def _fields(weight: Precision) -> list[int]:
    """Of each level of a `shift` or `apot` weight, ascending: which power each term takes, packed into one number."""
    terms = terms_of(weight)
    choices: list[tuple[float, int]] = [(0.0, 0)]  # (magnitude, fields)
    width = 0
    for exponents in terms:
        powers = (0.0, *(2.0**e for e in exponents))
        choices = [(m + power, code | (field << width)) for m, code in choices for field, power in enumerate(powers)]
        width += (len(exponents)).bit_length()
    return [code for _, code in sorted(choices)]


def terms_of(weight: Precision) -> tuple[tuple[int, ...], ...]:
    """The exponents of each term of a `shift` or `apot` weight."""
    if weight.quantizer == "shift":
        return (shift_exponents(weight.bits, signed=True),)
    return apot_terms(weight.bits, signed=True)


@torch.no_grad()
def save(network: QuantizedNetwork, folder: Path) -> Mapping[str, Any]:
    """Write `model.safetensors`; returns the manifest's part."""
    layers = quant_layers(network.model)
    modules = dict(network.model.named_modules())
    folded = {
        name: norm
        for name, norm in foldable(modules, network.layers).items()
        if name in layers and _has_room(layers[name], cast(nn.BatchNorm2d, modules[norm]))
    }
    writer = _Writer()
    table = {
        name: writer.layer(layer, cast(nn.BatchNorm2d | None, modules[folded[name]] if name in folded else None))
        for name, layer in layers.items()
    }
    written = {
        value for name in (*layers, *folded.values()) for value in modules[name].state_dict(keep_vars=True).values()
    }
    others = {
        name: value.detach().cpu().clone().contiguous()
        for name, value in network.model.state_dict(keep_vars=True).items()
        if value not in written  # a tensor equals itself alone here: a module may hang under two names
    }
    path = folder / TENSORS_FILE
    save_tensors(writer.tensors() | others, path)
    structure = dict(network.structure or {"folded": {}, "relu6": [], "biased": []})
    structure["folded"] = {**structure["folded"], **folded}
    structure["biased"] = [name for name in layers if table[name]["bias"] is not None]
    return {
        **network_parts(replace(network, structure=structure)),
        "tensors": {"file": TENSORS_FILE, "bytes": path.stat().st_size, "other_bytes": _bytes(others.values())},
        "packed": table,
    }


def load(model: nn.Module, folder: str | Path) -> nn.Module:
    """The network of a packed export, in eval mode, to run: its weights are the values that the codes stand for.

    `model` is the float network; it gives the architecture and is left untouched.

    Raises:
        ExportError: the folder holds no packed export, a damaged one, or one of another network.
    """
    export = open_export(folder, "packed")
    quantized, config = restored(model, export)
    tensors = export.tensors()
    with export.fitting():
        table = export.document["packed"]
        for name, layer in quant_layers(quantized).items():
            if not layer.has_weight:
                layer.set_precision(config[name])
                _read_range(layer.input_quantizer, table[name]["range"], tensors)
                _read_range(layer.weight_quantizer, table[name]["second_range"], tensors)
                continue
            layer.weight_quantizer.set_precision(FLOAT)  # what is read is on the grid already
            layer.input_quantizer.set_precision(config[name].activation)
            _read(layer, config[name].weight, table[name], tensors)
        others = {name: value for name, value in tensors.items() if name not in _BLOBS}
        if strange := load_tensors(quantized, others, strict=False):
            raise ValueError(f"it has no {strange[0]}")
    return quantized.eval()


_BLOBS = ("codes", "scales", "biases", "ranges")


def _has_room(layer: QuantLayer, norm: nn.BatchNorm2d) -> bool:
    """Whether the layer has a number per output channel that a BatchNorm's factor can become part of."""
    weight = cast(Tensor, layer.weight)
    precision = layer.precision.weight
    numbers = 1 if precision.granularity == "tensor" and not precision.is_float else weight.shape[layer.channel_axis]
    return bool(numbers == norm.num_features)


class _Writer:
    """Collects the parts of all layers, and remembers where each begins."""

    def __init__(self) -> None:
        self._codes: list[Tensor] = []
        self._places: dict[bytes, list[int]] = {}
        self._numbers: dict[str, list[Tensor]] = {"scales": [], "biases": [], "ranges": []}

    def layer(self, layer: QuantLayer, norm: nn.BatchNorm2d | None) -> dict[str, Any]:
        """Take one layer in; returns its entry of the manifest."""
        if not layer.has_weight:
            ranges = {"range": layer.input_quantizer, "second_range": layer.weight_quantizer}
            return {"bias": None} | {key: self._range(quantizer) for key, quantizer in ranges.items()}
        precision = layer.precision
        weight = cast(Tensor, layer.weight).detach()
        bias = None if layer.bias is None else cast(Tensor, layer.bias).detach()
        factor = None
        if norm is not None:
            factor, offset = affine(norm)
            bias = offset if bias is None else bias * factor + offset
        entry: dict[str, Any] = {"bits": precision.weight.bits, "shape": list(weight.shape), "scales": None}
        if precision.weight.is_float:
            if factor is not None:
                weight = weight * per_channel(factor, weight, layer.channel_axis)
            codes = weight.float().contiguous().view(-1).view(torch.uint8)
        elif precision.weight.is_cast:
            codes = pack_bits(weight_codes(layer).flatten(), precision.weight.bits)
        else:
            codes = weight_codes(layer).flatten()
            scale = steps(layer.weight_quantizer)
            if factor is not None:  # of a channel: for each of its groups
                factor = factor.repeat_interleave(scale.numel() // factor.numel())
            entry["scales"] = self._add("scales", scale if factor is None else scale * factor)
            if layer.weight_quantizer.top is None:
                codes = unsigned_codes(codes, precision.weight)
            elif (lower := uniform_grid(layer.weight_quantizer).lower) is not None:
                entry["lower"] = self._add("scales", lower if factor is None else lower * factor)
            codes = pack_bits(codes, precision.weight.bits)
            if precision.weight.quantizer != "uniform":
                entry["exponents"] = [list(term) for term in terms_of(precision.weight)]
        entry["codes"] = self._add_codes(codes.cpu())
        entry["bias"] = None if bias is None else self._add("biases", bias)
        entry["range"] = self._range(layer.input_quantizer)
        return entry

    def _range(self, quantizer: Quantizer) -> list[int]:
        numbers = [quantizer.step.detach().reshape(1)]
        if quantizer.beta is not None:
            numbers.append(quantizer.beta.detach().reshape(1))
        if quantizer.top is not None:
            numbers.append(quantizer.top.reshape(1))
        return self._add("ranges", torch.cat(numbers))

    def tensors(self) -> dict[str, Tensor]:
        """What goes into the file."""
        numbers = {name: torch.cat(parts) for name, parts in self._numbers.items() if parts}
        return {"codes": torch.cat(self._codes)} | numbers

    def _add_codes(self, codes: Tensor) -> list[int]:
        digest = hashlib.sha256(codes.numpy().tobytes()).digest()
        if digest not in self._places:  # layers that share a weight and its grid share the codes
            self._places[digest] = [sum(part.numel() for part in self._codes), codes.numel()]
            self._codes.append(codes)
        return self._places[digest]

    def _add(self, name: str, numbers: Tensor) -> list[int]:
        parts = self._numbers[name]
        start = sum(part.numel() for part in parts)
        parts.append(numbers.float().cpu())
        return [start, numbers.numel()]


@torch.no_grad()
def _read(layer: QuantLayer, weight: Precision, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Give a layer its weight, bias and input range."""
    shape = tuple(entry["shape"])
    if shape != tuple(cast(Tensor, layer.weight).shape):
        raise ValueError(f"a weight of shape {shape} where the model has {tuple(cast(Tensor, layer.weight).shape)}")
    codes = _slice(tensors["codes"], entry["codes"])
    if weight.is_float:
        value = codes.clone().view(torch.float32).view(shape)
    elif weight.is_cast:
        bits = unpack_bits(codes, weight.bits, math.prod(shape))
        value = bits.to(torch.int16).view(FORMATS[weight.quantizer]).float().view(shape)
    else:
        unsigned = unpack_bits(codes, weight.bits, math.prod(shape)).view(shape)
        where = unsigned, layer.channel_axis, weight.group
        scale = per_channel(_slice(tensors["scales"], entry["scales"]), *where)
        if "lower" in entry:
            value = scale * unsigned + per_channel(_slice(tensors["scales"], entry["lower"]), *where)
        else:
            value = scale * values_of(unsigned, weight)
    layer.weight = nn.Parameter(value)  # its own, also where layers shared one: their scales may differ
    if entry["bias"] is not None:
        layer.bias = nn.Parameter(_slice(tensors["biases"], entry["bias"]).clone())
    _read_range(layer.input_quantizer, entry["range"], tensors)


def _read_range(quantizer: Quantizer, where: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
    step, *others = _slice(tensors["ranges"], where)
    if len(others) == 2:
        quantizer.set_offset_grid(step, others[0], int(others[1]))
    else:
        quantizer.set_range(step, *others)


def _slice(numbers: Tensor, where: Sequence[int]) -> Tensor:
    start, count = where
    if start < 0 or start + count > numbers.numel():
        raise ValueError(f"entries {start} to {start + count} of a tensor of {numbers.numel()}")
    return numbers[start : start + count]


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
