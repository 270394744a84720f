"""What torch.compile is told about this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from torch._inductor import config
from torch._inductor.cpu_vec_isa import VecISA, supported_vec_isa_list, valid_vec_isa_list, x86_isa_checker
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from mpsearch.compiler import CACHE, part_caches, trust_vector_units

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(sys.platform != "linux" or not x86_isa_checker(), reason="they are tried out on x86 only"),
]


def forget() -> None:
    trust_vector_units.cache_clear()
    valid_vec_isa_list.cache_clear()
    for kind in {kind for isa in supported_vec_isa_list for kind in type(isa).__mro__}:
        for answer in vars(kind).values():
            if hasattr(answer, "cache_clear"):
                answer.cache_clear()


@pytest.fixture(autouse=True)
def nothing_is_known_yet() -> Iterator[None]:
    forget()
    with config.patch({"cpp.vec_isa_ok": None}):
        yield
    forget()


def test_vector_instructions_that_the_compiler_knows_are_not_tried_out(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[object] = []
    monkeypatch.setattr(VecISA, "check_build", lambda isa, _: tried.append(isa))
    tries = VecISA.check_build
    trust_vector_units()
    assert valid_vec_isa_list()
    assert not tried
    assert VecISA.check_build is tries  # what was replaced is back


def test_those_that_the_compiler_does_not_know_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(command: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        return subprocess.CompletedProcess(command, int(any(flag.startswith("-mavx512") for flag in command)))

    monkeypatch.setattr(subprocess, "run", refuse)
    trust_vector_units()
    assert [str(isa) for isa in valid_vec_isa_list()] == ["avx2"] * ("avx2" in x86_isa_checker())


def test_what_the_user_has_set_stays() -> None:
    config.cpp.vec_isa_ok = False
    trust_vector_units()
    assert valid_vec_isa_list() == []


@pytest.mark.slow
def test_it_comes_to_what_torch_finds_by_trying() -> None:
    ask = "[(str(isa), isa.build_arch_flags()) for isa in cpu_vec_isa.valid_vec_isa_list()]"
    lines = [
        "from mpsearch.compiler import CACHE, part_caches, trust_vector_units",
        "from torch._inductor import cpu_vec_isa",
    ]
    prepared, tried = (
        subprocess.run(
            [sys.executable, "-c", "; ".join([*lines, *first, f"print({ask})"])],
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for first in (["trust_vector_units()"], [])
    )
    assert prepared == tried


def test_code_with_vectors_is_not_met_again_where_none_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CACHE, raising=False)
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    part_caches()
    assert CACHE not in os.environ
    folders = set()
    for capability in ("default", "avx2"):
        monkeypatch.setenv(CACHE, default_cache_dir())  # as torch leaves it once it has asked
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
        part_caches()
        folders.add(os.environ[CACHE])
    assert len(folders) == 2
    monkeypatch.setenv(CACHE, "/the/users")
    part_caches()
    assert os.environ[CACHE] == "/the/users"


def test_a_relative_cache_is_made_absolute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    monkeypatch.setenv(CACHE, "compiled")
    part_caches()
    assert os.environ[CACHE] == os.path.abspath("compiled")
