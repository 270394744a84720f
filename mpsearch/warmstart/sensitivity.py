"""Sensitivity: what quantizing one tensor, all others left float, does to a network. No training, no labels.

Four proxies, each a table (layer, tensor, precision) -> value, 0 for float, less being better:

    kl        mean over samples of KL(p || q) = sum_c p_c log(p_c / q_c), p of the float, q of the quantized network
    jeffreys  KL(p || q) + KL(q || p)
    fit       Tr(F) * mean (Q(x) - x)^2,   Tr(F) = mean over samples of |d log p(y) / dx|^2, x the weight or the input
    sqnr      mean (Q(x) - x)^2 / mean x^2, the inverse of the signal-to-quantization-noise ratio

Of a regression, which has no classes, kl and jeffreys are both the mean squared error from the float network's output
over that output's variance; where a task's outputs are not compared at all (detection), they are sqnr.

The divergences run the network once per entry, but only from the layer on (`replay.py`). FIT is that of arXiv
2210.08502: the trace of the Fisher information times the power of the quantization noise; we measure that power on the
tensor instead of assuming step^2 / 12, and draw y from the network itself (the Fisher information proper) unless labels
are given (the empirical one of the paper).

A table adds up tensors as if their effects did not meet, and knows nothing of what fine-tuning will repair: `rank.py`
measures what it is worth.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpsearch.errors import TaskError
from mpsearch.graph.facts import LayerInfo
from mpsearch.graph.inputs import layer_input, tensors
from mpsearch.precision import FLOAT, Precision
from mpsearch.quant.prepare import RangeSetter, insert_quantizers, quant_layers
from mpsearch.space.choices import TENSORS, TensorName
from mpsearch.space.space import SearchSpace
from mpsearch.task.comparing import Comparison, comparison, relative_error
from mpsearch.train import call
from mpsearch.warmstart.replay import CannotReplay, Pass, Replay, Whole
from mpsearch.warmstart.table import Key, SensitivityTable, check_proxy

Logits = Callable[[Any], Tensor]
LOGITS = comparison("the network", None)
"""How outputs that are logits `(n, classes)` are compared."""


class Divergences(NamedTuple):
    """Both divergences of the same forward passes."""

    kl: SensitivityTable
    jeffreys: SensitivityTable


def measure(
    proxy: str,
    model: nn.Module,
    layers: Sequence[LayerInfo],
    space: SearchSpace,
    x: Any,
    compared: Comparison | None = LOGITS,
    ranges: RangeSetter | None = None,
) -> SensitivityTable:
    """The table of any proxy, with the defaults of its own function.

    Args:
        proxy: its name.
        model, layers, space, x, ranges: as for `divergences`.
        compared: how outputs are compared; None: they are not, and sqnr takes the place of another proxy, which the
            table's notes say.

    Raises:
        MpsearchError: no such proxy, or not of such outputs.
        TaskError: the output cannot be compared.
    """
    check_proxy(proxy)
    if proxy == "sqnr" or compared is None:
        table = sqnr(model, layers, space, x, ranges=ranges)
        notes = () if proxy == "sqnr" else (f"sqnr instead of {proxy}: the outputs of this task are not compared",)
        return SensitivityTable("sqnr", dict(table), table.samples, table.seconds, (*table.notes, *notes))
    if proxy == "fit":
        if not compared.classes:
            raise TaskError("fit is of networks that tell classes apart, and this one gives numbers: take kl or sqnr")
        return fit(model, layers, space, x, logits=compared.rows, ranges=ranges)
    both = divergences(model, layers, space, x, logits=compared.rows, classes=compared.classes, ranges=ranges)
    return both.kl if proxy == "kl" else both.jeffreys


@torch.no_grad()
def divergences(
    model: nn.Module,
    layers: Sequence[LayerInfo],
    space: SearchSpace,
    x: Any,
    *,
    logits: Logits = lambda output: output,
    classes: bool = True,
    ranges: RangeSetter | None = None,
    batch_size: int = 64,
    reuse: bool = True,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Divergences:
    """KL and Jeffreys divergence of the logits to the float model's, for every choice of every tensor.

    Args:
        model: the float model, which is left untouched.
        layers: its layers.
        space: the precisions to measure.
        x: model input, on the model's device: any nesting of tensors; a tuple is several arguments.
        logits: model output -> `(n, classes)`, or `(n, numbers)`.
        classes: whether a row is logits; else both divergences are the mean squared error over the variance.
        ranges: what sets ranges; default: one on `x`.
        batch_size: samples at a time; what the layers read of one batch is kept in memory.
        reuse: compute the part of the network before a layer once; False: every time, to compare with.
        on_progress: called with (samples done, all samples).

    Raises:
        TaskError: the logits are not `(n, classes)`.
    """
    began = time.perf_counter()
    probe = _Probe(model, layers, space, x, ranges)
    samples = _samples(x)
    notes: list[str] = []
    totals: dict[Key, Tensor] | None = None
    if reuse:
        try:
            replay = Replay(probe.model, probe.layers.values())
            totals = _divergence_totals(replay, probe, x, samples, batch_size, logits, classes, on_progress)
        except CannotReplay as reason:
            notes.append(f"every forward pass started at the input, because {reason}")
    if totals is None:
        totals = _divergence_totals(Whole(probe.model), probe, x, samples, batch_size, logits, classes, on_progress)
    seconds = time.perf_counter() - began
    means = {key: (total / samples).tolist() for key, total in totals.items()}
    kl, jeffreys = (
        SensitivityTable(proxy, {key: mean[i] for key, mean in means.items()}, samples, seconds, tuple(notes))
        for i, proxy in enumerate(("kl", "jeffreys"))
    )
    return Divergences(kl, jeffreys)


def fit(
    model: nn.Module,
    layers: Sequence[LayerInfo],
    space: SearchSpace,
    x: Any,
    *,
    logits: Logits = lambda output: output,
    labels: Tensor | None = None,
    ranges: RangeSetter | None = None,
    batch_size: int = 1,
    seed: int = 0,
) -> SensitivityTable:
    """FIT (arXiv 2210.08502): the trace of the Fisher information times the noise power; see the module's top.

    The trace needs each sample's own gradient. Inputs give it in any batch; of a weight, a batch gives the sum g of
    its samples' gradients, so with more than one each sample gets a random sign: E |sum_i r_i g_i|^2 = sum_i |g_i|^2.

    Args:
        model, layers, space, x, logits, ranges: as for `divergences`.
        labels: `(n,)`, the true classes; default: drawn from the model's own distribution.
        batch_size: 1 is exact; more is faster on a GPU and noisier.
        seed: of the drawn labels and signs.

    Raises:
        TaskError: the logits are not `(n, classes)`.
    """
    began = time.perf_counter()
    probe = _Probe(model, layers, space, x, ranges)
    samples = _samples(x)
    traces = _fisher_traces(probe, x, samples, logits, labels, batch_size, seed)
    entries = {
        (name, tensor, p): traces[name, tensor] * probe.noise_power(name, tensor, p) for name, tensor, p in probe
    }
    return SensitivityTable("fit", entries, samples, time.perf_counter() - began)


def sqnr(
    model: nn.Module,
    layers: Sequence[LayerInfo],
    space: SearchSpace,
    x: Any,
    *,
    ranges: RangeSetter | None = None,
) -> SensitivityTable:
    """Noise-to-signal power of each tensor, 10^(-SQNR/10) with SQNR in dB. Arguments as for `divergences`."""
    began = time.perf_counter()
    probe = _Probe(model, layers, space, x, ranges)
    entries = {
        (name, tensor, p): probe.noise_power(name, tensor, p) / probe.power(name, tensor) for name, tensor, p in probe
    }
    return SensitivityTable("sqnr", entries, _samples(x), time.perf_counter() - began)


class _Probe:
    """A quantized copy of a float model, of which one tensor at a time is quantized; iterates over what to measure."""

    def __init__(
        self, model: nn.Module, layers: Sequence[LayerInfo], space: SearchSpace, x: Any, ranges: RangeSetter | None
    ) -> None:
        device = next((tensor.device for tensor in tensors(x)), None)
        self.model = insert_quantizers(model, layers, space.offers).to(device).eval()
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # which torch's stub forgets
        self.layers = quant_layers(self.model)
        self.ranges = ranges or RangeSetter(model, layers, x)
        choices = {(name, slot.tensor): slot.choices for slot in space.slots for name in slot.layers}
        self._keys: list[Key] = [
            (name, tensor, choice)
            for name in space.layers
            for tensor in TENSORS
            for choice in choices[name, tensor]
            if not choice.is_float
        ]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._keys)

    @contextlib.contextmanager
    def quantized(self, name: str, tensor: TensorName, precision: Precision) -> Iterator[None]:
        """This tensor quantized, all others float."""
        layer = self.layers[name]
        quantizer = layer.weight_quantizer if tensor == "weight" else layer.input_quantizer
        quantizer.set_precision(precision)
        try:
            if tensor == "weight":
                quantizer.set_range(*self.ranges.for_weight(name, precision, layer))
            else:
                quantizer.set_range(*self.ranges.activation(name, precision))
            yield
        finally:
            quantizer.set_precision(FLOAT)

    @torch.no_grad()
    def noise_power(self, name: str, tensor: TensorName, precision: Precision) -> float:
        """mean (Q(x) - x)^2."""
        layer, x = self.layers[name], self._values(name, tensor)
        with self.quantized(name, tensor, precision):
            q = (layer.weight_quantizer if tensor == "weight" else layer.input_quantizer)(x)
        return float((q.double() - x.double()).square().mean())

    @torch.no_grad()
    def power(self, name: str, tensor: TensorName) -> float:
        """mean x^2, never 0."""
        return float(self._values(name, tensor).double().square().mean().clamp_min(torch.finfo(torch.float64).tiny))

    def _values(self, name: str, tensor: TensorName) -> Tensor:
        layer = self.layers[name]
        if tensor == "activation":
            return self.ranges.samples(name)
        return cast(Tensor, layer.weight) if layer.has_weight else self.ranges.seconds(name)


def _divergence_totals(
    run: Pass,
    probe: _Probe,
    x: Any,
    samples: int,
    batch_size: int,
    logits: Logits,
    classes: bool,
    on_progress: Callable[[int, int], None],
) -> dict[Key, Tensor]:
    """Sums over the samples, `(2,)` each: KL and Jeffreys."""
    totals = {key: torch.zeros(2, dtype=torch.float64) for key in probe}
    for start in range(0, samples, batch_size):
        batch = _rows(x, start, start + batch_size, samples)
        prepared = _log_probabilities if classes else Tensor.double
        log_p = prepared(logits(run.record(batch)))
        for name, tensor, precision in probe:
            with probe.quantized(name, tensor, precision):
                log_q = prepared(logits(run.after(probe.layers[name])))
            if classes:
                forward = (log_p.exp() * (log_p - log_q)).sum()
                backward = (log_q.exp() * (log_q - log_p)).sum()
                totals[name, tensor, precision] += torch.stack([forward, forward + backward]).cpu()
            else:
                totals[name, tensor, precision] += (len(log_p) * relative_error(log_q, log_p)).double().cpu()
        on_progress(min(start + batch_size, samples), samples)
    return totals


def _fisher_traces(
    probe: _Probe, x: Any, samples: int, logits: Logits, labels: Tensor | None, batch_size: int, seed: int
) -> dict[tuple[str, TensorName], float]:
    """Tr(F) of each tensor: the mean over samples of the squared gradient of log p(y)."""
    random = torch.Generator().manual_seed(seed)
    model, layers = probe.model, probe.layers
    model.requires_grad_(False)
    weights = {
        name: cast(nn.Parameter, layer.weight).requires_grad_() for name, layer in layers.items() if layer.has_weight
    }
    # A weight that several layers hold has one gradient: each of them gets its share.
    holders = {name: sum(other is weight for other in weights.values()) for name, weight in weights.items()}
    read: dict[str, list[Tensor]] = {name: [] for name in layers}
    seconds: dict[str, list[Tensor]] = {name: [] for name, layer in layers.items() if not layer.has_weight}

    def reads(name: str) -> Callable[..., tuple[Any, Any] | None]:
        def hook(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
            # A copy, whose gradient passes through this layer alone; others may read the same tensor.
            x = layer_input(args, kwargs)
            if not x.is_floating_point():  # an embedding's entries
                return None
            copy = x.clone() if x.requires_grad else x.clone().requires_grad_()
            read[name].append(copy)
            if name in seconds:  # called with both factors by position
                second = args[1].clone() if args[1].requires_grad else args[1].clone().requires_grad_()
                seconds[name].append(second)
                return (copy, second, *args[2:]), kwargs
            if args:
                return (copy, *args[1:]), kwargs
            return args, {key: copy if value is x else value for key, value in kwargs.items()}

        return hook

    handles = [layer.register_forward_pre_hook(reads(name), with_kwargs=True) for name, layer in layers.items()]
    totals = {(name, tensor): 0.0 for name in layers for tensor in TENSORS}
    try:
        for start in range(0, samples, batch_size):
            for inputs in (*read.values(), *seconds.values()):
                inputs.clear()
            with torch.enable_grad():
                log_p = _log_probabilities(logits(call(model, _rows(x, start, start + batch_size, samples))))
            if labels is None:
                y = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=random).squeeze(1)
            else:
                y = labels[start : start + batch_size].cpu()
            signs = torch.randint(0, 2, y.shape, generator=random) * 2 - 1 if len(y) > 1 else torch.ones_like(y)
            score = -F.nll_loss(log_p * signs.to(log_p)[:, None], y.to(log_p.device), reduction="sum")
            sources = [((name, "weight"), weight) for name, weight in weights.items()]
            sources += [((name, "activation"), copy) for name, inputs in read.items() for copy in inputs]
            sources += [((name, "weight"), copy) for name, inputs in seconds.items() for copy in inputs]
            gradients = torch.autograd.grad(score, [source for _, source in sources], allow_unused=True)
            for (key, _), gradient in zip(sources, gradients, strict=True):
                totals[cast(Any, key)] += 0.0 if gradient is None else float(gradient.double().square().sum())
    finally:
        for handle in handles:
            handle.remove()
    return {
        (name, tensor): total / samples / (holders.get(name, 1) if tensor == "weight" else 1)
        for (name, tensor), total in totals.items()
    }


def _log_probabilities(logits: Tensor) -> Tensor:
    """`(n, classes)` in float64: the divergence of an 8-bit tensor is lost in float32."""
    if logits.dim() != 2:
        raise TaskError(
            f"sensitivities need logits (n, classes), got a tensor of shape {tuple(logits.shape)}: "
            "let the task's `logits` return that part of the output"
        )
    return logits.double().log_softmax(dim=1)


def _samples(x: Any) -> int:
    first = next(tensors(x), None)
    if first is None or not first.dim() or not len(first):
        raise TaskError("there is no calibration sample: give model input with at least one")
    return len(first)


def _rows(x: Any, start: int, stop: int, samples: int) -> Any:
    """Some samples of model input; a tensor without a row for each sample belongs to all of them."""
    if isinstance(x, Tensor):
        x = x[start:stop] if x.dim() and len(x) == samples else x
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x  # convolutions are faster so
    if isinstance(x, dict):
        return {key: _rows(value, start, stop, samples) for key, value in x.items()}
    if isinstance(x, tuple | list):
        return type(x)(_rows(value, start, stop, samples) for value in x)
    return x
