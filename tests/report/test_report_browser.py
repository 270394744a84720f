"""The report as a reader sees it: opened from the disk in Chromium, with the network cut."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd
import pytest
from browser import chromium, page_of
from pictured import FINALS, LAYERS, RECORDS, run_data

from mpsearch.report.page import write_report

RANGES = pd.DataFrame(
    [
        (name, tensor, 72, "4", "uniform", -1.0, 0.9, -1.2, 1.1)
        for name in LAYERS
        for tensor in ("weight", "activation")
    ],
    columns=["layer", "tensor", "weights", "precision", "quantizer", "low", "high", "seen_low", "seen_high"],
)
HISTOGRAMS = pd.DataFrame(
    [(name, "4", low / 10, low / 10 + 0.1, 5, 7) for name in LAYERS for low in range(-3, 3)],
    columns=["layer", "precision", "low", "high", "before", "after"],
)
DESCENT = pd.DataFrame(
    [
        (step, 1 - step / 100, 0.5, name, tensor, 8 - step / 10)
        for step in range(0, 50, 10)
        for name in LAYERS
        for tensor in ("weight", "activation")
    ],
    columns=["step", "budget", "loss", "layer", "tensor", "bits"],
)

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    run = run_data(finals=FINALS, descent=DESCENT, ranges=RANGES, histograms=HISTOGRAMS)
    path = tmp_path_factory.mktemp("report") / "report.html"
    rows = [{"trial": "2", "test": "82.00 ± 2.83"}]
    return write_report(path, run, summary=["Find the bits."], finalized=rows, commands=["mpsearch run"]).as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def wide(browser: Any, address: str) -> Iterator[tuple[Any, list[str]]]:
    """The report on a light desktop screen, offline."""
    with page_of(browser, offline=True, color_scheme="light") as (page, errors):
        page.goto(address)
        page.wait_for_selector("#figure-weights-2 .bars")
        yield page, errors


def counted(page: Any, figure: str, selector: str) -> int:
    return int(page.locator(f"#figure-{figure} {selector}").count())


def test_every_figure_is_drawn_without_an_error(wide: tuple[Any, list[str]]) -> None:
    page, errors = wide
    figures = page.eval_on_selector_all(".plotly-graph-div", "all => all.map(one => one.id)")
    assert len(figures) == 13 + len(LAYERS)
    for figure in figures:
        assert counted(page, figure.removeprefix("figure-"), ".main-svg") > 0, figure
    assert errors == []


def test_front_has_a_point_for_each_complete_trial(wide: tuple[Any, list[str]]) -> None:
    page, _ = wide
    complete = sum(record.state == "complete" for record in RECORDS)
    assert counted(page, "front", ".scatterlayer .point") == complete + 3 + 2  # finalized; knee, picked
    assert counted(page, "front", ".errorbar") == 3


def test_layers_are_those_of_the_network_wherever_they_are_drawn(wide: tuple[Any, list[str]]) -> None:
    page, _ = wide
    assert counted(page, "network", ".bars .point") == 2 * len(LAYERS)
    assert page.locator("#layers tbody tr td:first-child").all_inner_texts() == LAYERS
    assert page.locator("#figure-weight-bits .yaxislayer-above text").all_text_contents() == LAYERS
    assert counted(page, "descent-weight", ".lines") == len(LAYERS)
    assert counted(page, "cost", ".bars .point") == 2 * len(LAYERS)


def test_a_click_on_a_point_shows_its_layers(wide: tuple[Any, list[str]]) -> None:
    page, _ = wide
    assert page.locator("#layers-title").inner_text().startswith("trial 2 ")
    assert page.locator("#layers tbody tr").first.locator("td").nth(4).inner_text() == "uniform:4/channel"
    place = page.evaluate(
        """() => {
          const figure = document.getElementById("figure-front");
          figure.scrollIntoView();
          const trace = figure.calcdata.findIndex((points) => points[0].trace.name === "manual");
          const drawn = figure.querySelectorAll(".scatterlayer .trace")[trace].querySelector(".point");
          const box = drawn.getBoundingClientRect();
          return [box.x + box.width / 2, box.y + box.height / 2];
        }"""
    )
    page.mouse.move(*place)
    page.wait_for_selector("#figure-front .hoverlayer .hovertext")
    hover = page.locator("#figure-front .hoverlayer").text_content()
    assert "trial 3" in hover
    assert "stem.conv … head (3): 2 × 8" in hover
    page.mouse.click(*place)
    page.wait_for_function("document.getElementById('layers-title').textContent.startsWith('trial 3 ')")
    row = page.locator("#layers tbody tr").first.locator("td").all_inner_texts()
    assert row == ["stem.conv", "conv2d", "4×2×3×3", "600", "uniform:2/channel", "uniform:8/tensor", "15.00", "60.00"]
    assert page.url.endswith("#trial-3")
    heights = page.evaluate("document.getElementById('figure-network').data[0].y")
    assert heights == [2, 2, 2]
    assert "trial 3: 25.0 %" in page.locator("#figure-cost .legend").text_content()


def test_a_trial_can_be_picked_from_the_list(wide: tuple[Any, list[str]]) -> None:
    page, errors = wide
    page.select_option("#pick", "0")
    assert page.locator("#layers-title").inner_text() == "trial 0 (uniform), 90.00 % at relative cost 1"
    assert page.locator("#layers tbody tr").last.locator("td").nth(6).inner_text() == "10.00"
    assert errors == []


@pytest.mark.slow
def test_a_phone_in_the_dark_reads_all_of_it(browser: Any, address: str) -> None:
    settings = {"viewport": {"width": 400, "height": 800}, "color_scheme": "dark", "has_touch": True, "is_mobile": True}
    with page_of(browser, offline=True, **settings) as (page, errors):
        page.goto(f"{address}#trial-1")
        page.wait_for_selector("#figure-weights-2 .bars")
        assert page.evaluate("document.documentElement.scrollWidth") == 400  # nothing makes the page wider
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 27)"
        ink = page.evaluate("getComputedStyle(document.querySelector('#figure-front .xtick text')).fill")
        assert ink == "rgb(232, 230, 227)"
        assert page.locator("#layers-title").inner_text().startswith("trial 1 ")  # from the address
        assert errors == []
