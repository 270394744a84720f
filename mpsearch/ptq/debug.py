"""Where a quantized network loses its accuracy, and what to try: the white paper's debugging flow (arXiv 2106.08295).

    32-bit sanity -> weights alone, activations alone -> each layer alone -> its values -> remedies, each tried alone

`diagnose` measures, `advise` is the decision tree over what was measured. Scores are of the validation split only;
ranges are of least squared error, on training data. BatchNorm is folded first, because a folded weight is what a scale
has to cover. The accuracy that one layer costs is often within the noise of the sample, so layers are ranked by how far
they move the logits: the Jeffreys divergence from the float model's, in nats.

We differ from the paper in trying the remedies that take seconds (one scale per channel, equalization, bias
correction, min-max ranges, more bits for the worst layers) instead of advising them by rule.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mpsearch.errors import PrecisionError, TaskError
from mpsearch.graph.layers import LayerInfo, inspect_model
from mpsearch.precision import BITS, FLOAT, LayerPrecision, Precision, PrecisionConfig
from mpsearch.ptq.bias import correct_bias_empirically
from mpsearch.ptq.equalize import equalize
from mpsearch.ptq.flow import trace
from mpsearch.ptq.fold import FloatNet, fold_batch_norms
from mpsearch.ptq.pipeline import set_activation_ranges
from mpsearch.quant.prepare import (
    RangeSetter,
    check_names,
    insert_quantizers,
    quant_layers,
    set_precision,
    weight_rows,
)
from mpsearch.task.task import Task
from mpsearch.train import jeffreys

Side = Literal["weight", "activation"]
Part = Literal["weights", "activations", "all"]
Action = Literal["harness", "none", "cle", "per_channel", "adaround", "bias_correction", "min_max", "more_bits", "qat"]

COMMANDS: Mapping[Action, str] = {
    "cle": "mpsearch ptq {study} --bits {bits}",
    "per_channel": "mpsearch debug {study} {per_channel}",
    "adaround": "mpsearch ptq {study} --bits {bits}",
    "bias_correction": "mpsearch ptq {study} --bits {bits} --rounding nearest --bias-correction empirical",
    "qat": "mpsearch train {study} --method qat --target {bits}",
}
"""What does it, for a config that has a shorthand; `ptq` equalizes in any case."""

SIDES: Mapping[Side, Part] = {"weight": "weights", "activation": "activations"}

TOLERANCE = 0.01
"""The share of the float score that may be lost: a part that loses more is a problem."""
SANE = 1e-4
"""Nats that folding and rounding in float32 may move the logits."""
BADLY_SCALED = 8.0
"""A channel ratio from which half of the channels lose three of the bits that the largest one has."""
HELPS = 0.9
"""A remedy has to leave less than this share of the divergence."""
WORST = 3
"""Layers of a side that are looked at closely."""
CALIBRATION_SAMPLES = 512
BINS = 80
HISTOGRAM_SAMPLES = 4096  # activations kept of each layer and batch


@dataclass(frozen=True, slots=True)
class Score:
    """How a network does beside the float one, on the same samples."""

    accuracy: float  # the task's metric
    divergence: float  # of its logits from the float model's, nats
    changed: float  # share of samples with another first answer


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """One layer's weight or input, quantized alone in a network that is float otherwise."""

    precision: Precision
    sqnr_db: float  # 10 log10(E[x^2] / E[(x - q(x))^2]); of an input over all its values on val
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
    metric: str  # what an accuracy is
    samples: int  # of the validation split
    float_accuracy: float
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
        """The accuracy lost against the float model."""
        return self.float_accuracy - score.accuracy

    def drop_error(self, score: Score) -> float:
        """A bound on the standard error of `drop`, which only samples with another answer contribute to."""
        return math.sqrt(score.changed / self.samples)

    def harmful(self, part: Part) -> bool:
        """Whether a part loses more than the tolerance; NaN does."""
        return not self.drop(self.parts[part]) <= TOLERANCE * self.float_accuracy

    def ranked(self, side: Side) -> list[tuple[LayerFacts, TensorFacts]]:
        """The layers quantized on this side, the one that moves the logits most first."""
        found = [(layer, facts) for layer in self.layers if (facts := layer.side(side)) is not None]
        return sorted(found, key=lambda pair: _worst_first(pair[1].alone.divergence))

    def worst(self, side: Side) -> tuple[str, ...]:
        """The first layers of `ranked`, until they have half of the sum of all divergences, `WORST` at most."""
        ranked = self.ranked(side)
        half = sum(facts.alone.divergence for _, facts in ranked) / 2
        chosen: list[str] = []
        for layer, facts in ranked[:WORST]:
            chosen.append(layer.name)
            half -= facts.alone.divergence
            if half <= 0:
                break
        return tuple(chosen)


@dataclass(frozen=True, slots=True)
class Advice:
    """One thing to try, in the order of the flow."""

    action: Action
    text: str
    layers: tuple[str, ...] = ()  # that it is about
    command: str | None = None  # that does it, where there is one


def diagnose(
    task: Task, config: PrecisionConfig | LayerPrecision, on_stage: Callable[[str], None] = lambda stage: None
) -> Diagnosis:
    """Measure where `config` costs the task's network its accuracy.

    Args:
        task: its val split is scored some (2 x layers + 10) times: give a sampled one.
        config: a precision for each quantizable layer, or one for all of them.
        on_stage: told what is measured next.

    Raises:
        PrecisionError: the config does not fit the network.
        TaskError: the network cannot be inspected.
    """
    began = time.perf_counter()
    on_stage("float model, and quantizers at 32 bits")
    model, calibration_input = task.float_model(), task.calibration_input(CALIBRATION_SAMPLES)
    layers = inspect_model(model, calibration_input).layers
    config = _config(config, layers)
    net = fold_batch_norms(model, layers)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scorer = _Scorer(task, model.to(device))
    bench = _Bench(net, layers, config, calibration_input, scorer, device)
    sanity = bench.score(_keep(config, None))
    found = Diagnosis(
        config, task.metric, scorer.samples, scorer.float_accuracy, sanity, {}, (), (), (), net.notes, 0.0
    )
    if found.sane:
        on_stage("weights, activations, all")
        found = replace(
            found,
            parts={
                "weights": bench.score(_keep(config, "weight")),
                "activations": bench.score(_keep(config, "activation")),
                "all": bench.score(config),
            },
        )
        on_stage(f"{len(config)} layers one by one")
        found = replace(found, layers=tuple(bench.facts(layer) for layer in layers if layer.name in config))
        on_stage("remedies")
        untraced = () if trace(net.model) else ("no cross-layer equalization: torch.fx cannot trace the model",)
        found = replace(
            found,
            notes=net.notes + untraced,
            histograms=tuple(bench.histogram(name, side) for side in SIDES for name in found.worst(side)),
            attempts=tuple(_attempts(found, bench)),
        )
    return replace(found, seconds=time.perf_counter() - began)


def advise(found: Diagnosis, study: str = "STUDY") -> tuple[Advice, ...]:
    """What to try next, in the order of the white paper's flow; a remedy that was tried has to have helped.

    `study` is what the commands name.
    """
    bits = _shorthand(found.config)

    def command(action: Action) -> str | None:
        if bits is None or action not in COMMANDS:
            return None
        return COMMANDS[action].format(study=study, bits=bits, per_channel=bits.removesuffix("/tensor"))

    return tuple(replace(item, command=command(item.action)) for item in _steps(found))


def document(found: Diagnosis, study: str = "STUDY") -> dict[str, Any]:
    """The diagnosis for programs; what is not a number (SQNR of a tensor that loses nothing, say) is null.

    - `metric`, `samples` of val, `float_val`, `seconds`, `notes`; `sane` and `sanity`; `parts`: `weights`,
      `activations`, `all`, each with `harmful`;
    - `layers`: `layer`, `kind`, `channel_ratio`, `weight` and `activation` (`precision`, `sqnr_db`, and the scores with
      this tensor alone quantized; null where the config leaves float); `worst`: layer names by side;
    - `attempts`: `action`, `side`, `layers`; `advice`: `action`, `text`, `layers`, `command`;
    - `histograms`: `layer`, `side`, `precision`, `edges`, `before`, `after`.

    Scores are `accuracy` (the metric in percent, as `float_val`), `drop` (points lost), `drop_error` (a bound on its
    standard error, points), `divergence` (nats), `changed` (percent of the samples with another first answer).
    """

    def score(value: Score) -> dict[str, float | None]:
        return {
            "accuracy": _number(100 * value.accuracy),
            "drop": _number(100 * found.drop(value)),
            "drop_error": _number(100 * found.drop_error(value)),
            "divergence": _number(value.divergence),
            "changed": _number(100 * value.changed),
        }

    def tensor(facts: TensorFacts | None) -> dict[str, Any] | None:
        if facts is None:
            return None
        return {"precision": str(facts.precision), "sqnr_db": _number(facts.sqnr_db), **score(facts.alone)}

    return {
        "metric": found.metric,
        "samples": found.samples,
        "float_val": _number(100 * found.float_accuracy),
        "sane": found.sane,
        "sanity": score(found.sanity),
        "parts": {part: {**score(value), "harmful": found.harmful(part)} for part, value in found.parts.items()},
        "layers": [
            {
                "layer": layer.name,
                "kind": layer.kind,
                "channel_ratio": _number(layer.channel_ratio),
                "weight": tensor(layer.weight),
                "activation": tensor(layer.activation),
            }
            for layer in found.layers
        ],
        "worst": {side: list(found.worst(side)) for side in SIDES},
        "attempts": [
            {"action": tried.action, "side": tried.side, "layers": list(tried.layers), **score(tried.score)}
            for tried in found.attempts
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
            for histogram in found.histograms
        ],
        "advice": [asdict(item) for item in advise(found, study)],
        "notes": list(found.notes),
        "seconds": found.seconds,
    }


# ------------------------------------------------------------------------------------------------------ measuring


class _Scorer:
    """Scores networks beside the float one."""

    def __init__(self, task: Task, float_model: nn.Module) -> None:
        self.task = task
        self.float_accuracy, self._logits = self._run(float_model)
        self.samples = len(self._logits)

    def __call__(self, model: nn.Module) -> Score:
        accuracy, logits = self._run(model)
        changed = logits.argmax(dim=1) != self._logits.argmax(dim=1)
        return Score(accuracy, float(jeffreys(logits, self._logits)), float(changed.float().mean()))

    def _run(self, model: nn.Module) -> tuple[float, Tensor]:
        """The accuracy on val, and the logits `(n, classes)` that it came from."""
        kept: list[Tensor] = []

        def keep(_model: nn.Module, _args: Any, output: Any) -> None:
            kept.append(self.task.logits(output).detach().float().cpu())

        handle = model.register_forward_hook(keep)
        try:
            accuracy = self.task.evaluate(model, "val")
        finally:
            handle.remove()
        if not kept:
            raise TaskError(f"evaluate of task '{self.task.name}' did not call the model that it was given")
        return accuracy, torch.cat(kept)


class _Bench:
    """One float network, prepared once: every config is a matter of buffers."""

    def __init__(
        self,
        net: FloatNet,
        layers: Sequence[LayerInfo],
        config: PrecisionConfig,
        calibration_input: Any,
        scorer: _Scorer,
        device: torch.device,
    ) -> None:
        self.net, self.layers, self.config, self.calibration_input = net, layers, config, calibration_input
        self._scorer, self._device = scorer, device
        self._ranges = RangeSetter(net.model, layers, calibration_input)
        self._quantized = insert_quantizers(net.model, layers, config.offers).to(device)
        self._inputs: dict[str, tuple[float, Tensor]] = {}

    def score(self, config: PrecisionConfig) -> Score:
        return self._scorer(self.under(config))

    def score_model(self, model: nn.Module) -> Score:
        return self._scorer(model.to(self._device))

    def under(self, config: PrecisionConfig) -> nn.Module:
        set_precision(self._quantized, config, self._ranges)
        return self._quantized

    def equalized(self) -> _Bench | None:
        """The same after cross-layer equalization; None where there is nothing to equalize."""
        flow = trace(self.net.model)
        if flow is None or not flow.chains():
            return None
        net = equalize(self.net)
        return _Bench(net, self.layers, self.config, self.calibration_input, self._scorer, self._device)

    def facts(self, layer: LayerInfo) -> LayerFacts:
        """One layer's two tensors, each quantized alone."""
        precision = self.config[layer.name]

        def alone(side: Side) -> Score:
            return self.score(_only(self.config, layer.name, side))

        weight = activation = None
        if not precision.weight.is_float:
            weight = TensorFacts(precision.weight, _sqnr_db(*self._weights(layer.name)), alone("weight"))
        if not precision.activation.is_float:
            activation = TensorFacts(precision.activation, self._input(layer.name)[0], alone("activation"))
        kind = "depthwise" if layer.depthwise else layer.kind
        ratio = channel_ratio(weight_rows(quant_layers(self._quantized)[layer.name]))
        return LayerFacts(layer.name, kind, ratio, weight, activation)

    @torch.no_grad()
    def histogram(self, name: str, side: Side) -> Histogram:
        """A layer's weight, or a sample of its input on val, before and after quantization."""
        if side == "weight":
            before, after = self._weights(name)
            precision = self.config[name].weight
        else:
            before, precision = self._input(name)[1], self.config[name].activation
            self.under(self.config)
            after = quant_layers(self._quantized)[name].input_quantizer(before)
        values = torch.stack([before.flatten(), after.flatten()]).float().cpu()
        edges = torch.histogram(values.flatten(), BINS).bin_edges
        before_counts, after_counts = (tuple(torch.histogram(row, edges).hist.int().tolist()) for row in values)
        return Histogram(name, side, precision, tuple(edges.tolist()), before_counts, after_counts)

    @torch.no_grad()
    def _weights(self, name: str) -> tuple[Tensor, Tensor]:
        layer = quant_layers(self.under(self.config))[name]
        assert isinstance(layer.weight, Tensor)
        return layer.weight.detach(), layer.quantized_weight()

    def _input(self, name: str) -> tuple[float, Tensor]:
        """SQNR of a layer's input on val, over all values, and a sample of these; one pass serves all layers."""
        if not self._inputs:
            self._inputs = self._listen()
        return self._inputs[name]

    @torch.no_grad()
    def _listen(self) -> dict[str, tuple[float, Tensor]]:
        layers = quant_layers(self.under(self.config))
        power = dict.fromkeys(layers, 0.0)
        noise = dict.fromkeys(layers, 0.0)
        samples: dict[str, list[Tensor]] = {name: [] for name in layers}

        def listen(name: str) -> Any:
            def hook(_layer: nn.Module, args: tuple[Any, ...]) -> None:
                x: Tensor = args[0].float()
                power[name] += float(x.square().sum())
                noise[name] += float((x - layers[name].input_quantizer(x)).square().sum())
                flat = x.flatten()
                # An odd stride walks through all channels and positions, whatever the shape.
                samples[name].append(flat[:: max(1, flat.numel() // HISTOGRAM_SAMPLES) | 1])

            return hook

        model = copy.deepcopy(self.net.model).to(self._device)
        for name in layers:
            model.get_submodule(name).register_forward_pre_hook(listen(name))
        self._scorer.task.evaluate(model, "val")
        return {name: (_decibel(power[name], noise[name]), torch.cat(samples[name])) for name in layers}


def _attempts(found: Diagnosis, bench: _Bench) -> Iterator[Attempt]:
    """The remedies of each side that is a problem, in the order of the flow."""
    sides = [side for side in SIDES if found.harmful(SIDES[side])]
    equalized = bench.equalized() if sides else None
    for side in sides:
        config = _keep(bench.config, side)
        if equalized is not None:
            yield Attempt("cle", side, (), equalized.score(config))
        if side == "weight":
            yield from _weight_attempts(bench, config)
        elif all(layer.activation.quantizer in ("uniform", "float") for layer in config.values()):
            model = copy.deepcopy(bench.under(_keep(config, None))).cpu()
            set_activation_ranges(model, config, bench.calibration_input, "min_max")
            yield Attempt("min_max", side, (), bench.score_model(model))
        worst = found.worst(side)
        yield Attempt("more_bits", side, worst, bench.score(_widened(config, worst)))


def _weight_attempts(bench: _Bench, config: PrecisionConfig) -> Iterator[Attempt]:
    shared = tuple(
        n for n, layer in config.items() if not layer.weight.is_float and layer.weight.granularity == "tensor"
    )
    if shared:
        per_channel = config.replace(
            **{n: LayerPrecision(replace(config[n].weight, granularity="channel"), FLOAT) for n in shared}
        )
        yield Attempt("per_channel", "weight", shared, bench.score(per_channel))
    model = copy.deepcopy(bench.under(config)).cpu()
    correct_bias_empirically(model, bench.net.model, bench.calibration_input)
    yield Attempt("bias_correction", "weight", (), bench.score_model(model))


def channel_ratio(rows: Tensor) -> float:
    """max|w| of the largest channel of `rows` (channels, n) over that of the median one; dead channels do not count."""
    largest = rows.abs().amax(dim=1)
    largest = largest[largest > 0]
    return float(largest.max() / largest.median()) if len(largest) else 1.0


def _sqnr_db(x: Tensor, q: Tensor) -> float:
    return _decibel(float(x.square().mean()), float((x - q).square().mean()))


def _decibel(power: float, noise: float) -> float:
    return math.nan if not power > 0 else math.inf if noise == 0 else 10 * math.log10(power / noise)


def _config(config: PrecisionConfig | LayerPrecision, layers: Sequence[LayerInfo]) -> PrecisionConfig:
    names = {layer.name: layer for layer in layers if layer.reason is None}
    if not names:
        raise PrecisionError("the network has no layer that can be quantized: see `mpsearch inspect` for the reasons")
    if isinstance(config, LayerPrecision):
        return PrecisionConfig.uniform(names, config)
    check_names(config, names)
    return config


def _keep(config: PrecisionConfig, side: Side | None) -> PrecisionConfig:
    """The config with everything float but the weights, or but the activations; None: everything."""
    return PrecisionConfig(
        (
            name,
            LayerPrecision(
                layer.weight if side == "weight" else FLOAT, layer.activation if side == "activation" else FLOAT
            ),
        )
        for name, layer in config.items()
    )


def _only(config: PrecisionConfig, name: str, side: Side) -> PrecisionConfig:
    """The config with everything float but one tensor of one layer."""
    return _keep(config, None).replace(**{name: _keep(config, side)[name]})


def _widened(config: PrecisionConfig, names: Sequence[str]) -> PrecisionConfig:
    """The config with twice the bits for the layers named, or the most that their quantizer has, or else float."""

    def wider(precision: Precision) -> Precision:
        bits = min(2 * precision.bits, max(BITS[precision.quantizer]))
        return FLOAT if bits == precision.bits else replace(precision, bits=bits)

    return config.replace(
        **{name: LayerPrecision(wider(config[name].weight), wider(config[name].activation)) for name in names}
    )


# --------------------------------------------------------------------------------------------------- in words


def _steps(found: Diagnosis) -> list[Advice]:
    """The advice without its commands."""
    if not found.sane:
        text = (
            f"Inserting quantizers that do nothing already moves the logits by {found.sanity.divergence:.2g} nats "
            f"({_scored(found, found.sanity)}): before anything else, look for what the network does differently with "
            "quantized layers (a forward that asks for a layer's class, randomness in eval mode)."
        )
        return [Advice("harness", text)]
    if not found.harmful("all"):
        scored = _scored(found, found.parts["all"])
        return [Advice("none", f"Nothing: the whole config is within {TOLERANCE:.0%} of the float score ({scored}).")]
    steps = {side: list(_side_steps(found, side)) for side in SIDES if found.harmful(SIDES[side])}
    reasons = [
        f"Nothing that was tried helps the {SIDES[side]}, which lose most in {', '.join(found.worst(side))}."
        for side, remedies in steps.items()
        if not remedies
    ]
    if not steps:
        reasons = [
            f"Weights alone ({_scored(found, found.parts['weights'])}) and activations alone "
            f"({_scored(found, found.parts['activations'])}) are fine, together they are not."
        ]
    how = "Train with the quantizers in place (QAT)" + ("." if reasons else " if that is not enough.")
    layers = tuple(name for side, remedies in steps.items() if not remedies for name in found.worst(side))
    return [*chain.from_iterable(steps.values()), Advice("qat", " ".join([*reasons, how]), layers)]


def _side_steps(found: Diagnosis, side: Side) -> Iterator[Advice]:
    """What is to be tried for one side that is a problem."""
    part = SIDES[side]
    without = found.parts[part]
    tried = {attempt.action: attempt for attempt in found.attempts if attempt.side == side}

    def outcome(attempt: Attempt) -> str:
        return (
            f"{part} alone then score {100 * attempt.score.accuracy:.2f} % instead of {100 * without.accuracy:.2f} % "
            f"(divergence {attempt.score.divergence:.3g} instead of {without.divergence:.3g})"
        )

    def helped(action: Action) -> Attempt | None:
        attempt = tried.get(action)
        if attempt is None or not math.isfinite(attempt.score.divergence):
            return None
        worse = attempt.score.accuracy < without.accuracy
        return None if worse or attempt.score.divergence >= HELPS * without.divergence else attempt

    if attempt := helped("cle"):
        bad = _badly_scaled(found)
        where = f" Channels are badly scaled in {_listed(found, bad)}." if bad else ""
        yield Advice("cle", f"Cross-layer equalization: {outcome(attempt)}.{where}", bad)
    if attempt := helped("per_channel"):
        bad = tuple(name for name in _badly_scaled(found) if name in attempt.layers) or found.worst(side)
        yield Advice(
            "per_channel",
            f"One scale per output channel instead of one per weight: {outcome(attempt)}. It matters most in "
            f"{_listed(found, bad)}.",
            bad,
        )
    worst = found.worst(side)
    if side == "weight":
        uniform = [layer for layer in found.layers if layer.weight and layer.weight.precision.quantizer == "uniform"]
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
        what = "weights" if side == "weight" else "inputs"
        wider = _widened(found.config, worst)
        widths = ", ".join(dict.fromkeys(str(getattr(wider[name], side)) for name in worst))
        text = f"More bits ({widths}) for the {what} of {', '.join(worst)}: {outcome(attempt)}."
        yield Advice("more_bits", text, worst)


def _badly_scaled(found: Diagnosis) -> tuple[str, ...]:
    layers = [layer for layer in found.layers if layer.weight and layer.channel_ratio >= BADLY_SCALED]
    return tuple(layer.name for layer in sorted(layers, key=lambda layer: -layer.channel_ratio))


def _listed(found: Diagnosis, names: Sequence[str]) -> str:
    ratios = {layer.name: layer.channel_ratio for layer in found.layers}
    texts = [f"{name} (largest channel {ratios[name]:.1f} times the median)" for name in names[:WORST]]
    return ", ".join(texts) + (f" and {len(names) - WORST} more" if len(names) > WORST else "")


def _scored(found: Diagnosis, score: Score) -> str:
    return f"{100 * score.accuracy:.2f} %, float {100 * found.float_accuracy:.2f} %"


def _shorthand(config: PrecisionConfig) -> str | None:
    """The config as w4a8 or w4a8/tensor, if it is one."""
    layer = next(iter(config.values()))
    text = f"w{layer.weight.bits}a{layer.activation.bits}"
    text += "/tensor" if layer.weight.granularity == "tensor" and not layer.weight.is_float else ""
    same = config == PrecisionConfig.uniform(config, layer)
    uniform = {layer.weight.quantizer, layer.activation.quantizer} <= {"uniform", "float"}
    return text if same and uniform else None


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _worst_first(divergence: float) -> float:
    return -math.inf if math.isnan(divergence) else -divergence
