"""The samples of a split, out of whatever batches a task gives: taken by position, so that a seed decides the batches.

A DataLoader over a data set that is indexed is not run: its data set and `collate_fn` are used, with the random state
of Python, NumPy and torch set by the seed, so that augmentations are the same for the same seed. Any other iterable is
read once and kept. Its batches are cut and joined where they can be: tensors and lists along their first axis, in any
nesting of tuples and mappings; where shapes differ from batch to batch (texts, each padded to its batch's longest),
batches stay as they are.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from mpsearch.errors import TaskError
from mpsearch.graph.inputs import tensors

MOST_BYTES = 2**32
"""What is kept in memory of a split that is no DataLoader."""


class Samples(Protocol):
    """What a split holds: `count` samples, or batches that cannot be cut."""

    count: int
    whole_batches: bool  # whether an index is that of a batch

    def take(self, indices: Sequence[int], seed: int) -> Any:
        """A batch as the task gives it, of the samples at these positions."""
        ...


class Indexed:
    """The samples of a DataLoader over a data set that is indexed."""

    whole_batches = False

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._data, self._collate = loader.dataset, loader.collate_fn
        plain = isinstance(loader.sampler, (SequentialSampler, RandomSampler))
        self._positions = range(len(self._data)) if plain else sorted(set(loader.sampler))  # type: ignore[arg-type]
        self.count = len(self._positions)

    def take(self, indices: Sequence[int], seed: int) -> Any:
        """As `Samples.take`."""
        with seeded(seed):
            return self._collate([self._data[self._positions[index]] for index in indices])


class Stored:
    """Batches joined into one."""

    whole_batches = False

    def __init__(self, batch: Any, count: int) -> None:
        self._batch, self.count = batch, count

    def take(self, indices: Sequence[int], seed: int) -> Any:
        """As `Samples.take`."""
        return _taken(self._batch, list(indices), self.count)


class Whole:
    """Batches that cannot be cut."""

    whole_batches = True

    def __init__(self, batches: list[Any]) -> None:
        self._batches, self.count = batches, len(batches)

    def take(self, indices: Sequence[int], seed: int) -> Any:
        """As `Samples.take`; of the first position."""
        return self._batches[indices[0]]


def samples_in(batches: Iterable[Any], what: str) -> Samples:
    """The samples of a split's batches; `what` names them in messages.

    Raises:
        TaskError: they are no iterable, none, or more than `MOST_BYTES`.
    """
    if isinstance(batches, DataLoader) and batches.batch_size is not None and hasattr(batches.dataset, "__getitem__"):
        indexed = Indexed(batches)
        if not indexed.count:
            raise TaskError(f"{what} is a DataLoader without a sample")
        return indexed
    if isinstance(batches, (str, bytes, Tensor, Mapping)) or not isinstance(batches, Iterable):
        raise TaskError(
            f"{what} is a {type(batches).__name__}, expected an iterable of batches, as a list or a DataLoader"
        )
    kept, size = [], 0
    for batch in batches:
        kept.append(tuple(batch) if isinstance(batch, list) else batch)  # [input, target], as torch collates
        size += sum(tensor.numel() * tensor.element_size() for tensor in tensors(batch))
        if size > MOST_BYTES:
            raise TaskError(
                f"{what} gave more than {MOST_BYTES / 2**30:.0f} GiB: return a torch DataLoader over a data set that "
                "is indexed, which is read sample by sample"
            )
    if not kept:
        raise TaskError(f"{what} gave no batch: it is called once for each split, and has to begin anew each time")
    counts = [_length(batch) for batch in kept]
    if None in counts:
        return Whole(kept)
    try:
        return Stored(_joined(kept), sum(count for count in counts if count is not None))
    except (ValueError, RuntimeError, TypeError):
        return Whole(kept)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The random states of Python, NumPy and torch's CPU set inside, and afterwards as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002  # what data sets draw from
    try:
        # Of the CPU alone: torch.manual_seed takes down the stack for every other device, 1 ms for each sample.
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


def _lengths(value: Any) -> Iterator[int | None]:
    if isinstance(value, Tensor):
        yield len(value) if value.dim() else None
    elif isinstance(value, list):
        yield len(value)
    elif isinstance(value, (tuple, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _lengths(item)


def _length(batch: Any) -> int | None:
    """How many samples a batch has; None where its parts differ."""
    lengths = set(_lengths(batch))
    return lengths.pop() if len(lengths) == 1 else None


def _joined(parts: list[Any]) -> Any:
    """Batches one behind the other. Raises ValueError, RuntimeError or TypeError where they do not fit."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, list):
        return [item for part in parts for item in part]
    if isinstance(first, Mapping):
        if any(part.keys() != first.keys() for part in parts):
            raise ValueError("other keys")
        return {key: _joined([part[key] for part in parts]) for key in first}
    if isinstance(first, tuple):
        return tuple(_joined(list(items)) for items in zip(*parts, strict=True))
    if any(part != first for part in parts):
        raise ValueError("other values")
    return first


def _taken(value: Any, indices: list[int], count: int) -> Any:
    if isinstance(value, Tensor):
        return value[indices]
    if isinstance(value, list):
        return [value[index] for index in indices]
    if isinstance(value, Mapping):
        return {key: _taken(item, indices, count) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_taken(item, indices, count) for item in value)
    return value
