"""The ONNX graph of a network whose sizes depend on its data, as a detector's on how many boxes it finds.

torch.export has to know how sizes go together before the network runs, and gives up where a size is a result. torch's
older exporter writes down which operators ran on an example, and torchvision's detectors have forms of their own for
it. But what Python sees while it writes becomes a constant: a number of boxes, the arm of an `if`. Such a graph is
right on the example and wrong in silence on another input. So it is taken only where

- **Python read no number that was computed from the input** while it was traced (`_Reads`): no decision was made on a
  value;
- **onnxruntime answers as the network does on other inputs**: calibration samples, noise and blank images, some with
  other sizes inside the network than the example has. Both compute in float32 there, without quantizers, so nothing but
  the order of sums may differ. An input on which noise of that order changes the network's answer shows nothing and is
  passed over.

Where no such input is at hand, or one is answered otherwise, the network is refused. Height and width of a list of
images are left open if images of other sizes, too, are answered right; all other sizes are those of the example.
"""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mpsearch.errors import ExportError
from mpsearch.exporters.answers import answers, difference, reference
from mpsearch.exporters.execute import FailedToRun, run_apart
from mpsearch.graph.inputs import call, image_list, map_tensors, tensors
from mpsearch.private.torch import TorchDispatchMode, WeakTensorKeyDictionary, running_module, tree_leaves

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

SINCE, UNTIL = 18, 20
"""The opsets that the older exporter knows."""

OTHERS = 4
"""Inputs beside the example that a traced graph has to answer right."""

FEWEST = 2
"""Of these, how many have to be left when those that float noise changes are passed over."""

SAMPLES = 16
"""How many samples are looked at in search of them."""

SAME = 1e-4
"""Answers of two float networks, up to this share of the largest."""

TIMEOUT_S = 300.0

TORCH = Path(torch.__file__).parent


@dataclass(frozen=True)
class Traced:
    """A traced graph, and on what it was shown to be right."""

    proto: ModelProto
    open_sizes: bool  # of images
    inputs: int  # that were answered right
    rows: tuple[int, ...]  # of the first output, that there were on these: how many boxes

    def to_json(self) -> dict[str, Any]:
        """For the manifest: what it says of a graph that was traced."""
        return {
            "traced": {"checked_on": self.inputs, "rows": list(self.rows)},
            "image_sizes": "any" if self.open_sizes else "as the example's",
        }


class Passed(torch.autograd.Function):
    """The place of a quantizer in a traced graph: `mpsearch::Quantizer` in ONNX, and nothing when it is run."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: str, tensor: str) -> Tensor:
        """A copy."""
        return x.clone()

    @staticmethod
    def symbolic(g: Any, x: Any, layer: str, tensor: str) -> Any:
        """The marker's node."""
        return g.op("mpsearch::Quantizer", x, layer_s=layer, tensor_s=tensor).setType(x.type())


class _Flat(nn.Module):
    """A network from tensors to tensors."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        super().__init__()
        self.model, self.example = model, example
        self.eval()

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The tensors of an input of the example's form -> those of the output."""
        return tuple(tensors(call(self.model, self.like(inputs))))

    def like(self, inputs: Sequence[Tensor]) -> Any:
        """Tensors in the form of the example."""
        remaining = iter(inputs)
        return map_tensors(lambda _: next(remaining), self.example)


class _Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Finds where Python reads a number that was computed from the input.

    TorchScript reads such numbers too, as the count of a loop, which it writes down as a loop: those do no harm.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = {module: name for name, module in model.named_modules() if name}
        self.where: str | None = None
        self._computed: Any = WeakTensorKeyDictionary(dict.fromkeys(inputs))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(x in self._computed for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)):
            self._computed.update(dict.fromkeys(x for x in tree_leaves(out) if isinstance(x, Tensor)))
            if func is torch.ops.aten._local_scalar_dense.default and self.where is None and not _in_script():
                module = running_module()
                name = self.names.get(module) if module else None
                self.where = f"'{name}' ({type(module).__name__})" if name else f"the network ({type(module).__name__})"
        return out


def _in_script() -> bool:
    """Whether the operator that runs was called by TorchScript, not by Python code of torch or of anyone else."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and TORCH in Path(frame.f_code.co_filename).parents:
        if TORCH / "jit" in Path(frame.f_code.co_filename).parents:
            return True
        frame = frame.f_back
    return False


class _Sizes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the shape of whatever is computed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[int, ...]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen += [tuple(x.shape) for x in tree_leaves(out) if isinstance(x, Tensor)]
        return out


@dataclass(frozen=True)
class _Case:
    """An input, what the network answers, and the sizes that there were inside."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    images: int  # that have boxes of their own; 0: rows of a batch
    sizes: int = field(repr=False)  # a hash
    of_other_images: bool

    @property
    def rows(self) -> tuple[int, ...]:
        each = len(self.outputs) // max(1, self.images)
        return tuple(len(x) if x.dim() else 1 for x in self.outputs[::each])


def trace_sizes(
    model: nn.Module, example: Any, samples: Any, opset: int, quiet: Callable[[], AbstractContextManager[None]]
) -> Traced:
    """Trace a network with markers, and show that the graph is right.

    Args:
        model: in eval mode, on the CPU, with `Passed` in place of its quantizers.
        example: a batch of its input.
        samples: more input of that kind, or None.
        opset: the graph's.
        quiet: a context in which torch says nothing.

    Raises:
        ExportError: it cannot be traced, or the graph cannot be shown to be right; the message says why.
    """
    images = image_list(example)
    example = images if images is not None else example
    flat = _Flat(model, example)
    first = _case(flat, tuple(tensors(example)), False)
    _check_reads(flat, first, quiet)
    others = _others(flat, first, samples)
    checked = [first] if _is_steady(flat, first) else []
    same_sizes = [case for case in others if not case.of_other_images]
    if len(same_sizes) < FEWEST:
        raise ExportError("on every other input at hand float noise changes its answer, so nothing shows a trace right")
    if len({case.sizes for case in (first, *same_sizes)}) < 2:
        raise ExportError(
            "sizes inside it are the same on every input at hand, so nothing shows that a trace is right on others: "
            "give QuantizedNetwork samples with more and with fewer boxes"
        )
    if len(same_sizes) < len(others):
        try:
            proto = _traced(flat, first, opset, quiet, open_sizes=True)
            return _shown(proto, [*checked, *others], open_sizes=True)
        except ExportError:
            pass  # a network for images of one size
    proto = _traced(flat, first, opset, quiet, open_sizes=False)
    return _shown(proto, [*checked, *same_sizes], open_sizes=False)


@torch.no_grad()
def _case(flat: _Flat, inputs: tuple[Tensor, ...], of_other_images: bool) -> _Case:
    with _Sizes() as sizes:
        outputs, images = answers(flat.model, flat.like(inputs))
    return _Case(inputs, outputs, images, hash(tuple(sizes.seen)), of_other_images)


def _others(flat: _Flat, first: _Case, samples: Any) -> list[_Case]:
    """Some of the other inputs, with as many different sizes inside as there are, and answers that noise leaves."""
    some: list[_Case] = []
    seen = {first.sizes}
    plain = 0
    for inputs, of_other_images in _inputs(flat, first.inputs, samples):
        if len(some) >= OTHERS and not of_other_images and len(seen) >= FEWEST:
            continue
        try:
            case = _case(flat, inputs, of_other_images)
        except Exception:  # a network for images of one size, say, raises anything
            continue
        new = case.sizes not in seen
        if (plain < FEWEST or new or of_other_images) and _is_steady(flat, case):
            some.append(case)
            seen.add(case.sizes)
            plain += not of_other_images
    return some


def _is_steady(flat: _Flat, case: _Case) -> bool:
    """Whether float noise leaves the answer as it is."""
    noisy = reference(flat.model, flat.like(case.inputs), reruns=2)
    return len(noisy.outputs) == len(case.outputs) and float(noisy.difference.max()) <= SAME / 2 and not noisy.changed


def _inputs(flat: _Flat, example: tuple[Tensor, ...], samples: Any) -> Iterator[tuple[tuple[Tensor, ...], bool]]:
    """Inputs of the example's form, and whether they are images of other sizes: blank ones, samples, noise."""
    generator = torch.Generator().manual_seed(0)

    def floats(change: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        return tuple(change(x) if x.is_floating_point() else x.flip(0) for x in example)

    def noise(spread: float, x: Tensor) -> Tensor:
        return x.mean() + spread * x.std() * torch.randn(x.shape, generator=generator)

    yield floats(torch.zeros_like), False
    yield floats(lambda x: x.mean().expand_as(x).clone()), False
    for inputs in islice(_parts(example, samples), SAMPLES):
        yield inputs, False
    for spread in (1.0, 0.3, 3.0):
        yield floats(partial(noise, spread)), False
    yield floats(lambda x: x.flip(-1)), False
    yield floats(lambda x: x.mean() + 0.5 * (x - x.mean())), False
    yield floats(lambda x: x.mean() + 2 * (x - x.mean())), False
    if isinstance(flat.example, list):
        for height, width in ((0.75, 1.25), (1.5, 1.0)):
            scale = [max(1, round(side * by)) for side, by in zip(example[0].shape[1:], (height, width), strict=True)]
            yield tuple(nn.functional.interpolate(x[None], scale)[0] for x in example), True


def _parts(example: tuple[Tensor, ...], samples: Any) -> Iterator[tuple[Tensor, ...]]:
    """Samples in parts of the example's shapes, without the example."""
    if samples is None:
        return
    images = image_list(samples)
    many = list(images if images is not None else tensors(samples))
    parts: Iterator[tuple[Tensor, ...]]
    if images is not None:
        parts = zip(*[iter(many)] * len(example), strict=False)
    elif len(many) == len(example) and all(x.dim() for x in many):
        size = len(example[0])
        parts = (tuple(x[i : i + size] for x in many) for i in range(0, len(many[0]), size))
    else:
        return
    for part in parts:
        alike = all(x.shape == y.shape and x.dtype == y.dtype for x, y in zip(part, example, strict=True))
        if alike and not all(map(torch.equal, part, example)):
            yield part


def _check_reads(flat: _Flat, first: _Case, quiet: Callable[[], AbstractContextManager[None]]) -> None:
    """In a trace for nothing else: what runs while operators are watched does not get into the graph."""
    reads = _Reads(flat.model, first.inputs)
    try:
        with quiet(), torch.no_grad(), reads:
            torch.jit.trace(flat, first.inputs, check_trace=False)  # type: ignore[no-untyped-call]
    except Exception as error:  # torch raises many kinds
        raise ExportError(_said(error)) from None
    if reads.where is not None:
        raise ExportError(
            f"in {reads.where} Python reads a number that was computed from the input, which a trace makes a constant"
        )


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"


def _traced(
    flat: _Flat, first: _Case, opset: int, quiet: Callable[[], AbstractContextManager[None]], open_sizes: bool
) -> ModelProto:
    """The graph of the example, with markers, at `opset`."""
    import onnx

    names = [f"image_{i}" if isinstance(flat.example, list) else f"input_{i}" for i in range(len(first.inputs))]
    axes = {name: {1: f"height_{i}", 2: f"width_{i}"} for i, name in enumerate(names)} if open_sizes else None
    buffer = io.BytesIO()
    try:
        with quiet(), torch.no_grad():
            torch.onnx.export(
                flat,
                first.inputs,
                buffer,  # type: ignore[arg-type]
                dynamo=False,
                opset_version=min(max(opset, SINCE), UNTIL),
                custom_opsets={"mpsearch": 1},
                input_names=names,
                output_names=_names(flat, first),
                dynamic_axes=axes,
            )
    except Exception as error:  # torch raises many kinds
        raise ExportError(_said(error)) from None
    proto = onnx.load_from_string(buffer.getvalue())
    _plain_weights(proto)
    return proto if opset <= UNTIL else _of_opset(proto, opset)


def _names(flat: _Flat, first: _Case) -> list[str]:
    """`boxes_0`, `labels_0`, ... of what a network answers each image with; else `output_0`, ..."""
    names = [f"output_{i}" for i in range(len(first.outputs))]
    if not first.images:
        return names
    with torch.no_grad():
        answer = call(flat.model, flat.example)
    keys = [f"{key}_{i}" for i, image in enumerate(answer) for key, value in image.items() if isinstance(value, Tensor)]
    return keys if len(keys) == len(names) else names


def _plain_weights(proto: ModelProto) -> None:
    """Give each marker of a weight an initializer of its own, in place, named by its layer.

    The exporter stores equal tensors once, whatever layers they belong to, and puts an Identity before the others.
    """
    graph = proto.graph
    stored = {constant.name: constant for constant in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    done: set[str] = set()
    for node in graph.node:
        values = {attribute.name: attribute.s.decode() for attribute in node.attribute}
        if node.domain != "mpsearch" or values["tensor"] != "weight":
            continue
        source = node.input[0]
        while source in makers and makers[source].op_type == "Identity":
            source = makers[source].input[0]
        name = f"{values['layer']}.quantized_weight"
        if name not in done:
            copied = graph.initializer.add()
            copied.CopyFrom(_constant(stored, makers, source))
            copied.name = name
            done.add(name)
        node.input[0] = name


def _constant(stored: Mapping[str, Any], makers: Mapping[str, NodeProto], name: str) -> Any:
    if name in stored:
        return stored[name]
    maker = makers.get(name)
    if maker is not None and maker.op_type == "Constant":
        return maker.attribute[0].t
    raise ExportError(f"the weight '{name}' is no constant of the graph that was traced")


def _of_opset(proto: ModelProto, opset: int) -> ModelProto:
    """The graph at an opset that the exporter does not know."""
    import onnx_ir
    from onnxscript import version_converter

    model = onnx_ir.from_proto(proto)
    version_converter.convert_version(model, opset, fallback=False)
    converted: ModelProto = onnx_ir.to_proto(model)
    reached = {entry.domain: entry.version for entry in converted.opset_import}[""]
    if reached != opset:
        raise ExportError(
            f"its graph cannot be brought to opset {opset}, which the config needs: {reached} was reached"
        )
    return converted


def _shown(proto: ModelProto, cases: Sequence[_Case], open_sizes: bool) -> Traced:
    """Have onnxruntime run the graph, without quantizers, on all inputs, and compare."""
    import onnx

    plain = type(proto)()
    plain.CopyFrom(proto)
    for node in plain.graph.node:
        if node.domain == "mpsearch":
            node.domain, node.op_type = "", "Identity"
            del node.attribute[:]
    with tempfile.TemporaryDirectory(prefix="mpsearch-traced-") as folder:
        file = Path(folder) / "model.onnx"
        onnx.save(plain, file, save_as_external_data=True, location="model.onnx.data")
        try:
            arrays = run_apart("onnx", file, [x.numpy() for case in cases for x in case.inputs], TIMEOUT_S)
        except FailedToRun as error:
            raise ExportError(f"onnxruntime, given other inputs than the example, {error}") from None
    each = len(arrays) // len(cases)
    for i, case in enumerate(cases):
        _compare(case, tuple(map(torch.from_numpy, arrays[i * each : (i + 1) * each])))
    rows = sorted({number for case in cases for number in case.rows})
    return Traced(proto, open_sizes, len(cases), tuple(rows))


def _compare(case: _Case, theirs: tuple[Tensor, ...]) -> None:
    shapes = [[tuple(x.shape) for x in outputs] for outputs in (case.outputs, theirs)]
    if shapes[0] != shapes[1]:
        i = next(i for i, (a, b) in enumerate(zip(*shapes, strict=True)) if a != b)
        raise ExportError(
            f"the graph that was traced answers an input other than the example with {shapes[1][i]} numbers, the "
            f"network with {shapes[0][i]}: a size was made a constant"
        )
    off = float(difference(case.outputs, theirs, case.images).max())
    if not off <= SAME:
        raise ExportError(
            f"the graph that was traced answers an input other than the example otherwise: by {off:.1e} of the largest "
            f"output, expected at most {SAME:g}"
        )
