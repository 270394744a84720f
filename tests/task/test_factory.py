"""`module:function`: what is imported for a study, and what is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpsearch.errors import TaskError
from mpsearch.study import names_function
from mpsearch.task.factory import find_function

MODULE = """
import collections, functools
from subprocess import check_output
from builtins import eval as builder
from collections import OrderedDict

def build(width=1):
    return width

@functools.cache
def cached():
    return 3

class Net:
    pass

wide = functools.partial(build, width=2)
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "handed_on.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize("name", ["check_output", "builder", "OrderedDict"])
def test_the_standard_library_is_refused_whoever_hands_it_on(name: str) -> None:
    with pytest.raises(TaskError, match=f"'handed_on:{name}' is of Python's standard library"):
        find_function("task.model", f"handed_on:{name}")


@pytest.mark.parametrize("name", ["build", "cached", "Net", "wide"])
def test_what_a_module_makes_is_found(name: str) -> None:
    assert callable(find_function("task.model", f"handed_on:{name}"))


@pytest.mark.parametrize(
    "name", ["a-b:c", "1a:b", "a b:c", "a:b.c", "a:b:c", ":a", "a:", ".a:b", "a..b:c", "a:b\n", "a/b:c"]
)
def test_what_is_no_name_of_a_function_is_not_imported(name: str) -> None:
    assert not names_function(name)
    with pytest.raises(TaskError, match="write module:function"):
        find_function("task.model", name)
