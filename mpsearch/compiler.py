"""What torch.compile needs on this machine, and what it need not find out anew in every process."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess

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


@functools.cache
def trust_vector_units() -> None:
    """Have torch take the processor's word for its vector instructions, where the C++ compiler knows them too.

    Otherwise every process builds a program for each set of them and loads it with a torch of its own: 10 of the 24
    seconds until a ResNet-20 had first been scored. `TORCHINDUCTOR_VEC_ISA_OK` in the environment wins.
    """
    if compiler_missing() or torch.cuda.is_available():
        return
    try:
        from torch._inductor import config
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.cpu_vec_isa import supported_vec_isa_list, x86_isa_checker
    except ImportError:  # not public: another torch may have them elsewhere, and does its trials then
        return
    has = x86_isa_checker()
    sets = [isa for isa in supported_vec_isa_list if all(unit in has for unit in str(isa).split())]
    if config.cpp.vec_isa_ok is not None or not sets:
        return
    flags = sorted({flag for isa in sets for flag in isa.build_arch_flags().split()})
    asked = subprocess.run(
        [get_cpp_compiler(), *flags, "-fsyntax-only", "-x", "c++", os.devnull], capture_output=True, check=False
    )
    if asked.returncode == 0:
        config.cpp.vec_isa_ok = True
