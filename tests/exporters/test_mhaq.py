"""The MHAQ export: its YAML is one that MHAQ takes, its adapter pulls every layer to its own bits, its script checks.

What stands for MHAQ here is `mhaq_double`; `python -m benchmarks mhaq --root CHECKOUT` runs the real one.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from exporters.mhaq_double import Module, NoisyAct, NoisyConv2d, bits, calibrate, quantize
from safetensors.torch import load_file
from torch import Tensor, nn

import mpsearch
from mpsearch.errors import ExportError
from mpsearch.exporters.mhaq_networks import dataset, recognize
from mpsearch.graph.layers import inspect_model
from mpsearch.metric import METRICS
from mpsearch.precision import LayerPrecision, PrecisionConfig
from mpsearch.space.build import build_space
from mpsearch.space.spec import load_space
from mpsearch.task.networks import CifarResNet

X = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
FLOAT = ("float", "float")


class Net(nn.Module):
    """Every kind of layer that MHAQ treats in a way of its own; two layers end in `.0`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1))
        self.up = nn.Sequential(nn.Conv2d(6, 5, (1, 3)), nn.ReLU())
        self.point = nn.Conv2d(5, 6, 1)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(self.up(self.body(self.stem(x))))
        return self.fc(x.mean((2, 3)))


CONFIG = {
    "stem": FLOAT,
    "body.0": ("uniform:8", "uniform:6"),
    "body.2": ("uniform:4", "uniform:4"),
    "up.0": ("uniform:2", "uniform:3"),
    "point": FLOAT,
    "fc": FLOAT,
}


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


def network(
    config: Mapping[str, tuple[str, str]], model: nn.Module | None = None, x: Tensor = X, **facts: Any
) -> mpsearch.QuantizedNetwork:
    model = net() if model is None else model
    layers = inspect_model(model, x).layers
    precisions = PrecisionConfig({name: LayerPrecision.parse(*pair) for name, pair in config.items()})
    prepared = mpsearch.prepare(model, precisions, x, layers)
    settings: dict[str, Any] = {"name": "small", "task": "CIFAR10"} | facts
    return mpsearch.QuantizedNetwork(prepared, layers, **settings)


def export(folder: Path, **changes: tuple[str, str]) -> Path:
    given = network({**CONFIG, **{name.replace("_", "."): pair for name, pair in changes.items()}})
    return mpsearch.export(given, "mhaq", folder).path


def document(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((folder / "mhaq.yaml").read_text())
    return loaded


def module(folder: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def in_double(folder: Path, model: nn.Module | None = None) -> tuple[ModuleType, Module, Any]:
    """The adapter, and what it is called with: the network quantized by the export's own YAML."""
    return module(folder, "mhaq_adapter"), *quantize(
        net() if model is None else model, document(folder)["quantization"]
    )


# ---------------------------------------------------------------------------------------------------- the YAML


def resnet(classes: int = 10) -> mpsearch.QuantizedNetwork:
    model = CifarResNet(20, num_classes=classes).eval()
    x = torch.randn(2, 3, 32, 32)
    names = [layer.name for layer in inspect_model(model, x).layers]
    config = dict.fromkeys(names, ("uniform:4", "uniform:4")) | {names[0]: FLOAT, names[-1]: FLOAT}
    return network(config, model, x, name="whatever", task=f"whatever/cifar{classes}-jpeg")


@pytest.mark.parametrize("classes", [10, 100])
def test_a_network_is_known_by_its_weights_and_gets_the_recipe_of_its_kind(classes: int, tmp_path: Path) -> None:
    folder = mpsearch.export(resnet(classes), "mhaq", tmp_path / "out").path
    written = document(folder)
    assert written["model"]["type"] == "VISION_CLS"
    assert written["model"]["name"] == "resnet20_cifar10"  # its resnet20_cifar100 is another network
    assert written["model"]["params"] == {"num_classes": classes}
    assert written["data"]["dataset_name"] == f"CIFAR{classes}"
    assert written["quantization"]["excluded_layers"] == ["conv1", "linear"]
    callbacks = written["training"]["callbacks"]
    assert list(callbacks) == ["ModelCheckpoint", "NoiseEarlyStopping", "TemperatureScale"]
    for name in ("ModelCheckpoint", "NoiseEarlyStopping"):
        assert callbacks[name]["params"]["monitor"] == "Metric/ns_Accuracy_top1"
        assert callbacks[name]["params"]["mode"] == "max"
    assert not any("no network" in note for note in json.loads((folder / "export.json").read_text())["notes"])


def test_weights_are_where_the_yaml_says_and_are_ours(tmp_path: Path) -> None:
    folder = export(tmp_path / "out")
    url = document(folder)["model"]["cpt_url"]
    assert url == f"file://{folder.resolve()}/model.pth"
    expected = net().state_dict()
    for tensors in (
        torch.load(url.removeprefix("file://"), weights_only=True),
        load_file(folder / "model.safetensors"),
    ):
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_what_a_checkout_lacks_is_in_the_notes(tmp_path: Path) -> None:
    given = network(CONFIG, name="module:small_net", task="small/digits")
    folder = mpsearch.export(given, "mhaq", tmp_path / "out").path
    written = document(folder)
    assert written["model"]["name"] == "small_net"
    assert written["model"]["params"] == {"num_classes": 3}
    notes = " ".join(json.loads((folder / "export.json").read_text())["notes"])
    assert "src/models/__init__.py an entry 'small_net'" in notes
    assert f"src/data/compose/vision/__init__.py an entry '{written['data']['dataset_name']}'" in notes


def test_only_classifiers_and_networks_of_its_own_have_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="'small' is none of these networks and is scored by psnr"):
        mpsearch.export(network(CONFIG, metric=METRICS["psnr"]), "mhaq", tmp_path / "out")


def rfdn(features: int = 50, scale: int = 4) -> dict[str, Tensor]:
    """The shapes of MHAQ's RFDN: 64 convolutions."""
    known = {
        "fea_conv.weight": (features, 3, 3, 3),
        "B1.c1_d.weight": (features // 2, features, 1, 1),
        "upsampler.0.weight": (3 * scale**2, features, 3, 3),
    }
    others = {f"others.{i}.weight": (1, 1, 1, 1) for i in range(64 - len(known))}
    return {name: torch.empty(shape) for name, shape in (known | others).items()}


def test_super_resolution_is_trained_as_such() -> None:
    known = recognize(rfdn(scale=2))
    assert known is not None
    assert (known.name, known.data, known.recipe.model_type) == ("RFDN", "SR", "VISION_SR")
    assert known.params(rfdn(scale=2)) == {"scale": 2}
    assert known.params(rfdn(features=40)) == {"scale": 4, "nf": 40}
    assert known.recipe.criterion == "L1Loss"
    assert known.recipe.distilled() == {"distillation": False, "qnmethod": "STE"}
    assert known.recipe.data_params == {}
    assert recognize({**rfdn(), "more.weight": torch.empty(1, 1)}) is None


@pytest.mark.parametrize(
    ("task", "name"),
    [("resnet/CIFAR-100", "CIFAR100"), ("x/cifar10-jpeg", "CIFAR10"), ("x/mnist", "MNIST"), ("x/imagenette", None)],
)
def test_data_is_known_by_the_name_of_the_task(task: str, name: str | None) -> None:
    assert dataset(task) == name


# ------------------------------------------------------------------------------------------ what it cannot hold


@pytest.mark.parametrize(
    ("layer", "pair", "reason"),
    [
        ("fc", ("uniform:8", "uniform:8"), "conv2d layers alone"),
        ("point", ("uniform:8", "uniform:8"), "1x1 convolutions float"),
        ("stem", ("float", "uniform:8"), "beside a float weight"),
    ],
)
def test_what_mhaq_cannot_hold_is_refused_by_layer_or_float_and_listed(
    layer: str, pair: tuple[str, str], reason: str, tmp_path: Path
) -> None:
    given = network(CONFIG | {layer: pair})
    with pytest.raises(ExportError, match=rf"{layer} \(\w+\) \w+ uniform:8.*float would hold it.*{reason}"):
        mpsearch.export(given, "mhaq", tmp_path / "a")
    exported = mpsearch.export(given, "mhaq", tmp_path / "b", allow_lossy=True)
    assert {c.layer for c in exported.conversions} == {layer}
    assert all(
        reason in entry["reason"] for entry in json.loads((exported.path / "export.json").read_text())["converted"]
    )
    assert layer in document(exported.path)["quantization"]["excluded_layers"]
    set_targets, qmodel, quantizer = in_double(exported.path)
    set_targets.set_targets(qmodel, quantizer)


def test_a_convolution_that_is_registered_last_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)).eval()
    config = {"0": ("uniform:4", "uniform:4"), "1": ("uniform:4", "uniform:4")}
    with pytest.raises(ExportError, match=r"1 \(conv2d\) weight .*registers last"):
        mpsearch.export(network(config, copy.deepcopy(model)), "mhaq", tmp_path / "a")
    folder = mpsearch.export(network(config, copy.deepcopy(model)), "mhaq", tmp_path / "b", allow_lossy=True).path
    assert document(folder)["quantization"]["excluded_layers"] == ["1"]
    in_double(folder, model)
    with pytest.raises(IndexError):
        quantize(model[0:1], {**document(folder)["quantization"], "excluded_layers": []})


def test_mixed_granularity_other_types_and_a_changed_network_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"'body\.2' has a scale per channel and 'up\.0' per tensor"):
        export(tmp_path / "a", up_0=("uniform:2/tensor", "uniform:3"))
    with pytest.raises(ExportError, match=r"up\.0 \(conv2d\) weight shift:3/channel"):
        export(tmp_path / "b", up_0=("shift:3", "uniform:3"))
    with pytest.raises(ExportError, match=r"changed before it was quantized: folded \(1\)"):
        mpsearch.export(network(CONFIG, structure={"folded": {"body.0": "bn"}}), "mhaq", tmp_path / "c")
    with pytest.raises(ExportError, match="every layer of this config is float"):
        mpsearch.export(network(dict.fromkeys(CONFIG, FLOAT)), "mhaq", tmp_path / "d")


def test_the_shipped_space_offers_what_can_be_exported(tmp_path: Path) -> None:
    layers = inspect_model(net(), X).layers
    space = build_space(load_space("mhaq"), layers)
    assert {slot.layers for slot in space.slots if len(slot.choices) > 1} == {("body.0",), ("body.2",), ("up.0",)}
    for rung in space.ladder():
        config = {name: (str(p.weight), str(p.activation)) for name, p in rung.items()}
        mpsearch.export(network(config), "mhaq", tmp_path / rung.digest)


# -------------------------------------------------------------------------------------------------- the adapter


def test_penalty_pulls_every_layer_to_its_own_bits_and_convergence_is_per_layer(tmp_path: Path) -> None:
    folder = export(tmp_path / "out")
    adapter, qmodel, quantizer = in_double(folder)
    adapter.set_targets(qmodel, quantizer)
    calibrate(qmodel, document(folder)["quantization"]["calibration"], X)
    adapter.set_targets(qmodel, quantizer)
    assert qmodel.wrapped_criterion.wt.tolist() == [8.0] * 6 + [4.0] * 6 + [2.0] * 5
    assert qmodel.wrapped_criterion.at.tolist() == [6.0, 4.0, 3.0]
    assert not quantizer.model_stats.is_converged()
    optimizer = torch.optim.RAdam([p for p in qmodel.model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(900):
        optimizer.zero_grad()
        qmodel.wrapped_criterion(qmodel.model).backward()
        optimizer.step()
    qmodel.eval().model(X)
    for learned, target in zip(
        bits(qmodel.model), (qmodel.wrapped_criterion.wt, qmodel.wrapped_criterion.at), strict=True
    ):
        assert (learned <= target).all()
        assert (learned > target - 1).all()  # the momentum of RAdam goes on below a target
    table = adapter.true_bits(qmodel)
    assert list(table) == ["body.0", "body.2", "up.0"]
    assert all(row["true_weight"] == pytest.approx(row["weight_bit"], abs=0.6) for row in table.values())
    for act in qmodel.model.modules():
        if isinstance(act, NoisyAct):
            act.bw = torch.tensor(3.0)
    assert quantizer.model_stats.is_converged()
    qmodel.model.up[0].activations_quantizer.bw = torch.tensor(3.1)
    assert not quantizer.model_stats.is_converged()
    assert not adapter.true_bits(qmodel)["up.0"]["converged"]


def test_targets_move_with_the_module_and_are_in_no_checkpoint(tmp_path: Path) -> None:
    adapter, qmodel, quantizer = in_double(export(tmp_path / "out"))
    before = list(qmodel.state_dict())
    adapter.set_targets(qmodel, quantizer)
    assert list(qmodel.state_dict()) == before
    assert {tensor.device.type for tensor in qmodel.to("meta").wrapped_criterion.buffers()} == {"meta"}


def test_an_input_that_stays_float_is_passed_through_and_pulled_nowhere(tmp_path: Path) -> None:
    folder = export(tmp_path / "out", body_2=("uniform:4", "float"))
    assert document(folder)["quantization"]["act_bit"] == 6
    assert document(folder)["mpsearch"]["layers"]["body.2"] == {"weight_bit": 4, "act_bit": -1}
    adapter, qmodel, quantizer = in_double(folder)
    adapter.set_targets(qmodel, quantizer)
    calibrate(qmodel, document(folder)["quantization"]["calibration"], X)
    adapter.set_targets(qmodel, quantizer)
    acts = {name: m for name, m in qmodel.model.named_modules() if isinstance(m, NoisyAct)}
    assert [act.disable for act in acts.values()] == [False, True, False]
    assert bits(qmodel.model)[1].tolist() == pytest.approx([10, 10, 10], abs=1e-4)
    qmodel.wrapped_criterion(qmodel.model).backward()
    gradients = [act.log_act_s.grad for act in acts.values()]
    assert [bool(gradient.any()) for gradient in gradients if gradient is not None] == [True, False, True]
    assert adapter.true_bits(qmodel)["body.2"]["true_act"] is None


def test_weights_alone_are_quantized_where_every_input_is_float(tmp_path: Path) -> None:
    alone = {name.replace(".", "_"): (pair[0], "float") for name, pair in CONFIG.items()}
    folder = export(tmp_path / "out", **alone)
    assert document(folder)["quantization"]["act_bit"] == -1
    adapter, qmodel, quantizer = in_double(folder)
    adapter.set_targets(qmodel, quantizer)
    assert all(m.disable for m in qmodel.model.modules() if isinstance(m, NoisyAct))
    for conv in qmodel.model.modules():
        if isinstance(conv, NoisyConv2d):
            conv.log_wght_s.data.fill_(3.0)  # one code
    assert quantizer.model_stats.is_converged()


def test_one_scale_per_tensor_is_not_calibrated(tmp_path: Path) -> None:
    tensor = {name.replace(".", "_"): (f"{p[0]}/tensor", p[1]) for name, p in CONFIG.items() if p != FLOAT}
    folder = export(tmp_path / "out", **tensor)
    quantization = document(folder)["quantization"]
    assert (quantization["qscheme"], quantization["calibration"]["weight_bit"]) == (0, 0)
    adapter, qmodel, quantizer = in_double(folder)
    calibrate(qmodel, quantization["calibration"], X)
    adapter.set_targets(qmodel, quantizer)
    assert qmodel.wrapped_criterion.wt.tolist() == [8.0, 4.0, 2.0]
    with pytest.raises(RuntimeError, match="shape"):
        calibrate(qmodel, {"weight_bit": 10, "act_bit": 10}, X)


def test_a_constant_input_leaves_the_penalty(tmp_path: Path) -> None:
    folder = export(tmp_path / "out")
    model = net()
    with torch.no_grad():
        for parameter in model.body[2].parameters():  # what up.0 reads is zero
            parameter.zero_()
    adapter, qmodel, quantizer = in_double(folder, model)
    adapter.set_targets(qmodel, quantizer)
    calibrate(qmodel, {"weight_bit": 0, "act_bit": 10}, X)
    adapter.set_targets(qmodel, quantizer)
    assert qmodel.wrapped_criterion.at.tolist() == [6.0, 4.0]
    assert torch.isfinite(qmodel.wrapped_criterion(qmodel.model))


def test_layers_that_differ_from_the_config_are_named(tmp_path: Path) -> None:
    folder = export(tmp_path / "out")
    adapter = module(folder, "mhaq_adapter")
    settings = document(folder)["quantization"]
    excluded = settings["excluded_layers"]
    with pytest.raises(ValueError, match=r"no weight quantizer for layer 'up\.0'"):
        adapter.set_targets(*quantize(net(), settings | {"excluded_layers": [*excluded, "up.0"]}))
    with pytest.raises(ValueError, match="quantizes layer 'stem', which the config says nothing of"):
        adapter.set_targets(*quantize(net(), settings | {"excluded_layers": ["fc"]}))


# --------------------------------------------------------------------------------------------------- the script


@pytest.fixture
def script(tmp_path: Path) -> Iterator[ModuleType]:
    paths = list(sys.path)
    yield module(export(tmp_path / "out"), "train_in_mhaq")
    sys.path[:] = paths


def test_script_stops_unless_the_network_has_the_exported_weights(script: ModuleType) -> None:
    script.check_weights(net())
    with pytest.raises(SystemExit, match="12 of 12 tensors differ"):
        script.check_weights(net(seed=1))
    one = net()
    with torch.no_grad():
        one.fc.weight[0, 0] += 1e-6
    with pytest.raises(SystemExit, match=r"1 of 12 tensors differ, the first is 'fc\.weight'"):
        script.check_weights(one)
    with pytest.raises(SystemExit, match="tensors differ"):
        script.check_weights(nn.Sequential(net()))


def test_script_refuses_a_folder_that_is_no_checkout(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="is no checkout of MHAQ"):
        script.enter(tmp_path)


def test_script_reads_the_weights_beside_it_and_takes_settings(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = ModuleType("src.config.config_schema")
    schema.ConfigSchema = type("ConfigSchema", (), {"model_validate": staticmethod(dict)})  # type: ignore[attr-defined]
    for name in ("src", "src.config"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, schema.__name__, schema)
    (tmp_path / "out").rename(tmp_path / "moved")
    moved = module(tmp_path / "moved", "train_in_mhaq")
    config = moved.read_config(["data.batch_size=8", "training.callbacks.TemperatureScale.params.warmup=2"])
    assert config["model"]["cpt_url"] == f"file://{(tmp_path / 'moved' / 'model.pth').resolve()}"
    assert config["data"]["batch_size"] == 8
    assert config["training"]["callbacks"]["TemperatureScale"]["params"] == {"scale_lr": 1, "warmup": 2}


class Callback:
    """What the script asks MHAQ's checkpoint callback."""

    def __init__(self, best: str, score: float, monitor: str) -> None:
        self.best_model_path, self.best_model_score, self.monitor = best, torch.tensor(score), monitor


class ModelCheckpoint(Callback):
    pass


@pytest.mark.parametrize(
    ("callback", "tested"),
    [
        (ModelCheckpoint("best.ckpt", 0.9, "Metric/ns_Accuracy_top1"), "best.ckpt"),
        (ModelCheckpoint("best.ckpt", 0.0, "Metric/ns_Accuracy_top1"), None),
        (ModelCheckpoint("", 0.0, "PSNR/Weighted_mean"), None),
        (ModelCheckpoint("best.ckpt", -1.0, "PSNR/Weighted_mean"), "best.ckpt"),
    ],
)
def test_script_tests_a_checkpoint_that_has_converged_or_the_network_as_it_is(
    callback: ModelCheckpoint, tested: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = export(tmp_path / "out")
    script, (adapter, qmodel, quantizer) = module(folder, "train_in_mhaq"), in_double(folder)
    monkeypatch.setitem(sys.modules, "mhaq_adapter", adapter)
    adapter.set_targets(qmodel, quantizer)
    asked: list[object] = []

    def test(_: object, *, datamodule: object, ckpt_path: str | None) -> list[dict[str, float]]:
        asked.append(ckpt_path)
        return [{"Accuracy_top1": 0.5}]

    trainer = SimpleNamespace(callbacks=[object(), callback], global_step=7, save_checkpoint=asked.append)
    script.finish(qmodel, trainer, SimpleNamespace(test=test), None)
    result = json.loads((folder / "trained.json").read_text())
    assert asked[0] == tested
    assert result["checkpoint"] == tested or (
        result["checkpoint"] == asked[1] == str(folder.resolve() / "trained.ckpt")
    )
    assert (result["steps"], result["converged"], result["test"]) == (7, False, {"Accuracy_top1": 0.5})
    assert list(result["layers"]) == ["body.0", "body.2", "up.0"]
