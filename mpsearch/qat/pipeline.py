"""Quantization-aware training in the order that the white paper recommends (arXiv 2106.08295, §4, figure 8):

    equalize (depthwise networks) -> add quantizers -> ranges of least squared error -> train weights and ranges

BatchNorm: folded before training where weights have one range per tensor (static folding); kept, and re-estimated after
training, where each channel has its own, which absorbs the norm's scale at no cost. Ranges are learned as in LSQ
(arXiv 1902.08153). The loss is the Jeffreys divergence to the float network unless the study says otherwise, where the
paper trains on labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from torch import Tensor, nn

from mpsearch.graph.products import named_products
from mpsearch.precision import PrecisionConfig
from mpsearch.ptq.equalize import equalize
from mpsearch.ptq.fold import FloatNet, fold_batch_norms, structure_of
from mpsearch.qat.trained import Trained
from mpsearch.quant.prepare import quant_layers
from mpsearch.quant.shift import DEFAULT_SLOPE, ShiftGradient, ShiftQuantizer, SlopeSchedule, soft_phase
from mpsearch.study import TrialSpec
from mpsearch.task.task import Task
from mpsearch.train import timed
from mpsearch.workbench import Workbench

LOG_LINES = 20


def qat(
    task: Task,
    config: PrecisionConfig,
    settings: TrialSpec,
    on_step: Callable[[int, float], None] | None = None,
    workbench: Workbench | None = None,
    shift_gradient: ShiftGradient = "sigmoid",
    slope: SlopeSchedule = DEFAULT_SLOPE,
) -> Trained:
    """Train the network of `task` at the precisions of `config`.

    Args:
        task: what is compressed.
        config: a precision for each quantizable layer, of any quantizer.
        settings: steps, batch size, learning rate, ...
        on_step: called with (step, training loss).
        workbench: a workbench of this task whose network has not been folded, to use again; default: a fresh one.
        shift_gradient: what shift quantizers differentiate.
        slope: of their soft phase, over the training.

    Raises:
        PrecisionError: the config does not fit the model.
        FloatingPointError: the loss became NaN or infinite.
    """
    seconds: dict[str, float] = {}
    with timed(seconds, "prepare"):
        workbench = workbench or Workbench(task, settings, offers=config.offers)
        net: FloatNet | None = None
        if folds(config):
            calibration = task.calibration_input(settings.calibration_samples)
            net = fold_batch_norms(task.float_model(), workbench.layers, calibration)
            if any(layer.depthwise for layer in workbench.layers):
                net = equalize(net, calibration_input=calibration)
            workbench = Workbench(task, settings, offers=config.offers, float_model=net.model, graph=workbench.graph)
        workbench.reset(config)
    soft = _soft_weights(workbench.model, shift_gradient)
    log: list[dict[str, float]] = []

    def note(step: int, loss: float) -> None:
        if step % max(1, settings.steps // LOG_LINES) == 0 or step == settings.steps - 1:
            log.append({"step": step, "loss": loss, **_phases(soft)})
        if on_step is not None:
            on_step(step, loss)

    with timed(seconds, "train"):
        if settings.steps:
            workbench.fit(settings.steps, settings.seed, on_step=note, slope=slope)
    with timed(seconds, "finish"):
        if settings.steps:
            workbench.reestimate(settings.seed)
    structure = None if net is None else structure_of(net, workbench.model)
    notes = (*workbench.graph.notes, *(() if net is None else net.notes))
    return Trained(workbench.model.eval(), workbench.layers, config, seconds, tuple(log), notes, structure)


def folds(config: PrecisionConfig) -> bool:
    """Whether BatchNorm is folded before training: a weight has one range for all channels."""
    products = set(named_products(config))
    return any(
        not layer.weight.is_float and layer.weight.granularity == "tensor" and name not in products
        for name, layer in config.items()
    )


def _soft_weights(model: nn.Module, gradient: ShiftGradient) -> list[tuple[ShiftQuantizer, Tensor]]:
    """The shift quantizers of weights, with the weights; all shift quantizers take on the gradient."""
    quantizers = []
    for layer in quant_layers(model).values():
        for quantizer in (*layer.weight_quantizer.modules(), *layer.input_quantizer.modules()):
            if isinstance(quantizer, ShiftQuantizer):
                quantizer.gradient = gradient
        if layer.has_weight and isinstance(layer.weight_quantizer, ShiftQuantizer) and gradient == "sigmoid":
            quantizers.append((layer.weight_quantizer, cast(Tensor, layer.weight)))
    return quantizers


def _phases(soft: Sequence[tuple[ShiftQuantizer, Tensor]]) -> dict[str, float]:
    """How far soft weights are from hard ones, and the share of them that still gets a gradient: means over layers."""
    if not soft:
        return {}
    phases = [soft_phase(quantizer, weight) for quantizer, weight in soft]
    return {
        "slope": float(soft[0][0].slope),
        "soft_hard_gap": sum(phase.gap for phase in phases) / len(phases),
        "live_share": sum(phase.live for phase in phases) / len(phases),
    }
