"""How many batches does a trial's re-estimation of BatchNorm need?

Configs of the uniform ladder are trained as trials are. Then statistics are estimated on so many batches, each number
`--repeats` times on other batches, and the network is scored on val. Prints, for each number, how far scores lie from
those of the largest, and how far apart repeats are: the noise that a trial's score has from it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Annotated

import typer

from benchmarks.options import RESULTS, Results, Set, Study, several
from benchmarks.printing import print_table, say
from benchmarks.rows import MEASURED, Row, Rows
from mpsearch.problem import Problem, open_problem
from mpsearch.study import load_study
from mpsearch.workbench import Workbench

HEADS = ("config", "batches", "s", "score, points", "deviation", "divergence, nats", "deviation")


def bn_batches(
    study: Study = "resnet20-cifar10-jpeg",
    set_: Set = None,
    batches: Annotated[Sequence[int], several(int, "numbers of batches, rising")] = (2, 4, 8, 16, 32),
    bits: Annotated[Sequence[int], several(int, "bits of the uniform configs")] = (8, 4, 3, 2),
    repeats: Annotated[int, typer.Option(help="estimations on other batches, of each number", min=2)] = 3,
    results: Results = RESULTS / "bn_batches.jsonl",
) -> None:
    rows = Rows(results, key=("study", "set", "bits", "batches", "repeats", *MEASURED))
    cases: list[Row] = [
        {"study": study, "set": set_ or [], "bits": b, "batches": list(batches), "repeats": repeats} for b in bits
    ]
    if missing := list(rows.missing(cases)):
        problem = open_problem(load_study(study, [*(set_ or []), f"trial.bn_batches={max(batches)}"]))
        workbench = Workbench(problem.task, problem.spec.trial, offers=problem.space.offers)
        for case in missing:
            row = measure(problem, workbench, case["bits"], batches, repeats)
            rows.append(case | row)
            say(f"{case['bits']} bits: {row['scores']}")
    show(rows.select(cases))


def measure(problem: Problem, workbench: Workbench, bits: int, batches: Sequence[int], repeats: int) -> Row:
    """Scores and divergences of one trained config, by number of batches, a value each repeat."""
    settings = problem.spec.trial
    config = min(problem.space.ladder(), key=lambda each: abs(each.mean_bits[0] - bits))
    workbench.reset(config)
    workbench.fit(settings.steps, settings.seed)
    row: dict[str, dict[str, list[float | None]]] = {"scores": {}, "divergences": {}, "seconds": {}}
    for count in batches:
        for part in row.values():
            part[str(count)] = []
        for repeat in range(repeats):
            began = time.perf_counter()
            workbench.reestimate(settings.seed + 100 * repeat, count)
            row["seconds"][str(count)].append(time.perf_counter() - began)
            score = workbench.score("val")
            row["scores"][str(count)].append(score.value)
            row["divergences"][str(count)].append(score.divergence)
    return {"cost": problem.cost(config), **row}


def show(rows: Sequence[Row]) -> None:
    """The table of these rows."""
    print_table("distance from the largest number of batches", HEADS, lines(rows))


def lines(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Per config and number of batches: the distance from the largest number's mean, and the repeats' deviation."""
    return [_line(row, count) for row in rows for count in row["scores"]]


def _line(row: Row, count: str) -> tuple[str, ...]:
    most = str(max(map(int, row["scores"])))
    cells = [f"{row['bits']} bits", count, f"{statistics.mean(row['seconds'][count]):.1f}"]
    for part, scale, digits in (("scores", 100, 2), ("divergences", 1, 4)):
        values, reference = (list(map(float, row[part][which])) for which in (count, most))
        apart = statistics.mean(values) - statistics.mean(reference)
        cells += [f"{scale * apart:+.{digits}f}", f"{scale * statistics.stdev(values):.{digits}f}"]
    return tuple(cells)
