"""Which layers a network has, and the facts about each that precision and cost depend on.

`inspect_model` watches one forward pass (`observe.py`) and states what it saw: nothing is traced, so control flow that
depends on data is welcome, and whatever cannot be quantized is named with its reason and its measured cost.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from mpsearch.errors import MpsearchError, TaskError
from mpsearch.graph.agreement import holds, largest_subset, outputs
from mpsearch.graph.attention import open_attention
from mpsearch.graph.facts import LayerInfo, ModelGraph
from mpsearch.graph.groups import connected
from mpsearch.graph.inputs import samples_of, tensors
from mpsearch.graph.kinds import (
    KINDS,
    adds_to_lookup,
    channel_axis,
    foldable_norm,
    is_transposed_linear,
    kind_of,
    known_class,
    own_forward,
    reserved_names,
    weight_of,
)
from mpsearch.graph.observe import Observation, Usage, observe, place_of, tensor_key
from mpsearch.graph.products import Product, find_products, open_products
from mpsearch.private.torch import COMPILED, BatchNormNd, ConvNd


def inspect_model(
    model: nn.Module,
    example_input: Any,
    batch_size: int | None = None,
    products: bool | Collection[str] = False,
) -> ModelGraph:
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
        products: make layers of the products of two activations too: of all, or of those that are named. Those with
            which the model would answer otherwise are left out, with a note.

    Raises:
        TaskError: the model is wrapped, scripted or not initialised, has weights that are not finite, fails on the
            input, or has no layer that can be quantized.
    """
    _check(model)
    model = open_attention(model)
    samples = _batch_size(example_input) if batch_size is None else batch_size
    try:
        model, left = (model, []) if products is False else _with_products(model, example_input, products)
        seen = observe(model, example_input)
    except MpsearchError:
        raise
    except Exception as error:  # whatever a foreign model raises
        raise TaskError(
            f"the model fails on its example input: {type(error).__name__}: {error}\n"
            "Give a batch that the model accepts in eval mode, on the model's device."
        ) from error
    followers, notes = _followers(model, seen)
    layers = _with_groups(_layers(model, seen, samples, followers), model, seen)
    notes = [*notes, *left, *_dead(layers, seen, samples)]
    graph = ModelGraph(layers, {name: _share(macs, samples) for name, macs in seen.other_macs.items()}, tuple(notes))
    if not graph.quantizable:
        named = "".join(f"\n  {layer.name or type(model).__name__}: {layer.reason}" for layer in graph.unhandled[:10])
        raise TaskError(
            f"{type(model).__name__} has no layer that can be quantized: expected at least one of "
            f"{', '.join(kind.__name__ for kind in KINDS)} that a forward pass calls." + named
        )
    return graph


def _with_products(
    model: nn.Module, example_input: Any, products: bool | Collection[str]
) -> tuple[nn.Module, list[str]]:
    """The model with its products opened, so far as it answers as before; and in words, which are not."""
    names = find_products(model, example_input, lambda module: kind_of(module) is not None)
    names = [name for name in names if products is True or (products is not False and name in products)]
    reference = outputs(model, example_input) if names else []
    opened = largest_subset(names, lambda some: holds(open_products(model, some), example_input, reference))
    why = "is no layer: with it as one, the network does not answer as before"
    return open_products(model, opened), [f"{name} {why}" for name in names if name not in opened]


def _check(model: nn.Module) -> None:
    for name, module in model.named_modules():
        where = f"'{name}'" if name else "the model"
        inner = {"DataParallel": "module", "DistributedDataParallel": "module", "OptimizedModule": COMPILED}
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
    if next(tensors(example_input), None) is None:
        raise TaskError(f"the example input holds no tensor, got {type(example_input).__name__}: give a batch of input")
    return max(samples_of(example_input), 1)


def _layers(model: nn.Module, seen: Observation, samples: int, followers: Mapping[str, str]) -> list[LayerInfo]:
    modules = dict(model.named_modules())
    used = [name for name, usage in seen.usages.items() if not _only_normalizes(modules[name], usage)]
    unused = [name for name, module in modules.items() if kind_of(module) is not None and name not in seen.usages]
    frozen = not any(parameter.requires_grad for parameter in model.parameters())
    return [
        _layer(name, modules[name], seen.usages.get(name, Usage()), samples, followers.get(name), frozen)
        for name in [*used, *unused]
    ]


def _only_normalizes(module: nn.Module, usage: Usage) -> bool:
    return isinstance(module, BatchNormNd) and not usage.macs


def _layer(
    name: str, module: nn.Module, usage: Usage, samples: int, batch_norm: str | None, all_frozen: bool
) -> LayerInfo:
    kind = kind_of(module)
    weight_shape = _weight_shape(module)
    return LayerInfo(
        name=name,
        kind=type(module).__name__ if kind is None else kind,
        weight_shape=weight_shape,
        input_shape=_sample_shape(usage.input_shape, samples),
        output_shape=_sample_shape(usage.output_shape, samples),
        macs=_share(usage.macs, samples),
        params=sum(parameter.numel() for parameter in module.parameters(recurse=kind is not None)),
        fan_in=_fan_in(module, weight_shape, usage),
        groups=module.groups if isinstance(module, ConvNd) else 1,
        signed_input=usage.signed_input,
        batch_norm=batch_norm,
        input_group=name,
        weight_group=name,
        calls=max(usage.calls, 1),
        reason=reason_to_stay_float(name, module, usage, all_frozen),
        second_shape=_sample_shape(usage.second_shape, samples),
        signed_second=usage.signed_second or not isinstance(module, Product),
    )


def reason_to_stay_float(name: str, module: nn.Module, usage: Usage, all_frozen: bool = False) -> str | None:
    """Why a layer cannot be quantized, or None if it can.

    Args:
        name: of the module.
        module: a layer, or what else multiplies.
        usage: what a forward pass did with it.
        all_frozen: no parameter of the network wants a gradient, so that this says nothing of a single one.
    """
    base = known_class(module)
    if base is None:
        return f"there is no quantized form of {type(module).__name__}"
    if usage.bypassed:
        return "the model multiplies by its weight without calling it"
    if not usage.calls:
        return "the model does not run it on the example input"
    if not name:
        return "it is the whole model: wrap it in nn.Sequential"
    if isinstance(module, Product):
        odd = None if usage.input_dtype is None or usage.input_dtype.is_floating_point else usage.input_dtype
        return None if odd is None else f"it computes in {odd}, expected floating point"
    if "weight" not in module._parameters:
        return "its weight is computed anew at each call: remove its parametrization, weight norm or pruning mask first"
    if own_forward(module, base) and not adds_to_lookup(module):
        return f"its class {type(module).__name__} has a forward of its own"
    if taken := reserved_names(module):
        return f"its class {type(module).__name__} has a '{taken[0]}' of its own, which a quantized layer needs"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "it rescales its weight at each call (max_norm)"
    if not weight_of(module).requires_grad and not all_frozen:
        return "its weight is a constant: it wants no gradient (requires_grad is False)"
    dtypes = [weight_of(module).dtype, *([] if kind_of(module) == "embedding" else [usage.input_dtype])]
    odd = next((dtype for dtype in dtypes if dtype is not None and not dtype.is_floating_point), None)
    return None if odd is None else f"it computes in {odd}, expected floating point"


def _followers(model: nn.Module, seen: Observation) -> tuple[dict[str, str], list[str]]:
    """Layer -> the BatchNorm that can become part of it; and in words, why others that follow a layer cannot.

    Folding follows the data: the one use of the BatchNorm reads exactly what the one use of the layer gave, along the
    layer's channels, and nothing else reads that.
    """
    modules = dict(model.named_modules())
    followers: dict[str, str] = {}
    notes = []
    for norm, usage in seen.usages.items():
        if not _only_normalizes(modules[norm], usage):
            continue
        layers = [source.layer for source in usage.reads if source is not None]
        if not layers:
            continue
        if (why := _stays(norm, layers[0], modules, seen)) is None:
            followers[layers[0]] = norm
        else:
            notes.append(f"{norm} is not folded into {layers[0]}: {why}")
    return followers, notes


def _stays(norm: str, layer: str, modules: Mapping[str, nn.Module], seen: Observation) -> str | None:
    """Why a BatchNorm cannot become part of the layer that it reads, or None if it can."""
    before, after = seen.usages[layer], seen.usages[norm]
    module = modules[layer]
    for name, usage in ((norm, after), (layer, before)):
        if usage.calls > 1:
            return f"{name} is used {usage.calls} times"
        if name in seen.read_elsewhere:
            return f"the model reads the parameters of {name} without calling it"
        if modules[name]._forward_hooks or modules[name]._forward_pre_hooks:
            return f"{name} has a forward hook"
    (source,) = before.gave
    if source.returned or source.readers != {norm}:
        return f"something else reads the output of {layer} too"
    if isinstance(module, nn.Embedding):
        return f"{layer} is an embedding, which has no bias"
    if channel_axis(str(kind_of(module)), len(source.shape)) != 1:
        return f"it normalizes axis 1 of an output whose channels are axis {len(source.shape) - 1}"
    if not foldable_norm(modules[norm]):
        return f"its class {type(modules[norm]).__name__} is not known to be a plain BatchNorm, or it has no statistics"
    shared = [p for p in module.parameters(recurse=False) if len(seen.holders[place_of(p)]) > 1]
    return f"{layer} shares its parameters with another module" if shared else None


def _dead(layers: Sequence[LayerInfo], seen: Observation, samples: int) -> Iterator[str]:
    """In words: inputs of which the example input tells nothing."""
    for layer in layers:
        usage = seen.usages.get(layer.name)
        if usage is None or layer.reason is not None:
            continue
        if usage.dead_input:
            yield (
                f"the input of {layer.name} is zero in all {samples} samples: its range is a guess; give samples that "
                "reach it"
            )
        elif usage.dead_channels:
            yield (
                f"{usage.dead_channels} channels of the model's input are zero in all {samples} samples that "
                f"{layer.name} read: values that they take later were not seen when its range was set"
            )


def _with_groups(layers: list[LayerInfo], model: nn.Module, seen: Observation) -> tuple[LayerInfo, ...]:
    """The layers with the groups of those that can be quantized; the others stay float and tie no other layer."""
    modules = dict(model.named_modules())
    free = [layer for layer in layers if layer.reason is None]
    by_input = connected([seen.usages[layer.name].inputs for layer in free])
    by_weight = connected(
        [[] if layer.multiplies_activations else [tensor_key(weight_of(modules[layer.name]))] for layer in free]
    )
    grouped = {
        layer.name: replace(layer, input_group=free[fed].name, weight_group=free[tied].name)
        for layer, fed, tied in zip(free, by_input, by_weight, strict=True)
    }
    return tuple(grouped.get(layer.name, layer) for layer in layers)


def _weight_shape(module: nn.Module) -> tuple[int, ...]:
    """The shape of a module's weight; where it has several matrices, their elements together: `(elements,)`."""
    if isinstance(module, Product):
        return (0,)
    if kind_of(module) is not None:
        shape = tuple(weight_of(module).shape)
        return shape[::-1] if is_transposed_linear(module) else shape
    matrices = [parameter for parameter in module.parameters(recurse=False) if parameter.ndim > 1]
    return tuple(matrices[0].shape) if len(matrices) == 1 else (sum(matrix.numel() for matrix in matrices),)


def _fan_in(module: nn.Module, weight_shape: Sequence[int], usage: Usage) -> int:
    if isinstance(module, Product):
        return max(1, usage.macs // max(1, usage.calls * math.prod(usage.output_shape)))
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        # A stride spreads the kernel over several outputs: one output meets the taps of one residue class only.
        taps = [
            math.ceil(size / (stride // math.gcd(stride, dilation)))
            for size, stride, dilation in zip(module.kernel_size, module.stride, module.dilation, strict=True)
        ]
        return weight_shape[0] // module.groups * math.prod(taps)
    if kind_of(module) is not None:
        return 1 if isinstance(module, nn.Embedding) else math.prod(weight_shape[1:])
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
