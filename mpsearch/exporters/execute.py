"""Run an ONNX file and leave its outputs in a file: a program of its own, so that a crash of a runtime is not ours.

    python -m mpsearch.exporters.execute onnx|qonnx MODEL INPUTS.npz OUTPUTS.npz

Inputs are taken in the order of the model's; where its batch has a fixed size they are given in parts of that size, and
a last part that is too small is left out. Where there are more inputs than the model has, they are images of a list,
given as many at once as it takes, and their outputs follow one another.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Arrays = list[np.ndarray[Any, Any]]


class FailedToRun(Exception):
    """A runtime does not load a file, does not end, or ends with an error; the message says which."""


def run_apart(kind: str, file: Path, inputs: Sequence[np.ndarray[Any, Any]], timeout_s: float) -> Arrays:
    """The outputs of an ONNX file, which another process runs.

    Raises:
        FailedToRun: it gives none.
    """
    with tempfile.TemporaryDirectory(prefix="mpsearch-execute-") as scratch:
        files = [file.resolve(), *(Path(scratch) / name for name in ("in.npz", "out.npz"))]
        np.savez(files[1], **{f"in{i}": x for i, x in enumerate(inputs)})  # type: ignore[arg-type]
        command = [sys.executable, "-m", "mpsearch.exporters.execute", kind, *map(str, files)]
        try:
            process = subprocess.run(
                command, capture_output=True, text=True, timeout=timeout_s, check=False, cwd=scratch
            )
        except subprocess.TimeoutExpired:
            raise FailedToRun(f"did not end within {timeout_s:g} s") from None
        if process.returncode:
            raise FailedToRun(f"fails on it: {last_line(process.stderr, process.returncode)}")
        with np.load(files[2]) as stored:
            return [stored[f"out{i}"] for i in range(len(stored.files))]


def last_line(text: str, code: int) -> str:
    """What a process that ended with `code` said last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][-500:] if lines else f"the process ended with {code}"


def _onnxruntime(file: str) -> tuple[int, int | None, Callable[[Arrays], Arrays]]:
    """A default session: what a user gets who sets nothing."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [argument.name for argument in session.get_inputs()]
    batch = session.get_inputs()[0].shape[0]
    size = batch if isinstance(batch, int) else None
    return len(names), size, lambda inputs: session.run(None, dict(zip(names, inputs, strict=True)))


def _qonnx(file: str) -> tuple[int, int | None, Callable[[Arrays], Arrays]]:
    """Node by node, which wants static shapes."""
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx

    model = ModelWrapper(file)
    inputs, outputs = ([value.name for value in part] for part in (model.graph.input, model.graph.output))
    batch = model.graph.input[0].type.tensor_type.shape.dim[0]

    def run(arrays: Arrays) -> Arrays:
        feed = dict(zip(inputs, arrays, strict=True))
        for name, array in feed.items():
            model.set_tensor_shape(name, list(array.shape))
        results = execute_onnx(model, feed)
        return [results[name] for name in outputs]

    return len(inputs), batch.dim_value or None, run


RUN = {"onnx": _onnxruntime, "qonnx": _qonnx}
"""Kind of file -> its number of inputs, the size of its batch if that is fixed, and what runs it."""


def main(kind: str, file: str, source: str, target: str) -> None:
    """Run the model on all inputs, and write `out0`, `out1`, ..."""
    with np.load(source) as stored:
        inputs = [stored[f"in{i}"] for i in range(len(stored.files))]
    count, size, run = RUN[kind](file)
    if len(inputs) > count:
        several = [run(inputs[i : i + count]) for i in range(0, len(inputs) - count + 1, count)]
        outputs = [np.asarray(output) for part in several for output in part]
    else:
        outputs = _in_parts(inputs, size, run)
    np.savez(target, **{f"out{i}": output for i, output in enumerate(outputs)})  # type: ignore[arg-type]


def _in_parts(inputs: Arrays, size: int | None, run: Callable[[Arrays], Arrays]) -> Arrays:
    samples = len(inputs[0])
    size = size or samples
    parts = [run([array[i : i + size] for array in inputs]) for i in range(0, samples - size + 1, size)]
    if not parts:
        raise ValueError(f"the model takes batches of {size}, only {samples} samples were given")
    return [np.concatenate(part) if np.ndim(part[0]) else np.asarray(part[0]) for part in zip(*parts, strict=True)]


if __name__ == "__main__":
    main(*sys.argv[1:])
