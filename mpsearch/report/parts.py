"""What pages are made of: one HTML file that needs no network, from the template `dashboards/report.html`."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from mpsearch.files import write_text
from mpsearch.shipped import shipped_folder

if TYPE_CHECKING:
    import plotly.graph_objects as go

_PACKAGES = ("mpsearch", "torch", "torchvision", "numpy", "optuna", "ray", "plotly")


def write_page(
    path: str | Path,
    title: str,
    summary: Sequence[str],
    sections: Sequence[str],
    commands: Sequence[str] = (),
    script: str | None = None,
    refresh_s: int | None = None,
) -> Path:
    """Write a page.

    Args:
        path: the HTML file; replaced whole if it exists.
        title: of the page.
        summary: a paragraph each, below the title.
        sections: as from `section`; the environment follows them.
        commands: how to reproduce it, a line each; the last section.
        script: a file of `dashboards/` that the page runs at its end.
        refresh_s: the page loads itself again after so many seconds; None: never.

    Raises:
        RunError: the file cannot be written.
    """
    from plotly.offline import get_plotlyjs

    environment = section("Environment", _pre(f"{key}: {value}" for key, value in _environment().items()))
    last = [environment, section("Reproduce", _pre(commands))] if commands else [environment]
    text = Template(_shipped("report.html")).substitute(
        title=escape(title),
        style=_shipped("report.css") + _quantizer_colours(),
        refresh=f'<meta http-equiv="refresh" content="{refresh_s}">' if refresh_s else "",
        summary=paragraphs(summary),
        sections="\n".join([*sections, *last]),
        plotlyjs=get_plotlyjs(),
        script="\n".join(_shipped(name) for name in ("page.js", script) if name),
    )
    return write_text(path, text)


def paragraphs(lines: Iterable[str]) -> str:
    """A paragraph for each line."""
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def note(text: str) -> str:
    """A paragraph in small print."""
    return f"<p class='note'>{escape(text)}</p>"


def figure(drawn: go.Figure, name: str, caption: str) -> str:
    """A figure with what it shows in words; `name` is unique in the page."""
    # Only these buttons: plotly's own choice has one that shares the data by network.
    config = {"displaylogo": False, "responsive": True, "modeBarButtons": [["toImage", "resetScale2d"]]}
    body = drawn.to_html(full_html=False, include_plotlyjs=False, div_id=f"figure-{name}", config=config)
    return f"<figure>{body}<figcaption>{escape(caption)}</figcaption></figure>"


def section(title: str, body: str, name: str | None = None) -> str:
    """A heading, and HTML below it; `name` is what the section can be addressed by."""
    opening = f'<section id="{name}">' if name else "<section>"
    return f"{opening}\n<h2>{escape(title)}</h2>\n{body}\n</section>"


def data(name: str, document: Mapping[str, Any]) -> str:
    """Data for the page's script."""
    text = json.dumps(document, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'


def chip(quantizer: str, text: str) -> str:
    """A text with the colour of a quantizer type beside it, HTML."""
    return f"<span class='chip {quantizer}'></span>{escape(text)}"


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    texts: Collection[int],
    marked: int | None = None,
    name: str | None = None,
    escaped: bool = False,
) -> str:
    """Columns of numbers are aligned to the right, those in `texts` to the left; row `marked` stands out.

    `escaped`: the cells of `rows` are HTML already. `name` is what the table can be addressed by.
    """
    written: Callable[[str], str] = str if escaped else escape

    def line(tag: str, cells: Sequence[str], shown: Callable[[str], str]) -> str:
        return "".join(
            f'<{tag} class="text">{shown(cell)}</{tag}>' if index in texts else f"<{tag}>{shown(cell)}</{tag}>"
            for index, cell in enumerate(cells)
        )

    body = "\n".join(
        f'<tr class="knee">{line("td", row, written)}</tr>'
        if index == marked
        else f"<tr>{line('td', row, written)}</tr>"
        for index, row in enumerate(rows)
    )
    head = f"<thead><tr>{line('th', columns, escape)}</tr></thead>"
    opening = f'<table id="{name}">' if name else "<table>"
    return f'<div class="wide">{opening}{head}<tbody>\n{body}\n</tbody></table></div>'


def _quantizer_colours() -> str:
    """The colours of `chip`."""
    from mpsearch.report.style import STYLE

    return "".join(f".chip.{name} {{ background: {style['color']}; }}\n" for name, style in STYLE["quantizers"].items())


def _shipped(name: str) -> str:
    return (shipped_folder("dashboards") / name).read_text(encoding="utf-8")


def _pre(lines: Iterable[str]) -> str:
    return f"<pre>{escape(chr(10).join(lines))}</pre>"


def _environment() -> dict[str, str]:
    """Where the report was written."""
    versions = {"python": platform.python_version(), "system": f"{platform.platform()}, {os.cpu_count()} CPUs"}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions
