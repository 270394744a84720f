"""Verifying an export: it is run in its own runtime, in a process of its own, and has to answer as the network does.

Another runtime sums floats in another order, so a value next to the boundary of two codes may be rounded the other way,
and in a deep network one such flip makes more. How far that goes is a property of the network, so it is measured:
`answers.reference` runs the network again with noise of that size at the input of every layer. An export may differ
from the network a few times as much as the network differs from itself, in the median sample, in how many samples are
moved at all, and in how many answers change; never by more than a few times that. What an answer is, and of a detector,
whose boxes come in any number and order: `answers`.
"""

from __future__ import annotations

import copy
import multiprocessing
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.errors import VerificationError
from mpsearch.exporters import aimet, brevitas, modelopt, native, packed, torchao
from mpsearch.exporters.answers import Reference, answers, difference, same_answers
from mpsearch.exporters.execute import FailedToRun, last_line, run_apart
from mpsearch.graph.inputs import image_list, map_tensors, tensors

FLOOR = 1e-5
"""Differences below this share of the largest output are those of any float network in another runtime."""

FACTOR = 4

LARGEST_NOISE = 0.05
"""What float noise may move the median box of a detector by and still excuse a difference: beyond, none is that box."""

TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Verified:
    """An export that answered in its own runtime as the network did."""

    runtime: str
    version: str
    samples: int
    same_answers: int  # samples whose largest output is the same one; images whose boxes are
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
        expected: `answers.reference` of the exported network on the same samples.
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
    if runtime.load is None:
        theirs = _run_onnx(to, folder, samples, timeout_s)
    else:
        assert float_model is not None
        with tempfile.TemporaryDirectory(prefix="mpsearch-verify-") as scratch:
            theirs = _run_torch(runtime, float_model, folder, samples, Path(scratch), timeout_s)
    return _compared(theirs, expected, runtime.name, installed)


def _run_onnx(to: str, folder: Path, samples: Any, timeout_s: float) -> tuple[Tensor, ...]:
    inputs = [x.numpy() for x in image_list(samples) or tensors(samples)]
    try:
        return tuple(map(torch.from_numpy, run_apart(to, folder / "model.onnx", inputs, timeout_s)))
    except FailedToRun as error:
        raise VerificationError(f"{RUNTIMES[to].name} {error}") from None


def _run_torch(
    runtime: Runtime, model: nn.Module, folder: Path, samples: Any, scratch: Path, timeout_s: float
) -> tuple[Tensor, ...]:
    # Forked, because any network can be handed over so: a class of a notebook cannot be imported anywhere else.
    model = dense(copy.deepcopy(model).cpu().eval())
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
        raise VerificationError(f"{runtime.name} fails on it: {last_line(text, process.exitcode or 0)}")
    outputs: tuple[Tensor, ...] = torch.load(scratch / "out.pt", weights_only=True)
    return outputs


def dense(model: nn.Module) -> nn.Module:
    """A model whose tensors lie in memory as files have them, in place: in another layout sums have another order."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.contiguous()
    return model


def _load_and_run(runtime: Runtime, model: nn.Module, folder: Path, samples: Any, scratch: Path) -> None:
    torch.set_num_threads(1)  # the pool of threads did not come along
    assert runtime.load is not None
    try:
        loaded = runtime.load(model, folder, samples)
        with torch.no_grad():
            outputs, _ = answers(loaded, samples)
        torch.save(outputs, scratch / "out.part")
        (scratch / "out.part").rename(scratch / "out.pt")
    except BaseException as error:
        (scratch / "error.txt").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")


def _compared(theirs: tuple[Tensor, ...], expected: Reference, name: str, installed: str) -> Verified:
    ours, noise, images = expected.outputs, expected.difference, expected.images
    fewer = len(theirs[0]) if not images and theirs and theirs[0].dim() else None  # a fixed batch leaves a rest
    if fewer is not None and ours[0].dim() and fewer < len(ours[0]):
        rows = len(ours[0])
        ours = tuple(x[:fewer] if x.dim() and len(x) == rows else x for x in ours)
        noise = noise[:, :fewer]
    shapes = [[tuple(x.shape[bool(images) :]) for x in outputs] for outputs in (theirs, ours)]  # boxes as many as found
    if shapes[0] != shapes[1]:
        raise VerificationError(f"{name} gives outputs of shapes {shapes[0]}, the network {shapes[1]}")
    off = difference(ours, theirs, images)
    same = same_answers(ours, theirs, images)
    count, samples = int(same.sum()), len(same)
    verified = Verified(name, installed, samples, count, float(off.max()))
    typical_noise = min(float(noise.median()), LARGEST_NOISE if images else torch.inf)
    moved, moved_by_noise = int((off > FLOOR).sum()), float((noise > FLOOR).sum()) / len(noise)
    limits = (
        ("outputs that are finite in one of the two only", int(off.isinf().sum()), 0),
        ("the median difference", float(off.median()), max(FLOOR, FACTOR * typical_noise)),
        ("samples that differ", moved, FACTOR * moved_by_noise + max(1, 0.02 * len(off))),
        ("other answers", samples - count, FACTOR * expected.changed + max(1, 0.01 * samples)),
    )
    for what, is_, at_most in limits:
        if is_ > at_most:
            raise VerificationError(
                f"{name} {installed} answers otherwise than the network: {what} {is_:.3g}, expected at most "
                f"{at_most:.3g} by float noise; {count} of {samples} answers are the same, the largest difference is "
                f"{verified.max_difference:.1e} of the largest output"
            )
    return verified
