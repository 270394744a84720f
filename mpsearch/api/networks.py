"""One network without a search: ptq, train, debug."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mpsearch.api.studies import read_study
from mpsearch.errors import MpsearchError, RunError, nearest
from mpsearch.files import nameable
from mpsearch.observer import SILENT, Observer

if TYPE_CHECKING:
    import pandas as pd

    from mpsearch.debug.advice import Advice
    from mpsearch.debug.diagnosis import Diagnosis
    from mpsearch.metric import Metric
    from mpsearch.ptq.pipeline import PtqMethod
    from mpsearch.quant.network import QuantizedNetwork
    from mpsearch.study import StudySpec
    from mpsearch.task import Task

SPLITS: tuple[Literal["val", "test"], ...] = ("val", "test")


@dataclass(frozen=True, kw_only=True)
class ScoredNetwork:
    """A quantized network and its scores.

    Attributes:
        network: model (in eval mode) with its scales; what `mpsearch.export` takes.
        float_scores: of the float network, by split (val, test).
        scores: of the quantized one.
        metric: what a score is.
        seconds: that each stage took.
        notes: what was left out and why.
        path: the native export, where one was asked for.
    """

    network: QuantizedNetwork
    float_scores: Mapping[str, float]
    scores: Mapping[str, float]
    metric: Metric
    seconds: Mapping[str, float]
    notes: tuple[str, ...]
    path: Path | None

    @property
    def table(self) -> pd.DataFrame:
        """Rows float and quantized, columns val and test."""
        import pandas as pd

        return pd.DataFrame([self.float_scores, self.scores], index=["float", "quantized"], columns=list(SPLITS))

    def _scores(self) -> dict[str, Any]:
        float_scores = {f"float_{split}": self.float_scores[split] for split in SPLITS}
        return {"metric": self.metric.to_json(), **float_scores, **{s: self.scores[s] for s in SPLITS}}


@dataclass(frozen=True, kw_only=True)
class PtqScores(ScoredNetwork):
    """A network quantized without training; `method` is what was done, with nothing left open."""

    method: PtqMethod

    def to_json(self) -> dict[str, Any]:
        """What `mpsearch ptq --json` prints."""
        return {
            **self._scores(),
            "seconds": dict(self.seconds),
            "method": asdict(self.method),
            "notes": list(self.notes),
        }


@dataclass(frozen=True, kw_only=True)
class TrainScores(ScoredNetwork):
    """A network trained at one config.

    Attributes:
        cost: relative.
        fixed: layers that keep the precision that the search space fixes, as `name precision`.
        log: of the training, in order: step, loss and what the method adds.
    """

    cost: float
    fixed: tuple[str, ...]
    log: tuple[Mapping[str, float], ...]

    def to_json(self) -> dict[str, Any]:
        """What `mpsearch train --json` prints."""
        return {
            **self._scores(),
            "cost": self.cost,
            "seconds": dict(self.seconds),
            "notes": list(self.notes),
            "log": list(self.log),
        }


@dataclass(frozen=True)
class DebugResult:
    """Where a config loses its score.

    Attributes:
        diagnosis: everything that was measured.
        advice: what to try, in order.
        page: the HTML page.
        study: what the commands of the advice name.
    """

    diagnosis: Diagnosis
    advice: tuple[Advice, ...]
    page: Path
    study: str

    @property
    def layers(self) -> pd.DataFrame:
        """A row per layer, each quantized alone.

        Columns: layer, kind, channel_ratio (max|w| of the largest output channel over that of the median one), and with
        `weight_` and `activation_` before it: precision, sqnr_db, drop (by how much the score is worse, as shown) and
        divergence.
        NaN where a tensor stays float.
        """
        from mpsearch.report.debug_page import sweep_table

        return sweep_table(self.diagnosis)

    def text_table(self) -> list[dict[str, str]]:
        """The stages of the flow as `mpsearch debug` prints them: column -> text."""
        from mpsearch.report.debug_page import stage_columns, stage_rows

        columns = stage_columns(self.diagnosis)
        return [dict(zip(columns, row, strict=True)) for row in stage_rows(self.diagnosis)]

    def summary(self) -> list[str]:
        """What was scored and on what, and the layers that stand out, in words."""
        from mpsearch.report.debug_page import summary

        return summary(self.diagnosis)

    def to_json(self) -> dict[str, Any]:
        """What `mpsearch debug --json` prints; `mpsearch.debug.advice.document` lists the keys."""
        from mpsearch.debug.advice import document

        return {**document(self.diagnosis, self.study), "page": str(self.page)}


def ptq(
    study: str | Path | StudySpec,
    bits: str,
    data_free: bool = False,
    rounding: str | None = None,
    bias_correction: str | None = None,
    samples: int = 512,
    out: str | Path | None = None,
    set: Sequence[str] = (),
) -> PtqScores:
    """Quantize without training (the white paper's PTQ pipeline, arXiv 2106.08295) and score val and test.

    Args:
        study: a shipped study by name, the path of a study file, or a StudySpec; its task is used.
        bits: of weights and activations, as w4a8.
        data_free: quantize from the model alone, without calibration samples.
        rounding: adaround (default with data, arXiv 2004.10568) or nearest (default without).
        bias_correction: none, analytic or empirical (default: none with adaround, else analytic).
        samples: unlabelled calibration samples from train.
        out: folder for a native export (default: none is written).
        set: `key.path=value` to override values of the study file.

    Raises:
        MpsearchError: the study, the precision or the method cannot be used, or the export cannot be written.

    >>> import mpsearch
    >>> result = mpsearch.ptq("digits", "w8a8", rounding="nearest", samples=64)
    >>> bool(abs(result.table.loc["quantized", "val"] - result.table.loc["float", "val"]) < 0.05)
    True
    """
    spec = read_study(study, set)  # before torch is imported: a mistake is answered at once
    out = None if out is None else nameable(out)
    from typing import cast

    from mpsearch.precision import LayerPrecision
    from mpsearch.ptq.pipeline import BiasCorrection, PtqMethod, Rounding
    from mpsearch.ptq.pipeline import ptq as quantize
    from mpsearch.task.load import load_task
    from mpsearch.task.scoring import evaluate, metric_of

    precision = LayerPrecision.shorthand(bits)
    method = PtqMethod(
        rounding=cast(Rounding | None, rounding), bias_correction=cast(BiasCorrection | None, bias_correction)
    ).resolved(data_free)
    task = load_task(spec.task)
    model = task.float_model()
    result = quantize(model, precision, None if data_free else task.calibration_input(samples), method)
    float_scores: dict[str, float] = {split: evaluate(task, model, split) for split in SPLITS}
    scores: dict[str, float] = {split: evaluate(task, result.model, split) for split in SPLITS}
    network = result.network(
        name=spec.task.model or task.name, task=task.name, metric=metric_of(task), score=dict(scores)
    )
    if out is not None:
        _export(network, task, out)
    return PtqScores(
        network=network,
        float_scores=float_scores,
        scores=scores,
        metric=metric_of(task),
        seconds=result.seconds,
        notes=result.notes,
        path=out,
        method=result.method,
    )


def train(
    study: str | Path | StudySpec,
    target: str,
    method: str = "qat",
    epochs: float = 5.0,
    seed: int = 0,
    recipe: str | None = None,
    out: str | Path | None = None,
    set: Sequence[str] = (),
    observer: Observer = SILENT,
) -> TrainScores:
    """Train one config without a search and score val and test; layers that the space fixes keep their precision.

    Args:
        study: a shipped study by name, the path of a study file, or a StudySpec.
        target: w4a4, 'apot:4 x uniform:4' (weight x activation), or the path of a precision config.
        method: qat (any quantizer, arXiv 2106.08295) or gdnsq (learned bit-widths, uniform only).
        epochs: passes over the training data.
        seed: of the batches and of everything else that is random.
        recipe: mhaq, for gdnsq as its authors' library trains, in some thousands of steps (default: ours, for a few
            epochs).
        out: folder for a native export, which must not exist (default: none is written).
        set: `key.path=value` to override values of the study file.
        observer: told after every step.

    Raises:
        MpsearchError: the study, the target or the method cannot be used, or `out` exists.
        FloatingPointError: the loss became NaN or infinite.

    >>> import mpsearch
    >>> result = mpsearch.train("digits", "w4a4", epochs=0.1)
    >>> sorted(result.scores), 0 < result.cost < 1
    (['test', 'val'], True)
    """
    spec = read_study(study, set)  # before torch is imported: a mistake is answered at once
    out = None if out is None else nameable(out)
    from mpsearch.exporters.read import read_precisions
    from mpsearch.problem import open_problem
    from mpsearch.qat.train import METHODS, RECIPES, train_one

    if method not in METHODS:
        raise MpsearchError(f"unknown method '{method}': {nearest(method, METHODS)}")
    if recipe is not None and recipe not in (recipes := RECIPES.get(method, {})):
        others = nearest(recipe, recipes) if recipes else f"leave --recipe out, or give --method {', '.join(RECIPES)}"
        raise MpsearchError(f"{method} has no recipe '{recipe}': {others}")
    if out is not None and out.exists():
        raise MpsearchError(f"{out} exists already: give --out a folder that does not")
    problem = open_problem(spec)
    result = train_one(problem, read_precisions(target), method, epochs, seed, observer, recipe)
    trained, task = result.trained, problem.task
    network = trained.network(
        name=problem.spec.task.model or task.name, task=task.name, metric=problem.metric, score=dict(result.score)
    )
    if out is not None:
        _export(network, task, out)
    return TrainScores(
        network=network,
        float_scores=result.float_score,
        scores=result.score,
        metric=problem.metric,
        seconds=trained.seconds,
        notes=trained.notes,
        path=out,
        cost=result.cost,
        fixed=result.fixed,
        log=trained.log,
    )


def _export(network: QuantizedNetwork, task: Task, out: Path) -> None:
    """Write a native export, verified on calibration samples."""
    from dataclasses import replace

    from mpsearch.exporters.export import VERIFIED_ON, export

    samples = task.calibration_input(VERIFIED_ON)
    export(replace(network, samples=samples, float_model=task.float_model()), "native", out)


def debug(
    study: str | Path | StudySpec,
    config: str,
    samples: int = 1000,
    out: str | Path = "debug.html",
    set: Sequence[str] = (),
    observer: Observer = SILENT,
) -> DebugResult:
    """Find where a config loses its score (the debugging flow of arXiv 2106.08295) and what to try; scores val only.

    Weights or activations, which layers, what their values look like, and which remedies help.

    Args:
        study: a shipped study by name, the path of a study file, or a StudySpec; its task is used.
        config: w4a8, w4a8/tensor (one scale for a whole weight), or the path of a precision config.
        samples: validation samples to score, evenly spread.
        out: the HTML page to write.
        set: `key.path=value` to override values of the study file.
        observer: told of its stages.

    Raises:
        MpsearchError: the study or the config cannot be used, or the page cannot be written.

    >>> import mpsearch
    >>> result = mpsearch.debug("digits", "w2a32/tensor", samples=100, out="debug.html")
    >>> result.layers.loc[0, "layer"], result.page.name
    ('conv1', 'debug.html')
    """
    spec = read_study(study, set)  # before torch is imported: a mistake is answered at once
    from mpsearch.debug.advice import advise
    from mpsearch.debug.measure import diagnose
    from mpsearch.exporters.read import read_precisions
    from mpsearch.report.debug_page import write_debug_page
    from mpsearch.task.load import load_task
    from mpsearch.task.task import Sampling

    page = nameable(out)
    if not page.parent.is_dir() or page.is_dir():
        raise RunError(f"--out got '{out}': give the page as a file in a folder that exists")
    precisions = read_precisions(config)
    task = load_task(spec.task)
    if isinstance(task, Sampling):  # another task scores all of its validation split
        task = task.sampled(samples)
    diagnosis = diagnose(task, precisions, observer)
    name = str(study) if isinstance(study, str | Path) else spec.name
    again = ["mpsearch", "debug", name, config, "--samples", str(samples)]
    again += [part for override in set for part in ("--set", override)]
    write_debug_page(page, diagnosis, study=name, config=config, commands=[shlex.join(again)])
    return DebugResult(diagnosis, advise(diagnosis, name), page, name)
