"""Plain loops that know nothing of search: `steps` is the loop of every training, `fit` the training of a trial.

`reestimate_batch_norm` refreshes running statistics.

On a card a small network waits for the CPU, which starts its kernels one by one: a step of a ResNet-20 with quantizers
has hundreds of them. So a long training captures the forward pass, the backward pass and the update as CUDA graphs,
which start all of their kernels at once. What is captured reads and writes the same memory at every step: bits, ranges,
slopes and learning rates are data in buffers, and may change from step to step.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mpsearch.compiler import graphs_compiled
from mpsearch.errors import DivergedError, TaskError
from mpsearch.files import require_regular
from mpsearch.graph.inputs import call as call
from mpsearch.graph.inputs import evaluating, layer_input, map_tensors, tensors
from mpsearch.private.torch import BatchNormNd, without_compiled_prefix
from mpsearch.quant.quantizer import Quantizer
from mpsearch.quant.shift import DEFAULT_SLOPE, ShiftQuantizer, SlopeSchedule, set_slope
from mpsearch.state_dict import load_tensors, save_tensors, state

logger = logging.getLogger(__name__)

CLIP_NORM = 5.0
"""Gradient norm above which a step is shortened: one bad batch must not end a training."""

CAPTURE_STEPS = 30
"""Steps of a training from which its passes are captured on a card, which takes about as long as six of them."""
WARM_UP = 3
"""Passes before the capture, at most: they compile, and choose algorithms. One that compiles nothing is the last."""

Loss = Callable[[int, Any, Any, Any], Tensor]
"""(step, input, output, target) -> scalar loss of one batch."""


FALLING = 0.5
"""Share of a rung's steps in which its learning rate falls. A longer rung goes on from where that began."""


@dataclass(frozen=True, slots=True)
class FitSettings:
    """How `fit` trains: SGD with Nesterov momentum 0.9 under a one-cycle learning rate.

    Where the training is one rung of several, the rate stays at its peak between rise and fall, so that the network
    that is scored is a branch: the training before its fall is what the next rung goes on with.
    """

    steps: int  # in all, those that a shorter rung has done included
    lr: float
    weight_decay: float = 0.0
    bf16: bool = False
    warmup: float = 0.2  # share of the steps in which the rate rises
    range_lr: float = 0.1  # learning rate of quantizer steps and offsets, as a share of `lr`
    slope: SlopeSchedule = DEFAULT_SLOPE  # of soft shift quantizers, where there are any
    lengths: tuple[int, ...] = ()  # steps of every rung, where this is one of several

    @property
    def rise(self) -> int:
        """Steps in which the rate rises."""
        return max(1, round(self.warmup * (self.lengths[0] if self.lengths else self.steps)))

    @property
    def fall(self) -> int:
        """The step from which it falls."""
        return max(self.rise, self.steps - round(FALLING * self.steps)) if self.lengths else self.rise

    def slope_at(self, step: int) -> float:
        """The slope at a step. Before the fall it is that of the longest rung, in the fall it goes to its end."""
        if not self.lengths:
            return self.slope.at(step / max(1, self.steps - 1))
        held = min(step, self.fall) / (self.lengths[-1] - 1)
        fallen = max(0, step - self.fall) / max(1, self.steps - 1 - self.fall)
        return self.slope.at(held + (1 - held) * fallen)


@dataclass(frozen=True, slots=True)
class TrainingState:
    """A training before its learning rate falls: what it takes to go on with it."""

    steps: int  # done
    weights: Mapping[str, Tensor]  # of the model, ranges and statistics included
    momentum: Mapping[str, Tensor]  # of SGD, by parameter

    def on_cpu(self) -> TrainingState:
        """The same in the memory of the CPU."""
        parts = (self.weights, self.momentum)
        weights, momentum = ({name: value.detach().cpu() for name, value in part.items()} for part in parts)
        return TrainingState(self.steps, weights, momentum)

    def save(self, path: Path, owner: str) -> None:
        """Write it to one file that names its `owner`, whole or not at all. Raises WriteError."""
        tensors = {f"weights/{name}": value for name, value in self.weights.items()}
        tensors |= {f"momentum/{name}": value for name, value in self.momentum.items()}
        save_tensors(tensors, path, {"steps": str(self.steps), "owner": owner})

    @classmethod
    def load(cls, path: Path, owner: str) -> TrainingState | None:
        """Read what `save` wrote for this owner; None where there is no such file, or it cannot be read."""
        try:
            require_regular(path)
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
            if about["owner"] != owner:
                return None
            parts: dict[str, dict[str, Tensor]] = {"weights": {}, "momentum": {}}
            for name, value in tensors.items():
                part, _, key = name.partition("/")
                parts[part][key] = value
            return cls(int(about["steps"]), parts["weights"], parts["momentum"])
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            logger.warning("%s cannot be read, so that a training begins anew: %s", path, error)
            return None


@dataclass(frozen=True, slots=True)
class FitResult:
    """The training loss over the first and the last tenth of the steps."""

    start_loss: float
    end_loss: float
    state: TrainingState | None = None  # from which a longer rung can go on; where there are rungs


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
        self._room = limit_bytes
        self._kept: dict[tuple[int, int], Any] = {}
        self._pass = ForwardPass(self._model, bf16=bf16, capture=True)

    @torch.no_grad()
    def __call__(self, seed: int, step: int, x: Any) -> Any:
        """What is kept of the output for batch `step` of the batches with this seed; numbers are float32."""
        if (seed, step) in self._kept:
            return self._kept[seed, step]
        kept = self._keep(self._pass(x))
        kept = map_tensors(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor, kept)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors(kept))
        if size <= self._room:
            self._room -= size
            self._kept[seed, step] = kept
        return kept


class ForwardPass:
    """A model's forward pass in mixed precision; on a card, where it may be, captured at the first batch.

    What is captured answers batches of the first one's shape and type, others are answered as without it. Its output
    and gradients hold until the next batch: gradients are not to be added up over several. A model that
    cannot be captured (it decides by values, or its input or output is not one tensor) is run as it is.

    Args:
        model: on its device and in its mode, both of which stay.
        bf16: whether it runs in bfloat16 where that is safe.
        capture: whether it may be captured: between batches nothing but the contents of its parameters and buffers
            changes.
    """

    def __init__(self, model: nn.Module, *, bf16: bool, capture: bool = False) -> None:
        self._model, self._bf16, self._capture = model, bf16, capture
        self._captured: Captured | None = None

    def __call__(self, x: Any) -> Any:
        """The output for a batch; gradients flow from it where they are enabled."""
        captured = self.captured(x)
        return self._run(x) if captured is None else captured(x)

    def captured(self, x: Any) -> Captured | None:
        """What answers this batch by a replay; None: nothing does. The first batch is what is captured."""
        if self._capture:
            self._capture = False
            self._captured = self._try_capture(x)
        return None if self._captured is None or not self._captured.takes(x) else self._captured

    def _run(self, x: Any) -> Any:
        with autocast(x, self._bf16):
            return call(self._model, x)

    def _try_capture(self, x: Any) -> Captured | None:
        if not (isinstance(x, Tensor) and x.is_cuda and not x.requires_grad):
            return None
        trained = [p for p in self._model.parameters() if p.requires_grad] if torch.is_grad_enabled() else []
        buffers = [(buffer, buffer.clone()) for buffer in self._model.buffers()]  # the warm-up moves BatchNorm's
        try:
            return Captured(self._run, x, trained)
        except (RuntimeError, TypeError) as error:
            logger.warning("%s is not captured as a CUDA graph: %s", type(self._model).__name__, error)
            return None
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


class Captured:
    """A forward pass, and its backward pass where parameters are trained, as CUDA graphs.

    Args:
        run: tensor -> tensor, on the card.
        x: a batch.
        trained: the parameters that get gradients; empty: none are computed.

    Raises:
        RuntimeError, TypeError: it cannot be captured.
    """

    def __init__(self, run: Callable[[Tensor], Any], x: Tensor, trained: Sequence[nn.Parameter]) -> None:
        self.x, self.trained = x.clone(), trained
        beside = torch.cuda.Stream(x.device)  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(beside):
            for _ in range(WARM_UP):
                graphs = graphs_compiled()
                output = run(self.x)
                if not isinstance(output, Tensor):
                    raise TypeError(f"its output is a {type(output).__name__}, not one tensor")
                if trained:
                    torch.autograd.grad(output, trained, torch.zeros_like(output), allow_unused=True)
                del output
                if graphs_compiled() == graphs:
                    break
        torch.cuda.current_stream(x.device).wait_stream(beside)
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.forward, capture_error_mode="thread_local"):  # other threads may look at the memory
            output = run(self.x)
        self.output: Tensor = output.detach()
        self.gradients = tuple[Tensor | None, ...]()
        if trained:
            self.gradient = torch.zeros_like(self.output)
            with torch.cuda.graph(self.backward, pool=self.forward.pool(), capture_error_mode="thread_local"):
                gradients = torch.autograd.grad(output, trained, self.gradient, allow_unused=True)
                self.gradients = _apart([self.gradient, *map(_laid_out_as, gradients, trained)])[1:]

    def takes(self, x: Any) -> bool:
        """Whether this is a batch as the first one was."""
        return isinstance(x, Tensor) and (x.shape, x.dtype, x.device) == (self.x.shape, self.x.dtype, self.x.device)

    def __call__(self, x: Tensor) -> Tensor:
        """The output; without gradients a copy, as the next batch overwrites it."""
        if self.trained and torch.is_grad_enabled():
            output: Tensor = _Replay.apply(self, x, *self.trained)  # type: ignore[no-untyped-call]
            return output
        return self.forwards(x).clone()

    def forwards(self, x: Tensor) -> Tensor:
        """The output, which the next batch overwrites; a leaf."""
        self.x.copy_(x)
        self.forward.replay()
        return self.output.detach()

    def backwards(self, gradient: Tensor) -> None:
        """Give all that is trained its gradient, in place of what it had, from that of the last output."""
        self.gradient.copy_(gradient)
        self.backward.replay()
        for parameter, of_parameter in zip(self.trained, self.gradients, strict=True):
            parameter.grad = of_parameter


def _laid_out_as(gradient: Tensor | None, parameter: nn.Parameter) -> Tensor | None:
    """A gradient with the parameter's strides, which optimizers want."""
    if gradient is None or gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def _apart(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The tensors, copied where an earlier one has the same memory: clipping changes each in place."""
    seen: set[int] = set()
    apart: list[Tensor | None] = []
    for tensor in tensors:
        if tensor is not None:
            tensor = tensor.clone() if tensor.untyped_storage().data_ptr() in seen else tensor
            seen.add(tensor.untyped_storage().data_ptr())
        apart.append(tensor)
    return tuple(apart)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, captured: Captured, x: Tensor, *_trained: Tensor) -> Tensor:
        ctx.captured = captured
        output: Tensor = captured.forwards(x)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        captured = ctx.captured
        captured.gradient.copy_(grads[0])
        captured.backward.replay()
        return None, None, *(g if g is None else g.detach() for g in captured.gradients)


class Update:
    """Clipping and the steps of optimizers, which may be captured on a card where gradients stay in one place.

    Of what optimizers are set to, learning rates alone may change from step to step.

    Args:
        optimizers: all fused SGD, else nothing is captured: others may look at numbers on the CPU.
        clipped: parameters whose gradient's norm is held at CLIP_NORM.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], clipped: Sequence[nn.Parameter]) -> None:
        self._optimizers, self._clipped = optimizers, clipped
        self._groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self._capture = all(isinstance(o, torch.optim.SGD) and o.defaults["fused"] for o in optimizers)
        self._begun = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._rates: list[Tensor] = []  # learning rates on the card, by group

    def __call__(self, *, in_place: bool) -> None:
        """One update. The first is not captured: after it momentum has its memory.

        Args:
            in_place: gradients are where they were when this was last so.
        """
        if in_place and self._capture and self._begun:
            self._capture = False
            self._graph = self._try_capture()
        self._begun = True
        if self._graph is None or not in_place:
            self._run()
            return
        for rate, group in zip(self._rates, self._groups, strict=True):
            rate.fill_(group["lr"])
        self._graph.replay()

    def _run(self) -> None:
        torch.nn.utils.clip_grad_norm_(self._clipped, CLIP_NORM, foreach=True)
        for optimizer in self._optimizers:
            optimizer.step()

    def _try_capture(self) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        rates = [group["lr"] for group in self._groups]
        device = self._groups[0]["params"][0].device
        self._rates = [torch.tensor(float(rate), device=device) for rate in rates]
        try:
            for group, rate in zip(self._groups, self._rates, strict=True):
                group["lr"] = rate
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._run()
        except RuntimeError as error:
            logger.warning("the update is not captured as a CUDA graph: %s", error)
            return None
        finally:
            for group, rate in zip(self._groups, rates, strict=True):
                group["lr"] = rate
        return graph


def usual_device() -> torch.device:
    """Where networks are trained and scored: the card, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fit(
    model: nn.Module,
    batches: Iterable[tuple[Any, Any]],
    loss: Loss,
    settings: FitSettings,
    on_step: Callable[[int, float], None] | None = None,
    begun: TrainingState | None = None,
) -> FitResult:
    """Train `model` in place on `settings.steps` batches; of a training that has begun, on as many as are left.

    Raises:
        FloatingPointError: the loss became NaN or infinite.
        TaskError: the batches ended early.
    """
    groups = _parameter_groups(model, settings)
    optimizer = torch.optim.SGD(groups, lr=settings.lr, momentum=0.9, nesterov=True, fused=True)
    soft = [m for m in model.modules() if isinstance(m, ShiftQuantizer) and not m.precision.is_float]
    done = 0
    if begun is not None:
        _go_on(model, optimizer, begun)
        done = begun.steps

    def schedule(step: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = group["share"] * learning_rate(done + step, settings)
        set_slope(soft, settings.slope_at(done + step))

    losses: list[float] = []
    left = begun if begun is not None and begun.steps == settings.fall else None
    for step, value in steps(
        model, batches, loss, [optimizer], settings.steps - done, schedule, bf16=settings.bf16, capture=True
    ):
        losses.append(value)
        if settings.lengths and done + step + 1 == settings.fall:
            left = _training_state(model, optimizer, settings.fall)
        if on_step is not None:
            on_step(done + step, value)
    tenth = max(1, len(losses) // 10)
    ends = (sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth) if losses else (0.0, 0.0)
    return FitResult(*ends, left)


def _training_state(model: nn.Module, optimizer: torch.optim.Optimizer, done: int) -> TrainingState:
    momentum = {
        without_compiled_prefix(name): optimizer.state[parameter]["momentum_buffer"].detach().cpu().clone()
        for name, parameter in model.named_parameters()
        if "momentum_buffer" in optimizer.state.get(parameter, {})
    }
    return TrainingState(done, state(model), momentum)


def _go_on(model: nn.Module, optimizer: torch.optim.Optimizer, begun: TrainingState) -> None:
    """Put model and optimizer where they were."""
    load_tensors(model, begun.weights)
    for name, parameter in model.named_parameters():
        if (momentum := begun.momentum.get(without_compiled_prefix(name))) is not None:
            optimizer.state[parameter]["momentum_buffer"] = momentum.to(parameter.device, parameter.dtype, copy=True)


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
    capture: bool = False,
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
        capture: whether it may be captured on a card, see `ForwardPass`; it is from CAPTURE_STEPS steps on.

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
    forward = ForwardPass(model, bf16=bf16, capture=capture and count >= CAPTURE_STEPS)
    update = Update(optimizers, limited)
    for step, (x, y) in zip(range(count), to_device(batches, next(model.parameters()).device), strict=False):
        schedule(step)
        captured = forward.captured(x) if penalty is None else None
        output = forward(x) if captured is None else captured.forwards(x).requires_grad_()
        value = loss(step, x, output, y)
        number = value.item()
        if not math.isfinite(number):
            raise DivergedError(
                f"the training loss became {number} at step {step} of {count}: lower the learning rate, or look for "
                "values that are not finite in the data"
            )
        if captured is None:
            total = value if penalty is None else value + penalty(step, value)
            model.zero_grad(set_to_none=True)
            total.backward()  # type: ignore[no-untyped-call]
        else:
            captured.backwards(*torch.autograd.grad(value, output))
        update(in_place=captured is not None)
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


def learning_rate(step: int, settings: FitSettings) -> float:
    """The rate of a step: up in a straight line to `lr`, there until the fall, then down half a cosine to zero.

    One-cycle, where it falls as soon as it has risen.
    """
    if step < settings.rise:
        return settings.lr * (step + 1) / settings.rise
    if step < settings.fall:
        return settings.lr
    return (
        settings.lr * 0.5 * (1 + math.cos(math.pi * (step + 1 - settings.fall) / (settings.steps - settings.fall + 1)))
    )


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


def autocast(x: Any, bf16: bool) -> torch.autocast:
    """Mixed precision on the device where `x` is."""
    first = next(tensors(x), None)
    return torch.autocast("cpu" if first is None else first.device.type, dtype=torch.bfloat16, enabled=bf16)


def to_device(batches: Iterable[tuple[Any, Any]], device: torch.device) -> Iterator[tuple[Any, Any]]:
    """The batches, on a device."""
    for x, y in batches:
        yield tuple(map_tensors(lambda tensor: tensor.to(device, non_blocking=True), part) for part in (x, y))


def bf16_in_hardware() -> bool:
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
