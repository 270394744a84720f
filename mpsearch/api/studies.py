"""A study before it runs: check, inspect."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpsearch.errors import MpsearchError, StudyError
from mpsearch.files import nameable

if TYPE_CHECKING:
    import pandas as pd

    from mpsearch.metric import Metric
    from mpsearch.problem import Problem
    from mpsearch.program import Allocation
    from mpsearch.study import StudySpec
    from mpsearch.warmstart.table import SensitivityTable


@dataclass(frozen=True)
class Check:
    """What a study would do.

    Attributes:
        study: the study with every default filled in.
        summary: what is optimized, in words and units.
        warnings: what about the task looks wrong, in words.
        layers: layers that can be quantized.
        free: choices that the search space leaves open.
        configs: how many configs there are.
        cheapest: relative cost of the cheapest config.
        dearest: relative cost of the dearest config.
        unit: of the cost model, per sample.
        metric: what scores are.
        float_val: score of the float model on val.
        float_source: where its weights come from.
        trial_s: seconds that one trial should take, run alone without compilation.
        search_s: seconds that all trials should take on this machine.
    """

    study: StudySpec
    summary: tuple[str, ...]
    warnings: tuple[str, ...]
    layers: int
    free: int
    configs: int
    cheapest: float
    dearest: float
    unit: str
    metric: Metric
    float_val: float
    float_source: str
    trial_s: float
    search_s: float

    def to_json(self) -> dict[str, Any]:
        """What `mpsearch check --json` prints."""
        return {
            "study": self.study.document(),
            "layers": self.layers,
            "free": self.free,
            "configs": self.configs,
            "cost": {"cheapest": self.cheapest, "dearest": self.dearest, "unit": self.unit},
            "warnings": list(self.warnings),
            "metric": self.metric.to_json(),
            "float_val": self.float_val,
            "trial_s": self.trial_s,
            "search_s": self.search_s,
        }


@dataclass(frozen=True)
class Sensitivities:
    """What quantizing each tensor alone does, and the configs that integer programming makes of it.

    Attributes:
        table: columns layer, tensor (weight or activation), precision and value.
        ladder: a row per config of the uniform ladder. Columns: budget (its relative cost), cost and value (of the ILP
            config within it), uniform_value, weight_bits and activation_bits (means of the ILP config),
            uniform_weight_bits and uniform_activation_bits (means of the uniform config), config (the ILP config).
        proxy: what a value is.
        samples: calibration samples.
        seconds: that measuring took.
        notes: what was left out and why.
    """

    table: pd.DataFrame
    ladder: pd.DataFrame
    proxy: str
    samples: int
    seconds: float
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """What `mpsearch inspect --sensitivity --json` prints."""
        ladder = [
            {
                "budget": step["budget"],
                "cost": step["cost"],
                "value": step["value"],
                "uniform_value": _finite(step["uniform_value"]),
                "layers": step["config"].to_json(),
            }
            for step in self.ladder.to_dict("records")
        ]
        rows: list[dict[Any, Any]] = self.table.to_dict("records")
        return {
            "proxy": self.proxy,
            "samples": self.samples,
            "seconds": self.seconds,
            "notes": list(self.notes),
            "sensitivity": [
                {**row, "precision": str(row["precision"]), "value": _finite(row["value"])} for row in rows
            ],
            "ilp_ladder": ladder,
        }


@dataclass(frozen=True)
class Inspection:
    """The layers of a study's network.

    Attributes:
        layers: a row per layer in execution order. Columns: layer, kind, depthwise, weight_shape, input_shape, macs
            (a sample), params, signed_input, batch_norm (the one that follows, or None), input_group and weight_group
            (the first layer that shares the activation or the weight), calls, reason (why it stays float, or None),
            weight and activation (tuples of the precisions that the search space allows; empty for a float layer).
        other_macs: MACs a sample outside layers, by operation; they are not priced.
        macs: MACs a sample in all.
        sensitivities: measured where they were asked for.
    """

    layers: pd.DataFrame
    other_macs: Mapping[str, int]
    macs: int
    sensitivities: Sensitivities | None = None

    def to_json(self) -> dict[str, Any]:
        """What `mpsearch inspect --json` prints."""
        if self.sensitivities is not None:
            return self.sensitivities.to_json()
        rows = [
            {
                **{key: row[key] for key in row if key != "depthwise"},
                **{key: list(row[key]) for key in ("weight_shape", "input_shape")},
                **{tensor: list(map(str, row[tensor])) for tensor in ("weight", "activation")},
            }
            for row in self.layers.to_dict("records")
        ]
        return {"layers": rows, "other_macs": dict(self.other_macs), "macs": self.macs}


def check(study: str | Path | StudySpec, set: Sequence[str] = ()) -> Check:
    """Say what a study would do: what is optimized, how many configs there are, how long a trial takes.

    Loads the task (and trains its float model once where no checkpoint is given), scores the float model on val and
    times a few training steps.

    Args:
        study: a shipped study by name, the path of a study file, or a StudySpec.
        set: `key.path=value` to override values of the study file.

    Raises:
        MpsearchError: the study, its model or its data cannot be used.

    >>> import mpsearch
    >>> checked = mpsearch.check("digits", set=["search.trials=12"])
    >>> checked.layers, checked.study.search.trials, checked.unit
    (11, 12, 'pJ')
    """
    spec = read_study(study, set)  # before torch is imported: a mistake is answered at once
    from mpsearch.problem import open_problem
    from mpsearch.search.run import estimate_trial_s
    from mpsearch.task.scoring import evaluate
    from mpsearch.warmstart.start import check_descent

    problem = open_problem(spec)
    if problem.space.free:
        check_descent(spec, problem.space, problem.cost)
    trial_s = estimate_trial_s(problem)
    return Check(
        study=spec,
        summary=tuple(problem.summary()),
        warnings=tuple(problem.warnings()),
        layers=len(problem.layers),
        free=len(problem.space.free),
        configs=problem.space.size,
        cheapest=problem.cheapest,
        dearest=problem.dearest,
        unit=problem.cost.reference.unit,
        metric=problem.metric,
        float_val=evaluate(problem.task, problem.task.float_model(), "val"),
        float_source=getattr(problem.task, "float_model_source", "as given"),
        trial_s=trial_s,
        search_s=min(spec.search.trials, problem.space.size) * trial_s / _parallel(spec),
    )


def inspect(
    study: str | Path | StudySpec,
    sensitivity: bool = False,
    proxy: str | None = None,
    samples: int | None = None,
    set: Sequence[str] = (),
) -> Inspection:
    """List the layers: shapes, MACs, groups, what each may be, and what cannot be quantized and why.

    Args:
        study: a shipped study by name, the path of a study file, or a StudySpec.
        sensitivity: measure what quantizing each tensor alone does to the network, too.
        proxy: how that is measured: kl (default), jeffreys (both divergences of the outputs), fit (Fisher
            information, arXiv 2210.08502) or sqnr (noise over signal).
        samples: calibration samples from train that are used to measure it (default 512).
        set: `key.path=value` to override values of the study file.

    Raises:
        MpsearchError: the study cannot be used, no such proxy, or `proxy` or `samples` without `sensitivity`.

    >>> import mpsearch
    >>> layers = mpsearch.inspect("digits").layers
    >>> layers.loc[0, ["layer", "kind", "macs"]].to_list()
    ['conv1', 'conv2d', 6912]
    """
    spec = read_study(study, set)  # before torch is imported: a mistake is answered at once
    import pandas as pd

    from mpsearch.problem import open_problem
    from mpsearch.warmstart.table import check_proxy

    if not sensitivity and (proxy is not None or samples is not None):
        raise MpsearchError("--proxy and --samples say how sensitivities are measured: add --sensitivity")
    proxy, samples = proxy or "kl", 512 if samples is None else samples
    check_proxy(proxy)  # before anything is loaded
    problem = open_problem(spec)
    choices = {(name, slot.tensor): slot.choices for slot in problem.space.slots for name in slot.layers}
    rows = [
        {
            "layer": layer.name,
            "kind": layer.kind,
            "depthwise": layer.depthwise,
            "weight_shape": layer.weight_shape,
            "input_shape": layer.input_shape,
            "macs": layer.macs,
            "params": layer.params,
            "signed_input": layer.signed_input,
            "batch_norm": layer.batch_norm,
            "input_group": layer.input_group,
            "weight_group": layer.weight_group,
            "calls": layer.calls,
            "reason": layer.reason,
            "weight": choices[layer.name, "weight"] if layer.reason is None else (),
            "activation": choices[layer.name, "activation"] if layer.reason is None else (),
        }
        for layer in problem.graph.layers
    ]
    layers = pd.DataFrame(rows, dtype=object)
    measured = _sensitivities(problem, proxy, samples) if sensitivity else None
    return Inspection(layers, dict(problem.graph.other_macs), problem.graph.macs, measured)


def read_study(study: str | Path | StudySpec, set: Sequence[str] | None) -> StudySpec:
    """The study that a command names, with its overrides.

    Raises:
        StudyError: as `load_study`, or overrides of a StudySpec, which has its own way to change.
        WriteError: a path whose bytes are not UTF-8.
    """
    from mpsearch.study import StudySpec, load_study

    if not isinstance(study, StudySpec):
        return load_study(nameable(study), set or ())
    if set:
        raise StudyError(
            f"set got {list(set)}, which overrides study files, but the study given is a StudySpec already: give the "
            "overrides to load_study"
        )
    return study


def _sensitivities(problem: Problem, proxy: str, samples: int) -> Sensitivities:
    import pandas as pd

    from mpsearch.cost.model import affordable
    from mpsearch.task.scoring import comparison_of
    from mpsearch.warmstart.allocate import ilp_ladder
    from mpsearch.warmstart.sensitivity import measure

    task, space, cost = problem.task, problem.space, problem.cost
    x = task.calibration_input(samples)
    table = measure(proxy, task.float_model(), problem.graph.layers, space, x, comparison_of(task))
    budget = math.inf if problem.spec.cost.budget is None else problem.spec.cost.budget
    uniform = [config for config in space.ladder() if affordable(cost, config, budget)]
    steps = ilp_ladder(space, cost, table, [cost(config) for config in uniform])
    ladder = _ladder(uniform, steps, table)
    rows = [(*key, value) for key, value in table.items()]
    frame = pd.DataFrame(rows, columns=["layer", "tensor", "precision", "value"])
    return Sensitivities(frame, ladder, proxy, table.samples, table.seconds, tuple(table.notes))


def _ladder(uniform: Sequence[Any], steps: Sequence[Allocation], table: SensitivityTable) -> pd.DataFrame:
    import pandas as pd

    rows = []
    for config, step in zip(uniform, steps, strict=True):
        weight_bits, activation_bits = step.config.mean_bits
        uniform_weight_bits, uniform_activation_bits = config.mean_bits
        rows.append(
            {
                "budget": step.budget,
                "cost": step.cost,
                "value": step.value,
                "uniform_value": table.total(config),
                "weight_bits": weight_bits,
                "activation_bits": activation_bits,
                "uniform_weight_bits": uniform_weight_bits,
                "uniform_activation_bits": uniform_activation_bits,
                "config": step.config,
            }
        )
    return pd.DataFrame(rows)


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def _parallel(spec: StudySpec) -> float:
    """How many trials' worth of work is done at a time: concurrency shares the cores, it does not multiply them."""
    return 1.0 if spec.engine.address == "none" else min(spec.search.concurrency, os.cpu_count() or 1)
