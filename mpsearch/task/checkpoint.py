"""Reading trained weights from a file, and saying precisely why they cannot be used."""

from __future__ import annotations

import hashlib
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mpsearch.errors import TaskError

WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
"""Keys under which training scripts store the state dict."""
PREFIXES = ("module.", "_orig_mod.", "model.")
"""What DataParallel, torch.compile and Lightning write before every key."""


def load_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Load a state dict (.pt, .pth, .safetensors) into `model`, in place and on the CPU; every key must match.

    Pickles are read by torch's weights-only reader, which runs no code. A state dict inside a dict of `WRAPPERS`, and
    keys that all begin with one of `PREFIXES`, are understood.

    Raises:
        TaskError: no such file, not a state dict, code inside, keys or shapes that do not match, or weights that are
            not finite; the message names them.
    """
    path = Path(path)
    state = _unprefixed(_state_dict(_read(path), path), set(model.state_dict()))
    _check_fit(model.state_dict(), state, path)
    model.load_state_dict(state)


def file_sha256(path: str | Path) -> str:
    """The SHA-256 of a file's content, 64 hex digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path) -> Any:
    if not path.is_file():
        raise TaskError(f"no checkpoint '{path}': give the path of a .pt, .pth or .safetensors file")
    try:
        match path.suffix:
            case ".safetensors":
                return load_file(path)
            case ".pt" | ".pth":
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that a foreign pickle may hold what cannot be read: it is refused
                    return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise TaskError(
            f"checkpoint '{path}' refused: "
            + (f"it holds `{found[1]}`" if found else "it is damaged, or holds Python objects")
            + ", and only weights are read, because anything else could run code; save `model.state_dict()` and give "
            "that file"
        ) from None
    except Exception as error:  # what a damaged file raises depends on where the damage is
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TaskError(
            f"checkpoint '{path}' cannot be read, it is damaged or of another format: {said[:120]}; save the "
            "weights again with torch.save(model.state_dict(), path)"
        ) from None
    raise TaskError(f"checkpoint '{path}' ends in '{path.suffix}': give a .pt, .pth or .safetensors file")


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(content, Mapping):
        for key in WRAPPERS:
            if isinstance(content.get(key), Mapping):
                content = content[key]
                break
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise TaskError(
            f"checkpoint '{path}' holds {_outline(content)}: expected a state dict (parameter name -> tensor), bare or "
            f"under one of the keys {', '.join(WRAPPERS)}"
        )
    return {str(key): value for key, value in content.items()}


def _outline(content: Any) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    return "a dict of " + _few(f"{key} ({type(value).__name__})" for key, value in content.items())


def _unprefixed(state: dict[str, Tensor], expected: set[str]) -> dict[str, Tensor]:
    for prefix in PREFIXES:
        if state and expected.isdisjoint(state) and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _check_fit(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path) -> None:
    # Checkpoints from before PyTorch 0.4.1 count no batches; torch fills the counter in.
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in expected]
    if missing or unexpected:
        raise TaskError(
            f"checkpoint '{path}' is of another network: {len(missing)} of the model's {len(expected)} keys are missing"
            + (f" ({_few(missing)})" if missing else "")
            + f", {len(unexpected)} keys are unexpected"
            + (f" ({_few(unexpected)})" if unexpected else "")
            + "; give the checkpoint of `task.model`, or change the model"
        )
    shapes = [
        f"{key}: {tuple(value.shape)} instead of {tuple(expected[key].shape)}"
        for key, value in state.items()
        if value.shape != expected[key].shape
    ]
    if shapes:
        raise TaskError(
            f"checkpoint '{path}' has other shapes than the model in {len(shapes)} tensors: {_few(shapes)}; if only "
            "the classifier differs, the checkpoint was trained on another number of classes than the data has"
        )
    bad = [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise TaskError(
            f"checkpoint '{path}' has NaN or infinite values in {len(bad)} tensors: {_few(bad)}; its training "
            "diverged, give an earlier checkpoint"
        )


def _few(items: Iterable[str], most: int = 3) -> str:
    items = list(items)
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
