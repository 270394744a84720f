"""Compiled quantizers: what eager ones compute, from few graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from mpsearch.precision import LayerPrecision, Precision, PrecisionConfig
from mpsearch.quant import fused
from mpsearch.quant.fused import Elementwise, as_rows, fuse
from mpsearch.quant.gdnsq import GdnsqQuantizer
from mpsearch.quant.prepare import prepare


@pytest.mark.parametrize("shape", [(5,), (4, 3), (2, 3, 4), (2, 3, 4, 5), (2, 3, 1, 1), (3, 1, 3, 3), (2, 3, 2, 2, 2)])
@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "transposed"])
def test_rows_are_the_tensor_in_the_order_of_its_memory(shape: tuple[int, ...], axis: int | None, layout: str) -> None:
    x = torch.randn(shape)
    if layout == "channels last" and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed" and x.dim() > 1:
        x = x.transpose(0, 1)
    if axis is not None and axis >= x.dim():
        return
    rows, back = as_rows(x, axis)
    assert torch.equal(back(rows), x)
    if axis is None:
        assert rows.dim() == 1
        assert rows.data_ptr() == x.data_ptr()  # a view: nothing is copied
    else:
        expected = x.movedim(axis, 0).reshape(x.shape[axis], -1)
        assert torch.equal(rows.sort(dim=1).values, expected.sort(dim=1).values)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 1),
        nn.ConvTranspose2d(6, 4, 2),
        nn.Flatten(),
        nn.Linear(4 * 49, 5),
    )


MIXED = ("uniform:4", "shift:3", "apot:4", "uniform:1", "float:32")


def config(model: nn.Module, shift: int) -> PrecisionConfig:
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)]

    def precision(text: str, granularity: str) -> Precision:
        kind, bits = text.split(":")
        return Precision(kind, int(bits), granularity if kind != "float" else "tensor")  # type: ignore[arg-type]

    return PrecisionConfig(
        {
            name: LayerPrecision(
                precision(MIXED[(i + shift) % len(MIXED)], "channel"), precision(MIXED[(i + 2 + shift) % 3], "tensor")
            )
            for i, name in enumerate(names)
        }
    )


@pytest.fixture
def compiled_by(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Has quantizers compiled by another backend: `aot_eager` traces as inductor does, and generates no code."""

    def choose(backend: str) -> None:
        torch._dynamo.reset()
        fused._compiled.cache_clear()
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))

    yield choose
    torch._dynamo.reset()
    fused._compiled.cache_clear()


@pytest.mark.compile
@pytest.mark.slow  # half a minute of generating code; each type by itself is compiled in quant/test_contracts.py
@pytest.mark.parametrize(
    ("backend", "shift", "layout", "modes"),
    [
        ("inductor", 0, torch.contiguous_format, [True, False]),
        ("aot_eager", 1, torch.channels_last, [True, False]),
        ("aot_eager", 2, torch.contiguous_format, [True, False]),
    ],
)
def test_a_fused_network_computes_what_the_eager_one_does(
    compiled_by: Callable[[str], None], backend: str, shift: int, layout: torch.memory_format, modes: list[bool]
) -> None:
    """Within 1e-4 of the largest output, but for a few elements that a last-bit difference rounds elsewhere.

    Code is generated for every type of weights and of activations; which of them meet in a layer is traced alone.
    """
    compiled_by(backend)
    torch.manual_seed(0)
    model = network().to(memory_format=layout)
    x = torch.randn(16, 3, 8, 8).contiguous(memory_format=layout)
    eager = prepare(model, config(model, shift), x)
    fast = fuse(prepare(model, config(model, shift), x))
    assert any(m.fused for m in fast.modules() if isinstance(m, Elementwise))
    for training in modes:
        outputs = []
        for run in (eager, fast):
            run.train(training).zero_grad()
            y = run(x)
            y.square().mean().backward()
            outputs.append(y.detach())
        close = (outputs[0] - outputs[1]).abs() <= 1e-4 * outputs[0].abs().max()
        assert close.float().mean() > 0.97
        for (name, one), other in zip(eager.named_parameters(), fast.parameters(), strict=True):
            if one.grad is not None:
                assert other.grad is not None, name
                torch.testing.assert_close(
                    other.grad, one.grad, rtol=0.05, atol=0.05 * float(one.grad.abs().max()) + 1e-6
                )


@pytest.mark.slow
@pytest.mark.compile
def test_layers_of_all_shapes_share_a_few_graphs(compiled_by: Callable[[str], None]) -> None:
    from torch._dynamo.utils import counters

    compiled_by("aot_eager")  # graphs are counted, not run
    counters.clear()
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for n in range(2, 12) for layer in (nn.Conv2d(n, n + 1, 1 + n % 3), nn.ReLU())))
    x = torch.randn(4, 2, 24, 24)
    names = [str(i) for i in range(0, 20, 2)]
    w4a4 = LayerPrecision(Precision("uniform", 4, "channel"), Precision("uniform", 4, "tensor"))
    fast = fuse(prepare(model, PrecisionConfig(dict.fromkeys(names, w4a4)), x))
    fast(x).sum().backward()
    assert counters["stats"]["unique_graphs"] <= 4  # weights; inputs with and without gradient, and negative values
    for size in (3, 2, 7):
        fast(torch.randn(size, 2, 24, 24)).sum().backward()
    assert counters["stats"]["unique_graphs"] <= 8  # of 40 pairs of layer and batch size


@pytest.mark.compile
@pytest.mark.parametrize("grid", [pytest.param("symmetric", marks=pytest.mark.slow), "min", None])
def test_a_fused_gdnsq_quantizer_computes_what_the_eager_one_does(grid: str | None) -> None:
    x = torch.randn(6, 5, 3, 3)
    step = torch.rand(6, 1, 1, 1) / 4 + 0.1 if grid else torch.tensor(0.2)
    gradients: list[list[Tensor]] = []
    for compiled in (False, True):
        quantizer = GdnsqQuantizer(step, torch.tensor(16.0), weight_grid=grid)  # type: ignore[arg-type]
        quantizer.fused = compiled
        w = x.clone().requires_grad_()
        y = quantizer(w)
        y.square().sum().backward()
        gradients.append([y.detach(), w.grad, *(p.grad for p in quantizer.parameters())])  # type: ignore[list-item]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
