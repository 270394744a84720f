"""Training with GDNSQ (arXiv 2508.14004): bit-widths fall under a penalty until every layer holds its target.

    loss = base + t * mean(base) * [m_w mean relu(b_w - (W - e)) + m_a mean relu(b_a - (A - e))]

base: Jeffreys divergence to the float network (or the task's own loss), mean(base) its running mean, without gradient;
b_w, b_a: the bit-widths now, of every channel of a weight and of every activation; W, A: their targets, per layer;
m_w, m_a: the shares of the violated constraints that are weights' and activations'; e = 1e-3; t grows by the same
amount at each step. The learning rate stays constant until the *true* bits, those of the integer codes, are down at
the target (`GdnsqQuantizer.true_bits`); from then on it is annealed. BatchNorm is neither folded nor frozen.

How we differ. The paper trains for hundreds of epochs and lets every rate be 2e-3; ours are for a given number of
steps. In a share of them (`descent`) a ceiling above all targets comes down from 10 bits to 1 while the rate of the
weights rises; quantizer parameters move as fast as it takes to follow the ceiling. The penalty moves steps alone:
ranges only follow the base loss. After convergence rates fall along half a cosine, and on the symmetric grid, which is
ours, bit-widths are held at the targets and ranges set anew, for least squared error of the weights and activations
that the descent has led to; from there steps go on learning, so that the model ends as one of `UniformQuantizer`s.
Targets may differ between layers, and no bit-width falls below 1.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from mpsearch.errors import PrecisionError, nearest
from mpsearch.graph.facts import LayerInfo
from mpsearch.graph.products import named_products
from mpsearch.precision import Precision, PrecisionConfig, per_tensor
from mpsearch.qat.trained import Trained
from mpsearch.quant.gdnsq import GdnsqQuantizer, RoundGradient, StepGradient, WeightGrid
from mpsearch.quant.groups import steps_of_groups
from mpsearch.quant.modules import QuantEmbedding, QuantLayer
from mpsearch.quant.prepare import (
    RangeSetter,
    insert_quantizers,
    quant_layers,
    sample_factors,
    weight_rows,
    without_products,
)
from mpsearch.quant.ranges import activation_range, weight_step
from mpsearch.quant.uniform import take_grid
from mpsearch.task.task import Task
from mpsearch.train import reestimate_batch_norm, timed
from mpsearch.train import steps as training_steps
from mpsearch.workbench import Workbench

logger = logging.getLogger(__name__)

EPSILON = 1e-3
START_BITS = 10
CHECK_EVERY = 20  # steps between two looks at the true bits

Optimizer = Literal["adam", "radam", "sgd"]


@dataclass(frozen=True, slots=True)
class GdnsqMethod:
    """What GDNSQ does; the defaults are what our ablation chose for trainings of a few epochs."""

    gradual: bool = False  # start at 10 bits and descend; else start at the target, ranges of least squared error
    descent: float = 0.2  # share of the steps in which the ceiling falls from 10 bits to 1, and the rate rises
    penalty: float = 100.0  # t at the last step; the paper's grows by 4e-3 a step, to about this
    anneal: bool = True
    optimizer: Optimizer = "sgd"  # of weights, radam is the paper's; quantizer parameters always have Adam
    lr: float = 0.02
    range_lr: float = 5e-5  # of the quantizer parameters; of steps, once the target is reached
    step_gradient: StepGradient = "residual"
    round_gradient: RoundGradient = "ste"
    weight_grid: WeightGrid = "symmetric"

    def __post_init__(self) -> None:
        for name, kinds in (
            ("optimizer", Optimizer),
            ("step_gradient", StepGradient),
            ("round_gradient", RoundGradient),
            ("weight_grid", WeightGrid),
        ):
            if (value := getattr(self, name)) not in get_args(kinds):
                raise PrecisionError(f"unknown {name} '{value}': {nearest(value, get_args(kinds))}")


BINARY = GdnsqMethod(optimizer="adam", lr=0.03, range_lr=2e-3)
"""Rates for networks whose tensors have 1 bit for the most part, where a range that hardly moves holds it back.

A weight of 1 bit counts by its sign alone, so that it has to be moved as far as it is wide, whatever its layer's scale:
steps of one size for all layers do that in fewer of them. digits_cnn at w1a1, 45 epochs, seed 0, top-1 on val (359
images) and training loss: Adam 0.003 68.5 %, 4.9; 0.01 77.2 %, 3.4; 0.03 84.1 %, 2.9; SGD 0.05 81.3 %, 3.2.

`mpsearch train digits --method gdnsq --target w1a1`, seed 0, with all layers at 1 bit, the pixels and the classifier
too: `--epochs 90` 86.9 % on val, 81.6 % on test; `--epochs 200` 89.7 %, 89.7 % (float 98.6 %, 99.2 %). The same of
resnet20-cifar10-jpeg, whose first and last layer the space fixes at 8 bits: `--epochs 2` 65.4 %, 67.6 %; `--epochs 20`
71.4 %, 70.9 % (float 88.5 %, 88.2 %; published after hundreds of epochs, of another float network: 86.5 % of 92.8 %).
"""


def method_for(config: PrecisionConfig) -> GdnsqMethod:
    """What GDNSQ does where nobody says it."""
    bits = [p.bits for layer in config.values() for p in (layer.weight, layer.activation) if not p.is_float]
    return BINARY if 2 * bits.count(1) > len(bits) else GdnsqMethod()


@dataclass
class Penalty:
    """The exterior-point penalty of one training: the formula at the module's top.

    Args:
        targets: W and A of every layer.
        growth: what t grows by at each step.
        moves_ranges: whether the gradient of an activation's bit-width moves its range too, as in the paper.
    """

    targets: Mapping[str, tuple[float, float]]  # (W, A) by layer; infinite where nothing is asked
    growth: float
    t: float = 0.0
    moves_ranges: bool = False
    _sum: float = 0.0
    _count: int = 0

    def __call__(self, base: Tensor, layers: Mapping[str, QuantLayer], ceiling: float = 0.0) -> Tensor:
        """The penalty to add to `base` (shape ()); counts one step. No target is below `ceiling` for now."""
        now = {name: (max(w, ceiling), max(a, ceiling)) for name, (w, a) in self.targets.items()}
        weights, activations = excess_bits(layers, now, self.moves_ranges)
        self._sum, self._count = self._sum + float(base.detach()), self._count + 1
        t, self.t = self.t, self.t + self.growth
        violated_w, violated_a = (weights > 0).sum(), (activations > 0).sum()
        share_w = violated_w / (violated_w + violated_a).clamp_min(1)
        share_a = violated_a / (violated_w + violated_a).clamp_min(1)
        mean = self._sum / self._count
        return t * mean * (share_w * weights.mean() + share_a * activations.mean())


def excess_bits(
    layers: Mapping[str, QuantLayer], targets: Mapping[str, tuple[float, float]], moves_ranges: bool = False
) -> tuple[Tensor, Tensor]:
    """relu(b - (target - e)) of every weight channel and of every activation, both `(n,)`."""
    weights: list[Tensor] = []
    activations: list[Tensor] = []
    for name, layer in layers.items():
        for target, quantizer, weight in _learned(layer, targets[name]):
            bits = quantizer.bits(weight, moves_range=moves_ranges and weight is None)
            (activations if weight is None else weights).append((bits.flatten() - (target - EPSILON)).relu())
    zero = torch.zeros(1)
    return torch.cat(weights or [zero]), torch.cat(activations or [zero])


def _learned(layer: QuantLayer, targets: tuple[float, float]) -> list[tuple[float, GdnsqQuantizer, Tensor | None]]:
    """Of each tensor with a learnable bit-width its target, its quantizer, and the weight; None of an activation."""
    weight = cast(Tensor, layer.weight) if layer.has_weight else None
    both = (targets[0], layer.weight_quantizer, weight), (targets[1], layer.input_quantizer, None)
    return [(target, q, x) for target, q, x in both if isinstance(q, GdnsqQuantizer)]


def gdnsq(
    task: Task,
    config: PrecisionConfig,
    workbench: Workbench,
    steps: int,
    seed: int = 0,
    method: GdnsqMethod | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> Trained:
    """Train the network of `task` down to `config` with learnable bit-widths.

    Args:
        task: what is compressed.
        config: the target of each layer: uniform weights per channel or group, uniform activations, or float.
        workbench: the float network's workbench, for layers, ranges, the teacher and how to train.
        steps: batches.
        seed: of the batches.
        method: what GDNSQ does; default: as `method_for` says.
        on_step: called with (step, training loss).

    Raises:
        PrecisionError: a target that GDNSQ cannot have.
        FloatingPointError: the loss became NaN or infinite.
    """
    method = method or method_for(config)
    check_targets(config, groups=method.weight_grid == "symmetric")
    seconds: dict[str, float] = {}
    with timed(seconds, "prepare"):
        model = learnable(task.float_model(), workbench.layers, config, workbench.ranges, method).to(workbench.device)
        workbench.compile_quantizers(model)
        torch.manual_seed(seed)
    with timed(seconds, "train"):
        log, notes = _train(task, model, config, workbench, steps, seed, method, on_step)
    with timed(seconds, "finish"):
        model = deployed(model, config, task.float_model(), workbench.layers).to(workbench.device)
        if workbench.settings.bn_batches:
            batches = workbench.train_batches(workbench.settings.bn_batches, seed + 1)
            reestimate_batch_norm(model, batches)
    return Trained(model.eval(), workbench.layers, config, seconds, tuple(log), notes)


def _train(
    task: Task,
    model: nn.Module,
    config: PrecisionConfig,
    workbench: Workbench,
    steps: int,
    seed: int,
    method: GdnsqMethod,
    on_step: Callable[[int, float], None] | None,
) -> tuple[list[dict[str, float]], tuple[str, ...]]:
    """The training loop; the model is trained in place. Returns what happened, and notes."""
    layers = quant_layers(model)
    targets = bit_targets(config, layers)
    penalty = Penalty(targets, method.penalty / steps)
    quantizers = [q for q in model.modules() if isinstance(q, GdnsqQuantizer)]
    log_steps = [q.log_s for q in quantizers]
    ends = [p for q in quantizers for p in (q.log_q, q.beta) if p is not None]
    of_quantizers = {*log_steps, *ends}
    weights = [p for p in model.parameters() if p not in of_quantizers]
    # RAdam's first thousand steps are a warm-up, which would be most of a short training's descent.
    of_steps, of_ends = (
        torch.optim.Adam(group or [torch.zeros(1, requires_grad=True)], lr=method.range_lr, betas=(0.5, 0.99))
        for group in (log_steps, ends)
    )
    of_weights = weight_optimizer(weights, method)
    speed = (START_BITS - 1) / max(1.0, method.descent * steps) if method.gradual else 0.0
    log: list[dict[str, float]] = []
    converged: int | None = None
    factor = 1.0

    def schedule(step: int) -> None:
        nonlocal factor
        factor = min(1.0, (step + 1) / max(1.0, method.descent * steps))
        if method.anneal and converged is not None:
            factor = min(factor, 0.5 * (1 + math.cos(math.pi * (step - converged) / (steps - converged))))
        _set_lr(of_weights, method.lr * factor)
        _set_lr(of_ends, method.range_lr * factor)
        # On the way down bits can fall twice as fast as the ceiling.
        _set_lr(of_steps, method.range_lr * factor if converged is not None else max(method.range_lr, 2 * speed))

    def excess_penalty(step: int, base: Tensor) -> Tensor:
        return penalty(base, layers, START_BITS - speed * step if method.gradual else 0.0)

    batches = workbench.train_batches(steps, seed)
    for step, value in training_steps(
        model,
        batches,
        workbench.loss(seed),
        (of_steps, of_ends, of_weights),
        steps,
        schedule,
        clipped=weights,
        penalty=excess_penalty,
        bf16=workbench.bf16,
    ):
        keep_two_levels(layers)
        if step % CHECK_EVERY == 0 or step == steps - 1:
            excess = violation(layers, targets)
            if converged is None and excess <= 0:
                converged = step
                if method.weight_grid == "symmetric":
                    if method.gradual:
                        set_ranges(model, config, task.calibration_input(workbench.settings.calibration_samples))
                    hold(layers, targets)
                logger.info("all layers are at their targets after %d of %d steps", step, steps)
            log.append(logged(step, value, layers, excess, penalty.t, factor))
        if on_step is not None:
            on_step(step, value)
    notes: tuple[str, ...] = ()
    if converged is None:
        notes = (f"true bits were still {log[-1]['excess']:.2f} above the target when the steps ended: train longer",)
    return log, notes


def weight_optimizer(weights: Sequence[nn.Parameter], method: GdnsqMethod) -> torch.optim.Optimizer:
    """What trains the weights, biases and norms."""
    if method.optimizer == "sgd":
        return torch.optim.SGD(weights, lr=method.lr, momentum=0.9, nesterov=True)
    kind = torch.optim.Adam if method.optimizer == "adam" else torch.optim.RAdam
    return kind(weights, lr=method.lr)


@torch.no_grad()
def set_ranges(model: nn.Module, config: PrecisionConfig, calibration_input: Any) -> None:
    """Give every GDNSQ quantizer the step of least squared error for what it quantizes now, in place."""
    layers = quant_layers(model)
    training = model.training
    inputs, seconds = sample_factors(model.eval(), list(layers), calibration_input)
    model.train(training)
    for name, layer in layers.items():
        weight = layer.weight_quantizer
        activations = [(layer.input_quantizer, config[name].activation, inputs[name])]
        if not layer.has_weight:
            activations.append((weight, per_tensor(config[name].weight), seconds[name]))
        elif isinstance(weight, GdnsqQuantizer):
            step = weight_step(weight_rows(layer), config[name].weight)
            weight.log_s.copy_(torch.log2(step).reshape(weight.log_s.shape))
        for activation, precision, values in activations:
            if isinstance(activation, GdnsqQuantizer):
                step, beta = activation_range(values, precision, signed=activation.beta is not None)
                activation.log_s.copy_(torch.log2(step))
                if activation.beta is not None:
                    activation.beta.copy_(beta)


def hold(layers: Mapping[str, QuantLayer], targets: Mapping[str, tuple[float, float]]) -> None:
    """Hold all bit-widths at their targets, in place."""
    for name, layer in layers.items():
        for target, quantizer in zip(targets[name], (layer.weight_quantizer, layer.input_quantizer), strict=True):
            if isinstance(quantizer, GdnsqQuantizer):
                quantizer.hold(target)


@torch.no_grad()
def keep_two_levels(layers: Mapping[str, QuantLayer]) -> None:
    """Hold every learned bit-width at 1 or more, in place."""
    for layer in layers.values():
        for quantizer in (layer.weight_quantizer, layer.input_quantizer):
            if isinstance(quantizer, GdnsqQuantizer) and quantizer.log_q is not None:
                quantizer.log_s.copy_(torch.minimum(quantizer.log_s, quantizer.log_q - 1))


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    optimizer.param_groups[0]["lr"] = lr


def learnable(
    model: nn.Module,
    layers: Sequence[LayerInfo],
    config: PrecisionConfig,
    ranges: RangeSetter,
    method: GdnsqMethod,
) -> nn.Module:
    """A copy of a float model with GDNSQ quantizers wherever `config` asks for fewer bits.

    Gradual: 2^10 levels over the whole range of weight and activation. Otherwise the target's bits over the range of
    least squared error.
    """
    if method.weight_grid == "min":
        without_products(layers, "gdnsq on the grid of the paper")
    quantized = insert_quantizers(model, layers)
    make: Any = functools.partial(
        GdnsqQuantizer, step_gradient=method.step_gradient, round_gradient=method.round_gradient
    )

    def of_activation(precision: Precision, values: Tensor, best: Callable[[], tuple[Tensor, Tensor]]) -> Any:
        bits = max(START_BITS, precision.bits) if method.gradual else precision.bits
        low, high = float(values.min()), float(values.max())
        ends = torch.tensor((high - low) / (2**bits - 1)), torch.tensor(low)
        return (ends if method.gradual else best()), torch.tensor(2.0**bits)

    for name, layer in quant_layers(quantized).items():
        weight, activation = config[name].weight, config[name].activation
        if not weight.is_float and layer.has_weight:
            layer.weight_quantizer = _learnable_weight(name, layer, weight, ranges, method, make)
        elif not weight.is_float:
            (step, beta), levels = of_activation(
                weight, ranges.seconds(name), functools.partial(ranges.second, name, weight)
            )
            signed = layer.weight_quantizer.beta is not None
            layer.weight_quantizer = make(step, levels, beta=beta if signed else None)
        if not activation.is_float and not isinstance(layer, QuantEmbedding):
            (step, beta), levels = of_activation(
                activation, ranges.samples(name), functools.partial(ranges.activation, name, activation)
            )
            signed = layer.input_quantizer.beta is not None
            layer.input_quantizer = make(step, levels, beta=beta if signed else None)
    return quantized


def _learnable_weight(
    name: str, layer: QuantLayer, precision: Precision, ranges: RangeSetter, method: GdnsqMethod, make: Any
) -> Any:
    """The GDNSQ quantizer of a weight, with a step for each channel or group."""
    rows, group = weight_rows(layer), precision.group
    bits = max(START_BITS, precision.bits) if method.gradual else precision.bits
    if method.weight_grid == "min":
        step = (rows.amax(dim=1) - rows.amin(dim=1)) / (2**bits - 1)
    elif method.gradual:
        size = rows.shape[1] if group is None else group
        step = steps_of_groups(rows, size, lambda some: some.abs().amax(dim=1) / (2 ** (bits - 1) - 1))
    else:
        step = ranges.weight(name, precision, rows)
    shape = layer.weight_quantizer.step.shape if group is None else (-1, 1)
    return make(
        step.reshape(shape),
        torch.tensor(2.0**bits),
        weight_grid=method.weight_grid,
        group=group,
        axis=layer.channel_axis,
    )


@torch.no_grad()
def deployed(
    model: nn.Module, config: PrecisionConfig, float_model: nn.Module, layers: Sequence[LayerInfo]
) -> nn.Module:
    """The same network with the uniform quantizers that its GDNSQ quantizers have become, at the bits of `config`.

    A tensor keeps its range, Q. On the symmetric grid that is exact where bit-widths are held at the config's; on the
    paper's grid, which becomes an offset grid, wherever the true bits are no more than the config's.
    """
    twin = insert_quantizers(float_model, layers)
    trained = quant_layers(model)
    state = {k: v for k, v in model.state_dict().items() if "_quantizer." not in k}
    twin.load_state_dict(state, strict=False)
    for name, layer in quant_layers(twin).items():
        layer.set_precision(config[name])
        weight, activation = trained[name].weight_quantizer, trained[name].input_quantizer
        on_offset_grid = isinstance(weight, GdnsqQuantizer) and weight.weight_grid == "min"
        for quantizer, learned, x in (
            (layer.weight_quantizer, weight, cast(Tensor, layer.weight) if layer.has_weight else None),
            (layer.input_quantizer, activation, None),
        ):
            if isinstance(learned, GdnsqQuantizer) and on_offset_grid:
                take_grid(quantizer, *learned.offset_grid(x))
            elif isinstance(learned, GdnsqQuantizer):
                step = torch.exp2(learned.log_range() - quantizer.precision.bits)
                quantizer.set_range(step, learned.lower_end())
    return twin.train(model.training)


def violation(layers: Mapping[str, QuantLayer], targets: Mapping[str, tuple[float, float]]) -> float:
    """How many true bits the worst tensor is above its target; 0 or less: all are there."""
    worst = -math.inf
    for name, layer in layers.items():
        for target, quantizer, weight in _learned(layer, targets[name]):
            worst = max(worst, quantizer.true_bits(weight) - target)
    return worst


@torch.no_grad()
def mean_bits(layers: Mapping[str, QuantLayer]) -> tuple[float, float]:
    """The mean learned bits over weights (each the mean of its channels) and over activations; NaN without any."""
    weights: list[float] = []
    activations: list[float] = []
    for layer in layers.values():
        for _, quantizer, weight in _learned(layer, (0.0, 0.0)):
            (activations if weight is None else weights).append(float(quantizer.bits(weight).mean()))
    return tuple(sum(v) / len(v) if v else math.nan for v in (weights, activations))  # type: ignore[return-value]


def logged(
    step: int, loss: float, layers: Mapping[str, QuantLayer], excess: float, t: float, lr_factor: float
) -> dict[str, float]:
    """A row of a training's log."""
    weight_bits, activation_bits = mean_bits(layers)
    return {
        "step": step,
        "loss": loss,
        "weight_bits": weight_bits,
        "activation_bits": activation_bits,
        "excess": excess,
        "t": t,
        "lr_factor": lr_factor,
    }


def bit_targets(config: PrecisionConfig, names: Iterable[str]) -> dict[str, tuple[float, float]]:
    """W and A of each layer named; infinite for what stays float."""

    def bits(precision: Precision) -> float:
        return math.inf if precision.is_float else float(precision.bits)

    return {name: (bits(config[name].weight), bits(config[name].activation)) for name in names}


def check_targets(config: PrecisionConfig, groups: bool = True) -> None:
    """Refuse targets that GDNSQ cannot have.

    Raises:
        PrecisionError: a layer's quantizers are not uniform, or its weight is not per channel, or per group if `groups`
            may be.
    """
    products = set(named_products(config))
    for name, layer in config.items():
        for precision in (layer.weight, layer.activation):
            if precision.quantizer not in ("uniform", "float"):
                raise PrecisionError(f"layer '{name}' is to be {precision}: GDNSQ trains uniform quantizers only")
        in_groups = groups and layer.weight.group is not None
        if name in products or layer.weight.is_float or layer.weight.granularity == "channel" or in_groups:
            continue
        instead = (
            "GDNSQ trains weights per channel or group" if groups else "GDNSQ as published trains weights per channel"
        )
        raise PrecisionError(f"layer '{name}' is to be {layer.weight}: {instead}")
