"""Colours, markers and the layout that all figures share: what `dashboards/style.json` says.

The colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), which stay apart for every kind of colour
vision, the blue a little lighter so that it is seen on dark paper too; whatever is told apart by colour is told apart
by a marker, a line or a letter as well. Bits go from light to dark (cividis reversed, without its ends). Backgrounds
are transparent, so that the page around a figure decides between light and dark.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

from mpsearch.shipped import shipped_folder

STYLE: Mapping[str, Any] = json.loads((shipped_folder("dashboards") / "style.json").read_text(encoding="utf-8"))


def layout(height: int) -> dict[str, Any]:
    """The layout of a figure of this height, in pixels."""
    return {"height": height, "template": {}, **STYLE["layout"]}


def origin_style(origin: str) -> Mapping[str, str]:
    """label, color and symbol of whoever proposed a config."""
    known = cast(Mapping[str, Mapping[str, str]], STYLE["origins"])
    return known.get(origin, {**known["other"], "label": origin})


def between(first: str, last: str, share: float) -> str:
    """A colour on the straight line from one `#rrggbb` to another.

    >>> between("#000000", "#ff8000", 0.5)
    '#804000'
    """
    pairs = [(int(first[i : i + 2], 16), int(last[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(low + share * (high - low)):02x}" for low, high in pairs)


def stepped(colours: list[str]) -> list[tuple[float, str]]:
    """A colour scale without gradients: every colour holds an equal part of the range."""
    count = len(colours)
    return [(edge / count, colour) for index, colour in enumerate(colours) for edge in (index, index + 1)]
