"""What a network answers, how far float noise moves that, and how far another's answers are from it.

The answers of a detector are lists of boxes, one list an image, of as many boxes as it finds. Their order says nothing:
boxes of nearly equal scores change places by a rounding error. So a box is compared with the box of the other list that
is nearest to it, in all that is said of a box.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.graph.inputs import call, image_list, map_tensors, tensors
from mpsearch.quant.prepare import quant_layers

NOISE = 2.0**-21
"""Of a sum of floats in another order, against the largest of its tensor."""

RERUNS = 4

SAME_BOX = 0.01
"""Boxes, their labels and scores are the same answer up to this share of the largest."""

FEW = 16
"""Numbers of one box that are compared with those of every other; a mask has more, and is compared with one."""


@dataclass(frozen=True)
class Reference:
    """What the network answers, and how far float noise moves that."""

    outputs: tuple[Tensor, ...]  # (samples, ...) each; of a detector, a few for every image
    difference: Tensor  # (reruns, samples), the largest of each sample; of a detector see `difference`
    changed: float  # answers that differ, mean over the reruns
    images: int = 0  # of a detector: how many images were answered; else 0


@torch.no_grad()
def reference(model: nn.Module, samples: Any, at_once: int = 0, reruns: int = RERUNS) -> Reference:
    """The answers of a quantized network in eval mode to a batch of its input, with noise and without.

    Args:
        model: the network.
        samples: the batch.
        at_once: where that is a list of images, how many of them the network sees at once; 0: all.
        reruns: how often it answers with noise.
    """
    outputs, images = answers(model, samples, at_once)
    generator = torch.Generator().manual_seed(0)

    def disturb(_: nn.Module, args: tuple[Any, ...]) -> Any:
        x = args[0]
        noise = torch.randn(x.shape, generator=generator).to(x)
        return (x + NOISE * x.abs().amax() * noise if x.numel() else x, *args[1:])

    hooks = [layer.input_quantizer.register_forward_pre_hook(disturb) for layer in quant_layers(model).values()]
    try:
        noisy = [answers(model, samples, at_once)[0] for _ in range(reruns)]
    finally:
        for hook in hooks:
            hook.remove()
    if not images:
        # What gives another number of rows moves none: without such reruns less difference is allowed.
        shapes = [x.shape for x in outputs]
        noisy = [rerun for rerun in noisy if [x.shape for x in rerun] == shapes] or [outputs]
    moved = torch.stack([difference(outputs, rerun, images) for rerun in noisy])
    changed = sum(int((~same_answers(outputs, rerun, images)).sum()) for rerun in noisy) / reruns
    return Reference(outputs, moved, changed, images)


def answers(model: nn.Module, samples: Any, at_once: int = 0) -> tuple[tuple[Tensor, ...], int]:
    """The tensors that a network answers with, and of a detector the number of images; see `reference`.

    A detector answers each image with a mapping of its own. Of images that are seen `at_once` a rest is left out.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    samples = map_tensors(lambda x: x.to(device), samples)
    images = image_list(samples)
    if images is None:
        return tuple(x.detach().cpu() for x in tensors(call(model, samples))), 0
    size = at_once or len(images)
    outputs = [call(model, images[i : i + size]) for i in range(0, len(images) - size + 1, size)]
    each = all(
        isinstance(output, (list, tuple)) and len(output) == size and all(isinstance(x, Mapping) for x in output)
        for output in outputs
    )
    return tuple(x.detach().cpu() for x in tensors(outputs)), len(outputs) * size if each else 0


def difference(ours: Sequence[Tensor], theirs: Sequence[Tensor], images: int = 0) -> Tensor:
    """The largest difference of each sample `(samples,)`, as a share of the largest output.

    Of a detector's answers to `images`: of each of our boxes, and after those of an image one number that says whether
    theirs has boxes that we do not have; 1 where there is no box to compare with.
    """
    if images:
        return torch.cat([torch.cat(_of_rows(*pair)) for pair in _by_image(ours, theirs, images)])
    samples = ours[0].shape[0] if ours[0].dim() else 1
    largest_of_each = torch.zeros(samples)
    for a, b in zip(ours, theirs, strict=True):
        a, b = a.double(), b.double()
        off = torch.where(_equal(a, b), 0.0, (a - b).abs().nan_to_num(nan=torch.inf) / _scale(a))
        largest_of_each = torch.maximum(largest_of_each, _per_sample(off, samples).amax(1).float())
    return largest_of_each


def same_answers(ours: Sequence[Tensor], theirs: Sequence[Tensor], images: int = 0) -> Tensor:
    """Whether each sample's largest output is the same one `(samples,)`; of an image, whether its boxes are."""
    if images:
        pairs = _by_image(ours, theirs, images)
        return torch.tensor(
            [len(a[0]) == len(b[0]) and float(torch.cat(_of_rows(a, b)).max()) <= SAME_BOX for a, b in pairs]
        )
    return _largest(ours) == _largest(theirs)


def _by_image(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], images: int
) -> Iterator[tuple[Sequence[Tensor], Sequence[Tensor]]]:
    each = len(ours) // images
    for i in range(0, len(ours), each):
        yield ours[i : i + each], theirs[i : i + each]


def _of_rows(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The difference of each of our rows from the nearest of theirs `(n,)`, and the largest of theirs from ours `(1,)`.

    Tensors have a row a box. Whole numbers, which are labels, differ by 1 or not at all.
    """
    n, m = len(ours[0]), len(theirs[0])
    if not n or not m:
        return torch.ones(n), torch.tensor([float(n != m)])
    cost = torch.zeros(n, m, dtype=torch.float64)
    large = []
    for a, b in zip(ours, theirs, strict=True):
        if a[0].numel() > FEW:
            large.append((a, b))
            continue
        x, y = a.reshape(n, 1, -1).double(), b.reshape(1, m, -1).double()
        scale = _scale(x) if a.is_floating_point() else 1.0
        off = torch.where(_equal(x, y), 0.0, (x - y).abs().nan_to_num(nan=torch.inf) / scale)
        cost = torch.maximum(cost, off.amax(2) if a.is_floating_point() else off.amax(2).clamp_max(1.0))
    away, nearest = cost.min(1)
    for a, b in large:
        x, y = a.reshape(n, -1), b.reshape(m, -1)
        off = torch.stack([(row - y[j]).abs().max() for row, j in zip(x, nearest, strict=True)]) / _scale(a)
        away = torch.maximum(away, off.double().nan_to_num(nan=torch.inf))
    return away.float(), cost.min(0).values.max().reshape(1).float()


def _equal(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | (a.isnan() & b.isnan())  # infinities, too


def _scale(x: Tensor) -> Tensor:
    return x[x.isfinite()].abs().max().clamp_min(1e-30) if x.isfinite().any() else torch.tensor(1.0)


def _per_sample(x: Tensor, samples: int) -> Tensor:
    """`(samples, n)` of one output; what has no batch belongs to all of them."""
    return x.reshape(samples, -1) if x.dim() and x.shape[0] == samples else x.reshape(1, -1).expand(samples, -1)


def _largest(outputs: Sequence[Tensor]) -> Tensor:
    first = outputs[0]
    return _per_sample(first.nan_to_num(), first.shape[0] if first.dim() else 1).argmax(1)
