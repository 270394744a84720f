"""Which of our configs beat other mixed-precision tools on the same ResNet-20, at no more BOPs?

    python benchmarks/peers.py [--points benchmarks/results/search_quality.csv] [--arm full]
        [--study resnet20-cifar10-jpeg]

`results/peers.csv` has the others: AIMET, Sony MCT and ModelOpt on the checkpoint and images of that study, one seed, 2
cores; their search, then 100 steps of batch 128, distilled (400 where it says so). BOPs are relative to 32-bit float,
all layers counted. Ours are the finally trained points of `benchmarks/search_quality.py`, searched for another cost.
A peer's row is beaten by a point with no more BOPs, and with more accuracy on val and on test.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from mpsearch.cost.model import RelativeCost
from mpsearch.precision import LayerPrecision, PrecisionConfig
from mpsearch.problem import open_problem
from mpsearch.study import load_study

RESULTS = Path(__file__).parent / "results"
W8A8 = 100 * 8 * 8 / (32 * 32)  # percent of float's BOPs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=Path, default=RESULTS / "search_quality.csv")
    parser.add_argument("--arm", default="full")
    parser.add_argument("--study", default="resnet20-cifar10-jpeg")
    options = parser.parse_args()
    problem = open_problem(load_study(options.study))
    bops = RelativeCost(problem.graph.layers, "bops", "w8a8")
    points = pd.read_csv(options.points)
    points = points[(points.study == options.study) & (points.arm == options.arm)]

    def percent(layers: str) -> float:
        pairs = {name: text.split(" x ") for name, text in json.loads(layers).items()}
        config = {name: LayerPrecision.parse(*(part.split("/")[0] for part in pair)) for name, pair in pairs.items()}
        return W8A8 * bops(PrecisionConfig(config))

    points = points.assign(bops=points.layers.map(percent))
    table = Table(title=f"other tools, and the best of ours within their BOPs ({points.seed.nunique()} seeds)")
    for column in ("tool", "BOPs, %", "val / test", "ours: BOPs, %", "val / test", "seed", "beaten"):
        table.add_column(column, justify="left" if column == "tool" else "right")
    for peer in pd.read_csv(RESULTS / "peers.csv").itertuples():
        within = points[points.bops <= peer.bops_percent * (1 + 1e-9)]
        row = [f"{peer.peer} {peer.setting}", f"{peer.bops_percent:.2f}", f"{peer.val:.2f} / {peer.test:.2f}"]
        if within.empty:
            table.add_row(*row, "none", "", "", "no")
            continue
        best = within.loc[within.val.idxmax()]
        beaten = 100 * best.val > peer.val and 100 * best.test > peer.test
        ours = f"{100 * best.val:.2f} / {100 * best.test:.2f}"
        table.add_row(*row, f"{best.bops:.2f}", ours, str(best.seed), "yes" if beaten else "no")
    Console(width=130).print(table)
    print("command: python " + " ".join(sys.argv))


if __name__ == "__main__":
    main()
