"""YAML as version 1.2 reads it, refused where nobody means it; and what is wrong with a document, in words."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mpsearch.documents import MOST_CHARACTERS, YamlError, parse_yaml, to_yaml
from mpsearch.errors import ExportError, RunError, SpaceError, StudyError
from mpsearch.exporters.read import read_config
from mpsearch.metric import TOP1
from mpsearch.record import RunFolder
from mpsearch.space.spec import load_space, parse_space
from mpsearch.study import load_study, parse_study, read_spec


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("-12", -12),
        ("010", 10),
        ("0o17", 15),
        ("0xff", 255),
        ("+.inf", math.inf),
        ("-.INF", -math.inf),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("", None),
        *(
            (text, text)
            for text in ("yes", "No", "on", "OFF", "y", "1:30", "2024-01-01", "1_000", "<<", "1e", "e3", ".")
        ),
        ("'1e-3'", "1e-3"),
    ],
)
def test_scalar_is_read_as_yaml_1_2_says(text: str, value: object):
    read = parse_yaml(text)
    assert read == value
    assert type(read) is type(value)


def test_nan_is_a_number():
    assert math.isnan(parse_yaml(".nan"))


PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="ascii"))
ODD = st.sampled_from(
    ["yes", "1e-3", "0o17", "010", "~", "null", "1:30", "<<", "=", ".5", "- a", "a: b", "", " a", ".inf"]
)


@given(st.recursive(PLAIN | ODD, lambda below: st.lists(below) | st.dictionaries(st.text("ab"), below), max_leaves=8))
def test_written_document_reads_the_same(document: object):
    assert parse_yaml(to_yaml(document)) == document


@given(PLAIN | ODD)
def test_written_text_stays_text_for_a_reader_of_yaml_1_1(value: object):
    if isinstance(value, str):
        assert yaml.safe_load(to_yaml({"a": value})) == {"a": value}


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("trial:\n  steps: 1\nname: a\ntrial:\n  lr: 2\n", "trial", (1, 4)),
        ("a:\n  b: 1\n  'b': 2\n", "b", (2, 3)),
        ("- {a: 1,\n   a: 2}", "a", (1, 2)),
        ("8: x\n8: y", "8", (1, 2)),
    ],
)
def test_key_given_twice_is_refused_with_both_lines(text: str, key: str, lines: tuple[int, int]):
    with pytest.raises(YamlError, match=rf"line {lines[1]}: the key '{key}' was given in line {lines[0]} already"):
        parse_yaml(text)


def test_equal_keys_of_different_sections_are_no_repetition():
    assert parse_yaml("a: {x: 1}\nb: {x: 2}\n'8': 1\n8: 2") == {"a": {"x": 1}, "b": {"x": 2}, "8": 1, 8: 2}


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
HOSTILE = {
    "flow lists": "[" * 100_000 + "]" * 100_000,
    "flow maps": "{a: " * 50_000 + "}" * 50_000,
    "block lists": "- " * 100_000 + "a",
    "deep enough": "[" * 60 + "]" * 60,
    "json": '{"layers": ' * 20_000 + "1" + "}" * 20_000,
    "aliases": BOMB,
    "itself": "a: &a [*a]",
    "megabytes": "a: " + "x" * MOST_CHARACTERS,
    "digits": "9" * 10_000,
    "objects": "!!python/object/apply:os.system ['true']",
    "torn": "a: [1, 2",
    "two documents": "a: 1\n---\na: 2\n",
    "unhashable": "? [a]\n: 1\n? {b: 1}\n: 2",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_document_is_refused_by_whoever_reads_it(tmp_path: Path, name: str):
    path = tmp_path / "document.yaml"
    path.write_text(HOSTILE[name])
    folder = RunFolder.create(tmp_path / "run", HOSTILE[name], metric=TOP1)
    with pytest.raises(StudyError, match=str(path)):
        load_study(path)
    with pytest.raises(SpaceError, match=str(path)):
        load_space(path)
    with pytest.raises(ExportError, match=str(path)):
        read_config(path)
    with pytest.raises(RunError, match=r"study\.yaml"):
        read_spec(folder)


def test_repeated_section_of_a_study_is_refused_with_its_file(tmp_path: Path):
    path = tmp_path / "study.yaml"
    path.write_text("name: a\ntrial: {steps: 10}\ntask: {model: digits_cnn}\ntrial: {lr: 0.1}\n")
    with pytest.raises(StudyError, match=r"study\.yaml .*line 4: the key 'trial' was given in line 2 already"):
        load_study(path)


@pytest.mark.parametrize(
    ("document", "line"),
    [
        (
            {"name": "a", "rules": [{"match": "*", "weigth": "uniform:4"}]},
            r"rules\.0\.weigth: no such key; did you mean 'weight'",
        ),
        (
            {"name": "a", "fixed": {"fc": {"wieght": "uniform:4"}}},
            r"fixed\.fc\.wieght: no such key; did you mean 'weight'",
        ),
        (
            {"name": "a", "first": {"activatoin": "uniform:4"}},
            r"first\.activatoin: no such key; did you mean 'activation'",
        ),
        ({"name": "a", "rule": []}, r"rule: no such key; did you mean 'rules'"),
        ({}, "name: missing; it is required"),
    ],
)
def test_wrong_key_of_a_space_is_named_with_the_most_similar(document: dict[str, object], line: str):
    with pytest.raises(SpaceError, match=line):
        parse_space(document)


@pytest.mark.parametrize(
    ("document", "line"),
    [
        ({"trial": {"stpes": 1}}, r"trial\.stpes: no such key; did you mean 'steps'"),
        ({"task": {"data": {"rot": "x"}}}, r"task\.data\.rot: no such key; did you mean 'root'"),
        ({"search": {"sampler": "nsga"}}, r"search\.sampler: got 'nsga'; did you mean 'nsga2'"),
    ],
)
def test_wrong_key_of_a_study_is_named_with_the_most_similar(document: dict[str, object], line: str):
    with pytest.raises(StudyError, match=line):
        parse_study(document)
