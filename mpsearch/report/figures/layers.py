"""Figures of layers: a config along the network, the bits of the front, what each layer costs."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import ceil
from typing import Literal

import pandas as pd
import plotly.graph_objects as go

from mpsearch.precision import FLOAT_BITS
from mpsearch.report.style import STYLE, layout, stepped
from mpsearch.report.tables import rows_of

MAX_ROWS = 40  # layers in a figure with a row per layer; more are drawn as runs of neighbours
MAX_COLUMNS = 16  # front trials in a heatmap; more are thinned out
MAX_NAMES = 26  # layer names along the strip; of more every second, third ... is written
FLOAT_LEVEL = 9  # bits as which a float tensor is drawn

NARROWEST = 0.25
"""Of a bar in the strip, as a share of the mean width: a layer of few MACs is drawn wider than it is."""


def network(config: pd.DataFrame) -> go.Figure:
    """The network from input to output under one config: weights upwards, inputs downwards.

    Height: bits. Width: the layer's share of the multiply-accumulates. Colour: type of the quantizer.

    Args:
        config: as from `config_table`.
    """
    share = config.macs / max(1, config.macs.sum())
    width = share.clip(lower=NARROWEST / max(1, len(config)))
    width /= width.sum() or 1
    middle = width.cumsum() - width / 2
    figure = go.Figure(layout=layout(height=400))
    hover = [
        f"{escape(row.layer)} ({row.kind}, {row.shape})<br>{row.macs:,} MACs, {100 * part:.1f} % of all"
        for row, part in zip(rows_of(config), share, strict=True)
    ]
    for side, sign, what in (("weight", 1, "weight"), ("activation", -1, "input")):
        figure.add_bar(
            x=middle.tolist(),
            y=[sign * level(bits) for bits in config[f"{side}_bits"]],
            width=(0.97 * width).tolist(),
            name=what,
            text=config[f"{side}_mark"].tolist(),
            customdata=[[text, precision] for text, precision in zip(hover, config[side], strict=True)],
            marker={
                "color": [STYLE["quantizers"][quantizer]["color"] for quantizer in config[f"{side}_quantizer"]],
                "line": {"width": 0},
            },
            textposition="inside",
            insidetextanchor="end",
            textangle=0,
            textfont={"color": "#111111", "size": 11},
            hovertemplate=f"%{{customdata[0]}}<br>{what}: %{{customdata[1]}}<extra></extra>",
            showlegend=False,
        )
    for style in STYLE["quantizers"].values():
        figure.add_scatter(
            x=[None],
            y=[None],
            name=style["label"],
            mode="markers",
            marker={"color": style["color"], "symbol": "square", "size": 11},
        )
    figure.update_layout(barmode="overlay", bargap=0, uniformtext={"minsize": 9, "mode": "hide"})
    step = ceil(len(config) / MAX_NAMES)
    every = "" if step <= 1 else f"; the name of one in {step} layers"
    figure.update_xaxes(
        title={"text": f"layers in order, width: share of MACs{every}", "standoff": 12},
        tickvals=middle[::step].tolist(),
        ticktext=[shortened([name], 20) for name in config.layer[::step]],
        tickangle=-90 if len(config) > 4 else 0,
        showgrid=False,
        range=[0, 1],
    )
    ticks = [-8, -4, 0, 4, 8]
    figure.update_yaxes(
        title="activation bits  |  weight bits",
        tickvals=ticks,
        ticktext=[str(abs(tick)) for tick in ticks],
        range=[-FLOAT_LEVEL - 0.4, FLOAT_LEVEL + 0.4],
        zeroline=True,
        zerolinecolor=STYLE["grey"],
    )
    return figure


def cost_by_layer(config: pd.DataFrame, name: str, reference: str) -> go.Figure:
    """What every layer costs at the reference (wide) and under a config (narrow), in percent of the whole reference.

    More than `MAX_ROWS` layers are drawn as sums over runs of neighbours.

    Args:
        config: as from `config_table`.
        name: of the config.
        reference: the config that costs 100 %.
    """
    length = max(1, ceil(len(config) / MAX_ROWS))
    run = pd.Series(range(len(config)), index=config.index) // length
    sums = config.groupby(run)[["cost_percent", "reference_percent"]].sum()
    names = [shortened(list(group.layer)) for _, group in config.groupby(run)]
    figure = go.Figure(layout=layout(height=130 + 22 * max(len(sums), 4)))
    for column, label, colour, width in (
        ("reference_percent", reference, STYLE["grey"], 0.8),
        ("cost_percent", name, STYLE["blue"], 0.42),
    ):
        figure.add_bar(
            y=list(range(len(sums))),
            x=sums[column].tolist(),
            orientation="h",
            width=width,
            name=f"{escape(label)}: {config[column].sum():.1f} %",
            marker={"color": colour, "line": {"width": 0}, "opacity": 0.45 if column == "reference_percent" else 1},
            customdata=names,
            hovertemplate="%{customdata}: %{x:.2f} %<extra></extra>",
        )
    runs = "" if length == 1 else f"<br>{len(config)} layers in runs of {length}, summed"
    figure.update_layout(barmode="overlay", meta={"run": length})
    figure.update_xaxes(title=f"cost, % of the network at {escape(reference)}{runs}", rangemode="tozero")
    figure.update_yaxes(autorange="reversed", tickvals=list(range(len(sums))), ticktext=names, showgrid=False)
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
    shown = bits[bits.position.isin(positions)]
    widths, marks = (
        shown[f"{side}_{what}"].to_numpy().reshape(len(positions), len(layers)).T  # (layers, trials)
        for what in ("bits", "mark")
    )
    trials = shown.drop_duplicates("position")
    heads = [
        f"trial {number}, relative cost {cost:.4g}"
        for number, cost in zip(trials.number, trials.relative_cost, strict=True)
    ]
    figure = go.Figure(layout=layout(height=130 + 20 * max(len(runs), 4)))
    figure.add_heatmap(
        z=[[_mean_level(column) for column in widths[run].T] for run in runs],
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
        zmax=FLOAT_LEVEL + 0.5,
        colorscale=stepped([*STYLE["bits"], STYLE["quantizers"]["float"]["color"]]),
        colorbar={
            "title": "bits",
            "thickness": 12,
            "tickvals": list(range(1, FLOAT_LEVEL + 1)),
            "ticktext": [*map(str, range(1, FLOAT_LEVEL)), "float"],
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
        ticktext=[shortened(layers[run]) for run in runs],
        showgrid=False,
    )
    return figure


def _thinned(bits: pd.DataFrame) -> list[int]:
    """At most `MAX_COLUMNS` positions on the front, evenly spaced, with both ends and the knee."""
    count = int(bits.position.nunique())
    if count <= MAX_COLUMNS:
        return list(range(count))
    columns = [round(index * (count - 1) / (MAX_COLUMNS - 1)) for index in range(MAX_COLUMNS)]
    knee = int(bits[bits.knee].position.iloc[0])
    if knee not in columns:
        nearest = min(range(1, MAX_COLUMNS - 1), key=lambda index: abs(columns[index] - knee))
        columns[nearest] = knee
    return columns


def level(bits: float) -> float:
    """The height at which so many bits are drawn."""
    return min(bits, FLOAT_LEVEL)


def _mean_level(widths: Sequence[int]) -> float:
    """Mean bits of the quantized layers of a run; the float level where there is none."""
    quantized = [min(int(bits), FLOAT_LEVEL) for bits in widths if bits < FLOAT_BITS]
    return sum(quantized) / len(quantized) if quantized else float(FLOAT_LEVEL)


def _text(marks: Sequence[str], widths: Sequence[int]) -> str:
    """The mark of one layer, or the rounded mean bits of a run, with an f if some of it is float."""
    if len(set(marks)) == 1:
        return marks[0]
    return f"{_mean_level(widths):.0f}" + ("f" if max(widths) == FLOAT_BITS else "")


def _hover(head: str, layers: Sequence[str], marks: Sequence[str]) -> str:
    return "<br>".join([head, *(f"{escape(layer)}: {mark}" for layer, mark in zip(layers, marks, strict=True))])


def shortened(run: Sequence[str], length: int = 24) -> str:
    """The name of a layer, or of a run by its first layer; of a long one the end, where layers differ."""
    more = f" +{len(run) - 1}" if len(run) > 1 else ""
    room = length - len(more)
    name = run[0] if len(run[0]) <= room else f"…{run[0][1 - room :]}"
    return escape(name + more)
