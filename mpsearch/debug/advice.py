"""What to try next: the decision tree of the white paper over what was measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

from mpsearch.debug.diagnosis import (
    SIDES,
    TOLERANCE,
    WORST,
    Action,
    Attempt,
    Diagnosis,
    Score,
    Side,
    TensorFacts,
    widened,
)
from mpsearch.precision import PrecisionConfig

COMMANDS: Mapping[Action, str] = {
    "cle": "mpsearch ptq {study} --bits {bits}",
    "per_channel": "mpsearch debug {study} {per_channel}",
    "adaround": "mpsearch ptq {study} --bits {bits}",
    "bias_correction": "mpsearch ptq {study} --bits {bits} --rounding nearest --bias-correction empirical",
    "qat": "mpsearch train {study} --method qat --target {bits}",
}
"""What does it, for a config that has a shorthand; `ptq` equalizes in any case."""

BADLY_SCALED = 8.0
"""A channel ratio from which half of the channels lose three of the bits that the largest one has."""

HELPS = 0.9
"""A remedy has to leave less than this share of the divergence."""


@dataclass(frozen=True, slots=True)
class Advice:
    """One thing to try, in the order of the flow."""

    action: Action
    text: str
    layers: tuple[str, ...] = ()  # that it is about
    command: str | None = None  # that does it, where there is one


def advise(diagnosis: Diagnosis, study: str = "STUDY") -> tuple[Advice, ...]:
    """What to try next, in the order of the white paper's flow; a remedy that was tried has to have helped.

    `study` is what the commands name.
    """
    bits = _shorthand(diagnosis.config)

    def command(action: Action) -> str | None:
        if bits is None or action not in COMMANDS:
            return None
        return COMMANDS[action].format(study=study, bits=bits, per_channel=bits.removesuffix("/tensor"))

    return tuple(replace(item, command=command(item.action)) for item in _steps(diagnosis))


def document(diagnosis: Diagnosis, study: str = "STUDY") -> dict[str, Any]:
    """The diagnosis for programs; what is not a number (SQNR of a tensor that loses nothing, say) is null.

    - `metric`, `samples` of val, `float_val`, `seconds`, `notes`; `sane` and `sanity`; `parts`: `weights`,
      `activations`, `all`, each with `harmful`;
    - `layers`: `layer`, `kind`, `channel_ratio`, `weight` and `activation` (`precision`, `sqnr_db`, and the scores with
      this tensor alone quantized; null where the config leaves float); `worst`: layer names by side;
    - `attempts`: `action`, `side`, `layers`; `advice`: `action`, `text`, `layers`, `command`;
    - `histograms`: `layer`, `side`, `precision`, `edges`, `before`, `after`.

    `metric` is what scores are: its name, direction and unit. Scores are `score` (as `float_val`), `drop` (by how much
    it is worse), `drop_error` (a bound on its standard error), `divergence` (in `unit`), `changed` (the share of the
    answers that are others); what does not apply to the metric is null.
    """

    def score(value: Score) -> dict[str, float | None]:
        return {
            "score": _number(value.value),
            "drop": _number(diagnosis.drop(value)),
            "drop_error": _number(diagnosis.drop_error(value)),
            "divergence": _number(value.divergence),
            "changed": _number(value.changed),
        }

    def tensor(facts: TensorFacts | None) -> dict[str, Any] | None:
        if facts is None:
            return None
        return {"precision": str(facts.precision), "sqnr_db": _number(facts.sqnr_db), **score(facts.alone)}

    return {
        "metric": diagnosis.metric.to_json(),
        "samples": diagnosis.samples,
        "unit": diagnosis.unit,
        "float_val": _number(diagnosis.float_score),
        "sane": diagnosis.sane,
        "sanity": score(diagnosis.sanity),
        "parts": {
            part: {**score(value), "harmful": diagnosis.harmful(part)} for part, value in diagnosis.parts.items()
        },
        "layers": [
            {
                "layer": layer.name,
                "kind": layer.kind,
                "channel_ratio": _number(layer.channel_ratio),
                "weight": tensor(layer.weight),
                "activation": tensor(layer.activation),
            }
            for layer in diagnosis.layers
        ],
        "worst": {side: list(diagnosis.worst(side)) for side in SIDES},
        "attempts": [
            {"action": tried.action, "side": tried.side, "layers": list(tried.layers), **score(tried.score)}
            for tried in diagnosis.attempts
        ],
        "histograms": [
            {
                "layer": histogram.layer,
                "side": histogram.side,
                "precision": str(histogram.precision),
                "edges": list(histogram.edges),
                "before": list(histogram.before),
                "after": list(histogram.after),
            }
            for histogram in diagnosis.histograms
        ],
        "advice": [asdict(item) for item in advise(diagnosis, study)],
        "notes": list(diagnosis.notes),
        "seconds": diagnosis.seconds,
    }


def _steps(diagnosis: Diagnosis) -> list[Advice]:
    """The advice without its commands."""
    if not diagnosis.sane:
        text = (
            f"Inserting quantizers that do nothing already moves the outputs by {diagnosis.sanity.divergence:.2g} "
            f"{diagnosis.unit} "
            f"({_scored(diagnosis, diagnosis.sanity)}): before anything else, look for what the network does "
            "differently with quantized layers (a forward that asks for a layer's class, randomness in eval mode)."
        )
        return [Advice("harness", text)]
    if not diagnosis.harmful("all"):
        scored = _scored(diagnosis, diagnosis.parts["all"])
        return [Advice("none", f"Nothing: the whole config is within {TOLERANCE:.0%} of the float score ({scored}).")]
    steps = {side: list(_side_steps(diagnosis, side)) for side in SIDES if diagnosis.harmful(SIDES[side])}
    reasons = [
        f"Nothing that was tried helps the {SIDES[side]}, which lose most in {', '.join(diagnosis.worst(side))}."
        for side, remedies in steps.items()
        if not remedies
    ]
    if not steps:
        reasons = [
            f"Weights alone ({_scored(diagnosis, diagnosis.parts['weights'])}) and activations alone "
            f"({_scored(diagnosis, diagnosis.parts['activations'])}) are fine, together they are not."
        ]
    how = "Train with the quantizers in place (QAT)" + ("." if reasons else " if that is not enough.")
    layers = tuple(name for side, remedies in steps.items() if not remedies for name in diagnosis.worst(side))
    return [*chain.from_iterable(steps.values()), Advice("qat", " ".join([*reasons, how]), layers)]


def _side_steps(diagnosis: Diagnosis, side: Side) -> Iterator[Advice]:
    """What is to be tried for one side that is a problem."""
    part, metric = SIDES[side], diagnosis.metric
    without = diagnosis.parts[part]
    tried = {attempt.action: attempt for attempt in diagnosis.attempts if attempt.side == side}

    def outcome(attempt: Attempt) -> str:
        return (
            f"{part} alone then score {metric.show(attempt.score.value)} instead of {metric.show(without.value)} "
            f"(divergence {attempt.score.divergence:.3g} instead of {without.divergence:.3g})"
        )

    def helped(action: Action) -> Attempt | None:
        attempt = tried.get(action)
        if attempt is None or not math.isfinite(attempt.score.divergence):
            return None
        worse = metric.better(without.value, than=attempt.score.value)
        return None if worse or attempt.score.divergence >= HELPS * without.divergence else attempt

    if attempt := helped("cle"):
        bad = _badly_scaled(diagnosis)
        where = f" Channels are badly scaled in {_listed(diagnosis, bad)}." if bad else ""
        yield Advice("cle", f"Cross-layer equalization: {outcome(attempt)}.{where}", bad)
    if attempt := helped("per_channel"):
        bad = tuple(name for name in _badly_scaled(diagnosis) if name in attempt.layers) or diagnosis.worst(side)
        yield Advice(
            "per_channel",
            f"One scale per output channel instead of one per weight: {outcome(attempt)}. It matters most in "
            f"{_listed(diagnosis, bad)}.",
            bad,
        )
    worst = diagnosis.worst(side)
    if side == "weight":
        uniform = [
            layer for layer in diagnosis.layers if layer.weight and layer.weight.precision.quantizer == "uniform"
        ]
        if uniform:
            bits = min(layer.weight.precision.bits for layer in uniform if layer.weight)
            yield Advice(
                "adaround",
                f"AdaRound: weights of {bits} bits are rounded to the nearest here, learned rounding is usually better "
                f"(takes longer, not tried). The worst layers are {', '.join(worst)}.",
                worst,
            )
        if attempt := helped("bias_correction"):
            yield Advice("bias_correction", f"Bias correction, where AdaRound takes too long: {outcome(attempt)}.")
    elif attempt := helped("min_max"):
        yield Advice("min_max", f"Ranges by min-max instead of least squared error: {outcome(attempt)}.")
    if attempt := helped("more_bits"):
        what = "weights" if side == "weight" else "activations"
        wider = widened(diagnosis.config, worst)
        widths = ", ".join(dict.fromkeys(str(getattr(wider[name], side)) for name in worst))
        text = f"More bits ({widths}) for the {what} of {', '.join(worst)}: {outcome(attempt)}."
        yield Advice("more_bits", text, worst)


def _badly_scaled(diagnosis: Diagnosis) -> tuple[str, ...]:
    layers = [layer for layer in diagnosis.layers if layer.weight and layer.channel_ratio >= BADLY_SCALED]
    return tuple(layer.name for layer in sorted(layers, key=lambda layer: -layer.channel_ratio))


def _listed(diagnosis: Diagnosis, names: Sequence[str]) -> str:
    ratios = {layer.name: layer.channel_ratio for layer in diagnosis.layers}
    texts = [f"{name} (largest channel {ratios[name]:.1f} times the median)" for name in names[:WORST]]
    return ", ".join(texts) + (f" and {len(names) - WORST} more" if len(names) > WORST else "")


def _scored(diagnosis: Diagnosis, score: Score) -> str:
    metric = diagnosis.metric
    return f"{metric.name} {metric.show(score.value)}, float {metric.show(diagnosis.float_score)}"


def _shorthand(config: PrecisionConfig) -> str | None:
    """The config as w4a8 or w4a8/tensor, if it is one."""
    layer = next(iter(config.values()))
    text = f"w{layer.weight.bits}a{layer.activation.bits}"
    usual = layer.weight.is_float or layer.weight.granularity == "channel"
    text += "" if usual else f"/{layer.weight.granularity}"
    same = config == PrecisionConfig.uniform(config, layer)
    uniform = {layer.weight.quantizer, layer.activation.quantizer} <= {"uniform", "float"}
    return text if same and uniform else None


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
