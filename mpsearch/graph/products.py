"""Products of two activations as layers: attention's Q K^T and P V are seen, priced and quantized like any other.

Such a product is a call to a function (`torch.matmul`, `@`, `torch.einsum`, `F.scaled_dot_product_attention`, ...) in
the forward of a module. `find_products` names those of one forward pass, by the module that calls the function:
`blocks.0.attn.product2` is the second one in `blocks.0.attn`. `open_products` gives these modules a child for each
product and a class whose forward sends the calls there; everything else computes as before. Fused attention is taken
apart into its two products and a softmax.

A name counts all calls to such functions in one run of the module, products with a weight among them, because a call
alone does not tell what its operands come from.
"""

from __future__ import annotations

import copy
import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mpsearch.graph.attention import open_attention
from mpsearch.graph.inputs import call, evaluating, tensors
from mpsearch.private.torch import running_module

Function = Callable[[Tensor, Tensor], Tensor]

_FUSED = F.scaled_dot_product_attention  # as it is, whatever is put in its place while a network is traced

_NAME = re.compile(r"product[1-9]\d*")


class Product(nn.Module):
    """A product of two activations."""

    def forward(self, first: Tensor, second: Tensor, function: Function = torch.matmul) -> Tensor:
        """function(first, second), which multiplies and sums."""
        return function(first, second)


def named_products(names: Iterable[str]) -> list[str]:
    """The names among those of layers that are names of products."""
    return [name for name in names if _NAME.fullmatch(name.rpartition(".")[2])]


def find_products(model: nn.Module, example_input: Any, is_layer: Callable[[nn.Module], bool]) -> list[str]:
    """The products of two activations in one forward pass, by name, in order of first use.

    Args:
        model: any module, its attention opened.
        example_input: its input, as `call` takes it.
        is_layer: what a layer multiplies is its own affair.
    """
    finder = _Finder(model, is_layer)
    with evaluating(model), finder:
        call(model, example_input)
    return list(finder.names)


def open_products(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """`model` with the products that are named as children of the modules that compute them.

    A copy that shares its parameters, or the model itself where nothing is to open. Names of anything else are passed
    over.
    """
    places = [tuple(name.rpartition(".")[::2]) for name in named_products(names)]
    modules = dict(model.named_modules())
    places = [(parent, child) for parent, child in places if parent in modules and not hasattr(modules[parent], child)]
    if not places:
        return model
    # Handed to deepcopy as copied already: other modules around the same parameters.
    model = copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})
    modules = dict(model.named_modules())
    for parent, child in places:
        module = modules[parent]
        module.__class__ = _opened_class(type(module))
        module.add_module(child, Product().train(module.training))
    return model


def opened(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """`model` with the attention and the products opened that the layers of these names are part of."""
    names = list(names)
    return open_products(open_attention(model, names), names)


_MADE: dict[type[nn.Module], type[nn.Module]] = {}


def _opened_class(kind: type[nn.Module]) -> type[nn.Module]:
    """A class that computes what `kind` does, by way of its products."""
    if hasattr(kind, "_without_products"):
        return kind
    if kind not in _MADE:

        @torch.compiler.disable  # type: ignore[untyped-decorator]  # which does not see what is running
        def run(module: nn.Module, args: Any, kwargs: Any) -> Any:
            with _Router(module):
                return kind.forward(module, *args, **kwargs)

        @functools.wraps(kind.forward)  # for its signature
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return run(self, args, kwargs)

        members = {
            "__module__": kind.__module__,
            "__doc__": kind.__doc__,
            "__reduce_ex__": _reduce,
            "_without_products": kind,
            "forward": forward,
        }
        _MADE[kind] = cast(type[nn.Module], type(kind.__name__, (kind,), members))
    return _MADE[kind]


def _reduce(module: nn.Module, _protocol: object) -> tuple[Any, ...]:
    """How to copy or pickle a module whose class was made here: by the class that it was made for."""
    return _unpickled, (cast(Any, type(module))._without_products,), module.__getstate__()  # type: ignore[no-untyped-call]


def _unpickled(kind: type[nn.Module]) -> nn.Module:
    made = _opened_class(kind)
    return made.__new__(made)


class _Router(TorchFunctionMode):
    """Sends the products of one run of a module to its children."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = module
        self._count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if not _count_of(func, args) or running_module() is not self._module:
            return func(*args, **kwargs)
        numbers = range(self._count + 1, self._count + 1 + _count_of(func, args))
        self._count = numbers[-1]
        products = [getattr(self._module, f"product{number}", None) for number in numbers]
        if not any(isinstance(product, nn.Module) for product in products):
            return func(*args, **kwargs)
        if func is _FUSED:
            scores_of, values_of = (product or Product() for product in products)
            return _attention(scores_of, values_of, *args, **kwargs)
        first, second, function = _factors(func, args, kwargs)
        return cast(nn.Module, products[0])(first, second, function)


class _Finder(TorchFunctionMode):
    """Names the products of two activations: of tensors that do not come from parameters and buffers alone."""

    def __init__(self, model: nn.Module, is_layer: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.names: dict[str, None] = {}
        self._is_layer = is_layer
        self._name_of = {module: name for name, module in reversed(list(model.named_modules()))}
        self._constants = {_memory(tensor) for tensor in (*model.parameters(), *model.buffers()) if _has_memory(tensor)}
        self._held: list[Tensor] = []  # their memory is not given out again
        self._counts: Counter[str] = Counter()
        self._frames: dict[str, Any] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if count := _count_of(func, args):
            self._take(func, count, args, kwargs)
        operands = [tensor for tensor in tensors((args, kwargs)) if _has_memory(tensor)]
        constant = bool(operands) and all(_memory(tensor) in self._constants for tensor in operands)
        out = func(*args, **kwargs)
        if constant:
            for tensor in tensors(out):
                if _has_memory(tensor) and _memory(tensor) not in self._constants:
                    self._constants.add(_memory(tensor))
                    self._held.append(tensor)
        return out

    def _take(self, func: Any, count: int, args: Any, kwargs: dict[str, Any]) -> None:
        """Note the products of one call, if it is one of a module that can be opened."""
        frame: list[Any] = []
        module = running_module(frame)
        name = None if module is None else self._name_of.get(module)
        if module is None or name is None:
            return
        if self._frames.get(name) is not frame[0]:  # a run of its own: it counts from one
            self._frames[name], self._counts[name] = frame[0], 0
        start = self._counts[name] + 1
        self._counts[name] += count
        if self._is_layer(module) or "forward" in vars(module):
            return
        factors = (args[:3] if count == 2 else _factors(func, args, kwargs)[:2]) if len(args) >= 2 else ()
        if len(factors) < 2 or any(not isinstance(x, Tensor) or _memory(x) in self._constants for x in factors):
            return
        for number in range(start, start + count):
            self.names[f"{name}.product{number}" if name else f"product{number}"] = None


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _has_memory(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_meta and tensor.numel() > 0


_IN_ORDER: Collection[Any] = frozenset(
    {
        torch.matmul,
        torch.bmm,
        torch.mm,
        Tensor.matmul,
        Tensor.bmm,
        Tensor.mm,
        Tensor.__matmul__,
    }
)
_ADDING: Collection[Any] = frozenset({torch.baddbmm, Tensor.baddbmm})


def _count_of(func: Any, args: Any) -> int:
    """How many products a call to a function is."""
    if func is _FUSED:
        return 2
    if func is torch.einsum:
        operands = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
        return int(isinstance(args[0], str) and len(operands) == 2)
    return int(func in _IN_ORDER or func in _ADDING or func is Tensor.__rmatmul__)


def _factors(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any, Function]:
    """What a call multiplies, and how."""
    if func is torch.einsum:
        first, second = args[1] if isinstance(args[1], (list, tuple)) else args[1:]
        return first, second, partial(torch.einsum, args[0])
    if func in _ADDING:
        added, first, second = (*args, *(kwargs[key] for key in ("batch1", "batch2") if key in kwargs))[:3]
        scales = {key: value for key, value in kwargs.items() if key in ("alpha", "beta")}
        return first, second, lambda a, b: torch.baddbmm(added, a, b, **scales)
    first, second = (*args, *(kwargs[key] for key in ("other", "mat2") if key in kwargs))[:2]
    if func is Tensor.__rmatmul__:
        return second, first, torch.matmul
    return first, second, torch.matmul


def _attention(
    scores_of: nn.Module,
    values_of: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(q k^T scale + mask) v, `(..., l, d)`, with a module for each product; see torch's function."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = scores_of(query * scale, key.transpose(-2, -1))
    if is_causal:
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(ahead, -math.inf)
    if attn_mask is not None:
        masked = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -math.inf) if masked else scores + attn_mask
    weights = scores.softmax(-1)
    if attn_mask is not None:
        weights = weights.masked_fill((scores == -math.inf).all(-1, keepdim=True), 0.0)  # as torch has it
    y: Tensor = values_of(F.dropout(weights, dropout_p, dropout_p > 0), value)
    return y
