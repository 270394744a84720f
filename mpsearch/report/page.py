"""The report of a study: one HTML file that needs no network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from mpsearch.record import TrialRecord
from mpsearch.report.parts import figure, note, paragraphs, section, table, write_page
from mpsearch.search.front import objectives, pareto_front


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
    front = pareto_front(records)
    sections = [section("Trials", _outcome(records, cheapest))]
    if front.trials:
        sections += _pictures(records, layers, cheapest)
        sections.append(section("The front", _front(records)))
    if finalized:
        sections.append(section("Finalized", _finalized(finalized)))
    return write_page(path, name, summary, sections, commands)


def _pictures(records: Sequence[TrialRecord], layers: Sequence[str], cheapest: float) -> list[str]:
    from mpsearch.report import figures
    from mpsearch.report.tables import MARKS_EXPLAINED, bits_table, progress_table, trials_table

    bits = bits_table(records, layers)
    heatmaps = figure(figures.bits_heatmap(bits, "weight"), "weight-bits", "Bits of each layer's weight.")
    heatmaps += figure(figures.bits_heatmap(bits, "activation"), "activation-bits", "Bits of each layer's input.")
    dominated = (
        "Small points are dominated: another trial is at least as good in both. Accuracy is on the validation split."
    )
    hypervolume = "Share of the square of error and log cost that the front dominates; 1 cannot be reached."
    return [
        section("Accuracy against cost", figure(figures.front(trials_table(records)), "front", dominated)),
        section("Precision by layer", note(MARKS_EXPLAINED) + f"<div class='pair'>{heatmaps}</div>"),
        section("Progress", figure(figures.hypervolume(progress_table(records, cheapest)), "hypervolume", hypervolume)),
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
    return paragraphs(lines)


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
    return table(columns, rows, texts={1, 6}, marked=marked)


def _finalized(finalized: Sequence[Mapping[str, object]]) -> str:
    columns = list(dict.fromkeys(column for row in finalized for column in row))
    rows = [[_shown(row.get(column)) for column in columns] for row in finalized]
    texts = {i for i, column in enumerate(columns) if any(isinstance(row.get(column), str) for row in finalized)}
    about = note("Trained longer over several seeds and scored on the test split.")
    return about + table([column.replace("_", " ") for column in columns], rows, texts)


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
