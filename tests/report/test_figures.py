"""Tables and figures: what is drawn, asserted on the figure's own data."""

from __future__ import annotations

from typing import cast

import pytest

from mpsearch.precision import LayerPrecision, PrecisionConfig
from mpsearch.record import Origin, TrialRecord, WallTime
from mpsearch.report import figures
from mpsearch.report.tables import bits_table, front_table, mean_bits, progress_table, trials_table
from mpsearch.search.front import pareto_front

LAYERS = ["conv1", "layer1.conv", "fc"]


def trial(number: int, cost: float, accuracy: float, text: str = "w4a8", origin: str = "sampler") -> TrialRecord:
    config = PrecisionConfig.uniform(LAYERS, LayerPrecision.shorthand(text))
    wall, started_s = WallTime(train_s=30.0), 30.0 * number
    return TrialRecord(
        config,
        "complete",
        accuracy,
        cost,
        number=number,
        origin=cast(Origin, origin),
        wall=wall,
        started_s=started_s,
    )


RECORDS = [
    trial(0, 1.0, 0.90, "w8a8", "uniform"),
    trial(1, 0.25, 0.60, "w4a4", "uniform"),  # dominated by 2
    trial(2, 0.25, 0.80),
    trial(3, 0.125, 0.40, "w2a8", "manual"),
    TrialRecord(trial(4, 1, 1).config, "failed", reason="out of memory", number=4),
    trial(5, 0.5, 0.70, "w4a8", "ilp"),  # dominated by 2
]


def series(figure: object) -> dict[str, list[tuple[float, float]]]:
    """Points (cost, accuracy) by the name of their trace."""
    return {trace.name: list(zip(trace.x, trace.y, strict=True)) for trace in figure.data}  # type: ignore[attr-defined]


def wide(count: int, trials: int = 1) -> list[TrialRecord]:
    """A front of trials over many layers, the even ones with 2 bits, the odd ones with 4; the second is the knee."""
    even, odd = LayerPrecision.shorthand("w2a2"), LayerPrecision.shorthand("w4a4")
    config = PrecisionConfig((f"block.{i}", odd if i % 2 else even) for i in range(count))
    accuracies = [0.1, *(0.8 + i / 1000 for i in range(1, trials))]
    return [TrialRecord(config, "complete", a, 0.1 + i / 100, number=i) for i, a in enumerate(accuracies)]


def test_trials_table_has_a_row_per_trial_with_the_means_of_its_bits() -> None:
    table = trials_table(RECORDS)
    assert list(table.number) == [0, 1, 2, 3, 4, 5]
    assert list(table[table.on_front].number) == [0, 2, 3]
    assert list(table[table.knee].number) == [2]
    assert (table.weight_bits[2], table.activation_bits[2]) == (4.0, 8.0)
    assert table.accuracy_percent[0] == 90.0
    assert table.reason[4] == "out of memory"


def test_mean_bits_is_over_layers_and_counts_float_as_32() -> None:
    config = PrecisionConfig({"a": LayerPrecision.shorthand("w2a4"), "b": LayerPrecision.shorthand("w32a8")})
    assert mean_bits(config) == (17.0, 6.0)


def test_front_table_is_the_front_by_rising_cost() -> None:
    assert list(front_table(RECORDS).number) == [3, 2, 0]


def test_progress_table_ends_at_the_hypervolume_of_the_front() -> None:
    table = progress_table(RECORDS, cheapest=1 / 16)
    assert list(table.elapsed_s) == [30.0, 60.0, 90.0, 120.0, 180.0]
    assert table.hypervolume.iloc[-1] == pytest.approx(pareto_front(RECORDS).hypervolume(1 / 16))


def test_front_shows_every_complete_trial_once_under_its_origin() -> None:
    figure = figures.front(trials_table(RECORDS))
    points = series(figure)
    assert points["front"] == [(0.125, 40.0), (0.25, 80.0), (1.0, 90.0)]
    assert points["uniform ladder"] == [(0.25, 60.0), (1.0, 90.0)]
    assert points["sampler"] == [(0.25, 80.0)]
    assert points["manual"] == [(0.125, 40.0)]
    assert points["ilp"] == [(0.5, 70.0)]
    assert points["knee"] == [(0.25, 80.0)]
    assert figure.layout.xaxis.type == "log"


def test_front_tells_origins_apart_by_colour_and_by_marker() -> None:
    traces = [trace for trace in figures.front(trials_table(RECORDS)).data if trace.customdata is not None]
    assert len({trace.marker.color for trace in traces}) == len(traces) == 4
    assert len({trace.marker.symbol for trace in traces}) == len(traces)


def test_front_draws_the_nondominated_larger() -> None:
    ladder = next(t for t in figures.front(trials_table(RECORDS)).data if t.name == "uniform ladder")
    assert ladder.marker.size[0] < ladder.marker.size[1]


def test_heatmap_has_a_row_per_layer_and_a_column_per_front_trial() -> None:
    figure = figures.bits_heatmap(bits_table(RECORDS, LAYERS), "weight")
    (heatmap,) = figure.data
    assert [list(row) for row in heatmap.z] == [[2, 4, 8]] * 3
    assert list(figure.layout.yaxis.ticktext) == LAYERS
    assert list(figure.layout.xaxis.ticktext) == ["3", "2*", "0"]
    assert [list(row) for row in figures.bits_heatmap(bits_table(RECORDS, LAYERS), "activation").data[0].z] == [
        [8] * 3
    ] * 3


def test_heatmap_marks_the_quantizer_and_keeps_float_off_the_bit_scale() -> None:
    config = PrecisionConfig(
        {
            "conv1": LayerPrecision.parse("float", "uniform:8"),
            "layer1.conv": LayerPrecision.parse("shift:3", "uniform:8"),
            "fc": LayerPrecision.parse("apot:4", "uniform:8"),
        }
    )
    (heatmap,) = figures.bits_heatmap(bits_table([TrialRecord(config, "complete", 0.5, 0.5)], LAYERS), "weight").data
    assert [list(row) for row in heatmap.text] == [["f"], ["3s"], ["4p"]]
    assert [list(row) for row in heatmap.z] == [[9], [3], [4]]
    assert heatmap.zmax == 9.5


def test_heatmap_of_many_layers_shows_means_of_runs_and_says_so() -> None:
    records = wide(count=100)
    figure = figures.bits_heatmap(bits_table(records, list(records[0].config)), "weight")
    (heatmap,) = figure.data
    assert [list(row) for row in heatmap.z] == [[pytest.approx(8 / 3 if i % 2 == 0 else 10 / 3)] for i in range(33)] + [
        [4]
    ]
    assert figure.layout.yaxis.ticktext[0] == "block.0 +2"
    assert "100 layers in runs of 3, mean bits" in figure.layout.xaxis.title.text
    assert "block.2: 2" in heatmap.customdata[0][0]


def test_heatmap_of_a_run_that_is_partly_float_says_so() -> None:
    records = wide(count=80)
    mixed = records[0].config.replace(**{"block.0": LayerPrecision.parse("float", "float")})
    bits = bits_table([TrialRecord(mixed, "complete", 0.5, 0.5)], list(mixed))
    (heatmap,) = figures.bits_heatmap(bits, "weight").data
    assert (heatmap.text[0][0], heatmap.z[0][0]) == ("4f", 4)
    assert (heatmap.text[1][0], heatmap.z[1][0]) == ("3", 3)


def test_heatmap_of_many_trials_keeps_the_ends_and_the_knee() -> None:
    records = wide(count=2, trials=60)
    columns = list(figures.bits_heatmap(bits_table(records, list(records[0].config)), "weight").layout.xaxis.ticktext)
    assert len(columns) == figures.MAX_COLUMNS
    assert (columns[:2], columns[-1]) == (["0", "1*"], "59")


def test_heatmap_of_many_trials_says_that_it_left_some_out() -> None:
    records = wide(count=2, trials=60)
    figure = figures.bits_heatmap(bits_table(records, list(records[0].config)), "weight")
    assert "16 of 60 trials" in figure.layout.xaxis.title.text


def test_heatmap_of_long_names_keeps_their_ends() -> None:
    name = "backbone.features.stage3.block11.conv2"
    config = PrecisionConfig.uniform([name], LayerPrecision.shorthand("w4a4"))
    figure = figures.bits_heatmap(bits_table([TrialRecord(config, "complete", 0.5, 0.5)], [name]), "weight")
    assert list(figure.layout.yaxis.ticktext) == ["…es.stage3.block11.conv2"]
    assert name in figure.data[0].customdata[0][0]


def test_hypervolume_is_drawn_over_time_in_a_readable_unit() -> None:
    figure = figures.hypervolume(progress_table(RECORDS, cheapest=1 / 16))
    assert list(figure.data[0].x) == [0.5, 1.0, 1.5, 2.0, 3.0]
    assert figure.layout.xaxis.title.text.endswith(", min")


def test_figures_of_no_trials_are_empty() -> None:
    assert series(figures.front(trials_table([])))["front"] == []
    assert len(figures.hypervolume(progress_table([], 0.5)).data[0].x) == 0
