"""A PSNR and a perplexity, through every output: no score is shown in a unit that is not its own."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from commands import mpsearch

from mpsearch.metric import METRICS, Metric
from mpsearch.record import RunFolder

pytestmark = pytest.mark.study

STUDY = """
name: {factory}
task: {{factory: "own_tasks:{factory}"}}
space: free.yaml
warm_start: {{method: none}}
search: {{trials: 10, concurrency: 1, sampler: nsga2}}
trial: {{steps: 6, batch_size: 16, compile: false, calibration_samples: 32, bn_batches: 0}}
final: {{pick: 2, epochs: 1, seeds: 2}}
engine: {{address: none}}
"""

FREE = """
name: free
rules:
  - {match: "*", weight: ["uniform:2-8"], activation: ["uniform:4-8"]}
first: search
last: search
"""


@dataclass(frozen=True)
class Study:
    """A finalized run, and what the commands printed on the way."""

    metric: Metric
    place: Path
    folder: RunFolder
    printed: dict[str, str]

    def scores(self) -> list[float]:
        """Every score that was recorded."""
        scores = [score for record in self.folder.records() for _, score in record.curve]
        scores += [record.score for record in self.folder.records() if record.score is not None]
        return scores + [score for final in self.folder.finals() for score in (final.val, final.test)]


STUDIES = [
    pytest.param(("denoising", "psnr"), id="psnr"),
    pytest.param(("tokens", "perplexity"), id="perplexity", marks=pytest.mark.slow),  # the same path, lower is better
]


@pytest.fixture(scope="module", params=STUDIES)
def study(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Study:
    factory, metric = request.param
    place = tmp_path_factory.mktemp(factory)
    (place / "study.yaml").write_text(STUDY.format(factory=factory))
    (place / "free.yaml").write_text(FREE)
    printed = {}
    for name, arguments in {
        "check": ["check", "study.yaml"],
        "check --json": ["check", "study.yaml", "--json"],
        "run": ["run", "study.yaml", "--out", "run"],
        "status": ["status", "run"],
        "status --json": ["status", "run", "--json"],
        "finalize": ["finalize", "run"],
        "front": ["front", "run"],
        "front --json": ["front", "run", "--json"],
        "front --csv": ["front", "run", "--csv"],
        "export": ["export", "run", "--pick", "best", "-o", "out"],
        "ptq": ["ptq", "study.yaml", "--bits", "w4a4", "--rounding", "nearest", "--samples", "32"],
        "train": ["train", "study.yaml", "--target", "w4a4", "--epochs", "1"],
        "debug": ["debug", "study.yaml", "w2a2", "--samples", "16", "--out", "debug.html"],
    }.items():
        done = mpsearch(*arguments, cwd=place)
        assert done.returncode == 0, done.stderr
        printed[name] = done.stdout + done.stderr
    return Study(METRICS[metric], place, RunFolder.open(place / "run"), printed)


def page(path: Path) -> str:
    from plotly.offline import get_plotlyjs

    return path.read_text(encoding="utf-8").replace(get_plotlyjs(), "")


def outputs(study: Study) -> dict[str, str]:
    """Everything that a person reads of a run, as text."""
    import optuna

    from mpsearch.facts import read_facts
    from mpsearch.report.artifacts import config_json
    from mpsearch.report.dashboard import dashboard_figures, study_attributes, study_note, trial_note
    from mpsearch.report.data import read_run

    facts = read_facts(study.folder)
    run = read_run(study.folder, facts)
    (trials,) = optuna.get_all_study_summaries(f"sqlite:///{study.folder.study_db}")
    shown = optuna.load_study(study_name=trials.study_name, storage=f"sqlite:///{study.folder.study_db}")
    assert [direction.name.lower() for direction in shown.directions] == [study.metric.direction, "minimize"]
    return study.printed | {
        "report": page(study.folder.report_html),
        "debug page": page(study.place / "debug.html"),
        "export file": (study.place / "out" / "precision.json").read_text(),
        "front.json": study.folder.front_json.read_text(),
        "dashboard note": study_note(run, facts, study.folder),
        "dashboard trials": "\n".join(trial_note(record, run, study.folder) for record in run.records),
        "dashboard study": f"{study_attributes(run, facts)} {shown.metric_names}",
        "dashboard attributes": str([trial.user_attrs for trial in shown.trials]),
        "dashboard figures": str([figure.to_json() for figure in dashboard_figures(run).values()]),
        "dashboard config": config_json(run.front.best, facts),
    }


def test_no_score_is_shown_in_percent_or_with_another_sign(study: Study) -> None:
    for name, text in outputs(study).items():
        assert not re.search(r"accuracy|top1", text, re.IGNORECASE), name
        for score in study.scores():
            for wrong in (rf"{score:.2f}\s?%", rf"\b{100 * score:.2f}\b", rf"(?<![\d.])[-−]{abs(score):.4f}"):
                assert not re.search(wrong, text), (name, wrong)


def test_scores_are_shown_in_their_unit(study: Study) -> None:
    best = min((r for r in study.folder.records() if r.score), key=lambda r: -study.metric.quality(r.score or 0.0))
    assert best.score is not None
    shown = study.metric.show(best.score)
    assert shown.endswith("dB") == (study.metric.name == "psnr")
    texts = outputs(study)
    for name in ("run", "status", "front", "finalize", "export", "report", "dashboard note", "dashboard trials"):
        assert (study.metric.number(best.score) if name == "finalize" else shown) in texts[name], name
    for name in ("check", "run", "report", "dashboard note"):
        assert f"{study.metric.goal} on the validation split" in texts[name], name


def test_the_better_score_is_picked_and_the_front_rises_to_it(study: Study) -> None:
    front = json.loads(study.printed["front --json"])
    metric, scores = study.metric, [row["score"] for row in front["front"]]
    assert front["metric"] == metric.to_json()
    assert scores == sorted(scores, key=metric.quality)
    assert metric.quality(scores[-1]) == max(metric.quality(r.score) for r in study.folder.records() if r.score)
    bound = f"{metric.name}{metric.sign}{scores[0]}"
    done = mpsearch("export", "run", "--pick", bound, "--no-verify", "-o", f"{metric.name}-0", cwd=study.place)
    assert f"trial {front['front'][0]['number']}, " in done.stdout, done.stderr
    other = bound.replace(metric.sign, ">=" if metric.sign == "<=" else "<=")
    refused = mpsearch("export", "run", "--pick", other, "-o", "none", cwd=study.place)
    assert refused.returncode == 2
    assert f"of {metric.name} is better" in refused.stderr


def test_the_hypervolume_is_of_the_range_that_stands_beside_it(study: Study) -> None:
    written = json.loads(study.folder.front_json.read_text())
    axis, metric = written["hypervolume_scores"], study.metric
    assert axis["best_is_float"]
    worst = min((r.score for r in study.folder.records() if r.score), key=metric.quality)
    assert axis["worst"] == worst
    assert 0 < written["hypervolume"] <= 1.1
    text = page(study.folder.report_html)
    assert f"0: {metric.show(worst)} (the worst trial)" in text
    assert f"1: {metric.show(axis['best'])} (the float network)" in text


@pytest.mark.slow  # tests/report/test_looking.py asks it of other tasks
def test_looking_at_a_run_loads_neither_torch_nor_the_task(study: Study) -> None:
    import subprocess
    import sys

    code = (
        "import sys, mpsearch; run = sys.argv[1]\n"
        "front, status = mpsearch.front(run), mpsearch.status(run)\n"
        "assert front.pareto.metric == status.pareto.metric; mpsearch.report(run)\n"
        "print(front.pareto.metric.name, 'torch' in sys.modules, 'own_tasks' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, study.folder.path], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [study.metric.name, "False", "False"]


def test_a_run_of_the_first_schema_is_read(study: Study, tmp_path: Path) -> None:
    """Its records call a score `accuracy`, its `run.json` names no metric, and its `problem.json` does by name."""
    old = tmp_path / "old"
    old.mkdir()
    for name in ("study.yaml", "space.yaml", "problem.json"):
        (old / name).write_bytes((study.folder.path / name).read_bytes())
    about = json.loads((study.folder.path / "run.json").read_text())
    (old / "run.json").write_text(
        json.dumps({k: about[k] for k in about if k != "metric"} | {"schema": "mpsearch/run/1"})
    )
    lines = [json.loads(line) for line in study.folder.trials_jsonl.read_text().splitlines()]
    with (old / "trials.jsonl").open("w") as file:
        for line in lines:
            line["correct"] = line.pop("values")
            quality = line.pop("score") * (1 if study.metric.maximize else -1)  # of which more was better
            file.write(json.dumps(line | {"accuracy": quality}) + "\n")
    folder = RunFolder.open(old)
    assert folder.metric == Metric(study.metric.name)
    assert [record.score for record in folder.records()] == [
        study.metric.quality(record.score or math.nan) for record in study.folder.records()
    ]
    assert mpsearch("status", old, cwd=tmp_path).returncode == 0
    assert mpsearch("front", old, cwd=tmp_path).returncode == 0
    assert mpsearch("report", old, cwd=tmp_path).returncode == 0


def test_a_float_network_without_a_finite_score_ends_the_run_in_words(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(STUDY.format(factory="overflowing"))
    (tmp_path / "free.yaml").write_text(FREE)
    done = mpsearch("run", "study.yaml", "--out", "run", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "the float network's bits on val is -inf" in done.stderr
    assert "Traceback" not in done.stderr
