"""Which layers a network has, and the facts about each that precision and cost depend on.

`inspect_model` watches one forward pass (`observe.py`) and states what it saw: nothing is traced, so control flow that
depends on data is welcome, and whatever cannot be quantized is named with its reason and its measured cost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mpsearch.errors import MpsearchError, TaskError
from mpsearch.graph.attention import open_attention
from mpsearch.graph.facts import LayerInfo, ModelGraph
from mpsearch.graph.groups import connected
from mpsearch.graph.observe import Observation, Usage, observe, tensor_key, tensors

KINDS: Mapping[type[nn.Module], str] = {
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.ConvTranspose3d: "conv_transpose3d",
    nn.Linear: "linear",
}
"""The module classes that can be quantized, and what their kind is called."""


def inspect_model(model: nn.Module, example_input: Any, batch_size: int | None = None) -> ModelGraph:
    """Run `model` once on a real batch, in eval mode and without gradients, and state the facts of its layers.

    The multiply-accumulates are those of `torch.utils.flop_counter`, halved, with attention and recurrent layers in
    their unfused form, divided by the batch size. Work that is done once per batch (a table of relative positions) is
    shared among its samples, rounded up: give a batch of one for the numbers at batch one. The model is left as it was.
    Attention is seen as `mpsearch.open_attention` gives it: its projections are layers.

    Args:
        model: a plain module with trained weights, on the device of the input.
        example_input: one batch of model input, any nesting of tensors; a tuple is unpacked into arguments. Real
            samples, because whether a layer's input takes negative values is read off them.
        batch_size: samples in the batch; default: the length of a list, else the leading dimension of the first tensor.

    Raises:
        TaskError: the model is wrapped, scripted or not initialised, has weights that are not finite, fails on the
            input, or has no layer that can be quantized.
    """
    _check(model)
    model = open_attention(model)
    samples = _batch_size(example_input) if batch_size is None else batch_size
    try:
        seen = observe(model, example_input, tuple(KINDS))
    except MpsearchError:
        raise
    except Exception as error:  # whatever a foreign model raises
        raise TaskError(
            f"the model fails on its example input: {type(error).__name__}: {error}\n"
            "Give a batch that the model accepts in eval mode, on the model's device."
        ) from error
    layers = _with_groups(_layers(model, seen, samples), model, seen)
    graph = ModelGraph(layers, {name: _share(macs, samples) for name, macs in seen.other_macs.items()})
    if not graph.quantizable:
        named = "".join(f"\n  {layer.name or type(model).__name__}: {layer.reason}" for layer in graph.unhandled[:10])
        raise TaskError(
            f"{type(model).__name__} has no layer that can be quantized: expected at least one of "
            f"{', '.join(kind.__name__ for kind in KINDS)} that a forward pass calls." + named
        )
    return graph


def _check(model: nn.Module) -> None:
    for name, module in model.named_modules():
        where = f"'{name}'" if name else "the model"
        inner = {"DataParallel": "module", "DistributedDataParallel": "module", "OptimizedModule": "_orig_mod"}
        if (attribute := inner.get(type(module).__name__)) is not None:
            raise TaskError(f"{where} is wrapped in {type(module).__name__}: give the plain model, its .{attribute}")
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise TaskError(f"{where} is compiled in place: give the model before .compile()")
        if isinstance(module, torch.jit.ScriptModule):
            raise TaskError(f"{where} is a TorchScript module, which cannot be watched: give the Python module")
    for name, values in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(values):
            raise TaskError(f"'{name}' is lazy and has no values yet: run the model once before giving it")
        if values.is_meta:
            raise TaskError(f"'{name}' is on the meta device and has no values: load the model's weights")
        # A buffer may hold infinities on purpose: attention masks do.
        if not (torch.isfinite(values) if isinstance(values, nn.Parameter) else ~torch.isnan(values)).all():
            raise TaskError(
                f"'{name}' has NaN or infinite values: expected a trained model, check how it was trained and saved"
            )


def _batch_size(example_input: Any) -> int:
    if isinstance(example_input, list):
        return max(len(example_input), 1)
    first = next(tensors(example_input), None)
    if first is None:
        raise TaskError(f"the example input holds no tensor, got {type(example_input).__name__}: give a batch of input")
    return max(first.shape[0], 1) if first.ndim else 1


def _layers(model: nn.Module, seen: Observation, samples: int) -> list[LayerInfo]:
    modules = dict(model.named_modules())
    unused = [name for name, module in modules.items() if _kind(module) is not None and name not in seen.usages]
    return [_layer(name, modules[name], seen.usages.get(name, Usage()), samples) for name in [*seen.usages, *unused]]


def _layer(name: str, module: nn.Module, usage: Usage, samples: int) -> LayerInfo:
    kind = _kind(module)
    weight_shape = _weight_shape(module)
    return LayerInfo(
        name=name,
        kind=KINDS[kind] if kind is not None else type(module).__name__,
        weight_shape=weight_shape,
        input_shape=_sample_shape(usage.input_shape, samples),
        output_shape=_sample_shape(usage.output_shape, samples),
        macs=_share(usage.macs, samples),
        params=sum(parameter.numel() for parameter in module.parameters(recurse=kind is not None)),
        fan_in=_fan_in(module, weight_shape),
        groups=module.groups if isinstance(module, nn.modules.conv._ConvNd) else 1,
        signed_input=usage.signed_input,
        batch_norm=next(iter(usage.readers)) or None if usage.calls == 1 and len(usage.readers) == 1 else None,
        input_group=name,
        weight_group=name,
        calls=max(usage.calls, 1),
        reason=_reason(name, module, kind, usage),
    )


def _reason(name: str, module: nn.Module, kind: type[nn.Module] | None, usage: Usage) -> str | None:
    """Why a layer cannot be quantized, or None if it can."""
    if kind is None:
        return f"there is no quantized form of {type(module).__name__}"
    if usage.bypassed:
        return "the model multiplies by its weight without calling it"
    if not usage.calls:
        return "the model does not run it on the example input"
    if not name:
        return "it is the whole model: wrap it in nn.Sequential"
    if "weight" not in module._parameters:
        return "its weight is computed anew at each call: remove its parametrization, weight norm or pruning mask first"
    changed = [
        method
        for method in ("forward", "_conv_forward")
        if getattr(type(module), method, None) is not getattr(kind, method, None)
    ]
    if changed or "forward" in vars(module):
        return f"its class {type(module).__name__} has a forward of its own"
    dtypes = [dtype for dtype in (usage.input_dtype, _weight(module).dtype) if dtype is not None]
    odd = next((dtype for dtype in dtypes if not dtype.is_floating_point), None)
    return None if odd is None else f"it computes in {odd}, expected floating point"


def _with_groups(layers: list[LayerInfo], model: nn.Module, seen: Observation) -> tuple[LayerInfo, ...]:
    """The layers with the groups of those that can be quantized; the others stay float and bind nobody."""
    modules = dict(model.named_modules())
    free = [layer for layer in layers if layer.reason is None]
    by_input = connected([seen.usages[layer.name].inputs for layer in free])
    by_weight = connected([[tensor_key(_weight(modules[layer.name]))] for layer in free])
    grouped = {
        layer.name: replace(layer, input_group=free[fed].name, weight_group=free[tied].name)
        for layer, fed, tied in zip(free, by_input, by_weight, strict=True)
    }
    return tuple(grouped.get(layer.name, layer) for layer in layers)


def _kind(module: nn.Module) -> type[nn.Module] | None:
    return next((base for base in type(module).__mro__ if base in KINDS), None)


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _weight_shape(module: nn.Module) -> tuple[int, ...]:
    """The shape of a module's weight; where it has several matrices, their elements together: `(elements,)`."""
    if _kind(module) is not None:
        return tuple(_weight(module).shape)
    matrices = [parameter for parameter in module.parameters(recurse=False) if parameter.ndim > 1]
    return tuple(matrices[0].shape) if len(matrices) == 1 else (sum(matrix.numel() for matrix in matrices),)


def _fan_in(module: nn.Module, weight_shape: Sequence[int]) -> int:
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        # A stride spreads the kernel over several outputs: one output meets the taps of one residue class only.
        taps = [
            math.ceil(size / (stride // math.gcd(stride, dilation)))
            for size, stride, dilation in zip(module.kernel_size, module.stride, module.dilation, strict=True)
        ]
        return weight_shape[0] // module.groups * math.prod(taps)
    if _kind(module) is not None:
        return math.prod(weight_shape[1:])
    return max((math.prod(p.shape[1:]) for p in module.parameters(recurse=False) if p.ndim > 1), default=1)


def _share(macs: int, samples: int) -> int:
    return -(-macs // samples)


def _sample_shape(shape: tuple[int, ...], samples: int) -> tuple[int, ...]:
    """The part of a batch's shape that belongs to one sample, wherever the batch dimension is.

    A leading dimension that is a multiple of the batch (windows of an image) keeps the samples' share of it.
    """
    if not shape or (samples not in shape and shape[0] % samples):
        return shape
    if shape[0] != samples and shape[0] % samples == 0:
        return (shape[0] // samples, *shape[1:])
    batch = shape.index(samples)
    return shape[:batch] + shape[batch + 1 :]
