"""State dicts of quantized networks: what they hold, and how they are loaded and saved."""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mpsearch.errors import RunError
from mpsearch.files import replacing, require_regular
from mpsearch.private.torch import carry_versions, without_compiled_prefix


def state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, each tensor with memory of its own (safetensors refuses shared memory)."""
    return {
        without_compiled_prefix(name): value.detach().cpu().clone().contiguous()
        for name, value in model.state_dict().items()
    }


def digest(model: nn.Module) -> str:
    """16 hex digits that name the weights and buffers of a network: the same where names, types and values are."""
    sha256 = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            sha256.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
            sha256.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()[:16]


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], strict: bool = True) -> list[str]:
    """Load a state dict that was in a file: it has lost its version numbers, by which some modules convert old ones.

    Returns:
        the names that the model does not have: none if `strict`.

    Raises:
        RuntimeError: the tensors are not those of the model.
    """
    current = model.state_dict()
    state = OrderedDict(tensors)
    carry_versions(state, current)
    return list(model.load_state_dict(state, strict=strict).unexpected_keys)


@torch.no_grad()
def save_weights(model: nn.Module, path: Path) -> None:
    """Write a state dict to one safetensors file, whole or not at all. Raises WriteError."""
    save_tensors(state(model), path)


def read_tensors(path: Path, advice: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file of a run. Raises RunError, which names it and ends with `advice`."""
    try:
        require_regular(path)
        return dict(load_file(path))
    except (OSError, SafetensorError, ValueError) as error:
        raise RunError(f"cannot read the weights in {path} ({error}); {advice}") from None


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to one safetensors file, whole or not at all. Raises WriteError."""
    dense = {name: value.contiguous() for name, value in tensors.items()}  # channels_last is refused
    with replacing(path) as temporary:
        try:
            save_file(dense, temporary, metadata=None if metadata is None else dict(metadata))
        except SafetensorError as error:  # "... No space left on device (os error 28)"
            if number := re.search(r"os error (\d+)", str(error)):
                raise OSError(int(number[1]), str(error)) from None
            raise
