"""Figures of trials as points: score against cost, and what the short fine-tune tells of the long one."""

from __future__ import annotations

from html import escape
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from mpsearch.metric import Metric
from mpsearch.pareto import non_dominated
from mpsearch.report.style import STYLE, layout, origin_style

MAX_POINTS = 500  # dominated trials in a figure; more are thinned out evenly over cost


def front(
    trials: pd.DataFrame, metric: Metric, finals: pd.DataFrame | None = None, most: int = MAX_POINTS
) -> go.Figure:
    """Score over cost (log scale): the front, the trials by origin, and the finalized ones on the test split.

    Points of the front are large, those of dominated trials small; of the latter at most `most` are drawn, evenly
    spread over cost, and the figure says so. The first value of a point's customdata is the number of its trial.

    Args:
        trials: as from `trials_table`; a column `config` is shown when a point is hovered over.
        metric: what scores are.
        finals: as from `finals_table`.
        most: dominated trials to draw, the uniform ladder aside.
    """
    scored = trials[trials.score.notna() & trials.relative_cost.notna()]
    scored = scored.assign(shown=metric.factor * scored.score)
    complete, stopped = scored[scored.state == "complete"], scored[scored.state == "stopped"]
    shown = _thinned(complete, most)
    best = complete[complete.on_front].sort_values("relative_cost")
    figure = go.Figure(layout=layout(height=480))
    figure.add_scatter(
        x=best.relative_cost.tolist(),
        y=best.shown.tolist(),
        name="front",
        mode="lines",
        line={"shape": "hv", "color": STYLE["grey"], "width": 2},
        hoverinfo="skip",
    )
    _add_trials(figure, stopped, metric, "stopped early", {"color": STYLE["grey"], "symbol": "x-thin-open"})
    drawn = ("sampler", "import", "manual", "prescreen", "descent", "ilp", "uniform")
    order = {origin: index for index, origin in enumerate(drawn)}
    for origin in sorted(set(complete.origin), key=lambda name: (order.get(name, -1), name)):
        of_origin = shown[shown.origin == origin].sort_values("relative_cost")
        style = origin_style(origin)
        if origin == "uniform":  # the baseline to beat: what no uniform config beats
            unbeaten = non_dominated(of_origin[["score", "relative_cost"]], (metric.maximize, False))
            baselines = of_origin.iloc[unbeaten]
            figure.add_scatter(
                x=baselines.relative_cost.tolist(),
                y=baselines.shown.tolist(),
                name="best uniform",
                mode="lines",
                line={"shape": "hv", "color": style["color"], "width": 1.5, "dash": "dot"},
                hoverinfo="skip",
            )
        _add_trials(figure, of_origin, metric, style["label"], style)
    if finals is not None and len(finals):
        _add_finals(figure, finals, metric)
    knee = complete[complete.knee]
    figure.add_scatter(
        x=knee.relative_cost.tolist(),
        y=knee.shown.tolist(),
        name="knee",
        mode="markers",
        marker={"symbol": "circle-open", "size": 20, "color": STYLE["grey"], "line": {"width": 2.5}},
        hoverinfo="skip",
    )
    left_out = "" if len(shown) == len(complete) else f"<br>{len(shown):,} of {len(complete):,} trials are drawn"
    narrow = len(scored) > 0 and scored.relative_cost.max() < 20 * scored.relative_cost.min()
    digits = (1, 1.5, 2, 3, 4, 5, 7) if narrow else (1, 2, 5)
    ticks = [digit * 10.0**power for power in range(-4, 3) for digit in digits]
    figure.update_xaxes(
        type="log",
        title=f"relative cost, log scale (reference = 1){left_out}",
        tickvals=ticks,
        ticktext=[f"{tick:g}" for tick in ticks],
    )
    figure.update_yaxes(title=metric.label)
    return figure


def proxy(finals: pd.DataFrame, metric: Metric) -> go.Figure:
    """The test score after the final training over that on val after the trial, with Kendall's tau.

    Args:
        finals: as from `finals_table`.
        metric: what scores are.
    """
    finals = _as_shown(finals, metric)
    figure = go.Figure(layout=layout(height=400))
    ends = [float(finals[["proxy", "test"]].min().min()), float(finals[["proxy", "test"]].max().max())]
    line: dict[str, Any] = {"color": STYLE["grey"], "dash": "dot", "width": 1.5}
    figure.add_scatter(x=ends, y=ends, name="equal", mode="lines", line=line, hoverinfo="skip")
    for origin, rows in finals.groupby("origin"):
        style = origin_style(str(origin))
        figure.add_scatter(
            x=rows.proxy.tolist(),
            y=rows.test.tolist(),
            error_y={"array": rows.test_std.fillna(0).tolist(), "thickness": 1.5, "width": 3},
            customdata=rows[["number", "relative_cost"]].to_numpy().tolist(),
            name=escape(style["label"]),
            mode="markers",
            marker={"color": style["color"], "symbol": style["symbol"], "size": 10},
            hovertemplate="trial %{customdata[0]}, cost %{customdata[1]:.4g}<br>"
            f"val %{{x:{metric.format}}} {metric.unit}, test %{{y:{metric.format}}} {metric.unit}<extra></extra>",
        )
    from scipy.stats import kendalltau  # here, because most runs that are looked at have no finals

    tau = kendalltau(finals.proxy, finals.test).statistic if len(finals) > 2 else float("nan")
    said = f"<br>Kendall's tau {tau:.2f} over {len(finals)} configs" if tau == tau else ""
    figure.update_xaxes(title=f"proxy: {metric.label} on val after the trial{said}")
    figure.update_yaxes(title=f"{metric.label} on test after final training")
    return figure


def _add_trials(figure: go.Figure, trials: pd.DataFrame, metric: Metric, name: str, style: Any) -> None:
    if trials.empty:
        return
    texts = trials.config if "config" in trials else pd.Series("", index=trials.index)
    rows = zip(trials.number, trials.weight_bits, trials.activation_bits, texts, trials.origin, strict=True)
    figure.add_scatter(
        x=trials.relative_cost.tolist(),
        y=trials.shown.tolist(),
        customdata=[[int(number), round(w, 2), round(a, 2), text, origin] for number, w, a, text, origin in rows],
        name=escape(name),
        mode="markers",
        marker={
            "color": style["color"],
            "symbol": style["symbol"],
            "size": [11 if on_front else 6 for on_front in trials.on_front],
            "opacity": [1.0 if on_front else 0.75 for on_front in trials.on_front],
            "line": {"width": 1 if str(style["symbol"]).endswith("open") else 0},
        },
        hovertemplate=(
            f"<b>trial %{{customdata[0]}}</b> (%{{customdata[4]}}): %{{y:{metric.format}}} {metric.unit}, cost "
            "%{x:.4g}<br>mean bits: weights %{customdata[1]:.1f}, inputs %{customdata[2]:.1f}<br>%{customdata[3]}"
            "<extra></extra>"
        ),
    )


def _add_finals(figure: go.Figure, finals: pd.DataFrame, metric: Metric) -> None:
    finals = _as_shown(finals, metric)
    for baseline in (False, True):
        rows = finals[(finals.origin == "uniform") == baseline]
        if rows.empty:
            continue
        figure.add_scatter(
            x=rows.relative_cost.tolist(),
            y=rows.test.tolist(),
            error_y={"array": rows.test_std.fillna(0).tolist(), "thickness": 1.5, "width": 4},
            customdata=rows[["number", "seeds", "test_std", "val"]].to_numpy().tolist(),
            name="test, uniform" if baseline else "test, finalized",
            mode="markers",
            marker={
                "symbol": "square-open" if baseline else "circle-open",
                "size": 11,
                "color": STYLE["vermilion"] if baseline else STYLE["blue"],
                "line": {"width": 2},
            },
            hovertemplate=(
                f"<b>trial %{{customdata[0]}}</b>, trained longer<br>test %{{y:{metric.format}}} ± "
                f"%{{customdata[2]:{metric.format}}} {metric.unit} over %{{customdata[1]}} seeds<br>val "
                f"%{{customdata[3]:{metric.format}}} {metric.unit}, cost %{{x:.4g}}<extra></extra>"
            ),
        )


def _as_shown(finals: pd.DataFrame, metric: Metric) -> pd.DataFrame:
    """The table with its scores as they are shown: percent of shares."""
    scores = ["proxy", "val", "val_std", "test", "test_std"]
    return finals.assign(**{name: metric.factor * finals[name] for name in scores})


def _thinned(complete: pd.DataFrame, most: int) -> pd.DataFrame:
    """All of the front and of the uniform ladder, and `most` of the others, evenly spread over cost."""
    ordinary = complete[~complete.on_front & (complete.origin != "uniform")].sort_values("relative_cost")
    if len(ordinary) <= most:
        return complete
    shown = {round(index * (len(ordinary) - 1) / max(1, most - 1)) for index in range(most)}
    return complete.drop(ordinary.index[[index for index in range(len(ordinary)) if index not in shown]])
