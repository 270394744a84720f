"""What is being compressed: a model, its data and its metric."""

from mpsearch.task.classification import ClassificationTask
from mpsearch.task.load import load_task
from mpsearch.task.task import Batch, Split, Task

__all__ = ["Batch", "ClassificationTask", "Split", "Task", "load_task"]
