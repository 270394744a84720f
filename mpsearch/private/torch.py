"""torch 2.12: base classes of layers, what state dicts and compiled modules carry, nested inputs and outputs,
and the operators that run."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map
from torch.utils._pytree import tree_map_only as tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary as WeakTensorKeyDictionary

COMPILED = "_orig_mod"
"""The child of `torch.compile(module)` that is the module; names in its state dict begin with it."""

BatchNormNd = nn.modules.batchnorm._BatchNorm
"""BatchNorm of any dimension, synchronized or not."""

ConvNd = nn.modules.conv._ConvNd
"""Convolution of any dimension, transposed or not."""

ConvTransposeNd = nn.modules.conv._ConvTransposeNd
"""Transposed convolution of any dimension."""


def without_compiled_prefix(name: str) -> str:
    """A name of a state dict, as the module that was compiled has it."""
    return name.removeprefix(f"{COMPILED}.")


def carry_versions(state: Any, like: Any) -> None:
    """Give a state dict, in place, the version numbers of another: by these some modules convert old ones."""
    state._metadata = getattr(like, "_metadata", {})


def padding_for_pad(layer: nn.Conv1d | nn.Conv2d) -> list[int]:
    """A convolution's padding as `F.pad` takes it, `same` included."""
    return layer._reversed_padding_repeated_twice


def running_module(frame_of: list[FrameType] | None = None) -> nn.Module | None:
    """The innermost module whose call the caller is inside of; the frame of that call is added to `frame_of`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not nn.Module._call_impl.__code__:
        frame = frame.f_back
    if frame is None:
        return None
    if frame_of is not None:
        frame_of.append(frame)
    module: nn.Module = frame.f_locals["self"]
    return module


@contextlib.contextmanager
def one_onnx_registry() -> Iterator[None]:
    """Exports to ONNX share torch's table of operators, which it else makes anew for each: a second of CPU time.

    Where a torch has no such table, they are as slow as they are.
    """
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry
    except ImportError:
        yield
        return
    make = vars(ONNXRegistry).get("from_torchlib")
    if not isinstance(make, classmethod):
        yield
        return
    ONNXRegistry.from_torchlib = staticmethod(functools.partial(_registry, make.__func__))  # type: ignore[method-assign]
    try:
        yield
    finally:
        ONNXRegistry.from_torchlib = make  # type: ignore[method-assign, assignment]


@functools.cache
def _registry(make: Any, **settings: Any) -> Any:
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    return make(ONNXRegistry, **settings)
