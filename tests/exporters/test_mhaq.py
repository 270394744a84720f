"""The MHAQ export: its YAML has the schema's fields, its adapter pulls every layer to its own bits.

MHAQ is not on PyPI. What stands for it here is a double of the part that the adapter touches, written from its
published equations: layers that learn log2 steps, the penalty, the order in which bits are collected.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

import mpsearch
from mpsearch.errors import ExportError
from mpsearch.graph.layers import inspect_model
from mpsearch.precision import LayerPrecision, PrecisionConfig


class Codes:
    """MHAQ's quantizer of a weight: v = (w - min) / s, rounded."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def quantize(self, w: Tensor) -> Tensor:
        least = w.flatten(1).amin(1).view(-1, *[1] * (w.dim() - 1))
        return torch.round((w - least) / torch.exp2(self.layer.log_wght_s))  # type: ignore[operator]


class Weight(nn.Module):
    """A layer that learns a log2 step per channel."""

    def __init__(self, layer: nn.Conv2d | nn.Linear) -> None:
        super().__init__()
        self.weight = layer.weight
        shape = [layer.weight.shape[0]] + [1] * (layer.weight.dim() - 1)
        self.log_wght_s = nn.Parameter(torch.full(shape, -9.0))
        self.Q = Codes(self)

    def bits(self) -> Tensor:
        width = self.weight.flatten(1).amax(1) - self.weight.flatten(1).amin(1)
        return torch.log2(width + torch.exp2(self.log_wght_s.ravel())) - self.log_wght_s.ravel()


class Input(nn.Module):
    """An activation that learns log2 of range and step; `bw` are the bits it was seen to use."""

    def __init__(self) -> None:
        super().__init__()
        self.log_act_s = nn.Parameter(torch.tensor([-10.0]))
        self.log_act_q = nn.Parameter(torch.tensor([0.0]))
        self.bw = torch.tensor(10.0)

    def bits(self) -> Tensor:
        return self.log_act_q - self.log_act_s


class Fused(Weight):
    """Newer MHAQ: weight and activation in one module."""

    def __init__(self, layer: nn.Conv2d | nn.Linear) -> None:
        super().__init__(layer)
        self.log_act_s = nn.Parameter(torch.tensor([-10.0]))
        self.log_act_q = nn.Parameter(torch.tensor([0.0]))
        self.bw = torch.tensor(10.0)


def double(network: nn.Module, names: list[str], fused: bool) -> Any:
    """What `quantizer.quantize(model)` returns, and the quantizer."""
    for name in names:
        layer = network.get_submodule(name)
        new = Fused(layer) if fused else nn.Sequential()  # type: ignore[arg-type]
        if not fused:
            new.add_module("activations_quantizer", Input())
            new.add_module("0", Weight(layer))  # type: ignore[arg-type]
        setattr(network, name, new)
    criterion = SimpleNamespace(wt=4, at=4)
    stats = SimpleNamespace(is_converged=lambda: None)
    return SimpleNamespace(model=network, wrapped_criterion=criterion), SimpleNamespace(model_stats=stats)


def penalty(qmodel: Any) -> Tensor:
    """mean relu(b_w - (W - eps)) + mean relu(b_a - (A - eps)), bits collected as MHAQ does."""
    weights = [m for m in qmodel.model.modules() if hasattr(m, "log_wght_s")]
    inputs = [m for m in qmodel.model.modules() if hasattr(m, "log_act_s")]
    b_w = torch.cat([Weight.bits(m) for m in weights])
    b_a = torch.cat([Input.bits(m) for m in inputs])
    criterion = qmodel.wrapped_criterion
    loss: Tensor = torch.relu(b_w - (criterion.wt - 1e-3)).mean() + torch.relu(b_a - (criterion.at - 1e-3)).mean()
    return loss


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 1), nn.Flatten(), nn.Linear(6 * 36, 3)).eval()


CONFIG = {"0": ("uniform:8", "uniform:6"), "2": ("uniform:2", "uniform:3"), "4": ("float", "float")}


def export(folder: Path, **changes: tuple[str, str]) -> Path:
    x = torch.randn(4, 1, 8, 8)
    layers = inspect_model(small(), x).layers
    config = PrecisionConfig({n: LayerPrecision.parse(*pair) for n, pair in {**CONFIG, **changes}.items()})
    model = mpsearch.prepare(small(), config, x, layers)
    return mpsearch.export(mpsearch.QuantizedNetwork(model, layers, "small", "CIFAR10"), "mhaq", folder).path


def adapter(folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("mhaq_adapter", folder / "mhaq_adapter.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_yaml_has_what_the_schema_requires(tmp_path: Path) -> None:
    document = yaml.safe_load((export(tmp_path / "out") / "mhaq.yaml").read_text())
    assert document["model"].keys() >= {"type", "name", "params"}
    assert document["data"].keys() >= {"dataset_name", "batch_size", "num_workers"}
    assert document["training"].keys() >= {"criterion", "optimizer", "learning_rate", "max_epochs"}
    quantization = document["quantization"]
    assert (quantization["name"], quantization["qscheme"]) == ("GDNSQQuant", 1)
    assert (quantization["weight_bit"], quantization["act_bit"]) == (8, 6)
    assert quantization["excluded_layers"] == ["4"]
    assert document["mpsearch"]["layers"]["2"] == {"weight_bit": 2, "act_bit": 3}
    assert "ignores" in document["mpsearch"]["note"]


def test_weights_start_from_ours(tmp_path: Path) -> None:
    small().load_state_dict(load_file(export(tmp_path / "out") / "model.safetensors"), strict=True)


@pytest.mark.parametrize("fused", [False, True], ids=["older", "newer"])
def test_penalty_pulls_every_layer_to_its_own_bits_and_convergence_is_per_layer(fused: bool, tmp_path: Path) -> None:
    module = adapter(export(tmp_path / "out"))
    qmodel, quantizer = double(small(), ["0", "2"], fused)
    module.set_targets(qmodel, quantizer)
    assert qmodel.wrapped_criterion.wt.tolist() == [8.0] * 4 + [2.0] * 6
    assert qmodel.wrapped_criterion.at.tolist() == [6.0, 3.0]
    assert not quantizer.model_stats.is_converged()
    optimizer = torch.optim.RAdam([p for p in qmodel.model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        penalty(qmodel).backward()
        optimizer.step()
    found = {name: m for name, m in qmodel.model.named_modules() if hasattr(m, "log_wght_s")}
    bits = [float(Weight.bits(m).detach().max()) for m in found.values()]
    assert bits[0] == pytest.approx(8, abs=0.4)
    assert bits[1] == pytest.approx(2, abs=0.4)
    for m, bw in zip((m for m in qmodel.model.modules() if hasattr(m, "log_act_s")), (6.0, 3.0), strict=True):
        assert float(Input.bits(m).detach()) == pytest.approx(bw, abs=0.4)
        m.bw = torch.tensor(bw)
    assert quantizer.model_stats.is_converged()
    next(m for m in qmodel.model.modules() if hasattr(m, "log_act_s")).bw = torch.tensor(6.5)
    assert not quantizer.model_stats.is_converged()


def test_layer_that_mhaq_left_float_is_named(tmp_path: Path) -> None:
    module = adapter(export(tmp_path / "out"))
    with pytest.raises(ValueError, match="no weight quantizer for layer '2'"):
        module.set_targets(*double(small(), ["0"], fused=False))
    with pytest.raises(ValueError, match="quantizes layer '4', which the config says nothing of"):
        module.set_targets(*double(small(), ["0", "2", "4"], fused=True))


def test_mixed_granularity_and_other_types_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="'0' has a scale per channel and '2' per tensor"):
        export(tmp_path / "a", **{"2": ("uniform:2/tensor", "uniform:3")})
    with pytest.raises(ExportError, match=r"2 \(conv2d\) weight shift:3/channel"):
        export(tmp_path / "b", **{"2": ("shift:3", "uniform:3")})
