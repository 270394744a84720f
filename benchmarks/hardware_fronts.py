"""Searches for hardware: a runtime with two pairs, a core with nine, an NPU for a network with outliers, three limits.

Each case is a run of the command line of `--minutes`; its row holds the front in all costs, what the knee gains over
W8A8 and float, how many layers of the knee have which pair, and how many configs of the front the hardware cannot run:
none, or the row is refused. `outliers` needs the wide pairs of its hardware: in some blocks two channels are a hundred
times as large as the others and the weights behind them a hundredth, which in float is the same network.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file
from torch import nn

import mpsearch
from benchmarks.options import RESULTS, Results, Set, Study, several
from benchmarks.printing import say
from benchmarks.rows import Row, Rows, RowsError
from mpsearch.facts import read_facts
from mpsearch.hardware.profile import Allowed, load_profile
from mpsearch.precision import LayerPrecision
from mpsearch.problem import open_problem
from mpsearch.record import RunFolder
from mpsearch.study import load_study

OUTLIER = 100.0
CHANNELS = 2
BLOCKS = 3

FEW_PAIRS = ["warm_start.method=none", "warm_start.ilp=true"]
"""Where no tensor has more than two widths there is nothing to descend."""

CASES: Mapping[str, list[str]] = {
    "onnxruntime-cpu": [
        "hardware=onnxruntime-cpu",
        "cost.model=table",
        *FEW_PAIRS,
        "warm_start.budgets=[1.6, 1.3, 1.1]",
    ],
    "mpic": ["hardware=mpic", "cost.model=table", "warm_start.budgets=[0.6, 0.5, 0.42, 0.36]"],
    "outliers": ["hardware=w8a16-npu", "cost.model=bops", *FEW_PAIRS, "warm_start.budgets=[1.7, 1.3, 1.1]"],
    "limits": [
        "hardware=generic",
        "cost.limits={weight_bytes: 40 %, activation_bytes: 60 %, shift_energy: 0.35}",
        "warm_start.budgets=[0.35, 0.3, 0.25, 0.2]",
    ],
}


def hardware_fronts(
    study: Study = "resnet20-cifar10-jpeg",
    cases: Annotated[Sequence[str], several(str, f"cases of {', '.join(CASES)}")] = tuple(CASES),
    minutes: Annotated[float, typer.Option(help="minutes of one search, warm start included")] = 12.0,
    set_: Set = None,
    work: Annotated[Path, typer.Option(help="folder that keeps the runs")] = Path(".hardware_fronts"),
    results: Results = RESULTS / "hardware_fronts.jsonl",
) -> None:
    rows = Rows(results, key=("study", "minutes", "case"))
    for case in rows.missing({"study": study, "minutes": minutes, "case": name} for name in cases):
        if case["case"] not in CASES:
            raise typer.BadParameter(f"unknown case '{case['case']}': one of {', '.join(CASES)}")
        settings = ["space=full", *CASES[case["case"]], "engine.address=none", *(set_ or [])]
        checkpoint: list[str] = []  # of this machine, and in no row
        if case["case"] == "outliers":
            checkpoint = [f"task.checkpoint={with_outliers(study, set_ or [], work / f'{study}-outliers.safetensors')}"]
        run = work / f"{study}-{minutes:g}min-{case['case']}"
        command = [str(Path(sys.executable).parent / "mpsearch"), "resume", str(run)]
        if not (run / "run.json").exists():
            command = [*command[:1], "run", study, "--out", str(run), "--time-limit", f"{round(60 * minutes)}s"]
            command += [part for setting in [*settings, *checkpoint] for part in ("--set", setting)]
        if not (run / "report.html").exists():
            say(" ".join(command))
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        rows.append(case | {"settings": settings} | front_of(run))
    for row in rows.select({"study": study, "minutes": minutes, "case": name} for name in cases):
        print(f"{row['case']}: {row['trials']} trials; knee {row['knee_pairs']}")
        print("\n".join(f"    {line}" for line in row["answer"]))


def front_of(run: Path) -> Row:
    """What a run came to. Raises RowsError if its front holds a config that its hardware does not run."""
    folder, front = RunFolder.open(run), mpsearch.front(run)
    facts, profile = read_facts(folder), load_profile(str(run / "hardware.yaml"))
    layers = {layer.name: layer for layer in facts.graph.quantizable}
    for trial in front.pareto:
        for name, pair in trial.config.items():
            if not Allowed(profile.pairs, profile.granularity, layers[name])(pair):
                raise RowsError(f"{run}: trial {trial.number} has {name} at {pair}, which {profile.name} does not run")
        if not facts.cost.within_limits(trial.config):
            raise RowsError(f"{run}: trial {trial.number} of the front is beyond a limit")
    knee = front.pareto.knee
    table = front.table[front.table.on_front]
    created_s = json.loads((run / "run.json").read_text(encoding="utf-8"))["created_s"]
    ended_s = max(record.started_s + record.wall.total_s for record in front.records)
    return {
        "trials": len(front.records),
        "run_s": round(ended_s - created_s),  # a run may have been resumed
        "float": facts.float_scores.get("val"),
        "front": [
            {"trial": int(row["number"]), "origin": row["origin"], "score": row["score"], "cost": row["relative_cost"]}
            for row in table.to_dict("records")
        ],
        "knee": knee.number if knee else None,
        "knee_pairs": dict(Counter(map(short, knee.config.values())).most_common()) if knee else {},
        "answer": list(front.answer),
    }


def short(pair: LayerPrecision) -> str:
    """A pair of precisions, in a word.

    >>> short(LayerPrecision.shorthand("w4a8")), short(LayerPrecision.parse("float16", "float16"))
    ('w4a8', 'float16')
    >>> short(LayerPrecision.parse("shift:3", "uniform:8"))
    'shift:3 x a8'
    """
    weight, activation = (f"{p.quantizer}:{p.bits}" if p.has_scale else str(p) for p in (pair.weight, pair.activation))
    if weight == activation and not pair.weight.has_scale:
        return weight
    weight, activation = weight.replace("uniform:", "w"), activation.replace("uniform:", "a")
    return f"{weight}{activation}" if weight[0] == "w" and activation[0] == "a" else f"{weight} x {activation}"


def with_outliers(study: str, overrides: list[str], path: Path) -> Path:
    """A checkpoint of the study's float network in which some channels between two layers are very large."""
    problem = open_problem(load_study(study, overrides))
    model = problem.task.float_model().cpu()
    x = problem.task.calibration_input(8)
    with torch.no_grad():
        before = model(x)
        pairs = [pair for module in model.modules() if (pair := norm_and_layer(module)) is not None]
        changed: list[tuple[nn.BatchNorm2d, nn.Conv2d]] = []
        for pair in pairs:
            enlarge(*pair)
            if len(changed) < BLOCKS and torch.allclose(model(x), before, rtol=1e-3, atol=1e-3):
                changed.append(pair)
            else:  # the layer does not read that norm, or reads it with others
                enlarge(*pair, 1 / OUTLIER)
        assert changed, "no norm is read by one layer alone"
        torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-3)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return path.resolve()


def enlarge(norm: nn.BatchNorm2d, layer: nn.Conv2d, factor: float = OUTLIER) -> None:
    """Make the first channels of a BatchNorm larger, and the weights that read them smaller."""
    norm.weight[:CHANNELS] *= factor
    norm.bias[:CHANNELS] *= factor
    layer.weight[:, :CHANNELS] /= factor


def norm_and_layer(block: nn.Module) -> tuple[nn.BatchNorm2d, nn.Conv2d] | None:
    """The first BatchNorm of a block, and the layer that reads it through a ReLU; None where there are none."""
    norm, layer = getattr(block, "bn1", None), getattr(block, "conv2", None) or getattr(block, "pointwise", None)
    return (norm, layer) if isinstance(norm, nn.BatchNorm2d) and isinstance(layer, nn.Conv2d) else None
