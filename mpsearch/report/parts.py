"""What pages are made of: one HTML file that needs no network, from the template `dashboards/report.html`."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from mpsearch.files import write_text
from mpsearch.shipped import shipped_folder

if TYPE_CHECKING:
    import plotly.graph_objects as go


class Html(str):
    """Text that is HTML already: whatever else `html` puts into a page is escaped."""

    __slots__ = ()


def html(template: str, *values: object) -> Html:
    """HTML with values in the places of its `{}`, escaped unless they are HTML.

    >>> html("<p>{}{}</p>", "a < b", Html("<br>"))
    '<p>a &lt; b<br></p>'
    """
    return Html(template.format(*(v if isinstance(v, Html) else escape(str(v)) for v in values)))


def joined(pieces: Iterable[Html], between: str = "") -> Html:
    """Pieces of HTML one after the other."""
    return Html(between.join(pieces))


_PACKAGES = ("mpsearch", "torch", "torchvision", "numpy", "optuna", "ray", "plotly")


def write_page(
    path: str | Path,
    title: str,
    summary: Sequence[str],
    sections: Sequence[Html],
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


def paragraphs(lines: Iterable[str]) -> Html:
    """A paragraph for each line."""
    return joined(html("<p>{}</p>", line) for line in lines)


def note(text: str) -> Html:
    """A paragraph in small print."""
    return html("<p class='note'>{}</p>", text)


def figure(drawn: go.Figure, name: str, caption: str) -> Html:
    """A figure with what it shows in words; `name` is unique in the page."""
    # Only these buttons: plotly's own choice has one that shares the data by network.
    config = {"displaylogo": False, "responsive": True, "modeBarButtons": [["toImage", "resetScale2d"]]}
    body = drawn.to_html(full_html=False, include_plotlyjs=False, div_id=f"figure-{name}", config=config)
    return html("<figure>{}<figcaption>{}</figcaption></figure>", Html(body), caption)  # plotly escapes its data


def section(title: str, body: Html, name: str | None = None) -> Html:
    """A heading, and HTML below it; `name` is what the section can be addressed by."""
    opening = html('<section id="{}">', name) if name else Html("<section>")
    return html("{}\n<h2>{}</h2>\n{}\n</section>", opening, title, body)


def data(name: str, document: Mapping[str, Any]) -> Html:
    """Data for the page's script."""
    text = json.dumps(document, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return html('<script type="application/json" id="{}">{}</script>', name, Html(text))


def chip(quantizer: str, text: str) -> Html:
    """A text with the colour of a quantizer type beside it."""
    return html("<span class='chip {}'></span>{}", quantizer, text)


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    texts: Collection[int],
    marked: int | None = None,
    name: str | None = None,
) -> Html:
    """Columns of numbers are aligned to the right, those in `texts` to the left; row `marked` stands out.

    `name` is what the table can be addressed by.
    """

    def line(tag: str, cells: Sequence[str]) -> Html:
        return joined(
            html(f'<{tag} class="text">{{}}</{tag}>' if index in texts else f"<{tag}>{{}}</{tag}>", cell)
            for index, cell in enumerate(cells)
        )

    body = joined(
        (
            html('<tr class="knee">{}</tr>' if index == marked else "<tr>{}</tr>", line("td", row))
            for index, row in enumerate(rows)
        ),
        between="\n",
    )
    opening = html('<table id="{}">', name) if name else Html("<table>")
    head = html("<thead><tr>{}</tr></thead>", line("th", columns))
    return html('<div class="wide">{}{}<tbody>\n{}\n</tbody></table></div>', opening, head, body)


def _quantizer_colours() -> str:
    """The colours of `chip`."""
    from mpsearch.report.style import STYLE

    return "".join(f".chip.{name} {{ background: {style['color']}; }}\n" for name, style in STYLE["quantizers"].items())


def _shipped(name: str) -> str:
    return (shipped_folder("dashboards") / name).read_text(encoding="utf-8")


def _pre(lines: Iterable[str]) -> Html:
    return html("<pre>{}</pre>", "\n".join(lines))


def _environment() -> dict[str, str]:
    """Where the report was written."""
    versions = {"python": platform.python_version(), "system": f"{platform.platform()}, {os.cpu_count()} CPUs"}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions
