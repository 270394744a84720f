"""What a diagnosis measured: values, and the questions that they answer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mpsearch.metric import Metric
from mpsearch.precision import BITS, FLOAT, LayerPrecision, Precision, PrecisionConfig

Side = Literal["weight", "activation"]
Part = Literal["weights", "activations", "all"]
Action = Literal["harness", "none", "cle", "per_channel", "adaround", "bias_correction", "min_max", "more_bits", "qat"]
SIDES: Mapping[Side, Part] = {"weight": "weights", "activation": "activations"}

TOLERANCE = 0.01
"""The share of the float score that may be lost: a part that loses more is a problem."""

SANE = 1e-4
"""Divergence by which folding and rounding in float32 may move the outputs."""

WORST = 3
"""Layers of a side that are looked at closely."""


@dataclass(frozen=True, slots=True)
class Score:
    """How a network does beside the float one, on the same samples."""

    value: float  # of the task's metric
    divergence: float  # of its outputs from the float model's, in `Diagnosis.unit`
    changed: float | None  # share of answers that are others; None where outputs are no classes


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """One layer's weight or activation, quantized alone in a network that is float otherwise."""

    precision: Precision
    sqnr_db: float  # 10 log10(E[x^2] / E[(x - q(x))^2]); of an activation over all its values on val
    alone: Score


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """One layer; what the config leaves float is None."""

    name: str
    kind: str
    channel_ratio: float  # max|w| of the largest output channel over that of the median one
    weight: TensorFacts | None
    activation: TensorFacts | None

    def side(self, side: Side) -> TensorFacts | None:
        """The weight's or the activation's facts."""
        return self.weight if side == "weight" else self.activation


@dataclass(frozen=True, slots=True)
class Histogram:
    """Values of one tensor, counted in the same bins before and after quantization."""

    layer: str
    side: Side
    precision: Precision
    edges: tuple[float, ...]  # (bins + 1,)
    before: tuple[int, ...]  # (bins,)
    after: tuple[int, ...]  # (bins,)


@dataclass(frozen=True, slots=True)
class Attempt:
    """A remedy, tried alone with only one side quantized."""

    action: Action
    side: Side
    layers: tuple[str, ...]  # that it was tried on; empty: all
    score: Score


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was measured. Where the sanity check failed, nothing behind it was."""

    config: PrecisionConfig
    metric: Metric  # what a score is
    samples: int  # of the validation split
    float_score: float
    unit: str  # of divergences: nats, or a share of the output's variance
    sanity: Score  # quantizers inserted, everything at float precision
    parts: Mapping[Part, Score]
    layers: tuple[LayerFacts, ...]
    histograms: tuple[Histogram, ...]  # of the worst layers
    attempts: tuple[Attempt, ...]
    notes: tuple[str, ...]  # what was left out and why
    seconds: float

    @property
    def sane(self) -> bool:
        """Whether inserting quantizers alone leaves the network as it was."""
        return self.sanity.divergence <= SANE

    def drop(self, score: Score) -> float:
        """How much worse a score is than the float model's, in its unit."""
        return self.metric.gain(self.float_score, over=score.value)

    def drop_error(self, score: Score) -> float | None:
        """A bound on the standard error of `drop`, which only samples with another answer contribute to.

        None where a score is not the share of right answers.
        """
        if score.changed is None or self.metric.name not in ("top1", "top5", "accuracy"):
            return None
        return math.sqrt(score.changed / self.samples)

    def harmful(self, part: Part) -> bool:
        """Whether a part loses more than the tolerance; NaN does."""
        return not self.drop(self.parts[part]) <= TOLERANCE * abs(self.float_score)

    def ranked(self, side: Side) -> list[tuple[LayerFacts, TensorFacts]]:
        """The layers quantized on this side, the one that moves the outputs most first."""
        quantized = [(layer, facts) for layer in self.layers if (facts := layer.side(side)) is not None]
        return sorted(quantized, key=lambda pair: worst_first(pair[1].alone.divergence))

    def worst(self, side: Side) -> tuple[str, ...]:
        """The first layers of `ranked`, until they have half of the sum of all divergences, `WORST` at most."""
        ranked = self.ranked(side)
        half = sum(facts.alone.divergence for _, facts in ranked) / 2
        names: list[str] = []
        for layer, facts in ranked[:WORST]:
            names.append(layer.name)
            half -= facts.alone.divergence
            if half <= 0:
                break
        return tuple(names)


WIDEST = 8
"""Bits up to which a tensor is widened for a look at it; few targets have integers between this and float."""


def widened(config: PrecisionConfig, names: Sequence[str]) -> PrecisionConfig:
    """The config with twice the bits for the layers named, or the most that their quantizer has, or else float."""

    def wider(precision: Precision) -> Precision:
        bits = min(2 * precision.bits, max(BITS[precision.quantizer]), max(WIDEST, precision.bits))
        return FLOAT if bits == precision.bits else replace(precision, bits=bits)

    return config.replace(
        **{name: LayerPrecision(wider(config[name].weight), wider(config[name].activation)) for name in names}
    )


def worst_first(divergence: float) -> float:
    """Key to sort divergences by: the largest first, NaN before all."""
    return -math.inf if math.isnan(divergence) else -divergence
