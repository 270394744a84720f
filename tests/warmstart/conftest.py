"""One thread, as everywhere layers are small; a network and its input; and where the helpers are."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Of every test here."""


@pytest.fixture
def residual() -> nn.Module:
    from warm_nets import Residual

    torch.manual_seed(0)
    return Residual().eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(1))
