"""Which figures are shown where, and how each is made of a run: the order and the words are `dashboards/layout.yaml`'s.

A figure joins by one entry in `FIGURES` and one in the layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Annotated, Literal

import plotly.graph_objects as go
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from mpsearch.documents import parse_yaml
from mpsearch.report import figures
from mpsearch.report.data import RunData
from mpsearch.shipped import shipped_folder

Page = Literal["report", "dashboard"]

FIGURES: Mapping[str, Callable[[RunData], go.Figure | None]] = {
    "front": lambda run: figures.front(run.trials, run.metric, run.finals) if run.front.trials else None,
    "network": lambda run: figures.network(run.config) if len(run.config) else None,
    "cost": lambda run: figures.cost_by_layer(run.config, knee_name(run), run.reference) if len(run.config) else None,
    "weight-bits": lambda run: figures.bits_heatmap(run.bits, "weight") if len(run.bits) else None,
    "input-bits": lambda run: figures.bits_heatmap(run.bits, "activation") if len(run.bits) else None,
    "proxy": lambda run: figures.proxy(run.finals, run.metric) if len(run.finals) else None,
    "hypervolume": lambda run: figures.hypervolume(run.progress) if len(run.progress) else None,
    "origins": lambda run: figures.added_by_origin(run.progress) if run.progress.origin.nunique() > 1 else None,
    "best": lambda run: figures.best_so_far(run.best, run.metric) if len(run.best) else None,
    "prescreen": lambda run: figures.prescreen(run.prescreen) if len(run.prescreen) else None,
    "descent-weight": lambda run: figures.descent(run.descent, "weight") if len(run.descent) else None,
    "descent-input": lambda run: figures.descent(run.descent, "activation") if len(run.descent) else None,
    "weight-ranges": lambda run: figures.ranges(run.ranges, "weight") if _has(run, "weight") else None,
    "input-ranges": lambda run: figures.ranges(run.ranges, "activation") if _has(run, "activation") else None,
}
"""Name -> the figure; None where the run has nothing to show."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ShownFigure(_Section):
    """A figure with what it shows in words."""

    figure: str
    title: str = ""  # on the dashboard, which has no headings
    caption: str
    pages: tuple[Page, ...] = ("report", "dashboard")


class ShownPart(_Section):
    """A piece of the report that is no figure."""

    part: str


class Section(_Section):
    """A heading and what is below it."""

    title: str
    id: str | None = None
    about: str = ""
    columns: Annotated[int, Field(ge=1, le=2)] = 1
    show: tuple[ShownFigure | ShownPart, ...]


@cache
def sections() -> tuple[Section, ...]:
    """The shipped layout."""
    text = (shipped_folder("dashboards") / "layout.yaml").read_text(encoding="utf-8")
    return TypeAdapter(tuple[Section, ...]).validate_python(parse_yaml(text))


def shown(run: RunData, page: Page) -> Iterator[tuple[ShownFigure, go.Figure]]:
    """The figures of a page for which the run has data, in order."""
    for section in sections():
        for item in section.show:
            if (
                isinstance(item, ShownFigure)
                and page in item.pages
                and (drawn := FIGURES[item.figure](run)) is not None
            ):
                yield item, drawn


def knee_name(run: RunData) -> str:
    """What the picked config is called in words."""
    return f"trial {run.front.knee.number}"


def words(text: str, run: RunData) -> str:
    """A text of the layout with the run's own names in it."""
    return text.format(
        reference=run.reference,
        knee=run.front.knee.number if run.front.trials else "",
        metric=run.metric.name,
        scores=run.scores.said(run.metric),
    )


def _has(run: RunData, tensor: str) -> bool:
    return len(run.ranges) > 0 and bool((run.ranges.tensor == tensor).any())
