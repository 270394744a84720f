"""The start score: how far a config's answers are from the float network's before any training.

    D = mean over batches of J(q(x), f(x)),   J the divergence of the task's comparison (of logits: Jeffreys, in nats)

Ranges are set and nothing is trained. In both networks BatchNorm normalizes by the batch's own statistics, as if they
were estimated anew, so that quantization is all that tells them apart. (With the float network's own statistics the
order of 16 configs of one cost on 256 images agrees less with that on 1,024.) Networks without BatchNorm run as they
are. All configs see the same training batches.

Configs share what they are made of, so each part is made once: the quantized weight of a layer at a precision, the
range of its input, and what the float network says to the batches. A score is then one forward pass a batch, in
bfloat16 where that is faster here and the scores agree with those in float32.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.errors import TaskError
from mpsearch.graph.inputs import call, map_tensors, tensors
from mpsearch.precision import Offer, Precision, PrecisionConfig, per_tensor
from mpsearch.private.torch import BatchNormNd
from mpsearch.quant.modules import QuantEmbedding, QuantLayer
from mpsearch.quant.prepare import RangeSetter, check_names, insert_quantizers, quant_layers, weight_rows
from mpsearch.task.comparing import Comparison
from mpsearch.train import autocast, to_device
from mpsearch.workbench import Workbench, agrees, channels_last

logger = logging.getLogger(__name__)

BATCH = 64
"""Samples of a batch, if trials have no fewer: a layer's values then stay in a core's cache, 128 take half as long
again. BatchNorm has statistics enough."""
BATCHES = 4
"""Batches of a score."""


class StartScorer:
    """Scores configs of one network, one after another.

    Args:
        workbench: the task's: its ranges, batches, device and arithmetic.
        offers: the quantizer types of each layer (`SearchSpace.offers`).
        most_batches: the largest number that a score is asked on.
        room_bytes: for the weights that are kept, and for the batches; what is beyond is made again.

    Raises:
        TaskError: the task's outputs cannot be compared.
    """

    def __init__(
        self,
        workbench: Workbench,
        offers: Mapping[str, Offer],
        most_batches: int = BATCHES,
        room_bytes: int = 2**28,
    ) -> None:
        model = insert_quantizers(channels_last(workbench.task.float_model()), workbench.layers, offers)
        model.to(workbench.device)  # before `_Weights`, which takes the weights' quantizers out of the model
        self._layers = quant_layers(model)
        self._weights = {
            name: _Weights(name, layer, workbench.ranges) for name, layer in self._layers.items() if layer.has_weight
        }
        self._model = _by_batch(workbench.compile_quantizers(model))
        self._ranges = workbench.ranges
        self._room_bytes = room_bytes
        self._batches = _Batches(workbench, most_batches, room_bytes)
        self._compared = compared_of(workbench)
        self.bf16 = workbench.bf16

    def __call__(self, config: PrecisionConfig, batches: int = BATCHES, begun: tuple[int, float] = (0, 0.0)) -> float:
        """The start score of a config on the first `batches`; infinite or NaN where the network breaks.

        Where its score on fewer is known, `begun` is (batches, score): only the others are run.

        Raises:
            PrecisionError: the config does not fit the network.
        """
        self._put(config)
        count, score = begun
        return (count * score + (batches - count) * self._divergence(batches, self.bf16, count)) / batches

    def choose_arithmetic(self, configs: Iterable[PrecisionConfig]) -> bool:
        """Stay in bfloat16 only if it is faster here and scores some configs as float32 does; whether it does."""
        if not self.bf16:
            return False
        scores: dict[bool, list[float]] = {False: [], True: []}
        seconds = {False: math.inf, True: math.inf}
        for config in configs:
            self._put(config)
            for bf16 in scores:
                scores[bf16].append(self._divergence(1, bf16))  # the first time it may compile
                began = time.perf_counter()
                self._divergence(1, bf16)
                seconds[bf16] = min(seconds[bf16], time.perf_counter() - began)
        self.bf16 = seconds[True] < seconds[False] and agrees(list(zip(scores[False], scores[True], strict=True)))
        logger.info(
            "start scores in float32 and bfloat16: %s, %s, %.3f and %.3f s a batch: %s is used",
            *(scores[False], scores[True], seconds[False], seconds[True], "bfloat16" if self.bf16 else "float32"),
        )
        return self.bf16

    @torch.no_grad()
    def _put(self, config: PrecisionConfig) -> None:
        """Take on the precisions of a config, where they are not those of the last one."""
        check_names(config, self._layers)
        for name, layer in self._layers.items():
            if layer.has_weight:
                self._weights[name].put(config[name].weight)
            elif layer.weight_quantizer.precision != (second := per_tensor(config[name].weight)):
                layer.weight_quantizer.set_precision(second)
                if not second.is_float:
                    layer.weight_quantizer.set_range(*self._ranges.second(name, second))
            quantizer, precision = layer.input_quantizer, config[name].activation
            if quantizer.precision != precision and not isinstance(layer, QuantEmbedding):
                quantizer.set_precision(precision)
                if not precision.is_float:
                    quantizer.set_range(*self._ranges.activation(name, precision))

    @torch.inference_mode()
    def _divergence(self, batches: int, bf16: bool, skip: int = 0) -> float:
        total = 0.0
        for x, expected in self._batches.first(batches, skip):
            with autocast(x, bf16):
                output = call(self._model, x)
            total += float(self._compared.divergence(self._compared.rows(output), expected))
            if not math.isfinite(total):
                break
        return total / max(1, batches - skip)


def compared_of(workbench: Workbench) -> Comparison:
    """How the outputs of a task are compared. Raises TaskError where they are not."""
    if workbench.comparison is None:
        raise TaskError(f"{workbench.task.name}: outputs of kind detection are not compared with the float network's")
    return workbench.comparison


class _Weights(nn.Module):
    """A layer's quantized weight at the precision that holds now; in the place of its weight quantizer."""

    def __init__(self, name: str, layer: QuantLayer, ranges: RangeSetter) -> None:
        super().__init__()
        self._make = (name, layer, layer.weight_quantizer, ranges)  # in a tuple: no modules of this one
        self._made: dict[Precision, Tensor] = {}
        self._now: Precision | None = None
        layer.weight_quantizer = self  # type: ignore[assignment]

    def put(self, precision: Precision) -> None:
        """Take on a precision."""
        name, layer, quantizer, ranges = self._make
        self._now = precision
        if precision in self._made:
            return
        weight = layer.weight
        quantizer.set_precision(precision)
        if not precision.is_float:
            quantizer.set_range(ranges.weight(name, precision, weight_rows(layer)))
        self._made[precision] = quantizer(weight).detach()

    def forward(self, _weight: Tensor) -> Tensor:
        """The quantized weight."""
        assert self._now is not None
        return self._made[self._now]


class _Batches:
    """The batches that re-estimate BatchNorm in a trial, with what the float network says to them."""

    def __init__(self, workbench: Workbench, most: int, room_bytes: int) -> None:
        self._workbench, self._most, self._room = workbench, most, room_bytes
        self._model = _by_batch(channels_last(workbench.task.float_model()).to(workbench.device))
        self._compared = compared_of(workbench)
        self._kept: list[tuple[Any, Tensor]] = []
        next(self.first(1))  # before anything is scored: outputs that cannot be compared are refused

    def first(self, count: int, skip: int = 0) -> Iterator[tuple[Any, Tensor]]:
        """Input and the rows of the output `(m, k)` of the first `count` batches, but for the very first `skip`."""
        yield from self._kept[skip:count]
        yield from islice(self._others(count), max(0, skip - len(self._kept)), None)

    def _others(self, count: int) -> Iterator[tuple[Any, Tensor]]:
        """Those of the first `count` batches that are not kept yet."""
        if count <= len(self._kept):
            return
        settings, device = self._workbench.settings, self._workbench.device
        size = min(BATCH, settings.batch_size)
        batches = to_device(self._workbench.train_batches(self._most, settings.seed + 1, size), device)
        for x, _ in islice(batches, len(self._kept), count):
            x = map_tensors(_dense, x)
            with torch.inference_mode():
                rows = self._compared.rows(call(self._model, x)).float()
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors((x, rows)))
            if size <= self._room:
                self._kept.append((x, rows))
            self._room = self._room - size if size <= self._room else 0  # those that are kept are the first ones
            yield x, rows


def _by_batch(model: nn.Module) -> nn.Module:
    """A model in eval mode but for its BatchNorms, which normalize by each batch's own statistics; in place."""
    model.eval()
    for module in model.modules():
        if isinstance(module, BatchNormNd):
            module.train()
    return model


def _dense(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
