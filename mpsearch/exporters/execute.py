"""Run an ONNX file and leave its outputs in a file: a program of its own, so that a crash of a runtime is not ours.

    python -m mpsearch.exporters.execute onnx|qonnx MODEL INPUTS.npz OUTPUTS.npz

Inputs are taken in the order of the model's; where its batch has a fixed size they are given in parts of that size, and
a last part that is too small is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

Arrays = list[np.ndarray[Any, Any]]


def _onnxruntime(file: str) -> tuple[int | None, Callable[[Arrays], Arrays]]:
    """A default session: what a user gets who sets nothing."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [argument.name for argument in session.get_inputs()]
    batch = session.get_inputs()[0].shape[0]
    size = batch if isinstance(batch, int) else None
    return size, lambda inputs: session.run(None, dict(zip(names, inputs, strict=True)))


def _qonnx(file: str) -> tuple[int | None, Callable[[Arrays], Arrays]]:
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

    return batch.dim_value or None, run


RUN = {"onnx": _onnxruntime, "qonnx": _qonnx}


def main(kind: str, file: str, source: str, target: str) -> None:
    """Run the model on all inputs, and write `out0`, `out1`, ..."""
    with np.load(source) as stored:
        inputs = [stored[f"in{i}"] for i in range(len(stored.files))]
    size, run = RUN[kind](file)
    samples = len(inputs[0])
    size = size or samples
    parts = [run([array[i : i + size] for array in inputs]) for i in range(0, samples - size + 1, size)]
    if not parts:
        raise ValueError(f"the model takes batches of {size}, only {samples} samples were given")
    outputs = [np.concatenate(part) if np.ndim(part[0]) else np.asarray(part[0]) for part in zip(*parts, strict=True)]
    np.savez(target, **{f"out{i}": output for i, output in enumerate(outputs)})  # type: ignore[arg-type]


if __name__ == "__main__":
    main(*sys.argv[1:])
