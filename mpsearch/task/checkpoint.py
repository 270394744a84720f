"""Reading trained weights from a file, and saying precisely why they cannot be used.

A file is known by its content; its name may end in anything.
"""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mpsearch.errors import TaskError
from mpsearch.shipped import where

WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
"""Keys under which training scripts store the state dict: of several that fit, the first counts."""
DEPTH = 3  # dicts within dicts in which weights are looked for
WRITTEN_IN = re.compile(r"(^|(?<=\.))(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What DataParallel, torch.compile, FSDP and activation checkpointing write into keys, wherever they wrap a module."""

FOREIGN: Mapping[bytes, str] = {
    b"version https://git-lfs": "a Git LFS pointer in the place of the file: fetch it with `git lfs pull`",
    b"<": "text (HTML or XML), as a failed download leaves it: download the file again",
    b"\x89HDF": "HDF5, as Keras writes: give a state dict of the PyTorch model",
    b"\x08": "probably ONNX: give a state dict of the PyTorch model",
    b"\x1f\x8b": "compressed by gzip: unpack it",
}
"""How files that are no checkpoints begin, what they are, and what to do."""

HARMLESS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    *{type(np.dtype(kind)) for kind in "?bhilqBHILQefd"},
    np._core.multiarray.scalar,  # type: ignore[attr-defined]
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),  # type: ignore[attr-defined]
]
"""What lies beside the weights of many a checkpoint: options, and numbers of NumPy. Reading them runs no code."""


def load_checkpoint(model: nn.Module, path: str | Path) -> str:
    """Load a state dict into `model`, in place and on the CPU; every key must match.

    A safetensors file, or one of torch.save; pickles are read by torch's weights-only reader, which runs no code. The
    state dict may lie in dicts (`WRAPPERS` first), its keys may have one prefix in common that those of other networks
    in the same dict have not (Lightning's `model.`), and what wrappers write into keys (`WRITTEN_IN`) is passed over.

    Returns:
        where the weights lie in the file, as `state_dict`, with the places of others that fit; empty for a bare one.

    Raises:
        TaskError: no such file, not a state dict, code inside, keys or shapes that do not match, several networks that
            fit, or weights that are not finite or of another kind of number; the message names them.
    """
    path = Path(path)
    content = read_weights(path)
    expected = model.state_dict()
    places = dict(_places(content))
    if not places:
        raise TaskError(
            f"checkpoint '{path}' holds {_outline(content)}: expected a state dict (parameter name -> tensor), bare or "
            f"in a dict, as under {', '.join(WRAPPERS)}"
        )
    fitting = {
        "/".join(filter(None, (place, prefix))): state
        for place, tensors in places.items()
        for prefix, state in _networks(tensors, expected)
        if not _missing(state, expected) and not _misshapen(state, expected)
    }
    if not fitting:
        raise TaskError(f"checkpoint '{path}' " + _misfit(places, expected, content))
    first = next((name for name in ("", *WRAPPERS) if name in fitting), None)
    if first is None and len(fitting) > 1:
        raise TaskError(
            f"checkpoint '{path}' holds {len(fitting)} networks that fit, {_few(fitting)}: save the one that is meant "
            "in a file of its own"
        )
    first = next(iter(fitting)) if first is None else first
    _check_values(fitting[first], expected, path)
    model.load_state_dict(fitting[first])
    others = [name for name in fitting if name != first]
    return f"'{first}'" * bool(first) + f" (not {_few(others)}, which would fit too)" * bool(others)


def read_weights(path: Path) -> Any:
    """What a checkpoint holds, on the CPU: a safetensors file's tensors, or what torch's weights-only reader gives.

    Raises:
        TaskError: no such file, no checkpoint, or one with code inside; the message says what it is.
    """
    if not path.is_file():
        inside = f"a folder that holds {_few(sorted(p.name for p in path.iterdir()))}" if path.is_dir() else "no file"
        raise TaskError(f"no checkpoint {where(path)}, it is {inside}: give the path of a file with a state dict")
    try:
        with path.open("rb") as file:
            head = file.read(32)
        # A safetensors file begins with the length of its header, any bytes, and then the header, a JSON object.
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
            return load_file(path)
        if what := next((what for begin, what in FOREIGN.items() if head.startswith(begin)), None):
            raise TaskError(f"checkpoint '{path}' is no checkpoint: it is {what}")
        with warnings.catch_warnings(), torch.serialization.safe_globals(HARMLESS):
            warnings.simplefilter("ignore")  # that a foreign pickle may hold what cannot be read: it is refused
            return torch.load(path, map_location="cpu", weights_only=True)
    except TaskError:
        raise
    except pickle.UnpicklingError as error:
        match = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise TaskError(
            f"checkpoint '{path}' refused: "
            + (f"it holds `{match[1]}`" if match else "it is damaged, or holds Python objects")
            + ", and only weights are read, because anything else could run code; save `model.state_dict()` and give "
            "that file"
        ) from None
    except Exception as error:  # what a damaged file raises depends on where the damage is
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "TorchScript" in said:
            said = "it is a TorchScript archive, which holds code"
        raise TaskError(
            f"checkpoint '{path}' cannot be read, it is damaged or of another format: {said[:120]}; save the "
            "weights again with torch.save(model.state_dict(), path)"
        ) from None


def _places(content: Any, name: str = "", depth: int = DEPTH) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every dict in the file that holds tensors, by its path of keys."""
    if not isinstance(content, Mapping):
        return
    if tensors := {str(key): value for key, value in content.items() if isinstance(value, Tensor)}:
        yield name, tensors
    if depth:
        for key, value in content.items():
            yield from _places(value, f"{name}/{key}".removeprefix("/"), depth - 1)


State = Mapping[str, Tensor]


def _networks(tensors: State, expected: State) -> Iterator[tuple[str, State]]:
    """What in one dict may be the network: all of it or, of what lies under one prefix, all that does.

    Yields:
        (`PREFIX.*`, or nothing where it is all of the dict; the state dict without the prefix).
    """
    yield "", tensors
    plain = {WRITTEN_IN.sub("", key): value for key, value in tensors.items()}
    if plain.keys() != tensors.keys():
        if not _missing(tensors, expected):
            return
        yield "", plain
    sought = next(iter(expected), "")
    for prefix in sorted(key.removesuffix(sought) for key in plain if key.endswith("." + sought)):
        state = {key.removeprefix(prefix): value for key, value in plain.items() if key.startswith(prefix)}
        yield ("" if len(state) == len(plain) else f"{prefix}*"), state


def _missing(state: State, expected: State) -> list[str]:
    """Keys that only one of the two has."""
    # Checkpoints from before PyTorch 0.4.1 count no batches; torch fills the counter in.
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    return missing + [key for key in state if key not in expected]


def _misshapen(state: State, expected: State) -> list[str]:
    return [
        f"{key}: {tuple(value.shape)} instead of {tuple(expected[key].shape)}"
        for key, value in state.items()
        if key in expected and value.shape != expected[key].shape
    ]


def _misfit(places: Mapping[str, State], expected: State, content: Any) -> str:
    """Why nothing in the file is the network, said of what is most like it."""
    states = [state for tensors in places.values() for _, state in _networks(tensors, expected)]
    state = min(states, key=lambda s: (len(_missing(s, expected)), len(_misshapen(s, expected))))
    holds = f"; it holds {_outline(content)}" if "" not in places else ""
    if odd := _missing(state, expected):
        missing, unexpected = [k for k in odd if k in expected], [k for k in odd if k not in expected]
        return (
            f"is of another network: {len(missing)} of the model's {len(expected)} keys are missing"
            + (f" ({_few(missing)})" if missing else "")
            + f", {len(unexpected)} keys are unexpected"
            + (f" ({_few(unexpected)})" if unexpected else "")
            + holds
            + "; give the checkpoint of `task.model`, or change the model"
        )
    shapes = _misshapen(state, expected)
    return (
        f"has other shapes than the model in {len(shapes)} tensors: {_few(shapes)}{holds}; if only the classifier "
        "differs, the checkpoint was trained on another number of classes than the data has: set task.num_classes"
    )


def _check_values(state: State, expected: State, path: Path) -> None:
    kinds = [
        f"{key}: {str(value.dtype).removeprefix('torch.')} instead of {str(expected[key].dtype).removeprefix('torch.')}"
        for key, value in state.items()
        if expected[key].is_floating_point() and not value.is_floating_point()
    ]
    if kinds:
        raise TaskError(
            f"checkpoint '{path}' has other numbers than the model's floats in {len(kinds)} tensors: {_few(kinds)}; "
            "give the float network's weights, not those of a quantized one"
        )
    bad = [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise TaskError(
            f"checkpoint '{path}' has NaN or infinite values in {len(bad)} tensors: {_few(bad)}; its training "
            "diverged, give an earlier checkpoint"
        )


def _outline(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    return "a dict of " + _few((f"{key} ({type(value).__name__})" for key, value in content.items()), most=8)


def _few(items: Iterable[str], most: int = 3) -> str:
    items = list(items)
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
