"""OwnTask: what the search needs of a task, made of the few methods that people write for a problem of their own.

Required are

    float_model()           the trained float network
    batches(split)          an iterable of batches of "train", "val" or "test": a DataLoader, a list, a generator
    loss(output, target)    the scalar training loss of a batch
    score(output, target)   a number for each sample of a batch; or an object with `update` and `compute`, as those of
                            torchmetrics; not needed for a common metric whose score is known (`mpsearch.task.scores`)
    metric                  the name of a common metric, or a `mpsearch.Metric`

and optional

    name                    of model and data, in records; default: the class
    texts(output, target)   answers and references of a batch, two lists of text, for `wer` and `cer`
    kind                    of the outputs (`mpsearch.task.comparing`); default: that of the common metric
    distill_loss(student, teacher)   what trials train by, of the two networks' outputs; default: by the kind
    calibration(samples)    model input for range setting; default: that of samples of train
    sample_numbers          a sixteenth of the numbers in a sample's answer, where these are far more than in its input
    train(model)            trains what `float_model` gives, in place: once, its weights are kept by content
    forward(model, x)       how the model is called on a batch's model input, where that is not model(x)

A batch is a tensor (model input and target at once), a pair (input, target), a mapping (input and target at once; a
model gets its entries by name where it takes these names), or (args, kwargs, target). An input that is a tuple is
several arguments. Eval mode, gradients, devices, batching, shuffling by seed and the cache of the float network are
seen to here.
"""

from __future__ import annotations

import copy
import inspect
import logging
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.cache import content_key
from mpsearch.errors import MpsearchError, TaskError
from mpsearch.graph.inputs import call, map_tensors, samples_of, tensors
from mpsearch.metric import Metric, find_metric
from mpsearch.state_dict import digest, load_tensors
from mpsearch.task.cache import cached_tensors
from mpsearch.task.comparing import KIND_OF_METRIC, Comparison, comparison
from mpsearch.task.samples import Samples, samples_in, seeded
from mpsearch.task.scores import scorer
from mpsearch.task.task import Batch, Measured, Split
from mpsearch.train import to_device

logger = logging.getLogger(__name__)
progress = logging.getLogger("mpsearch.progress")

REQUIRED = ("float_model", "batches", "loss", "metric")

CALIBRATION_NUMBERS = 2**23
"""Numbers of calibration input at most: of large images a few do, where hundreds of small ones are usual."""

EVAL_BATCH = 250
EVAL_NUMBERS = 2**21  # larger samples come in smaller batches, so that memory stays bounded

COMPARED_NUMBERS = 2**15
"""Numbers of each sample's output that are compared; of more, every so many rows are."""

TRAINED = 1  # raise when what `train` is called with changes: kept weights are made again


class CalledOtherwise(nn.Module):
    """A network that its task calls in a way of its own; its layers are those of `model`.

    Args:
        model: the network.
        call: (network, model input) -> output.
    """

    def __init__(self, model: nn.Module, call: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.model = model
        self._called = call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output on a model input, in whichever form `call` gives it."""
        if not args:
            return self._called(self.model, kwargs)
        positional = args[0] if len(args) == 1 else args
        return self._called(self.model, (args, kwargs) if kwargs else positional)


class OwnTask:
    """A Task out of an object that has `REQUIRED`.

    Args:
        own: the object.
        source: what names it in the cache (the factory and its arguments).

    Raises:
        TaskError: metric or kind are none.
    """

    def __init__(self, own: Any, source: Sequence[Any] = ()) -> None:
        self._own, self._source = own, source
        self.name: str = str(getattr(own, "name", type(own).__name__))
        self.metric: str | Metric = find_metric(own.metric, f"{self.name}: metric")
        self.kind: str | None = getattr(own, "kind", None) or KIND_OF_METRIC.get(self.metric.name)
        self._metric = self.metric
        self._comparison = comparison(self.name, self.kind, getattr(own, "logits", None))
        if hasattr(own, "distill_loss"):
            self.distill_loss = own.distill_loss
        self._samples: dict[Split, Samples] = {}
        self._model: nn.Module | None = None
        self._most: int | None = None  # samples of val
        self.float_model_source = "as the task gives it"

    @property
    def comparison(self) -> Comparison | None:
        """How outputs are compared, by their kind."""
        return self._comparison

    def float_model(self) -> nn.Module:
        """A fresh copy of the float network, in eval mode, on the CPU; the first call may train it.

        Raises:
            TaskError: the task gives no module.
        """
        if self._model is None:
            model = self._network()
            self._model = self._called(self._trained(model) if hasattr(self._own, "train") else model)
        return copy.deepcopy(self._model).eval()

    def load_float_model(self, weights: Mapping[str, Tensor]) -> None:
        """Make these the weights of `float_model()`: nothing is trained. Raises RuntimeError: they are another's."""
        model = self._called(self._network())
        load_tensors(model, weights)
        self._model = model
        self.float_model_source = "weights that came with the study"

    def _network(self) -> nn.Module:
        model = self._call("float_model")
        if not isinstance(model, nn.Module):
            raise TaskError(f"{self.name}: float_model() gave a {type(model).__name__}, expected a torch Module")
        return model.cpu()

    def _called(self, model: nn.Module) -> nn.Module:
        """The network as it is called: by the task's `forward`, where it has one."""
        # A function of its own, because a copy of a network would copy the task that a bound method belongs to.
        forward = (lambda model, x: self._call("forward", model, x)) if hasattr(self._own, "forward") else None
        return model if forward is None else CalledOtherwise(model, forward)

    def sampled(self, samples: int) -> OwnTask:
        """This task with at most `samples` samples of val, evenly spread."""
        task = copy.copy(self)
        task._most = samples
        return task

    def train_batches(self, batch_size: int, steps: int, seed: int) -> Iterator[Batch]:
        """`steps` batches of train, shuffled anew for each epoch; the same `seed` gives the same batches."""
        samples = self._of("train")
        size = 1 if samples.whole_batches else min(batch_size, samples.count)
        random = torch.Generator().manual_seed(seed)
        order: list[int] = []
        for step in range(steps):
            if len(order) < size:
                order = torch.randperm(samples.count, generator=random).tolist()
            indices, order = order[:size], order[size:]
            yield self._parts(samples.take(indices, seed=1_000_003 * (seed + 1) + step))

    def calibration_input(self, samples: int, seed: int = 0) -> Any:
        """Model input of at most `samples` samples of train; of fewer where they are large (`CALIBRATION_NUMBERS`)."""
        if hasattr(self._own, "calibration"):
            return self._call("calibration", samples)
        train = self._of("train")
        most = 1 if train.whole_batches else min(samples, max(1, CALIBRATION_NUMBERS // self._numbers("train")))
        order = torch.randperm(train.count, generator=torch.Generator().manual_seed(seed)).tolist()
        return self._parts(train.take(order[:most], seed))[0]

    def evaluate(self, model: nn.Module, split: Split) -> float:
        """The score of a model on a split."""
        return self.measure(model, split).score

    @torch.no_grad()
    def measure(self, model: nn.Module, split: Split) -> Measured:
        """The score of a model on a split, its values by sample and the rows of its outputs that are compared."""
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        scores = scorer(self.name, self._metric, *(getattr(self._own, method, None) for method in ("score", "texts")))
        rows: list[Tensor] | None = [] if self._comparison is not None else None
        for x, target in to_device(self._batches(split), device):
            output = call(model, x)
            count = samples_of(x)
            scores.add(output, target, count)
            rows = self._kept(rows, output, count)
        score, values = scores.result()
        return Measured(score, values, torch.cat(rows) if rows else None)

    def loss(self, output: Any, target: Any) -> Tensor:
        """The task's loss of a batch."""
        loss = self._call("loss", output, target)
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            what = f"the shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise TaskError(f"{self.name}: `loss` gave {what}, expected a tensor of one number, as .mean() gives it")
        return loss

    def steps_per_epoch(self, batch_size: int) -> int:
        """How many batches make one pass over train."""
        samples = self._of("train")
        return samples.count if samples.whole_batches else max(1, samples.count // min(batch_size, samples.count))

    def _call(self, method: str, *arguments: Any) -> Any:
        """A method of the task. Raises TaskError where it raises: it is the user's code, and the message is theirs."""
        try:
            return getattr(self._own, method)(*arguments)
        except (MpsearchError, FloatingPointError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            raise TaskError(
                f"{self.name}: its `{method}` raised {type(error).__name__}: {error} "
                f"({where.filename}, line {where.lineno})"
            ) from error

    def _of(self, split: Split) -> Samples:
        if split not in self._samples:
            self._samples[split] = samples_in(self._call("batches", split), f"{self.name}: batches('{split}')")
        return self._samples[split]

    def _batches(self, split: Split) -> Iterator[Batch]:
        """All samples of a split in their order; of val as many as were asked for."""
        samples = self._of(split)
        positions = list(range(samples.count))
        if split == "val" and self._most is not None and self._most < samples.count and not samples.whole_batches:
            positions = [index * samples.count // self._most for index in range(self._most)]
        size = 1 if samples.whole_batches else max(1, min(EVAL_BATCH, EVAL_NUMBERS // self._numbers(split)))
        for start in range(0, len(positions), size):
            yield self._parts(samples.take(positions[start : start + size], seed=start))

    def _numbers(self, split: Split) -> int:
        """Numbers in the model input of one sample, or what the task says: answers of a large vocabulary weigh more."""
        x, _ = self._parts(self._of(split).take([0], seed=0))
        return max(1, sum(tensor.numel() for tensor in tensors(x)), getattr(self._own, "sample_numbers", 1))

    def _parts(self, batch: Any) -> Batch:
        """Model input and target of a batch. Raises TaskError where it is none of the known forms."""
        if isinstance(batch, list):
            batch = tuple(batch)
        if isinstance(batch, tuple):
            if len(batch) == 2:
                return batch[0], batch[1]
            if len(batch) == 3 and isinstance(batch[0], tuple) and isinstance(batch[1], Mapping):
                return (batch[0], batch[1]), batch[2]
            raise TaskError(
                f"{self.name}: a batch is a tuple of {len(batch)}, expected (input, target) or (args, kwargs, target), "
                "where several arguments of the model are a tuple: ((x, y), target)"
            )
        return batch, batch

    def _kept(self, rows: list[Tensor] | None, output: Any, count: int) -> list[Tensor] | None:
        """What is compared of a batch, added to what there is; None where outputs of no said kind have no rows."""
        if rows is None or self._comparison is None:
            return None
        try:
            of_batch = self._comparison.rows(output)
        except TaskError:
            if self.kind is not None:
                raise
            return None
        every = max(1, of_batch.numel() // (COMPARED_NUMBERS * max(1, count)))
        return [*rows, of_batch[::every].float().cpu()]

    def _trained(self, model: nn.Module) -> nn.Module:
        """The network after the task's `train`, or with the weights that it had when nothing was different."""
        began = digest(model)
        batch = self._parts(self._of("train").take([0], seed=0))
        sample = [tensor.double().sum().item() for tensor in tensors(batch)]
        try:
            code = inspect.getsource(inspect.getmodule(type(self._own)) or type(self._own))
        except (OSError, TypeError):
            code = type(self._own).__qualname__
        key = content_key(TRAINED, list(self._source), code, began, sample, self._of("train").count)
        seconds: list[float] = []

        def train() -> dict[str, Tensor]:
            started = time.perf_counter()
            progress.info("training the float network of %s, once", self.name)
            with torch.inference_mode(False), torch.enable_grad(), seeded(0):
                self._call("train", model.train())
            seconds.append(time.perf_counter() - started)
            return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}

        state, path = cached_tensors(f"own-{key}", train)
        model.cpu().load_state_dict(map_tensors(torch.clone, state))
        self.float_model_source = (
            f"trained in {seconds[0]:.1f} s, kept as {path}" if seconds else f"trained before: {path}"
        )
        return model
