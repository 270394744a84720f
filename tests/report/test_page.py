"""The report file: complete, offline, escaped, and replaced whole."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from pictured import FINALS, INFOS, LAYERS, RECORDS, run_data, trial
from plotly.offline import get_plotlyjs

from mpsearch.errors import WriteError
from mpsearch.metric import TOP1
from mpsearch.record import TrialRecord
from mpsearch.report.data import RunData
from mpsearch.report.page import write_report


def report(path: Path, run: RunData | None = None, **changes: Any) -> str:
    """The text of a report without plotly's own code."""
    written = write_report(path / "report.html", run or run_data(), **({"summary": ["Find the bits."]} | changes))
    text = written.read_text(encoding="utf-8")
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


def embedded(text: str) -> dict[str, Any]:
    """What the page's script is given."""
    (found,) = re.findall(r'<script type="application/json" id="run">(.*?)</script>', text)
    document: dict[str, Any] = json.loads(found)
    return document


def test_report_says_what_was_asked_and_what_came_out(tmp_path: Path) -> None:
    text = report(tmp_path, summary=["Find the bits.", "Cost: pJ."])
    assert "<h1>digits</h1>" in text
    assert "<p>Find the bits.</p><p>Cost: pJ.</p>" in text
    assert "5 complete, 1 failed." in text
    tiles = re.findall(
        r"<div class='tile'><dt>(.*?)</dt><dd>(.*?)</dd><dd class='small'>(.*?)</dd></div>", unescape(text)
    )
    # the cost axis goes from 1/16 to 1: the score axis from 0.40 to 0.90
    assert tiles == [
        ("best", "90.00 %", "trial 0, cost 1"),
        ("knee", "81.25 %", "trial 2, cost 0.25"),
        ("front", "3", "of 6 trials"),
        ("hypervolume", f"{(0.8125 - 0.40) / 0.50 / 2:.4f}", run_data().scores.said(TOP1)),
    ]
    assert "Uniform baseline nearest to the knee&#x27;s cost: trial 1 (uniform)" in text


def test_report_says_how_much_came_from_the_sampler(tmp_path: Path) -> None:
    sampled = [*RECORDS, trial(6, 0.125, 0.80)]
    text = report(tmp_path, run_data(sampled))
    found = "the hypervolume was 0.4125; late is what came after that, +0.2000, 100% of it with configs of the sampler."
    assert found in text
    assert ["sampler", "2", "+0.4125", "+0.2000"] in Cells(text).rows


def test_report_has_the_figures_for_which_there_is_data(tmp_path: Path) -> None:
    always = {"front", "network", "cost", "weight-bits", "input-bits", "hypervolume", "best", "origins"}
    assert set(re.findall(r'<div id="figure-([\w-]+)"', report(tmp_path))) == always
    finalized = report(tmp_path, run_data(finals=FINALS))
    assert set(re.findall(r'<div id="figure-([\w-]+)"', finalized)) == always | {"proxy"}
    assert "Warm start" not in finalized


def test_table_of_the_front_is_by_rising_cost_and_marks_the_knee(tmp_path: Path) -> None:
    text = report(tmp_path)
    rows = Cells(text).rows
    first = next(index for index, row in enumerate(rows) if row[0] == "number")
    assert rows[first : first + 4] == [
        ["number", "origin", "top1, %", "relative cost", "mean weight bits", "mean activation bits", ""],
        ["3", "manual", "40.00", "0.1250", "2.00", "8.00", ""],
        ["2", "sampler", "81.25", "0.2500", "4.00", "8.00", "knee"],
        ["0", "uniform", "90.00", "1.0000", "8.00", "8.00", ""],
    ]
    assert text.count('<tr class="knee">') == 1


def test_table_of_layers_is_that_of_the_knee(tmp_path: Path) -> None:
    text = report(tmp_path)
    assert Cells(text).rows[1:4] == [  # w4a8 of w8a8 everywhere: half the bit operations
        ["stem.conv", "conv2d", "4×2×3×3", "600", "uniform:4/channel", "uniform:8/tensor", "30.00", "60.00"],
        ["mid<1>", "conv2d", "4×2×3×3", "300", "uniform:4/channel", "uniform:8/tensor", "15.00", "30.00"],
        ["head", "conv2d", "4×2×3×3", "100", "uniform:4/channel", "uniform:8/tensor", "5.00", "10.00"],
    ]
    assert "trial 2 (sampler), 81.25 % at relative cost 0.25</h3>" in text


def test_the_script_can_show_the_layers_of_every_point(tmp_path: Path) -> None:
    run = embedded(report(tmp_path))
    assert set(run["trials"]) == {"0", "1", "2", "3", "5"}
    assert run["picked"] == 2
    chosen = run["trials"]["1"]  # w4a4
    weight, inputs = run["precisions"][chosen["w"][0]], run["precisions"][chosen["a"][0]]
    assert (weight["text"], inputs["text"]) == ("uniform:4/channel", "uniform:4/tensor")
    assert (weight["bits"], weight["mark"], weight["quantizer"]) == (4, "4", "uniform")
    assert [run["prices"][i][chosen["w"][i] + chosen["a"][i]] for i in range(3)] == [15.0, 7.5, 2.5]
    assert len(run["prices"]) == len(LAYERS)


def test_the_list_has_the_front_and_the_ladder(tmp_path: Path) -> None:
    found = re.findall(r"<option value='(\d+)'( selected)?>", report(tmp_path))
    assert found == [("3", ""), ("2", " selected"), ("0", ""), ("1", "")]


def test_a_report_that_is_watched_loads_itself_again(tmp_path: Path) -> None:
    assert '<meta http-equiv="refresh" content="5">' in report(tmp_path, refresh_s=5)
    assert "refresh" not in report(tmp_path).partition("<body>")[0].partition("<style>")[0]


def test_finalized_rows_and_commands_are_shown_where_given(tmp_path: Path) -> None:
    rows = [{"pick": "knee", "test_mean": 0.87654}, {"pick": "uniform", "test_mean": 0.86, "note": None}]
    text = report(tmp_path, finalized=rows, commands=["mpsearch run digits", "mpsearch finalize runs/digits"])
    cells = Cells(text).rows
    first = next(index for index, row in enumerate(cells) if row[0] == "pick")
    assert cells[first : first + 3] == [
        ["pick", "test mean", "note"],
        ["knee", "0.8765", ""],
        ["uniform", "0.86", ""],
    ]
    assert "<pre>mpsearch run digits\nmpsearch finalize runs/digits</pre>" in text
    assert "Final training" not in report(tmp_path)


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
    evil = "linear</script><script>alert(1)</script>"
    records = [replace(record, origin=evil) for record in RECORDS]
    text = report(
        tmp_path,
        run_data(
            [*records, TrialRecord(RECORDS[0].config, "failed", reason=evil)],
            name=f"$title {evil}",
            layers=[replace(info, kind=evil) for info in INFOS],
        ),
        summary=[evil],
        commands=[evil],
        finalized=[{evil: evil}],
    )
    assert "<script>alert" not in text
    assert [row[1] for row in Cells(text).rows[1:4]] == [evil] * 3
    assert "$title linear&lt;/script&gt;&lt;script&gt;" in text
    assert "CUDA &lt;out&gt; of memory" in text
    assert "mid<1>" not in text
    assert '"mid&lt;1&gt;"' in text  # an axis label, where plotly would read tags


def test_report_of_a_study_without_a_complete_trial_has_no_figures(tmp_path: Path) -> None:
    assert "No trial has ended yet." in report(tmp_path, run_data([]))
    text = report(tmp_path, run_data(RECORDS[4:5]))
    assert "1 failed." in text
    assert "Failed 1×: CUDA &lt;out&gt; of memory" in text
    assert 'plotly-graph-div"' not in text


def test_report_is_readable_in_dark_mode_on_phones_and_on_paper(tmp_path: Path) -> None:
    text = report(tmp_path)
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    assert "@media print" in text


def test_report_replaces_the_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    report(tmp_path, run_data(name="first"))
    assert "<h1>second</h1>" in report(tmp_path, run_data(name="second"))
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_report_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=r"cannot write .*missing/report.html: No such file"):
        write_report(tmp_path / "missing" / "report.html", run_data())
