"""The descent: one training in which the bit-width of every tensor is learned while the budget falls.

Each tensor has a real-valued bit-width b and is quantized, as in GDNSQ (arXiv 2508.14004), by additive noise:

    s(b) = 2^t(b),   v = clamp(x / s - o, n(b), p(b)),   y = s (round(v) + o)

t(b): log2 of the step of least squared error, between whole numbers of bits on a straight line; n, p, o: as in
`quant/uniform.py`, at real b. So at a whole number of bits this is the uniform quantizer, and lowering b passes through
ranges that fit. dL/db comes from the chain rule through s, n and p.

Bit-widths do not follow an optimizer. Adam takes the size out of gradients, and under a penalty that dominates all of
them fall at the same speed: a uniform configuration, from which nothing is learned. What should tell layers apart is
their marginal, the loss that a bit saves per unit of cost, which at an optimum under a budget is one and the same:

    m_i = -E[dL/db_i] / (dC/db_i),      b_i <- b_i + k log2(m_i / median m) + l,      l so that C(b) is the budget now

E: exponential mean over steps; C: the study's own cost model, linear between whole numbers of bits. The budget falls
geometrically, fast to the dearest requested one, where little is decided, then slowly; at every requested one the
descent leaves a snapshot of bits and marginals. Its weights are not kept: trials that began with them were no better.

Limits on other costs that are sums fall likewise, to their value by the time of the dearest budget. Where one binds,
the slots that it prices go down further, and its gradient, as a share of its bound, joins that of C. Limits on a peak
are left to the rounding, as are changes of precision between neighbours.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpsearch.cost.model import RelativeCost
from mpsearch.errors import SpaceError
from mpsearch.files import make_folder, write_text
from mpsearch.precision import LayerPrecision, Precision
from mpsearch.quant.fused import Elementwise
from mpsearch.quant.gdnsq import clamp_and_round, grid_shift
from mpsearch.quant.modules import QuantEmbedding
from mpsearch.quant.prepare import insert_quantizers, quant_layers, weight_rows
from mpsearch.space.space import SearchSpace, Slot
from mpsearch.train import steps as training_steps
from mpsearch.warmstart.table import read_descent
from mpsearch.workbench import Workbench

MEMORY = 0.97
"""Weight of the past in the exponential mean of dL/db."""

LARGEST_RATIO = 8.0
"""Marginals are taken as at most this factor away from the median: one batch must not throw a tensor to the ends."""

APPROACH = 0.25
"""Share of the steps in which the budget falls from the dearest config to the dearest requested budget."""

SHARE_OF_LR = 0.3
"""Learning rate of the descent, as a share of the trials' peak: it has no phase in which a high rate dies away."""


class BitQuantizer(Elementwise):
    """One tensor's uniform quantizer at a real-valued bit-width.

    Args:
        log_steps: `(widths, ...)`, log2 of the best step at each whole number of bits, from `first` up.
        betas: `(widths,)`, the lower end at each width of an activation that takes negative values; else None.
        first: the smallest number of bits.
        signed: symmetric signed codes (weights) instead of unsigned ones (activations).
        axis: of the channels.
    """

    log_steps: Tensor
    betas: Tensor | None

    def __init__(self, log_steps: Tensor, betas: Tensor | None, first: int, *, signed: bool, axis: int = 0) -> None:
        super().__init__()
        self.first, self.signed, self.axis = first, signed, axis
        self.register_buffer("log_steps", log_steps, persistent=False)
        self.register_buffer("betas", betas, persistent=False)
        self.bits = nn.Parameter(torch.tensor(float(first + len(log_steps) - 1)))

    def between(self, table: Tensor) -> Tensor:
        """A row of a table `(widths, ...)` at b: linear between whole numbers of bits."""
        at = (self.bits - self.first).clamp(0, len(table) - 1)
        low = at.detach().floor().clamp(max=max(len(table) - 2, 0)).long()
        high = (low + 1).clamp(max=len(table) - 1)
        below, above = table.index_select(0, low.reshape(1))[0], table.index_select(0, high.reshape(1))[0]
        return below + (at - low) * (above - below)

    def forward(self, x: Tensor) -> Tensor:
        """The quantized tensor, of the type of `x`; computed in float32 at least."""
        s = torch.exp2(self.between(self.log_steps))
        levels = torch.exp2(self.bits)
        if self.signed:
            o = grid_shift(self.bits)
            low, high = -levels / 2 + o, levels / 2 - 1 + o
        else:
            zero = torch.zeros_like(self.bits)
            o = zero if self.betas is None else torch.round(self.between(self.betas) / s).detach()
            low, high = o, levels - 1 + o
        parts = (s, (s * o).detach(), s * low, s * high)
        return self.run(clamp_and_round, x, *parts, owner=("residual", "ste", False), axis=self.axis)


@dataclass(frozen=True)
class Snapshot:
    """What the descent had learned when it reached one budget."""

    budget: float  # relative cost
    step: int
    bits: Mapping[str, float]  # real-valued, by slot name
    marginals: Mapping[str, float]  # loss that a bit saves per unit of relative cost, by slot name
    slopes: Mapping[str, float]  # -dLoss/dbit, by slot name
    loss: float  # exponential mean of the training loss

    @property
    def imbalance(self) -> float:
        """The deviation of log2 of the marginals that are not at an end of their range: 0 is an optimum."""
        logs = torch.tensor([math.log2(m) for m in self.marginals.values() if m > 0])
        return float(logs.std()) if len(logs) > 1 else 0.0


@dataclass(frozen=True)
class Descent:
    """The snapshots of one run, from dear to cheap, and what happened at every step."""

    snapshots: tuple[Snapshot, ...]
    log: tuple[Mapping[str, Any], ...]  # step, loss, cost, imbalance, bits by slot
    seconds: float

    def save(self, folder: Path) -> None:
        """Write `descent.json`. Raises WriteError."""
        make_folder(folder)
        rows = [vars(snapshot) for snapshot in self.snapshots]
        document = {"seconds": self.seconds, "snapshots": rows, "log": list(self.log)}
        write_text(folder / "descent.json", json.dumps(document))

    @classmethod
    def load(cls, folder: Path) -> Descent:
        """Read what `save` wrote. Raises RunError: it is missing or damaged."""
        document = read_descent(folder)
        snapshots = tuple(Snapshot(**row) for row in document["snapshots"])
        return cls(snapshots, tuple(document["log"]), document["seconds"])


class BitCost:
    """The relative cost of real-valued bits: the cost model at whole numbers, linear between them in each tensor.

    Raises:
        SpaceError: the cost model is no sum over layers.
    """

    def __init__(self, cost: RelativeCost, space: SearchSpace) -> None:
        if cost.combined_by is not sum:
            raise SpaceError(
                "the cost model is no sum over layers, which the descent needs: set warm_start.method to none, or take "
                "a cost model such as shift_energy, bops or weight_bytes"
            )
        self._fixed = cost.of_float_layers
        at = {(name, slot.tensor): i for i, slot in enumerate(space.slots) for name in slot.layers}
        self._weight = torch.tensor([at[name, "weight"] for name in space.layers])  # slots, by layer
        self._activation = torch.tensor([at[name, "activation"] for name in space.layers])
        wide = max(len(slot_bits(slot)) for slot in space.slots)
        self._pairs = torch.zeros(len(space.layers), wide, wide, dtype=torch.float64)  # costs; the rest is never read
        self._first = torch.tensor([slot_bits(slot)[0] for slot in space.slots], dtype=torch.float64)
        for index, name in enumerate(space.layers):
            w, a = at[name, "weight"], at[name, "activation"]
            of_w, of_a = slot_bits(space.slots[w]), slot_bits(space.slots[a])
            pairs = (
                [
                    [
                        cost.addend(name, LayerPrecision(_at_bits(space.slots[w], i), _at_bits(space.slots[a], j)))
                        for j in of_a
                    ]
                    for i in of_w
                ]
                if name not in space.pairs and not cost.rows_only
                else _between_pairs(cost, space, name, space.slots[w], space.slots[a])
            )
            self._pairs[index, : len(pairs), : len(pairs[0])] = torch.tensor(pairs, dtype=torch.float64)
        self._last = torch.tensor([len(slot_bits(slot)) - 1 for slot in space.slots])

    def __call__(self, bits: Tensor) -> Tensor:
        """Relative cost, differentiable; `bits` `(slots,)` float64."""
        at = bits - self._first
        below = torch.minimum(at.detach().floor().long().clamp_min(0), (self._last - 1).clamp_min(0))
        above = torch.minimum(below + 1, self._last)
        share = at - below
        layers = torch.arange(len(self._pairs))
        i, j, u, v = below[self._weight], below[self._activation], share[self._weight], share[self._activation]
        i_next, j_next = above[self._weight], above[self._activation]
        pairs = self._pairs
        cost = (1 - u) * ((1 - v) * pairs[layers, i, j] + v * pairs[layers, i, j_next])
        cost = cost + u * ((1 - v) * pairs[layers, i_next, j] + v * pairs[layers, i_next, j_next])
        return self._fixed + cost.sum()

    def gradient(self, bits: Tensor) -> Tensor:
        """dC/db `(slots,)`."""
        bits = bits.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(self(bits), bits)
        return gradient


def _between_pairs(
    cost: RelativeCost, space: SearchSpace, name: str, weight: Slot, activation: Slot
) -> list[list[float]]:
    """What a layer with excluded pairs costs at whole numbers of bits, (weight, activation).

    At a pair that is excluded the layer runs as the cheapest one that is at least as wide in both, or the dearest there
    is; between the widths on offer the cost is linear.
    """
    offered = [[c.bits for c in uniform_choices(slot)] for slot in (weight, activation)]
    allowed = {
        (pair.weight.bits, pair.activation.bits): cost.addend(name, pair)
        for pair in space.options[name]
        if pair.weight in uniform_choices(weight) and pair.activation in uniform_choices(activation)
    } or {(max(offered[0]), max(offered[1])): max(cost.addend(name, pair) for pair in space.options[name])}

    def price(w: int, a: int) -> float:
        wider = [its_cost for (i, j), its_cost in allowed.items() if i >= w and j >= a]
        return min(wider, default=max(allowed.values()))

    corners = np.array([[price(w, a) for a in offered[1]] for w in offered[0]])
    widths = [np.arange(bits[0], bits[-1] + 1) for bits in offered]
    rows = np.stack([np.interp(widths[1], offered[1], row) for row in corners])
    between = np.stack([np.interp(widths[0], offered[0], column) for column in rows.T], axis=1)
    return [[float(value) for value in row] for row in between]


def uniform_choices(slot: Slot) -> list[Precision]:
    """The uniform choices of a slot, by bits; of a slot that is float and nothing else, that.

    Raises:
        SpaceError: there is none.
    """
    if len(slot.choices) == 1 and slot.choices[0].is_float:
        return list(slot.choices)
    choices = sorted((c for c in slot.choices if c.quantizer == "uniform"), key=lambda c: c.bits)
    if not choices:
        raise SpaceError(f"'{slot.name}' offers no uniform precision, which the descent learns: offer some bits of it")
    return choices


def _at_bits(slot: Slot, bits: int) -> Precision:
    return replace(uniform_choices(slot)[0], bits=bits)


def slot_bits(slot: Slot) -> range:
    """From the smallest to the largest number of bits of a slot's uniform choices."""
    choices = uniform_choices(slot)
    return range(choices[0].bits, choices[-1].bits + 1)


def reachable_budgets(price: BitCost, space: SearchSpace, budgets: Sequence[float]) -> list[float]:
    """The budgets that lie between the cheapest uniform config and the dearest one, dear ones first.

    Where none does, as on hardware on which W8A8 is the cheapest, as many are spread evenly over what there is, in log
    cost; `Problem.warnings` says so.

    Raises:
        SpaceError: all uniform configs cost the same.
    """
    bottom, top = (
        float(price(torch.tensor([slot_bits(slot)[end] for slot in space.slots], dtype=torch.float64)))
        for end in (0, -1)
    )
    if targets := sorted((b for b in budgets if bottom <= b < top), reverse=True):
        return targets
    if bottom >= top:
        raise SpaceError(
            f"all uniform configs of space '{space.name}' cost {top:.3g}: there is no budget to descend to; do without "
            "the descent (warm_start.method=none), or allow other precisions in the space"
        )
    steps = range(1, len(budgets) + 1)
    return [top * (bottom / top) ** (step / (len(budgets) + 1)) for step in steps]


def descend(
    workbench: Workbench,
    space: SearchSpace,
    cost: RelativeCost,
    budgets: Sequence[float],
    steps: int,
    seed: int = 0,
    lr: float | None = None,
    spread: float = 0.01,
    on_step: Callable[[int, float], None] | None = None,
) -> Descent:
    """Run the descent once.

    Args:
        workbench: the task's workbench: float model, ranges, teacher, batches.
        space: what may be chosen; slots with one choice keep it.
        cost: the study's cost model, a sum over layers.
        budgets: relative costs at which a snapshot is wanted; those above the dearest config are left out.
        steps: batches.
        seed: of the batches.
        lr: of the weights; rises in the first tenth of the steps, then stays. Default: SHARE_OF_LR of the trials' peak.
        spread: k of the module's top, bits a step for every octave between a marginal and the median; 0 gives a
            uniform descent, the baseline.
        on_step: called with (step, training loss).

    Raises:
        SpaceError: a slot without uniform choices, or a cost model that is no sum over layers.
        FloatingPointError: the loss became NaN or infinite.
    """
    began = time.perf_counter()
    price = BitCost(cost, space)
    task = workbench.task
    model = with_bit_quantizers(task.float_model(), workbench, space).to(workbench.device)
    workbench.compile_quantizers(model)
    by_slot = _quantizers_of(model, space)
    low, high = (torch.tensor([slot_bits(slot)[end] for slot in space.slots], dtype=torch.float64) for end in (0, -1))
    bits = high.clone()
    top = float(price(high))
    targets = reachable_budgets(price, space, budgets)
    limits = _limits(cost, space, high)
    binding: list[tuple[_Limit, float]] = []
    quantizers = [q for group in by_slot for q in group]
    of_quantizers = {p for q in quantizers for p in q.parameters()}
    weights = [p for p in model.parameters() if p not in of_quantizers]
    lr = SHARE_OF_LR * workbench.settings.lr if lr is None else lr
    optimizer = torch.optim.SGD(weights, lr=lr, momentum=0.9, nesterov=True)
    slopes = torch.zeros(len(bits), dtype=torch.float64)
    mean_loss = 0.0
    log: list[Mapping[str, Any]] = []
    snapshots: list[Snapshot] = []

    def schedule(step: int) -> None:
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / (0.1 * steps))

    batches = workbench.train_batches(steps, seed)
    for step, value in training_steps(
        model, batches, workbench.loss(seed), [optimizer], steps, schedule, bf16=workbench.bf16, capture=True
    ):
        budget = budget_at((step + 1) / steps, top, targets[0], targets[-1])
        fresh = _slopes(by_slot)
        slopes = MEMORY * slopes + (1 - MEMORY) * fresh
        mean_loss = MEMORY * mean_loss + (1 - MEMORY) * value
        unbiased = 1 - MEMORY ** (step + 1)
        gradient = price.gradient(bits)
        for limit, bound in binding:
            gradient = gradient + limit.price.gradient(bits) * (budget / bound)
        marginals = _marginals(slopes / unbiased, gradient)
        free = (high > low) & (marginals > 0)
        pull = _pull(marginals, free)
        bits, binding = within_bounds(price, limits, bits + spread * pull, low, high, budget, (step + 1) / steps)
        for group, b in zip(by_slot, bits.tolist(), strict=True):
            for quantizer in group:
                quantizer.bits.data.fill_(b)
        names = [slot.name for slot in space.slots]
        inside = free & (bits > low) & (bits < high)
        state = Snapshot(
            budget,
            step,
            dict(zip(names, bits.tolist(), strict=True)),
            {n: m for n, m, i in zip(names, marginals.tolist(), inside.tolist(), strict=True) if i},
            dict(zip(names, (slopes / unbiased).tolist(), strict=True)),
            mean_loss / unbiased,
        )
        if step % max(1, steps // 200) == 0 or step == steps - 1:
            log.append(
                {"step": step, "loss": value, "cost": budget, "imbalance": state.imbalance, "bits": dict(state.bits)}
            )
        while len(snapshots) < len(targets) and budget <= targets[len(snapshots)] * (1 + 1e-9):
            snapshots.append(replace(state, budget=targets[len(snapshots)]))
        if on_step is not None:
            on_step(step, value)
    return Descent(tuple(snapshots), tuple(log), time.perf_counter() - began)


def budget_at(progress: float, top: float, dearest: float, cheapest: float) -> float:
    """The budget when a share of the steps is done: geometrically from `top` to `dearest`, then on to `cheapest`.

    >>> [budget_at(progress / 4, top=1.0, dearest=0.5, cheapest=0.0625) for progress in range(5)]
    [1.0, 0.5, 0.25, 0.125, 0.0625]
    """
    approach = APPROACH if dearest > cheapest else 1.0
    if progress <= approach:
        return top * math.pow(dearest / top, progress / approach)
    return dearest * math.pow(cheapest / dearest, (progress - approach) / (1 - approach))


def with_bit_quantizers(model: nn.Module, workbench: Workbench, space: SearchSpace) -> nn.Module:
    """A copy of a float model with a BitQuantizer for every tensor, at its largest number of bits."""
    quantized = insert_quantizers(model, workbench.layers)
    for name, layer in quant_layers(quantized).items():
        slots = {slot.tensor: slot for slot in space.slots if name in slot.layers}
        weight, activation = uniform_choices(slots["weight"]), uniform_choices(slots["activation"])
        if layer.has_weight:
            rows = weight_rows(layer)
            shape = layer.weight_quantizer.step.shape
            granularity = "channel" if weight[0].group is not None else weight[0].granularity  # bits of a channel
            steps = [
                torch.log2(workbench.ranges.weight(name, Precision("uniform", b, granularity), rows)).reshape(shape)
                for b in slot_bits(slots["weight"])
            ]
            layer.weight_quantizer = BitQuantizer(  # type: ignore[assignment]
                torch.stack(steps), None, weight[0].bits, signed=True, axis=layer.channel_axis
            )
        else:
            if weight[0].is_float:
                raise SpaceError(f"'{name}/weight' is float alone, which the descent cannot learn: offer some bits")
            seconds = [
                workbench.ranges.second(name, Precision("uniform", b, "tensor")) for b in slot_bits(slots["weight"])
            ]
            lower = torch.stack([beta for _, beta in seconds]) if layer.weight_quantizer.beta is not None else None
            layer.weight_quantizer = BitQuantizer(  # type: ignore[assignment]
                torch.stack([torch.log2(step) for step, _ in seconds]), lower, weight[0].bits, signed=False
            )
        if activation[0].is_float and not isinstance(layer, QuantEmbedding):
            raise SpaceError(f"'{name}/activation' is float alone, which the descent cannot learn: offer some bits")
        ranges = [
            (torch.ones(()), torch.zeros(()))  # what only looks up reads no activation
            if isinstance(layer, QuantEmbedding)
            else workbench.ranges.activation(name, Precision("uniform", b, activation[0].granularity))
            for b in slot_bits(slots["activation"])
        ]
        betas = torch.stack([beta for _, beta in ranges]) if layer.input_quantizer.beta is not None else None
        layer.input_quantizer = BitQuantizer(  # type: ignore[assignment]
            torch.stack([torch.log2(step) for step, _ in ranges]), betas, activation[0].bits, signed=False
        )
    return quantized


def limit_at(progress: float, top: float, most: float) -> float:
    """A limit when a share of the steps is done: geometrically from `top` to what it is, as the dearest budget."""
    return most if top <= most else top * math.pow(most / top, min(1.0, progress / APPROACH))


def on_budget(price: BitCost, bits: Tensor, low: Tensor, high: Tensor, budget: float) -> Tensor:
    """The bits `(slots,)` shifted by one number for all, within their ends, so that their cost is the budget."""
    least, most = float((low - bits).min()), float((high - bits).max())
    for _ in range(40):
        middle = (least + most) / 2
        if float(price(torch.clamp(bits + middle, low, high))) > budget:
            most = middle
        else:
            least = middle
    return torch.clamp(bits + least, low, high)


@dataclass(frozen=True)
class _Limit:
    """A limit on a cost that is a sum, as the descent keeps it."""

    price: BitCost
    top: float  # the cost at the largest numbers of bits
    most: float
    priced: Tensor  # (slots,) whether a slot's bits change the cost

    def at(self, progress: float) -> float:
        """The limit when a share of the steps is done: as the budget, it has fallen by the dearest requested one."""
        return (
            self.most
            if self.top <= self.most
            else self.top * math.pow(self.most / self.top, min(1.0, progress / APPROACH))
        )


def _limits(cost: RelativeCost, space: SearchSpace, high: Tensor) -> list[_Limit]:
    summed = [(BitCost(bound.cost, space), bound.most) for bound in cost.limits if bound.cost.combined_by is sum]
    return [_Limit(price, float(price(high)), most, price.gradient(high) > 0) for price, most in summed]


def within_bounds(
    price: BitCost, limits: Sequence[_Limit], bits: Tensor, low: Tensor, high: Tensor, budget: float, progress: float
) -> tuple[Tensor, list[tuple[_Limit, float]]]:
    """The bits on the budget, those that a limit prices lower still where it is tighter.

    Returns:
        the bits `(slots,)`, and the limits that bind, each with what it is now.
    """
    bits = on_budget(price, bits, low, high, budget)
    binding: dict[int, tuple[_Limit, float]] = {}
    for _ in range(3):  # what a limit takes from some slots the budget gives to others, which another limit may price
        for index, limit in enumerate(limits):
            bound = limit.at(progress)
            if float(limit.price(bits)) > bound:
                binding[index] = limit, bound
                top = torch.where(limit.priced, high, bits)
                bits = on_budget(limit.price, bits, torch.where(limit.priced, low, bits), top, bound)
                high = torch.where(limit.priced, bits, high)
        bits = on_budget(price, bits, low, high, budget)
    return bits, list(binding.values())


def _marginals(slopes: Tensor, prices: Tensor) -> Tensor:
    """Loss that a bit saves per unit of relative cost; 0 where it saves none or costs none."""
    return torch.where(prices > 0, slopes.clamp_min(0) / prices.clamp_min(1e-30), torch.zeros_like(slopes))


def _pull(marginals: Tensor, free: Tensor) -> Tensor:
    """log2 of each marginal over their median, within LARGEST_RATIO; a tensor that saves nothing is pulled down."""
    if not bool(free.any()):
        return torch.zeros_like(marginals)
    ratio = marginals / marginals[free].median()
    return torch.log2(ratio.clamp(1 / LARGEST_RATIO, LARGEST_RATIO))


def _slopes(by_slot: Sequence[Sequence[BitQuantizer]]) -> Tensor:
    """-dL/db of each slot, the sum over its quantizers, `(slots,)` float64 on the CPU: read from a card all at once."""
    gradients = [torch.zeros_like(q.bits) if q.bits.grad is None else q.bits.grad for group in by_slot for q in group]
    numbers = iter(torch.stack(gradients).tolist())
    return torch.tensor([-sum(next(numbers) for _ in group) for group in by_slot], dtype=torch.float64)


def _quantizers_of(model: nn.Module, space: SearchSpace) -> list[list[BitQuantizer]]:
    layers: Mapping[str, Any] = quant_layers(model)
    attribute = {"weight": "weight_quantizer", "activation": "input_quantizer"}
    return [[getattr(layers[name], attribute[slot.tensor]) for name in slot.layers] for slot in space.slots]
