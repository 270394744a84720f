"""Every benchmark is behind the one command, says what it does, and runs, on the digits study where it has a study."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quick import FEW_IMAGES, QUICK
from safetensors.torch import load_file

import benchmarks
import mpsearch
from benchmarks.__main__ import found, main
from mpsearch.record import RunFolder
from mpsearch.report.data import read_run
from mpsearch.search.run import run_study
from mpsearch.shipped import shipped_folder
from mpsearch.study import load_study
from mpsearch.task.classification import ClassificationTask
from mpsearch.task.load import load_task

pytestmark = pytest.mark.study

SHARED = {"__init__", "configs", "families", "mhaq_tasks", "__main__", "options", "printing", "rows", "stopwatch"}
SETS = [part for override in QUICK for part in ("--set", override)]

Bench = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Bench:
    """Run a benchmark by its command; the rows that it kept. Repeated, it measures nothing and prints the same."""

    def run(name: str, *options: str) -> list[dict[str, Any]]:
        results = tmp_path / f"{name}.jsonl"
        threads = torch.get_num_threads()
        outputs = []
        try:
            for _ in range(2):
                assert main([name, *options, "--results", str(results)]) == 0
                outputs.append((capsys.readouterr().out, results.read_text()))
        finally:
            torch.set_num_threads(threads)
        assert outputs[0] == outputs[1]
        assert f"command: python -m benchmarks {name}" in outputs[0][0]
        rows = [json.loads(line) for line in outputs[0][1].splitlines()]
        assert all({"commit", "processor", "threads", "date"} <= set(row) for row in rows)
        return rows

    return run


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run of the digits study, with a descent and without stopping."""
    folder = tmp_path_factory.mktemp("run") / "run"
    quick = ["storage=sqlite", "search.trials=6", "search.stop_dominated=false", "search.concurrency=1"]
    warm = ["warm_start.steps=20", "warm_start.budgets=[0.4]", "warm_start.ilp=false", "warm_start.combinations=0"]
    run_study(load_study("digits", [*QUICK, *quick, *warm]), folder)
    return folder


def test_every_module_is_shared_or_a_benchmark_that_is_listed_with_a_sentence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    modules = {path.stem for path in Path(benchmarks.__path__[0]).glob("*.py")}
    sentences = found()
    assert modules - SHARED == set(sentences)
    assert main(["list"]) == 0
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert listed == sentences
    for name, sentence in listed.items():
        assert sentence[-1] in ".?", name
        assert len(sentence) > 20, name


@pytest.mark.parametrize("name", sorted(found()))
def test_every_option_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert " ".join(found()[name].split()) in " ".join(shown.split())
    options = shown.partition("Options:")[2].split("\n  -")[1:]
    assert options
    for option in options:
        assert "  " in option.strip(), option


def test_command_list_imports_no_benchmark() -> None:
    code = (
        "import sys\nfrom benchmarks.__main__ import main\n"
        "assert main(['list']) == 0\nassert not {'torch', 'torchvision', 'benchmarks.zoo'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(benchmarks.__path__[0]).parent)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tran_step"], "tran_step"),
        (["methods", "--rows", "qat-w9"], "unknown row qat-w9"),
        (["train_step", "--shape", "1,x"], "--shape"),
        (["gpu", "--device", "tpu"], "expected cuda or cpu"),
        (["gpu", "--device", "cpu", "--sections", "step-7"], "there is no section 'step-7'"),
        (["stopping", "nowhere"], "nowhere holds no run"),
    ],
)
def test_command_wrong_input_exits_with_2_and_says_what(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert words in printed.err
    assert "command:" not in printed.out


@pytest.mark.slow
def test_controller_scale_survives_its_kill(bench: Bench) -> None:
    (row,) = bench("controller_scale", "--layers", "3", "--trials", "24", "--workers", "4", "--every", "8")
    assert row["killed_at"] == 12
    assert row["same_front_at_kill"]
    assert row["uninterrupted"]["trials"] == row["resumed"]["trials"] == 24
    assert [at["trials"] for at in row["growth"]][-1] == 24


@pytest.mark.slow
@pytest.mark.ray
def test_soak_loses_nothing(bench: Bench) -> None:
    local = [*SETS, "--set", "engine.address=local", "--set", "storage=sqlite", "--set", "trial.steps=200"]
    cold = [part for name in ("method=none", "ilp=false", "combinations=0") for part in ("--set", f"warm_start.{name}")]
    (row,) = bench("soak", *local, *cold, "--minutes", "1.5", "--every", "15")
    assert row["kills"] > 0
    assert row["trials"] >= 4
    assert row["exit_codes_at_the_end"] == [143, 0]


@pytest.mark.slow
def test_descent_compares_two_seeds(bench: Bench, tmp_path: Path) -> None:
    options = ["--study", "digits", *SETS, "--steps", "12", "--budgets", "0.5,0.4", "--work", str(tmp_path)]
    (row,) = bench("descent", *options, "--seeds", "0,1", "--threads", "1")
    assert [at["budget"] for at in row["snapshots"]] == [0.5, 0.4]
    assert -1 <= row["snapshots"][0]["rank_correlation"] <= 1
    assert set(row["descents"]) == {"seed 0", "seed 1"}


@pytest.mark.slow
def test_descent_of_runs_is_their_own(bench: Bench, run_folder: Path) -> None:
    (row,) = bench("descent", "--runs", str(run_folder), "--threads", "1")
    assert list(row["descents"]) == [str(run_folder)]


@pytest.mark.slow
def test_export_agreement_native_answers_as_we_do(bench: Bench) -> None:
    rows = bench("export_agreement", "--networks", "digits", "--only", "native")
    assert {row["config"] for row in rows} == {"mixed", "types"}
    assert all(row["same_answer"] == row["images"] for row in rows)


@pytest.mark.slow
def test_gpu_is_tried_out_on_the_cpu(bench: Bench) -> None:
    rows = bench("gpu", "--device", "cpu", "--sections", "data,step-128", "--inside")
    assert [(row["section"], row["passed"]) for row in rows] == [("data", True), ("step-128", True)]
    made, batch = rows[0]["checks"]
    assert (made["figure"], made["goal"], made["passed"]) == ("cpu", "cpu", True)
    assert float(batch["figure"]) > 0
    assert [check["what"] for check in rows[1]["checks"]][1:] == [
        "step, float",
        "step, quantized w4a4",
        "step, quantized w4a4 + teacher",
    ]


@pytest.mark.slow
def test_learned_thresholds_that_stay_train_as_uniform_does(bench: Bench) -> None:
    """A learning rate of 0 repeats the uniform arm, another one does not."""
    options = ("--study", "digits", *SETS, "--targets", "w3a2", "--seeds", "1", "--steps", "5", "--lrs", "0,0.1")
    uniform, still, moved = bench("learned_thresholds", *options)
    assert still["start_divergence"] == pytest.approx(uniform["start_divergence"])
    assert still["losses"] == pytest.approx(uniform["losses"], abs=2e-3)
    assert moved["losses"] != pytest.approx(uniform["losses"], abs=2e-3)
    assert uniform["thresholds"] == {}
    assert set(map(tuple, still["thresholds"].values())) == {(0.5, 1.5, 2.5)}


@pytest.mark.slow
def test_methods_makes_a_row_a_method(bench: Bench) -> None:
    rows = bench("methods", "--study", "digits", "--rows", "ptq-w8a8-data-free,qat-w4a4", "--epochs", "0.1")
    assert [row["row"] for row in rows] == ["ptq-w8a8-data-free", "qat-w4a4"]
    assert rows[0]["val"] == pytest.approx(rows[0]["float_val"], abs=5)


@pytest.mark.slow
def test_report_speed_measures_in_a_process_of_its_own(bench: Bench) -> None:
    (row,) = bench("report_speed", "--trials", "10", "--layers", "3")
    assert row["peak_mib"] >= row["before_mib"] > 50


def test_sensitivity_both_ways_give_one_table(bench: Bench) -> None:
    options = ["--samples", "16", "--widths", "3-4", "--batch", "8", "--threads", "1"]
    (row,) = bench("sensitivity", "--model", "digits_cnn", "--shape", "3,8,8", *options)
    assert row["largest_difference"] < 1e-5
    assert row["stages"]["KL, naive"]["entries"] == row["stages"]["KL, prefix reuse"]["entries"] > 0


@pytest.mark.slow
def test_starts_trains_the_first_config_again(bench: Bench, run_folder: Path) -> None:
    rows = bench("starts", str(run_folder), "--budget", "0.4", "--configs", "3", "--repeats", "2")
    assert [(row["config"], row["repeat"]) for row in rows[:2]] == [(0, 0), (0, 1)]
    assert len(rows) >= 4


@pytest.mark.slow
def test_stopping_replays_a_run(bench: Bench, run_folder: Path) -> None:
    (row,) = bench("stopping", str(run_folder))
    assert row["trials"] == 6
    assert 0 <= row["saved_s"] <= row["total_s"]


def test_train_step_times_three_kinds_of_step(bench: Bench) -> None:
    options = ["--batch", "8", "--steps", "1", "--rounds", "2", "--eager", "--threads", "1"]
    (row,) = bench("train_step", "--model", "digits_cnn", "--shape", "3,8,8", *options)
    assert {name: len(times) for name, times in row["step_s"].items()} == {
        "float": 2,
        "quantized w4a4": 2,
        "quantized w4a4 + teacher": 2,
    }


@pytest.mark.slow
def test_worker_memory_is_that_of_one_worker(bench: Bench) -> None:
    cold = [part for name in ("method=none", "ilp=false", "combinations=0") for part in ("--set", f"warm_start.{name}")]
    (row,) = bench("worker_memory", *SETS, *cold, "--trials", "4", "--steps", "2", "--settled", "2")
    assert row["ended"] == 4
    assert row["failed"] == 0
    assert row["grown_mib"] >= 0


@pytest.mark.slow
def test_trial_overhead_adds_up_to_worker_time(bench: Bench) -> None:
    options = ["--trials", "2", "--concurrency", "1", "--seconds", "0.2", "--set", "warm_start.method=none"]
    (row,) = bench("trial_overhead", *SETS, *options)
    assert row["records"] == 2
    assert 0 < row["train_s"] + row["evaluate_s"] + row["prepare_s"] <= row["worker_s"]


def test_uniform_ladder_makes_a_row_a_config_and_seed(bench: Bench) -> None:
    options = ["--study", "digits", *SETS, "--configs", "w8a8:0,w4a4", "--steps", "2", "--threads", "1"]
    rows = bench("uniform_ladder", *options, "--seeds", "0,1")
    assert [(row["config"], row["steps"], row["seed"]) for row in rows] == [
        ("w8a8", 0, 0),
        ("w8a8", 0, 1),
        ("w4a4", 2, 0),
        ("w4a4", 2, 1),
    ]
    assert rows[0]["val"] == pytest.approx(rows[0]["float_val"], abs=0.05)
    assert rows[0]["cost"] > rows[2]["cost"]


def test_outliers_of_hardware_fronts_leave_the_float_network_as_it_was(tmp_path: Path) -> None:
    from benchmarks.hardware_fronts import OUTLIER, with_outliers

    path = with_outliers("digits", list(FEW_IMAGES), tmp_path / "net.safetensors")
    before = load_file(shipped_folder("checkpoints") / "digits_cnn.safetensors")
    larger = [name for name, tensor in load_file(path).items() if (tensor / before[name]).max() > OUTLIER / 2]
    assert 1 <= len({name.rpartition(".")[0] for name in larger}) <= 3


@pytest.mark.slow
def test_hardware_fronts_keep_to_the_hardware(bench: Bench, tmp_path: Path) -> None:
    options = [
        "--study",
        "digits",
        *SETS,
        "--set",
        "warm_start.method=none",
        "--minutes",
        "0.3",
        "--cases",
        "mpic,limits",
        "--work",
        str(tmp_path),
    ]
    rows = bench("hardware_fronts", *options)
    assert [row["case"] for row in rows] == ["mpic", "limits"]
    for row in rows:
        assert row["front"]
        assert sum(row["knee_pairs"].values()) == 11
        assert "the knee, in each cost" in row["answer"][0]


def test_zoo_smallest_model_passes(bench: Bench) -> None:
    stages = ("prepare", "fold", "train", "native", "packed")
    (row,) = bench("zoo", "--only", "squeezenet1_1", "--stages", ",".join(stages))
    assert all(row[stage] == "ok" for stage in stages), row


@pytest.mark.parametrize("arm", ["full", "rungs", "rungs without prescreen", "surrogate", "uniform"])
def test_every_arm_of_search_quality_is_a_study(arm: str) -> None:
    from benchmarks.search_quality import ARMS

    spec = load_study("digits", [override.replace("UNIFORM", "uniform") for override in ARMS[arm]])
    assert (len(spec.trial.lengths) > 1) == ("rungs" in arm)
    assert (spec.search.prescreen == 0) == (arm in ("rungs without prescreen", "uniform"))
    assert (spec.search.sampler == "surrogate") == (arm == "surrogate")


@pytest.mark.slow  # a search by the command line, and final trainings
def test_search_quality_searches_once_and_peers_reads_its_points(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--study", "digits", "--arms", "random", "--seeds", "0", "--minutes", "0.1", "--epochs", "0.1", *SETS]
    command = ["search_quality", *options, "--work", str(tmp_path / "work"), "--results", str(tmp_path / "rows")]
    picture = tmp_path / "picture.html"
    assert main([*command, "--picture", str(picture)]) == 0
    assert "random" in capsys.readouterr().out
    before = (tmp_path / "rows.csv").read_text()
    assert main(command) == 0
    assert (tmp_path / "rows.csv").read_text() == before
    assert picture.stat().st_size > 1e6
    capsys.readouterr()
    assert main(["peers", "--points", str(tmp_path / "rows.csv"), "--arm", "random", "--study", "digits", *SETS]) == 0
    assert "AIMET" in capsys.readouterr().out


def test_mhaq_exports_a_mixed_network_and_reads_its_own_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All but MHAQ itself, which no package index has."""
    from benchmarks import mhaq

    assert main(["mhaq"]) == 2
    assert main(["mhaq", "--root", str(tmp_path)]) == 2
    assert "is no checkout of MHAQ" in capsys.readouterr().err
    task = load_task(load_study("digits").task)
    assert isinstance(task, ClassificationTask)
    network = mhaq.mixed_network(task)
    targets = {name: (p.weight.bits, p.activation.bits) for name, p in network.config.items() if not p.weight.is_float}
    assert list(targets.values()) == [(2, 3), (3, 4), (4, 3), (5, 32), (8, 3), (2, 4), (3, 3)]
    folder = mpsearch.export(network, "mhaq", tmp_path / "out").path
    script = mhaq.load_script(folder)
    script.check_weights(task.float_model())
    data = list(mhaq.Epoch(2, lambda seed: task.train_batches(8, 2, seed)))
    assert [x.shape for x, _ in data] == [(8, 1, 8, 8)] * 2
    bits = {"weight_bit": 2, "act_bit": 3, "true_weight": 2.0, "true_act": 3.5, "converged": False}
    row = {"mhaq": "0", "steps_done": 4, "batch": 8, "seconds": 1, "layers": {"conv": bits}, "is_converged": False}
    row |= {"test": {"Accuracy_top1": 0.5}, "images": 9, "float_val": 0.9, "imported": False}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert main(["mhaq", "--print", "--results", str(tmp_path / "rows.jsonl")]) == 0
    assert "1 of 1 layers above their target" in capsys.readouterr().out


@pytest.mark.slow
def test_bn_batches_of_a_trained_config(bench: Bench) -> None:
    options = ("--study", "digits", *SETS, "--batches", "1,4", "--repeats", "2")
    eight, two = bench("bn_batches", *options, "--bits", "8,2")
    assert eight["cost"] > two["cost"]
    assert {count: len(values) for count, values in eight["scores"].items()} == {"1": 2, "4": 2}
    assert len({*two["divergences"]["1"], *two["divergences"]["4"]}) == 4  # other batches, other statistics


@pytest.mark.slow
def test_origins_of_a_run(bench: Bench, run_folder: Path) -> None:
    (row,) = bench("origins", str(run_folder))
    assert (row["study"], row["trials"]) == ("digits", 6)
    report = read_run(RunFolder.open(run_folder)).progress
    assert sum(origin["added"] for origin in row["origins"]) == pytest.approx(report.hypervolume.iloc[-1])
    for before, after in row["budgets"].values():
        assert after[0] >= before[0]
        assert after[1] <= before[1]


@pytest.mark.slow
def test_samplers_go_on_from_the_same_trials(
    bench: Bench, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import samplers

    assert main(["samplers", str(run_folder)]) == 2
    assert "has 6 trials and 0 start scores" in capsys.readouterr().err
    monkeypatch.setattr(samplers, "AFTER", (4, 8))
    run = tmp_path / "longer"
    run_study(load_study("digits", [*QUICK, "search.trials=10", "search.stop_dominated=false"]), run)
    rows = bench("samplers", str(run), "--names", "additive,random", "--seeds", "0")
    assert [row["sampler"] for row in rows] == ["additive", "random"]
    first, other = (row["mean_divergence"] for row in rows)
    assert list(first) == ["0", "4", "8"]
    assert first["0"] == other["0"]
