"""What torch.compile is told about this machine."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest
from torch._inductor import config
from torch._inductor.cpu_vec_isa import x86_isa_checker

from mpsearch.compiler import compiler_missing, trust_vector_units

pytestmark = [
    pytest.mark.skipif(compiler_missing() is not None, reason=str(compiler_missing())),
    pytest.mark.skipif(not x86_isa_checker(), reason="torch tries vector instructions out on x86 only"),
]


@pytest.fixture(autouse=True)
def nothing_is_known_yet() -> Iterator[None]:
    trust_vector_units.cache_clear()
    with config.patch({"cpp.vec_isa_ok": None}):
        yield
    trust_vector_units.cache_clear()


def test_vector_instructions_that_the_compiler_knows_are_not_tried_out() -> None:
    trust_vector_units()
    assert config.cpp.vec_isa_ok is True


def test_a_compiler_that_does_not_know_them_leaves_the_trial_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def refuse(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", refuse)
    trust_vector_units()
    assert config.cpp.vec_isa_ok is None
    assert any(flag.startswith("-mavx") for flag in asked[0])


def test_what_the_user_has_set_stays() -> None:
    config.cpp.vec_isa_ok = False
    trust_vector_units()
    assert config.cpp.vec_isa_ok is False
