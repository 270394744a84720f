"""A run in the terminal: progress with a small sketch of the front below it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import log2
from typing import Any

from rich.console import RenderableType
from rich.progress import Progress
from rich.text import Text

from mpsearch.metric import Metric
from mpsearch.record import TrialRecord
from mpsearch.search.front import objectives, pareto_front

WIDTH, HEIGHT = 56, 9


class FrontProgress(Progress):
    """rich's progress with `sketch` below its bars."""

    def __init__(self, *columns: Any, **settings: Any) -> None:
        self.sketch: Text | None = None
        super().__init__(*columns, **settings)

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bars, and the sketch once there is one."""
        yield self.make_tasks_table(self.tasks)
        if self.sketch is not None:
            yield self.sketch


def sketch(records: Sequence[TrialRecord], metric: Metric, width: int = WIDTH, height: int = HEIGHT) -> Text | None:
    """Score (better upwards) over log cost (to the right) in characters; None before two trials can be compared.

    `●` is on the front, `■` of the uniform ladder (`□`: dominated), `·` any other trial.
    """
    front = pareto_front(records, metric)
    points = [(objectives(r), _mark(r, front.trials)) for r in records if r.state == "complete"]
    costs, qualities = [log2(cost) for (_, cost), _ in points], [metric.quality(score) for (score, _), _ in points]
    if len(set(costs)) < 2 or len(set(qualities)) < 2:
        return None
    cells = [[" "] * width for _ in range(height)]
    for (score, cost), mark in sorted(points, key=lambda point: "·□■●".index(point[1])):  # the front lies on top
        column = round((log2(cost) - min(costs)) / (max(costs) - min(costs)) * (width - 1))
        row = round((max(qualities) - metric.quality(score)) / (max(qualities) - min(qualities)) * (height - 1))
        cells[row][column] = mark
    scores = sorted((score for (score, _), _ in points), key=metric.quality)
    labels = {row: "".join(filter(str.isprintable, metric.show(scores[i]))) for row, i in ((0, -1), (height - 1, 0))}
    left = max(8, *map(len, labels.values()))
    lines = [f"{labels.get(index, ''):>{left}} │{''.join(row)}" for index, row in enumerate(cells)]
    low, high = f"{2 ** min(costs):.3g}", f"{2 ** max(costs):.3g}"
    lines.append(f"{'':>{left}} └{'─' * width}")
    lines.append(f"{'':>{left + 2}}{low}{'cost, log scale':^{width - len(low) - len(high)}}{high}")
    text = Text("\n".join(lines) + "\n", style="dim", no_wrap=True)
    text.highlight_regex("●", "bold green")
    text.highlight_regex("■", "bold yellow")
    text.highlight_regex("□", "yellow")
    return text


def _mark(record: TrialRecord, front: Sequence[TrialRecord]) -> str:
    on_front = any(record is trial for trial in front)
    if record.origin == "uniform":
        return "■" if on_front else "□"
    return "●" if on_front else "·"
