"""Do learned input thresholds for activations gain anything over the uniform quantizer?

Nonuniform-to-uniform quantization (N2UQ, https://arxiv.org/abs/2111.14826): the levels of a tensor stay uniform, and
the 2^b - 1 thresholds between which an input goes to them are learned. Both arms train the same config, weights
uniform, from the same float network on the same batches, as trials do. They differ in the quantizer of the inputs that
the space does not fix: the new one is here and not in mpsearch, as long as it has not been shown to gain. Prints score
and divergence of each arm, and the paired differences from uniform.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.options import RESULTS, PrintOnly, Results, Seeds, Set, Study, Threads, several
from benchmarks.printing import print_table, say, spread
from benchmarks.rows import Row, Rows
from benchmarks.stopwatch import Stopwatch
from mpsearch.precision import LayerPrecision, Precision
from mpsearch.problem import Problem, open_problem
from mpsearch.quant.prepare import quant_layers
from mpsearch.quant.uniform import UniformQuantizer
from mpsearch.study import load_study
from mpsearch.train import FitSettings, Teacher, fit, learning_rate
from mpsearch.workbench import Workbench

UNIFORM = "uniform"

NARROWEST = 2.0**-6
"""Narrower intervals, in steps, are taken as this: the slope is one over it."""


class NonuniformQuantizer(UniformQuantizer):
    """An unsigned tensor's quantizer with learned intervals: levels s * k, thresholds anywhere.

        q(x) = s * sum_k [v > t_k],             v = x/s,  t_k = (e_(k-1) + e_k) / 2,  k = 1 ... 2^b - 1
        dq   = s * d sum_k clamp((v - e_(k-1)) / a_k, 0, 1),  e_0 = `start`,  e_k = e_(k-1) + a_k

    The second line is the expectation of q under a rounding that takes either neighbour at random, the nearer one more
    often: the generalized straight-through estimator (§3.2). From it follow the gradients of x, of the ends and,
    through v, LSQ's of s. With all widths a_k = 1 and a start of 0 it is the uniform quantizer, in value and gradient.
    We differ from the paper in two points. One s stands for its two scales, one before the thresholds and one after
    the levels: the ends make up for the other. And the last line goes on for half a width, as our uniform quantizer's
    does, whose gradient passes wherever v rounds to a level.

    `start` and `widths`, in steps, are no parameters of the module, so that `fit` trains and clips both arms alike;
    Adam moves them beside it, as in the authors' code.

    Args:
        quantizer: the uniform quantizer whose place it takes.
    """

    start: Tensor
    widths: Tensor

    def __init__(self, quantizer: UniformQuantizer) -> None:
        if quantizer.signed or quantizer.offset:
            raise ValueError("a tensor that takes negative values has an offset, which is not made here")
        super().__init__(1, 0, signed=False, offset=False, elements=quantizer.elements)
        self.start, self.widths = torch.zeros(()), torch.ones(1)
        self.fused = quantizer.fused

    def _set_grid(self, precision: Precision) -> float:
        largest = super()._set_grid(precision)
        self.start = torch.zeros((), requires_grad=True)
        self.widths = torch.ones(round(largest), requires_grad=True)
        return largest

    @torch.no_grad()
    def thresholds(self) -> list[float]:
        """t_k, in steps."""
        widths = self.widths.clamp_min(NARROWEST)
        return (self.start + widths.cumsum(0) - widths / 2).tolist()

    def quantize(self, x: Tensor, step: Tensor, beta: Tensor | None) -> Tensor:
        """The formula of the class; there is no offset."""
        widths = self.widths.clamp_min(NARROWEST)
        v = x.to(torch.promote_types(x.dtype, torch.float32)) / step
        codes: Tensor = _Codes.apply(v, torch.cat([self.start[None], self.start + widths.cumsum(0)]))  # type: ignore[no-untyped-call]
        return (step * codes).to(x.dtype)


class _Codes(torch.autograd.Function):
    """How many thresholds lie below each element of v, and the gradient of the expectation, in v and in the ends.

    Between e_(k-1) and e_k, a_k apart, the expectation is k - 1 + (v - e_(k-1)) / a_k. An input that lies on the first
    end, as all zeros do at the start, has no part in the gradient.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(v, ends)
        codes = torch.zeros_like(v)
        for low, high in pairwise(ends.unbind()):
            codes = codes + (v > (low + high) / 2).to(v.dtype)
        return codes

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        v, ends = ctx.saved_tensors
        of_v = torch.zeros_like(v)
        of_ends = [torch.zeros_like(ends[0]) for _ in ends]
        for k, (low, high) in enumerate(pairwise(ends.unbind())):
            width = high - low
            top = high if k + 2 < len(ends) else high + width / 2
            inside = torch.where((v > low) & (v <= top), grads[0], 0.0)
            of_v = of_v + inside / width
            along = (inside * (v - low)).sum() / width.square()
            of_ends[k] = of_ends[k] + along - inside.sum() / width
            of_ends[k + 1] = of_ends[k + 1] - along
        return of_v, torch.stack(of_ends)


def learned_thresholds(
    study: Study = "resnet20-cifar10-jpeg",
    set_: Set = None,
    targets: Annotated[Sequence[str], several(str, "precisions of every layer that is not fixed")] = ("w2a2", "w3a3"),
    lrs: Annotated[Sequence[float], several(float, "peak learning rates of Adam for the ends, in steps; arms")] = (
        1e-3,
    ),
    seeds: Seeds = (0, 1, 2),
    steps: Annotated[int, typer.Option(help="training steps", min=1)] = 400,
    range_lr: Annotated[
        float, typer.Option(help="learning rate of steps and thresholds, as a share of `trial.lr`")
    ] = 0.1,
    threads: Threads = 1,
    results: Results = RESULTS / "learned_thresholds.jsonl",
    only_print: PrintOnly = False,
) -> None:
    torch.set_num_threads(threads)
    cases = [
        {"study": study, "target": target, "arm": arm, "seed": seed, "steps": steps, "range_lr": range_lr}
        for target in targets
        for seed in seeds
        for arm in (UNIFORM, *(f"nonuniform, lr {lr:g}" for lr in lrs))
    ]
    rows = Rows(results, key=tuple(cases[0]))
    runner: Runner | None = None
    for case in rows.missing([] if only_print else cases):
        runner = runner or Runner(open_problem(load_study(study, set_ or ())), steps, range_lr)
        row = runner.run(case["arm"], LayerPrecision.shorthand(case["target"]), case["seed"])
        rows.append(case | row)
        say(f"{case}: val {row['val']:.2f}, {row['divergence']:.3f} nats")
    show(rows.read())


class Runner:
    """Runs cases; what they share is made once."""

    def __init__(self, problem: Problem, steps: int, range_lr: float) -> None:
        self.problem = problem
        self.settings = problem.spec.trial.of_one_length(steps)
        self.fit = FitSettings(steps, self.settings.lr, self.settings.weight_decay, range_lr=range_lr)
        self.teacher: Teacher | None = None
        self.float_val = 100 * problem.task.evaluate(problem.task.float_model(), "val")

    def run(self, arm: str, target: LayerPrecision, seed: int) -> Row:
        """Train one arm and score it. `thresholds` are those of each input in steps, `losses` means over tenths."""
        torch.manual_seed(seed)
        config = self.problem.space.everywhere(target)
        workbench = Workbench(self.problem.task, self.settings, offers=config.offers, graph=self.problem.graph)
        self.teacher = workbench.teacher = self.teacher or workbench.teacher
        learned: dict[str, NonuniformQuantizer] = {}
        if arm != UNIFORM:
            for name, layer in quant_layers(workbench.model).items():
                quantizer = layer.input_quantizer
                if config[name] == target and not quantizer.offset and isinstance(quantizer, UniformQuantizer):
                    layer.input_quantizer = learned[name] = NonuniformQuantizer(quantizer)
        workbench.reset(config)
        start = workbench.quick_score()
        settings = replace(self.fit, bf16=workbench.bf16)
        ends = [end for quantizer in learned.values() for end in (quantizer.start, quantizer.widths)]
        adam = torch.optim.Adam(ends) if learned else None
        losses: list[float] = []

        def on_step(step: int, loss: float) -> None:
            losses.append(loss)
            if adam is not None:
                adam.param_groups[0]["lr"] = float(arm.split()[-1]) * learning_rate(step, settings) / settings.lr
                adam.step()
                adam.zero_grad()

        batches = workbench.train_batches(settings.steps, seed)
        with Stopwatch() as watch:
            fit(workbench.model, batches, workbench.loss(seed), settings, on_step)
        workbench.reestimate(seed)
        val = workbench.score("val")
        tenth = max(1, len(losses) // 10)
        return {
            "val": 100 * val.value,
            "divergence": val.divergence,
            "start_divergence": start.divergence,
            "float_val": self.float_val,
            "losses": [round(statistics.fmean(losses[i : i + tenth]), 4) for i in range(0, len(losses), tenth)],
            "thresholds": {name: [round(t, 3) for t in quantizer.thresholds()] for name, quantizer in learned.items()},
            "minutes": watch.wall_s / 60,
            "cpu_minutes": watch.cpu_s / 60,
        }


def show(lines: Sequence[Row]) -> None:
    """A table of each study, number of steps and range learning rate."""
    for study, steps, range_lr in sorted({(line["study"], line["steps"], line["range_lr"]) for line in lines}):
        some = [line for line in lines if (line["study"], line["steps"], line["range_lr"]) == (study, steps, range_lr)]
        print_table(
            f"{study}, {steps} steps, range_lr {range_lr:g}: float {some[0]['float_val']:.2f} % val",
            HEADS,
            cells(some),
            left=HEADS[:2],
        )


HEADS = (
    "target",
    "inputs",
    "seeds",
    "val",
    "divergence, nats",
    "val - uniform",
    "divergence - uniform",
)


def cells(lines: Sequence[Row]) -> list[tuple[str, ...]]:
    """The table of rows that differ in target, arm and seed: means, and means of the differences of equal seeds."""
    groups: dict[tuple[str, str], dict[int, Row]] = {}
    for line in lines:
        groups.setdefault((line["target"], line["arm"]), {})[line["seed"]] = line
    table = []
    for (target, arm), runs in sorted(groups.items(), key=lambda item: (item[0][0], item[0][1] != UNIFORM)):
        uniform = groups.get((target, UNIFORM), {})
        pairs = [(run, uniform[seed]) for seed, run in runs.items() if seed in uniform and arm != UNIFORM]
        scores = (("val", 2), ("divergence", 3))
        table.append(
            (
                target,
                arm,
                str(len(runs)),
                *(spread([run[name] for run in runs.values()], digits) for name, digits in scores),
                *(spread([run[name] - other[name] for run, other in pairs], digits, "+") for name, digits in scores),
            )
        )
    return table
