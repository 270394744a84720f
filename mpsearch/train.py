"""Plain loops that know nothing of search: `steps` is the loop of every training, `fit` the training of a trial.

`reestimate_batch_norm` refreshes running statistics.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.errors import TaskError
from mpsearch.graph.inputs import call as call
from mpsearch.graph.inputs import evaluating, layer_input, map_tensors, tensors
from mpsearch.private.torch import BatchNormNd
from mpsearch.quant.quantizer import Quantizer
from mpsearch.quant.shift import DEFAULT_SLOPE, ShiftQuantizer, SlopeSchedule, set_slope

logger = logging.getLogger(__name__)

CLIP_NORM = 5.0
"""Gradient norm above which a step is shortened: one bad batch must not end a training."""

Loss = Callable[[int, Any, Any, Any], Tensor]
"""(step, input, output, target) -> scalar loss of one batch."""


@dataclass(frozen=True, slots=True)
class FitSettings:
    """How `fit` trains: SGD with Nesterov momentum 0.9 under a one-cycle learning rate."""

    steps: int
    lr: float
    weight_decay: float = 0.0
    bf16: bool = False
    warmup: float = 0.2  # share of the steps in which the rate rises
    range_lr: float = 0.1  # learning rate of quantizer steps and offsets, as a share of `lr`
    slope: SlopeSchedule = DEFAULT_SLOPE  # of soft shift quantizers, where there are any


@dataclass(frozen=True, slots=True)
class FitResult:
    """The training loss over the first and the last tenth of the steps."""

    start_loss: float
    end_loss: float


def jeffreys(output: Tensor, teacher: Tensor) -> Tensor:
    """Jeffreys divergence KL(p||q) + KL(q||p) between two batches of logits `(n, classes)`, averaged over n.

    The distillation loss of GDNSQ (arXiv 2508.14004): temperature 1, no hard labels.
    """
    log_p, log_q = output.float().log_softmax(dim=1), teacher.float().log_softmax(dim=1)
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(dim=1).mean()


class Teacher:
    """The float model's outputs for each training step, computed once.

    Trials of a study train on the same batches in the same order (their scores are then compared like with like),
    so from the second trial on the teacher costs nothing. `keep` says what is kept of an output, up to `limit_bytes`.
    """

    def __init__(self, model: nn.Module, keep: Callable[[Any], Any], *, bf16: bool, limit_bytes: int = 2**27):
        self._model = model.eval()
        self._keep = keep
        self._bf16 = bf16
        self._room = limit_bytes
        self._kept: dict[tuple[int, int], Any] = {}

    @torch.no_grad()
    def __call__(self, seed: int, step: int, x: Any) -> Any:
        """What is kept of the output for batch `step` of the batches with this seed; numbers are float32."""
        if (seed, step) in self._kept:
            return self._kept[seed, step]
        with autocast(x, self._bf16):
            kept = self._keep(call(self._model, x))
        kept = map_tensors(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor, kept)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors(kept))
        if size <= self._room:
            self._room -= size
            self._kept[seed, step] = kept
        return kept


def fit(
    model: nn.Module,
    batches: Iterable[tuple[Any, Any]],
    loss: Loss,
    settings: FitSettings,
    on_step: Callable[[int, float], None] | None = None,
) -> FitResult:
    """Train `model` in place on `settings.steps` batches.

    Raises:
        FloatingPointError: the loss became NaN or infinite.
        TaskError: the batches ended early.
    """
    groups = _parameter_groups(model, settings)
    optimizer = torch.optim.SGD(groups, lr=settings.lr, momentum=0.9, nesterov=True, fused=True)
    soft = [m for m in model.modules() if isinstance(m, ShiftQuantizer)]

    def schedule(step: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = group["share"] * one_cycle(step, settings)
        set_slope(soft, settings.slope.at(step / max(1, settings.steps - 1)))

    losses: list[float] = []
    for step, value in steps(model, batches, loss, [optimizer], settings.steps, schedule, bf16=settings.bf16):
        losses.append(value)
        if on_step is not None:
            on_step(step, value)
    tenth = max(1, len(losses) // 10)
    return FitResult(sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth) if losses else FitResult(0.0, 0.0)


def steps(
    model: nn.Module,
    batches: Iterable[tuple[Any, Any]],
    loss: Loss,
    optimizers: Sequence[torch.optim.Optimizer],
    count: int,
    schedule: Callable[[int], None] = lambda step: None,
    *,
    clipped: Iterable[nn.Parameter] | None = None,
    penalty: Callable[[int, Tensor], Tensor] | None = None,
    bf16: bool = False,
) -> Iterator[tuple[int, float]]:
    """Train `model` in place, one step an iteration: the loop of every training on batches.

    What is to happen after a step is the body of the caller's `for`. Gradients stay until the next step begins.

    Args:
        model: on its device; put into training mode before the first step.
        batches: at least `count`, on any device.
        loss: of a batch.
        optimizers: of its parameters, or of some of them.
        count: of steps.
        schedule: called with the step before its forward pass, to set learning rates.
        clipped: parameters whose gradient's norm is held at CLIP_NORM; default: those of the optimizers.
        penalty: (step, loss) -> what is added to the loss for the gradient; the loss that is yielded is without it.
        bf16: whether the forward pass runs in bfloat16 where that is safe.

    Yields:
        the step, from 0, and its loss before the update.

    Raises:
        FloatingPointError: the loss became NaN or infinite; that step changed nothing.
        TaskError: the batches ended early.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    limited = [p for group in groups for p in group["params"]] if clipped is None else list(clipped)
    done = 0
    model.train()
    for step, (x, y) in zip(range(count), to_device(batches, next(model.parameters()).device), strict=False):
        schedule(step)
        with autocast(x, bf16):
            output = call(model, x)
        value = loss(step, x, output, y)
        number = value.item()
        if not math.isfinite(number):
            raise FloatingPointError(f"the training loss became {number} at step {step} of {count}")
        total = value if penalty is None else value + penalty(step, value)
        model.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(limited, CLIP_NORM, foreach=True)
        for optimizer in optimizers:
            optimizer.step()
        yield step, number
        done = step + 1
    if done < count:
        raise TaskError(f"train_batches gave {done} batches, {count} were asked for: check the task")


def _parameter_groups(model: nn.Module, settings: FitSettings) -> list[dict[str, Any]]:
    """Weights, which decay; biases and norms, which do not; and ranges, which neither decay nor move as fast."""
    groups: dict[str, list[nn.Parameter]] = {"weights": [], "plain": [], "ranges": []}
    ranges = {p for m in model.modules() if isinstance(m, Quantizer) for p in m.parameters(recurse=False)}
    for parameter in model.parameters():
        if parameter.requires_grad:
            name = "ranges" if parameter in ranges else "weights" if parameter.dim() > 1 else "plain"
            groups[name].append(parameter)
    return [
        {"params": groups["weights"], "share": 1.0, "weight_decay": settings.weight_decay},
        {"params": groups["plain"], "share": 1.0},
        {"params": groups["ranges"], "share": settings.range_lr},
    ]


def one_cycle(step: int, settings: FitSettings) -> float:
    """The learning rate of a step: up in a straight line to `lr`, then down half a cosine to zero."""
    rise = max(1, round(settings.warmup * settings.steps))
    if step < rise:
        return settings.lr * (step + 1) / rise
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (step + 1 - rise) / (settings.steps - rise + 1)))


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, batches: Iterable[tuple[Any, Any]]) -> None:
    """Replace BatchNorm's running statistics by the averages over `batches`, weights held still.

    While weights oscillate between grid points the running averages lag behind what the final weights produce
    (white paper, arXiv 2106.08295, §4.3). Everything but the norms is in eval mode: the network that is scored, with
    hard quantizers.
    """
    norms = [m for m in model.modules() if isinstance(m, BatchNormNd) and m.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
    try:
        model.eval()
        for norm in norms:
            norm.train()
        for x, _ in to_device(batches, next(model.parameters()).device):
            call(model, x)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        model.eval()


@torch.no_grad()
def batch_norm_gap(model: nn.Module, x: Any, logits: Callable[[Any], Tensor]) -> float:
    """Jeffreys divergence, nats, between a model with the statistics of this batch and with its own; 0 without norms.

    A few hundredths for the batches that a checkpoint was trained on. Other margins, another scale or order of
    colours give tenths, and then whatever trains on such batches or re-estimates BatchNorm on them does harm at first.
    """
    model = copy.deepcopy(model).eval()
    batch = logits(call(model, x))
    for module in model.modules():
        if isinstance(module, BatchNormNd):
            module.train()
    return float(jeffreys(logits(call(model, x)), batch))


def single_value_norms(model: nn.Module, x: Any) -> tuple[str, ...]:
    """The BatchNorms that get one value a channel from each sample of `x`, by name.

    They cannot be trained on a batch of one sample, as there is no variance: torch raises.
    """
    names: dict[str, None] = {}

    def look(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if math.prod(layer_input(args, kwargs).shape[2:]) == 1:
                names[name] = None

        return hook

    norms = [(name, module) for name, module in model.named_modules() if isinstance(module, BatchNormNd)]
    hooks = [norm.register_forward_pre_hook(look(name), with_kwargs=True) for name, norm in norms]
    try:
        if norms:
            with evaluating(model):
                call(model, x)
    finally:
        for handle in hooks:
            handle.remove()
    return tuple(names)


def samples_of(x: Any) -> int:
    """How many samples a batch has: the length of its first tensor with an axis, or list of tensors; 0 without any."""
    if isinstance(x, Tensor):
        return len(x) if x.dim() else 0
    if isinstance(x, list) and x and all(isinstance(item, Tensor) for item in x):
        return len(x)  # images of different sizes, say
    items = x.values() if isinstance(x, Mapping) else x if isinstance(x, (tuple, list)) else ()
    return next((count for count in map(samples_of, items) if count), 0)


def autocast(x: Any, bf16: bool) -> torch.autocast:
    """Mixed precision on the device where `x` is."""
    first = next(tensors(x), None)
    return torch.autocast("cpu" if first is None else first.device.type, dtype=torch.bfloat16, enabled=bf16)


def to_device(batches: Iterable[tuple[Any, Any]], device: torch.device) -> Iterator[tuple[Any, Any]]:
    """The batches, on a device."""
    for x, y in batches:
        yield tuple(map_tensors(lambda tensor: tensor.to(device, non_blocking=True), part) for part in (x, y))


def bf16_is_fast() -> bool:
    """Whether this machine multiplies bfloat16 in hardware; elsewhere autocast costs more than it saves."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Note the time spent inside as that of a stage."""
    began = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - began


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch's number of threads set to `count` inside, and afterwards as it was."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
