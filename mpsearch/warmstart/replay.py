"""A network's forward pass from one of its modules on, everything before it being remembered.

`record` runs the whole network on a batch and keeps the values that its later parts read; `after(module)` then computes
only what depends on that module, which may have changed meanwhile (a quantizer switched on, say). Measuring something
for each layer of a deep network so takes half the time, because on average half of the network lies before a layer.

The graph is that of torch.fx. It stands for the model only if it computes the same: `record` compares the two outputs
on every batch, and values that an operation in place has changed are noticed. What cannot be replayed is said, and
`Whole` is there instead: the same two methods, each a forward pass of the whole network.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from mpsearch.graph.inputs import tensors
from mpsearch.train import call

TOLERANCE = 1e-4
"""By how much the outputs of model and graph may differ, relative to the largest output."""

_OUT_OF_PLACE: Mapping[Any, Any] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
"""`x += y` -> `x + y`: remembered values have to stay what they are."""


class CannotReplay(Exception):
    """Why the graph of a model does not stand for it."""


class Pass(Protocol):
    """A forward pass on one batch after another, each repeated with some module changed."""

    def record(self, x: Any) -> Any:
        """The output for a new batch of model input: a tuple is several arguments, a dict is named ones."""
        ...

    def after(self, module: nn.Module) -> Any:
        """The output for the last batch, `module` being all that has changed since."""
        ...


class Whole:
    """A pass that starts at the input every time: for models that cannot be replayed, and to compare with."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._x: Any = None

    def record(self, x: Any) -> Any:
        """The output for a new batch."""
        self._x = x
        return call(self._model, x)

    def after(self, module: nn.Module) -> Any:
        """The output for the last batch."""
        return call(self._model, self._x)


class Replay:
    """A pass that starts at the module that has changed. Call its methods without gradients.

    Args:
        model: in eval mode.
        modules: those that may change; they are called as they are, not looked into.

    Raises:
        CannotReplay: torch.fx cannot trace the model (control flow that depends on data, say).
    """

    def __init__(self, model: nn.Module, modules: Iterable[nn.Module]) -> None:
        self._model = model
        changing = list(modules)
        try:
            tracer = _Tracer(changing)
            graph = _without_updates(tracer.trace(model))
            self._traced = fx.GraphModule(model, graph)
        except Exception as error:  # whatever a foreign forward does with a proxy
            raise CannotReplay(f"torch.fx cannot trace {type(model).__name__}: {_first_line(error)}") from error
        self._nodes = list(self._traced.graph.nodes)
        self._before = {module: self._independent_of(module) for module in changing}
        read = {
            operand
            for before in self._before.values()
            for node in self._nodes
            if node not in before
            for operand in node.all_input_nodes
            if operand in before
        }
        self._recorder = _Recorder(self._traced, read)
        self._player = fx.Interpreter(self._traced)

    def record(self, x: Any) -> Any:
        """The output for a new batch.

        Raises:
            CannotReplay: the graph computes something else than the model, or changes values that others read.
        """
        expected = call(self._model, x)
        try:
            output = self._recorder.run(*self._arguments(x))
        except Exception as error:
            raise CannotReplay(f"the traced {type(self._model).__name__} fails: {_first_line(error)}") from error
        if not _alike(expected, output):
            raise CannotReplay(f"the traced {type(self._model).__name__} computes something else than the model")
        self._check_values()
        return output

    def after(self, module: nn.Module) -> Any:
        """The output for the last batch. Raises CannotReplay as `record` does."""
        outputs = self._recorder.outputs
        # Nothing that has a value here is computed; those without one are read by nobody behind the module.
        output = self._player.run(initial_env={node: outputs.get(node) for node in self._before[module]})
        self._check_values()
        return output

    def _independent_of(self, module: nn.Module) -> set[fx.Node]:
        """The nodes that compute the same whatever `module` does; the input alone if the graph does not call it."""
        before: set[fx.Node] = set()
        called = False
        for node in self._nodes:
            here = node.op == "call_module" and module in self._traced.get_submodule(str(node.target)).modules()
            called |= here
            if not here and node.op != "output" and before.issuperset(node.all_input_nodes):
                before.add(node)
        return before if called else {node for node in before if node.op == "placeholder"}

    def _arguments(self, x: Any) -> tuple[Any, ...]:
        if isinstance(x, dict):
            return tuple(x[n.target] for n in self._nodes if n.op == "placeholder" and n.target in x)
        return x if isinstance(x, tuple) else (x,)

    def _check_values(self) -> None:
        for node, version in self._recorder.versions.items():
            if _versions(self._recorder.outputs[node]) != version:
                raise CannotReplay(f"an operation in place changes '{node.name}' of {type(self._model).__name__}")


class _Tracer(fx.Tracer):
    def __init__(self, leaves: list[nn.Module]) -> None:
        super().__init__()
        self._leaves = set(leaves)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self._leaves or super().is_leaf_module(m, module_qualified_name)


class _Recorder(fx.Interpreter):
    """Runs the whole graph and keeps the values of some nodes, with the versions that they had."""

    def __init__(self, module: fx.GraphModule, nodes: set[fx.Node]) -> None:
        super().__init__(module)
        self._nodes = nodes
        self.outputs: dict[fx.Node, Any] = {}
        self.versions: dict[fx.Node, list[int]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self._nodes:
            self.outputs[n] = value
            self.versions[n] = _versions(value)
        return value


def _without_updates(graph: fx.Graph) -> fx.Graph:
    """The graph with `x += y` and `x.add_(y)` as `x + y` and `x.add(y)`."""
    for node in graph.nodes:
        if node.op == "call_function":
            node.target = _OUT_OF_PLACE.get(node.target, node.target)
        elif node.op == "call_method" and node.target.endswith("_") and not node.target.endswith("__"):
            plain = node.target.removesuffix("_")
            node.target = plain if hasattr(Tensor, plain) else node.target
    graph.lint()  # type: ignore[no-untyped-call]
    return graph


def _versions(value: Any) -> list[int]:
    return [tensor._version for tensor in tensors(value)]


def _alike(expected: Any, output: Any) -> bool:
    ours, theirs = list(tensors(output)), list(tensors(expected))
    return len(ours) == len(theirs) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE * _largest(b), equal_nan=True)
        for a, b in zip(ours, theirs, strict=True)
    )


def _largest(x: Tensor) -> float:
    finite = x[x.isfinite()].abs()
    return float(finite.max()) if finite.numel() else 0.0


def _first_line(error: Exception) -> str:
    return (str(error).strip().partition("\n")[0] or type(error).__name__)[:200]
