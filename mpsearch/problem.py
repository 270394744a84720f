"""A study made concrete: its task, the layers of its network, the configs there are, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mpsearch.cost.model import RelativeCost
from mpsearch.errors import CostError
from mpsearch.graph.facts import ModelGraph
from mpsearch.graph.layers import inspect_model
from mpsearch.space.build import build_space
from mpsearch.space.space import SearchSpace
from mpsearch.space.spec import load_space
from mpsearch.study import StudySpec
from mpsearch.task.load import load_task
from mpsearch.task.task import Task
from mpsearch.train import batch_norm_gap

WIDE_GAP = 0.15
"""Nats of `batch_norm_gap` from which it is worth a warning.

A ResNet-20: 0.02 with the black margins of its training, 0.45 with mirrored ones, which cost its W8A8 3.9 points.
"""


@dataclass(frozen=True)
class Problem:
    """A study made concrete: its task, the layers of its network, the configs there are, and what they cost."""

    spec: StudySpec
    task: Task
    graph: ModelGraph
    space: SearchSpace
    cost: RelativeCost
    cheapest: float  # relative cost of the cheapest config
    dearest: float

    @property
    def layers(self) -> tuple[str, ...]:
        """The quantizable layers in execution order."""
        return self.space.layers

    def summary(self) -> list[str]:
        """What is optimised, in words and units."""
        spec, costs = self.spec, self.cost
        quantizable, unhandled = self.graph.quantizable, self.graph.unhandled
        macs = self.graph.macs
        lines = [
            f"Maximize {spec.task.metric} on the validation split and minimize {spec.cost.model} of {self.task.name}.",
            f"Cost 1 is {costs.reference.total:.4g} {costs.reference.unit} a sample: the network at "
            f"{spec.cost.reference} everywhere. Configs of the space '{self.space.name}' cost {self.cheapest:.3g} to "
            f"{self.dearest:.3g}"
            + (f"; only those up to {spec.cost.budget:g} are tried." if spec.cost.budget else "."),
            f"{len(quantizable)} layers, {macs / 1e6:.3g} million MACs a sample; {len(self.space.free)} free choices, "
            f"{scientific(self.space.size)} configs; the uniform ladder of {len(self.space.ladder())} is the baseline.",
        ]
        if unhandled:
            names = ", ".join(layer.name for layer in unhandled[:5]) + (", ..." if len(unhandled) > 5 else "")
            lines.append(
                f"{len(unhandled)} layers stay float and are priced as float: {names} (see `mpsearch inspect`)."
            )
        if other := sum(self.graph.other_macs.values()):
            lines.append(f"{other / macs:.1%} of the MACs are outside layers (attention products, say) and not priced.")
        return lines

    def warnings(self) -> list[str]:
        """What about the task looks wrong, in words: a forward pass or two."""
        x, _ = next(iter(self.task.train_batches(256, 1, seed=0)))
        gap = batch_norm_gap(self.task.float_model(), x, self.task.logits)
        if gap < WIDE_GAP:
            return []
        return [
            "with the BatchNorm statistics of a training batch the float network answers otherwise than with its own "
            f"({gap:.2f} nats; a few hundredths are usual): it was trained on batches made in another way "
            "(normalization, order of colours, margins), and trials will do harm before they do good; see task.data"
        ]


def open_problem(spec: StudySpec) -> Problem:
    """Load the task, inspect its network, build the space and the cost model; nothing is written.

    Raises:
        MpsearchError: whatever in the study cannot be used.
    """
    task = load_task(spec.task)
    graph = inspect_model(task.float_model(), task.calibration_input(min(32, spec.trial.calibration_samples)))
    space = build_space(load_space(spec.space), graph.layers)
    cost = RelativeCost(graph.layers, spec.cost.model, spec.cost.reference)
    choices: dict[str, dict[str, Sequence[Any]]] = {name: {} for name in space.layers}
    for slot in space.slots:
        for name in slot.layers:
            choices[name][slot.tensor] = slot.choices
    cheapest, dearest = cost.bounds({name: (c["weight"], c["activation"]) for name, c in choices.items()})
    if spec.cost.budget is not None and spec.cost.budget < cheapest:
        raise CostError(
            f"cost.budget is {spec.cost.budget:g}, but the cheapest config of space '{space.name}' costs "
            f"{cheapest:.4g} of {spec.cost.reference}: raise the budget, or allow lower precisions in the space"
        )
    return Problem(spec, task, graph, space, cost, cheapest, dearest)


def scientific(count: int) -> str:
    """A count that may be astronomical, for people: 1,234 or about 10^57.

    >>> scientific(7**20)
    'about 10^16.9'
    """
    return f"{count:,}" if count < 10**7 else f"about 10^{math.log10(count):.1f}"
