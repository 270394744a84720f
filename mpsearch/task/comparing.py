"""Comparison: how the outputs of a quantized network are compared with those of the float one.

Two uses have one rule: distillation trains towards the float network's outputs, and the divergence from them ranks
configs, layers and starts of trials. By the kind of the output:

    classification  (n, classes)                  Jeffreys divergence of the softmax over classes, nats
    segmentation    (n, classes, h, w)            the same, of every position
    language        (n, steps, vocabulary)        the same, of every step
    regression      any tensor of numbers         mean squared error over the variance of the float network's output
    detection       lists or dicts of what not    nothing: trained with the task's own loss, ranked by score alone

A softmax over the rows of an image or the steps of a sequence would train, and to the wrong end; so where the kind is
not known and the output is not `(n, classes)`, it is refused with what to write.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mpsearch.errors import TaskError, nearest
from mpsearch.train import jeffreys

Kind = Literal["classification", "segmentation", "language", "regression", "detection"]

KIND_OF_METRIC: Mapping[str, Kind] = {
    **dict.fromkeys(("top1", "top5", "accuracy", "f1", "auroc"), "classification"),
    "miou": "segmentation",
    **dict.fromkeys(("perplexity", "bpc", "bits_per_byte"), "language"),
    **dict.fromkeys(("psnr", "ssim", "r2", "mse", "rmse", "mae"), "regression"),
    **dict.fromkeys(("map", "map50"), "detection"),
}
"""What a common metric says of the output, where the task does not say its kind."""

OUTPUTS = ("logits", "out")
"""Where models of transformers and torchvision hold the tensor that counts, in an output that has more."""


@dataclass(frozen=True)
class Comparison:
    """How two networks' outputs for the same batch are compared.

    Attributes:
        rows: output -> `(m, k)`, a row for each thing that is answered. Raises TaskError for another output.
        divergence: of rows from the float network's, a scalar; 0 where they are the same.
        unit: of a divergence.
        classes: whether a row is the logits of one decision, so that an answer is the largest of it.
        settled: divergence below which brief training only makes a network worse.
        near: divergence below which BatchNorm's own statistics are better than estimates of them.
    """

    rows: Callable[[Any], Tensor]
    divergence: Callable[[Tensor, Tensor], Tensor]
    unit: str
    classes: bool
    settled: float
    near: float


def relative_error(rows: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of rows `(m, k)` from the float network's, over the variance of these."""
    rows, reference = (rows, teacher) if rows.dtype == torch.float64 else (rows.float(), teacher.float())
    variance = (reference - reference.mean()).square().mean().clamp_min(1e-12)
    return (rows - reference).square().mean() / variance


def comparison(name: str, kind: str | None, pick: Callable[[Any], Any] | None = None) -> Comparison | None:
    """How outputs of a kind are compared; None of a detection, whose outputs are not.

    Args:
        name: of the task, for the messages.
        kind: one of `Kind`; None: `(n, classes)` is a classification, and everything else is refused.
        pick: the tensor that counts in an output; default: the output, or its `logits` or `out`.

    Raises:
        TaskError: no such kind.
    """
    if kind is not None and kind not in get_args(Kind):
        raise TaskError(f"{name}: unknown kind '{kind}': {nearest(kind, get_args(Kind))}")
    if kind == "detection":
        return None
    if kind == "regression":
        regression = _Rows(name, kind, pick)
        # 1e-5: 50 dB; 0.1: 10 dB
        return Comparison(regression, relative_error, "of the output's variance", False, 1e-5, 0.1)
    return Comparison(_Rows(name, kind, pick), jeffreys, "nats", True, SETTLED, NEAR)


SETTLED = 0.01
"""Nats from the float network's answers below which brief training only makes a network worse.

A ResNet-20 at W8A8 and W7A7 starts at 0.002 and 0.006; 100 steps of distillation take W8A8 to 0.02.
"""

NEAR = 0.1
"""Nats from the float network's answers below which BatchNorm's own statistics are better than estimates of them."""

_AXES: Mapping[str | None, tuple[int, ...]] = {
    None: (2,),
    "classification": (2,),
    "segmentation": (3, 4, 5),
    "language": (2, 3),
    "regression": (1, 2, 3, 4, 5),
}
"""How many axes an output of a kind may have."""


class _Rows:
    """Output -> `(m, k)`, by its kind."""

    def __init__(self, name: str, kind: str | None, pick: Callable[[Any], Any] | None) -> None:
        self._name, self._kind, self._pick = name, kind, pick or output_tensor

    def __call__(self, output: Any) -> Tensor:
        value = self._pick(output)
        shape = (
            f"the shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"no tensor ({type(value).__name__})"
        )
        if not isinstance(value, Tensor) or value.dim() not in _AXES[self._kind]:
            of = f" of kind {self._kind}" if self._kind else ""
            raise TaskError(
                f"{self._name}: the output{of} that distillation compares has {shape}, expected "
                f"{_EXPECTED[self._kind]}: let the task say its `kind` ({', '.join(get_args(Kind))}), or have a "
                "`distill_loss(student, teacher)`, or set trial.distill to false to train with the task's own loss"
            )
        if self._kind == "regression":
            return value.flatten(1) if value.dim() > 1 else value.unsqueeze(1)
        if self._kind == "segmentation":
            return value.movedim(1, -1).flatten(0, -2)
        return value.flatten(0, -2)


_EXPECTED: Mapping[str | None, str] = {
    None: "(n, classes)",
    "classification": "(n, classes)",
    "segmentation": "(n, classes, height, width)",
    "language": "(n, steps, vocabulary)",
    "regression": "a tensor of numbers",
}


def output_tensor(output: Any) -> Any:
    """The tensor that counts in a model's output: the output, or its `logits` or `out`."""
    for name in OUTPUTS:
        if isinstance(output, Mapping) and name in output:
            return output[name]
        if not isinstance(output, Tensor) and hasattr(output, name):
            return getattr(output, name)
    return output
