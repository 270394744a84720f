"""What each part of the search is worth: arms of equal wall time, finally trained the same way, scored on test.

Each arm is a run of the command line with a compiler cache of its own, so that its time holds everything: descent,
sensitivities, compilation, trials, in one process with all threads. Then points of its front are trained for `--epochs`
and scored on val and on test, which no arm has seen: of the trials that cost no more than WxAx, for each of `--bits`,
and than 0.8 of it, the best on val; and the cheapest of the front. Rows are kept as CSV (`RESULTS.csv`: a row a trained
point, with the digest of its config, which `configs.jsonl` beside it holds; `RESULTS-time.csv`: the hypervolume over
time); arms that are there are not run again. A search that was
interrupted starts anew; one that ended is in `--work` and is not repeated for another `--epochs`.

Hypervolume and IGD+ are those of `mpsearch.search.front`'s unit square (error; log2 cost from W2A2 to the reference,
W8A8): what is cheaper counts as if it cost that, or one trial at the very cheapest config would outweigh all others.
IGD+ is against the front of all arms' points together: 0 is best.

A final training that another run in `--work` did already, of the same config from the same bytes of weights, is not
done twice: arms that share the ladder and a seed share its points.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import moocore
import numpy as np
import pandas as pd
import typer

from benchmarks import configs
from benchmarks.options import RESULTS, PrintOnly, Seeds, Set, Study, several
from benchmarks.printing import print_table, say, spread
from benchmarks.rows import Row, Rows
from mpsearch.cache import content_key
from mpsearch.errors import nearest
from mpsearch.files import sha256
from mpsearch.metric import TOP1
from mpsearch.problem import Problem, open_problem
from mpsearch.record import FinalRecord, RunFolder, TrialRecord, checkpoint_path
from mpsearch.search.finalize import finalize
from mpsearch.search.front import ScoreRange, hypervolume_over_time, pareto_front, share_dominated
from mpsearch.study import load_study, read_spec

WARM = ["warm_start.method=gdnsq"]
COLD = ["warm_start.method=none", "warm_start.ilp=false", "warm_start.combinations=0", "search.prescreen=0"]

RUNGS = "trial.rungs=[60, 150, 400]"

UNIFORM = {"resnet20-cifar10-jpeg": "resnet_uniform", "mobilenetv2-cifar10-jpeg": "uniform"}
"""The space without other quantizer types, by study."""

ARMS: dict[str, list[str]] = {
    "full": WARM,
    "no warm start": COLD,
    "rungs": [*WARM, RUNGS],
    "rungs without prescreen": [*WARM, RUNGS, "search.prescreen=0"],
    "surrogate": [*WARM, "search.sampler=surrogate"],
    "no prescreen": [*WARM, "search.prescreen=0"],
    "nsga2": [*WARM, "search.sampler=nsga2"],
    "no stopping": [*WARM, "search.stop_dominated=false"],
    "no types": [*WARM, "space=UNIFORM"],
    "random": [*COLD, "search.sampler=random"],
    "tpe": [*COLD, "search.sampler=tpe"],
    "ilp ladder": [*COLD, "warm_start.ilp=true", "search.sampler=none"],
    # The fair baseline: every global combination.
    "uniform": [*COLD, "space=UNIFORM", "warm_start.combinations=4", "search.sampler=none"],
    # As `uniform`, with global combinations of all types: shift:3 x uniform:4 everywhere, and so on.
    "global types": [*COLD, "warm_start.combinations=12", "search.sampler=none"],
}

BOOTSTRAPS = 4000
ONE_COST = 0.03  # difference of log cost below which points are compared
SHARES_OF_RIGHT = ScoreRange(0.0, 1.0)  # the score axis of every hypervolume here, whatever an arm observes
SHARES = (1.0, 0.8)  # of a budget, at which points are trained

KEY = ("study", "minutes", "epochs", "arm", "seed")


@dataclass(frozen=True)
class Settings:
    """What all arms of one comparison have in common."""

    study: str
    minutes: float
    epochs: float
    final_seeds: int
    bits: Sequence[int]
    overrides: Sequence[str]
    work: Path
    points: Rows  # a row a trained point
    timeline: Rows  # a row a step of the hypervolume


def search_quality(
    study: Study = "resnet20-cifar10-jpeg",
    arms: Annotated[Sequence[str], several(str, "arms of the comparison")] = tuple(ARMS),
    seeds: Seeds = (0, 1, 2),
    minutes: Annotated[float, typer.Option(help="minutes of one search, warm start included")] = 8.0,
    epochs: Annotated[float, typer.Option(help="epochs of a final training")] = 1.0,
    final_seeds: Annotated[int, typer.Option(help="final trainings of a point; their mean counts", min=1)] = 1,
    bits: Annotated[Sequence[int], several(int, "bits of the uniform configs whose costs are the budgets")] = (4, 3, 2),
    set_: Set = None,
    work: Annotated[Path, typer.Option(help="folder that keeps the searches")] = Path(".search_quality"),
    results: Annotated[
        Path, typer.Option(help="files of rows, without `.csv` and `-time.csv`; arms with rows are not run again")
    ] = RESULTS / "search_quality",
    picture: Annotated[Path | None, typer.Option(help="HTML file for the picture; none by default")] = None,
    only_print: PrintOnly = False,
) -> None:
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise typer.BadParameter(f"unknown arm '{unknown[0]}': {nearest(unknown[0], ARMS)}")
    points, timeline = (Rows(results.with_name(f"{results.name}{end}"), KEY) for end in (".csv", "-time.csv"))
    settings = Settings(study, minutes, epochs, final_seeds, bits, set_ or [], work, points, timeline)
    about = {"study": study, "minutes": minutes, "epochs": epochs}
    cases = [about | {"arm": arm, "seed": seed} for seed in seeds for arm in arms]
    for case in points.missing([] if only_print else cases):
        say(f"{study}: {case['arm']}, seed {case['seed']}")
        run_arm(settings, case)
    report(settings, picture)


def search(settings: Settings, arm: str, seed: int, folder: Path) -> Row:
    """Run the search of one arm with one seed, if it has not ended yet. Returns its command, begin and seconds."""
    own = [override.replace("UNIFORM", UNIFORM.get(settings.study, "uniform")) for override in ARMS[arm]]
    overrides = [*own, f"search.seed={seed}", f"warm_start.seed={seed}", f"trial.seed={seed}"]
    overrides += [*settings.overrides, "search.trials=100000", "engine.address=none"]
    command = [str(Path(sys.executable).parent / "mpsearch"), "run", settings.study]
    command += ["--out", str(folder / "run"), "--json", "--time-limit", f"{round(60 * settings.minutes)}s"]
    command += [part for override in overrides for part in ("--set", override)]
    ended = folder / "searched.json"
    if ended.exists() and (searched := json.loads(ended.read_text()))["command"] == command:
        return dict(searched)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str((folder / "compiled").absolute())}
    began = time.time()
    with (folder / "log.txt").open("w") as log:
        subprocess.run(command, check=True, env=environment, stdout=log, stderr=subprocess.STDOUT)
    searched = {"command": command, "began": began, "searched_s": time.time() - began}
    shutil.rmtree(folder / "compiled", ignore_errors=True)
    ended.write_text(json.dumps(searched))
    return searched


def run_arm(settings: Settings, key: Row) -> None:
    """Search with one arm and seed, train what it found, and append its rows."""
    study, arm, seed = settings.study, key["arm"], key["seed"]
    folder = settings.work / f"{study}-{settings.minutes:g}min-{arm.replace(' ', '-')}-{seed}"
    searched = search(settings, arm, seed, folder)
    run = RunFolder.open(folder / "run")
    spec = read_spec(run)
    final = spec.final.model_copy(update={"epochs": settings.epochs, "seeds": settings.final_seeds})
    problem = open_problem(spec.model_copy(update={"final": final}))
    records = run.records()
    costs = [share * cost for cost in budgets(problem, settings.bits).values() for share in SHARES]
    chosen = best_within(records, costs)
    ended = [path.parent for path in sorted(settings.work.glob(f"{study}-*/searched.json"))]
    share_finals(run, chosen, [RunFolder.open(other / "run") for other in ended if other != folder])
    rows = finalize(problem, run, trials=chosen)
    points = [
        key
        | {
            "number": row.trial.number,
            "origin": row.trial.origin,
            "cost": row.trial.cost,
            "proxy_val": row.trial.score,
            "divergence": row.trial.divergence,
            "val": row.val_mean,
            "test": row.test_mean,
            "search_s": searched["searched_s"],
            "trials": sum(r.state == "complete" for r in records),
            "stopped": sum(r.state == "stopped" for r in records),
            "config": row.trial.config.digest,
        }
        for row in rows
    ]
    waited = min(r.started_s for r in records) - searched["began"]
    steps = [
        key | {"elapsed_s": waited + step.elapsed_s, "hypervolume": step.hypervolume}
        for step in hypervolume_over_time(records, lowest(problem), TOP1, SHARES_OF_RIGHT)
    ]
    configs.keep([row.trial.config for row in rows], settings.points.path.parent)
    settings.timeline.append(*steps)
    settings.points.append(*points)  # last: with these rows the arm is done


def budgets(problem: Problem, bits: Sequence[int]) -> dict[int, float]:
    """Relative cost of the uniform configs WxAx, by bits."""
    return {b: problem.cost(problem.space.uniform(b)) for b in bits}


def lowest(problem: Problem) -> float:
    """Where the hypervolume's range of costs ends: at W2A2, whatever is trained."""
    return budgets(problem, [2])[2]


def best_within(records: list[TrialRecord], costs: list[float]) -> list[TrialRecord]:
    """The trial of highest accuracy on val within each cost, and the cheapest of the front, each once."""
    front = pareto_front(records, TOP1).trials
    within = [[t for t in front if t.cost is not None and t.cost <= cost * (1 + 1e-9)] for cost in costs]
    found = {trials[-1].number: trials[-1] for trials in (*within, front[:1]) if trials}
    return list(found.values())


def share_finals(run: RunFolder, chosen: list[TrialRecord], others: list[RunFolder]) -> None:
    """Take over the final trainings of `others` that began where those of `chosen` will: they would end the same."""
    known = {began: finals for other in others for began, finals in _finals_by_begin(other).items()}
    with run.driving():
        done = {(final.number, final.seed, final.steps) for final in run.finals()}
        for trial in chosen:
            for final in known.get(_begin(run, trial), ()):
                if (trial.number, final.seed, final.steps) not in done:
                    run.append_final(replace(final, number=trial.number))


def _finals_by_begin(run: RunFolder) -> dict[str, list[FinalRecord]]:
    finals = run.finals()
    by_trial = {trial: [f for f in finals if f.number == trial.number] for trial in run.records()}
    return {_begin(run, trial): own for trial, own in by_trial.items() if own}


def _begin(run: RunFolder, trial: TrialRecord) -> str:
    """Digest of what decides how a final training ends, but its seed and steps: the study, the config, the weights."""
    spec = read_spec(run)
    settings = spec.trial.model_dump(mode="json", exclude={"seed", "steps"}) | {"final.lr": spec.final.lr}
    study = [spec.task.model_dump(mode="json"), run.space_yaml.read_text(), settings]
    kept = checkpoint_path(run.checkpoints, trial.number)
    weights = sha256(kept) if kept.exists() else [run.id, trial.number]  # not kept: like no other
    return content_key(study, trial.config.digest, weights)


def quality(points: pd.DataFrame, lowest: float) -> pd.DataFrame:
    """A row per arm and seed: hypervolume on val and test, IGD+ on test, in the range of costs from `lowest` to 1."""

    def unit(frame: pd.DataFrame) -> np.ndarray:
        return np.column_stack([1 - frame.test, np.maximum(0, 1 - np.log2(frame.cost) / math.log2(lowest))])

    reference = moocore.filter_dominated(unit(points))
    rows = []
    for (arm, seed), group in points.groupby(["arm", "seed"], sort=False):
        volumes = {
            s: share_dominated(list(zip(group[s], group.cost, strict=True)), lowest, SHARES_OF_RIGHT)
            for s in ("val", "test")
        }
        igd = float(moocore.igd_plus(unit(group), ref=reference))
        rows.append({"arm": arm, "seed": seed, **volumes, "igd_plus": igd, "trials": group.trials.iloc[0]})
    return pd.DataFrame(rows)


def accuracy_at(points: pd.DataFrame, cost: float) -> float:
    """The test accuracy that an arm has at a cost: of its best point on val that costs no more; NaN without any."""
    within = points[points.cost <= cost * (1 + 1e-9)]
    return math.nan if within.empty else float(within.test.iloc[within.val.argmax()])


def report(settings: Settings, picture: Path | None) -> None:
    """Print the tables of one study."""
    study, minutes, epochs = settings.study, settings.minutes, settings.epochs
    searched = [row for row in settings.timeline.read() if (row["study"], row["minutes"]) == (study, minutes)]
    trained = [row for row in settings.points.read() if (row["study"], row["minutes"]) == (study, minutes)]
    points = pd.DataFrame([row for row in trained if row["epochs"] == epochs])
    if points.empty:
        return
    problem = open_problem(load_study(study, settings.overrides))
    costs = {
        f"{share:g}x W{b}A{b}": share * cost for b, cost in budgets(problem, settings.bits).items() for share in SHARES
    }
    qualities = quality(points, lowest(problem))
    lines = []
    for arm in ARMS:
        rows = qualities[qualities.arm == arm]
        if rows.empty:
            continue
        runs = [group for _, group in points[points.arm == arm].groupby("seed")]
        lines.append(
            (
                arm,
                str(len(rows)),
                *(_spread(rows[name], 4) for name in ("val", "test", "igd_plus")),
                *(_spread(100 * pd.Series([accuracy_at(run, cost) for run in runs]), 2) for cost in costs.values()),
                f"{rows.trials.mean():.0f}",
            )
        )
    print_table(
        f"{study}, {minutes:g} minutes a run, {epochs:g} epochs of final training",
        ("arm", "seeds", "hypervolume, val", "test", "IGD+", *(f"test within {cost}" for cost in costs), "trials"),
        lines,
    )
    # Other epochs of final training: the same search.
    timeline = pd.DataFrame(searched).drop_duplicates(["arm", "seed", "elapsed_s"])
    _print_speed(timeline)
    _print_proxies(points)
    if picture is not None:
        draw(points, timeline, picture)


def draw(points: pd.DataFrame, timeline: pd.DataFrame, path: Path) -> None:
    """Test accuracy against cost after the final training, and hypervolume on val over time: a line an arm and seed."""
    import plotly.colors
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    titles = ("after final training, test", "during the search, val")
    figure = make_subplots(rows=1, cols=2, subplot_titles=titles)
    colours = itertools.cycle(plotly.colors.qualitative.Dark24)
    for arm, colour in zip(ARMS, colours, strict=False):  # the same in every picture
        style = {"legendgroup": arm, "name": arm, "line": {"color": colour, "width": 1.5}}
        for index, (_, group) in enumerate(points[points.arm == arm].groupby("seed")):
            front = group.sort_values("cost")
            line = go.Scatter(x=front.cost, y=100 * front.test, mode="lines+markers", showlegend=not index, **style)
            figure.add_trace(line, row=1, col=1)
        for _, group in timeline[timeline.arm == arm].groupby("seed"):
            steps = go.Scatter(x=group.elapsed_s, y=group.hypervolume, mode="lines", showlegend=False, **style)
            figure.add_trace(steps.update(line_shape="hv"), row=1, col=2)
    figure.update_xaxes(title="cost, relative to W8A8", type="log", row=1, col=1)
    figure.update_yaxes(title="accuracy, %", row=1, col=1)
    figure.update_xaxes(title="seconds, warm start included", row=1, col=2)
    most = timeline.hypervolume.max()
    figure.update_yaxes(title="hypervolume", range=[0.75 * most, 1.01 * most], row=1, col=2)
    figure.update_layout(template="plotly_white", width=1200, height=480, legend={"orientation": "h", "y": -0.2})
    figure.write_html(path, include_plotlyjs=True)
    print(f"picture: {path}")


def _print_speed(timeline: pd.DataFrame) -> None:
    """Hypervolume of all trials at the end, and how long each arm takes to that of the cold search, all included."""
    ends = timeline.groupby(["arm", "seed"], sort=False).hypervolume.max().groupby("arm", sort=False)
    print("hypervolume of the trials on val: " + ", ".join(f"{arm} {_spread(values, 4)}" for arm, values in ends))
    print("seconds from trial to trial, median of a run (arms of one speed of machine can be compared):")
    for arm, group in timeline.groupby("arm", sort=False):
        gaps = group.groupby("seed").elapsed_s.apply(lambda times: times.diff().median())
        print(f"  {arm}: " + ", ".join(f"{gap:.0f}" for gap in gaps))
    cold = timeline[timeline.arm == "no warm start"].groupby("seed").hypervolume.max()
    if cold.empty:
        return
    goal = float(cold.mean())
    print(f"time to the cold search's final hypervolume on val, {goal:.4f} (mean over its seeds):")
    for arm, group in timeline.groupby("arm", sort=False):
        times = [rows[rows.hypervolume >= goal].elapsed_s.min() for _, rows in group.groupby("seed")]
        print(f"  {arm}: " + ", ".join("not reached" if math.isnan(t) else f"{t:.0f} s" for t in times))


def _print_proxies(points: pd.DataFrame) -> None:
    """How well what a trial measured foretells the test accuracy: Kendall's tau among points of one cost.

    The points of a run stand or fall together, so the interval of the difference is a bootstrap over runs.
    """
    points = points.drop_duplicates(["config", "divergence", "test"])  # what arms of one ladder and seed share, once
    first, second = (index.ravel() for index in np.triu_indices(len(points), 1))
    apart = np.abs(np.log(points.cost.to_numpy()[first] / points.cost.to_numpy()[second]))
    first, second = first[apart <= ONE_COST], second[apart <= ONE_COST]
    if not len(first):
        return

    def signs(values: pd.Series) -> np.ndarray:
        sign: np.ndarray = np.sign(values.to_numpy()[first] - values.to_numpy()[second])
        return sign

    order = signs(points.test)
    accuracy, divergence = signs(points.proxy_val) * order, signs(-points.divergence) * order
    print(f"what foretells the test accuracy, among {len(order)} pairs of points within {ONE_COST:.0%} of cost:")
    print(f"  accuracy on val of the trial: tau {accuracy.mean():+.2f}")
    print(f"  divergence of the trial: tau {divergence.mean():+.2f}")

    run = points.groupby(["arm", "seed"]).ngroup().to_numpy()
    runs = run.max() + 1
    drawn = np.random.default_rng(0).multinomial(runs, np.full(runs, 1 / runs), size=BOOTSTRAPS)
    weights = drawn[:, run[first]] * drawn[:, run[second]]
    weights = weights[weights.any(axis=1)]
    low, high = np.percentile(weights @ (divergence - accuracy) / weights.sum(axis=1), [2.5, 97.5])
    print(f"  divergence minus accuracy (95 %, over {runs} runs): {low:+.2f} to {high:+.2f}")


def _spread(values: pd.Series[float], digits: int) -> str:
    return spread(list(values.dropna()), digits)
