"""Whether a network trains faster in bfloat16 or in float32 on this machine: measured, not read from a list of flags.

Processors with instructions for bfloat16, but without a unit for matrices of it, may train slower by them: a ResNet-20
took 0.40 s a step where float32 took 0.32.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
import platform
import time
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.cache import content_key
from mpsearch.graph.inputs import call, tensors
from mpsearch.state_dict import digest
from mpsearch.task.cache import cached_tensors
from mpsearch.task.task import Task
from mpsearch.train import autocast, bf16_in_hardware

logger = logging.getLogger(__name__)

SAMPLES = 32
"""Of the batch that is timed, at most: enough for the difference to show."""

TIMES = 3
"""Passes of each kind that are timed, in turn; the fastest counts."""

GAIN = 0.9
"""Share of float32's time below which bfloat16 is taken."""


def trains_in_bf16(task: Task, model: nn.Module, batch_size: int) -> bool:
    """Whether trials of a task should train in bfloat16.

    Measured once for a network, a processor and a number of threads, and kept in the cache, so that two runs on one
    machine are the same. On a card it is what the card supports.

    Args:
        task: gives a batch.
        model: its float network, on the CPU where there is no card; unchanged.
        batch_size: samples of a training step.
    """
    if not bf16_in_hardware() or torch.cuda.is_available():
        return bf16_in_hardware()
    size = min(SAMPLES, batch_size)
    machine = [platform.machine(), sorted(map(str, torch.cpu.get_capabilities().items())), torch.get_num_threads()]
    key = content_key("arithmetic", torch.__version__, machine, task.name, digest(model), size)

    def timed() -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]):  # what is drawn here is not missing elsewhere
            x, _ = next(iter(task.train_batches(size, 1, 0)))
            return {"seconds": torch.tensor(_seconds(copy.deepcopy(model).train(), x))}

    try:
        fp32_s, bf16_s = cached_tensors(f"arithmetic-{key}", timed)[0]["seconds"].tolist()
    except Exception as error:  # of a network that does not run in bfloat16, of any kind
        logger.info("trials train in float32: bfloat16 cannot be tried (%s: %s)", type(error).__name__, error)
        return False
    faster = bool(bf16_s < GAIN * fp32_s)
    logger.info(
        "trials train in %s: a pass over %d samples and back takes %.4f s in float32, %.4f s in bfloat16",
        *("bfloat16" if faster else "float32", size, fp32_s, bf16_s),
    )
    return faster


def _seconds(model: nn.Module, x: Any) -> list[float]:
    """Of a pass and back, in float32 and in bfloat16."""
    fastest = [math.inf, math.inf]
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for turn, bf16 in itertools.product(range(TIMES + 1), (False, True)):
        began = time.perf_counter()
        with autocast(x, bf16):
            output = call(model, x)
        losses = [t.float().square().mean() for t in tensors(output) if t.requires_grad]
        torch.autograd.grad(torch.stack(losses).sum(), weights, allow_unused=True)
        if turn:  # the first may set things up
            fastest[bf16] = min(fastest[bf16], time.perf_counter() - began)
    return fastest
