"""Pictures of one trial as SVG: small files that any viewer shows, drawn without a browser.

They are drawn from the plotly figures, so that there is one definition of each: `svg` knows bars with a width and
lines, with a linear axis each, and no more than that.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any

import plotly.graph_objects as go

WIDTH, HEIGHT = 900, 400
_LEFT, _RIGHT, _TOP = 74, 16, 40
_BELOW = {True: 136, False: 52}  # room for names below the lines: turned or not


def svg(figure: go.Figure, title: str) -> str:
    """A figure of bars and lines on white paper.

    Args:
        figure: whose axes give their `range`, `tickvals` and `ticktext`.
        title: written above it.
    """
    axes = figure.layout.xaxis, figure.layout.yaxis
    turned = any(len(text) > 6 for text in axes[0].ticktext)
    bottom = HEIGHT - _BELOW[turned]
    x = _scale(axes[0].range, _LEFT, WIDTH - _RIGHT)
    y = _scale(axes[1].range, bottom, _TOP)
    drawn: list[str] = []
    for at, text in zip(axes[1].tickvals, axes[1].ticktext, strict=True):
        drawn.append(f'<path d="M{_LEFT} {y(at):.1f}H{WIDTH - _RIGHT}" stroke="#ddd"/>')
        drawn.append(f'<text x="{_LEFT - 8}" y="{y(at) + 4:.1f}" text-anchor="end">{text}</text>')
    for trace in figure.data:
        drawn += _bars(trace, x, y) if trace.type == "bar" else _line(trace, x, y)
    for at, text in zip(axes[0].tickvals, axes[0].ticktext, strict=True):
        place = f'transform="translate({x(at) + 4:.1f} {bottom + 8}) rotate(-90)" text-anchor="end"'
        straight = f'x="{x(at):.1f}" y="{bottom + 18}" text-anchor="middle"'
        drawn.append(f"<text {place if turned else straight}>{text}</text>")
    middle = (_TOP + bottom) / 2
    drawn.append(f'<text transform="translate(16 {middle}) rotate(-90)" text-anchor="middle">{_title(axes[1])}</text>')
    drawn.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 8}" text-anchor="middle">{_title(axes[0])}</text>')
    drawn += _legend((trace.name, trace.marker.color) for trace in figure.data if trace.x[0] is None)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="#222"><title>{escape(title)}</title>'
        f'<rect width="100%" height="100%" fill="#fff"/><text x="{_LEFT}" y="22" font-size="15">{escape(title)}</text>'
        + "".join(drawn)
        + "</svg>"
    )


def _scale(ends: Any, low: float, high: float) -> Any:
    start, stop = ends
    return lambda value: low + (value - start) / (stop - start) * (high - low)


def _bars(trace: Any, x: Any, y: Any) -> list[str]:
    drawn = []
    for at, width, height, colour, text in zip(
        trace.x, trace.width, trace.y, trace.marker.color, trace.text, strict=True
    ):
        left, right, top, bottom = x(at - width / 2), x(at + width / 2), y(max(height, 0)), y(min(height, 0))
        size = f'width="{right - left:.1f}" height="{bottom - top:.1f}"'
        drawn.append(f'<rect x="{left:.1f}" y="{top:.1f}" {size} fill="{colour}"/>')
        if right - left > 7 * len(text) and bottom - top > 12:
            end = top + 12 if height > 0 else bottom - 4
            drawn.append(f'<text x="{x(at):.1f}" y="{end:.1f}" text-anchor="middle" font-size="11">{text}</text>')
    return drawn


def _line(trace: Any, x: Any, y: Any) -> list[str]:
    points = [(x(a), y(b)) for a, b in zip(trace.x, trace.y, strict=True) if a is not None]
    if not points:
        return []
    path = "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
    dots = "".join(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="4" fill="{trace.line.color}"/>' for a, b in points)
    return [f'<path d="M{path}" fill="none" stroke="{trace.line.color}" stroke-width="2"/>', dots]


def _legend(entries: Iterable[tuple[str, str]]) -> list[str]:
    drawn, at = [], WIDTH - _RIGHT
    for name, colour in reversed(list(entries)):
        at -= 7 * len(name) + 24
        drawn.append(f'<rect x="{at}" y="12" width="11" height="11" fill="{colour}"/>')
        drawn.append(f'<text x="{at + 16}" y="22">{escape(name)}</text>')
    return drawn


def _title(axis: Any) -> str:
    return escape(str(axis.title.text or "").replace("<br>", "; "))
