"""What Vela says of a network becomes rows of a table, and a file of another network does not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from commands import mpsearch as command
from torch import nn

import mpsearch
from mpsearch.errors import HardwareError
from mpsearch.hardware.profile import load_profile
from mpsearch.hardware.table import REST_KEY, pair_of, read_table
from mpsearch.hardware.vela import import_file
from mpsearch.precision import LayerPrecision
from mpsearch.problem import open_problem

HEAD = (
    "TFLite_operator,NNG Operator,SRAM Usage,Peak%,Op Cycles,Network%,NPU,SRAM AC,DRAM AC,OnFlash AC,OffFlash AC,"
    "MAC Count,Network%,Util%,Name"
)
W8A8 = LayerPrecision.shorthand("w8a8")


def line(operator: str, cycles: float, macs: int, name: str) -> str:
    """A row as Vela writes it, with columns of one name twice."""
    return f"{operator},Op,11936,54.65,{cycles},17.6,{cycles},2000.0,0.0,0.0,0.0,{macs},8.7,3.9,{name}"


@pytest.fixture(scope="module")
def graph() -> mpsearch.ModelGraph:
    """Two convolutions of one shape, a depthwise one and a classifier."""
    model = nn.Sequential(
        *(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Flatten(), nn.Linear(64, 10)),
    )
    return mpsearch.inspect_model(model.eval(), torch.randn(2, 4, 8, 8))


LINES = [
    line("CONV_2D", 1000.0, 9216, "a/Relu;a/Conv2D"),
    line("CONV_2D", 1200.0, 9216, "b/Conv2D"),
    line("MAX_POOL_2D", 400.0, 256, "pool"),
    line("DEPTHWISE_CONV_2D", 300.0, 576, "c"),
    line("FULLY_CONNECTED", 700.0, 640, "fc"),
]


def written(path: Path, lines: list[str], head: str = HEAD) -> Path:
    """Two parts of a network, with a head each, as Vela writes them."""
    path.write_text("\n".join([head, *lines[:2], head, *lines[2:]]) + "\n")
    return path


def test_cycles_become_microseconds_by_layer_and_the_rest_is_shared_out(
    graph: mpsearch.ModelGraph, tmp_path: Path
) -> None:
    file, out = written(tmp_path / "net_per-layer.csv", LINES), tmp_path / "ethos.csv"
    import_file(graph, file, W8A8, 500, out)
    table = read_table(out)
    first, second, depthwise, linear = (table.row(layer, W8A8) for layer in graph.layers)
    assert first == second  # one shape, one row: the mean of both
    assert [row and row.median_us for row in (first, depthwise, linear)] == [2.2, 0.6, 1.4]
    assert table.rest_us(W8A8) == pytest.approx(400 / 500 / 4)
    whole = sum(row.median_us * row.n for (key, _), row in table.rows.items() if key != REST_KEY)
    assert whole + 4 * table.rest_us(W8A8) == pytest.approx(3600 / 500)
    assert load_profile(tmp_path / "ethos.yaml").name == "ethos"
    w8a16 = LayerPrecision.shorthand("w8a16")
    import_file(graph, file, w8a16, 250, out)
    table = read_table(out)
    assert {pair for _, pair in table.rows} == {pair_of(W8A8), pair_of(w8a16)}
    assert table.rest_us(w8a16) == 2 * table.rest_us(W8A8)


@pytest.mark.parametrize(
    ("lines", "head", "message"),
    [
        (LINES[:3], HEAD, r"no operator for '4' \(conv2d, 576 MACs a sample\).*another network.*Left are none"),
        (
            [*LINES, line("CONV_2D", 5, 77, "more")],
            HEAD,
            r"that no layer of the network is: more \(77 MACs\)",
        ),
        ([line("CONV_2D", 1, 9217, "a"), *LINES[1:]], HEAD, r"no operator for '2' .*Left are a \(9,217 MACs\)"),
        (LINES, HEAD.replace("MAC Count", "MACs"), "line 1 has no column MAC Count"),
        (LINES, "a,b", "line 1 is no head of columns"),
        ([LINES[0].replace("1000.0", "nan"), *LINES[1:]], HEAD, "line 2: Op Cycles is 'nan'"),
        ([LINES[0] + ",1", *LINES[1:]], HEAD, "line 2 has 16 values for 15 columns"),
        ([LINES[2]], HEAD, "has no layer"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    graph: mpsearch.ModelGraph, tmp_path: Path, lines: list[str], head: str, message: str
) -> None:
    file = written(tmp_path / "net_per-layer.csv", lines, head)
    with pytest.raises(HardwareError, match=message):
        import_file(graph, file, W8A8, 500, tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


def test_a_study_is_searched_with_what_was_imported(tmp_path: Path) -> None:
    layers = open_problem(mpsearch.load_study("digits")).graph.quantizable
    operators = {"conv2d": "CONV_2D", "linear": "FULLY_CONNECTED"}
    lines = [
        line("DEPTHWISE_CONV_2D" if layer.depthwise else operators[layer.kind], layer.macs / 8, layer.macs, layer.name)
        for layer in layers
    ]
    written(tmp_path / "net_per-layer.csv", lines)
    said = ("digits", "net_per-layer.csv", "--clock-mhz", "400", "-o", "ethos.csv")
    done = command("hardware", "import-vela", *said, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    wide = ("--pair", "w8a16", "--clock-mhz", "200", "-o", "ethos.csv")  # as slow again
    assert command("hardware", "import-vela", *said[:2], *wide, cwd=tmp_path).returncode == 0
    sets = ("--set", "hardware=ethos.yaml", "--set", "cost.model=table", "--set", "space=full")
    done = command("check", "digits", *sets, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"Cost 1 is [\d.]+ (us|ms) a sample: the network at w8a8", done.stdout)
    assert "cost 1 to 2" in done.stdout  # W8A8 and W8A16 everywhere: what has no row is not searched
    done = command("hardware", "import-vela", *said[:2], "--clock-mhz", "0", "-o", "x.csv", cwd=tmp_path)
    assert done.returncode == 2
    assert "positive number" in done.stderr
