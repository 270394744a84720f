"""One config trained by one method and scored: what `mpsearch train` does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mpsearch.observer import SILENT, Observer
from mpsearch.precision import LayerPrecision, PrecisionConfig
from mpsearch.problem import Problem
from mpsearch.qat.gdnsq import gdnsq
from mpsearch.qat.pipeline import qat
from mpsearch.qat.published import published
from mpsearch.qat.trained import Trained
from mpsearch.quant.prepare import check_names
from mpsearch.space.space import SearchSpace
from mpsearch.study import TrialSpec
from mpsearch.task.scoring import evaluate
from mpsearch.workbench import Workbench

Train = Callable[[Problem, PrecisionConfig, TrialSpec, Callable[[int, float], None]], Trained]

METHODS: Mapping[str, Train] = {
    "qat": lambda problem, config, settings, on_step: qat(
        problem.task,
        config,
        settings,
        on_step,
        Workbench(problem.task, settings, offers=config.offers, graph=problem.graph),
    ),
    "gdnsq": lambda problem, config, settings, on_step: gdnsq(
        problem.task,
        config,
        Workbench(problem.task, settings, graph=problem.graph),
        settings.steps,
        settings.seed,
        on_step=on_step,
    ),
}
"""Method -> how it trains by our recipe."""

RECIPES: Mapping[str, Mapping[str, Train]] = {
    "gdnsq": {
        "mhaq": lambda problem, config, settings, on_step: published(
            problem.task,
            config,
            Workbench(problem.task, settings, graph=problem.graph),
            settings.steps,
            settings.seed,
            on_step=on_step,
        )
    }
}
"""Method -> the recipes that others have for it, by the name of their library."""


@dataclass(frozen=True)
class Scored:
    """A trained network with its scores and its relative cost."""

    trained: Trained
    float_score: Mapping[str, float]  # by split
    score: Mapping[str, float]
    cost: float
    fixed: tuple[str, ...]  # the layers that the space fixes, with the precisions that they keep


def train_one(
    problem: Problem,
    target: PrecisionConfig | LayerPrecision,
    method: str,
    epochs: float,
    seed: int,
    observer: Observer = SILENT,
    recipe: str | None = None,
) -> Scored:
    """Train the network of a study at one target and score val and test.

    Args:
        problem: the study.
        target: a config, or one precision for every layer that the space does not fix.
        method: one of METHODS.
        epochs: passes over the training data.
        seed: of the batches and of whatever is random.
        observer: told after every step.
        recipe: one of RECIPES of the method; default: ours.

    Raises:
        PrecisionError: the target does not fit the network or the method.
        FloatingPointError: the loss became NaN or infinite.
    """
    task = problem.task
    config, fixed = target_config(problem.space, target)
    steps = max(1, round(epochs * task.steps_per_epoch(problem.spec.trial.batch_size)))
    settings = problem.spec.trial.of_one_length(steps).model_copy(update={"seed": seed})
    train = METHODS[method] if recipe is None else RECIPES[method][recipe]
    trained = train(problem, config, settings, lambda step, loss: observer.on_step(step + 1, steps, loss))
    float_model = task.float_model()
    return Scored(
        trained,
        {split: evaluate(task, float_model, split) for split in ("val", "test")},
        {split: evaluate(task, trained.model, split) for split in ("val", "test")},
        problem.cost(config),
        fixed,
    )


def target_config(
    space: SearchSpace, target: PrecisionConfig | LayerPrecision
) -> tuple[PrecisionConfig, tuple[str, ...]]:
    """The config to train, and the layers that stay as the space fixes them.

    One precision is for every layer that the space does not fix; a config is taken as it is.

    Raises:
        PrecisionError: the config does not fit the network.
    """
    if isinstance(target, PrecisionConfig):
        check_names(target, dict.fromkeys(space.layers))
        return PrecisionConfig((name, target[name]) for name in space.layers), ()
    config = space.everywhere(target)
    fixed = tuple(f"{name} {precision}" for name, precision in config.items() if precision != target)
    return config, fixed
