"""Measuring: the clock ends when the median is known, rows are kept, and the check compares sums with wholes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from mpsearch.errors import HardwareError
from mpsearch.graph.layers import inspect_model
from mpsearch.hardware.profile import load_profile
from mpsearch.hardware.table import REST, Row, Table, key_of, pair_of
from mpsearch.measure import measure
from mpsearch.measure.measure import _check, _with_change, _with_rest
from mpsearch.measure.runtimes import BFLOAT16, FLOAT32, W8A8, find_runtime
from mpsearch.measure.timing import LEAST_ROUNDS, Timing, summary, timed_in_turn
from mpsearch.study import load_study


def test_a_measurement_ends_when_the_interval_is_narrow_or_time_is_over() -> None:
    now = 0.0

    def call(us: float):
        def run() -> None:
            nonlocal now
            now += us * 1e-6

        return run

    (steady,) = timed_in_turn([call(500.0)], lambda: now)
    assert steady.median_us == pytest.approx(500.0)
    assert steady.n == LEAST_ROUNDS
    assert steady.interval < 0.05
    durations = iter([100.0, 4000.0] * 10**5)

    def jumping() -> None:
        nonlocal now
        now += next(durations) * 1e-6

    (noisy,) = timed_in_turn([jumping], lambda: now, most_s=0.5)
    assert noisy.n >= 3
    assert now < 10
    assert summary([1.0, 5.0, 3.0]) == Timing(3.0, 2.0, 3)


def test_calls_that_are_compared_are_measured_in_turn() -> None:
    """A machine that gets slower by the round makes both slower, and their ratio stays."""
    now, round_, order = 0.0, 0.0, []

    def call(name: str, us: float):
        def run() -> None:
            nonlocal now, round_
            round_ += 1
            order.append(name)
            now += us * 1e-6 * (1 + round_ / 1000)

        return run

    one, other = timed_in_turn([call("one", 4000.0), call("other", 8000.0)], lambda: now)
    assert other.median_us / one.median_us == pytest.approx(2.0, rel=0.01)
    assert order[-4:] == ["one", "other", "one", "other"]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 8, 3, padding=1, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.two = nn.Conv2d(8, 8, 1, groups=8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.two(self.norm(self.one(x)).relu()).mean((2, 3)))


def network():
    torch.manual_seed(0)
    net = Net().eval()
    return net, inspect_model(net, torch.rand(2, 3, 12, 12)).layers


@pytest.mark.parametrize("name", ["torch", "onnxruntime", "openvino"])
def test_a_runtime_runs_every_layer_at_each_of_its_pairs_and_the_whole(name: str) -> None:
    codes = name != "torch"
    if name == "openvino":
        pytest.importorskip("openvino")
    if codes:
        pytest.importorskip("onnx")
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    runtime = find_runtime(name, 1)
    net, layers = network()
    other = W8A8 if codes else BFLOAT16
    for layer in layers:
        assert list(runtime.pairs(layer)) == [FLOAT32, other]
        for pair in runtime.pairs(layer):
            once, share = runtime.layer(layer, dict(net.named_modules())[layer.name], pair)
            y = once()
            assert 0 < share <= 1
            shape = y[0].shape if codes else y.shape  # type: ignore[index, attr-defined]
            assert tuple(shape) == (1, *layer.output_shape)
            if codes:
                assert (y[0].dtype.name == "uint8") == (pair == W8A8)  # type: ignore[index]
    x = torch.rand(1, 3, 12, 12)
    for precisions in ([FLOAT32] * 3, [other] * 3):
        assert runtime.network(net, x, precisions)() is not None
    assert runtime.network(net, x, [other, FLOAT32, other])() is not None


def test_an_unknown_runtime_is_refused() -> None:
    with pytest.raises(HardwareError, match="unknown runtime 'onxruntime': did you mean 'onnxruntime'"):
        find_runtime("onxruntime", 1)


def test_the_rest_makes_float_agree_and_errors_are_of_the_sum() -> None:
    _, layers = network()
    times = ((FLOAT32, 10.0), (W8A8, 4.0))
    rows = {(key_of(layer), pair_of(pair)): Row(us, 0.1, 9) for layer in layers for pair, us in times}
    table = Table(rows, {"change_us": "1.5"}, "t.csv")
    whole = {"float": ([FLOAT32] * 3, Timing(36.0, 0.1, 9)), "w8a8": ([W8A8] * 3, Timing(15.0, 0.1, 9))}
    table = _with_rest(table, layers, whole)
    assert table.rest_us(FLOAT32) == pytest.approx((36 - 30) / 3)
    assert table.rest_us(W8A8) == pytest.approx((15 - 12) / 3)
    for name in whole:
        assert _check(name, table, layers, *whole[name]).error == pytest.approx(0.0)
    mixed = _check("mixed", table, layers, [W8A8, FLOAT32, W8A8], Timing(20.0, 0.1, 9))
    assert mixed.sum_us == pytest.approx(4 + 10 + 4 + 1 + 2 + 1 + 2 * 1.5)
    assert mixed.error == pytest.approx(25 / 20 - 1)
    assert _check("w8a8", table, layers, [W8A8] * 3, "there is no kernel").reason == "there is no kernel"


def test_what_layers_in_turn_take_beyond_their_rows_is_of_the_changes() -> None:
    _, layers = network()
    times = ((FLOAT32, 10.0), (W8A8, 4.0))
    rows = {(key_of(layer), pair_of(pair)): Row(us, 0.1, 9) for layer in layers for pair, us in times}
    whole = {
        "float": ([FLOAT32] * 3, Timing(30.0, 0.1, 9)),
        "alternating": ([W8A8, FLOAT32, W8A8], Timing(18.0 + 2 * 2.5, 0.1, 9)),
        "mixed": ([FLOAT32, W8A8, W8A8], Timing(18.0 + 2.5, 0.1, 9)),
    }
    table = _with_change(_with_rest(Table(rows, {}, "t.csv"), layers, whole), layers, whole)
    assert float(table.header["change_us"]) == pytest.approx(2.5)
    assert _check("mixed", table, layers, *whole["mixed"]).error == pytest.approx(0.0)
    for ended in (([W8A8, FLOAT32, W8A8], "it does not load"), ([W8A8, FLOAT32, W8A8], Timing(1.0, 0.1, 9))):
        table = _with_change(table, layers, whole | {"alternating": ended})
        assert table.header["change_us"] == "0"  # not known, or lost in the rows


@pytest.mark.study
def test_a_measured_table_is_gone_on_with_and_is_a_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def quick(call, clock, most_s=0.0) -> Timing:
        call()
        calls.append("")
        return Timing(10.0, 0.1, 9)

    monkeypatch.setattr(measure, "timed_in_turn", lambda calls, clock: [quick(call, clock) for call in calls])
    spec = load_study("digits", ["task.data.val_fraction=0.05", "task.data.test_fraction=0.9"])
    out = tmp_path / "mine.csv"
    first = measure.measure_study(spec, "torch", out)
    layers = {key_of(layer) for layer in measure.open_problem(spec).graph.layers}
    assert {key for key, _ in first.table.rows if key[0] != REST} == layers
    count = len(calls)
    again = measure.measure_study(spec, "torch", out)
    assert len(calls) - count < count - len(layers)  # the wholes alone
    assert again.table.rows.keys() == first.table.rows.keys()
    profile = load_profile(out.with_suffix(".yaml"))
    assert profile.pairs == ("any",)  # that has a row
    out.write_text(out.read_text().replace("# threads: 1", "# threads: 7"))
    with pytest.raises(HardwareError, match=r"was measured otherwise .threads was '7' and is '1'.: give another -o"):
        measure.measure_study(spec, "torch", out)
