"""From the `task` section of a study to a Task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from mpsearch.errors import TaskError
from mpsearch.study import AudioSpec, BoxesSpec, DataSpec, MasksSpec, PatchesSpec, TaskSpec, TextSpec, TonesSpec
from mpsearch.task.audio import audio_task
from mpsearch.task.boxes import boxes_task
from mpsearch.task.classification import ClassificationTask
from mpsearch.task.data import load_data
from mpsearch.task.factory import call_factory
from mpsearch.task.lightning_task import lightning_task
from mpsearch.task.masks import masks_task
from mpsearch.task.own import REQUIRED, OwnTask
from mpsearch.task.patches import patches_task
from mpsearch.task.task import Loadable, Task
from mpsearch.task.text import text_task
from mpsearch.task.tones import tones_task
from mpsearch.task.trainer_task import trainer_task


def _images_task(spec: TaskSpec, workers: int | None = None) -> Task:
    assert isinstance(spec.data, DataSpec)
    return ClassificationTask(spec, load_data(spec.data, workers))


TASKS: Mapping[type, Callable[[TaskSpec, int | None], Task]] = {
    DataSpec: _images_task,
    MasksSpec: masks_task,
    BoxesSpec: boxes_task,
    PatchesSpec: patches_task,
    TextSpec: text_task,
    AudioSpec: audio_task,
    TonesSpec: tones_task,
}
"""What a study says of its data -> the task that it makes with a model."""


FACTORIES: Mapping[str, Callable[[Mapping[str, Any]], Task]] = {
    "lightning": lightning_task,
    "trainer": trainer_task,
}
"""Name of a `task.factory` that is no module:function -> what makes the task of `task.args`."""


def load_task(spec: TaskSpec, workers: int | None = None) -> Task:
    """The task that `spec` describes; `workers` threads or processes decode images (default: one per core, 8 at most).

    Raises:
        TaskError: model, checkpoint, data or factory cannot be used; the message says which and what to do.
    """
    if spec.factory is not None:
        named = FACTORIES.get(spec.factory)
        return _from_factory(spec.factory, spec) if named is None else named(spec.args)
    return TASKS[type(spec.data)](spec, workers)


def load_task_with(spec: TaskSpec, weights: Mapping[str, Tensor]) -> Task:
    """The task that `spec` describes, whose float network has these weights: no checkpoint is read, nothing trained.

    A task that is no object of ours (`Loadable`) loads its own weights.

    Raises:
        TaskError: as `load_task`.
    """
    args = spec.args | {"checkpoint": None} if spec.factory in FACTORIES else spec.args
    task = load_task(spec.model_copy(update={"checkpoint": None, "args": args}))
    if isinstance(task, Loadable):
        task.load_float_model(weights)
    return task


def _from_factory(name: str, spec: TaskSpec) -> Task:
    task = call_factory("task.factory", name, spec.args)
    if hasattr(task, "batches"):
        missing = [key for key in REQUIRED if not hasattr(task, key)]
        if missing:
            raise TaskError(
                f"task.factory: {name} returned {type(task).__name__}, which has no {', '.join(missing)}: "
                "mpsearch.task.own lists what a task of one's own has"
            )
        return OwnTask(task, (name, spec.args))
    methods = [key for key, value in vars(Task).items() if callable(value) and not key.startswith("_")]
    missing = [key for key in (*Task.__annotations__, *methods) if not hasattr(task, key)]
    if missing:
        raise TaskError(
            f"task.factory: {name} returned {type(task).__name__}, which has no {', '.join(missing)}: a task has "
            "`batches(split)` and what else mpsearch.task.own lists, or all that mpsearch.task.task.Task does"
        )
    return task  # type: ignore[no-any-return]
