"""The report file: complete, offline, escaped, and replaced whole."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from plotly.offline import get_plotlyjs

from mpsearch.errors import RunError
from mpsearch.precision import LayerPrecision, PrecisionConfig
from mpsearch.record import Origin, TrialRecord
from mpsearch.report.page import write_report

LAYERS = ["stem.conv", "head<1>"]


def trial(number: int, cost: float, accuracy: float, origin: Origin = "sampler") -> TrialRecord:
    config = PrecisionConfig.uniform(LAYERS, LayerPrecision.shorthand("w4a8"))
    return TrialRecord(config, "complete", accuracy, cost, number=number, origin=origin, started_s=float(number))


RECORDS = [
    trial(0, 1.0, 0.9, "uniform"),
    trial(1, 0.25, 0.8125),
    trial(2, 0.125, 0.5),
    TrialRecord(trial(3, 1, 1).config, "failed", reason="CUDA <out> of memory", number=3),
]


def report(path: Path, **changes: Any) -> str:
    """The text of a report without plotly's own code."""
    values: dict[str, Any] = {
        "name": "digits",
        "summary": ["Find the bits."],
        "records": RECORDS,
        "layers": LAYERS,
        "cheapest": 1 / 16,
    }
    text = write_report(path / "report.html", **(values | changes)).read_text(encoding="utf-8")
    assert text.count(get_plotlyjs()) == 1
    return text.replace(get_plotlyjs(), "")


class Cells(HTMLParser):
    """The rows of every table of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self._inside = True

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.rows[-1][-1] += data


def test_report_says_what_was_asked_and_what_came_out(tmp_path: Path) -> None:
    text = report(tmp_path, summary=["Find the bits.", "Cost: pJ."])
    assert "<h1>digits</h1>" in text
    assert "<p>Find the bits.</p><p>Cost: pJ.</p>" in text
    assert "3 complete, 1 failed." in text
    # 0.5 * (3/4 - 1/2) ... the axis from 1/16 to 1: 1/8 at 1/4, 1/4 at 1/2
    assert f"The front has 3 trials and hypervolume {0.5 / 4 + 0.8125 / 2:.4f}." in text
    assert "Best: trial 0, 90.00 % at relative cost 1. Knee: trial 1, 81.25 % at relative cost 0.25." in text
    assert "Uniform control nearest to the knee&#x27;s cost: trial 0" in text


def test_report_has_the_figures_and_the_layers(tmp_path: Path) -> None:
    text = report(tmp_path)
    for name in ("front", "weight-bits", "activation-bits", "hypervolume"):
        assert text.count(f'<div id="figure-{name}"') == 1
    assert "stem.conv" in text


def test_table_of_the_front_is_by_rising_cost_and_marks_the_knee(tmp_path: Path) -> None:
    text = report(tmp_path)
    assert Cells(text).rows == [
        ["number", "origin", "accuracy, %", "relative cost", "mean weight bits", "mean activation bits", ""],
        ["2", "sampler", "50.00", "0.1250", "4.00", "8.00", ""],
        ["1", "sampler", "81.25", "0.2500", "4.00", "8.00", "knee"],
        ["0", "uniform", "90.00", "1.0000", "4.00", "8.00", ""],
    ]
    assert text.count('<tr class="knee">') == 1


def test_finalized_rows_and_commands_are_shown_where_given(tmp_path: Path) -> None:
    rows = [{"pick": "knee", "test_mean": 0.87654}, {"pick": "uniform", "test_mean": 0.86, "note": None}]
    text = report(tmp_path, finalized=rows, commands=["mpsearch run digits", "mpsearch finalize runs/digits"])
    assert Cells(text).rows[-3:] == [
        ["pick", "test mean", "note"],
        ["knee", "0.8765", ""],
        ["uniform", "0.86", ""],
    ]
    assert "<pre>mpsearch run digits\nmpsearch finalize runs/digits</pre>" in text
    assert "Finalized" not in report(tmp_path)


def test_report_names_the_environment(tmp_path: Path) -> None:
    assert re.search(r"python: 3\.\d+.*\nsystem: .*\nmpsearch: \d+\.\d+", report(tmp_path))


def test_report_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    text = report(tmp_path)
    assert not re.search(r"""(src|href|action)\s*=|url\(|@import|https?://""", text)


def test_report_offers_no_button_that_sends_data(tmp_path: Path) -> None:
    assert text_of_buttons(report(tmp_path)) == {'[["toImage", "resetScale2d"]]'}


def text_of_buttons(text: str) -> set[str]:
    return set(re.findall(r'"modeBarButtons": (\[\[.*?\]\])', text))


def test_text_from_outside_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    text = report(
        tmp_path,
        name=f"$title {evil}",
        summary=[evil],
        commands=[evil],
        finalized=[{evil: evil}],
        records=[*RECORDS, TrialRecord(RECORDS[0].config, "failed", reason=evil)],
    )
    assert evil not in text
    assert "$title &lt;script&gt;" in text
    assert "CUDA &lt;out&gt; of memory" in text
    assert "head<1>" not in text
    assert '"head&lt;1&gt;"' in text  # an axis label, where plotly would read tags


def test_report_of_a_study_without_a_complete_trial_has_no_figures(tmp_path: Path) -> None:
    assert "No trial has ended yet." in report(tmp_path, records=[])
    text = report(tmp_path, records=RECORDS[3:])
    assert "1 failed." in text
    assert "Failed 1×: CUDA &lt;out&gt; of memory" in text
    assert 'plotly-graph-div"' not in text


def test_report_is_readable_in_dark_mode_on_phones_and_on_paper(tmp_path: Path) -> None:
    text = report(tmp_path)
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    assert "@media print" in text


def test_report_replaces_the_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    report(tmp_path, name="first")
    assert "<h1>second</h1>" in report(tmp_path, name="second")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_report_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"cannot write the report .*missing/report.html: No such file"):
        write_report(tmp_path / "missing" / "report.html", name="x", summary=[], records=[], layers=[], cheapest=0.5)
