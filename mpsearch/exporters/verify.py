"""Verifying an export: it is run in its own runtime, in a process of its own, and has to answer as the network does.

Another runtime sums floats in another order, so a value next to the boundary of two codes may be rounded the other way,
and in a deep network one such flip makes more. How far that goes is a property of the network, so it is measured:
`reference` runs the network again with noise of that size at the input of every layer. An export may differ from the
network a few times as much as the network differs from itself, in the median sample, in how many samples are moved at
all, and in how many answers change; never by more than a few times that.
"""

from __future__ import annotations

import copy
import multiprocessing
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpsearch.errors import VerificationError
from mpsearch.exporters import aimet, brevitas, modelopt, native, packed, torchao
from mpsearch.graph.inputs import call, map_tensors, tensors
from mpsearch.quant.prepare import quant_layers

NOISE = 2.0**-21
"""Of a sum of floats in another order, against the largest of its tensor."""

FLOOR = 1e-5
"""Differences below this share of the largest output are those of any float network in another runtime."""

RERUNS = 4
FACTOR = 4

TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Verified:
    """An export that answered in its own runtime as the network did."""

    runtime: str
    version: str
    samples: int
    same_answers: int  # samples whose largest output is the same one
    max_difference: float  # of an output, as a share of the largest output

    def __str__(self) -> str:
        return (
            f"verified in {self.runtime} {self.version}: {self.same_answers} of {self.samples} samples have the same "
            f"answer, largest difference {self.max_difference:.1e}"
        )

    def to_json(self) -> dict[str, Any]:
        """For the export's manifest."""
        return asdict(self)


@dataclass(frozen=True)
class Unverified:
    """Why an export was not run in its own runtime."""

    reason: str

    def __str__(self) -> str:
        return f"not verified: {self.reason}"

    def to_json(self) -> dict[str, Any]:
        """For the export's manifest."""
        return {"not_verified": self.reason}


@dataclass(frozen=True)
class Reference:
    """What the network answers, and how far float noise moves that."""

    outputs: tuple[Tensor, ...]  # (samples, ...) each
    difference: Tensor  # (reruns, samples), the largest of each sample
    changed: float  # answers that differ, mean over the reruns


@dataclass(frozen=True)
class Runtime:
    """Where an export is run."""

    name: str
    package: str  # the distribution that has its version
    load: Callable[[nn.Module, Path, Any], Any] | None = None  # (float network, folder, samples) -> model; None: ONNX


def _without_samples(load: Callable[[nn.Module, Path], nn.Module]) -> Callable[[nn.Module, Path, Any], nn.Module]:
    """A `load` that needs no samples, in the form of one that does."""
    return lambda model, folder, _: load(model, folder)


def _aimet(model: nn.Module, folder: Path, samples: Any) -> Any:
    return aimet.load(model, folder, samples).model


RUNTIMES: dict[str, Runtime] = {
    "onnx": Runtime("onnxruntime", "onnxruntime"),
    "qonnx": Runtime("qonnx", "qonnx"),
    "native": Runtime("mpsearch", "mpsearch", _without_samples(native.load)),
    "packed": Runtime("mpsearch", "mpsearch", _without_samples(packed.load)),
    "brevitas": Runtime("brevitas", "brevitas", _without_samples(brevitas.load)),
    "torchao": Runtime("torchao", "torchao", _without_samples(torchao.load)),
    "modelopt": Runtime("modelopt", "nvidia-modelopt", _without_samples(modelopt.load)),
    "aimet": Runtime("aimet_torch", "aimet-torch", _aimet),
}
"""Export target -> what runs it; MHAQ trains a network anew and has none."""


@torch.no_grad()
def reference(model: nn.Module, samples: Any) -> Reference:
    """The answers of a quantized network in eval mode to a batch of its input, with noise and without."""
    outputs = _answers(model, samples)
    generator = torch.Generator().manual_seed(0)

    def disturb(_: nn.Module, args: tuple[Any, ...]) -> Any:
        x = args[0]
        noise = torch.randn(x.shape, generator=generator).to(x)
        return (x + NOISE * x.abs().amax() * noise if x.numel() else x, *args[1:])

    hooks = [layer.input_quantizer.register_forward_pre_hook(disturb) for layer in quant_layers(model).values()]
    try:
        reruns = [_answers(model, samples) for _ in range(RERUNS)]
    finally:
        for hook in hooks:
            hook.remove()
    # A detector that finds another number of boxes moves no box: without such reruns less difference is allowed.
    shapes = [x.shape for x in outputs]
    reruns = [rerun for rerun in reruns if [x.shape for x in rerun] == shapes] or [outputs]
    moved = torch.stack([_difference(outputs, rerun) for rerun in reruns])
    changed = sum(int((_largest(outputs) != _largest(rerun)).sum()) for rerun in reruns) / RERUNS
    return Reference(outputs, moved, changed)


def verify(
    to: str,
    folder: Path,
    samples: Any,
    expected: Reference,
    float_model: nn.Module | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Verified | Unverified:
    """Run an export in its own runtime and compare.

    Args:
        to: the export's target.
        folder: what the export wrote.
        samples: a batch of the model's input; a tuple is its arguments.
        expected: `reference` of the exported network on the same samples.
        float_model: what the network was made from; the targets that are loaded into PyTorch need it.
        timeout_s: seconds that the runtime may take.

    Raises:
        VerificationError: the export does not load, does not end, or answers otherwise.
    """
    runtime = RUNTIMES.get(to)
    if runtime is None:
        return Unverified(f"what is exported to {to} is trained before it is run")
    try:
        installed = version(runtime.package)
    except PackageNotFoundError:
        return Unverified(f"{runtime.package} is not installed: pip install {runtime.package}")
    if runtime.load is not None and float_model is None:
        return Unverified("the float network is not known: give QuantizedNetwork its float_model")
    samples = map_tensors(lambda x: x.detach().cpu(), samples)
    with tempfile.TemporaryDirectory(prefix="mpsearch-verify-") as scratch:
        if runtime.load is None:
            answers = _run_onnx(to, folder, samples, Path(scratch), timeout_s)
        else:
            assert float_model is not None
            answers = _run_torch(runtime, float_model, folder, samples, Path(scratch), timeout_s)
    return _compared(answers, expected, runtime.name, installed)


def _run_onnx(to: str, folder: Path, samples: Any, scratch: Path, timeout_s: float) -> tuple[Tensor, ...]:
    np.savez(scratch / "in.npz", **{f"in{i}": x.numpy() for i, x in enumerate(tensors(samples))})  # type: ignore[arg-type]
    files = [folder / "model.onnx", scratch / "in.npz", scratch / "out.npz"]
    command = [sys.executable, "-m", "mpsearch.exporters.execute", to, *(str(file.resolve()) for file in files)]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, cwd=scratch)
    except subprocess.TimeoutExpired:
        raise VerificationError(f"{RUNTIMES[to].name} did not end within {timeout_s:g} s") from None
    if process.returncode:
        raise VerificationError(f"{RUNTIMES[to].name} fails on it: {_last_line(process.stderr, process.returncode)}")
    with np.load(scratch / "out.npz") as stored:
        return tuple(torch.from_numpy(stored[f"out{i}"]) for i in range(len(stored.files)))


def _run_torch(
    runtime: Runtime, model: nn.Module, folder: Path, samples: Any, scratch: Path, timeout_s: float
) -> tuple[Tensor, ...]:
    # Forked, because any network can be handed over so: a class of a notebook cannot be imported anywhere else.
    model = copy.deepcopy(model).cpu().eval()
    process = multiprocessing.get_context("fork").Process(
        target=_load_and_run, args=(runtime, model, folder, samples, scratch)
    )
    process.start()
    process.join(timeout_s)
    if process.is_alive():
        process.kill()
        process.join()
        raise VerificationError(f"{runtime.name} did not end within {timeout_s:g} s")
    if not (scratch / "out.pt").exists():
        error = scratch / "error.txt"
        text = error.read_text(encoding="utf-8") if error.exists() else ""
        raise VerificationError(f"{runtime.name} fails on it: {_last_line(text, process.exitcode or 0)}")
    outputs: tuple[Tensor, ...] = torch.load(scratch / "out.pt", weights_only=True)
    return outputs


def _load_and_run(runtime: Runtime, model: nn.Module, folder: Path, samples: Any, scratch: Path) -> None:
    torch.set_num_threads(1)  # the pool of threads did not come along
    assert runtime.load is not None
    try:
        loaded = runtime.load(model, folder, samples)
        with torch.no_grad():
            outputs = _answers(loaded, samples)
        torch.save(outputs, scratch / "out.part")
        (scratch / "out.part").rename(scratch / "out.pt")
    except BaseException as error:
        (scratch / "error.txt").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")


def _last_line(text: str, code: int) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][-500:] if lines else f"the process ended with {code}"


def _answers(model: nn.Module, samples: Any) -> tuple[Tensor, ...]:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    outputs = call(model, map_tensors(lambda x: x.to(device), samples))
    return tuple(x.detach().cpu() for x in tensors(outputs))


def _per_sample(x: Tensor, samples: int) -> Tensor:
    """`(samples, n)` of one output; what has no batch belongs to all of them."""
    return x.reshape(samples, -1) if x.dim() and x.shape[0] == samples else x.reshape(1, -1).expand(samples, -1)


def _difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """The largest difference of each sample `(samples,)`, as a share of the largest output."""
    samples = ours[0].shape[0] if ours[0].dim() else 1
    difference = torch.zeros(samples)
    for a, b in zip(ours, theirs, strict=True):
        a, b = a.double(), b.double()
        same = (a == b) | (a.isnan() & b.isnan())  # infinities, too
        largest = a[a.isfinite()].abs().max().clamp_min(1e-30) if a.isfinite().any() else torch.tensor(1.0)
        off = torch.where(same, 0.0, (a - b).abs().nan_to_num(nan=torch.inf) / largest)
        difference = torch.maximum(difference, _per_sample(off, samples).amax(1).float())
    return difference


def _largest(outputs: Sequence[Tensor]) -> Tensor:
    first = outputs[0]
    return _per_sample(first.nan_to_num(), first.shape[0] if first.dim() else 1).argmax(1)


def _compared(answers: tuple[Tensor, ...], expected: Reference, name: str, installed: str) -> Verified:
    ours, noise = expected.outputs, expected.difference
    fewer = len(answers[0]) if answers and answers[0].dim() else None  # a fixed batch leaves a rest
    if fewer is not None and ours[0].dim() and fewer < len(ours[0]):
        rows = len(ours[0])
        ours = tuple(x[:fewer] if x.dim() and len(x) == rows else x for x in ours)
        noise = noise[:, :fewer]
    shapes = [[tuple(x.shape) for x in outputs] for outputs in (answers, ours)]
    if shapes[0] != shapes[1]:
        raise VerificationError(f"{name} gives outputs of shapes {shapes[0]}, the network {shapes[1]}")
    difference = _difference(ours, answers)
    samples = len(difference)
    same = int((_largest(ours) == _largest(answers)).sum())
    verified = Verified(name, installed, samples, same, float(difference.max()))
    moved, moved_by_noise = int((difference > FLOOR).sum()), float((noise > FLOOR).sum()) / RERUNS
    limits = (
        ("outputs that are finite in one of the two only", int(difference.isinf().sum()), 0),
        ("the median difference", float(difference.median()), max(FLOOR, FACTOR * float(noise.median()))),
        ("samples that differ", moved, FACTOR * moved_by_noise + max(1, 0.02 * samples)),
        ("other answers", samples - same, FACTOR * expected.changed + max(1, 0.01 * samples)),
    )
    for what, is_, at_most in limits:
        if is_ > at_most:
            raise VerificationError(
                f"{name} {installed} answers otherwise than the network: {what} {is_:.3g}, expected at most "
                f"{at_most:.3g} by float noise; {same} of {samples} answers are the same, the largest difference is "
                f"{verified.max_difference:.1e} of the largest output"
            )
    return verified
