"""The report: one HTML file that needs no network, made from the template `dashboards/report.html`."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from mpsearch.errors import RunError
from mpsearch.record import TrialRecord
from mpsearch.search.front import objectives, pareto_front
from mpsearch.shipped import shipped_folder

if TYPE_CHECKING:
    import plotly.graph_objects as go

_PACKAGES = ("mpsearch", "torch", "torchvision", "numpy", "optuna", "ray", "plotly")


def write_report(
    path: str | Path,
    *,
    name: str,
    summary: Sequence[str],
    records: Sequence[TrialRecord],
    layers: Sequence[str],
    cheapest: float,
    finalized: Sequence[Mapping[str, object]] | None = None,
    commands: Sequence[str] = (),
) -> Path:
    """Write the report of a study; it may still be running.

    Args:
        path: the HTML file; replaced whole if it exists.
        name: of the study.
        summary: what was asked, a paragraph each.
        records: every trial so far.
        layers: quantizable layers in the network's order.
        cheapest: relative cost of the cheapest config of the space.
        finalized: a row per finalized config, column -> value; a row more of the same columns may be the control.
        commands: how to reproduce the run, a line each.

    Raises:
        RunError: the file cannot be written.
        CostError: `cheapest` is no cost.
    """
    from plotly.offline import get_plotlyjs

    front = pareto_front(records)
    sections = [_section("Trials", _outcome(records, cheapest))]
    if front.trials:
        sections += _pictures(records, layers, cheapest)
        sections.append(_section("The front", _front(records)))
    if finalized:
        sections.append(_section("Finalized", _finalized(finalized)))
    sections.append(_section("Environment", _pre(f"{key}: {value}" for key, value in _environment().items())))
    if commands:
        sections.append(_section("Reproduce", _pre(commands)))
    template = Template((shipped_folder("dashboards") / "report.html").read_text(encoding="utf-8"))
    text = template.substitute(
        title=escape(name),
        summary="".join(f"<p>{escape(line)}</p>" for line in summary),
        sections="\n".join(sections),
        plotlyjs=get_plotlyjs(),
    )
    return _replace(Path(path), text)


def _pictures(records: Sequence[TrialRecord], layers: Sequence[str], cheapest: float) -> list[str]:
    from mpsearch.report import figures
    from mpsearch.report.tables import MARKS_EXPLAINED, bits_table, progress_table, trials_table

    bits = bits_table(records, layers)
    heatmaps = _figure(figures.bits_heatmap(bits, "weight"), "weight-bits", "Bits of each layer's weight.")
    heatmaps += _figure(figures.bits_heatmap(bits, "activation"), "activation-bits", "Bits of each layer's input.")
    dominated = (
        "Small points are dominated: another trial is at least as good in both. Accuracy is on the validation split."
    )
    hypervolume = "Share of the square of error and log cost that the front dominates; 1 cannot be reached."
    return [
        _section("Accuracy against cost", _figure(figures.front(trials_table(records)), "front", dominated)),
        _section("Precision by layer", f"<p class='note'>{MARKS_EXPLAINED}</p><div class='pair'>{heatmaps}</div>"),
        _section(
            "Progress", _figure(figures.hypervolume(progress_table(records, cheapest)), "hypervolume", hypervolume)
        ),
    ]


def _outcome(records: Sequence[TrialRecord], cheapest: float) -> str:
    """How the trials ended, and the front in a sentence."""
    states = Counter(trial.state for trial in records)
    counts = ", ".join(f"{states[state]} {state}" for state in ("complete", "stopped", "failed") if states[state])
    lines = [f"{counts or 'No trial has ended yet'}."]
    front = pareto_front(records)
    if front.trials:
        knee, best = front.knee, front.best
        lines.append(
            f"The front has {len(front)} trials and hypervolume {front.hypervolume(cheapest):.4f}. "
            f"Best: {_point(best)}. Knee: {_point(knee)}."
        )
        if (control := front.nearest_uniform(objectives(knee)[1])) is not None:
            lines.append(f"Uniform control nearest to the knee's cost: {_point(control)}.")
    reasons = Counter(trial.reason for trial in records if trial.state == "failed" and trial.reason)
    lines += [f"Failed {count}×: {reason}" for reason, count in reasons.most_common(5)]
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def _point(trial: TrialRecord) -> str:
    accuracy, cost = objectives(trial)
    return f"trial {trial.number}, {100 * accuracy:.2f} % at relative cost {cost:.3g}"


def _front(records: Sequence[TrialRecord]) -> str:
    from mpsearch.report.tables import front_table

    columns = ("number", "origin", "accuracy, %", "relative cost", "mean weight bits", "mean activation bits", "")
    trials = list(front_table(records).itertuples())
    rows = [
        (
            str(trial.number),
            str(trial.origin),
            f"{trial.accuracy_percent:.2f}",
            f"{trial.relative_cost:.4f}",
            f"{trial.weight_bits:.2f}",
            f"{trial.activation_bits:.2f}",
            "knee" if trial.knee else "",
        )
        for trial in trials
    ]
    marked = next(index for index, trial in enumerate(trials) if trial.knee)
    return _table(columns, rows, texts={1, 6}, marked=marked)


def _finalized(finalized: Sequence[Mapping[str, object]]) -> str:
    columns = list(dict.fromkeys(column for row in finalized for column in row))
    rows = [[_shown(row.get(column)) for column in columns] for row in finalized]
    texts = {i for i, column in enumerate(columns) if any(isinstance(row.get(column), str) for row in finalized)}
    note = "<p class='note'>Trained longer over several seeds and scored on the test split.</p>"
    return note + _table([column.replace("_", " ") for column in columns], rows, texts)


def _figure(figure: go.Figure, name: str, caption: str) -> str:
    # Only these buttons: plotly's own choice has one that shares the data by network.
    config = {"displaylogo": False, "responsive": True, "modeBarButtons": [["toImage", "resetScale2d"]]}
    body = figure.to_html(full_html=False, include_plotlyjs=False, div_id=f"figure-{name}", config=config)
    return f"<figure>{body}<figcaption>{escape(caption)}</figcaption></figure>"


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>"


def _table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], texts: Collection[int], marked: int | None = None
) -> str:
    """Columns of numbers are aligned to the right, those in `texts` to the left; row `marked` stands out."""

    def line(tag: str, cells: Sequence[str]) -> str:
        return "".join(
            f'<{tag} class="text">{escape(cell)}</{tag}>' if index in texts else f"<{tag}>{escape(cell)}</{tag}>"
            for index, cell in enumerate(cells)
        )

    body = "\n".join(
        f'<tr class="knee">{line("td", row)}</tr>' if index == marked else f"<tr>{line('td', row)}</tr>"
        for index, row in enumerate(rows)
    )
    head = f"<thead><tr>{line('th', columns)}</tr></thead>"
    return f'<div class="wide"><table>{head}<tbody>\n{body}\n</tbody></table></div>'


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _pre(lines: Iterable[str]) -> str:
    return f"<pre>{escape(chr(10).join(lines))}</pre>"


def _environment() -> dict[str, str]:
    """Where the report was written."""
    found = {"python": platform.python_version(), "system": f"{platform.platform()}, {os.cpu_count()} CPUs"}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _replace(path: Path, text: str) -> Path:
    """Write a file whole or not at all: somebody may be reading it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise RunError(f"cannot write the report {path}: {error.strerror}; make the folder writable") from None
    return path
