"""The page of `mpsearch debug`: where a quantized network loses its score, and what to try."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan, nan
from pathlib import Path

import pandas as pd

from mpsearch.debug.advice import BADLY_SCALED, Advice, advise
from mpsearch.debug.diagnosis import SIDES, TOLERANCE, Diagnosis, TensorFacts
from mpsearch.report import figures
from mpsearch.report.parts import Html, figure, html, joined, note, section, table, write_page

_ACTION_WORDS = {
    "cle": "cross-layer equalization",
    "per_channel": "one scale per output channel",
    "bias_correction": "bias correction",
    "min_max": "min-max ranges",
    "more_bits": "more bits",
}


def write_debug_page(
    path: str | Path, diagnosis: Diagnosis, *, study: str, config: str, commands: Sequence[str] = ()
) -> Path:
    """Write the page.

    Args:
        path: the HTML file; replaced whole if it exists.
        diagnosis: what was measured.
        study: its name, as commands give it.
        config: what the user called the config.
        commands: how to reproduce it, a line each.

    Raises:
        RunError: the file cannot be written.
    """
    sections = [
        section("What to try", _advice(advise(diagnosis, study))),
        section(f"Where {diagnosis.metric.name} is lost", _stages(diagnosis)),
    ]
    if diagnosis.layers:
        sections.append(section("Layer by layer", _layers(diagnosis)))
    if diagnosis.histograms:
        sections.append(section("The worst layers, before and after", _histograms(diagnosis)))
    if diagnosis.attempts:
        sections.append(section("Remedies tried", _attempts(diagnosis)))
    return write_page(path, f"{study}: {config}", [*summary(diagnosis), *diagnosis.notes], sections, commands)


def summary(diagnosis: Diagnosis) -> list[str]:
    """What was scored and on what, and the layers that stand out, a paragraph each."""
    metric, whole = diagnosis.metric, diagnosis.parts.get("all", diagnosis.sanity)
    lines = [
        f"{metric.show(whole.value)} quantized, {metric.show(diagnosis.float_score)} float: {metric.name} on "
        f"{diagnosis.samples} samples of the validation split. BatchNorm is folded, ranges are of least squared error."
    ]
    worst = [f"{side}s of {', '.join(names)}" for side in SIDES if (names := diagnosis.worst(side))]
    if worst:
        lines.append(f"Quantized alone, the outputs are moved most by the {', and the '.join(worst)}.")
    return lines


def stage_columns(diagnosis: Diagnosis) -> tuple[str, ...]:
    """The heads of `stage_rows`."""
    metric = diagnosis.metric
    return ("quantized", "", metric.label, metric.lost, f"divergence, {diagnosis.unit}", "answers changed, %")


def stage_rows(diagnosis: Diagnosis) -> list[list[str]]:
    """A row per stage of the flow, by `stage_columns`."""
    metric = diagnosis.metric
    rows = [["float", "", metric.number(diagnosis.float_score), "", "", ""]]
    stages = [("quantizers at 32 bits", diagnosis.sanity, not diagnosis.sane)]
    words = {"weights": "weights alone", "activations": "activations alone", "all": "all"}
    stages += [(words[part], score, diagnosis.harmful(part)) for part, score in diagnosis.parts.items()]
    for words_, score, bad in stages:
        error = diagnosis.drop_error(score)
        rows.append(
            [
                words_,
                "problem" if bad else "fine",
                metric.number(score.value),
                metric.number(diagnosis.drop(score)) + ("" if error is None else f" ± {metric.number(error)}"),
                f"{score.divergence:.3g}",
                "" if score.changed is None else f"{100 * score.changed:.1f}",
            ]
        )
    return rows


def sweep_table(diagnosis: Diagnosis) -> pd.DataFrame:
    """A row per layer, in the network's order; NaN where the config leaves a tensor float.

    Columns: layer, kind, channel_ratio, and for weight_ and activation_: precision, sqnr_db, drop (by how much
    the score is worse, as it is shown), divergence.
    """

    def facts(tensor: TensorFacts | None) -> tuple[str, float, float, float]:
        if tensor is None:
            return "float", nan, nan, nan
        return (
            str(tensor.precision),
            tensor.sqnr_db,
            diagnosis.metric.factor * diagnosis.drop(tensor.alone),
            tensor.alone.divergence,
        )

    rows = [
        (layer.name, layer.kind, layer.channel_ratio, *facts(layer.weight), *facts(layer.activation))
        for layer in diagnosis.layers
    ]
    names = [f"{side}_{what}" for side in SIDES for what in ("precision", "sqnr_db", "drop", "divergence")]
    return pd.DataFrame(rows, columns=["layer", "kind", "channel_ratio", *names])


def _advice(advice: Sequence[Advice]) -> Html:
    items = joined(
        html("<li>{}{}</li>", item.text, html("<br><code>{}</code>", item.command) if item.command else Html())
        for item in advice
    )
    return html("<ol>{}</ol>", items)


def _stages(diagnosis: Diagnosis) -> Html:
    about = (
        f"A part is a problem if it loses more than {TOLERANCE:.0%} of the float score. Divergence: of "
        f"the outputs from the float model's, {diagnosis.unit}. ±: a bound on the standard error."
    )
    return joined([table(stage_columns(diagnosis), stage_rows(diagnosis), texts={0, 1}), note(about)])


def _layers(diagnosis: Diagnosis) -> Html:
    layers, metric = sweep_table(diagnosis), diagnosis.metric
    caption = "Each layer quantized alone, everything else float. Farther to the right is worse."
    drawn = figure(figures.sweep(layers, metric, diagnosis.unit), "sweep", caption)
    columns = ["layer", "kind", "channel ratio"]
    for side in SIDES:
        columns += [side, "SQNR, dB", metric.lost, "divergence"]
    rows = [
        [row[0], row[1], _shown(row[2], ".1f")]
        + [_shown(value, form) for value, form in zip(row[3:], ("", ".1f", metric.format, ".2g") * 2, strict=True)]
        for row in layers.itertuples(index=False, name=None)
    ]
    about = (
        "SQNR: 10 log10(E[x²] / E[(x - q(x))²]). Channel ratio: the largest output channel's max|w| over the median "
        f"one's; from {BADLY_SCALED:.0f} on, one scale for the whole weight leaves most channels few levels."
    )
    return joined([drawn, table(columns, rows, texts={0, 1, 3, 7}), note(about)])


def _histograms(diagnosis: Diagnosis) -> Html:
    sqnr = {(layer.name, side): facts.sqnr_db for side in SIDES for layer, facts in diagnosis.ranked(side)}
    drawn = []
    for index, values in enumerate(diagnosis.histograms):
        what = f"{values.side} of {values.layer}"
        caption = f"As {values.precision}: SQNR {sqnr[values.layer, values.side]:.1f} dB."
        counted = figures.before_after(values.edges, values.before, values.after, what)
        drawn.append(figure(counted, f"values-{index}", caption))
    about = note("Inputs are a sample of what the validation images make.")
    return html("{}<div class='pair narrow'>{}</div>", about, joined(drawn))


def _attempts(diagnosis: Diagnosis) -> Html:
    rows, metric = [], diagnosis.metric
    for tried in diagnosis.attempts:
        without = diagnosis.parts[SIDES[tried.side]]
        rows.append(
            [
                _ACTION_WORDS[tried.action],
                SIDES[tried.side],
                ", ".join(tried.layers) if 0 < len(tried.layers) <= 3 else "all",
                metric.number(tried.score.value),
                metric.number(without.value),
                f"{tried.score.divergence:.3g}",
                f"{without.divergence:.3g}",
            ]
        )
    columns = ["remedy", "quantized alone", "layers", metric.label, "without", "divergence", "without"]
    return table(columns, rows, texts={0, 1, 2})


def _shown(value: str | float, form: str) -> str:
    return "" if isinstance(value, float) and isnan(value) else format(value, form)
