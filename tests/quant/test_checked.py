"""A compiled quantizer that is wrong on a card is found out before it is used; here the CPU stands in for the card."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

from mpsearch.precision import Precision
from mpsearch.quant import checked, fused
from mpsearch.quant.gdnsq import GdnsqQuantizer
from mpsearch.quant.quantizer import Quantizer, _quantize
from mpsearch.quant.switch import make_quantizer

Function = Callable[..., Tensor]


class _Spoiled(torch.autograd.Function):
    """The value itself, with a gradient that is not its."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spoil: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.spoil = spoil
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.spoil(grads[0]), None


class Compiler:
    """Stands in for torch.compile: the first call makes a graph, whose passes may be wrong."""

    def __init__(self, wrong: int, spoil: Callable[[Tensor], Tensor], forward: bool = False) -> None:
        self.graphs, self.passes = 0, 0
        self._wrong, self._spoil, self._forward = wrong, spoil, forward
        self._backwards = itertools.count()

    def __call__(self, function: Function) -> Function:
        def spoiled(gradient: Tensor) -> Tensor:
            return self._spoil(gradient) if next(self._backwards) < self._wrong else gradient

        def compiled(owner: Any, x: Tensor, *per_channel: Tensor | None) -> Tensor:
            self.graphs, self.passes = 1, self.passes + 1
            y = function(owner, x, *per_channel)
            if self._forward:
                return spoiled(y)
            return _Spoiled.apply(y, spoiled) if y.requires_grad else y  # type: ignore[no-any-return,no-untyped-call]

        return compiled


@pytest.fixture(autouse=True)
def _on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checked, "DEVICES", ("cpu",))
    monkeypatch.setattr(checked, "_eager", set())


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Compiler]:
    def install(wrong: int, spoil: Callable[[Tensor], Tensor] = lambda g: 1e22 * g, forward: bool = False) -> Compiler:
        compiler = Compiler(wrong, spoil, forward)
        monkeypatch.setattr(fused, "_compiled", compiler)
        monkeypatch.setattr(checked, "graphs_compiled", lambda: compiler.graphs)
        return compiler

    return install


def quantizer() -> Quantizer:
    made = make_quantizer(["uniform"], 8, 4, signed=True, offset=False, elements=36)
    made.set_precision(Precision("uniform", 3, "channel"))
    made.set_range(torch.full((8,), 0.4))
    return made


def passes(quantizer: Quantizer, fuse: bool, count: int = 1) -> list[Tensor]:
    """Value and gradients of so many passes."""
    quantizer.fused = fuse
    results = []
    x = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for _ in range(count):
        y = quantizer(x)
        gradients = torch.autograd.grad(y.square().sum(), [x, quantizer.step])
        results += [y.detach(), *gradients]
    return results


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(one, other, strict=True))


def test_right_kernels_are_used_and_compared_once(
    compiler: Callable[..., Compiler], caplog: pytest.LogCaptureFixture
) -> None:
    made = compiler(wrong=0)
    with caplog.at_level(logging.INFO, "mpsearch"):
        assert same(passes(quantizer(), True, 3), passes(quantizer(), False, 3))
    assert made.passes == 3 + 1  # the one that is compared
    assert not caplog.records
    assert checked.given_up() == 0


@pytest.mark.parametrize(
    "spoil",
    [lambda g: 1e22 * g, lambda g: torch.full_like(g, torch.nan), lambda g: g.roll(1), torch.zeros_like],
    ids=["huge", "nan", "shifted", "zero"],
)
@pytest.mark.parametrize("forward", [False, True], ids=["backward", "forward"])
def test_kernels_that_are_wrong_are_named_and_left(
    compiler: Callable[..., Compiler],
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[[Tensor], Tensor],
    forward: bool,
) -> None:
    made = compiler(wrong=1000, spoil=spoil, forward=forward)
    with caplog.at_level(logging.WARNING, "mpsearch"):
        assert same(passes(quantizer(), True, 3), passes(quantizer(), False, 3))
    assert made.passes == 1 + 1
    assert checked.given_up() == 1
    (record,) = caplog.records
    assert "torch.compile gives wrong numbers for the UniformQuantizer on cpu" in record.getMessage()


def test_without_gradients_the_forward_pass_alone_is_compared(compiler: Callable[..., Compiler]) -> None:
    made = compiler(wrong=1000, forward=True)
    one, other = quantizer(), quantizer()
    one.fused = True
    x = torch.randn(8, 4, 3, 3)
    with torch.no_grad():
        assert torch.equal(one(x), other(x))
    assert made.passes == 2


@pytest.mark.parametrize("wrong", [0, 1000])
def test_random_gradients_are_no_wrong_ones_unless_they_are_huge(
    compiler: Callable[..., Compiler], wrong: int, caplog: pytest.LogCaptureFixture
) -> None:
    """GDNSQ's noise is drawn anew in every pass."""
    made = compiler(wrong)
    noisy = GdnsqQuantizer(torch.full((8, 1, 1, 1), 0.2), torch.tensor(16.0), weight_grid="min", step_gradient="noise")
    noisy.fused = True
    state = torch.get_rng_state()
    noisy(torch.randn(8, 4, 3, 3, requires_grad=True)).sum().backward()
    assert made.passes == 2
    assert ("wrong numbers for the GDNSQ quantizer" in caplog.text) == bool(wrong)
    assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.compile
@pytest.mark.slow  # the tests above have a compiler that is made
def test_compiled_quantizers_are_compared_when_a_graph_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[float] = []
    apart = checked._apart

    def count(*arguments: Any) -> float:
        counted.append(apart(*arguments))
        return counted[-1]

    compiled = torch.compile(_quantize, dynamic=True, backend="aot_eager")
    monkeypatch.setattr(fused, "_compiled", lambda function: compiled)
    monkeypatch.setattr(checked, "_apart", count)
    assert same(passes(quantizer(), True, 2), passes(quantizer(), False, 2))
    assert counted == [0.0]
    with torch.no_grad():
        quantizer_without_gradients = quantizer()
        quantizer_without_gradients.fused = True
        quantizer_without_gradients(torch.randn(8, 4, 3, 3))
    assert counted == [0.0, 0.0]  # another graph


def test_what_cannot_be_compiled_runs_eagerly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = []

    def broken(function: Function) -> Function:
        def compiled(*_: Any) -> Tensor:
            tried.append(function)
            raise BackendCompilerFailed(lambda: None, RuntimeError("stdio.h: No such file"), None)

        return compiled

    monkeypatch.setattr(checked, "DEVICES", ("cuda",))  # as on a CPU
    monkeypatch.setattr(fused, "_compiled", broken)
    expected = passes(quantizer(), fuse=False)
    with caplog.at_level(logging.WARNING, "mpsearch.progress"):
        got = passes(quantizer(), fuse=True, count=2)
    assert all(torch.equal(a, b) for a, b in zip(got, [*expected, *expected], strict=True))
    assert len(tried) == 1
    assert caplog.text.count("torch.compile fails for") == 1
    assert "stdio.h: No such file" in caplog.text


def test_a_full_disk_is_no_fault_of_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(function: Function) -> Function:
        def compiled(*_: Any) -> Tensor:
            raise BackendCompilerFailed(lambda: None, OSError(errno.ENOSPC, "No space left on device"), None)

        return compiled

    monkeypatch.setattr(fused, "_compiled", full)
    with pytest.raises(BackendCompilerFailed):
        passes(quantizer(), fuse=True)


@pytest.mark.slow
@pytest.mark.compile
def test_a_compiler_that_fails_costs_time_alone() -> None:
    lines = [
        "import torch; from test_checked import passes, quantizer",
        "one, other = (passes(quantizer(), fuse) for fuse in (False, True))",
        "assert all(map(torch.equal, one, other)); print('the same')",
    ]
    command = [sys.executable, "-c", "\n".join(lines)]
    environment = os.environ | {"CXX": "/bin/false", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
    here = Path(__file__).parent
    ended = subprocess.run(command, capture_output=True, check=True, text=True, env=environment, cwd=here)
    assert ended.stdout == "the same\n"
    assert "torch.compile fails for the" in ended.stderr
