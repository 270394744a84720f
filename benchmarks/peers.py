"""Which of our configs beat other mixed-precision tools on the same ResNet-20, at no more BOPs?

`results/peers.csv` has the others: AIMET, Sony MCT and ModelOpt on the checkpoint and images of that study, one seed, 2
cores; their search, then 100 steps of batch 128, distilled (400 where it says so). BOPs are relative to 32-bit float,
all layers counted. Ours are the finally trained points of `search_quality`, searched for another cost, with those of
the uniform ladder and of `RESULTS-dear.csv`, which are above W4A4 (`search_quality --bits 8,6`). A peer's row is beaten
by a point with no more BOPs, and with more accuracy on val and on test. Reads rows and measures nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from benchmarks import configs
from benchmarks.options import RESULTS, Set, Study
from benchmarks.printing import print_table
from benchmarks.rows import Rows, RowsError
from mpsearch.cost.model import RelativeCost
from mpsearch.graph.facts import LayerInfo
from mpsearch.problem import open_problem
from mpsearch.study import load_study

LADDER = "uniform"
"""The arm of the uniform ladder, which each search trains too, with the same seed to the same end."""

W8A8 = 100 * 8 * 8 / (32 * 32)  # percent of float's BOPs
COLUMNS = ("tool", "BOPs, %", "val / test", "ours: BOPs, %", "val / test", "seed", "beaten")


def peers(
    points: Annotated[Path, typer.Option(help="rows of search_quality")] = RESULTS / "search_quality.csv",
    arm: Annotated[str, typer.Option(help="arm of search_quality")] = "full",
    study: Study = "resnet20-cifar10-jpeg",
    set_: Set = None,
) -> None:
    layers = open_problem(load_study(study, set_ or ())).graph.layers
    ours = priced(points, arm, study, layers)
    show(beside(ours), ours)


def priced(points: Path, arm: str, study: str, layers: Sequence[LayerInfo]) -> pd.DataFrame:
    """Our points of one study and arm, with their BOPs in percent of float's.

    Raises:
        RowsError: there is none.
    """
    bops = RelativeCost(layers, "bops", "w8a8")
    files = (points, points.with_name(f"{points.stem}-dear.csv"))  # the second: points above W4A4
    rows = [row for file in files for row in Rows(file, key=("study", "arm", "seed", "number")).read()]
    ours = pd.DataFrame([row for row in rows if row["study"] == study and row["arm"] in (arm, LADDER)])
    if ours.empty or arm not in set(ours.arm):
        raise RowsError(f"{points} has no row of study {study} and arm {arm}: make them by `search_quality --arms`")
    known = configs.read(points.parent)
    return ours.assign(bops=[W8A8 * bops(known[digest]) for digest in ours.config])


def beside(ours: pd.DataFrame) -> list[list[str]]:
    """A line a row of the other tools: what it is, and the best of ours within its BOPs."""
    lines = []
    for peer in Rows(RESULTS / "peers.csv", key=("peer", "setting")).read():
        within = ours[ours.bops <= peer["bops_percent"] * (1 + 1e-9)]
        line = [f"{peer['peer']} {peer['setting']}", f"{peer['bops_percent']:.2f}"]
        line.append(f"{peer['val']:.2f} / {peer['test']:.2f}")
        if within.empty:
            lines.append([*line, "none", "", "", "no"])
            continue
        best = within.loc[within.val.idxmax()]
        beaten = 100 * best.val > peer["val"] and 100 * best.test > peer["test"]
        scores = f"{100 * best.val:.2f} / {100 * best.test:.2f}"
        lines.append([*line, f"{best.bops:.2f}", scores, str(best.seed), "yes" if beaten else "no"])
    return lines


def show(lines: list[list[str]], ours: pd.DataFrame) -> None:
    """The table."""
    print_table(
        f"other tools, and the best of ours within their BOPs ({ours.seed.nunique()} seeds)",
        COLUMNS,
        lines,
    )
