"""What each method of the three documents costs in accuracy and time: one row a method.

Prints one table: validation and test accuracy, the difference from the float network (mean and deviation over seeds),
minutes, command. `--epochs` replaces those of the rows: other networks need other ones. The teacher's answers to the
training batches are computed by the first row of a process and kept for the others, as trials of a search keep them.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import torch
import typer

from benchmarks.options import RESULTS, PrintOnly, Results, Seeds, Study, Threads, several
from benchmarks.printing import print_table, say, spread
from benchmarks.rows import Row, Rows
from benchmarks.stopwatch import Stopwatch
from mpsearch.errors import nearest
from mpsearch.precision import LayerPrecision, PrecisionConfig
from mpsearch.problem import Problem, open_problem
from mpsearch.ptq.pipeline import PtqMethod, ptq
from mpsearch.qat.gdnsq import GdnsqMethod, gdnsq
from mpsearch.qat.pipeline import qat
from mpsearch.qat.trained import Trained
from mpsearch.quant.shift import SlopeSchedule
from mpsearch.study import load_study
from mpsearch.task.task import Split
from mpsearch.train import Teacher
from mpsearch.workbench import Workbench


@dataclass(frozen=True)
class Method:
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


def _gdnsq(target: str, epochs: float, **options: Any) -> Method:
    return Method("gdnsq", target, epochs, options)


SPLITS: tuple[Split, ...] = ("val", "test")

SHORT = 1.5  # epochs of the rows that are only compared with each other

ROWS: dict[str, Method] = {
    "ptq-w8a8": Method("ptq", "w8a8"),
    "ptq-w4a8-adaround": Method("ptq", "w4a8"),
    "ptq-w4a8-nearest": Method("ptq", "w4a8", options={"rounding": "nearest"}),
    "ptq-w8a8-data-free": Method("ptq", "w8a8", options={"data_free": True}),
    "qat-w4a4": Method("qat", "w4a4", 5),
    "qat-w4a4-per-tensor": Method("qat", "uniform:4/tensor x uniform:4", 5),
    "apot-w4a4": Method("qat", "apot:4 x apot:4", 3),
    "shift-w4": Method("qat", "shift:4 x float", 4, {"slope": (4, 64)}),
    "shift-w4-ste": Method("qat", "shift:4 x float", SHORT, {"shift_gradient": "ste"}),
    "shift-w4-dsq": Method("qat", "shift:4 x float", SHORT, {"shift_gradient": "dsq", "slope": (4, 64)}),
    "shift-w4a4": Method("qat", "shift:4 x shift:4", SHORT, {"shift_gradient": "ste"}),
    **{
        f"ablation-shift-w4-slope-{start}-{end}": Method("qat", "shift:4 x float", SHORT, {"slope": (start, end)})
        for start, end in ((4, 16), (4, 64), (4, 128), (16, 64), (64, 64))
    },
    "ablation-qat-w3a3": Method("qat", "w3a3", SHORT),
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


def methods(
    rows: Annotated[Sequence[str], several(str, "methods, by the names of their rows")] = tuple(ROWS),
    study: Study = "resnet20-cifar10-jpeg",
    seeds: Seeds = (0,),
    epochs: Annotated[float | None, typer.Option(help="epochs of training, in place of those of each row")] = None,
    threads: Threads = 1,
    results: Results = RESULTS / "methods.jsonl",
    only_print: PrintOnly = False,
) -> None:
    torch.set_num_threads(threads)
    if unknown := [name for name in rows if name not in ROWS]:
        raise typer.BadParameter(f"unknown row {unknown[0]}: {nearest(unknown[0], ROWS)}")
    kept = Rows(results, key=("row", "study", "seed", "epochs"))
    wanted = {name: ROWS[name] if epochs is None else replace(ROWS[name], epochs=epochs) for name in rows}
    cases = [
        {"row": name, "study": study, "seed": seed, "epochs": row.epochs}
        for seed in seeds
        for name, row in wanted.items()
    ]
    runner: Runner | None = None
    for case in kept.missing([] if only_print else cases):
        row = wanted[case["row"]]
        runner = runner or Runner(study)
        say(f"{case['row']}: {row}, seed {case['seed']}")
        command = f"python -m benchmarks methods --study {study} --rows {case['row']}"
        command += "" if epochs is None else f" --epochs {epochs:g}"
        line = case | runner.run(row, case["seed"]) | {"command": command}
        kept.append(line)
        say(f"{case['row']}: val {line['val']:.2f}, test {line['test']:.2f}")
    show(kept.read(), study)


class Runner:
    """Runs rows; what they share is made once."""

    def __init__(self, study: str) -> None:
        self.problem: Problem = open_problem(load_study(study))
        self.task = self.problem.task
        float_model = self.task.float_model()
        self.float = {split: self.task.evaluate(float_model, split) for split in SPLITS}
        self.teacher: Teacher | None = None

    def run(self, row: Method, seed: int) -> Row:
        """A line of the results file."""
        torch.manual_seed(seed)
        with Stopwatch() as watch:
            trained = self._train(row, seed)
        return {
            "val": 100 * self.task.evaluate(trained.model, "val"),
            "test": 100 * self.task.evaluate(trained.model, "test"),
            "float_val": 100 * self.float["val"],
            "float_test": 100 * self.float["test"],
            "minutes": watch.wall_s / 60,
            "cpu_minutes": watch.cpu_s / 60,
            "threads": torch.get_num_threads(),
            "notes": list(trained.notes),
            "log": list(trained.log),
        }

    def _train(self, row: Method, seed: int) -> Trained:
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
        say(f"  step {step}, loss {loss:.4f}")


def show(lines: list[Row], study: str) -> None:
    """The table of one study."""
    lines = [line for line in lines if line["study"] == study]
    if not lines:
        return
    order = {name: index for index, name in enumerate(ROWS)}
    groups: dict[tuple[str, float], list[Row]] = {}
    for line in sorted(lines, key=lambda line: order.get(line["row"], len(order))):
        groups.setdefault((line["row"], line["epochs"]), []).append(line)
    print_table(
        f"{study}: float {lines[0]['float_val']:.2f} % val, {lines[0]['float_test']:.2f} % test",
        ("method", "epochs", "seeds", "val - float", "test - float", "minutes", "command"),
        (
            (
                name,
                f"{epochs:g}",
                str(len(seeds)),
                *(spread([line[split] - line[f"float_{split}"] for line in seeds], sign="+") for split in SPLITS),
                f"{statistics.fmean(line['minutes'] for line in seeds):.1f}",
                seeds[0]["command"],
            )
            for (name, epochs), seeds in groups.items()
        ),
        left=("method", "command"),
    )
