"""One forward pass, watched: which module computed what, on which tensors.

Nothing is traced or rewritten. Hooks say which module is running, a dispatch mode sees every operation, and
`torch.utils.flop_counter.FlopCounterMode` below it counts multiply-accumulates, so that a model may branch on its data
and every operation that torch can count is credited to exactly one place:

1. the innermost running layer (a module of `kinds`), whatever it computes;
2. else the module whose parameter is multiplied: functional code that takes `layer.weight` without calling the layer;
3. else nobody's: an operation between activations, as in attention.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

TensorKey = tuple[StorageWeakRef, int, int, int]
"""The values that a tensor holds now: storage, offset, element count, version. Equal for views that only reshape; an
operation in place changes it. The weak reference frees the memory but keeps the address from being given out again."""


@dataclass
class Usage:
    """What one forward pass did with one module. Shapes and counts are of the whole batch."""

    calls: int = 0
    macs: int = 0
    bypassed: bool = False  # its parameters were multiplied without it being called
    input_shape: tuple[int, ...] = ()
    output_shape: tuple[int, ...] = ()
    input_dtype: torch.dtype | None = None
    signed_input: bool = False
    inputs: set[TensorKey] = field(default_factory=set)
    readers: set[str] = field(default_factory=set)  # what reads the output: BatchNorms by name, anything else as ""


@dataclass
class Observation:
    """One forward pass: modules by name in order of first use, and multiply-accumulates outside them, by operation."""

    usages: dict[str, Usage] = field(default_factory=dict)
    other_macs: Counter[str] = field(default_factory=Counter)

    def usage(self, name: str) -> Usage:
        """The usage of a module, begun at first use."""
        return self.usages.setdefault(name, Usage())


def observe(model: nn.Module, example_input: Any, kinds: tuple[type[nn.Module], ...]) -> Observation:
    """Run `model` once in eval mode without gradients, and leave it as it was, also when it raises.

    Args:
        model: any module.
        example_input: its input; a tuple is unpacked into arguments.
        kinds: the module classes that are layers.
    """
    from torch.utils.flop_counter import FlopCounterMode  # here, because it imports triton: a quarter of a second

    training = {module: module.training for module in model.modules()}
    counter = FlopCounterMode(display=False, custom_mapping=_MORE_OPERATIONS)
    watch = _Watch(model, kinds, counter)
    try:
        model.eval()
        with torch.no_grad(), _countable(model), counter, watch.hooked(), watch:
            model(*example_input) if isinstance(example_input, tuple) else model(example_input)
    finally:
        for module, flag in training.items():
            module.training = flag
    return watch.seen


def tensor_key(tensor: Tensor) -> TensorKey:
    """The key of the values that a tensor holds now."""
    version = 0 if tensor.is_inference() else tensor._version
    return _storage(tensor), int(tensor.storage_offset()), tensor.numel(), version


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, kinds: tuple[type[nn.Module], ...], counter: FlopCounterMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = Observation()
        self._counter = counter
        self._modules = dict(model.named_modules())
        self._layers = {name for name, module in self._modules.items() if isinstance(module, kinds)}
        self._running: list[str] = []
        self._made_by: dict[StorageWeakRef, str] = {}
        self._owner: dict[StorageWeakRef, str] = {}
        for name, module in self._modules.items():
            for parameter in module.parameters(recurse=False):
                self._owner.setdefault(_storage(parameter), name)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        operands = [tensor for tensor in tensors((args, kwargs)) if tensor.layout == torch.strided]
        for tensor in operands:
            if maker := self._made_by.get(_storage(tensor)):
                reader = self._running[-1] if self._running else ""
                self.seen.usage(maker).readers.add(reader if isinstance(self._modules[reader], BATCH_NORMS) else "")
        before = self._counter.get_total_flops()
        out = func(*args, **(kwargs or {}))
        macs = (self._counter.get_total_flops() - before) // 2  # one multiplication and one addition each
        if macs:
            self._credit(macs, func, operands, out)
        return out

    def _credit(self, macs: int, func: Any, operands: list[Tensor], out: Any) -> None:
        layer = next((name for name in reversed(self._running) if name in self._layers), None)
        if layer is not None:
            self.seen.usage(layer).macs += macs
            return
        owner = next((self._owner[s] for s in map(_storage, operands) if s in self._owner), None)
        if owner is None:
            self.seen.other_macs[func.name().removeprefix("aten::").split(".")[0]] += macs
            return
        usage = self.seen.usage(owner)
        usage.macs += macs
        usage.bypassed = True
        activations = [tensor for tensor in operands if _storage(tensor) not in self._owner]
        usage.input_shape = tuple(max(activations, key=Tensor.numel).shape) if activations else ()
        usage.output_shape = tuple(out.shape) if isinstance(out, Tensor) else ()

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Hooks on every module while the context lasts."""
        handles = []
        try:
            for name, module in self._modules.items():
                before, after = self._hooks(name)
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(module.register_forward_hook(after, always_call=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooks(self, name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        recorded = name in self._layers or isinstance(self._modules[name], (nn.Embedding, nn.EmbeddingBag))

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._running.append(name)
            entering = next(tensors((args, kwargs)), None)
            if recorded and entering is not None:
                self._enter(self.seen.usage(name), entering)

        def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            self._running.pop()
            if recorded and isinstance(output, Tensor):
                self.seen.usage(name).output_shape = tuple(output.shape)
                self._made_by[_storage(output)] = name

        return before, after

    def _enter(self, usage: Usage, entering: Tensor) -> None:
        usage.calls += 1
        usage.inputs.add(tensor_key(entering))
        usage.input_shape, usage.input_dtype = tuple(entering.shape), entering.dtype
        if entering.is_floating_point() and entering.numel():
            usage.signed_input |= bool(entering.amin() < 0)


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in any nesting of mappings, tuples and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors(item)


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _countable(model: nn.Module) -> Iterator[None]:
    """Keep torch from kernels whose insides the flop counter cannot see: fused attention and recurrent layers."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    with contextlib.ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, fastpath)
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False, allow_tf32=None, deterministic=None))
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


def _matrix_vector(*shapes: Any, **_: Any) -> int:
    """Flops of `mv(matrix, vector)` and `addmv(bias, matrix, vector)`."""
    return 2 * int(shapes[-2].numel())


def _dot(one: Any, *_shapes: Any, **_: Any) -> int:
    return 2 * int(one.numel())


def _trilinear(one: Any, weight: Any, *_shapes: Any, **_: Any) -> int:
    """Flops of `nn.Bilinear`, counted as a product and a sum for each weight element and sample."""
    return 2 * int(one[0] * weight.numel())


_MORE_OPERATIONS: dict[Any, Callable[..., int]] = {
    torch.ops.aten.mv: _matrix_vector,
    torch.ops.aten.addmv: _matrix_vector,
    torch.ops.aten.dot: _dot,
    torch.ops.aten.vdot: _dot,
    torch.ops.aten._trilinear: _trilinear,
}
"""Products that torch's own table leaves out, from the shapes of the operands."""
