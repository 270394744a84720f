"""The study file: what it may say, and how a wrong one is answered."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mpsearch.errors import StudyError
from mpsearch.study import StudySpec, load_study, parse_study, study_names

SHIPPED_VARIABLES = ("MPSEARCH_RESNET20", "MPSEARCH_CIFAR10_JPEG", "MPSEARCH_RESNET18", "MPSEARCH_IMAGENET")


def document(**sections: Any) -> dict[str, Any]:
    return {
        "name": "mine",
        "task": {"model": "digits_cnn", "data": {"kind": "digits"}},
        "space": "digits",
    } | sections


def task(**keys: Any) -> dict[str, Any]:
    return document(task={"model": "digits_cnn", "data": {"kind": "digits"}} | keys)


def data(**keys: Any) -> dict[str, Any]:
    return task(data={"kind": "digits"} | keys)


def refusal(study: dict[str, Any]) -> str:
    with pytest.raises(StudyError) as caught:
        parse_study(study, source="mine.yaml")
    assert str(caught.value).startswith("mine.yaml cannot be used:\n")
    return str(caught.value)


@pytest.fixture
def write(tmp_path: Path):
    def write(study: dict[str, Any] | str) -> Path:
        path = tmp_path / "mine.yaml"
        path.write_text(study if isinstance(study, str) else yaml.safe_dump(study))
        return path

    return write


@pytest.mark.parametrize("name", study_names())
def test_every_shipped_study_is_read_under_its_name_and_uses_a_space_that_ships(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    from mpsearch.shipped import shipped_names

    for variable in SHIPPED_VARIABLES:
        monkeypatch.setenv(variable, "/somewhere")
    spec = load_study(name)
    assert spec.name == name
    assert spec.space in shipped_names("search_spaces")


def test_the_digits_study_needs_no_environment(monkeypatch: pytest.MonkeyPatch):
    for variable in SHIPPED_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    spec = load_study("digits")
    assert spec.task.checkpoint == "digits_cnn"  # ships beside the study
    assert spec.search.trials >= 24


@pytest.mark.parametrize(
    "study",
    [document(), document(cost={"budget": 0.3}), data(mean=[0.5], std=[1]), document(task={"factory": "a:b"})],
)
def test_a_resolved_study_reads_back_as_the_same_study(study: dict[str, Any]):
    spec = parse_study(study)
    assert parse_study(yaml.safe_load(spec.to_yaml())) == spec


def test_a_study_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        parse_study(document()).search.trials = 3


@pytest.mark.parametrize(
    ("study", "key", "name"),
    [
        (document(serach={}), "serach", "search"),
        (document(search={"trails": 3}), "search.trails", "trials"),
        (task(modle="x"), "task.modle", "model"),
        (data(rooot="x"), "task.data.rooot", "root"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_one(study: dict[str, Any], key: str, name: str):
    assert f"  {key}: no such key; did you mean '{name}'?" in refusal(study)


def test_all_faults_are_told_at_once():
    message = refusal(document(search={"trails": 3}, trial={"steps": "many"}, cost={"model": "bop"}))
    assert len(message.splitlines()) == 4


@pytest.mark.parametrize(
    ("study", "line"),
    [
        (document(search={"trials": "many"}), "search.trials: input should be a valid integer.* (got 'many')"),
        (document(search={"trials": 2.5}), "search.trials: input should be a valid integer.* (got 2.5)"),
        (document(search={"trials": True}), "search.trials: input should be a valid integer.* (got True)"),
        (document(search={"trials": 0}), "search.trials: input should be greater than 0 (got 0)"),
        (document(search=None), "search: input should be a valid dictionary.* (got None)"),
        (document(trial={"lr": float("nan")}), "trial.lr: input should be a finite number (got nan)"),
        (document(trial={"lr": float("inf")}), "trial.lr: input should be a finite number (got inf)"),
        (document(name="my study/1"), "name: string should match pattern .* (got 'my study/1')"),
        (document(search={"sampler": "nsga3"}), "search.sampler: got 'nsga3'; did you mean 'nsga2'?.*"),
        (document(cost={"model": "bop"}), "cost.model: did you mean 'bops'?.*got 'bop'.*"),
        (document(cost={"reference": "8 bit"}), "cost.reference: cannot read '8 bit': write .* w4a8.* (got '8 bit')"),
        (document(cost={"reference": "w17a8"}), "cost.reference: uniform has no 17-bit form.*"),
        (document(storage="sqlite3"), "storage: write sqlite, journal, none.* (got 'sqlite3')"),
        (document(engine={"address": "my host"}), "engine.address: write none, local, auto.* (got 'my host')"),
        (data(mean=[0.5, "x"]), "task.data.mean.1: input should be a valid number.* (got 'x')"),
        (data(std=[0.5, 0.0]), "task.data.std: standard deviations are above 0 (got [0.5, 0.0])"),
        ({"name": "mine", "space": "digits"}, "task: missing; it is required"),
    ],
)
def test_a_wrong_value_is_told_with_its_key_and_what_was_expected(study: dict[str, Any], line: str):
    pattern = ".*".join(re.escape(part) for part in line.split(".*"))
    assert re.search(rf"^  {pattern}$", refusal(study), re.MULTILINE)


@pytest.mark.parametrize(
    ("study", "message"),
    [
        (document(task={}), "task: give both `model` and `data`, or a `factory`"),
        (document(task={"model": "digits_cnn"}), "give both `model` and `data`"),
        (task(factory="a:b"), "`factory` brings its own model, data and metric: leave data, model out"),
        (document(task={"factory": "a:b", "metric": "top5"}), "leave metric out"),
        (task(args={"a": 1}), "`args` are those of a `factory`"),
        (data(val_fraction=0.5, test_fraction=0.5), "leave nothing to train on"),
        (data(download=True), "`download` is for torchvision's small data sets: digits cannot be downloaded"),
        (data(root="x"), "digits reads no folder"),
        (data(args={"a": 1}), "`args` are for a module:factory"),
    ],
)
def test_an_impossible_combination_is_refused(study: dict[str, Any], message: str):
    assert message in refusal(study)


def test_keys_that_are_no_text_are_refused_by_name(write):
    with pytest.raises(StudyError, match="True"):
        load_study(write("name: mine\nspace: digits\ntrue: 3\ntask: {model: digits_cnn, data: {kind: digits}}\n"))


def test_overrides_win_are_typed_and_make_sections(write):
    spec = load_study(
        write(document(search={"trials": 5})),
        ["search.trials=7", "trial.lr=1e-3", "task.data.mean=[0.5]", "cost.budget=0.25", "name=other"],
    )
    assert spec.search.trials == 7
    assert (spec.trial.lr, spec.cost.budget, spec.task.data.mean) == (0.001, 0.25, (0.5,))
    assert spec.name == "other"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("search.trials", "write key.path=value"),
        ("=5", "write key.path=value"),
        ("name.first=x", "'name' holds the value 'mine', not keys"),
        ("search.trails=5", "search.trails: no such key; did you mean 'trials'"),
    ],
)
def test_an_override_that_fits_nowhere_is_refused(write, override: str, message: str):
    with pytest.raises(StudyError) as caught:
        load_study(write(document()), [override])
    assert message in str(caught.value)


def test_numbers_with_an_exponent_are_numbers(write):
    text = yaml.safe_dump(document()) + "trial: {lr: 1e-3, weight_decay: 5E-4}\n"
    spec = load_study(write(text))
    assert (spec.trial.lr, spec.trial.weight_decay) == (1e-3, 5e-4)


def test_environment_variables_and_their_defaults_are_put_in(write, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MINE", "/data")
    monkeypatch.delenv("GONE", raising=False)
    study = task(checkpoint="${MINE}/a.pt", data={"kind": "imagefolder", "root": "${GONE:-/default}/b"})
    spec = load_study(write(study))
    assert spec.task.checkpoint == "/data/a.pt"
    assert spec.task.data.root == "/default/b"


def test_a_variable_that_is_not_set_is_named_with_the_key_that_needs_it(write, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("GONE", raising=False)
    path = write(task(checkpoint="${GONE}"))
    with pytest.raises(StudyError, match=r"task\.checkpoint .* variable GONE.* --set task\.checkpoint=VALUE"):
        load_study(path)
    assert load_study(path, ["task.checkpoint=a.pt"]).task.checkpoint == "a.pt"


def test_a_run_is_looked_at_without_its_variables_and_opened_with_those_of_its_task(monkeypatch: pytest.MonkeyPatch):
    for name in ("GONE", "DB_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    secret = {"storage": "postgresql://me:${DB_PASSWORD}@host/db"}
    spec = parse_study(task(checkpoint="${GONE}") | secret, strict=False)
    with pytest.raises(StudyError, match=r"task\.checkpoint .* variable GONE, which is not set"):
        spec.check_variables()
    parse_study(task(checkpoint="a.pt") | secret, strict=False).check_variables()


@pytest.mark.parametrize("name", ["digitz", "digitz.yaml"])
def test_a_study_that_does_not_exist_is_answered_with_the_nearest(name: str):
    with pytest.raises(StudyError, match=rf"no study '{name}'.*did you mean 'digits'"):
        load_study(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", "is not YAML"),
        ("- a\n- b\n", "must hold keys and values, got list"),
        ("", "must hold keys and values, got NoneType"),
        ("name: !!python/object/apply:os.getcwd []\n", "is not YAML"),
    ],
)
def test_a_file_that_is_no_study_is_refused(write, text: str, message: str):
    with pytest.raises(StudyError, match=message):
        load_study(write(text))


def test_a_file_that_is_no_text_is_refused(tmp_path: Path):
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(StudyError, match="is not YAML"):
        load_study(tmp_path / "a.yaml")


def test_every_default_is_valid():
    assert StudySpec.model_validate(parse_study(document()).model_dump()) == parse_study(document())
