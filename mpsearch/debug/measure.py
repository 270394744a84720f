"""Where a quantized network loses its score, and what to try: the white paper's debugging flow (arXiv 2106.08295).

    32-bit sanity -> weights alone, activations alone -> each layer alone -> its values -> remedies, each tried alone

`diagnose` measures, `advise` is the decision tree over what was measured. Scores are of the validation split only;
ranges are of least squared error, on training data. BatchNorm is folded first, because a folded weight is what a scale
has to cover. The score that one layer costs is often within the noise of the sample, so layers are ranked by how far
they move the logits: the divergence of the outputs from the float model's.

We differ from the paper in trying the remedies that take seconds (one scale per channel, equalization, bias
correction, min-max ranges, more bits for the worst layers) instead of advising them by rule.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.debug.diagnosis import (
    SIDES,
    Attempt,
    Diagnosis,
    Histogram,
    LayerFacts,
    Score,
    Side,
    TensorFacts,
    widened,
)
from mpsearch.errors import PrecisionError, TaskError
from mpsearch.graph.facts import LayerInfo
from mpsearch.graph.inputs import layer_input, samples_of
from mpsearch.graph.products import named_products, opened
from mpsearch.observer import SILENT, Observer
from mpsearch.precision import FLOAT, LayerPrecision, PrecisionConfig
from mpsearch.ptq.bias import correct_bias_empirically
from mpsearch.ptq.equalize import equalize
from mpsearch.ptq.flow import trace
from mpsearch.ptq.fold import FloatNet, fold_batch_norms
from mpsearch.ptq.pipeline import set_activation_ranges
from mpsearch.quant.prepare import (
    RangeSetter,
    check_names,
    insert_quantizers,
    inspect_network,
    quant_layers,
    set_precision,
    weight_rows,
)
from mpsearch.task.scoring import comparison_of, evaluate, metric_of
from mpsearch.task.task import Task
from mpsearch.train import usual_device

CALIBRATION_SAMPLES = 512
BINS = 80
MOST_NUMBERS = 2**22  # of the outputs of a batch that are compared: of more, every so many rows are
HISTOGRAM_SAMPLES = 4096  # activations kept of each layer and batch


def diagnose(task: Task, config: PrecisionConfig | LayerPrecision, observer: Observer = SILENT) -> Diagnosis:
    """Measure where `config` costs the task's network its score.

    Args:
        task: its val split is scored some (2 x layers + 10) times: give a sampled one.
        config: a precision for each quantizable layer, or one for all of them.
        observer: told of its stages: the sanity check, the parts, the layers, the remedies.

    Raises:
        PrecisionError: the config does not fit the network.
        TaskError: the network cannot be inspected.
    """
    began = time.perf_counter()
    observer.on_stage("float model, and quantizers at 32 bits", 0, 1)
    model, calibration_input = task.float_model(), task.calibration_input(CALIBRATION_SAMPLES)
    named = [] if isinstance(config, LayerPrecision) else named_products(config)
    graph = inspect_network(model, calibration_input, products=named or False)
    layers = graph.layers
    config = _config(config, layers)
    net = fold_batch_norms(model, layers, calibration_input)
    device = usual_device()
    scorer = _Scorer(task, model.to(device))
    workbench = _Workbench(net, layers, config, calibration_input, scorer, device)
    sanity = workbench.score(_keep(config, None))
    diagnosis = Diagnosis(
        config,
        metric_of(task),
        scorer.samples,
        scorer.float_score,
        scorer.compared.unit,
        sanity,
        {},
        (),
        (),
        (),
        graph.notes + net.notes,
        0.0,
    )
    observer.on_stage("float model, and quantizers at 32 bits", 1, 1)
    if diagnosis.sane:
        observer.on_stage("weights, activations, all", 0, 1)
        diagnosis = replace(
            diagnosis,
            parts={
                "weights": workbench.score(_keep(config, "weight")),
                "activations": workbench.score(_keep(config, "activation")),
                "all": workbench.score(config),
            },
        )
        observer.on_stage("weights, activations, all", 1, 1)
        facts: list[LayerFacts] = []
        for layer in layers:
            if layer.name in config:
                observer.on_stage("layers one by one", len(facts), len(config))
                facts.append(workbench.facts(layer))
        diagnosis = replace(diagnosis, layers=tuple(facts))
        observer.on_stage("layers one by one", len(config), len(config))
        observer.on_stage("remedies", 0, 1)
        untraced = () if trace(net.model) else ("no cross-layer equalization: torch.fx cannot trace the model",)
        diagnosis = replace(
            diagnosis,
            notes=diagnosis.notes + untraced,
            histograms=tuple(workbench.histogram(name, side) for side in SIDES for name in diagnosis.worst(side)),
            attempts=tuple(_attempts(diagnosis, workbench)),
        )
        observer.on_stage("remedies", 1, 1)
    return replace(diagnosis, seconds=time.perf_counter() - began)


class _Scorer:
    """Scores networks beside the float one."""

    def __init__(self, task: Task, float_model: nn.Module) -> None:
        self.task = task
        compared = comparison_of(task)
        if compared is None:
            raise TaskError(
                f"{task.name}: debug ranks layers by how far they move the outputs, and outputs of kind detection are "
                "not compared: see `mpsearch inspect STUDY --sensitivity --proxy sqnr`"
            )
        self.compared = compared
        self.float_score, self._rows = self._run(float_model)

    def __call__(self, model: nn.Module) -> Score:
        value, rows = self._run(model)
        changed = None
        if self.compared.classes:
            changed = float((rows.argmax(dim=1) != self._rows.argmax(dim=1)).float().mean())
        return Score(value, float(self.compared.divergence(rows, self._rows)), changed)

    def _run(self, model: nn.Module) -> tuple[float, Tensor]:
        """The score on val, and the rows of the outputs `(m, k)` that it came from."""
        batches: list[Tensor] = []
        self.samples = 0

        def keep(_model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            rows = self.compared.rows(output).detach().float().cpu()
            batches.append(rows[:: max(1, rows.numel() // MOST_NUMBERS)])
            self.samples += samples_of((args, kwargs)) or len(rows)

        handle = model.register_forward_hook(keep, with_kwargs=True)
        try:
            score = evaluate(self.task, model, "val")
        finally:
            handle.remove()
        if not batches:
            raise TaskError(f"evaluate of task '{self.task.name}' did not call the model that it was given")
        return score, torch.cat(batches)


class _Workbench:
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
        self._activations: dict[str, tuple[float, Tensor]] = {}

    def score(self, config: PrecisionConfig) -> Score:
        return self._scorer(self.under(config))

    def score_model(self, model: nn.Module) -> Score:
        return self._scorer(model.to(self._device))

    def under(self, config: PrecisionConfig) -> nn.Module:
        set_precision(self._quantized, config, self._ranges)
        return self._quantized

    def equalized(self) -> _Workbench | None:
        """The same after cross-layer equalization; None where there is nothing to equalize."""
        flow = trace(self.net.model)
        if flow is None or not flow.chains():
            return None
        net = equalize(self.net)
        return _Workbench(net, self.layers, self.config, self.calibration_input, self._scorer, self._device)

    def facts(self, layer: LayerInfo) -> LayerFacts:
        """One layer's two tensors, each quantized alone."""
        precision = self.config[layer.name]

        def alone(side: Side) -> Score:
            return self.score(_only(self.config, layer.name, side))

        weight = activation = None
        if not precision.weight.is_float:
            weight = TensorFacts(precision.weight, _sqnr_db(*self._weights(layer.name)), alone("weight"))
        if not precision.activation.is_float:
            activation = TensorFacts(precision.activation, self._activation(layer.name)[0], alone("activation"))
        kind = "depthwise" if layer.depthwise else layer.kind
        quantized = quant_layers(self._quantized)[layer.name]
        ratio = channel_ratio(weight_rows(quantized)) if quantized.has_weight else 1.0
        return LayerFacts(layer.name, kind, ratio, weight, activation)

    @torch.no_grad()
    def histogram(self, name: str, side: Side) -> Histogram:
        """A layer's weight, or a sample of its activation on val, before and after quantization."""
        if side == "weight":
            before, after = self._weights(name)
            precision = self.config[name].weight
        else:
            before, precision = self._activation(name)[1], self.config[name].activation
            self.under(self.config)
            after = quant_layers(self._quantized)[name].input_quantizer(before)
        values = torch.stack([before.flatten(), after.flatten()]).float().cpu()
        edges = torch.histogram(values.flatten(), BINS).bin_edges
        before_counts, after_counts = (tuple(torch.histogram(row, edges).hist.int().tolist()) for row in values)
        return Histogram(name, side, precision, tuple(edges.tolist()), before_counts, after_counts)

    @torch.no_grad()
    def _weights(self, name: str) -> tuple[Tensor, Tensor]:
        """A weight, or what stands in its place: a sample of the second factor of a product; and that quantized."""
        layer = quant_layers(self.under(self.config))[name]
        if not layer.has_weight:
            values = self._ranges.seconds(name).to(self._device)
            return values, layer.weight_quantizer(values)
        assert isinstance(layer.weight, Tensor)
        return layer.weight.detach(), layer.quantized_weight()

    def _activation(self, name: str) -> tuple[float, Tensor]:
        """SQNR of a layer's activation on val, over all values, and a sample of these; one pass serves all layers."""
        if not self._activations:
            self._activations = self._listen()
        return self._activations[name]

    @torch.no_grad()
    def _listen(self) -> dict[str, tuple[float, Tensor]]:
        layers = quant_layers(self.under(self.config))
        power = dict.fromkeys(layers, 0.0)
        noise = dict.fromkeys(layers, 0.0)
        samples: dict[str, list[Tensor]] = {name: [] for name in layers}

        def listen(name: str) -> Any:
            def hook(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                x = layer_input(args, kwargs).float()
                power[name] += float(x.square().sum())
                noise[name] += float((x - layers[name].input_quantizer(x)).square().sum())
                flat = x.flatten()
                # An odd stride walks through all channels and positions, whatever the shape.
                samples[name].append(flat[:: max(1, flat.numel() // HISTOGRAM_SAMPLES) | 1])

            return hook

        model = opened(copy.deepcopy(self.net.model), layers).to(self._device)
        for name in layers:
            model.get_submodule(name).register_forward_pre_hook(listen(name), with_kwargs=True)
        evaluate(self._scorer.task, model, "val")
        return {name: (_decibel(power[name], noise[name]), torch.cat(samples[name])) for name in layers}


def _attempts(diagnosis: Diagnosis, workbench: _Workbench) -> Iterator[Attempt]:
    """The remedies of each side that is a problem, in the order of the flow."""
    sides = [side for side in SIDES if diagnosis.harmful(SIDES[side])]
    equalized = workbench.equalized() if sides else None
    for side in sides:
        config = _keep(workbench.config, side)
        if equalized is not None:
            yield Attempt("cle", side, (), equalized.score(config))
        if side == "weight":
            yield from _weight_attempts(workbench, config)
        elif all(layer.activation.quantizer in ("uniform", "float") for layer in config.values()):
            model = copy.deepcopy(workbench.under(_keep(config, None))).cpu()
            set_activation_ranges(model, config, workbench.calibration_input, "min_max")
            yield Attempt("min_max", side, (), workbench.score_model(model))
        worst = diagnosis.worst(side)
        yield Attempt("more_bits", side, worst, workbench.score(widened(config, worst)))


def _weight_attempts(workbench: _Workbench, config: PrecisionConfig) -> Iterator[Attempt]:
    products = set(named_products(config))
    shared = tuple(
        n
        for n, layer in config.items()
        if not layer.weight.is_float and layer.weight.granularity == "tensor" and n not in products
    )
    if shared:
        per_channel = config.replace(
            **{n: LayerPrecision(replace(config[n].weight, granularity="channel"), FLOAT) for n in shared}
        )
        yield Attempt("per_channel", "weight", shared, workbench.score(per_channel))
    model = copy.deepcopy(workbench.under(config)).cpu()
    correct_bias_empirically(model, workbench.net.model, workbench.calibration_input)
    yield Attempt("bias_correction", "weight", (), workbench.score_model(model))


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
