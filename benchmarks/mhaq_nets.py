"""Which fronts do MHAQ's networks for super-resolution and detection have? RFDN and YOLO11-n from a checkout, searched.

Each is searched for some minutes by its study in `benchmarks/studies`: RFDN with the checkout's weights and PSNR on
patches, YOLO11-n with random weights and the distance from the float network's outputs alone. Called again, the
searches go on where they ended, for as long again. Prints the fronts beside the uniform ladder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import mpsearch
from benchmarks.mhaq_tasks import Upscaling
from benchmarks.options import PrintOnly, Set, Threads, several
from benchmarks.printing import print_table, say
from mpsearch.api.runs import Front
from mpsearch.errors import MpsearchError, nearest
from mpsearch.observer import Observer
from mpsearch.record import TrialRecord
from mpsearch.task.load import load_task

STUDIES = Path(__file__).parent / "studies"
NETWORKS = ("rfdn", "yolo11n")


def mhaq_nets(
    root: Annotated[Path | None, typer.Option(help="a checkout of github.com/aifoundry-org/MHAQ")] = None,
    networks: Annotated[Sequence[str], several(str, "networks, separated by commas")] = NETWORKS,
    seconds: Annotated[float, typer.Option(help="after which a network gets no new trial", min=1)] = 180,
    runs: Annotated[Path, typer.Option(help="folder of the run folders, one a network")] = Path("runs/mhaq_nets"),
    set_: Set = None,
    threads: Threads = 1,
    only_print: PrintOnly = False,
) -> None:
    if unknown := [name for name in networks if name not in NETWORKS]:
        raise MpsearchError(f"--networks: no network '{unknown[0]}': {nearest(unknown[0], NETWORKS)}")
    if not only_print and root is None:
        raise MpsearchError("a checkout of MHAQ is needed: give --root PATH")
    torch.set_num_threads(threads)
    for name in networks:
        folder = runs / name
        if not only_print:
            search(name, folder, [f"task.args.root={root and root.resolve()}", *(set_ or [])], seconds)
        show(name, mpsearch.front(folder))


def search(name: str, folder: Path, overrides: list[str], seconds: float) -> None:
    """Begin a search, or go on with it where its folder has been begun; its study is then that of the folder."""
    study = STUDIES / f"mhaq-{name}.yaml"
    task: Any = load_task(mpsearch.load_study(study, overrides).task)
    if isinstance(task, Upscaling):
        with torch.inference_mode():
            score = task.evaluate(task.float_model(), "val")
        say(f"{name}: float {score:.2f} dB on val, a bicubic filter {task.bicubic('val'):.2f} dB")
    if (folder / "run.json").exists():
        say(f"{name}: going on with {folder}")
        mpsearch.resume(folder, observer=Progress(name))
    else:
        mpsearch.run(study, folder, time_limit=seconds, set=overrides, observer=Progress(name))


class Progress(Observer):
    """A line for each trial."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_trial_ended(self, record: TrialRecord) -> None:
        say(f"{self.name}: trial {record.number} {record.state}, {record.score}, cost {record.cost}")


def show(name: str, front: Front) -> None:
    """The front, and the uniform ladder, by rising cost."""
    metric = front.pareto.metric
    ended = front.trials
    complete = int((ended.state == "complete").sum())
    print_table(
        f"{name}: {len(ended)} trials, {complete} complete",
        ("trial", "origin", metric.label, "cost", "weight bits", "activation bits", ""),
        (
            (
                str(row["number"]),
                row["origin"],
                metric.number(row["score"]),
                f"{row['relative_cost']:.4f}",
                f"{row['weight_bits']:.1f}",
                f"{row['activation_bits']:.1f}",
                "knee" if row["knee"] else "" if row["on_front"] else "dominated",
            )
            for row in front.table.astype(object).to_dict("records")
        ),
        left=("trial", "origin", ""),
    )
