"""Does mpsearch work, and how fast, on a graphics card? One command, under 8 minutes, that says pass or fail.

A section is a process of its own with a time limit: one that fails or hangs is a line of the table, and the others
still run. Its row is on the disk when it ends, and what has passed is not measured again.

- `tests`: those marked `gpu`.
- `quantizers`: every type and width on the card against the CPU, forward and gradient, eager and compiled.
- `step-128`, `step-1024`: the training step of a ResNet-20, float, quantized, and with a teacher (`train_step`), once
  passes are captured, and what a training takes until then.
- `data`: whether batches are made on the card, and what one costs.
- `prescreen`: untrained configs scored a second.
- `digits-2`, `resnet20-2`: a whole study, two trials on the card at a time, each with half of it; the ResNet-20's warm
  start is a short one.
- `digits-4`, `resnet20-4`: four at a time, without a warm start.

The ResNet-20 needs images and a checkpoint (`studies/resnet20-cifar10-jpeg.yaml`); without them it is not run. With
`--device cpu` the same is measured on the CPU, for trying out the benchmark itself.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor

from benchmarks import train_step
from benchmarks.options import RESULTS, Results, several
from benchmarks.printing import print_table, say
from benchmarks.rows import MEASURED, ROOT, Row, Rows
from mpsearch.compiler import compiler_missing
from mpsearch.errors import MpsearchError
from mpsearch.precision import BITS, Precision
from mpsearch.problem import open_problem
from mpsearch.quant.checked import given_up
from mpsearch.quant.fused import fuse
from mpsearch.quant.ranges import activation_range, weight_step
from mpsearch.quant.switch import make_quantizer
from mpsearch.record import RunFolder
from mpsearch.search.run import run_study
from mpsearch.study import load_study
from mpsearch.train import to_device
from mpsearch.warmstart.start_score import StartScorer
from mpsearch.workbench import Workbench

STEP_GOAL, TEACHER_GOAL = 1.3, 1.6
"""Times the float step that a quantized step may take, and one with the teacher's forward pass."""
FORWARD_GOAL, GRADIENT_GOAL = 1e-5, 1e-4
"""Largest difference between card and CPU, as a share of the largest value, or of the sum of magnitudes that a gradient
of a range is the sum of: sums are in another order there, and some are zero on one side alone. Elements that round to
the neighbouring level may be HALFWAY of all."""
HALFWAY = 1e-3
ROUNDING = 2.0**-22 / GRADIENT_GOAL
"""What rounding x/s in float32 may add to such a term, in GRADIENT_GOALs of a step: at 16 bits x/s is up to 32,768."""
STEPS = 100
"""Of a round: those of a trial of the ResNet-20's study."""
QUICK_WARM_START = (
    "warm_start.steps=60",
    "warm_start.budgets=[0.384,0.25,0.2]",
    "warm_start.ilp=false",
    "warm_start.combinations=0",
    "search.prescreen=50",
)
"""Of the ResNet-20's study: trials, too, are to have time."""


@dataclass(frozen=True)
class Check:
    """One line of the table: what was measured, and whether that is as it should be; `passed` None: no goal."""

    what: str
    figure: str
    goal: str = ""
    passed: bool | None = None


@dataclass(frozen=True)
class Setting:
    """What the sections are given."""

    device: torch.device
    seconds: float  # of a study
    sets: tuple[str, ...]
    resnet20: tuple[str, ...]  # overrides of its study; empty: it cannot be run


def gpu(
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the benchmark out")] = "cuda",
    seconds: Annotated[float, typer.Option(help="seconds after which a study starts no trial")] = 40,
    sections: Annotated[Sequence[str], several(str, "sections to run; all if none is given")] = (),
    images: Annotated[str, typer.Option(help="folder of the ResNet-20's images, {train,val,test}/<class>/*.jpg")] = "",
    checkpoint: Annotated[str, typer.Option(help="the ResNet-20's state dict")] = "",
    set_: Annotated[list[str] | None, typer.Option("--set", help="KEY.PATH=VALUE over both study files")] = None,
    limit: Annotated[float, typer.Option(help="seconds after which a section is ended")] = 150,
    total: Annotated[float, typer.Option(help="seconds after which no section is started, and one is ended")] = 470,
    inside: Annotated[bool, typer.Option("--inside", help="run the sections in this process, without limits")] = False,
    results: Results = RESULTS / "gpu.jsonl",
) -> None:
    if device not in ("cuda", "cpu"):
        raise MpsearchError(f"--device: got {device}, expected cuda or cpu")
    if unknown := [name for name in sections if name not in SECTIONS]:
        raise MpsearchError(f"there is no section '{unknown[0]}': choose from {', '.join(SECTIONS)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise MpsearchError("there is no CUDA card here: run it where one is, or try it out with --device cpu")
    images, checkpoint = (
        images or os.environ.get("MPSEARCH_CIFAR10_JPEG", ""),
        checkpoint or os.environ.get("MPSEARCH_RESNET20", ""),
    )
    resnet20 = (f"task.data.root={images}", f"task.checkpoint={checkpoint}") if images and checkpoint else ()
    setting = Setting(torch.device(device), seconds, tuple(set_ or ()), resnet20)
    wanted = sections or [name for name in SECTIONS if resnet20 or not name.startswith("resnet20")]
    for name in wanted if not resnet20 else ():
        if name.startswith("resnet20"):
            raise MpsearchError(f"section {name} needs --images and --checkpoint")
    card = torch.cuda.get_device_name() if device == "cuda" else "none"
    base: Row = {"card": card, "seconds": seconds, "set": list(setting.sets), "resnet20": bool(resnet20)}
    rows = Rows(results, key=("section", *base, *MEASURED))
    cases = [{"section": name, **base} for name in wanted]
    began = time.monotonic()
    missing = list(rows.missing(cases, done=lambda row: bool(row["passed"])))
    together = [] if inside else [case for case in missing if case["section"] in TOGETHER]
    with ThreadPoolExecutor(max(1, len(together))) as pool:
        at_once = pool.map(lambda case: in_a_process(case["section"], setting, min(limit, total)), together)
        for case, row in zip(together, at_once, strict=True):
            rows.append(case | row)
    for case in missing:
        if case in together:
            continue
        name = case["section"]
        say(name)
        if inside:
            row = measure(name, setting)
        else:
            left = min(limit, total - (time.monotonic() - began))
            row = in_a_process(name, setting, left)
        rows.append(case | row)
    measured = rows.select(cases)
    show(measured)
    if len(measured) < len(cases) or not all(row["passed"] for row in measured):
        raise typer.Exit(1)


def measure(name: str, setting: Setting) -> Row:
    """The row of one section, whatever becomes of it."""
    clock = time.perf_counter()
    checks: list[Check] = []
    try:
        for check in SECTIONS[name](setting):
            checks.append(check)
            said = {None: "", True: "pass", False: "FAIL"}[check.passed]
            say(f"  {check.what}: {check.figure} {check.goal and f'(goal {check.goal})'} {said}")
    except Exception:
        checks.append(Check("ended by an error", "\n".join(traceback.format_exc().splitlines()[-6:]), "", False))
    return _row(checks, time.perf_counter() - clock)


def _row(checks: Sequence[Check], seconds: float) -> Row:
    versions = {"cuda_version": torch.version.cuda if torch.cuda.is_available() else None}
    passed = bool(checks) and all(check.passed is not False for check in checks)
    return versions | {"passed": passed, "section_s": round(seconds, 1), "checks": [vars(check) for check in checks]}


def in_a_process(name: str, setting: Setting, limit_s: float) -> Row:
    """The row of a section that runs in a process of its own, with all that it starts; ended after `limit_s`."""
    if limit_s <= 5:
        return _row([Check("not started", "the benchmark's time was over", "", False)], 0.0)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "row.jsonl"
        command = [sys.executable, "-m", "benchmarks", "gpu", "--inside", "--sections", name]
        command += ["--device", setting.device.type, "--seconds", str(setting.seconds), "--results", str(path)]
        command += [part for override in setting.sets for part in ("--set", override)]
        if setting.resnet20:
            root, checkpoint = (override.partition("=")[2] for override in setting.resnet20)
            command += ["--images", root, "--checkpoint", checkpoint]
        clock = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=ROOT, start_new_session=True, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        try:
            _, said = process.communicate(timeout=limit_s)
            ended = f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                _, said = process.communicate(timeout=5)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                _, said = process.communicate()
            ended = f"ended after {limit_s:.0f} s"
        print(said, end="", file=sys.stderr, flush=True)
        measured = Rows(path, key=("section",)).read()
        if measured:
            fields = ("cuda_version", "passed", "section_s", "checks")
            return {field: measured[-1][field] for field in fields}
        last = "\n".join([ended, *said.strip().splitlines()[-6:]])
        return _row([Check("gave no row", last, "", False)], time.perf_counter() - clock)


def show(rows: Sequence[Row]) -> None:
    """The table of all sections, and one line that says whether all passed."""
    verdict = {None: "", True: "pass", False: "FAIL"}
    lines = [
        (row["section"], check["what"], check["figure"], check["goal"], verdict[check["passed"]])
        for row in rows
        for check in row["checks"]
    ]
    card = rows[0]["card"] if rows else "none"
    print_table(f"card: {card}", ("section", "what", "figure", "goal", ""), lines, left=("section", "what", "figure"))
    failed = [row["section"] for row in rows if not row["passed"]]
    print(
        f"{len(rows) - len(failed)} of {len(rows)} sections passed" + (f"; FAIL: {', '.join(failed)}" if failed else "")
    )


# --------------------------------------------------------------------------------------------------------- sections


def tests(setting: Setting) -> Iterator[Check]:
    """The tests marked `gpu`."""
    if not (ROOT / "tests").exists():
        yield Check("tests marked gpu", "no tests in this installation")
        return
    marked = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--no-header", "--tb=short", "-p", "no:cacheprovider"]
    command += ["--show-capture=no", *marked]  # others need not be read, and may need libraries that are not here
    command += ["-n", str(min(10, os.cpu_count() or 1))] if find_spec("xdist") else []
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-15000:], file=sys.stderr)
    lines = done.stdout.strip().splitlines() or ["no output"]
    failed = [line.partition(" - ")[0] for line in lines if line.startswith(("FAILED", "ERROR"))]
    yield Check("tests marked gpu", "\n".join([lines[-1], *failed[:10]]), "none fails", done.returncode == 0)


def quantizers(setting: Setting) -> Iterator[Check]:
    """The largest difference from the CPU of each type, over all its widths and kinds of tensors."""
    for compiled in (False, True):
        if compiled and compiler_missing():
            yield Check("compiled", f"not measured: {compiler_missing()}")
            continue
        for quantizer in ("uniform", "shift", "apot"):
            worst = Difference(0.0, 0.0, 0.0)
            for bits in BITS[quantizer]:
                for weight in (True, False):
                    if quantizer != "uniform" and bits < 2:
                        continue
                    worst = worst.worse(
                        difference(
                            Precision(quantizer, bits, "channel" if weight else "tensor"),
                            weight,
                            setting.device,
                            compiled,
                        )
                    )
            how = f"{quantizer}, {'compiled' if compiled else 'eager'}"
            yield Check(
                f"{how}: forward, gradient, other levels",
                f"{worst.forward:.1e}, {worst.gradient:.1e}, {worst.moved:.1e}",
                f"{FORWARD_GOAL:.0e}, {GRADIENT_GOAL:.0e}, {HALFWAY:.0e}",
                worst.forward <= FORWARD_GOAL and worst.gradient <= GRADIENT_GOAL and worst.moved <= HALFWAY,
            )
    yield Check("functions whose compiled form was wrong", str(given_up()), "0", given_up() == 0)


@dataclass(frozen=True)
class Difference:
    """Between a quantizer on two devices, relative to the largest value."""

    forward: float  # of elements that round to the same level
    gradient: float  # of the step, and of the input where levels are the same
    moved: float  # share of elements that round to another level

    def worse(self, other: Difference) -> Difference:
        """The larger of each."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Difference(*(max(pair) for pair in pairs))


def difference(precision: Precision, weight: bool, device: torch.device, compiled: bool) -> Difference:
    """A quantizer on a device against the same one on the CPU, eager there; of a weight, or of signed activations."""
    random = torch.Generator().manual_seed(precision.bits)
    x = torch.randn((16, 8, 3, 3) if weight else (8, 16, 6, 6), generator=random)
    direction = torch.randn(x.shape, generator=random)
    if weight:
        step, beta = weight_step(x.flatten(1), precision), None
    else:
        step, beta = activation_range(x, precision, signed=True)
    results = []
    for place, fused in ((torch.device("cpu"), False), (device, compiled)):
        channels, dims, elements = (16, 4, 72) if weight else (1, 0, 576)
        quantizer = make_quantizer(
            [precision.quantizer], channels, dims, signed=weight, offset=not weight, elements=elements
        ).to(place)
        quantizer.set_precision(precision)
        quantizer.set_range(step.to(place), None if beta is None else beta.to(place))
        quantizer.eval()  # hard levels: a soft quantizer of training has sums that differ by more
        if fused:
            fuse(quantizer)
        there = x.detach().to(place).requires_grad_()  # a leaf on every device
        y = quantizer(there)
        y.backward(direction.to(place))
        of_range = [parameter.grad.cpu() for parameter in quantizer.parameters() if parameter.grad is not None]
        assert there.grad is not None
        results.append((y.detach().cpu(), quantizer.codes(y.detach()).cpu(), there.grad.cpu(), of_range))
    (y, codes, of_input, of_range), (y_there, codes_there, of_input_there, of_range_there) = results
    same = codes == codes_there
    forward = _apart(y, y_there, y.abs().max(), same)
    gradient = _apart(of_input, of_input_there, of_input.abs().max(), same)
    if bool(same.all()):
        v = x / step.reshape(quantizer.step.shape)
        terms = direction.abs() * (1 + ROUNDING * v.abs())
        size = quantizer.gradient_scale.cpu() * (terms.sum(dim=(1, 2, 3), keepdim=True) if weight else terms.sum())
        for one, other in zip(of_range, of_range_there, strict=True):
            gradient = max(gradient, _apart(one, other, size))
    return Difference(forward, gradient, float((~same).float().mean()))


def _apart(one: Tensor, other: Tensor, size: Tensor, same: Tensor | None = None) -> float:
    """The largest distance between two tensors, as a share of `size`, where they are the `same`; infinite for a NaN."""
    distance = (one - other).abs() / size
    distance = distance if same is None else torch.where(same, distance, 0.0)
    return float(torch.nan_to_num(distance, nan=float("inf")).max())


def data(setting: Setting) -> Iterator[Check]:
    """Where the batches of a trial are made, and what one costs until it is on the card."""
    study, overrides = _study(setting)
    spec = load_study(study, overrides)
    problem = open_problem(spec)
    workbench = Workbench(problem.task, spec.trial, setting.device, problem.space.offers, graph=problem.graph)
    where = {str(x.device.type) for x, _ in workbench.train_batches(2, 0)}
    kept = where == {setting.device.type}
    yield Check(f"batches of {spec.name} are made on", ", ".join(where), setting.device.type, kept)
    count = 200
    for _ in to_device(workbench.train_batches(5, 0), setting.device):
        pass
    train_step.finish(setting.device)
    began = time.perf_counter()
    for _ in to_device(workbench.train_batches(count, 0), setting.device):
        pass
    train_step.finish(setting.device)
    batch_ms = 1e3 * (time.perf_counter() - began) / count
    yield Check(f"ms of a batch of {spec.trial.batch_size}, made and on the card", f"{batch_ms:.2f}")


def prescreen(setting: Setting) -> Iterator[Check]:
    """Start scores a second, in this process alone."""
    study, overrides = _study(setting)
    spec = load_study(study, overrides)
    problem = open_problem(spec)
    workbench = Workbench(problem.task, spec.trial, setting.device, problem.space.offers, graph=problem.graph)
    scorer = StartScorer(workbench, problem.space.offers)
    ladder = problem.space.ladder()
    scorer.choose_arithmetic(ladder[len(ladder) // 2 :][:3])
    yield Check("arithmetic", "bfloat16" if scorer.bf16 else "float32")
    random = np.random.default_rng(0)
    for _ in range(10):  # compiles, and makes the weights of the commonest precisions
        scorer(problem.space.sample(random))
    began, scores = time.perf_counter(), list[float]()
    while len(scores) < 200 and time.perf_counter() - began < 20:
        scores.append(scorer(problem.space.sample(random)))
    rate = len(scores) / (time.perf_counter() - began)
    finite = [score for score in scores if np.isfinite(score)]
    yield Check(
        f"configs of {spec.name} a second",
        f"{rate:.1f}",
        "more than 5" if setting.device.type == "cuda" else "",
        rate > 5 if setting.device.type == "cuda" else None,
    )
    yield Check("finite scores", f"{len(finite)} of {len(scores)}", "all", len(finite) == len(scores))


def _study(setting: Setting) -> tuple[str, list[str]]:
    """The ResNet-20's study where it can be run, else that of the digits."""
    study = "resnet20-cifar10-jpeg" if setting.resnet20 else "digits"
    return study, [*setting.resnet20, *setting.sets]


def study(name: str, concurrency: int) -> Callable[[Setting], Iterator[Check]]:
    """A section that runs a study; with four trials at a time without a warm start."""

    def section(setting: Setting) -> Iterator[Check]:
        seconds = setting.seconds  # a warm start counts: that of a ResNet-20 gets as long again
        if name != "digits" and concurrency == 2:
            own, seconds = list(QUICK_WARM_START), 2 * seconds
        else:
            own = []
        own += [f"search.concurrency={concurrency}", f"search.time_limit_s={seconds}", "search.trials=1000"]
        if concurrency > 2:
            own += ["warm_start.method=none", "warm_start.ilp=false", "warm_start.combinations=0", "search.prescreen=0"]
        own += setting.resnet20 if name != "digits" else ()
        with tempfile.TemporaryDirectory() as temporary, card_memory(setting.device) as memory:
            began = time.time()
            run_study(load_study(name, [*own, *setting.sets]), Path(temporary) / "run")
            wall_s = time.time() - began
            folder = RunFolder.open(Path(temporary) / "run")
            records = folder.records()
        ends = [record for record in records if record.state != "failed"]
        reasons = {record.reason for record in records if record.state == "failed"}
        least = 8 if setting.device.type == "cuda" else 1
        yield Check("trials that ended", str(len(ends)), f"{least} or more", len(ends) >= least)
        yield Check(
            "trials that failed", "\n".join([str(len(records) - len(ends)), *map(str, reasons)]), "0", not reasons
        )
        first = min((record.started_s for record in records), default=began)
        yield Check(
            "seconds before the first trial, and after it", f"{first - began:.0f}, {began + wall_s - first:.0f}"
        )
        if ends:
            walls = [record.wall for record in ends]
            parts = ", ".join(
                f"{statistics.median(getattr(wall, part) for wall in walls):.2f}"
                for part in ("prepare_s", "train_s", "evaluate_s")
            )
            yield Check("median seconds of a trial: prepare, train, evaluate", parts)
            last = max(record.started_s + record.wall.total_s for record in ends)
            yield Check("trials a minute", f"{60 * len(ends) / max(last - first, 1e-9):.1f}")
        at_once = max(
            (
                sum(r.started_s <= at < r.started_s + r.wall.total_s for r in records)
                for at in (r.started_s for r in records)
            ),
            default=0,
        )
        yield Check(
            "trials at a time",
            str(at_once),
            str(concurrency),
            at_once == concurrency if len(ends) > 2 * concurrency else None,
        )
        peak = max((record.peak_memory_bytes for record in ends), default=0)
        yield Check("GiB of memory of a worker's process, at most", f"{peak / 2**30:.2f}")
        if setting.device.type == "cuda":
            used = (max(memory) - memory[0]) / 2**30
            # A process that has computed on a card holds some hundred MiB of it.
            goal = 0.2 * concurrency
            yield Check(
                "GiB of the card's memory, at most, of all processes",
                f"{used:.2f}",
                f"more than {goal:.1f}",
                used > goal,
            )
        yield Check(
            "best score on val", f"{max((r.score for r in ends if r.score is not None), default=float('nan')):.4f}"
        )

    return section


@contextmanager
def card_memory(device: torch.device) -> Iterator[list[int]]:
    """Bytes of a card that are in use by all processes, looked at ten times a second while the block runs."""
    seen: list[int] = []
    if device.type != "cuda":
        yield seen
        return

    def look() -> None:
        free, total = torch.cuda.mem_get_info(device)
        seen.append(total - free)

    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            look()

    look()
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def step(batch: int) -> Callable[[Setting], Iterator[Check]]:
    """A section of training steps with batches of this size."""

    def section(setting: Setting) -> Iterator[Check]:
        small = setting.device.type == "cpu"
        row = train_step.measure(
            "cifar_resnet20",
            (3, 32, 32),
            8 if small else batch,
            1 if small else STEPS,
            1 if small else 3,
            "w4a4",
            small,
            setting.device,
        )
        goals = {"quantized w4a4": STEP_GOAL, "quantized w4a4 + teacher": TEACHER_GOAL}
        yield Check("bfloat16, compiled", f"{row['bf16']}, {row['compiled']}")
        # On the CPU, a step or two of a few images, eager: no figure to hold to a goal.
        times: dict[str, list[float]] = row["step_s" if small else "steady_s"]
        for name, seconds in times.items():
            ratio = statistics.median(t / f for t, f in zip(seconds, times["float"], strict=True))
            figure = f"{1e3 * statistics.median(seconds):.2f} ({1e3 * min(seconds):.2f}-{1e3 * max(seconds):.2f}) ms"
            goal = goals.get(name)
            yield Check(
                f"step, {name}",
                figure if name == "float" else f"{figure}, {ratio:.2f} times float",
                str(goal or ""),
                None if small or goal is None else ratio <= goal,
            )
            if not small:
                rounds = zip(row["step_s"][name], seconds, strict=True)
                before_s = statistics.median(STEPS * (average - step) for average, step in rounds)
                yield Check(f"before such steps, {name}", f"{1e3 * before_s:.0f} ms a training")

    return section


TOGETHER = ("tests", "quantizers")
"""Sections that run at the same time: they measure no time."""

SECTIONS: dict[str, Callable[[Setting], Iterator[Check]]] = {
    "tests": tests,
    "quantizers": quantizers,
    "step-128": step(128),
    "step-1024": step(1024),
    "data": data,
    "prescreen": prescreen,
    "resnet20-2": study("resnet20-cifar10-jpeg", 2),
    "resnet20-4": study("resnet20-cifar10-jpeg", 4),
    "digits-2": study("digits", 2),
    "digits-4": study("digits", 4),
}
