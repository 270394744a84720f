"""Writes every table of figures in README and docs from the raw rows; `--check` fails where one is not what rows say.

A table stands between `<!-- table NAME -->` and `<!-- end -->` in a Markdown file; `TABLES` has a function for each
name. Nothing is measured, and no data are needed.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import configs
from benchmarks.options import RESULTS
from benchmarks.printing import spread
from benchmarks.rows import ROOT, Row, Rows, RowsError, provenance
from mpsearch.errors import nearest
from mpsearch.files import write_text
from mpsearch.hardware.table import read_table
from mpsearch.precision import LayerPrecision

BLOCK = re.compile(r"<!-- table (?P<name>[\w-]+) -->\n.*?<!-- end -->", re.DOTALL)

NETWORKS = {"resnet20-cifar10-jpeg": "ResNet-20", "mobilenetv2-cifar10-jpeg": "MobileNetV2"}
BITS = (4, 3, 2)
SEARCH, FIRST = "search_quality", "search_quality-first"
"""Rows of the search as it is, and of the first version, which had no prescreen, on a machine half as fast."""
ARMS = (
    "full",
    "rungs",
    "no prescreen",
    "surrogate",
    "no weight reuse",
    "no types",
    "global types",
    "ilp ladder",
    "no warm start",
    "tpe",
    "random",
    "uniform",
)
COMPARED = ("uniform", "ilp ladder", "full")
STAGES = ("inspect", "prepare", "fold", "ptq", "train", "native", "packed")


def tables(
    check: Annotated[bool, typer.Option("--check", help="write nothing; fail where a table is stale")] = False,
) -> None:
    stale = []
    for path in pages():
        before = path.read_text(encoding="utf-8")
        after = filled(before, str(path.relative_to(ROOT)))
        if after == before:
            continue
        stale.append(str(path.relative_to(ROOT)))
        if not check:
            write_text(path, after)
    words = "stale: " if check else "written: "
    print(words + ", ".join(stale) if stale else "every table is what the rows say")
    if check and stale:
        raise typer.Exit(1)


def pages() -> list[Path]:
    """The Markdown files that may have tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str, where: str) -> str:
    """A page with every table written anew.

    Raises:
        RowsError: it names a table that there is not.
    """

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise RowsError(f"{where}: there is no table '{name}': {nearest(name, TABLES)}")
        return f"<!-- table {name} -->\n{written(name)}\n<!-- end -->"

    return BLOCK.sub(table, text)


@cache
def written(name: str) -> str:
    """One table, in Markdown."""
    return TABLES[name]()


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


@cache
def rows(name: str) -> tuple[Row, ...]:
    """The rows of a results file. Raises RowsError: there is none."""
    read = tuple(Rows(RESULTS / name, key=()).read())
    if not read:
        raise RowsError(
            f"{RESULTS / name} has no rows: make them by its benchmark, or take its tables out of the pages"
        )
    return read


def measured(some: Sequence[Mapping[str, Any]]) -> str:
    """Where and with what rows were measured, in a sentence."""
    commits = sorted({str(row.get("commit", "")).partition("-")[0][:7] for row in some if row.get("commit")})
    facts = [
        ("commit", ", ".join(commits) if len(commits) <= 3 else f"{len(commits)} commits, named in the rows"),
        ("processor", _only(some, "processor")),
        ("torch", _only(some, "torch_version")),
        ("Python", _only(some, "python_version")),
        ("threads", _only(some, "threads")),
    ]
    days = sorted({str(row["date"])[:10] for row in some if row.get("date")})
    when = [] if not days else [days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"]
    said = [f"{name} {value}" for name, value in facts if value] + when
    return f"Measured with {'; '.join(said)}." if said else "Measured before rows named commit and machine."


def _only(some: Sequence[Mapping[str, Any]], name: str) -> str:
    return ", ".join(sorted({str(row[name]) for row in some if row.get(name) is not None}))


# The front of `make demo`


def digits_front() -> str:
    """As `mpsearch run digits` prints it, and what made it."""
    front = rows("digits_front.jsonl")
    about = front[0]
    return (
        f"{_printed(front, 'top1', 'points')}\n\n{about['trials']} trials in {about['run_s']} seconds, all included. "
        f"{measured(front)}"
    )


def _printed(front: Sequence[Row], metric: str, unit: str) -> str:
    """A front as the command prints it."""
    heads = (
        "trial",
        "origin",
        f"{metric}, val",
        "cost",
        "weight bits",
        "activation bits",
        "",
        f"over uniform, {unit} (95 %)" if unit else "over uniform (95 %)",
    )
    cells = [
        (
            str(row["trial"]),
            row["origin"],
            row["score"],
            f"{row['cost']:.4f}",
            f"{row['weight_bits']:.1f}",
            f"{row['activation_bits']:.1f}",
            row["place"],
            row["over_uniform"],
        )
        for row in front
    ]
    widths = [max(len(line[i]) for line in (heads, *cells)) for i in range(len(heads))]
    right = (True, False, True, True, True, True, False, False)
    text = "\n".join(
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)).rstrip()
        for line in (heads, *cells)
    )
    return f"```text\n{text}\n```"


# The studies on other tasks


def _by_study() -> dict[str, list[Row]]:
    fronts: dict[str, list[Row]] = {}
    for row in rows("task_fronts.jsonl"):
        fronts.setdefault(str(row["study"]), []).append(row)
    return fronts


GAIN = re.compile(r"^(?P<mean>\S+) \((?P<low>\S+) to (?P<high>\S+)\) at (?P<ratio>\S+)x of trial (?P<baseline>\d+)")
"""A gain over the uniform config that is nearest in cost, as `mpsearch front` prints it."""


def task_fronts() -> str:
    """Whether each front beats its uniform ladder, by the paired interval."""
    lines = []
    for study, front in _by_study().items():
        gains = [(match, row) for row in front if (match := GAIN.match(row["over_uniform"]))]
        clear = [(match, row) for match, row in gains if float(match["low"]) * float(match["high"]) > 0]
        better = [(m, row) for m, row in clear if (float(m["mean"]) > 0) == (front[0].get("direction") != "minimize")]
        best = max(better, key=lambda pair: abs(float(pair[0]["mean"])), default=None)
        lines.append(
            (
                study,
                front[0]["metric"],
                f"{len(better)} of {len(gains)}" if gains else "not paired",
                _gain(*best) if best else "none" if gains else "",
                front[0]["trials"],
                f"{front[0]['run_s'] / 60:.0f}",
                "; ".join(f"{to} {alike}" for to, alike in front[0]["verified"].items()) or "none",
            )
        )
    heads = ("study", "metric", "better", "most, over uniform (95 %)", "trials", "minutes", "same answers")
    return f"{markdown(heads, lines)}\n\n{measured(rows('task_fronts.jsonl'))}"


def _gain(match: re.Match[str], row: Row) -> str:
    unit = f" {row['unit']}" if row["unit"] else ""
    return f"{match['mean']} ({match['low']} to {match['high']}){unit} at cost {row['cost']:.3f}"


def task_fronts_printed() -> str:
    """Each front as `mpsearch front` prints it."""
    return "\n\n".join(
        f"### {study}\n\n{_printed(front, front[0]['metric'], front[0].get('unit', ''))}"
        for study, front in _by_study().items()
    )


def task_finals() -> str:
    """Each study's test scores, as `mpsearch finalize` prints them."""
    finals: dict[str, list[Row]] = {}
    for row in rows("task_finals.jsonl"):
        finals.setdefault(str(row["study"]), []).append(row)
    tables = []
    for study, lines in finals.items():
        tables.append(f"### {study}\n\n{_finals(lines)}")
    return "\n\n".join([*tables, measured(rows("task_finals.jsonl"))])


# Search


def _points(study: str, arm: str, file: str = SEARCH) -> list[Row]:
    kept = {"study": study, "minutes": 8.0, "epochs": 0.5, "arm": arm}
    return [row for row in rows(f"{file}.csv") if all(row[name] == value for name, value in kept.items())]


@cache
def budget(study: str, bits: int) -> float:
    """Relative cost of the uniform config WxAx, whose first and last layer have 8 bits, as its row has it."""
    ends, rung = (LayerPrecision.shorthand(f"w{b}a{b}") for b in (8, bits))
    for row in (*rows(f"{SEARCH}.csv"), *rows(f"{FIRST}.csv")):
        if row["study"] == study and {*configs.read(RESULTS)[row["config"]].values()} == {ends, rung}:
            return float(row["cost"])
    raise RowsError(f"{SEARCH}.csv has no row of {study} at w{bits}a{bits}: its budget is not known")


def _best(study: str, arm: str, cost: float, file: str = SEARCH) -> list[Row]:
    """Of each seed the point of highest accuracy on val that costs no more."""
    points = [row for row in _points(study, arm, file) if row["cost"] <= cost * (1 + 1e-9)]
    seeds = sorted({row["seed"] for row in points})
    return [max((row for row in points if row["seed"] == seed), key=lambda row: row["val"]) for seed in seeds]


def _shown(arm: str) -> str:
    return "mpsearch" if arm == "full" else arm


def _tests(study: str, arm: str, cost: float) -> str:
    best = _best(study, arm, cost)
    return spread([100 * row["test"] for row in best]) if best else "none trained"


def search() -> str:
    """The search against its two baselines at three budgets of two networks."""

    def lines() -> Iterator[list[str]]:
        for study, name in NETWORKS.items():
            for bits in BITS:
                cost = budget(study, bits)
                cells = [_tests(study, arm, cost) for arm in COMPARED]
                yield [name, f"W{bits}A{bits}, {cost:.3f}", *cells, _tests(study, "full", 0.8 * cost)]

    return markdown(("network", "budget", "uniform", "ILP", "mpsearch", "mpsearch within 0.8 of it"), lines())


def search_short() -> str:
    """The test accuracies of `search`, for README."""

    def lines() -> Iterator[list[str]]:
        for study, name in NETWORKS.items():
            for bits in BITS:
                cost = budget(study, bits)
                yield [name, f"W{bits}A{bits}", *(_tests(study, arm, cost) for arm in COMPARED)]

    return markdown(("network", "budget: cost of", "uniform, test %", "ILP, test %", "mpsearch, test %"), lines())


def search_arms(file: str = SEARCH) -> str:
    """Test accuracy of every arm that has rows within the budgets, and its hypervolume from W2A2's cost to W8A8's."""
    from mpsearch.search.front import ScoreRange, share_dominated

    def volume(study: str, arm: str) -> str:
        points = _points(study, arm, file)
        volumes = [
            share_dominated(
                [(row["test"], row["cost"]) for row in points if row["seed"] == seed],
                budget(study, 2),
                ScoreRange(0.0, 1.0),
            )
            for seed in sorted({row["seed"] for row in points})
        ]
        return spread(volumes, 3) if volumes else ""

    def line(arm: str) -> list[str]:
        seeds = [len({row["seed"] for row in _points(study, arm, file)}) for study in NETWORKS]
        cells = list[str]()
        for study in NETWORKS:
            best = [_best(study, arm, budget(study, bits), file) for bits in BITS]
            cells += [f"{statistics.fmean(100 * row['test'] for row in group):.2f}" if group else "" for group in best]
            cells.append(volume(study, arm))
        return [_shown(arm), ", ".join(map(str, seeds)), *cells]

    budgets = [(*(f"{name} W{bits}A{bits}" for bits in BITS), "hypervolume") for name in NETWORKS.values()]
    there = {row["arm"] for row in rows(f"{file}.csv")}
    return markdown(("arm", "seeds", *chain(*budgets)), [line(arm) for arm in ARMS if arm in there])


def search_time() -> str:
    """What eight minutes hold: trials, their times, hypervolume on val, and when it was that of the cold search."""

    def of(study: str, arm: str) -> list[list[Row]]:
        some = [r for r in rows(f"{SEARCH}-time.csv") if r["study"] == study and r["arm"] == arm]
        return [[r for r in some if r["seed"] == seed] for seed in sorted({r["seed"] for r in some})]

    def volumes(study: str, arm: str) -> list[float]:
        return [max(r["hypervolume"] for r in run) for run in of(study, arm)]

    def reached(run: list[Row], goal: float) -> str:
        there = [r["elapsed_s"] for r in run if r["hypervolume"] >= goal]
        return f"{min(there):.0f}" if there else "not reached"

    def cells(study: str, arm: str) -> list[str]:
        runs = of(study, arm)
        if not runs:
            return [""] * len(heads)
        trained = {row["seed"]: row["trials"] for row in _points(study, arm)}
        gaps = [statistics.median(b["elapsed_s"] - a["elapsed_s"] for a, b in pairwise(run)) for run in runs]
        cold = volumes(study, "no warm start")
        return [
            ", ".join(str(trained[seed]) for seed in sorted(trained)),
            ", ".join(f"{min(r['elapsed_s'] for r in run):.0f}" for run in runs),
            ", ".join(f"{gap:.0f}" for gap in gaps),
            spread(volumes(study, arm), 3),
            ", ".join(reached(run, statistics.fmean(cold)) for run in runs) if cold else "",
        ]

    heads = ("trained", "s to the first trial", "s between trials", "hypervolume on val", "s to the cold search's")
    there = {(row["study"], row["arm"]) for row in rows(f"{SEARCH}.csv")}
    lines = [
        [name, _shown(arm), *cells(study, arm)]
        for study, name in NETWORKS.items()
        for arm in ARMS
        if (study, arm) in there
    ]
    return markdown(("network", "arm", *heads), lines)


def search_origins() -> str:
    """What the sampler adds in long runs."""
    from benchmarks.origins import tables

    some = rows("origins.jsonl")
    parts = [f"{title.capitalize()}:\n\n{markdown(heads, lines)}" for title, (heads, lines) in tables(some).items()]
    return "\n\n".join([*parts, measured(some)])


def search_samplers() -> str:
    """What samplers find where trials are simulated."""
    from benchmarks.samplers import HEADS, lines

    some = rows("samplers.jsonl")
    return f"{markdown(HEADS, lines(some))}\n\n{measured(some)}"


def search_bn_batches() -> str:
    """How many batches a re-estimation of BatchNorm needs."""
    from benchmarks.bn_batches import HEADS, lines

    some = rows("bn_batches.jsonl")
    return f"{markdown(HEADS, lines(some))}\n\n{measured(some)}"


def search_measured() -> str:
    """Where the rows of `search` were measured."""
    return measured(rows(f"{SEARCH}.csv"))


# Methods


def methods() -> str:
    """What each method costs in accuracy, of the rows that there are."""
    some = rows("methods.jsonl")
    lines = [
        (
            f"`{row['row']}`",
            *(f"{row[split] - row[f'float_{split}']:+.2f}" for split in ("val", "test")),
            f"{row['epochs']:g}",
            f"{row['minutes']:.1f}",
            f"`python -m benchmarks methods --rows {row['row']}`",
        )
        for row in some
    ]
    table = markdown(("row", "val - float", "test - float", "epochs", "minutes", "command"), lines)
    floats = f"Float: {some[0]['float_val']:.2f} / {some[0]['float_test']:.2f} % (val / test)."
    return f"{table}\n\n{floats} {measured(some)}"


def learned_thresholds() -> str:
    """What learned input thresholds gain over the uniform quantizer, where both have been trained."""
    from benchmarks.learned_thresholds import HEADS, UNIFORM, cells

    some = rows("learned_thresholds.jsonl")
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in some:
        groups.setdefault((row["study"], row["steps"]), []).append(row)
    compared = {key: group for key, group in groups.items() if any(row["arm"] != UNIFORM for row in group)}
    lines = [(study, str(steps), *line) for (study, steps), group in compared.items() for line in cells(group)]
    floats = ", ".join(f"{study} {group[0]['float_val']:.2f} % val" for (study, _), group in compared.items())
    used = [row for group in compared.values() for row in group]
    return f"{markdown(('study', 'steps', *HEADS), lines)}\n\nFloat: {floats}. {measured(used)}"


# Exports


def _exports() -> dict[tuple[str, str, str], Row]:
    return {(row["target"], row["network"], row["config"]): row for row in rows("export_agreement.jsonl")}


def _targets() -> list[str]:
    return list(dict.fromkeys(row["target"] for row in rows("export_agreement.jsonl")))


def exports() -> str:
    """Same answers of every target, network and config."""
    of = _exports()
    cases = list(dict.fromkeys((row["network"], row["config"]) for row in rows("export_agreement.jsonl")))

    def line(target: str) -> list[str]:
        some = [of[target, *case] for case in cases if (target, *case) in of]
        same = [str(of[target, *case]["same_answer"]) if (target, *case) in of else "-" for case in cases]
        most = max(row["max_difference"] for row in some)
        return [f"`{target}`", *same, f"{most:.1f}" if most else "0", _only(some, "version")]

    head = ("`--to`", *(f"{network}, {config}" for network, config in cases), "largest difference of a logit", "with")
    return f"{markdown(head, map(line, _targets()))}\n\n{measured(rows('export_agreement.jsonl'))}"


def export_sizes() -> str:
    """KiB of the mixed ResNet-20 and how many images are moved."""
    of = _exports()
    some = [of[target, "resnet20", "mixed"] for target in _targets() if (target, "resnet20", "mixed") in of]
    lines = [
        (
            f"`{row['target']}`",
            f"{row['bytes'] / 1024:.0f}",
            f"{row['float_bytes'] / 1024:.0f}",
            f"{100 * row['turned_over'] / row['images']:.1f} %",
            f"{row['median_difference']:.1g}",
            f"{row['max_preference']:.2f}",
            f"{row['max_logit']:.0f}",
        )
        for row in some
    ]
    head = (
        "`--to`",
        "KiB",
        "KiB in float32",
        "images with a logit moved by 1e-3",
        "median difference",
        "preferred by",
        "logits up to",
    )
    return markdown(head, lines)


# Zoo


def _zoo(family: str) -> tuple[dict[str, Row], dict[str, Row]]:
    """The last row of each network of a family, of all stages but onnx, and of onnx."""
    some = [row for row in rows("zoo-families.jsonl") if row["family"] == family]
    return (
        {row["network"]: row for row in some if "native" in row},
        {row["network"]: row for row in some if "onnx" in row},
    )


def zoo() -> str:
    """Networks of other people by family: how many pass."""

    def line(family: str) -> list[str]:
        stages, onnx = _zoo(family)
        passed = sum(all(row.get(stage) == "ok" for stage in STAGES) for row in stages.values())
        verified = sum(row["onnx"] == "ok" for row in onnx.values())
        return [
            family,
            f"{passed} of {len(stages)}",
            f"{verified} of {len(onnx)}",
            f"`python -m benchmarks zoo --family {family}`",
        ]

    families = dict.fromkeys(row["family"] for row in rows("zoo-families.jsonl"))
    head = ("family", "every stage", "onnxruntime answers alike, W8A8", "command")
    return f"{markdown(head, map(line, families))}\n\n{measured(rows('zoo-families.jsonl'))}"


def zoo_failures() -> str:
    """What did not pass when it was last run, with the reason."""
    last = {
        (row["family"], row["network"], stage): str(row[stage])
        for row in rows("zoo-families.jsonl")
        for stage in (*STAGES, "onnx")
        if stage in row
    }
    lines = [
        (family, f"`{network}`", stage, " ".join(said.split())[:160])
        for (family, network, stage), said in last.items()
        if said != "ok"
    ]
    return markdown(("family", "network", "stage", "what it says"), lines)


# Cards, MHAQ, peers


def gpu() -> str:
    """Every check on a card, of each section's last run."""
    some = list({row["section"]: row for row in rows("gpu.jsonl")}.values())
    lines = [
        (
            row["section"],
            check["what"],
            " ".join(str(check["figure"]).split())[:120],
            check["goal"],
            {True: "pass", False: "**fail**"}.get(check["passed"], ""),
        )
        for row in some
        for check in row["checks"]
    ]
    card = f"On {_only(some, 'card')}, CUDA {_only(some, 'cuda_version')}."
    return f"{markdown(('section', 'what', 'figure', 'goal', ''), lines)}\n\n{card} {measured(some)}"


def digits_finals() -> str:
    """As `mpsearch finalize` prints it."""
    finals = rows("digits_finals.jsonl")
    return f"{_finals(finals)}\n\n{measured(finals)}"


def _finals(finals: Sequence[Row]) -> str:
    heads = [name for name in finals[0] if name not in {"study", *provenance()}]
    return markdown(heads, ([row[head] for head in heads] for row in finals))


def measured_table() -> str:
    """Whole networks beside the sums of their rows, as the header of the shipped table has them."""
    header = read_table(ROOT / "hardware" / "onnxruntime-cpu.csv").header
    said = re.compile(r"whole (?P<whole>\S+) us, sum (?P<sum>\S+) us, (?P<error>\S+)%")
    lines = [
        (name.removeprefix("check "), found["whole"], found["sum"], f"{found['error']} %")
        for name, text in header.items()
        if name.startswith("check ") and (found := said.match(text))
    ]
    about = f"{header['network']} in {header['runtime']} {header['version']}, {header['threads']} thread"
    made = f"{header['device']}; {header['date']}"
    return f"{markdown(('network', 'whole, us', 'sum, us', 'error'), lines)}\n\n{about}. Measured on {made}."


def hardware_fronts() -> str:
    """What each search for hardware came to."""
    some = rows("hardware_fronts.jsonl")

    def cells(row: Row) -> Iterator[object]:
        yield row["case"]
        yield row["trials"]
        yield round(row["run_s"] / 60)
        yield f"{100 * row['float']:.2f}"
        for point in (row["front"][0], next(p for p in row["front"] if p["trial"] == row["knee"]), row["front"][-1]):
            yield f"{100 * point['score']:.2f} at {point['cost']:.3f}"
        pairs = [f"{count} {pair}" for pair, count in row["knee_pairs"].items()]
        yield ", ".join(pairs[:5]) + (f", {len(pairs) - 5} more kinds" if len(pairs) > 5 else "")

    head = ("case", "trials", "minutes", "float, val %", "cheapest of the front", "knee", "best", "layers of the knee")
    return f"{markdown(head, map(tuple, map(cells, some)))}\n\n{measured(some)}"


def mhaq() -> str:
    """Targets and bits in use after training in MHAQ."""
    row = rows("mhaq.jsonl")[-1]

    def cells(layer: Mapping[str, Any]) -> list[str]:
        single = layer["true_act"] is None  # the input stays as it is
        return [
            str(layer["weight_bit"]),
            f"{layer['true_weight']:.3f}",
            "float" if single else str(layer["act_bit"]),
            "" if single else f"{layer['true_act']:.3f}",
        ]

    lines = [[name, *cells(layer)] for name, layer in row["layers"].items()]
    head = ("layer", "weight target", "bits in use", "input target", "bits in use")
    return (
        f"{markdown(head, lines)}\n\n{row['steps_done']} steps of {row['batch']} images in {row['seconds']} s; top-1 "
        f"{100 * row['test']['Accuracy_top1']:.1f} % of {row['images']} images (float {100 * row['float_val']:.1f} %); "
        f"imported, {row['same_answers']} of {row['samples']} answers are the same, and logits differ by at most "
        f"{row['max_difference']:.1e}. {measured([row])}"
    )


def peers() -> str:
    """Other tools on the same ResNet-20, beside the best of ours within their BOPs."""
    import torch

    from benchmarks.peers import COLUMNS, beside, priced
    from mpsearch.graph.layers import inspect_model
    from mpsearch.study import TaskSpec
    from mpsearch.task.models import build_model

    study = "resnet20-cifar10-jpeg"
    spec = TaskSpec.model_validate({"model": "cifar_resnet20", "data": {"kind": "digits"}})  # data are not read
    layers = inspect_model(build_model(spec, 10).eval(), torch.rand(2, 3, 32, 32)).layers
    ours = priced(RESULTS / "search_quality.csv", "full", study, layers)
    return markdown(COLUMNS, beside(ours))


def long_runs() -> str:
    """What hours and thousands of trials do to a run, each figure beside its goal."""
    from benchmarks.soak import NOTHING, NOTHING_MORE, whole

    lines = list[tuple[str, str, str, str]]()

    def line(what: str, figure: str, goal: str, met: bool) -> None:
        lines.append((what, figure, goal, "pass" if met else "**fail**"))

    for row in (soaks := rows("soak.jsonl")):
        lost = sum(row[name] for name in (*NOTHING, *NOTHING_MORE) if name != "processes_left")
        line(
            f"`soak`: {row['study']}, {row['minutes']:g} minutes, processes killed about every {row['every']:g} s",
            f"{row['kills']} kills ({row['drivers_killed']} of the driver, {row['workers_killed']} of workers), "
            f"{row['trials']} trials, {row['trainings_ended']} trainings, {row['begun_again']} begun again; lost or "
            f"done twice: {lost}; processes that outlived a killed driver by 30 s: {row['processes_left']}",
            "0; 0",
            whole(row),
        )
    for row in (scales := rows("controller_scale.jsonl")):
        first, last = row["growth"][0], row["growth"][-1]
        line(
            f"`controller_scale`: {row['resumed']['trials']:,} simulated trials of {row['layers']} layers by "
            f"{row['sampler']}, killed at {row['killed_at']:,}",
            f"{first['trial_ms']:.0f} ms a trial after {first['trials']:,}, {last['trial_ms']:.0f} ms after "
            f"{last['trials']:,}; {row['uninterrupted']['repeats'] + row['resumed']['repeats']} configs twice",
            "the same front at the kill",
            bool(row["same_front_at_kill"]),
        )
    for row in (memories := rows("worker_memory.jsonl")):
        line(
            f"`worker_memory`: {row['ended']} trials of {row['study']} in one worker",
            f"grown by {row['grown_mib']:.0f} MiB from trial {row['settled']} on",
            "under 50 MB",
            row["grown_mib"] < 50e6 / 2**20,
        )
    for row in (overheads := rows("trial_overhead.jsonl")):
        share = (row["train_s"] + row["evaluate_s"]) / row["worker_s"]
        trial_s = (row["train_s"] + row["evaluate_s"] + row["prepare_s"]) / row["records"]
        between = (row["worker_s"] - row["records"] * trial_s) / row["records"]
        line(
            f"`trial_overhead`: {row['records']} trials of {row['study']} of {trial_s:.0f} s, on {row['concurrency']} "
            "workers",
            f"{share:.1%} of the workers' time in training and scoring ({row['train_s'] / row['worker_s']:.1%} in "
            f"training); {row['prepare_s'] / row['records']:.2f} s to prepare a trial, {between:.2f} s between two",
            "85 % or more",
            share >= 0.85,
        )
    for row in (reports := rows("report_speed.jsonl")):
        line(
            f"`report_speed`: a report of {row['trials']:,} trials and {row['layers']} layers",
            f"{row['wall_s']:.0f} s, {row['peak_mib']:.0f} MiB, page of {row['page_mib']:.1f} MiB",
            "",
            True,
        )
    every = [*soaks, *scales, *memories, *overheads, *reports]
    return f"{markdown(('what', 'figure', 'goal', ''), lines)}\n\n{measured(every)}"


TABLES: dict[str, Callable[[], str]] = {
    "digits-front": digits_front,
    "digits-finals": digits_finals,
    "task-fronts": task_fronts,
    "task-fronts-printed": task_fronts_printed,
    "task-finals": task_finals,
    "search": search,
    "search-short": search_short,
    "search-arms": search_arms,
    "search-first-arms": partial(search_arms, FIRST),
    "search-time": search_time,
    "search-measured": search_measured,
    "search-origins": search_origins,
    "search-samplers": search_samplers,
    "search-bn-batches": search_bn_batches,
    "methods": methods,
    "learned-thresholds": learned_thresholds,
    "exports": exports,
    "export-sizes": export_sizes,
    "zoo": zoo,
    "zoo-failures": zoo_failures,
    "gpu": gpu,
    "hardware-fronts": hardware_fronts,
    "long-runs": long_runs,
    "measured-table": measured_table,
    "mhaq": mhaq,
    "peers": peers,
}
