"""Figures of values: ranges that were learned, weights before and after, how far a layer alone moves the outputs."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import pairwise
from math import log10
from typing import Literal

import pandas as pd
import plotly.graph_objects as go

from mpsearch.metric import Metric
from mpsearch.report.figures.layers import MAX_ROWS, shortened
from mpsearch.report.style import STYLE, layout
from mpsearch.report.tables import rows_of


def ranges(values: pd.DataFrame, side: Literal["weight", "activation"]) -> go.Figure:
    """The smallest and the largest value that each layer's quantizer can give; of weights also what there is.

    Of more than `MAX_ROWS` layers those with the most weights are shown.

    Args:
        values: as from `weights.ranges_table`.
        side: which tensor of the layer.
    """
    of_side = values[values.tensor == side]
    shown = of_side[of_side.weights.rank(method="first", ascending=False) <= MAX_ROWS].reset_index(drop=True)
    figure = go.Figure(layout=layout(height=130 + 22 * max(len(shown), 4)))
    rows = list(range(len(shown)))
    if side == "weight":
        figure.add_bar(
            y=rows,
            base=shown.seen_low.tolist(),
            x=(shown.seen_high - shown.seen_low).tolist(),
            orientation="h",
            width=0.7,
            name="float weights",
            marker={"color": STYLE["grey"], "opacity": 0.35, "line": {"width": 0}},
            customdata=shown[["seen_low", "seen_high"]].to_numpy().tolist(),
            hovertemplate="float weights %{customdata[0]:.4g} to %{customdata[1]:.4g}<extra></extra>",
        )
    for quantizer, group in shown.groupby("quantizer", sort=False):
        style = STYLE["quantizers"][str(quantizer)]
        xs: list[float | None] = []
        ys: list[int | None] = []
        texts: list[str] = []
        for row in rows_of(group):
            xs += [row.low, row.high, None]
            ys += [row.Index, row.Index, None]
            texts += [f"{escape(row.layer)}: {row.precision}<br>{row.low:.4g} to {row.high:.4g}"] * 3
        figure.add_scatter(
            x=xs,
            y=ys,
            text=texts,
            name=style["label"],
            mode="lines+markers",
            line={"color": style["color"], "width": 4},
            marker={"symbol": "line-ns", "size": 11, "line": {"width": 2.5, "color": style["color"]}},
            hovertemplate="%{text}<extra></extra>",
        )
    left_out = "" if len(shown) == len(of_side) else f"<br>the {len(shown)} of {len(of_side)} layers with most weights"
    figure.update_xaxes(title=f"value{left_out}", zeroline=True, zerolinecolor=STYLE["grey"])
    figure.update_yaxes(
        autorange="reversed", tickvals=rows, ticktext=[shortened([name]) for name in shown.layer], showgrid=False
    )
    return figure


def sweep(layers: pd.DataFrame, metric: Metric, unit: str) -> go.Figure:
    """How far each layer moves the outputs when its weight, or its input, is quantized alone.

    Of more than `MAX_ROWS` layers those that move them least are left out.

    Args:
        layers: as from `debug_page.sweep_table`.
        metric: what a score is.
        unit: of divergences.
    """
    most = layers[["weight_divergence", "activation_divergence"]].max(axis=1)
    shown = layers[most.rank(method="first", ascending=False, na_option="top") <= MAX_ROWS]
    figure = go.Figure(layout=layout(height=110 + 24 * max(len(shown), 4)))
    for side, colour, symbol in (("weight", STYLE["blue"], "circle"), ("activation", STYLE["orange"], "diamond")):
        figure.add_scatter(
            x=shown[f"{side}_divergence"],
            y=list(range(len(shown))),
            customdata=[[escape(name), drop] for name, drop in zip(shown.layer, shown[f"{side}_drop"], strict=True)],
            name={"weight": "its weight", "activation": "its input"}[side],
            mode="markers",
            marker={"color": colour, "symbol": symbol, "size": 10},
            hovertemplate=f"%{{customdata[0]}}<br>divergence %{{x:.3g}} {unit}<br>"
            f"{metric.name} worse by %{{customdata[1]:{metric.format}}} {metric.difference_unit}",
        )
    figure.update_xaxes(type="log", title=f"divergence, {unit}, log scale", exponentformat="power", dtick=1)
    figure.update_yaxes(
        autorange="reversed",
        tickvals=list(range(len(shown))),
        ticktext=[shortened([name], 20) for name in shown.layer],
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
    top = max((*before, *after, 1))
    counts = {"type": "log", "range": [-0.3, log10(top) + 0.2], "exponentformat": "power", "dtick": 1}
    common = layout(height=260)
    # One call: step by step it would take twice as long, and a report has one of these for each layer.
    return go.Figure(
        [
            {"type": "bar", "x": middles, "y": list(values), "width": share * width, "name": name}
            | {"marker": {"color": colour, "line": {"width": 0}, "opacity": 1}}
            for name, values, share, colour in (
                ("before", before, 1.0, STYLE["sky"]),
                ("after", after, 0.4, STYLE["vermilion"]),
            )
        ],
        common
        | {
            "barmode": "overlay",
            "xaxis": common["xaxis"] | {"title": {"text": escape(title)}},
            "yaxis": common["yaxis"] | {"title": {"text": "values"}, **counts},
        },
    )
