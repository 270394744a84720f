"""The commands as a user types them: what they print, their exit codes, and what bad input gets."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from commands import Done, mpsearch
from filelock import FileLock

pytestmark = pytest.mark.study

QUICK = """
name: quick
task: {model: digits_cnn, checkpoint: digits_cnn, data: {kind: digits, val_fraction: 0.05, test_fraction: 0.9}}
space: digits
search: {trials: 9, prescreen: 0, seed: 1, stop_dominated: false}
trial: {steps: 2, batch_size: 16, bn_batches: 1, calibration_samples: 32, precision: fp32}
final: {pick: 2, epochs: 0.1, seeds: 2}
engine: {address: none}
"""


def typed(*arguments: str | Path, cwd: Path) -> Done:
    """`mpsearch` in a process of its own, as a shell runs it."""
    command = [sys.executable, "-c", "from mpsearch.cli import main; main()", *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=240, env={**os.environ, "COLUMNS": "160"}
    )


@pytest.fixture
def home(shared: Path, tmp_path: Path) -> Path:
    """A working folder with a quick study and a finished run of it: each test has a copy, the run is made once."""
    folder = shared / "cli"
    with FileLock(shared / "cli.lock"):
        if not (folder / "printed.txt").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            (folder / "quick.yaml").write_text(QUICK)
            done = mpsearch("run", "quick.yaml", "--out", "run", cwd=folder)
            assert done.returncode == 0, done.stderr
            (folder / "printed.txt").write_text(done.stdout)
    return Path(shutil.copytree(folder, tmp_path / "home"))


def refused(done: Done, *words: str) -> None:
    """Exit code 2, one message, no traceback."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def test_run_prints_the_front_and_leaves_a_whole_run_folder(home: Path) -> None:
    printed = (home / "printed.txt").read_text()
    assert "knee" in printed
    assert "report.html" in printed
    for name in ("study.yaml", "trials.jsonl", "trials.parquet", "front.json", "study.db", "report.html", "log.txt"):
        assert (home / "run" / name).stat().st_size > 0, name
    assert yaml.safe_load((home / "run" / "study.yaml").read_text())["search"]["trials"] == 9


def test_status_counts_and_names_the_best(home: Path) -> None:
    status = json.loads(mpsearch("status", "run", "--json", cwd=home).stdout)
    assert (status["completed"], status["failed"], status["stopped"], status["running"]) == (9, 0, 0, 0)
    front = json.loads(mpsearch("front", "run", "--json", cwd=home).stdout)
    assert status["best"]["score"] == max(row["score"] for row in front["front"])
    assert status["hypervolume"] == front["hypervolume"] > 0


def test_front_is_the_same_as_table_json_and_csv(home: Path) -> None:
    rows = json.loads(mpsearch("front", "run", "--json", cwd=home).stdout)["front"]
    csv = mpsearch("front", "run", "--csv", cwd=home).stdout.splitlines()
    table = mpsearch("front", "run", cwd=home).stdout
    assert len(csv) == len(rows) + 1
    assert [row["cost"] for row in rows] == sorted(row["cost"] for row in rows)
    assert [row["score"] for row in rows] == sorted(row["score"] for row in rows)
    for row in rows:
        assert f"{row['cost']:.4f}" in table


@pytest.mark.parametrize("columns", [80, 160])
def test_front_cuts_nothing_where_the_terminal_is_narrow(home: Path, columns: int) -> None:
    table = mpsearch("front", "run", "--costs", cwd=home, columns=columns).stdout
    assert "…" not in table
    assert ("activation_bytes_peak  " in table) == (columns == 160)


def test_front_keeps_only_weights_that_can_be_picked(home: Path) -> None:
    document = json.loads(mpsearch("front", "run", "--json", cwd=home).stdout)
    wanted = {row["number"] for row in (*document["front"], *document["uniform"])}
    kept = {
        int(path.stem.removeprefix("trial-")) for path in (home / "run" / "checkpoints").glob("trial-*.safetensors")
    }
    assert kept == wanted


def test_resume_of_a_finished_run_goes_on_when_more_trials_are_wanted(home: Path) -> None:
    before = (home / "run" / "trials.jsonl").read_text()
    done = mpsearch("resume", "run", "--trials", "11", cwd=home)
    assert done.returncode == 0, done.stderr
    after = (home / "run" / "trials.jsonl").read_text()
    assert after.startswith(before)
    configs = [json.dumps(json.loads(line)["config"], sort_keys=True) for line in after.splitlines()]
    assert len(configs) == len(set(configs)) == 11


@pytest.mark.slow  # tests/test_going_on.py says that an edit is seen
def test_a_run_keeps_to_the_space_that_it_began_with(home: Path) -> None:
    text = (home / "run" / "space.yaml").read_text()
    (home / "space.yaml").write_text(text)
    (home / "own.yaml").write_text(
        QUICK.replace("space: digits", "space: space.yaml").replace("trials: 9", "trials: 8") + "storage: none\n"
    )
    assert mpsearch("run", "own.yaml", "--out", "own", cwd=home).returncode == 0
    (home / "space.yaml").write_text(text.replace("1-8", "4-8"))
    done = mpsearch("resume", "own", "--trials", "9", "--json", cwd=home)
    assert done.returncode == 0, done.stderr
    ladder = {row["number"] for row in json.loads(done.stdout)["uniform"]}
    assert len(ladder) == 8  # w8a8 to w1a1: still the first space's


def test_export_gives_what_the_trial_scored(home: Path) -> None:
    done = mpsearch("export", "run", "--pick", "best", "--to", "native", "-o", "exported", cwd=home)
    assert done.returncode == 0, done.stderr
    document = json.loads((home / "exported" / "precision.json").read_text())
    import mpsearch as library
    from mpsearch.study import load_study
    from mpsearch.task.load import load_task

    task = load_task(load_study(home / "quick.yaml").task)
    model = library.load(task.float_model(), home / "exported")
    assert task.evaluate(model, "val") == document["score"]["val"]
    assert f"{100 * document['score']['val']:.2f} %" in done.stdout


def test_export_to_other_formats_writes_a_manifest(home: Path) -> None:
    done = mpsearch("export", "run", "--pick", "trial:0", "--to", "packed", "-o", "packed", cwd=home)
    assert done.returncode == 0, done.stderr
    assert json.loads((home / "packed" / "export.json").read_text())["converted"] == []


def test_export_to_mhaq_refuses_linear_layers_by_name_or_leaves_them_float(home: Path) -> None:
    to_mhaq = ("export", "run", "--pick", "trial:0", "--to", "mhaq", "-o", "mhaq")
    done = mpsearch(*to_mhaq, cwd=home)
    assert done.returncode == 2
    assert "linear (linear) weight uniform:8/channel: float would hold it" in done.stderr
    assert mpsearch(*to_mhaq, "--allow-lossy", cwd=home).returncode == 0
    converted = json.loads((home / "mhaq" / "export.json").read_text())["converted"]
    assert "linear" in {entry["layer"] for entry in converted}
    assert (home / "mhaq" / "train_in_mhaq.py").is_file()


def test_import_scores_a_config_made_elsewhere(home: Path) -> None:
    assert mpsearch("export", "run", "--pick", "trial:0", "--to", "packed", "-o", "other", cwd=home).returncode == 0
    exported = json.loads((home / "other" / "export.json").read_text())["layers"]
    table = {name: {"weight_bit_width": 5, "input_bit_width": 6} for name in exported}
    (home / "table.json").write_text(json.dumps(table))
    before = (home / "run" / "trials.jsonl").read_text()
    done = mpsearch("import", "run", "table.json", "--no-score", "-o", "config.json", cwd=home)
    assert done.returncode == 0, done.stderr
    assert (home / "run" / "trials.jsonl").read_text() == before
    done = mpsearch("import", "run", "config.json", cwd=home)
    assert done.returncode == 0, done.stderr
    lines = (home / "run" / "trials.jsonl").read_text().splitlines()
    assert len(lines) == len(before.splitlines()) + 1
    record = json.loads(lines[-1])
    assert record["origin"] == "manual"
    assert f"trial {record['number']}: val {100 * record['score']:.2f} %" in done.stdout
    assert mpsearch("import", "run", "config.json", cwd=home).returncode == 0  # known: not run again
    assert len((home / "run" / "trials.jsonl").read_text().splitlines()) == len(lines)
    (home / "table.json").write_text(json.dumps({"conv9": 4}))
    refused(mpsearch("import", "run", "table.json", cwd=home), "'conv9'", "conv1")


def test_finalize_scores_test_and_does_nothing_twice(home: Path) -> None:
    first = mpsearch("finalize", "run", cwd=home)
    assert first.returncode == 0, first.stderr
    assert "float: top1 on val" in first.stdout
    again = mpsearch("finalize", "run", "--json", cwd=home)
    assert again.stderr == ""  # no training was announced
    document = json.loads(again.stdout)
    assert 2 <= len(document["rows"]) <= 4
    assert all(row["seeds"] == 2 and 0 <= row["test_mean"] <= 1 for row in document["rows"])
    assert "Final training" in (home / "run" / "report.html").read_text()


def test_ptq_scores_both_splits_and_exports_what_it_scored(home: Path) -> None:
    arguments = ("ptq", "quick.yaml", "--bits", "w8a8", "--rounding", "nearest", "--samples", "64")
    done = mpsearch(*arguments, "--out", "quantized", "--json", cwd=home)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert abs(document["val"] - document["float_val"]) < 0.02
    assert min(document["test"], document["float_test"]) >= 0
    assert next(iter(document["seconds"])) == "inspect"
    import mpsearch as library
    from mpsearch.study import load_study
    from mpsearch.task.load import load_task

    task = load_task(load_study(home / "quick.yaml").task)
    model = library.load(task.float_model(), home / "quantized")
    assert task.evaluate(model, "val") == document["val"]


def test_train_scores_both_splits_and_exports_what_it_scored(home: Path) -> None:
    arguments = ("train", "quick.yaml", "--target", "w4a4", "--epochs", "0.2")
    done = mpsearch(*arguments, "--json", "--out", "trained", cwd=home)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert {"float_val", "float_test", "val", "test", "cost", "seconds"} <= set(document)
    exported = json.loads((home / "trained" / "precision.json").read_text())
    assert exported["score"]["test"] == pytest.approx(document["test"])
    again = mpsearch("train", "quick.yaml", "--target", "trained", "--epochs", "0.1", "--method", "gdnsq", cwd=home)
    assert again.returncode == 0, again.stderr
    assert "gdnsq trained" in again.stdout


def test_ptq_works_without_data(home: Path) -> None:
    done = mpsearch("ptq", "quick.yaml", "--bits", "w8a8", "--data-free", cwd=home)
    assert done.returncode == 0, done.stderr
    assert "w8a8" in done.stdout


def test_debug_finds_what_two_bits_break_and_writes_a_page(home: Path) -> None:
    done = mpsearch("debug", "quick.yaml", "w2a32/tensor", "--samples", "50", "--out", "why.html", cwd=home)
    assert done.returncode == 0, done.stderr
    for words in ("on 50 samples of the validation split", "weights alone", "mpsearch ptq quick.yaml --bits w2a32"):
        assert words in done.stdout, words
    assert "What to try" in (home / "why.html").read_text()


def test_debug_reads_an_exported_config_and_prints_json(home: Path) -> None:
    config = {"weight": {"quantizer": "uniform", "bits": 8, "granularity": "channel"}}
    config["activation"] = {"quantizer": "float", "bits": 32, "granularity": "tensor"}
    layers = [
        row["layer"] for row in json.loads(mpsearch("inspect", "quick.yaml", "--json", cwd=home).stdout)["layers"]
    ]
    document = {"schema": "mpsearch/precision-config/1", "layers": dict.fromkeys(layers, config)}
    (home / "own.json").write_text(json.dumps(document))
    done = mpsearch("debug", "quick.yaml", "own.json", "--json", cwd=home)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["page"] == "debug.html"
    assert (home / "debug.html").stat().st_size > 0
    assert 0 < found["float_val"] <= 1
    assert [row["layer"] for row in found["layers"]] == layers
    assert all(row["weight"]["sqnr_db"] > 30 and row["activation"] is None for row in found["layers"])
    (home / "own.json").write_text(json.dumps(document | {"layers": {"conv9": config}}))
    refused(mpsearch("debug", "quick.yaml", "own.json", cwd=home), "'conv9'", "did you mean 'conv")


def test_check_says_what_will_be_optimised_in_units(home: Path) -> None:
    done = mpsearch("check", "quick.yaml", "--set", "cost.model=bops", cwd=home)
    assert done.returncode == 0, done.stderr
    for words in ("Maximize top1 on the validation split", "BOPs", "11 layers", "One trial should take", "trials: 9"):
        assert words in done.stdout, words


def test_inspect_lists_every_layer(home: Path) -> None:
    document = json.loads(mpsearch("inspect", "quick.yaml", "--json", cwd=home).stdout)
    assert len(document["layers"]) == 11
    assert sum(layer["macs"] for layer in document["layers"]) == document["macs"]
    table = mpsearch("inspect", "quick.yaml", cwd=home).stdout
    assert all(layer["layer"] in table for layer in document["layers"])
    assert "uniform:1-8" in table


def test_inspect_sensitivity_prints_the_table_and_the_ladder_of_the_same_costs(home: Path) -> None:
    arguments = ("inspect", "quick.yaml", "--sensitivity", "--samples", "16", "--proxy", "sqnr")
    document = json.loads(mpsearch(*arguments, "--json", cwd=home).stdout)
    assert (document["proxy"], document["samples"]) == ("sqnr", 16)
    assert len(document["sensitivity"]) == 11 * 2 * 8
    assert len(document["ilp_ladder"]) == 8  # w8a8 to w1a1
    for step in document["ilp_ladder"]:
        assert step["cost"] <= step["budget"]
        assert step["value"] <= step["uniform_value"] * (1 + 1e-9)
    printed = mpsearch(*arguments, cwd=home).stdout
    assert "sqnr, ILP" in printed
    for row in document["sensitivity"]:
        if row["precision"] == "uniform:4/channel":
            line = next(line for line in printed.splitlines() if line.split()[:1] == [row["layer"]])
            assert f"{row['value']:.1e}" in line.split()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "digts"), ("no study 'digts'", "did you mean 'digits'")),
        (("run", "quick.yaml", "--out", "run"), ("already holds a run", "resume")),
        (("run", "quick.yaml", "--out", "x", "--set", "search.trails=3"), ("search.trails", "did you mean 'trials'")),
        (("run", "quick.yaml", "--out", "x", "--set", "search.trials=many"), ("search.trials", "'many'")),
        (("run", "quick.yaml", "--out", "x", "--set", "space=digit"), ("no search space 'digit'", "digits")),
        (("run", "quick.yaml", "--out", "x", "--set", "cost.budget=0.0001"), ("cost.budget", "cheapest config")),
        (("run", "quick.yaml", "--out", "x", "--set", "task.checkpoint=no.pt"), ("no.pt",)),
        (("run", "quick.yaml", "--out", "x", "--time-limit", "soon"), ("--time-limit", "10m")),
        (("status", "nowhere"), ("holds no run",)),
        (("export", "run", "--pick", "trial:99", "-o", "x"), ("no trial 99",)),
        (("export", "run", "--pick", "most", "-o", "x"), ("cannot pick 'most'",)),
        (("export", "run", "--to", "native2", "-o", "x"), ("unknown export format 'native2'",)),
        (("ptq", "quick.yaml", "--bits", "four"), ("'four'", "w4a8")),
        (("train", "quick.yaml", "--target", "four"), ("'four'", "w4a8", "file")),
        (("train", "quick.yaml", "--target", "w4a4", "--method", "gdn"), ("'gdn'", "gdnsq")),
        (("train", "quick.yaml", "--target", "w4a4", "--recipe", "mhaq"), ("qat has no recipe", "--method gdnsq")),
        (
            ("train", "quick.yaml", "--target", "w4a4", "--method", "gdnsq", "--recipe", "mhaqs"),
            ("no recipe 'mhaqs'", "'mhaq'"),
        ),
        (("train", "quick.yaml", "--target", "apot:4 x float", "--method", "gdnsq"), ("apot:4", "uniform")),
        (("ptq", "quick.yaml", "--bits", "w4a8", "--rounding", "adaround", "--data-free"), ("adaround needs",)),
        (("debug", "quick.yaml", "own4.json"), ("CONFIG got 'own4.json'", "no such file", "w4a8/tensor")),
        (("debug", "quick.yaml", "w17a17"), ("uniform has no 17-bit form",)),
        (("debug", "quick.yaml", "quick.yaml"), ("quick.yaml: layer 'name'", "expected bits")),
        (("debug", "quick.yaml", "w8a8", "--out", "no/x"), ("--out got 'no/x'", "a file in a folder that exists")),
        (("inspect", "quick.yaml", "--sensitivity", "--proxy", "hessian"), ("'hessian'", "kl", "fit")),
        (("inspect", "quick.yaml", "--samples", "8"), ("add --sensitivity",)),
        (("check", "quick.yaml", "--set", "engine.address=nowhere"), ("engine.address", "ray://HOST:PORT")),
    ],
)
def test_bad_input_is_refused_with_what_to_do(home: Path, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    refused(mpsearch(*arguments, cwd=home), *words)
    assert not (home / "x").exists()


def test_nan_weights_are_refused_by_name(home: Path) -> None:
    from mpsearch.study import load_study
    from mpsearch.task.load import load_task

    state = load_task(load_study(home / "quick.yaml").task).float_model().state_dict()
    name = next(iter(state))
    state[name].view(-1)[0] = float("nan")
    torch.save(state, home / "nan.pt")
    refused(mpsearch("check", "quick.yaml", "--set", "task.checkpoint=nan.pt", cwd=home), name, "NaN")


def test_a_network_without_layers_is_refused(home: Path) -> None:
    (home / "nothing.py").write_text(
        "import torch\n"
        "class Sums(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.gain = torch.nn.Parameter(torch.ones(10))\n"
        "    def forward(self, x):\n"
        "        return x.sum((1, 2, 3))[:, None] * self.gain\n"
        "def build():\n"
        "    return Sums()\n"
    )
    done = mpsearch(
        "check", "quick.yaml", "--set", "task.model=nothing:build", "--set", "task.checkpoint=null", cwd=home
    )
    refused(done, "no", "layer")


def test_a_foreign_run_folder_is_refused(home: Path, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "run.json").write_text('{"schema": "mpsearch/run/0", "mpsearch": "0.0.1"}')
    refused(typed("status", "old", cwd=tmp_path), "mpsearch/run/0", "mpsearch/run/2")


def test_an_unwritable_place_is_refused(home: Path) -> None:
    (home / "file").write_text("")
    refused(mpsearch("run", "quick.yaml", "--out", "file/run", cwd=home), "cannot write", "--out")


def test_python_api_runs_a_study(home: Path, tmp_path: Path) -> None:
    import mpsearch as library

    spec = library.load_study(home / "quick.yaml", ["search.trials=2", "storage=none"])
    front = library.run_study(spec, tmp_path / "run")
    assert 1 <= len(front) <= 2
    assert front.best.score is not None


def test_rank_says_how_well_proxies_foretold_the_trials(home: Path) -> None:
    done = mpsearch("rank", "run", "--proxies", "sqnr", "--strata", "1", "--json", cwd=home)
    assert done.returncode == 0, done.stderr
    rows = {row["proxy"]: row for row in json.loads(done.stdout)["rows"]}
    assert set(rows) == {"before", "halfway", "start", "additive", "divergence", "sqnr"}
    assert rows["sqnr"]["n"] >= 8
    assert rows["sqnr"]["tau"] > 0.3  # fewer bits, less accuracy
    assert (home / "run" / "warmstart" / "sensitivity-sqnr.json").exists()
    refused(mpsearch("rank", "run", "--proxies", "hawq", cwd=home), "hawq", "jeffreys")


def test_streams_that_are_closed_are_opened_before_files_get_their_numbers(tmp_path: Path) -> None:
    look = (
        "import faulthandler, os, pathlib, subprocess, sys; from mpsearch.cli.base import _open_missing_streams;"
        "_open_missing_streams();"
        "faulthandler.enable(); print('unseen'); print('unseen', file=sys.stderr); sys.stdin.read();"
        "ended = subprocess.run(['sh', '-c', 'echo unseen && echo unseen >&2']).returncode;"
        "opened = {os.readlink(f'/proc/self/fd/{number}') for number in range(3)};"
        "pathlib.Path(sys.argv[1]).write_text(f'{ended} {opened}')"
    )
    closed = 'exec "$@" <&- >&- 2>&-'
    subprocess.run(["sh", "-c", closed, "sh", sys.executable, "-c", look, tmp_path / "seen"], check=True)
    assert (tmp_path / "seen").read_text() == "0 {'/dev/null'}"
