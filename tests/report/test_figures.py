"""Tables and figures: what is drawn, asserted on the figure's own data."""

from __future__ import annotations

from dataclasses import replace
from math import isnan

import pandas as pd
import pytest
from pictured import CHEAPEST, COST, FINALS, INFOS, LAYERS, RECORDS, infos, run_data, trial

from mpsearch.cost.model import RelativeCost
from mpsearch.metric import TOP1
from mpsearch.precision import LayerPrecision, PrecisionConfig
from mpsearch.record import RungScore, TrialRecord
from mpsearch.report import figures
from mpsearch.report.tables import (
    best_table,
    bits_table,
    config_table,
    config_text,
    descent_table,
    finals_table,
    front_table,
    layers_table,
    origins_table,
    progress_table,
    trials_table,
)
from mpsearch.search.front import ScoreRange, pareto_front
from mpsearch.space.choices import parse_choices
from mpsearch.space.space import Slot

SHARES = ScoreRange(0.0, 1.0)


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
    table = trials_table(RECORDS, TOP1)
    assert list(table.number) == [0, 1, 2, 3, 4, 5]
    assert list(table[table.on_front].number) == [0, 2, 3]
    assert list(table[table.knee].number) == [2]
    assert (table.weight_bits[2], table.activation_bits[2]) == (4.0, 8.0)
    assert table.score[0] == 0.9
    assert table.reason[4] == "CUDA <out> of memory"


def test_front_table_is_the_front_by_rising_cost() -> None:
    assert list(front_table(RECORDS, TOP1).number) == [3, 2, 0]


def test_progress_table_ends_at_the_hypervolume_of_the_front() -> None:
    table = progress_table(RECORDS, CHEAPEST, TOP1, SHARES)
    assert list(table.elapsed_s) == [30.0, 60.0, 90.0, 120.0, 180.0]
    assert table.hypervolume.iloc[-1] == pytest.approx(pareto_front(RECORDS, TOP1).hypervolume(CHEAPEST, SHARES))


def test_front_shows_every_complete_trial_once_under_its_origin() -> None:
    figure = figures.front(trials_table(RECORDS, TOP1), TOP1)
    points = series(figure)
    assert points["front"] == [(0.125, 40.0), (0.25, 81.25), (1.0, 90.0)]
    assert points["uniform ladder"] == [(0.25, 60.0), (1.0, 90.0)]
    assert points["sampler"] == [(0.25, 81.25)]
    assert points["manual"] == [(0.125, 40.0)]
    assert points["ilp"] == [(0.5, 70.0)]
    assert points["knee"] == [(0.25, 81.25)]
    assert figure.layout.xaxis.type == "log"


def test_front_tells_origins_apart_by_colour_and_by_marker() -> None:
    traces = [trace for trace in figures.front(trials_table(RECORDS, TOP1), TOP1).data if trace.customdata is not None]
    assert len({trace.marker.color for trace in traces}) == len(traces) == 4
    assert len({trace.marker.symbol for trace in traces}) == len(traces)


def test_front_draws_the_nondominated_larger() -> None:
    ladder = next(t for t in figures.front(trials_table(RECORDS, TOP1), TOP1).data if t.name == "uniform ladder")
    assert ladder.marker.size[0] < ladder.marker.size[1]


def test_heatmap_has_a_row_per_layer_and_a_column_per_front_trial() -> None:
    figure = figures.bits_heatmap(bits_table(RECORDS, LAYERS, TOP1), "weight")
    (heatmap,) = figure.data
    assert [list(row) for row in heatmap.z] == [[2, 4, 8]] * 3
    assert list(figure.layout.yaxis.ticktext) == ["stem.conv", "mid&lt;1&gt;", "head"]
    assert list(figure.layout.xaxis.ticktext) == ["3", "2*", "0"]
    assert [list(row) for row in figures.bits_heatmap(bits_table(RECORDS, LAYERS, TOP1), "activation").data[0].z] == [
        [8] * 3
    ] * 3


def test_heatmap_marks_the_quantizer_and_keeps_float_off_the_bit_scale() -> None:
    config = PrecisionConfig(
        {
            "stem.conv": LayerPrecision.parse("float", "uniform:8"),
            "mid<1>": LayerPrecision.parse("shift:3", "uniform:8"),
            "head": LayerPrecision.parse("apot:4", "uniform:8"),
        }
    )
    (heatmap,) = figures.bits_heatmap(
        bits_table([TrialRecord(config, "complete", 0.5, 0.5)], LAYERS, TOP1), "weight"
    ).data
    assert [list(row) for row in heatmap.text] == [["f"], ["3s"], ["4p"]]
    assert [list(row) for row in heatmap.z] == [[9], [3], [4]]
    assert heatmap.zmax == 9.5


def test_heatmap_of_many_layers_shows_means_of_runs_and_says_so() -> None:
    records = wide(count=100)
    figure = figures.bits_heatmap(bits_table(records, list(records[0].config), TOP1), "weight")
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
    bits = bits_table([TrialRecord(mixed, "complete", 0.5, 0.5)], list(mixed), TOP1)
    (heatmap,) = figures.bits_heatmap(bits, "weight").data
    assert (heatmap.text[0][0], heatmap.z[0][0]) == ("4f", 4)
    assert (heatmap.text[1][0], heatmap.z[1][0]) == ("3", 3)


def test_heatmap_of_many_trials_keeps_the_ends_and_the_knee() -> None:
    records = wide(count=2, trials=60)
    columns = list(
        figures.bits_heatmap(bits_table(records, list(records[0].config), TOP1), "weight").layout.xaxis.ticktext
    )
    assert len(columns) == 16
    assert (columns[:2], columns[-1]) == (["0", "1*"], "59")


def test_heatmap_of_many_trials_says_that_it_left_some_out() -> None:
    records = wide(count=2, trials=60)
    figure = figures.bits_heatmap(bits_table(records, list(records[0].config), TOP1), "weight")
    assert "16 of 60 trials" in figure.layout.xaxis.title.text


def test_heatmap_of_long_names_keeps_their_ends() -> None:
    name = "backbone.features.stage3.block11.conv2"
    config = PrecisionConfig.uniform([name], LayerPrecision.shorthand("w4a4"))
    figure = figures.bits_heatmap(bits_table([TrialRecord(config, "complete", 0.5, 0.5)], [name], TOP1), "weight")
    assert list(figure.layout.yaxis.ticktext) == ["…es.stage3.block11.conv2"]
    assert name in figure.data[0].customdata[0][0]


def test_hypervolume_is_drawn_over_time_in_a_readable_unit() -> None:
    figure = figures.hypervolume(progress_table(RECORDS, CHEAPEST, TOP1, SHARES))
    assert list(figure.data[0].x) == [0.5, 1.0, 1.5, 2.0, 3.0]
    assert figure.layout.xaxis.title.text.endswith(", min")


def test_figures_of_no_trials_are_empty() -> None:
    assert series(figures.front(trials_table([], TOP1), TOP1))["front"] == []
    assert len(figures.hypervolume(progress_table([], 0.5, TOP1, SHARES)).data[0].x) == 0


# ---------------------------------------------------------------------------------------- the config, layer by layer


def knee_config() -> pd.DataFrame:
    config = PrecisionConfig(
        {
            "stem.conv": LayerPrecision.parse("float", "uniform:8"),
            "mid<1>": LayerPrecision.parse("shift:3", "uniform:4"),
            "head": LayerPrecision.parse("apot:4", "uniform:2"),
        }
    )
    return config_table(config, layers_table(INFOS, COST), COST)


def test_config_table_sums_to_the_cost_of_the_config() -> None:
    table = config_table(RECORDS[1].config, layers_table(INFOS, COST), COST)  # w4a4
    assert list(table.cost_percent) == [15.0, 7.5, 2.5]
    assert table.cost_percent.sum() == pytest.approx(100 * COST(RECORDS[1].config))
    assert list(table.reference_percent) == [60.0, 30.0, 10.0]


def test_network_draws_bits_as_height_macs_as_width_and_types_as_colour() -> None:
    figure = figures.network(knee_config())
    weights, inputs = figure.data[:2]
    assert (list(weights.y), list(inputs.y)) == ([9, 3, 4], [-8, -4, -2])  # float is drawn above 8 bits
    assert list(weights.text) == ["f", "3s", "4p"]
    widths = [width / weights.width[0] for width in weights.width]
    assert widths == pytest.approx([1, 300 / 600, 100 / 600])
    assert list(weights.x) == pytest.approx([0.3, 0.75, 0.95])
    legend = {trace.name: trace.marker.color for trace in figure.data[2:]}
    assert list(weights.marker.color) == [legend["float"], legend["shift (powers of two)"], legend["APoT"]]
    assert set(inputs.marker.color) == {legend["uniform"]}


def test_network_draws_a_layer_of_few_macs_wide_enough_to_be_seen() -> None:
    few = infos(["a", "b"], [1, 9999])
    cost = RelativeCost(few, "bops", "w8a8")
    config = PrecisionConfig.uniform(["a", "b"], LayerPrecision.shorthand("w4a4"))
    widths = figures.network(config_table(config, layers_table(few, cost), cost)).data[0].width
    assert widths[0] / sum(widths) == pytest.approx(0.125 / (0.125 + 0.9999))


def test_network_of_many_layers_names_some_and_says_so() -> None:
    records = wide(count=60)
    run = run_data(
        records, layers=infos(list(records[0].config)), cost=RelativeCost(infos(list(records[0].config)), "bops")
    )
    figure = figures.network(run.config)
    assert len(figure.data[0].x) == 60
    assert len(figure.layout.xaxis.ticktext) == 20
    assert "the name of one in 3 layers" in figure.layout.xaxis.title.text


def test_cost_by_layer_shows_config_and_reference_and_their_sums() -> None:
    table = config_table(RECORDS[1].config, layers_table(INFOS, COST), COST)
    reference, config = figures.cost_by_layer(table, "trial 1", "w8a8").data
    assert (reference.name, config.name) == ("w8a8: 100.0 %", "trial 1: 25.0 %")
    assert (list(reference.x), list(config.x)) == ([60.0, 30.0, 10.0], [15.0, 7.5, 2.5])


def test_cost_of_many_layers_is_summed_over_runs_and_says_so() -> None:
    many = infos([f"l{i}" for i in range(90)])
    cost = RelativeCost(many, "bops")
    config = PrecisionConfig.uniform([layer.name for layer in many], LayerPrecision.shorthand("w4a8"))
    figure = figures.cost_by_layer(config_table(config, layers_table(many, cost), cost), "x", "w8a8")
    assert len(figure.data[1].x) == 30
    assert sum(figure.data[1].x) == pytest.approx(50.0)
    assert figure.layout.meta["run"] == 3
    assert "90 layers in runs of 3, summed" in figure.layout.xaxis.title.text


def test_config_text_is_whole_for_few_layers_and_counted_for_many() -> None:
    config = RECORDS[0].config.replace(head=LayerPrecision.parse("shift:4", "float"))
    assert config_text(config) == "stem.conv … mid&lt;1&gt; (2): 8 × 8<br>head: 4s × f"
    lines = config_text(wide(count=50)[0].config).split("<br>")
    assert (len(lines), lines[-1]) == (24, "and 27 more: click")


# ---------------------------------------------------------------------------------------------------- many points


def crowd(count: int) -> list[TrialRecord]:
    """A ladder of two, one point of the front, and dominated ones."""
    dominated = [trial(i, 0.3 + i / (2 * count), 0.5, origin="sampler") for i in range(2, count)]
    return [trial(0, 1.0, 0.6, "w8a8", "uniform"), trial(1, 0.2, 0.9, "w4a4"), *dominated]


def test_front_of_many_trials_thins_out_the_dominated_and_says_so() -> None:
    figure = figures.front(trials_table(crowd(1000), TOP1), TOP1, most=100)
    points = series(figure)
    assert len(points["sampler"]) == 101
    assert len(points["uniform ladder"]) == 1
    assert (0.2, 90.0) in points["sampler"]
    assert "102 of 1,000 trials are drawn" in figure.layout.xaxis.title.text
    assert "drawn" not in figures.front(trials_table(crowd(50), TOP1), TOP1).layout.xaxis.title.text


def test_front_shows_stopped_trials_apart_and_hovers_tell_the_config() -> None:
    stopped = replace(trial(6, 0.4, 0.3), state="stopped", reason="dominated")
    table = trials_table([*RECORDS, stopped], TOP1).assign(config="all of it")
    figure = figures.front(table, TOP1)
    assert series(figure)["stopped early"] == [(0.4, 30.0)]
    (sampler,) = [trace for trace in figure.data if trace.name == "sampler"]
    assert sampler.customdata[0] == [2, 4.0, 8.0, "all of it", "sampler"]
    assert "%{customdata[3]}" in sampler.hovertemplate


# -------------------------------------------------------------------------------------------------- final training


def test_finals_table_has_mean_and_spread_over_seeds() -> None:
    table = finals_table(RECORDS, FINALS)
    assert list(table.number) == [3, 2, 0]
    assert list(table.proxy) == pytest.approx([0.40, 0.8125, 0.90])
    assert list(table.test) == pytest.approx([0.45, 0.82, 0.92])
    assert table.test_std[1] == pytest.approx(0.01 * 8**0.5)  # of 80 and 84
    assert isnan(table.test_std[0])  # one seed


def test_front_shows_finalized_test_results_with_error_bars() -> None:
    figure = figures.front(trials_table(RECORDS, TOP1), TOP1, finals_table(RECORDS, FINALS))
    points = series(figure)
    assert points["test, uniform"] == [(1.0, pytest.approx(92.0))]
    assert points["test, finalized"] == [(0.125, pytest.approx(45.0)), (0.25, pytest.approx(82.0))]
    (mixed,) = [trace for trace in figure.data if trace.name == "test, finalized"]
    assert list(mixed.error_y.array) == pytest.approx([0.0, 8**0.5])


def test_proxy_compares_the_trial_with_the_final_training() -> None:
    figure = figures.proxy(finals_table(RECORDS, FINALS), TOP1)
    points = {trace.name: (list(trace.x), list(trace.y)) for trace in figure.data}
    assert points["uniform ladder"] == ([90.0], [pytest.approx(92.0)])
    assert "Kendall's tau 1.00 over 3 configs" in figure.layout.xaxis.title.text


# ------------------------------------------------------------------------------------------------------- progress


def climbing() -> list[TrialRecord]:
    """A uniform trial that went on to a longer rung, an ILP one, and two of the sampler's; cost 1/4, in this order."""
    rungs = (RungScore(60, 0.4, ended_s=10.0), RungScore(150, 0.6, ended_s=50.0))
    return [
        trial(0, 1 / 4, 0.6, origin="uniform", rungs=rungs, started_s=0.0),
        trial(1, 1 / 4, 0.5, origin="ilp", rungs=(RungScore(60, 0.5, ended_s=20.0),)),
        trial(2, 1 / 4, 0.5, rungs=(RungScore(60, 0.5, ended_s=30.0),)),  # as good as that of the ILP, and later
        trial(3, 1 / 4, 0.8, rungs=(RungScore(60, 0.8, ended_s=60.0),)),
    ]


def test_origins_say_who_added_what_and_what_came_late() -> None:
    progress = progress_table(climbing(), CHEAPEST, TOP1, SHARES)
    assert list(progress.added) == pytest.approx([0.2, 0.05, 0.0, 0.05, 0.1])
    table = origins_table(progress).set_index("origin")
    assert list(table.trials) == [1, 1, 2]
    assert list(table["first"]) == pytest.approx([0.2, 0.05, 0.1])
    assert list(table["longer"]) == pytest.approx([0.05, 0.0, 0.0])
    assert list(table["late"]) == pytest.approx([0.05, 0.0, 0.1])  # since the ILP config, the last initial one
    assert table["first"].sum() + table["longer"].sum() == pytest.approx(progress.hypervolume.iloc[-1])


def test_added_by_origin_ends_at_what_each_has_added_first_and_longer_rungs_apart() -> None:
    figure = figures.added_by_origin(progress_table(climbing(), CHEAPEST, TOP1, SHARES))
    assert {trace.name: trace.y[-1] for trace in figure.data} == {
        "uniform ladder": pytest.approx(0.2),
        "ilp": pytest.approx(0.05),
        "sampler": pytest.approx(0.1),
        "uniform ladder, longer rungs": pytest.approx(0.05),
    }
    assert {trace.x[-1] for trace in figure.data} == {60.0}


def test_best_so_far_is_within_each_cost_and_never_falls() -> None:
    table = best_table(RECORDS, CHEAPEST, TOP1)
    assert list(dict.fromkeys(table.bound)) == [1.0, 0.25]  # (1/16)^0 and ^(1/2); none is within ^(4/5)
    of_all = table[table.bound == 1.0]
    assert list(of_all.score) == [0.9, 0.9]
    within = table[table.bound == 0.25]
    assert list(zip(within.elapsed_s, within.score, within.number, strict=True)) == [
        (60.0, 0.60, 1),
        (90.0, 0.8125, 2),
        (180.0, 0.8125, 2),
    ]
    names = [trace.name for trace in figures.best_so_far(table, TOP1).data]
    assert names == ["cost ≤ 1", "cost ≤ 0.25"]


def log(steps: int, names: list[str]) -> list[dict[str, object]]:
    return [
        {"step": s, "loss": 0.5, "cost": 1 - s / steps / 2, "bits": {f"{n}.weight": 8 - 4 * s / steps for n in names}}
        for s in range(steps)
    ]


def slots(names: list[str]) -> list[Slot]:
    return [Slot("weight", (name,), parse_choices(["uniform:1-8"], "weight")) for name in names]


def test_descent_has_a_line_a_layer_and_keeps_the_last_step() -> None:
    found = slots(["a", "b"])
    table = descent_table(
        [{**entry, "bits": {slot.name: 8 - int(str(entry["step"])) / 50 for slot in found}} for entry in log(200, [])],
        found,
    )
    first, last = figures.descent(table, "weight").data
    assert (first.name, last.name) == ("a", "b")
    assert first.line.color != last.line.color
    assert (first.x[0], first.x[-1], first.y[-1]) == (0, 199, 4.02)
    assert len(first.x) <= 61
    assert first.showlegend
    assert last.showlegend


def test_descent_of_many_layers_is_of_runs_and_says_so() -> None:
    found = slots([f"l{i}" for i in range(100)])
    entries = [{"step": 0, "loss": 1.0, "cost": 1.0, "bits": {slot.name: i for i, slot in enumerate(found)}}]
    figure = figures.descent(descent_table(entries, found), "weight")
    assert [trace.y[0] for trace in figure.data[:2]] == [1.0, 4.0]
    assert len(figure.data) == 34
    assert "100 layers in runs of 3, mean bits" in figure.layout.xaxis.title.text


# --------------------------------------------------------------------------------------------------------- values


def test_ranges_show_what_can_be_represented_beside_what_there_is() -> None:
    values = pd.DataFrame(
        [
            ("a", "weight", 9, "4", "uniform", -0.8, 0.7, -1.0, 0.5),
            ("b", "weight", 9, "3s", "shift", -2.0, 2.0, -1.5, 1.5),
            ("a", "activation", 9, "8", "uniform", 0.0, 6.0, float("nan"), float("nan")),
        ],
        columns=["layer", "tensor", "weights", "precision", "quantizer", "low", "high", "seen_low", "seen_high"],
    )
    seen, uniform, shift = figures.ranges(values, "weight").data
    assert (list(seen.base), list(seen.x)) == ([-1.0, -1.5], [1.5, 3.0])
    assert (list(uniform.x), list(uniform.y)) == ([-0.8, 0.7, None], [0, 0, None])
    assert list(shift.y)[:2] == [1, 1]
    (inputs,) = figures.ranges(values, "activation").data
    assert list(inputs.x) == [0.0, 6.0, None]
