"""StudyTask: the model and the data that a study names, in the form of a task of one's own (`mpsearch.task.own`).

A kind of data says what its samples are, what it asks of a network and what the loss is; everything else is the same
for all of them: the network is built for the data, its checkpoint read or its weights trained once, and one sample run
through it before anything else begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mpsearch.errors import TaskError
from mpsearch.files import sha256
from mpsearch.graph.inputs import call, evaluating
from mpsearch.shipped import shipped
from mpsearch.study import TaskSpec, metrics_of
from mpsearch.task.checkpoint import load_checkpoint
from mpsearch.task.comparing import Kind, output_tensor
from mpsearch.task.libraries import Needs
from mpsearch.task.models import build_network, model_name
from mpsearch.task.own import OwnTask
from mpsearch.task.samples import seeded
from mpsearch.task.scores import named_metric
from mpsearch.task.task import Split
from mpsearch.task.training import FLOAT_BATCH, saying, train_adamw
from mpsearch.train import usual_device

FLOAT_SEED = 0


class StudyTask:
    """What OwnTask needs. A kind of data has a class of its own, with `batches`, and `loss` where it is another.

    Args:
        spec: of the task.
        data_name: of the data, in records.
        key: of its content: equal keys, equal samples.
        needs: what the data asks of a network.

    Raises:
        TaskError: network, checkpoint and data do not fit together.
    """

    def __init__(self, spec: TaskSpec, data_name: str, key: str, needs: Needs) -> None:
        assert spec.data is not None  # TaskSpec: either a factory, or model and data
        self.name = f"{model_name(spec.model)}/{data_name}"
        self.metric, score = named_metric(spec.metric or metrics_of(spec.data)[0], "task.metric")
        if score is not None:
            self.score = score
        self.kind: Kind = needs.kind
        self.spec, self.needs, self.data_name = spec, needs, data_name
        facts = spec.model_dump(mode="json", include={"model", "num_classes", "model_args", "float_epochs"})
        self.source: Sequence[Any] = (facts, key)
        with seeded(FLOAT_SEED):
            network = build_network(spec, needs)
        self.network = network.module.eval()
        self.weights = network.weights
        if spec.checkpoint is not None:
            path = shipped("checkpoints", spec.checkpoint, TaskError)
            place = load_checkpoint(self.network, path)
            self.weights = f"checkpoint {spec.checkpoint}{place and f', {place}'}, sha256 {sha256(path)}"

    def task(self) -> OwnTask:
        """The Task, after one sample has gone through the network.

        Raises:
            TaskError: the network does not take the data, or answers something else than it asks for.
        """
        if self.weights is None:
            self.train = self._train  # what OwnTask calls where a task has it
        own = OwnTask(self, self.source)
        own.float_model_source = self.weights or "not trained yet"
        x, _ = next(own.train_batches(1, 1, FLOAT_SEED))
        self.check(x)
        return own

    def float_model(self) -> nn.Module:
        """The network, with the weights that it has."""
        return self.network

    def batches(self, split: Split) -> Iterable[Any]:
        """The samples of a split."""
        raise NotImplementedError

    def loss(self, output: Any, target: Any) -> Tensor:
        """The mean cross-entropy of a batch of classes."""
        return F.cross_entropy(output_tensor(output), target)

    def fits(self, output: Any) -> bool:
        """Whether the output for one sample is what the data asks for: logits of as many classes."""
        logits = output_tensor(output)
        return isinstance(logits, Tensor) and logits.shape == (1, self.needs.classes)

    def expected(self) -> str:
        """What `fits`, in words."""
        return f"(1, {self.needs.classes}) for the {self.needs.classes} classes"

    def check(self, x: Any) -> None:
        """Run one sample through the network. Raises TaskError as `task` does."""
        model = f"model '{self.spec.model}'"
        try:
            with evaluating(self.network):
                output = call(self.network, x)
        except Exception as error:  # whatever a network of others raises
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise TaskError(
                f"{model} cannot take a sample of the data '{self.data_name}': {said[:300]}; choose a model for such "
                "data, or change task.data"
            ) from error
        if not self.fits(output):
            answer = output_tensor(output)
            shape = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
            raise TaskError(
                f"{model} answers one sample of the data '{self.data_name}' with {shape}, expected {self.expected()}: "
                "choose a model for such data, or change task.model_args"
            )

    def _train(self, model: nn.Module) -> None:
        """Train the network for `float_epochs` from its seeded start.

        Raises:
            TaskError: the training diverged.
        """
        task = OwnTask(self)
        batch = self.float_batch()
        count = self.spec.float_epochs * task.steps_per_epoch(batch)
        model.to(usual_device())
        try:
            train_adamw(model, task.train_batches(batch, count, FLOAT_SEED), self.loss, count, saying(count))
        except FloatingPointError as error:
            raise TaskError(f"the float model of {self.name} diverged, {error}: give a task.checkpoint") from None

    def float_batch(self) -> int:
        """Samples of a batch of that training."""
        return FLOAT_BATCH
