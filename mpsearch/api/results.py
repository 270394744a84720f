"""What comes out of a run and goes into it: report, dashboard, export_run, import_config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mpsearch.files import nameable
from mpsearch.observer import SILENT, Observer

if TYPE_CHECKING:
    from mpsearch.metric import Metric
    from mpsearch.precision import PrecisionConfig
    from mpsearch.record import TrialRecord


@dataclass(frozen=True)
class ExportedTrial:
    """A trial that was exported.

    Attributes:
        path: the folder.
        trial: the trial.
        scores: of the weights that were exported, by split (val; test where they were trained finally).
        metric: what scores are.
        conversions: what the format could not hold and was converted, in words.
        verified: how it answered in its own runtime, or why it was not run there, in words.
    """

    path: Path
    trial: TrialRecord
    scores: Mapping[str, float | None]
    metric: Metric
    conversions: tuple[str, ...]
    verified: str


@dataclass(frozen=True)
class ImportedConfig:
    """A config made elsewhere, as a run sees it.

    Attributes:
        config: a precision for each layer of the run's network.
        cost: relative to `reference`.
        reference: the config that costs 1, as w8a8.
        left_float: layers whose weight or activation the config leaves float.
        path: where the config was written as JSON, if that was asked for.
        trial: it as a trial of the run, if it was scored.
        on_front: whether that trial is on the front.
        metric: what its score is.
        notes: what is not as it should be with a network made elsewhere, in words.
    """

    config: PrecisionConfig
    cost: float
    reference: str
    left_float: tuple[str, ...]
    path: Path | None
    trial: TrialRecord | None
    on_front: bool
    metric: Metric
    notes: tuple[str, ...] = ()


def report(run: str | Path, watch: bool = False, observer: Observer = SILENT) -> Path:
    """Write `report.html` in the run folder: one file that opens without a network.

    Args:
        run: a run folder; it may be driven by another process.
        watch: write it again after every trial, until no process drives the run any more.
        observer: told whenever it has been written.

    Returns:
        The file.

    Raises:
        MpsearchError: there is no run, or it cannot be read or written.

    >>> import mpsearch
    >>> mpsearch.report("runs/tiny").name
    'report.html'
    """
    from mpsearch.record import RunFolder
    from mpsearch.report import write

    folder = RunFolder.open(run)
    for path in write.watch(folder) if watch else (write.report_of(folder),):
        observer.on_report(path)
    return folder.report_html


def dashboard(
    run: str | Path, host: str = "127.0.0.1", port: int = 8080, token: str | None = None, open: bool = True
) -> None:
    """Show a run in the Optuna dashboard until interrupted: figures, notes, every trial's config and charts.

    Prints its address. `mpsearch.report.serve.serving` serves it for the time of a block instead.

    Args:
        run: a run folder, which may be driven by another process, or the URL of an Optuna storage.
        host: address to listen on; one that is reached from beyond this machine needs a token.
        port: port to listen on; 0 for any that is free.
        token: access token that a browser has to send (default: none; then only this machine has access).
        open: open it in the browser.

    Raises:
        MpsearchError: no such run or storage, optuna-dashboard is not installed, or the port is taken.

    >>> import mpsearch
    >>> mpsearch.dashboard("runs/tiny", host="0.0.0.0")
    Traceback (most recent call last):
        ...
    mpsearch.errors.RunError: --host 0.0.0.0 can be reached by others, ...
    """
    from mpsearch.report.serve import show

    show(str(run), host, port, token, open)


def export_run(
    run: str | Path,
    out: str | Path,
    pick: str = "knee",
    to: str = "native",
    allow_lossy: bool = False,
    verify: bool = True,
) -> ExportedTrial:
    """Export a config of a run with its weights and scales, the finally trained ones if it was finalized.

    Args:
        run: a run folder.
        out: folder to write.
        pick: the trial: knee, best, trial:7, cost<=0.5, by the metric: top1>=0.87, psnr>=28.5, bpc<=1.2, or by any
            cost: weight_bytes<=100KiB, or several with commas.
        to: format: native, packed, onnx, qonnx, brevitas, torchao, modelopt, aimet or mhaq.
        allow_lossy: convert what the format cannot hold, and list it, instead of refusing.
        verify: run it in its own runtime, in a process of its own, and compare its answers with the network's.

    Raises:
        VerificationError: it does not load there, or answers otherwise; its files are kept in a folder `*.failed`.
        MpsearchError: no such run, trial or format, the format cannot hold the config, or it cannot be written.

    >>> import mpsearch
    >>> exported = mpsearch.export_run("runs/tiny", "exported", pick="best")
    >>> sorted(path.name for path in exported.path.iterdir())
    ['model.safetensors', 'precision.json']
    """
    from mpsearch.exporters.run import export_run as export_trial

    exported, trial, scores, metric = export_trial(run, pick, to, nameable(out), allow_lossy=allow_lossy, verify=verify)
    return ExportedTrial(
        exported.path, trial, scores, metric, tuple(map(str, exported.conversions)), str(exported.verified)
    )


def import_config(
    run: str | Path,
    source: str | Path,
    config: str | Path | None = None,
    out: str | Path | None = None,
    score: bool = True,
) -> ImportedConfig:
    """Read a config or a trained network that was made elsewhere, and score it as a trial; it may join the front.

    A config is trained as any trial. A network of MHAQ is scored as it is: it gives MHAQ's answers, and can be
    exported.

    Args:
        run: a run folder.
        source: an export, AIMET encodings, a table of bits by layer (JSON or YAML), or a checkpoint of MHAQ.
        config: the YAML that MHAQ was trained with, for a checkpoint (default: the source is a config).
        out: file to write the config to as JSON (default: none is written).
        score: run it as a trial of the run; what was tried before is not run again.

    Raises:
        MpsearchError: no such run, config or checkpoint, it does not fit the network, or another process drives the
            run.

    >>> import mpsearch
    >>> imported = mpsearch.import_config("runs/tiny", "exported", score=False)
    >>> len(imported.config), imported.trial
    (11, None)
    """
    from mpsearch.exporters.from_mhaq import read_mhaq
    from mpsearch.exporters.read import complete, read_config
    from mpsearch.files import write_json
    from mpsearch.problem import reopen
    from mpsearch.record import RunFolder
    from mpsearch.search.front import pareto_front
    from mpsearch.search.run import score_config, score_network

    folder = RunFolder.open(run)
    problem = reopen(folder)
    trained = None if config is None else read_mhaq(source, config, problem.task.float_model(), list(problem.layers))
    precisions = complete(read_config(source), list(problem.layers)) if trained is None else trained.config
    if out is not None:
        write_json(out, {"layers": precisions.to_json()})
    trial = None
    if score:
        trial = (
            score_config(problem, folder, precisions)
            if trained is None
            else score_network(problem, folder, precisions, trained.put_on)
        )
    return ImportedConfig(
        config=precisions,
        cost=problem.cost(precisions),
        reference=problem.spec.cost.reference,
        left_float=tuple(n for n, layer in precisions.items() if layer.weight.is_float or layer.activation.is_float),
        path=None if out is None else Path(out),
        trial=trial,
        on_front=trial is not None and trial in pareto_front(folder.records(), problem.metric).trials,
        metric=problem.metric,
        notes=() if trained is None else trained.notes,
    )
