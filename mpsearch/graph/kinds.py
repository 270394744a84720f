"""Which modules are layers, and which are BatchNorms: decided by exact class, never by a class that is merely alike.

A class is known by identity, or (of a library that may not be installed) by module path and name. A subclass counts as
what it is derived from only where it computes the same, which `own_forward` tells.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn

from mpsearch.graph.products import Product

KINDS: Mapping[type[nn.Module], str] = {
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.ConvTranspose3d: "conv_transpose3d",
    nn.Linear: "linear",
    nn.Embedding: "embedding",
}
"""The module classes of torch that can be quantized, and what their kind is called."""

FOREIGN_KINDS: Mapping[tuple[str, str], str] = {
    ("timm.layers.linear", "Linear"): "linear",  # `nn.Linear` with a forward of its own for TorchScript
    ("transformers.pytorch_utils", "Conv1D"): "linear",  # x W + b: the weight is `(in, out)`
}
"""Classes of libraries that compute what a kind does; `(module, name)` -> kind."""

TRANSPOSED_LINEAR = ("transformers.pytorch_utils", "Conv1D")

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""The classes, not their subclasses, that do nothing but normalize axis 1."""

BATCH_NORM_ACT = ("timm.layers.norm_act", "BatchNormAct2d")
"""A BatchNorm followed by its own `drop` and `act`."""

RESERVED = frozenset(
    {
        "weight_quantizer",
        "input_quantizer",
        "precision",
        "set_precision",
        "quantized_weight",
        "add_quantizers",
        "channel_axis",
        "has_weight",
    }
)
"""What a quantized layer has beside what the layer has: a class with one of these names of its own has no twin."""

_METHODS = ("__call__", "forward", "_conv_forward", "_output_padding")
"""What computes in a layer."""


def known_class(module: nn.Module) -> type[nn.Module] | None:
    """The first class that a module is derived from, itself included, that is the class of a layer."""
    return next((base for base in type(module).__mro__ if _kind_of_class(base) is not None), None)


def kind_of(module: nn.Module) -> str | None:
    """The kind of a layer, also where it is a subclass that computes something else; None: no layer."""
    base = known_class(module)
    return None if base is None else _kind_of_class(base)


def own_forward(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether a module derived from `base` computes something in a way of its own."""
    changed = any(getattr(type(module), m, None) is not getattr(base, m, None) for m in _METHODS)
    return changed or any(method in vars(module) for method in _METHODS)


def adds_to_lookup(module: nn.Module) -> bool:
    """Whether a class derived from `nn.Embedding` does something before or after `super().forward`, and no more.

    Such are transformers' embeddings of positions (an offset is added to the entries) and scaled ones. Its code says
    so: it calls its base's forward and names no weight.
    """
    if not isinstance(module, nn.Embedding) or "forward" in vars(module) or hasattr(module, "bias"):
        return False
    classes = type(module).__mro__[: type(module).__mro__.index(nn.Embedding)]
    forwards = [kind.__dict__["forward"] for kind in classes if "forward" in kind.__dict__]
    names = [set(forward.__code__.co_names) for forward in forwards if hasattr(forward, "__code__")]
    calls = all({"super", "forward"} <= used and "weight" not in used for used in names)
    return len(names) == len(forwards) > 0 and calls and type(module).__call__ is nn.Embedding.__call__


def reserved_names(module: nn.Module) -> list[str]:
    """The names among those of a quantized layer that a module has for something of its own."""
    return sorted(name for name in RESERVED if hasattr(module, name))


def is_transposed_linear(module: nn.Module) -> bool:
    """Whether a linear layer holds its weight as `(in, out)`."""
    return any(_path(base) == TRANSPOSED_LINEAR for base in type(module).__mro__)


def channel_axis(kind: str, dims: int) -> int:
    """The axis of channels (features) in the input or the output of a layer that has so many dimensions."""
    return (
        dims - 1 if kind in ("linear", "embedding", "product") else dims - 1 - int(kind[-2])
    )  # conv2d: two places at the end


def foldable_norm(module: nn.Module) -> bool:
    """Whether a module is a BatchNorm that can become part of a layer: a known class, with statistics of its own."""
    known = type(module) in BATCH_NORMS or _path(type(module)) == BATCH_NORM_ACT
    return known and "forward" not in vars(module) and getattr(module, "running_mean", None) is not None


def rest_of_norm(norm: nn.Module) -> nn.Module:
    """What stays of a BatchNorm that has become part of a layer."""
    if _path(type(norm)) != BATCH_NORM_ACT:
        return nn.Identity()
    rest = nn.Sequential(OrderedDict((name, norm.get_submodule(name)) for name in ("drop", "act")))
    return rest.train(norm.training)


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a layer."""
    return cast(Tensor, layer.weight)


def _kind_of_class(kind: type) -> str | None:
    return "product" if kind is Product else KINDS.get(kind) or FOREIGN_KINDS.get(_path(kind))


def _path(kind: type) -> tuple[str, str]:
    return kind.__module__, kind.__qualname__
