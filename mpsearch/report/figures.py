"""Figures: functions from a table of `report.tables` to a plotly Figure, for the report, a dashboard, a notebook.

Colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), which stay apart for every kind of colour
vision, and every series has its own marker as well. Backgrounds are transparent, so that the page around a figure
decides between light and dark.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import pairwise
from math import ceil, log10
from typing import Literal

import pandas as pd
import plotly.graph_objects as go

from mpsearch.precision import FLOAT_BITS

MAX_ROWS = 40  # layers in a heatmap; more are drawn as runs of neighbours
MAX_COLUMNS = 16  # front trials in a heatmap; more are thinned out

_BLUE, _ORANGE, _GREEN, _PURPLE, _SKY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9"
_VERMILLION, _GREY = "#D55E00", "#888888"
_ORIGIN_STYLES = [(_BLUE, "circle"), (_ORANGE, "diamond"), (_GREEN, "triangle-up"), (_PURPLE, "cross"), (_SKY, "star")]
_FIRST_ORIGINS = ["sampler", "manual"]  # keep their style whatever other origins a study has

_BIT_COLOURS = ["#fde737", "#e1cc55", "#bdae6c", "#9b9476", "#7b7b78", "#5e626e", "#38486b", "#00204d"]
"""1 to 8 bits, from light to dark (cividis reversed)."""
_FLOAT_COLOUR, _FLOAT_LEVEL = "#CC79A7", 9


def front(trials: pd.DataFrame) -> go.Figure:
    """Accuracy over cost (log scale) of the complete trials: the front, the uniform ladder, the others by origin.

    Args:
        trials: as from `trials_table`.
    """
    complete = trials[trials.state == "complete"]
    best = complete[complete.on_front].sort_values("relative_cost")
    figure = go.Figure(layout=_layout(height=460))
    figure.add_scatter(
        x=best.relative_cost,
        y=best.accuracy_percent,
        name="front",
        mode="lines",
        line={"shape": "hv", "color": _GREY, "width": 2},
        hoverinfo="skip",
    )
    ladder = complete[complete.origin == "uniform"].sort_values("relative_cost")
    _add_trials(figure, ladder, "uniform ladder", _VERMILLION, "square", mode="lines+markers")
    origins = sorted(set(complete.origin) - {"uniform", *_FIRST_ORIGINS})
    for index, origin in enumerate([*_FIRST_ORIGINS, *origins]):
        colour, symbol = _ORIGIN_STYLES[index % len(_ORIGIN_STYLES)]
        _add_trials(figure, complete[complete.origin == origin].sort_values("on_front"), origin, colour, symbol)
    knee = complete[complete.knee]
    figure.add_scatter(
        x=knee.relative_cost,
        y=knee.accuracy_percent,
        name="knee",
        mode="markers",
        marker={"symbol": "circle-open", "size": 20, "color": _GREY, "line": {"width": 2.5}},
        hoverinfo="skip",
    )
    ticks = [digit * 10.0**power for power in range(-4, 3) for digit in (1, 2, 5)]
    figure.update_xaxes(
        type="log",
        title="relative cost, log scale (reference = 1)",
        tickvals=ticks,
        ticktext=[f"{tick:g}" for tick in ticks],
    )
    figure.update_yaxes(title="accuracy, %")
    return figure


def bits_heatmap(bits: pd.DataFrame, side: Literal["weight", "activation"]) -> go.Figure:
    """Bits of every layer (downwards) in every front trial (cost rising to the right).

    More than `MAX_ROWS` layers are drawn as runs of neighbours, as the mean of their quantized bits; of more than
    `MAX_COLUMNS` trials some are left out, the ends and the knee never. Either is said below the cells.

    Args:
        bits: as from `bits_table`.
        side: which tensor of the layer.
    """
    positions = _thinned(bits)
    layers = list(dict.fromkeys(bits.layer))
    length = max(1, ceil(len(layers) / MAX_ROWS))
    runs = [slice(start, start + length) for start in range(0, len(layers), length)]
    kept = bits[bits.position.isin(positions)]
    widths, marks = (
        kept[f"{side}_{what}"].to_numpy().reshape(len(positions), len(layers)).T  # (layers, trials)
        for what in ("bits", "mark")
    )
    trials = kept.drop_duplicates("position")
    heads = [
        f"trial {number}, relative cost {cost:.4g}"
        for number, cost in zip(trials.number, trials.relative_cost, strict=True)
    ]
    figure = go.Figure(layout=_layout(height=130 + 20 * max(len(runs), 4)))
    figure.add_heatmap(
        z=[[_level(column) for column in widths[run].T] for run in runs],
        text=[[_text(*pair) for pair in zip(marks[run].T, widths[run].T, strict=True)] for run in runs],
        customdata=[
            [_hover(head, layers[run], column) for head, column in zip(heads, marks[run].T, strict=True)]
            for run in runs
        ],
        texttemplate="%{text}",
        textfont={"size": 10},
        hovertemplate="%{customdata}<extra></extra>",
        xgap=1,
        ygap=1,
        zmin=0.5,
        zmax=_FLOAT_LEVEL + 0.5,
        colorscale=_stepped([*_BIT_COLOURS, _FLOAT_COLOUR]),
        colorbar={
            "title": "bits",
            "thickness": 12,
            "tickvals": list(range(1, _FLOAT_LEVEL + 1)),
            "ticktext": [*map(str, range(1, _FLOAT_LEVEL)), "float"],
        },
    )
    count = bits.position.nunique()
    aggregated = [
        f"{len(layers)} layers in runs of {length}, mean bits" if length > 1 else "",
        f"{len(positions)} of {count} trials" if len(positions) < count else "",
    ]
    figure.update_xaxes(
        title="<br>".join(["front trial, cheapest first (* knee)", *filter(None, aggregated)]),
        tickvals=list(range(len(positions))),
        ticktext=[f"{number}{'*' * knee}" for number, knee in zip(trials.number, trials.knee, strict=True)],
        tickangle=0 if len(positions) <= 12 else -90,
        showgrid=False,
    )
    figure.update_yaxes(
        autorange="reversed",
        tickvals=list(range(len(runs))),
        ticktext=[_shortened(layers[run]) for run in runs],
        showgrid=False,
    )
    return figure


def hypervolume(progress: pd.DataFrame) -> go.Figure:
    """Hypervolume over wall time.

    Args:
        progress: as from `progress_table`.
    """
    last_s = progress.elapsed_s.max() if len(progress) else 0.0
    unit, seconds = next(((u, s) for u, s in (("h", 3600), ("min", 60)) if last_s >= 2 * s), ("s", 1))
    figure = go.Figure(layout=_layout(height=320))
    figure.add_scatter(
        x=progress.elapsed_s / seconds,
        y=progress.hypervolume,
        customdata=progress.trials,
        name="hypervolume",
        mode="lines+markers",
        line={"shape": "hv", "color": _BLUE, "width": 2},
        marker={"size": 5},
        hovertemplate=f"%{{y:.4f}} after %{{customdata}} trials, %{{x:.1f}} {unit}<extra></extra>",
    )
    figure.update_layout(showlegend=False)
    figure.update_xaxes(title=f"time since the first trial started, {unit}", rangemode="tozero")
    figure.update_yaxes(title="hypervolume")
    return figure


def sweep(layers: pd.DataFrame) -> go.Figure:
    """How far each layer moves the logits when its weight, or its input, is quantized alone.

    Of more than `MAX_ROWS` layers those that move them least are left out.

    Args:
        layers: as from `debug_page.sweep_table`.
    """
    most = layers[["weight_divergence", "activation_divergence"]].max(axis=1)
    shown = layers[most.rank(method="first", ascending=False, na_option="top") <= MAX_ROWS]
    figure = go.Figure(layout=_layout(height=110 + 24 * max(len(shown), 4)))
    for side, colour, symbol in (("weight", _BLUE, "circle"), ("activation", _ORANGE, "diamond")):
        figure.add_scatter(
            x=shown[f"{side}_divergence"],
            y=list(range(len(shown))),
            customdata=[[escape(name), drop] for name, drop in zip(shown.layer, shown[f"{side}_drop"], strict=True)],
            name={"weight": "its weight", "activation": "its input"}[side],
            mode="markers",
            marker={"color": colour, "symbol": symbol, "size": 10},
            hovertemplate="%{customdata[0]}<br>divergence %{x:.3g} nats<br>%{customdata[1]:.2f} points lost",
        )
    figure.update_xaxes(type="log", title="divergence, nats, log scale", exponentformat="power", dtick=1)
    figure.update_yaxes(
        autorange="reversed",
        tickvals=list(range(len(shown))),
        ticktext=[_shortened([name], 20) for name in shown.layer],
    )
    return figure


def before_after(edges: Sequence[float], before: Sequence[int], after: Sequence[int], title: str) -> go.Figure:
    """Values of a tensor before and after quantization, counted (log scale) in the same bins.

    Args:
        edges: of the bins, one more than there are bins.
        before: values in each bin.
        after: values in each bin.
        title: of the horizontal axis.
    """
    middles = [(low + high) / 2 for low, high in pairwise(edges)]
    width = edges[1] - edges[0]
    figure = go.Figure(layout=_layout(height=260))
    for name, counts, share, colour in (("before", before, 1.0, _SKY), ("after", after, 0.4, _VERMILLION)):
        marker = {"color": colour, "line": {"width": 0}, "opacity": 1}
        figure.add_bar(x=middles, y=counts, width=share * width, name=name, marker=marker)
    figure.update_layout(barmode="overlay")
    figure.update_xaxes(title=escape(title))
    top = max((*before, *after, 1))
    figure.update_yaxes(type="log", title="values", range=[-0.3, log10(top) + 0.2], exponentformat="power", dtick=1)
    return figure


def _add_trials(
    figure: go.Figure, trials: pd.DataFrame, name: str, colour: str, symbol: str, mode: str = "markers"
) -> None:
    if trials.empty:
        return
    figure.add_scatter(
        x=trials.relative_cost,
        y=trials.accuracy_percent,
        customdata=trials[["number", "weight_bits", "activation_bits"]],
        name=escape(name),
        mode=mode,
        line={"color": colour, "width": 1.5, "dash": "dot"},
        marker={
            "color": colour,
            "symbol": symbol,
            "size": [10 if on_front else 6 for on_front in trials.on_front],
            "opacity": 0.9,
            "line": {"width": 0},
        },
        hovertemplate=(
            "trial %{customdata[0]}<br>accuracy %{y:.2f} %<br>relative cost %{x:.4g}"
            "<br>mean bits: weights %{customdata[1]:.1f}, activations %{customdata[2]:.1f}"
        ),
    )


def _layout(height: int) -> go.Layout:
    return go.Layout(
        height=height,
        margin={"l": 10, "r": 10, "t": 30, "b": 10},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13},
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": _GREY, "activecolor": _BLUE},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "itemsizing": "constant"},
        xaxis={"automargin": True, "gridcolor": "#dddddd", "zeroline": False},
        yaxis={"automargin": True, "gridcolor": "#dddddd", "zeroline": False},
    )


def _thinned(bits: pd.DataFrame) -> list[int]:
    """At most `MAX_COLUMNS` positions on the front, evenly spaced, with both ends and the knee."""
    count = int(bits.position.nunique())
    if count <= MAX_COLUMNS:
        return list(range(count))
    chosen = [round(index * (count - 1) / (MAX_COLUMNS - 1)) for index in range(MAX_COLUMNS)]
    knee = int(bits[bits.knee].position.iloc[0])
    if knee not in chosen:
        nearest = min(range(1, MAX_COLUMNS - 1), key=lambda index: abs(chosen[index] - knee))
        chosen[nearest] = knee
    return chosen


def _level(widths: Sequence[int]) -> float:
    """Mean bits of the quantized layers of a run; the float level where there is none."""
    quantized = [int(bits) for bits in widths if bits < FLOAT_BITS]
    return sum(quantized) / len(quantized) if quantized else float(_FLOAT_LEVEL)


def _text(marks: Sequence[str], widths: Sequence[int]) -> str:
    """The mark of one layer, or the rounded mean bits of a run, with an f if some of it is float."""
    if len(set(marks)) == 1:
        return marks[0]
    return f"{_level(widths):.0f}" + ("f" if max(widths) == FLOAT_BITS else "")


def _hover(head: str, layers: Sequence[str], marks: Sequence[str]) -> str:
    return "<br>".join([head, *(f"{escape(layer)}: {mark}" for layer, mark in zip(layers, marks, strict=True))])


def _shortened(run: Sequence[str], length: int = 24) -> str:
    """The name of a layer, or of a run by its first layer; of a long one the end, where layers differ."""
    more = f" +{len(run) - 1}" if len(run) > 1 else ""
    room = length - len(more)
    name = run[0] if len(run[0]) <= room else f"…{run[0][1 - room :]}"
    return escape(name + more)


def _stepped(colours: list[str]) -> list[tuple[float, str]]:
    """A colour scale without gradients: every colour holds an equal part of the range."""
    count = len(colours)
    return [(edge / count, colour) for index, colour in enumerate(colours) for edge in (index, index + 1)]
