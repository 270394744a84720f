"""`factory: trainer`: a Trainer of Hugging Face as a task.

    task:
      factory: trainer
      args: {trainer: "my_module:make_trainer", metric: top1}

The function returns a `transformers.Trainer`; its `model`, `train_dataset`, `eval_dataset` and `data_collator` are the
task. Where `eval_dataset` is a dict, its entries are val and test; of one data set, every other sample is val and the
others are test. The float network is what the Trainer trains, once, by its own arguments; a `checkpoint` makes that
superfluous.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from mpsearch.documents import explain
from mpsearch.errors import TaskError
from mpsearch.metric import find_metric
from mpsearch.shipped import shipped
from mpsearch.task.checkpoint import load_checkpoint
from mpsearch.task.comparing import KIND_OF_METRIC, output_tensor
from mpsearch.task.factory import call_factory
from mpsearch.task.imagefolder import split_meant
from mpsearch.task.own import OwnTask
from mpsearch.task.samples import seeded
from mpsearch.task.scores import PER_SAMPLE, Scorer, scorer
from mpsearch.task.task import Split

BATCH = 16
HAS = ("model", "train_dataset", "eval_dataset", "data_collator", "train")


class TrainerArgs(BaseModel):
    """What `task.args` are for `factory: trainer`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    trainer: str = Field(description="module:function that returns the Trainer")
    metric: str = Field(description="what scores are: the name of a common metric")
    trainer_args: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of that function")
    labels: str = Field(default="labels", description="entry of a batch that holds the targets")
    shifted: bool | None = Field(
        default=None,
        description="whether the answer to a token is the next one; default: where the model's class says CausalLM or "
        "LMHead",
    )
    checkpoint: str | None = Field(default=None, description="file with trained weights; null: train by the Trainer")


class TrainerTask:
    """What OwnTask needs, of a Trainer."""

    def __init__(self, args: TrainerArgs) -> None:
        with seeded(0):
            self._trainer = call_factory("task.args.trainer", args.trainer, args.trainer_args)
        if missing := [name for name in HAS if not hasattr(self._trainer, name)]:
            raise TaskError(
                f"task.args.trainer: {args.trainer} gave a {type(self._trainer).__name__} without "
                f"{', '.join(missing)}: expected a transformers.Trainer"
            )
        self.metric = find_metric(args.metric, "task.args.metric")
        self.kind = KIND_OF_METRIC.get(self.metric.name)
        self._network: nn.Module = self._trainer.model
        self.name = f"{type(self._network).__name__}/{args.trainer.partition(':')[0]}"
        kind = type(self._network).__name__
        self._shifted = args.shifted if args.shifted is not None else "CausalLM" in kind or "LMHead" in kind
        self._args = args
        self._parts = self._split()
        values = PER_SAMPLE.get(self.metric.name)
        self.score: Any = (
            _OfLabels(self)
            if values is None
            else lambda output, target: values(*self.answered(output, target))  # so that configs are compared by sample
        )
        if args.checkpoint is None:
            self.train = self._train  # what OwnTask calls where a task has it
        else:
            load_checkpoint(self._network, shipped("checkpoints", args.checkpoint, TaskError))

    @property
    def code(self) -> Sequence[str]:
        """What the trained weights depend on, beside the network: how the Trainer trains."""
        arguments: Any = getattr(self._trainer, "args", None)
        described = hasattr(arguments, "to_json_string")
        return [arguments.to_json_string() if described else inspect.getsource(type(self._trainer))]

    def float_model(self) -> nn.Module:
        """The network."""
        return self._network

    def batches(self, split: Split) -> DataLoader[Any]:
        """The samples of a split, put together by the Trainer's collator."""
        return DataLoader(self._parts[split], batch_size=BATCH, collate_fn=self._trainer.data_collator)

    def loss(self, output: Any, target: Any) -> Tensor:
        """The network's own loss where it gives one, else the mean cross-entropy of what is answered."""
        given = getattr(output, "loss", None)
        if isinstance(given, Tensor):
            return given
        logits, labels = self.answered(output, target)
        if self.kind == "regression":
            return F.mse_loss(logits, labels.to(logits.dtype))
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten())

    def answered(self, output: Any, target: Any) -> tuple[Tensor, Tensor]:
        """The logits and the labels that they answer.

        Raises:
            TaskError: a batch has no labels.
        """
        labels = target.get(self._args.labels) if isinstance(target, Mapping) else None
        if not isinstance(labels, Tensor):
            entries = ", ".join(target) if isinstance(target, Mapping) else type(target).__name__
            raise TaskError(
                f"{self.name}: a batch has no '{self._args.labels}': it holds {entries}; say which entry is the target "
                "by task.args.labels"
            )
        logits = output_tensor(output)
        return (logits[:, :-1], labels[:, 1:]) if self._shifted else (logits, labels)

    def _split(self) -> Mapping[Split, Any]:
        train, held = self._trainer.train_dataset, self._trainer.eval_dataset
        if train is None or held is None:
            raise TaskError(f"{self.name}: the Trainer needs a train_dataset and an eval_dataset")
        if isinstance(held, Mapping):
            named = {meant: part for name, part in held.items() if (meant := split_meant(name)) is not None}
            if not {"val", "test"} <= named.keys():
                raise TaskError(f"{self.name}: eval_dataset has {', '.join(held)}, expected entries val and test")
            return {"train": train, "val": named["val"], "test": named["test"]}
        count = len(held)
        return {"train": train, "val": Subset(held, range(0, count, 2)), "test": Subset(held, range(1, count, 2))}

    def _train(self, model: nn.Module) -> None:
        """Train the network, which the Trainer holds, by the Trainer."""
        self._trainer.train()
        self._network.cpu()


class _OfLabels:
    """The score of a common metric that is no mean over samples, of batches whose targets are one entry of many."""

    def __init__(self, task: TrainerTask) -> None:
        self._task = task
        self._scorer: Scorer | None = None

    def reset(self) -> None:
        """Begin anew."""
        self._scorer = None

    def update(self, output: Any, target: Any) -> None:
        """Take in a batch."""
        if self._scorer is None:
            self._scorer = scorer(self._task.name, self._task.metric, None)
        logits, labels = self._task.answered(output, target)
        self._scorer.add(logits, labels, len(labels))

    def compute(self) -> float:
        """The score of all batches."""
        assert self._scorer is not None
        return self._scorer.result()[0]


def trainer_task(args: Mapping[str, Any]) -> OwnTask:
    """The task of `factory: trainer`, with `task.args`.

    Raises:
        TaskError: an argument is missing or unknown, or the function gives no Trainer.
    """
    try:
        checked = TrainerArgs.model_validate(args)
    except ValidationError as error:
        raise TaskError("task.args cannot be used:\n" + explain(error, TrainerArgs, "task.args")) from None
    task = TrainerTask(checked)
    return OwnTask(task, ["trainer", dict(args), *task.code])
