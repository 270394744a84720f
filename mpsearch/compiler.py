"""What torch.compile needs on this machine, and what it need not find out anew in every process."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from typing import Any

import torch


@functools.cache
def compiler_missing() -> str | None:
    """Why torch.compile cannot work here; None: it can."""
    if torch.cuda.is_available():
        return None
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        compiler = get_cpp_compiler()
    except Exception as error:  # torch raises various types where there is none
        return f"no C++ compiler was found ({type(error).__name__})"
    return None if shutil.which(compiler) else f"the C++ compiler {compiler} was not found"


def part_caches() -> None:
    """Give each ATEN_CPU_CAPABILITY a cache of compiled code of its own, and a cache that is given an absolute path.

    Torch's own has one entry for all of them: code with wide vectors, met again where they are not allowed, crashes or
    does not build. A relative path is looked up by the C++ compiler, which works elsewhere.
    """
    if CACHE in os.environ:
        os.environ[CACHE] = os.path.abspath(os.environ[CACHE])
    capability = os.environ.get("ATEN_CPU_CAPABILITY")
    if not capability:
        return
    try:
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir
    except ImportError:  # not public: another torch may have it elsewhere
        return
    if os.environ.get(CACHE, default_cache_dir()) == default_cache_dir():  # torch puts its default there, too
        os.environ[CACHE] = f"{default_cache_dir()}-{capability}"


CACHE = "TORCHINDUCTOR_CACHE_DIR"


@functools.cache
def trust_vector_units() -> None:
    """Have torch take the processor's word for its vector instructions, where the C++ compiler knows them too.

    Otherwise every process builds a program for each set of them and for what some add (bfloat16, dot products), and
    loads each with a torch of its own: 8 of the 27 seconds until a ResNet-20's descent had made its first steps.
    `TORCHINDUCTOR_VEC_ISA_OK` in the environment wins.
    """
    if compiler_missing() or torch.cuda.is_available() or sys.platform != "linux":  # elsewhere flags are others
        return
    try:
        from torch._inductor import config
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.cpu_vec_isa import VecISA, valid_vec_isa_list

        tried_out, is_set = VecISA.check_build, config.cpp.vec_isa_ok is not None
    except (ImportError, AttributeError):  # not public: another torch may have them elsewhere, and tries them out then
        return
    if is_set:
        return

    def known(isa: Any, _program: str) -> bool:
        command = [get_cpp_compiler(), *isa._arch_flags.split(), "-fsyntax-only", "-x", "c++", os.devnull]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    VecISA.check_build = known  # type: ignore[assignment,method-assign]
    try:
        valid_vec_isa_list()  # torch keeps the answer
    finally:
        VecISA.check_build = tried_out  # type: ignore[method-assign]


def compile_errors() -> tuple[type[Exception], ...]:
    """What a function that torch cannot compile raises when it is called."""
    try:
        from torch._dynamo.exc import BackendCompilerFailed
    except ImportError:  # not public: another torch may have it elsewhere
        return ()
    return (BackendCompilerFailed,)


def graphs_compiled() -> int:
    """How many graphs torch.compile has made in this process; 0 where torch does not count them."""
    try:
        from torch._dynamo.utils import counters
    except ImportError:  # not public: another torch may have it elsewhere
        return 0
    return int(counters["stats"]["unique_graphs"])
