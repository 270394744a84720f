"""The report of a study: one HTML file that needs no network, laid out by `dashboards/layout.yaml`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import Any

from mpsearch.metric import Metric
from mpsearch.record import TrialRecord
from mpsearch.report import figures
from mpsearch.report.data import RunData
from mpsearch.report.gallery import FIGURES, Section, ShownFigure, sections, words
from mpsearch.report.parts import Html, chip, data, figure, html, joined, note, paragraphs, section, table, write_page
from mpsearch.report.tables import last_initial, mark, origins_table, rows_of
from mpsearch.search.front import objectives

_CODES = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
"""One letter for each precision: there are fewer of them than letters."""


def write_report(
    path: str | Path,
    run: RunData,
    *,
    summary: Sequence[str] = (),
    finalized: Sequence[Mapping[str, object]] = (),
    remarks: Sequence[str] = (),
    commands: Sequence[str] = (),
    refresh_s: int | None = None,
    answer: tuple[Sequence[str], Sequence[str]] = ((), ()),
) -> Path:
    """Write the report of a study; it may still be running.

    Args:
        path: the HTML file; replaced whole if it exists.
        run: what is shown.
        summary: what was asked, a paragraph each.
        finalized: a row per finalized config, column -> value; a row more of the same columns may be the baseline.
        remarks: what follows from them, a paragraph each.
        commands: how to reproduce the run, a line each.
        refresh_s: the page loads itself again after so many seconds; None: never.
        answer: what the knee gains in every cost, and which of its layers have how many bits, in words.

    Raises:
        RunError: the file cannot be written.
    """
    parts = {
        **PARTS,
        "finalized": lambda _: _finalized(finalized, remarks),
        "answer": lambda run: _answer(run, *answer),
    }
    bodies = [(shown, _body(shown, run, parts)) for shown in sections()]
    written = [section(words(shown.title, run), body, shown.id) for shown, body in bodies if body]
    embedded = data("run", _interactive(run)) if run.front.trials else Html()
    return write_page(path, run.name, summary, [*written, embedded], commands, script="report.js", refresh_s=refresh_s)


def _body(shown: Section, run: RunData, parts: Mapping[str, Callable[[RunData], Html]]) -> Html:
    """What a section shows of a run; empty if that is nothing."""
    pieces = []
    for item in shown.show:
        if not isinstance(item, ShownFigure):
            pieces.append(parts[item.part](run))
        elif "report" in item.pages and (drawn := FIGURES[item.figure](run)) is not None:
            pieces.append(figure(drawn, item.figure, words(item.caption, run)))
    body = joined(filter(None, pieces), between="\n")
    if not body:
        return body
    about = note(words(shown.about, run)) if shown.about else Html()
    return html("{}<div class='pair'>{}</div>" if shown.columns > 1 else "{}{}", about, body)


# ------------------------------------------------------------------------------------------------------------ parts


def _outcome(run: RunData) -> Html:
    """How the trials ended, and the front in figures."""
    states = Counter(trial.state for trial in run.records)
    counts = ", ".join(f"{states[state]} {state}" for state in ("complete", "stopped", "failed") if states[state])
    tiles, lines = [], [f"{counts or 'No trial has ended yet'}."]
    front = run.front
    if front.trials:
        knee, best = front.knee, front.best
        tiles = [
            ("best", run.metric.show(objectives(best)[0]), f"trial {best.number}, cost {objectives(best)[1]:.3g}"),
            ("knee", run.metric.show(objectives(knee)[0]), f"trial {knee.number}, cost {objectives(knee)[1]:.3g}"),
            ("front", str(len(front)), f"of {len(run.records):,} trials"),
            ("hypervolume", f"{front.hypervolume(run.cheapest, run.scores):.4f}", run.scores.said(run.metric)),
        ]
        if (baseline := front.nearest_uniform(objectives(knee)[1])) is not None:
            lines.append(f"Uniform baseline nearest to the knee's cost: {_point(baseline, run.metric)}.")
    reasons = Counter(trial.reason for trial in run.records if trial.state == "failed" and trial.reason)
    lines += [f"Failed {count}×: {reason}" for reason, count in reasons.most_common(5)]
    drawn = joined(
        html("<div class='tile'><dt>{}</dt><dd>{}</dd><dd class='small'>{}</dd></div>", *tile) for tile in tiles
    )
    return html("<dl class='tiles'>{}</dl>{}" if drawn else "{}{}", drawn, paragraphs(lines))


def _answer(run: RunData, gains: Sequence[str], layers: Sequence[str]) -> Html:
    """The knee in words: its gains in every cost, and what its layers have."""
    if not run.front.trials or not gains:
        return Html()
    knee = f"Trial {run.front.knee.number}, the knee"
    lists = [
        html("<ul>{}</ul>", joined(html("<li>{}</li>", line) for line in lines)) if lines else Html()
        for lines in (gains, layers)
    ]
    return joined([note(f"{knee}, in each cost:"), lists[0], note("Its layers:"), lists[1]])


def _picker(run: RunData) -> Html:
    """A list of the trials that can be looked at; the knee is picked first."""
    if not run.front.trials:
        return Html()
    groups = [("front, cheapest first", run.front.trials)]
    others = [t for t in run.front.ladder if t not in set(run.front.trials)]
    groups += [("uniform ladder, dominated", tuple(others))] if others else []
    knee, other = "<option value='{}' selected>{}, knee</option>", "<option value='{}'>{}</option>"
    options = joined(
        html(
            "<optgroup label='{}'>{}</optgroup>",
            label,
            joined(
                html(knee if trial is run.front.knee else other, trial.number, _option(trial, run.metric))
                for trial in trials
            ),
        )
        for label, trials in groups
    )
    label = "<label for='pick'>Trial</label>"
    return html(f"<p class='picker'>{label} <select id='pick' autocomplete='off'>{{}}</select></p>", options)


def _layers(run: RunData) -> Html:
    """The layer table of the knee; the page's script writes those of other trials in its place."""
    if not len(run.config):
        return Html()
    rows = [
        (
            row.layer,
            row.kind,
            row.shape,
            f"{row.macs:,}",
            chip(row.weight_quantizer, row.weight),
            chip(row.activation_quantizer, row.activation),
            f"{row.cost_percent:.2f}",
            f"{row.reference_percent:.2f}",
        )
        for row in rows_of(run.config)
    ]
    columns = ("layer", "kind", "weight shape", "MACs", "weight", "input", "cost, %", f"{run.reference}, %")
    drawn = table(columns, rows, texts={0, 1, 2, 4, 5}, name="layers")
    about = f"Cost in percent of the whole network at {run.reference}."
    title = html("<h3 id='layers-title' aria-live='polite'>{}</h3>", _point(run.front.knee, run.metric))
    return joined([title, html("<div class='scroll' tabindex='0'>{}</div>", drawn), note(about)])


def _front(run: RunData) -> Html:
    several = any(record.rungs for record in run.records)  # lengths of training
    steps = ["training steps"] if several else []
    columns = ["number", "origin", run.metric.label, *steps, "relative cost"]
    columns += ["mean weight bits", "mean activation bits", ""]
    trials = list(run.trials[run.trials.on_front].sort_values("relative_cost").pipe(rows_of))
    if not trials:
        return Html()
    rows = [
        (
            str(trial.number),
            str(trial.origin),
            run.metric.number(trial.score),
            *([str(trial.steps)] if several else []),
            f"{trial.relative_cost:.4f}",
            f"{trial.weight_bits:.2f}",
            f"{trial.activation_bits:.2f}",
            "knee" if trial.knee else "",
        )
        for trial in trials
    ]
    marked = next(index for index, trial in enumerate(trials) if trial.knee)
    drawn = table(columns, rows, texts={1, len(columns) - 1}, marked=marked)
    return html("<div class='scroll' tabindex='0'>{}</div>", drawn)


def _finalized(finalized: Sequence[Mapping[str, object]], remarks: Sequence[str]) -> Html:
    if not finalized:
        return Html()
    columns = list(dict.fromkeys(column for row in finalized for column in row))
    rows = [[_shown(row.get(column)) for column in columns] for row in finalized]
    texts = {index for index, column in enumerate(columns) if column in ("origin", "baseline", "pick", "note")}
    about = note("Trained longer over several seeds and scored on the test split.")
    heads = [column.replace("_", " ") for column in columns]
    return joined([about, table(heads, rows, texts), paragraphs(remarks)])


def _histograms(run: RunData) -> Html:
    """Weights before and after, layer by layer."""
    if not len(run.histograms):
        return Html()
    drawn = []
    for index, (name, bins) in enumerate(run.histograms.groupby("layer", sort=False)):
        edges = [*bins.low, bins.high.iloc[-1]]
        counted = figures.before_after(edges, list(bins.before), list(bins.after), f"weight of {name}")
        drawn.append(figure(counted, f"weights-{index}", f"As {bins.precision.iloc[0]}."))
    count, layers = run.histograms.layer.nunique(), len(run.layers)
    which = "" if count == layers else f" The {count} of {layers} layers with the most weights."
    about = note(f"Weights before and after quantization, in equal bins.{which}")
    return html("<div class='span'>{}<div class='small-multiples'>{}</div></div>", about, joined(drawn))


_PROXIES = {
    "start": "start score",
    "additive": "additive model",
    "divergence": "trial, divergence",
    "quality": "trial, metric",
}


def _ranking(run: RunData) -> Html:
    """Kendall's tau of what is cheap, by stratum of cost."""
    if not len(run.ranking):
        return Html()
    proxies = list(dict.fromkeys(run.ranking.proxy))
    rows = []
    for stratum, of_stratum in run.ranking.groupby("stratum", sort=False):
        taus = {row.proxy: row for row in rows_of(of_stratum)}
        rows.append([str(stratum), str(max(row.n for row in taus.values())), *(_tau(taus[name]) for name in proxies)])
    target = "on test after final training" if run.ranking.against.iloc[0] == "final" else "after the trial"
    about = note(
        f"Kendall's tau of each to the score {target}, with its 95 % interval: 1 is the same order, 0 none. The "
        "additive model foretells a trial from the others."
    )
    columns = ["cost", "trials", *(_PROXIES.get(name, f"{name} steps") for name in proxies)]
    return joined([about, table(columns, rows, texts={0})])


def _tau(row: Any) -> str:
    return "–" if isnan(row.tau) else f"{row.tau:+.2f} ({row.low:.1f} to {row.high:.1f})"


def _origins(run: RunData) -> Html:
    """Who added how much to the hypervolume, and what of it came after the initial configs."""
    if run.progress.origin.nunique() < 2:
        return Html()
    origins = origins_table(run.progress)
    several = any(record.rungs for record in run.records)
    columns = ["origin", "trials", "added by first rungs", "added by longer rungs", "added in all", "of that, late"]
    rows = [
        [
            str(row.origin),
            str(row.trials),
            *map("{:+.4f}".format, (row.first, row.longer, row.first + row.longer, row.late)),
        ]
        for row in rows_of(origins)
    ]
    if not several:
        columns = [*columns[:2], *columns[4:]]
        rows = [[*row[:2], *row[4:]] for row in rows]
    last = last_initial(run.progress)
    late = origins.late.sum()
    sampler = origins.late[origins.origin == "sampler"].sum()
    share = f", {sampler / late:.0%} of it with configs of the sampler" if late > 0 else ""
    reached = run.progress.hypervolume.iloc[last] if last >= 0 else 0.0
    about = note(
        f"When the last initial config had ended its first rung, the hypervolume was {reached:.4f}; late is what came "
        f"after that, {late:+.4f}{share}."
    )
    return joined([about, table(columns, rows, texts={0})])


PARTS: Mapping[str, Callable[[RunData], Html]] = {
    "outcome": _outcome,
    "picker": _picker,
    "layers": _layers,
    "front-table": _front,
    "histograms": _histograms,
    "ranking": _ranking,
    "origins": _origins,
}


# ------------------------------------------------------------------------------------------- for the page's script


def _interactive(run: RunData) -> dict[str, Any]:
    """What the page needs to show the layers of any point that is drawn.

    A config is two texts, weights and inputs, of one letter a layer; `prices` says what a layer costs at a pair of
    letters, in percent of the reference.
    """
    drawn = {
        row[0]
        for trace in figures.front(run.trials, run.metric).data
        if trace.customdata is not None
        for row in trace.customdata
    }
    trials = [record for record in run.records if record.number in drawn and record.score is not None]
    names = list(run.layers.layer)
    letters: dict[Any, str] = {}
    prices: list[dict[str, float]] = [{} for _ in names]

    def letter(precision: Any) -> str:
        return letters.setdefault(precision, _CODES[len(letters)])

    def coded(record: TrialRecord) -> dict[str, Any]:
        pairs = [(letter(record.config[name].weight), letter(record.config[name].activation)) for name in names]
        for name, pair, known in zip(names, pairs, prices, strict=True):
            if "".join(pair) not in known:
                known["".join(pair)] = round(100 * run.cost.addend(name, record.config[name]), 4)
        weights, inputs = ("".join(side) for side in zip(*pairs, strict=True))
        title, score = _point(record, run.metric), run.metric.factor * (record.score or 0.0)
        return {"title": title, "score": score, "cost": record.cost, "w": weights, "a": inputs}

    return {
        "reference": run.reference,
        "picked": run.front.knee.number,
        "trials": {record.number: coded(record) for record in trials},
        "prices": prices,
        "precisions": {
            code: {"text": str(p), "mark": mark(p), "bits": p.bits, "quantizer": p.quantizer}
            for p, code in letters.items()
        },
    }


def _option(trial: TrialRecord, metric: Metric) -> str:
    score, cost = objectives(trial)
    trained = f" after {trial.steps} steps" if trial.rungs else ""
    return f"{trial.number}: {metric.show(score)}{trained}, cost {cost:.3g} ({trial.origin})"


def _point(trial: TrialRecord, metric: Metric) -> str:
    if trial.score is None or trial.cost is None:
        return f"trial {trial.number} ({trial.origin})"
    trained = f" after {trial.steps} steps" if trial.rungs else ""
    score = f"{metric.show(trial.score)}{trained}"
    return f"trial {trial.number} ({trial.origin}), {score} at relative cost {trial.cost:.3g}"


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
