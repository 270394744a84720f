"""One forward pass, watched: which module computed what, on which tensors, and who reads what it gives.

Nothing is traced or rewritten. Hooks say which module is running, a dispatch mode sees every operation, and
`torch.utils.flop_counter.FlopCounterMode` below it counts multiply-accumulates, so that a model may branch on its data
and every operation that torch can count is credited to exactly one place:

1. the innermost running layer, whatever it computes;
2. else the module whose matrix is multiplied (not the one whose bias is added): functional code that takes
   `layer.weight`, as it is, transposed or copied, without calling the layer;
3. else no module's: an operation between activations, as in attention.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from mpsearch.graph.inputs import call, evaluating, factors, layer_input, tensors
from mpsearch.graph.kinds import channel_axis, kind_of
from mpsearch.graph.products import Product
from mpsearch.private.torch import BatchNormNd

if TYPE_CHECKING:
    from torch.utils.flop_counter import FlopCounterMode

TensorKey = tuple[StorageWeakRef, int, int, int]
"""The values that a tensor holds now: storage, offset, element count, version. Equal for views that only reshape; an
operation in place changes it. The weak reference frees the memory but keeps the address from being given out again."""


@dataclass
class Given:
    """A tensor that a layer gave."""

    layer: str
    key: TensorKey
    shape: tuple[int, ...]
    readers: set[str] = field(default_factory=set)  # the innermost module that ran when an operation read it
    returned: bool = False  # by the whole model


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
    second_shape: tuple[int, ...] = ()  # of a product's second factor
    signed_second: bool = False
    dead_input: bool = False  # every call's input is zero everywhere
    dead_channels: int = 0  # of the model's own input, where the layer reads it: zero everywhere
    inputs: set[TensorKey] = field(default_factory=set)
    gave: list[Given] = field(default_factory=list)
    reads: list[Given | None] = field(default_factory=list)  # of a BatchNorm: what it normalizes, unchanged since given


@dataclass
class Observation:
    """One forward pass: modules by name in order of first use, and multiply-accumulates outside them, by operation."""

    usages: dict[str, Usage] = field(default_factory=dict)  # of layers, BatchNorms, and what else multiplies
    other_macs: Counter[str] = field(default_factory=Counter)
    read_elsewhere: set[str] = field(default_factory=set)  # their parameters were read while they did not run
    holders: dict[tuple[Any, ...], set[str]] = field(default_factory=dict)  # `place_of` a parameter -> modules with it

    def usage(self, name: str) -> Usage:
        """The usage of a module, begun at first use."""
        return self.usages.setdefault(name, Usage())


def observe(model: nn.Module, example_input: Any) -> Observation:
    """Run `model` once in eval mode without gradients, and leave it as it was, also when it raises.

    Args:
        model: any module.
        example_input: its input, as `call` takes it.
    """
    from torch.utils.flop_counter import FlopCounterMode  # here, because it imports triton: a quarter of a second

    counter = FlopCounterMode(display=False, custom_mapping=_MORE_OPERATIONS)
    watch = _Watch(model, counter)
    with evaluating(model), _frozen(model), _countable(model), counter, watch.hooked(), watch:
        watch.model_input(example_input)
        watch.model_output(call(model, example_input))
    return watch.seen


def tensor_key(tensor: Tensor) -> TensorKey:
    """The key of the values that a tensor holds now."""
    version = 0 if tensor.is_inference() else tensor._version
    return storage_of(tensor), int(tensor.storage_offset()), tensor.numel(), version


def storage_of(tensor: Tensor) -> StorageWeakRef:
    """The memory that a tensor is in."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def place_of(tensor: Tensor) -> tuple[StorageWeakRef, int, int]:
    """Where a tensor is, whatever values it holds."""
    return storage_of(tensor), int(tensor.storage_offset()), tensor.numel()


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, counter: FlopCounterMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = Observation()
        self._counter = counter
        self._modules = dict(model.named_modules())
        self._layers = {name for name, module in self._modules.items() if kind_of(module) is not None}
        self._running: list[str] = []
        self._given: dict[StorageWeakRef, Given] = {}
        self._model_inputs: set[TensorKey] = set()
        self._owner: dict[StorageWeakRef, str] = {}
        self._parts: dict[StorageWeakRef, set[str]] = {}  # the modules of parameters and buffers
        for name, module in self._modules.items():
            for parameter in module.parameters(recurse=False):
                self._owner.setdefault(storage_of(parameter), name)
                self.seen.holders.setdefault(place_of(parameter), set()).add(name)
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if tensor.layout == torch.strided:
                    self._parts.setdefault(storage_of(tensor), set()).add(name)

    def model_input(self, example_input: Any) -> None:
        """Remember which tensors are the model's own input."""
        self._model_inputs = {tensor_key(tensor) for tensor in tensors(example_input)}

    def model_output(self, output: Any) -> None:
        """Note which tensors leave the model."""
        for tensor in tensors(output):
            if tensor.layout == torch.strided and (source := self._given.get(storage_of(tensor))):
                source.returned = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        operands = [tensor for tensor in tensors((args, kwargs)) if tensor.layout == torch.strided]
        reader = self._running[-1] if self._running else ""
        for storage in map(storage_of, operands):
            if source := self._given.get(storage):
                source.readers.add(reader)
            if (parts := self._parts.get(storage)) is not None and parts.isdisjoint(self._running):
                self.seen.read_elsewhere |= parts
        before = self._counter.get_total_flops()
        out = func(*args, **(kwargs or {}))
        macs = (self._counter.get_total_flops() - before) // 2  # one multiplication and one addition each
        if macs:
            self._credit(macs, func, operands, out)
        elif len(operands) == 1 and (owner := self._owner.get(storage_of(operands[0]))) is not None:
            for tensor in tensors(out):  # a parameter transposed, copied or cast is still that parameter
                self._owner.setdefault(storage_of(tensor), owner)
        return out

    def _credit(self, macs: int, func: Any, operands: list[Tensor], out: Any) -> None:
        layer = next((name for name in reversed(self._running) if name in self._layers), None)
        if layer is not None:
            self.seen.usage(layer).macs += macs
            return
        name = func.name().removeprefix("aten::").split(".")[0]
        multiplied = _multiplied(name, operands)
        owner = next((self._owner[s] for s in map(storage_of, multiplied) if s in self._owner), None)
        if owner is None:
            self.seen.other_macs[name] += macs
            return
        usage = self.seen.usage(owner)
        usage.macs += macs
        usage.bypassed = True
        activations = [tensor for tensor in multiplied if storage_of(tensor) not in self._owner]
        if not usage.calls:
            usage.input_shape = tuple(max(activations, key=Tensor.numel).shape) if activations else ()
            usage.output_shape = tuple(out.shape) if isinstance(out, Tensor) else ()

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Hooks on every module while the context lasts."""
        handles = []
        try:
            for name, module in self._modules.items():
                before, after = self._hooks(name, module)
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(module.register_forward_hook(after, always_call=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooks(self, name: str, module: nn.Module) -> tuple[Callable[..., None], Callable[..., None]]:
        layer = name in self._layers or isinstance(module, nn.EmbeddingBag)
        norm = isinstance(module, BatchNormNd)

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._running.append(name)
            if (layer or norm) and any(True for _ in tensors((args, kwargs))):
                self._enter(name, module, layer_input(args, kwargs), layer)
                if isinstance(module, Product):
                    second = factors(args, kwargs)[1]
                    usage = self.seen.usage(name)
                    usage.second_shape = tuple(second.shape)
                    usage.signed_second |= bool(second.numel() and (second < 0).any())

        def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            self._running.pop()
            if layer and isinstance(output, Tensor):
                source = Given(name, tensor_key(output), tuple(output.shape))
                self.seen.usage(name).gave.append(source)
                self.seen.usage(name).output_shape = source.shape
                self._given[storage_of(output)] = source

        return before, after

    def _enter(self, name: str, module: nn.Module, entering: Tensor, layer: bool) -> None:
        usage = self.seen.usage(name)
        key = tensor_key(entering)
        usage.calls += 1
        usage.inputs.add(key)
        usage.input_shape, usage.input_dtype = tuple(entering.shape), entering.dtype
        source = self._given.get(key[0])
        same = source is not None and (source.key, source.shape) == (key, tuple(entering.shape))
        usage.reads.append(source if same else None)
        if layer and entering.is_floating_point() and entering.numel():
            low, high = entering.aminmax()
            usage.signed_input |= bool(low < 0)
            usage.dead_input = not (low or high) and (usage.calls == 1 or usage.dead_input)
            kind = kind_of(module)
            if key in self._model_inputs and kind is not None and entering.dim() > 1:
                axis = channel_axis(kind, entering.dim())
                alive = entering.detach().ne(0).movedim(axis, 0).flatten(1).any(dim=1)
                usage.dead_channels = max(usage.dead_channels, int((~alive).sum()))


def _multiplied(operation: str, operands: list[Tensor]) -> list[Tensor]:
    """The operands that are multiplied: the others are added to the product."""
    if operation in _ADDS_FIRST:
        return operands[1:3]
    return operands[:2] if operation.endswith("convolution") else operands


_ADDS_FIRST = ("addmm", "addmv", "baddbmm", "_addmm_activation", "addbmm", "addr")


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter wants a gradient: torch's flop counter hooks those that do, which views of them cannot bear."""
    wanting = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.requires_grad and tensor.is_leaf]
    try:
        for tensor in wanting:
            tensor.requires_grad_(False)
        yield
    finally:
        for tensor in wanting:
            tensor.requires_grad_(True)


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
