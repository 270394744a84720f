"""A network that MHAQ trained (github.com/aifoundry-org/MHAQ): its Lightning checkpoint and its YAML, read.

What the checkpoint holds of a quantized layer, and what its forward pass makes of it:

    model.<layer>.0.weight, .bias                       w, and a bias that stays float
    model.<layer>.0.log_wght_s                          log2 of the step, one per output channel or one in all
    model.<layer>.activations_quantizer.log_act_s       log2 of the step s of the input
    model.<layer>.activations_quantizer.log_act_q       log2 of its range Q
    model.<layer>.activations_quantizer.act_b           its lower end b

    weight   l + s round((w - l) / s),                       l = min(w), of each channel or of all of it
    input    b + s round((clamp(x, b, b + Q - s) - b) / s)

Both are offset grids (`quant/offset_grid.py`), so the network that is made of them gives MHAQ's answers: of its
ResNet-20 at W4A4, 200 of 200, the largest difference of a logit 3.8e-6. That is with tensors in MHAQ's order of memory;
ours lie channels last, where convolutions sum in another order, and a value next to the boundary of two codes may go
the other way: the same 200 answers, 4 samples with logits that differ by more than 1e-4. Bits are those
of the widest code in use: a weight of codes 0 to 5 has 3 bits, whatever its target was. The checkpoint says neither
which inputs are quantized nor what the targets were: the YAML does. It also holds the float teacher (`tmodel.*`), which
is not read. Read by torch's weights-only reader, which runs no code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mpsearch.documents import read_yaml
from mpsearch.errors import ExportError, nearest
from mpsearch.precision import FLOAT, FLOAT_BITS, LayerPrecision, Precision, PrecisionConfig
from mpsearch.quant.prepare import quant_layers
from mpsearch.quant.uniform import take_grid
from mpsearch.task.checkpoint import read_weights
from mpsearch.workbench import Workbench

WIDEST = 8  # MHAQ calibrates to 10 bits: what is wider has not come down to its target yet
OF_WEIGHT = ("weight", "log_wght_s")
OF_INPUT = ("log_act_s", "log_act_q", "act_b")
BESIDE = ("bias", "log_b_s", "_noise_ratio")  # what a quantized layer may hold beside its weight


@dataclass(frozen=True)
class Grid:
    """The values lower + step * code, 0 <= code <= top: `step` and `lower` `(channels, 1, ...)` or of one element."""

    step: Tensor
    lower: Tensor
    top: int

    @property
    def bits(self) -> int:
        """Bits that hold all of its codes."""
        return max(1, self.top.bit_length())


@dataclass(frozen=True)
class MhaqNetwork:
    """A network that MHAQ trained.

    Attributes:
        config: a precision for each layer.
        weights: the state dict of the float network, with MHAQ's weights.
        grids: layer -> the grid of its weight, and of its input where that is quantized.
        notes: layers that are above their targets.
    """

    config: PrecisionConfig
    weights: Mapping[str, Tensor]
    grids: Mapping[str, tuple[Grid, Grid | None]]
    notes: tuple[str, ...]

    def put_on(self, workbench: Workbench) -> None:
        """Make a workbench's model this network."""
        workbench.reset(self.config, self.weights)
        layers = quant_layers(workbench.model)
        for name, (weight, activation) in self.grids.items():
            take_grid(layers[name].weight_quantizer, weight.step, weight.lower, weight.top)
            if activation is not None:
                take_grid(layers[name].input_quantizer, activation.step, activation.lower, activation.top)


def read_mhaq(checkpoint: str | Path, config: str | Path, model: nn.Module, layers: Sequence[str]) -> MhaqNetwork:
    """Read what MHAQ trained.

    Args:
        checkpoint: Lightning's.
        config: the YAML that MHAQ was given; with our block `mpsearch`, whose targets are per layer, or without.
        model: the float network that was trained there.
        layers: its quantizable layers, in the order of the config.

    Raises:
        ExportError: the YAML is none of MHAQ's, the checkpoint is of another network or not quantized, or the two do
            not fit; the message names what does not.
        TaskError: there is no such checkpoint, or it holds more than tensors and plain values.
    """
    settings = _Settings.read(Path(config))
    tensors = _tensors(Path(checkpoint))
    quantized = [key.removesuffix(".0.log_wght_s") for key in tensors if key.endswith(".0.log_wght_s")]
    if not quantized:
        raise ExportError(
            f"checkpoint '{checkpoint}' holds no quantized layer (no key ends in .0.log_wght_s): give a checkpoint of "
            "MHAQ's quantized training; a float one belongs into task.checkpoint"
        )
    for name in quantized:
        if name not in layers:
            raise ExportError(
                f"checkpoint '{checkpoint}' quantizes '{name}', which is no quantizable layer of this network: "
                + nearest(name, layers)
            )
    settings.check(quantized)
    weights = _float_names(tensors, quantized)
    _check_network(weights, model, Path(checkpoint))
    grids = {name: _grids(name, tensors, settings) for name in layers if name in quantized}
    if settings.quantizes_bias:
        for name in quantized:
            if (bias := f"{name}.bias") in weights:
                weights[bias] = _on_grid(weights[bias], grids[name][0])
    _check_bits(grids)
    granularity = settings.granularity
    precisions = {
        name: LayerPrecision(
            Precision("uniform", weight.bits, granularity),
            FLOAT if activation is None else Precision("uniform", activation.bits, "tensor"),
        )
        for name, (weight, activation) in grids.items()
    }
    float_layer = LayerPrecision(FLOAT, FLOAT)
    return MhaqNetwork(
        PrecisionConfig((name, precisions.get(name, float_layer)) for name in layers),
        weights,
        grids,
        tuple(settings.misses(precisions)),
    )


@dataclass(frozen=True)
class _Settings:
    """What `quantization` of the YAML, and our block in it, say."""

    path: Path
    per_channel: bool
    quantizes_bias: bool
    excluded: tuple[str, ...]
    overall: tuple[int, int]  # target bits of weights and inputs where there is no block of ours
    targets: Mapping[str, tuple[int, int]] | None  # by layer

    @classmethod
    def read(cls, path: Path) -> _Settings:
        document = read_yaml(path, ExportError)
        block = document.get("quantization") if isinstance(document, dict) else None
        if not isinstance(block, dict):
            raise ExportError(f"{path} has no block 'quantization': give the YAML that MHAQ was trained with")
        if block.get("fuse_batchnorm"):
            raise ExportError(
                f"{path} has fuse_batchnorm: true, which makes another network of it, without its BatchNorms: train "
                "with fuse_batchnorm: false"
            )
        scheme, excluded = block.get("qscheme"), block.get("excluded_layers") or []
        if scheme not in (0, 1) or isinstance(scheme, bool):
            raise ExportError(f"{path}: qscheme is {scheme!r}, expected 0 (one step a weight) or 1 (one a channel)")
        if not isinstance(excluded, list):
            raise ExportError(f"{path}: excluded_layers is {excluded!r}, expected a list of layer names")
        ours = document.get("mpsearch")
        by_layer = ours.get("layers") if isinstance(ours, dict) else None
        if by_layer is not None and not isinstance(by_layer, dict):
            raise ExportError(f"{path}: mpsearch.layers is {by_layer!r}, expected layer -> weight_bit and act_bit")
        return cls(
            path,
            scheme == 1,
            bool(block.get("quantize_bias")),
            tuple(map(str, excluded)),
            _target(block, f"{path}: quantization"),
            None
            if by_layer is None
            else {str(name): _target(row, f"{path}: layer '{name}'") for name, row in by_layer.items()},
        )

    @property
    def granularity(self) -> Any:
        return "channel" if self.per_channel else "tensor"

    def check(self, quantized: Sequence[str]) -> None:
        """Refuse a checkpoint whose quantized layers are not those of the YAML."""
        if both := [name for name in self.excluded if name in quantized]:
            raise ExportError(
                f"{self.path} excludes '{both[0]}', which the checkpoint quantizes: give the YAML of this checkpoint"
            )
        if self.targets is None:
            return
        if odd := [name for name in self.targets if name not in quantized]:
            raise ExportError(
                f"{self.path} has targets for {len(odd)} layers that the checkpoint does not quantize, '{odd[0]}' "
                "first: give the YAML of this checkpoint"
            )
        if odd := [name for name in quantized if name not in self.targets]:
            raise ExportError(
                f"{self.path} has no target for {len(odd)} layers that the checkpoint quantizes, '{odd[0]}' first: "
                "give the YAML of this checkpoint"
            )

    def target(self, name: str) -> tuple[int, int]:
        """Bits of weight and input that the layer was trained down to; -1 or 32 and more: float."""
        return self.overall if self.targets is None else self.targets[name]

    def misses(self, precisions: Mapping[str, LayerPrecision]) -> Iterable[str]:
        """What is above its target, in words."""
        above = [
            f"{name} {tensor} {precision.bits} of {target}"
            for name, layer in precisions.items()
            for tensor, precision, target in zip(
                ("weight", "activation"), (layer.weight, layer.activation), self.target(name), strict=True
            )
            if not precision.is_float and precision.bits > target
        ]
        if above:
            more = f" and {len(above) - 4} more" if len(above) > 4 else ""
            yield f"not converged: {', '.join(above[:4])}{more} bits"


def _target(row: Any, where: str) -> tuple[int, int]:
    bits = [row.get(key) if isinstance(row, dict) else None for key in ("weight_bit", "act_bit")]
    if not all(isinstance(b, int) and not isinstance(b, bool) for b in bits):
        raise ExportError(f"{where} has {row!r}: expected weight_bit and act_bit, whole numbers")
    return cast(tuple[int, int], tuple(bits))


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of the network, by their names in it."""
    content = read_weights(path)
    state = content.get("state_dict") if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not any(str(key).startswith("model.") for key in state):
        raise ExportError(
            f"checkpoint '{path}' is none of Lightning's (no state_dict with keys model.*): give the .ckpt file that "
            "MHAQ's ModelCheckpoint wrote"
        )
    return {
        key.removeprefix("model."): value
        for key, value in state.items()
        if key.startswith("model.") and isinstance(value, Tensor)
    }


def _float_names(tensors: Mapping[str, Tensor], quantized: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of the float network, under its names; what belongs to quantizers is left out."""
    of_quantizers = {f"{name}.activations_quantizer.{key}" for name in quantized for key in OF_INPUT}
    of_quantizers |= {f"{name}.0.{key}" for name in quantized for key in (*OF_WEIGHT, *BESIDE)} - {
        f"{name}.0.{key}" for name in quantized for key in ("weight", "bias")
    }
    renamed = {f"{name}.0.{key}": f"{name}.{key}" for name in quantized for key in ("weight", "bias")}
    return {renamed.get(key, key): value for key, value in tensors.items() if key not in of_quantizers}


def _check_network(weights: Mapping[str, Tensor], model: nn.Module, path: Path) -> None:
    expected = model.state_dict()
    missing, strange = ([k for k in a if k not in b] for a, b in ((expected, weights), (weights, expected)))
    if missing or strange:
        raise ExportError(
            f"checkpoint '{path}' is of another network: {len(missing)} of its {len(expected)} tensors are missing"
            f"{_first(missing)}, {len(strange)} are unexpected{_first(strange)}; give the checkpoint of task.model"
        )
    for key, value in weights.items():
        if value.shape != expected[key].shape:
            raise ExportError(
                f"checkpoint '{path}' is of another network: {key} has the shape {tuple(value.shape)} instead of "
                f"{tuple(expected[key].shape)}"
            )
        if value.is_floating_point() and not value.isfinite().all():
            raise ExportError(f"checkpoint '{path}' has NaN or infinite values in {key}: give an earlier checkpoint")


def _first(names: Sequence[str]) -> str:
    return f" ('{names[0]}' first)" if names else ""


def _grids(name: str, tensors: Mapping[str, Tensor], settings: _Settings) -> tuple[Grid, Grid | None]:
    weight = tensors[f"{name}.0.weight"].float()
    channels = weight.shape[0] if settings.per_channel else 1
    log_s = _numbers(tensors, f"{name}.0.log_wght_s", channels)
    shape = (-1, *[1] * (weight.dim() - 1)) if settings.per_channel else ()
    step = torch.exp2(log_s).reshape(shape)
    lower = weight.flatten(1).amin(1).reshape(shape) if settings.per_channel else weight.amin()
    codes = torch.round((weight - lower) / step)
    if not codes.isfinite().all():
        raise ExportError(
            f"layer '{name}': its step {float(step.min()):g} gives no finite codes: give an earlier checkpoint"
        )
    of_weight = Grid(step, lower, int(codes.max()))
    if settings.target(name)[1] < 0 or settings.target(name)[1] >= FLOAT_BITS:
        return of_weight, None
    log_s, log_q, b = (_numbers(tensors, f"{name}.activations_quantizer.{key}", 1)[0] for key in OF_INPUT)
    s, q = torch.exp2(log_s), torch.exp2(log_q)
    top = torch.round((b + q - s - b) / s)  # in the order of MHAQ's forward pass
    if not top.isfinite():
        raise ExportError(
            f"layer '{name}': its input has the step {float(s):g} and the range {float(q):g}, no finite codes"
        )
    return of_weight, Grid(s, b + s * top.clamp_max(0), max(0, int(top)))  # a range below a step: one value


def _numbers(tensors: Mapping[str, Tensor], key: str, count: int) -> Tensor:
    """`(count,)` float32."""
    if key not in tensors:
        raise ExportError(f"the checkpoint lacks model.{key}: expected a network that MHAQ's GDNSQQuant quantized")
    value = tensors[key].detach().float().flatten()
    if value.numel() != count or not value.isfinite().all():
        raise ExportError(
            f"model.{key} of the checkpoint has {value.numel()} numbers, not all finite, expected {count}"
            if value.numel() == count
            else f"model.{key} of the checkpoint has {value.numel()} numbers, expected {count}: does qscheme fit?"
        )
    return value


def _on_grid(bias: Tensor, grid: Grid) -> Tensor:
    step, lower = grid.step.flatten(), grid.lower.flatten()
    return step * torch.round((bias - lower) / step) + lower


def _check_bits(grids: Mapping[str, tuple[Grid, Grid | None]]) -> None:
    wide = [
        f"{name} {tensor} {grid.bits}"
        for name, pair in grids.items()
        for tensor, grid in zip(("weight", "activation"), pair, strict=True)
        if grid is not None and grid.bits > WIDEST
    ]
    if wide:
        raise ExportError(
            f"{len(wide)} tensors of the checkpoint take more than {WIDEST} bits: {', '.join(wide[:4])}"
            f"{', ...' if len(wide) > 4 else ''}; train until they have come down to their targets"
        )
