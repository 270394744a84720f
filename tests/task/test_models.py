"""The networks that a study can name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from mpsearch.errors import TaskError
from mpsearch.study import DataSpec, TaskSpec
from mpsearch.task.models import OUR_MODELS, build_model, model_names
from mpsearch.task.networks import DigitsCNN, ResidualBlock


def spec(model: str, **keys: object) -> TaskSpec:
    return TaskSpec(model=model, data=DataSpec(kind="digits"), **keys)


def macs(model: nn.Module, shape: tuple[int, ...]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.zeros(1, *shape))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(
    ("name", "parameters"),
    # Table 6 of arXiv 1512.03385 gives 0.27, 0.46, 0.66 and 0.85 M.
    [("cifar_resnet20", 0.27), ("cifar_resnet32", 0.46), ("cifar_resnet44", 0.66), ("cifar_resnet56", 0.85)],
)
def test_cifar_resnets_have_the_published_number_of_parameters(name: str, parameters: float):
    model = build_model(spec(name), num_classes=10)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == parameters


def test_cifar_resnet20_has_the_keys_of_public_checkpoints():
    keys = {key.rpartition(".")[0] for key in build_model(spec("cifar_resnet20"), 10).state_dict()}
    blocks = {f"layer{s}.{b}.{m}" for s in (1, 2, 3) for b in (0, 1, 2) for m in ("conv1", "bn1", "conv2", "bn2")}
    assert keys == {"conv1", "bn1", "linear"} | blocks


def test_cifar_resnet20_costs_40_55_million_macs():
    # Stem 432*1024, stages 6*2304*1024, (4608+5*9216)*256, (18432+5*36864)*64, classifier 640.
    model = build_model(spec("cifar_resnet20"), 10)
    stages = 6 * 2304 * 1024 + (4608 + 5 * 9216) * 256 + (18432 + 5 * 36864) * 64
    assert macs(model, (3, 32, 32)) == 432 * 1024 + stages + 640


def test_option_a_shortcut_takes_every_second_pixel_and_pads_channels_with_zeros():
    x = torch.arange(2 * 4 * 4, dtype=torch.float32).view(1, 2, 4, 4)
    y = ResidualBlock(2, 4, stride=2).shortcut(x)
    assert torch.equal(y[:, 1:3], x[:, :, ::2, ::2])
    assert not y[:, [0, 3]].any()


def test_digits_cnn_has_dense_depthwise_and_pointwise_layers():
    convs = [m for m in DigitsCNN().modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 10
    assert sum(c.groups == c.in_channels > 1 for c in convs) == 2
    assert sum(c.kernel_size == (1, 1) for c in convs) == 2


@pytest.mark.parametrize("name", OUR_MODELS)
def test_our_models_take_any_number_of_channels_and_classes(name: str):
    model = build_model(spec(name), num_classes=7, in_channels=2).eval()
    assert model(torch.zeros(3, 2, 16, 16)).shape == (3, 7)


def test_a_unet_answers_every_pixel_and_a_wave_cnn_every_sound():
    unet = build_model(spec("unet", model_args={"levels": 2, "width": 4}), num_classes=3, in_channels=2).eval()
    assert unet(torch.zeros(2, 2, 12, 8)).shape == (2, 3, 12, 8)
    sounds = build_model(spec("wave_cnn"), num_classes=3, in_channels=1).eval()
    assert [sounds(torch.zeros(2, 1, samples)).shape for samples in (800, 16000)] == [(2, 3), (2, 3)]


def test_torchvision_models_are_known_by_name_and_take_arguments():
    model = build_model(spec("mobilenet_v2", model_args={"width_mult": 0.25}), num_classes=5).eval()
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 5)
    assert {"resnet18", "efficientnet_b0", "vit_b_16", "digits_cnn"} <= set(model_names())


def test_an_unknown_model_is_answered_with_the_nearest_name():
    with pytest.raises(TaskError, match=r"no model 'resnet_18'.*did you mean 'resnet18'"):
        build_model(spec("resnet_18"), 10)


def test_arguments_that_a_model_does_not_take_are_named():
    with pytest.raises(TaskError, match=r"task\.model_args: digits_cnn .*widht"):
        build_model(spec("digits_cnn", model_args={"widht": 3}), 10)


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the working directory, whose name no other test uses."""
    name = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(
        "from torch import nn\n"
        "def build(width=2):\n    return nn.Linear(width, 3)\n"
        "def number():\n    return 3\n"
        "def fails():\n    raise ValueError('width is odd')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/nowhere"] + [p for p in __import__("sys").path if p])
    return name


def test_a_model_of_ones_own_is_built_by_its_function_from_the_working_directory(own_module: str):
    model = build_model(spec(f"{own_module}:build", model_args={"width": 5}), num_classes=3)
    assert isinstance(model, nn.Linear)
    assert model.in_features == 5


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("biuld", "no function 'biuld': did you mean 'build'"),
        ("number", r"must return a torch\.nn\.Module, got int"),
        ("fails", "raised ValueError: width is odd"),
        ("", "write module:function"),
    ],
)
def test_a_function_that_gives_no_model_is_refused(own_module: str, function: str, message: str):
    with pytest.raises(TaskError, match=message):
        build_model(spec(f"{own_module}:{function}"), 3)


def test_a_module_that_does_not_exist_is_named():
    with pytest.raises(TaskError, match="no module 'nowhere_at_all'"):
        build_model(spec("nowhere_at_all.deep:build"), 3)
