"""Figures: functions from a table of `report.tables` to a plotly Figure, for report, dashboard and notebooks.

    from mpsearch.report import figures, read_run
    run = read_run("runs/digits")
    figures.front(run.trials, run.finals).show()

Whatever is too much to be seen is aggregated or left out, and the figure says so.
"""

from mpsearch.report.figures.layers import bits_heatmap, cost_by_layer, network
from mpsearch.report.figures.points import front, proxy
from mpsearch.report.figures.progress import added_by_origin, best_so_far, descent, hypervolume, prescreen, training
from mpsearch.report.figures.values import before_after, ranges, sweep

__all__ = [
    "added_by_origin",
    "before_after",
    "best_so_far",
    "bits_heatmap",
    "cost_by_layer",
    "descent",
    "front",
    "hypervolume",
    "network",
    "prescreen",
    "proxy",
    "ranges",
    "sweep",
    "training",
]
