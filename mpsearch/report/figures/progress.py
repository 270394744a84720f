"""Figures of progress: what a search has reached over time, and how the warm start went down."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import ceil
from typing import Literal

import pandas as pd
import plotly.graph_objects as go

from mpsearch.metric import Metric
from mpsearch.report.figures.layers import MAX_ROWS, shortened
from mpsearch.report.style import STYLE, between, layout

MAX_POINTS = 1000  # of a colour
MAX_STEPS = 60  # points of a line of the descent


def hypervolume(progress: pd.DataFrame) -> go.Figure:
    """Hypervolume over wall time.

    Args:
        progress: as from `progress_table`.
    """
    unit, seconds = _unit(progress.elapsed_s)
    figure = go.Figure(layout=layout(height=320))
    figure.add_scatter(
        x=progress.elapsed_s / seconds,
        y=progress.hypervolume,
        customdata=progress.trials,
        name="hypervolume",
        mode="lines+markers",
        line={"shape": "hv", "color": STYLE["blue"], "width": 2},
        marker={"size": 5},
        hovertemplate=f"%{{y:.4f}} after %{{customdata}} trials, %{{x:.1f}} {unit}<extra></extra>",
    )
    figure.update_layout(showlegend=False)
    figure.update_xaxes(title=f"time since the first trial started, {unit}", rangemode="tozero")
    figure.update_yaxes(title="hypervolume")
    return figure


def added_by_origin(progress: pd.DataFrame) -> go.Figure:
    """What the configs of each origin have added to the hypervolume, over wall time: first rungs, and longer ones.

    Args:
        progress: as from `progress_table`.
    """
    unit, seconds = _unit(progress.elapsed_s)
    figure = go.Figure(layout=layout(height=320))
    for (origin, longer), rows in progress.groupby(["origin", progress.rung > 0], sort=False):
        style = STYLE["origins"].get(str(origin), STYLE["origins"]["other"])
        last_s = progress.elapsed_s.iloc[-1]
        sums = rows.added.cumsum()
        figure.add_scatter(
            x=[*(rows.elapsed_s / seconds), last_s / seconds],
            y=[*sums, sums.iloc[-1]],
            name=style["label"] + (", longer rungs" if longer else ""),
            mode="lines",
            line={"shape": "hv", "width": 2, "color": style["color"], "dash": "dot" if longer else "solid"},
            hovertemplate=f"%{{y:.4f}} after %{{x:.1f}} {unit}",
        )
    figure.update_xaxes(title=f"time since the first trial started, {unit}", rangemode="tozero")
    figure.update_yaxes(title="added to the hypervolume")
    return figure


def best_so_far(best: pd.DataFrame, metric: Metric) -> go.Figure:
    """The best score so far within some bounds on cost, over wall time.

    Args:
        best: as from `best_table`.
        metric: what scores are.
    """
    unit, seconds = _unit(best.elapsed_s)
    figure = go.Figure(layout=layout(height=320))
    dashes = ("solid", "dash", "dot", "dashdot")
    colours = (STYLE["blue"], STYLE["green"], STYLE["vermilion"], STYLE["pink"])
    for index, (bound, rows) in enumerate(best.groupby("bound", sort=False)):
        figure.add_scatter(
            x=(rows.elapsed_s / seconds).tolist(),
            y=(metric.factor * rows.score).tolist(),
            customdata=rows.number.tolist(),
            name=f"cost ≤ {bound:g}",
            mode="lines",
            line={"shape": "hv", "width": 2, "color": colours[index % 4], "dash": dashes[index % 4]},
            hovertemplate=f"%{{y:{metric.format}}} {metric.unit}, trial %{{customdata}}, %{{x:.1f}} {unit}",
        )
    figure.update_xaxes(title=f"time since the first trial started, {unit}", rangemode="tozero")
    figure.update_yaxes(title=f"best {metric.label} so far")
    return figure


def prescreen(scores: pd.DataFrame) -> go.Figure:
    """The start score of every untrained config over its cost, both in log scale.

    Args:
        scores: as from `prescreen_table`; at most the last MAX_POINTS are drawn.
    """
    figure = go.Figure(layout=layout(height=320))
    for name, colour, rows in (
        ("proposed by others", STYLE["grey"], scores[scores.source != "model"]),
        ("proposed by the model", STYLE["blue"], scores[scores.source == "model"]),
    ):
        drawn = rows.tail(MAX_POINTS)
        figure.add_scatter(
            x=drawn.relative_cost.tolist(),
            y=drawn.divergence.tolist(),
            customdata=drawn.source.tolist(),
            name=name,
            mode="markers",
            marker={"color": colour, "size": 5, "opacity": 0.7},
            hovertemplate="%{customdata}: %{y:.3g} from float, cost %{x:.4g}<extra></extra>",
        )
    figure.update_xaxes(title="relative cost", type="log")
    figure.update_yaxes(title="start score, divergence from float", type="log")
    return figure


def training(curve: Sequence[tuple[int, float]], metric: Metric) -> go.Figure:
    """Score on val during the fine-tune of one trial.

    Args:
        curve: (step, score), from before the first step to the last.
        metric: what scores are.
    """
    steps, scores = [step for step, _ in curve], [metric.factor * score for _, score in curve]
    figure = go.Figure(layout=layout(height=320))
    line = {"color": STYLE["blue"], "width": 2}
    figure.add_scatter(x=steps, y=scores, name=metric.name, mode="lines+markers", line=line)
    low, high = min(scores, default=0.0), max(scores, default=1.0)
    room = max(0.01 * abs(high), 0.1 * (high - low)) or 1.0
    ticks = [low + share * (high - low) for share in (0.0, 0.5, 1.0)]
    figure.update_xaxes(
        title="step", range=[0, max(steps, default=1) or 1], tickvals=steps, ticktext=list(map(str, steps))
    )
    figure.update_yaxes(
        title=metric.label,
        range=[low - room, high + room],
        tickvals=list(dict.fromkeys(ticks)),
        ticktext=[format(tick, metric.format) for tick in dict.fromkeys(ticks)],
    )
    return figure


def descent(steps: pd.DataFrame, side: Literal["weight", "activation"]) -> go.Figure:
    """The learned bits of every tensor while the budget falls, a line each, from the first layer to the last.

    Of more than `MAX_STEPS` steps some are left out; more than `MAX_ROWS` layers are means over runs of neighbours.

    Args:
        steps: as from `descent_table`.
        side: which tensor of the layers.
    """
    of_side = steps[steps.tensor == side]
    wide = of_side.pivot_table(index="step", columns="layer", values="bits", sort=False).sort_index()
    budget = of_side.groupby("step").budget.first()
    thinned = wide.index[:: max(1, ceil(len(wide) / MAX_STEPS))].union(wide.index[-1:])
    wide, budget = wide.loc[thinned], budget.loc[thinned]
    names = list(wide.columns)
    length = max(1, ceil(len(names) / MAX_ROWS))
    runs = [names[start : start + length] for start in range(0, len(names), length)]
    figure = go.Figure(layout=layout(height=360))
    for index, run in enumerate(runs):
        share = index / max(1, len(runs) - 1)
        figure.add_scatter(
            x=thinned.tolist(),
            y=wide[run].mean(axis=1).round(3).tolist(),
            customdata=budget.round(4).tolist(),
            name=shortened(run),
            mode="lines",
            line={"width": 1.8, "color": between(STYLE["first_layer"], STYLE["last_layer"], share)},
            hovertemplate=f"{escape(run[0])}: %{{y:.2f}} bits<br>step %{{x}}, budget %{{customdata:.3f}}"
            "<extra></extra>",
            showlegend=index in (0, len(runs) - 1),
        )
    means = "" if length == 1 else f"<br>{len(names)} layers in runs of {length}, mean bits"
    figure.update_xaxes(title=f"step of the descent{means}", rangemode="tozero")
    figure.update_yaxes(title=f"learned {'weight' if side == 'weight' else 'input'} bits", rangemode="tozero")
    return figure


def _unit(elapsed_s: pd.Series[float]) -> tuple[str, int]:
    """The unit in which a time reads well, and its seconds."""
    last_s = elapsed_s.max() if len(elapsed_s) else 0.0
    return next(((unit, s) for unit, s in (("h", 3600), ("min", 60)) if last_s >= 2 * s), ("s", 1))
