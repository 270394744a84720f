"""How a batch enters a network, and the tensors in whatever goes in or comes out."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def arguments(model: nn.Module, x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a model is called with on an input, by position and by name.

    Args:
        model: any module.
        x: `(args, kwargs)`, a pair of a tuple and a mapping: both kinds of arguments; any other tuple: several
            arguments; a mapping: arguments by name where the model takes these names, else one argument; else one.
    """
    if isinstance(x, tuple):
        if len(x) == 2 and isinstance(x[0], tuple) and isinstance(x[1], Mapping):
            return x[0], dict(x[1])
        return x, {}
    return ((), dict(x)) if isinstance(x, Mapping) and _takes_names(model, x) else ((x,), {})


def call(model: nn.Module, x: Any) -> Any:
    """Run a model on its input; see `arguments`."""
    args, kwargs = arguments(model, x)
    return model(*args, **kwargs)


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in any nesting of mappings, tuples, lists and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for entry in dataclasses.fields(value):
            yield from tensors(getattr(value, entry.name, None))


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with `function` applied to its tensors; mappings of other classes than dict become dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [map_tensors(function, item) for item in value]
        named = hasattr(value, "_fields")  # a named tuple takes its items apart
        return type(value)(*items) if named else type(value)(items)
    return value


def layer_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """What a layer was called with, by position or by name."""
    return next(tensors((args, kwargs)))


def factors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The two tensors that a product was called with, by position or by name."""
    first, second, *_ = tensors((args, kwargs))
    return first, second


def first_samples(x: Any, count: int) -> Any:
    """The first samples of a batch, where all its tensors are as long; else all of it."""
    lengths = {len(tensor) if tensor.dim() else 0 for tensor in tensors(x)}
    if isinstance(x, list) or len(lengths) != 1 or not max(lengths):
        return x
    return map_tensors(lambda tensor: tensor[:count], x)


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; each module's mode is put back."""
    training = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, flag in training.items():
            module.training = flag


def _takes_names(model: nn.Module, names: Mapping[str, Any]) -> bool:
    try:
        inspect.signature(model.forward).bind(**names)
    except (TypeError, ValueError):
        return False
    return True


def image_list(x: Any) -> list[Tensor] | None:
    """The images of a batch as detectors take it, `(c, h, w)` each; None of any other batch.

    It is a list of tensors, alone, as the only argument, or followed by targets, a list of mappings, which a detector
    needs in training only.
    """
    images, *rest = x if isinstance(x, tuple) and x else (x,)
    if not (isinstance(images, list) and images and all(isinstance(image, Tensor) for image in images)):
        return None
    targets = all(isinstance(part, list) and all(isinstance(item, Mapping) for item in part) for part in rest)
    return images if targets and all(image.dim() == 3 for image in images) else None


def samples_of(x: Any) -> int:
    """How many samples a batch has: the length of its first tensor with an axis, or list of tensors; 0 without any."""
    if isinstance(x, Tensor):
        return len(x) if x.dim() else 0
    if isinstance(x, list) and x and all(isinstance(item, Tensor) for item in x):
        return len(x)  # images of different sizes, say
    items = x.values() if isinstance(x, Mapping) else x if isinstance(x, (tuple, list)) else tensors(x)
    return next((count for count in map(samples_of, items) if count), 0)
