"""What each method of the three documents costs in accuracy and time: one row a method.

    python benchmarks/methods.py [--rows gdnsq-w4a4,...] [--study resnet20-cifar10-jpeg] [--seeds 0] [--threads 1]
        [--epochs N] [--results benchmarks/results/methods.jsonl] [--print]

Rows that the results file has (same row, seed, study and epochs) are not run again; `--print` runs none. Prints one
table: validation and test accuracy, the difference from the float network (mean and deviation over seeds), minutes,
command. `--epochs` replaces those of the rows: other networks need other ones. The teacher's answers to the
training batches are computed by the first row of a process and kept for the others, as trials of a search keep them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mpsearch.precision import LayerPrecision, PrecisionConfig
from mpsearch.problem import Problem, open_problem
from mpsearch.ptq.pipeline import PtqMethod, ptq
from mpsearch.qat.gdnsq import GdnsqMethod, gdnsq
from mpsearch.qat.pipeline import qat
from mpsearch.qat.trained import Trained
from mpsearch.quant.shift import SlopeSchedule
from mpsearch.study import load_study
from mpsearch.train import Teacher
from mpsearch.workbench import Workbench


@dataclass(frozen=True)
class Row:
    """One training or quantization."""

    method: str
    target: str  # `w4a4` or `shift:4 x float`
    epochs: float = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def precision(self) -> LayerPrecision:
        """The target of every layer that the space does not fix."""
        weight, x, activation = self.target.partition(" x ")
        return LayerPrecision.parse(weight, activation) if x else LayerPrecision.shorthand(self.target)


def _gdnsq(target: str, epochs: float, **options: Any) -> Row:
    return Row("gdnsq", target, epochs, options)


SHORT = 1.5  # epochs of the rows that are only compared with each other

ROWS: dict[str, Row] = {
    "ptq-w8a8": Row("ptq", "w8a8"),
    "ptq-w4a8-adaround": Row("ptq", "w4a8"),
    "ptq-w4a8-nearest": Row("ptq", "w4a8", options={"rounding": "nearest"}),
    "ptq-w8a8-data-free": Row("ptq", "w8a8", options={"data_free": True}),
    "qat-w4a4": Row("qat", "w4a4", 5),
    "qat-w4a4-per-tensor": Row("qat", "uniform:4/tensor x uniform:4", 5),
    "apot-w4a4": Row("qat", "apot:4 x apot:4", 3),
    "shift-w4": Row("qat", "shift:4 x float", 4, {"slope": (4, 64)}),
    "shift-w4-ste": Row("qat", "shift:4 x float", SHORT, {"shift_gradient": "ste"}),
    "shift-w4-dsq": Row("qat", "shift:4 x float", SHORT, {"shift_gradient": "dsq", "slope": (4, 64)}),
    "shift-w4a4": Row("qat", "shift:4 x shift:4", SHORT, {"shift_gradient": "ste"}),
    **{
        f"ablation-shift-w4-slope-{start}-{end}": Row("qat", "shift:4 x float", SHORT, {"slope": (start, end)})
        for start, end in ((4, 16), (4, 64), (4, 128), (16, 64), (64, 64))
    },
    "ablation-qat-w3a3": Row("qat", "w3a3", SHORT),
    "gdnsq-w4a4": _gdnsq("w4a4", 5),
    "gdnsq-w3a3": _gdnsq("w3a3", 6),
    "gdnsq-w2a2": _gdnsq("w2a2", 8),
    "gdnsq-w1a1": _gdnsq("w1a1", 4),
    "ablation-gdnsq": _gdnsq("w3a3", SHORT),
    "ablation-gdnsq-gradual": _gdnsq("w3a3", SHORT, gradual=True, range_lr=5e-4),
    "ablation-gdnsq-no-distillation": _gdnsq("w3a3", SHORT, distill=False),
    "ablation-gdnsq-no-anneal": _gdnsq("w3a3", SHORT, anneal=False),
    "ablation-gdnsq-noise": _gdnsq("w3a3", SHORT, step_gradient="noise"),
    "ablation-gdnsq-both": _gdnsq("w3a3", SHORT, step_gradient="both"),
    "ablation-gdnsq-ewgs": _gdnsq("w3a3", SHORT, round_gradient="ewgs"),
    "ablation-gdnsq-aewgs": _gdnsq("w3a3", SHORT, round_gradient="aewgs"),
    "ablation-gdnsq-min-grid": _gdnsq("w3a3", SHORT, weight_grid="min"),
    "ablation-gdnsq-fast-ranges": _gdnsq("w3a3", SHORT, range_lr=5e-4),
    "ablation-gdnsq-radam": _gdnsq("w3a3", SHORT, optimizer="radam", lr=2e-3),
}


class Runner:
    """Runs rows; what they share is made once."""

    def __init__(self, study: str) -> None:
        self.problem: Problem = open_problem(load_study(study))
        self.task = self.problem.task
        float_model = self.task.float_model()
        self.float = {split: self.task.evaluate(float_model, split) for split in ("val", "test")}
        self.teacher: Teacher | None = None

    def run(self, row: Row, seed: int) -> dict[str, Any]:
        """A line of the results file."""
        began, cpu = time.perf_counter(), time.process_time()
        torch.manual_seed(seed)
        trained = self._train(row, seed)
        minutes, cpu_minutes = (time.perf_counter() - began) / 60, (time.process_time() - cpu) / 60
        return {
            "val": 100 * self.task.evaluate(trained.model, "val"),
            "test": 100 * self.task.evaluate(trained.model, "test"),
            "float_val": 100 * self.float["val"],
            "float_test": 100 * self.float["test"],
            "minutes": minutes,
            "cpu_minutes": cpu_minutes,
            "threads": torch.get_num_threads(),
            "notes": list(trained.notes),
            "log": list(trained.log),
        }

    def _train(self, row: Row, seed: int) -> Trained:
        config = self.problem.space.everywhere(row.precision)
        options = dict(row.options)
        if row.method == "ptq":
            data_free = options.pop("data_free", False)
            batch = None if data_free else self.task.calibration_input(512)
            result = ptq(self.task.float_model(), config, batch, PtqMethod(**options))
            return Trained(result.model, result.layers, result.config, result.seconds, notes=result.notes)
        spec = self.problem.spec.trial
        steps = round(row.epochs * self.task.steps_per_epoch(spec.batch_size))
        distill = options.pop("distill", True)
        settings = spec.model_copy(update={"steps": steps, "seed": seed, "distill": distill})
        if row.method == "gdnsq":
            return gdnsq(self.task, config, self._workbench(settings, None), steps, seed, GdnsqMethod(**options), _say)
        if "slope" in options:
            options["slope"] = SlopeSchedule(*options["slope"])
        return qat(self.task, config, settings, _say, self._workbench(settings, config), **options)

    def _workbench(self, settings: Any, config: PrecisionConfig | None) -> Workbench:
        workbench = Workbench(self.task, settings, offers={} if config is None else config.offers)
        if self.teacher is None:
            self.teacher = workbench.teacher
        workbench.teacher = self.teacher
        return workbench


def _say(step: int, loss: float) -> None:
    if step % 200 == 0:
        print(f"  step {step}, loss {loss:.4f}, {time.strftime('%H:%M:%S')}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--study", default="resnet20-cifar10-jpeg")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "methods.jsonl")
    parser.add_argument("--print", action="store_true", dest="only_print")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.results.parent.mkdir(exist_ok=True)
    runner: Runner | None = None
    rows = [] if options.only_print else options.rows.split(",")
    for name, seed in ((name, int(seed)) for seed in options.seeds.split(",") for name in rows):
        row = ROWS[name] if options.epochs is None else replace(ROWS[name], epochs=options.epochs)
        key = {"row": name, "study": options.study, "seed": seed, "epochs": row.epochs}
        if any(all(line[k] == v for k, v in key.items()) for line in _read(options.results)):
            continue
        runner = runner or Runner(options.study)
        print(f"{name}: {row}, seed {seed}", file=sys.stderr, flush=True)
        command = f"python benchmarks/methods.py --study {options.study} --rows {name}"
        command += "" if options.epochs is None else f" --epochs {options.epochs:g}"
        line = {**key, **runner.run(row, seed), "command": command}
        with options.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{name}: val {line['val']:.2f}, test {line['test']:.2f}", file=sys.stderr, flush=True)
    _print(_read(options.results), options.study)


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _print(lines: list[dict[str, Any]], study: str) -> None:
    lines = [line for line in lines if line["study"] == study]
    if not lines:
        return
    title = f"{study}: float {lines[0]['float_val']:.2f} % val, {lines[0]['float_test']:.2f} % test"
    table = Table(title=title)
    for column in ("method", "epochs", "seeds", "val - float", "test - float", "minutes", "command"):
        table.add_column(column, justify="left" if column in ("method", "command") else "right")
    order = {name: index for index, name in enumerate(ROWS)}
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for line in sorted(lines, key=lambda line: order.get(line["row"], len(order))):
        groups.setdefault((line["row"], line["epochs"]), []).append(line)
    for (name, epochs), seeds in groups.items():
        losses = [_spread([line[split] - line[f"float_{split}"] for line in seeds]) for split in ("val", "test")]
        minutes = statistics.fmean(line["minutes"] for line in seeds)
        table.add_row(name, f"{epochs:g}", str(len(seeds)), *losses, f"{minutes:.1f}", seeds[0]["command"])
    Console(width=150).print(table)
    print("command: python " + " ".join(sys.argv))


def _spread(values: list[float]) -> str:
    mean = f"{statistics.fmean(values):+.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


if __name__ == "__main__":
    main()
