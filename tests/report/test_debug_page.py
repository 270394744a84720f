"""The page of the debugging flow: what it shows of what was measured, offline and escaped."""

from __future__ import annotations

import re
from dataclasses import replace
from math import nan
from pathlib import Path

import pytest
from plotly.offline import get_plotlyjs

from mpsearch.debug.diagnosis import Attempt, Diagnosis, Histogram, LayerFacts, Score, TensorFacts
from mpsearch.errors import WriteError
from mpsearch.metric import TOP1
from mpsearch.precision import FLOAT, LayerPrecision, Precision, PrecisionConfig
from mpsearch.report import figures
from mpsearch.report.debug_page import stage_rows, sweep_table, write_debug_page

EVIL = "head<1>"
W4, A8 = Precision("uniform", 4, "tensor"), Precision("uniform", 8, "tensor")
CONFIG = PrecisionConfig({"conv": LayerPrecision(W4, FLOAT), EVIL: LayerPrecision(W4, A8)})
FOUND = Diagnosis(
    config=CONFIG,
    metric=TOP1,
    samples=400,
    float_score=0.9,
    unit="nats",
    sanity=Score(0.9, 1e-12, 0.0),
    parts={
        "weights": Score(0.6, 1.5, 0.36),
        "activations": Score(0.8975, 0.01, 0.01),
        "all": Score(0.59, 1.6, 0.37),
    },
    layers=(
        LayerFacts("conv", "depthwise", 20.0, TensorFacts(W4, 12.345, Score(0.65, 1.25, 0.3)), None),
        LayerFacts(
            EVIL,
            "linear",
            1.5,
            TensorFacts(W4, 20.0, Score(0.89, 0.125, 0.1)),
            TensorFacts(A8, 40.0, Score(0.9, 0.5, 0)),
        ),
    ),
    histograms=(Histogram("conv", "weight", W4, (-1.0, 0.0, 1.0), (3, 4), (0, 7)),),
    attempts=(Attempt("cle", "weight", (), Score(0.88, 0.1, 0.04)),),
    notes=("norm cannot be folded",),
    seconds=1.0,
)


def page(folder: Path, found: Diagnosis = FOUND) -> str:
    """The text of the page without plotly's own code."""
    path = write_debug_page(folder / "debug.html", found, study="digits", config="w4a8", commands=["mpsearch debug"])
    return path.read_text(encoding="utf-8").replace(get_plotlyjs(), "")


def test_stages_say_what_is_lost_and_how_well_that_is_known() -> None:
    assert stage_rows(FOUND) == [
        ["float", "", "90.00", "", "", ""],
        ["quantizers at 32 bits", "fine", "90.00", "0.00 ± 0.00", "1e-12", "0.0"],
        ["weights alone", "problem", "60.00", "30.00 ± 3.00", "1.5", "36.0"],  # sqrt(0.36 / 400)
        ["activations alone", "fine", "89.75", "0.25 ± 0.50", "0.01", "1.0"],
        ["all", "problem", "59.00", "31.00 ± 3.04", "1.6", "37.0"],
    ]


def test_the_page_shows_advice_layers_values_and_remedies(tmp_path: Path) -> None:
    text = page(tmp_path)
    assert "<h1>digits: w4a8</h1>" in text
    assert "59.00 % quantized, 90.00 % float: top1 on 400 samples of the validation split." in text
    assert "moved most by the weights of conv, and the activations of head&lt;1&gt;." in text
    assert "norm cannot be folded" in text
    assert re.search(r"<ol><li>Cross-layer equalization: .*conv \(largest channel 20.0 times the median\)", text)
    assert text.count('<div id="figure-sweep"') == text.count('<div id="figure-values-0"') == 1
    assert "As uniform:4/tensor: SQNR 12.3 dB." in text
    for cells in (["conv", "depthwise"], ["cross-layer equalization", "weights", "all"]):
        assert "".join(f'<td class="text">{cell}</td>' for cell in cells) in text


def test_the_page_is_offline_and_escaped(tmp_path: Path) -> None:
    text = page(tmp_path)
    assert not re.search(r"""(src|href|action)\s*=|url\(|@import|https?://""", text)
    assert EVIL not in text


def test_a_failed_sanity_check_leaves_the_rest_out(tmp_path: Path) -> None:
    failed = replace(FOUND, sanity=Score(0.1, 5.0, 0.9), parts={}, layers=(), histograms=(), attempts=())
    text = page(tmp_path, failed)
    assert "Inserting quantizers that do nothing already moves the outputs by 5 nats" in text
    assert 'plotly-graph-div"' not in text


def test_a_page_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=r"missing/debug\.html: No such file"):
        page(tmp_path / "missing")


def test_the_sweep_shows_both_tensors_of_each_layer_in_order() -> None:
    weights, inputs = figures.sweep(sweep_table(FOUND), TOP1, "nats").data
    assert list(weights.x) == [1.25, 0.125]
    assert list(inputs.x)[1] == 0.5
    assert inputs.x[0] != inputs.x[0]  # NaN: left float
    assert weights.customdata[0][1] == pytest.approx(25.0)


def test_of_many_layers_the_sweep_shows_those_that_matter() -> None:
    def layer(number: int) -> LayerFacts:
        divergence = nan if number == 99 else float(number)
        return LayerFacts(f"l{number}", "linear", 1.0, TensorFacts(W4, 20.0, Score(0.9, divergence, 0.0)), None)

    weights, _ = figures.sweep(sweep_table(replace(FOUND, layers=tuple(map(layer, range(100))))), TOP1, "nats").data
    assert [name for name, _ in weights.customdata] == [f"l{number}" for number in range(60, 100)]


def test_values_are_counted_in_the_middle_of_their_bins() -> None:
    before, after = figures.before_after((-1.0, 0.0, 1.0), (3, 4), (0, 7), "weight").data
    assert (list(before.x), list(before.y), list(after.y)) == ([-0.5, 0.5], [3, 4], [0, 7])
