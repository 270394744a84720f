"""The training loop does what its settings say, and BatchNorm statistics become those of the final weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mpsearch
from mpsearch.errors import TaskError
from mpsearch.graph.inputs import samples_of
from mpsearch.quant.shift import DEFAULT_SLOPE
from mpsearch.train import (
    CLIP_NORM,
    FitResult,
    FitSettings,
    Teacher,
    TrainingState,
    batch_norm_gap,
    fit,
    jeffreys,
    learning_rate,
    reestimate_batch_norm,
    single_value_norms,
    steps,
)


def batches(count: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(32, 4, generator=generator)
        yield x, x.sum(dim=1).gt(0).long()


def cross_entropy(step: int, x: Tensor, output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target)


def test_fit_learns_a_separable_problem() -> None:
    torch.manual_seed(0)
    result = fit(nn.Linear(4, 2), batches(100), cross_entropy, FitSettings(100, lr=0.5))
    assert result.start_loss > 0.4
    assert result.end_loss < 0.2


def test_fit_is_the_same_for_the_same_seed() -> None:
    weights = []
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Linear(4, 2)
        fit(model, batches(5), cross_entropy, FitSettings(5, lr=0.1))
        weights.append(model.weight.detach().clone())
    assert torch.equal(*weights)


def test_a_longer_rung_is_one_training_with_the_shorter_one_before_its_fall(tmp_path: Path) -> None:
    lengths, all_batches = (4, 10), [*batches(20)]
    first, second = all_batches[:4], [*all_batches[:2], *all_batches[10:18]]

    def rung(model: nn.Module, steps: int, data: Any, begun: TrainingState | None = None) -> FitResult:
        return fit(model, data, cross_entropy, FitSettings(steps, lr=0.5, lengths=lengths), begun=begun)

    whole = nn.Linear(4, 2)
    begins = copy.deepcopy(whole.state_dict())
    rung(whole, 10, second)
    short = nn.Linear(4, 2)
    short.load_state_dict(begins)
    left = rung(short, 4, first).state
    assert left is not None
    assert left.steps == 2  # its last two steps are a branch
    left.save(tmp_path / "state.safetensors", "config 7")
    assert TrainingState.load(tmp_path / "state.safetensors", "config 8") is None  # a number that was given again
    begun = TrainingState.load(tmp_path / "state.safetensors", "config 7")
    longer = nn.Linear(4, 2)
    rung(longer, 10, second[2:], begun)
    assert torch.equal(longer.weight, whole.weight)
    assert not torch.equal(short.weight, whole.weight)


def test_a_state_that_is_missing_or_damaged_is_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "state.safetensors"
    assert TrainingState.load(path, "a") is None
    assert not caplog.text
    path.write_bytes(b"half a fi")
    assert TrainingState.load(path, "a") is None
    assert "begins anew" in caplog.text


def test_between_rise_and_fall_a_rung_holds_its_rate_and_the_slope_goes_on() -> None:
    short, long = (FitSettings(steps, lr=0.3, lengths=(50, 100)) for steps in (50, 100))
    assert (short.rise, short.fall, long.rise, long.fall) == (10, 25, 10, 50)
    rates = [learning_rate(step, long) for step in range(100)]
    assert rates[:10] == pytest.approx([0.03 * (step + 1) for step in range(10)])
    assert rates[9:50] == pytest.approx([0.3] * 41)
    assert rates[50:] == sorted(rates[50:], reverse=True)
    assert rates[-1] < 0.001
    assert [learning_rate(step, short) for step in range(25)] == rates[:25]
    slopes = [[settings.slope_at(step) for step in range(settings.steps)] for settings in (short, long)]
    assert slopes[0][:25] == slopes[1][:25]
    assert slopes[0] == sorted(slopes[0])
    assert slopes[0][-1] == slopes[1][-1] == DEFAULT_SLOPE.end


def test_one_cycle_rises_to_the_peak_and_falls_to_nothing() -> None:
    settings = FitSettings(100, lr=0.3)
    rates = [learning_rate(step, settings) for step in range(100)]
    peak = rates.index(max(rates))
    assert max(rates) == pytest.approx(0.3)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 0 < rates[-1] < 0.001


def test_fit_stops_at_a_loss_that_is_not_finite() -> None:
    with pytest.raises(FloatingPointError, match="became nan at step 0 of 3"):
        fit(nn.Linear(4, 2), batches(3), lambda *_: torch.tensor(float("nan"), requires_grad=True), FitSettings(3, 0.1))


def test_fit_says_when_the_task_has_too_few_batches() -> None:
    with pytest.raises(TaskError, match="gave 2 batches, 3 were asked for"):
        fit(nn.Linear(4, 2), batches(2), cross_entropy, FitSettings(3, 0.1))


def test_weight_decay_leaves_steps_and_biases_alone() -> None:
    from mpsearch.precision import Precision
    from mpsearch.quant.modules import quantized

    layer = quantized(nn.Conv2d(2, 3, 3), signed_input=True, input_elements=4)
    for quantizer in (layer.weight_quantizer, layer.input_quantizer):
        quantizer.set_precision(Precision("uniform", 4, "channel"))
    before = {name: value.detach().clone() for name, value in layer.named_parameters()}

    def flat(step: int, x: Tensor, output: Tensor, target: Tensor) -> Tensor:
        return sum(p.sum() for p in layer.parameters()) * 0  # type: ignore[return-value]

    data = [(torch.randn(2, 2, 8, 8), torch.zeros(2)) for _ in range(3)]
    fit(layer, data, flat, FitSettings(3, lr=0.1, weight_decay=0.1))
    changed = {name for name, value in layer.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {"weight"}


def test_jeffreys_is_the_symmetric_divergence() -> None:
    a, b = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    p, q = a.softmax(1), b.softmax(1)
    expected = ((p * (p / q).log()).sum(1) + (q * (q / p).log()).sum(1)).mean()
    torch.testing.assert_close(jeffreys(a, b).double(), expected, rtol=1e-5, atol=1e-6)
    assert jeffreys(a, b) == jeffreys(b, a)
    assert jeffreys(a, a) == 0


def test_batch_norm_statistics_become_those_of_the_data() -> None:
    norm = nn.BatchNorm1d(4)
    norm.running_mean.fill_(9)  # type: ignore[union-attr]
    data = list(batches(20))
    reestimate_batch_norm(nn.Sequential(norm), data)
    x = torch.cat([x for x, _ in data])
    assert not norm.training
    assert norm.momentum == 0.1
    torch.testing.assert_close(norm.running_mean, x.mean(0))
    torch.testing.assert_close(norm.running_var, x.var(0), rtol=0.02, atol=0.01)


def test_teacher_computes_a_batch_once() -> None:
    calls = []

    class Counting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(len(x))
            return super().forward(x)

    teacher = Teacher(Counting(4, 2), lambda output: output, bf16=False)
    (x, _), (other, _) = batches(2)
    assert torch.equal(teacher(0, 0, x), teacher(0, 0, x))
    assert len(calls) == 1
    teacher(0, 1, other)
    teacher(1, 0, other)
    assert len(calls) == 3


def test_teacher_keeps_no_more_than_its_limit() -> None:
    teacher = Teacher(nn.Linear(4, 2), lambda output: output, bf16=False, limit_bytes=32 * 2 * 4)
    (x, _), (other, _) = batches(2)
    first, second = teacher(0, 0, x), teacher(0, 1, other)
    assert teacher(0, 0, other) is first
    assert teacher(0, 1, other) is not second


def test_the_batch_norm_gap_is_small_on_batches_like_those_of_the_statistics_and_wide_on_others() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    for _ in range(200):
        model.train()(torch.randn(64, 4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(256, 4)
    assert batch_norm_gap(model, x, lambda output: output) < 0.01
    assert batch_norm_gap(model, 3 * x + 2, lambda output: output) > 0.15
    assert batch_norm_gap(nn.Linear(4, 3), x, lambda output: output) == 0
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def one_weight(start: float = 1.0) -> nn.Linear:
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(start)
    return model


ONE = (torch.ones(1, 1), torch.zeros(1))


def test_steps_takes_the_gradient_of_loss_and_penalty_and_yields_the_loss():
    model = one_weight()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    walk = steps(
        model, [ONE] * 2, lambda _step, _x, y, _: y.sum(), [optimizer], 2, penalty=lambda step, loss: (1 + step) * loss
    )
    assert next(walk) == (0, 1.0)
    assert model.weight.item() == pytest.approx(1 - 0.1 * 2)  # slope 1 of the loss, 1 of the penalty
    assert next(walk) == (1, pytest.approx(0.8))
    assert model.weight.item() == pytest.approx(0.8 - 0.1 * 3)
    assert model.weight.grad.item() == pytest.approx(3)  # stays for whoever wants to look at it


def test_steps_sets_the_rate_before_each_step_and_shortens_a_long_one():
    model = one_weight()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def schedule(step: int) -> None:
        optimizer.param_groups[0]["lr"] = step

    walk = steps(model, [ONE] * 2, lambda _step, _x, y, _: 1000 * y.sum(), [optimizer], 2, schedule)
    next(walk)
    assert model.weight.item() == 1
    next(walk)
    assert model.weight.item() == pytest.approx(1 - CLIP_NORM, rel=1e-4)


def test_steps_refuses_a_loss_that_is_no_number_and_batches_that_end():
    model = one_weight()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(FloatingPointError, match="nan at step 1 of 3"):
        list(steps(model, [ONE] * 3, lambda step, _x, y, _: y.sum() * (math.nan if step else 1), [optimizer], 3))
    with pytest.raises(TaskError, match="gave 2 batches, 3 were asked for"):
        list(steps(model, [ONE] * 2, lambda _step, _x, y, _: y.sum(), [optimizer], 3))


def test_no_training_has_a_loop_of_its_own():
    package = Path(mpsearch.__file__).parent
    own = {str(path.relative_to(package)) for path in package.rglob("*.py") if ".backward()" in path.read_text()}
    assert own == {"train.py", "ptq/adaround.py"}  # AdaRound has no batches: it works on two matrices a layer


def test_norms_that_get_one_value_a_sample_are_found_by_name():
    flat = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(2))
    model = nn.Sequential(flat, nn.Flatten(), nn.BatchNorm1d(2)).eval()
    assert single_value_norms(model, torch.rand(3, 1, 5, 5)) == ("0.3", "2")
    assert single_value_norms(model[0][:2], torch.rand(1, 1, 5, 5)) == ()
    tokens = nn.BatchNorm1d(4).eval()
    assert single_value_norms(tokens, torch.rand(2, 4, 6)) == ()


@pytest.mark.parametrize(
    ("x", "count"),
    [
        (torch.zeros(3, 2), 3),
        ((torch.zeros(2), {"mask": torch.zeros(5)}), 2),
        ({"ids": torch.zeros(4, 7), "length": 3}, 4),
        ([None, torch.zeros(1, 2)], 1),
        ("text", 0),
    ],
)
def test_a_batch_has_as_many_samples_as_its_first_tensor(x: object, count: int):
    assert samples_of(x) == count
