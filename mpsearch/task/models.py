"""Which network a study names: ours and torchvision's by name, anybody's by `module:function`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from mpsearch.errors import TaskError, nearest
from mpsearch.study import TaskSpec
from mpsearch.task.factory import call_factory
from mpsearch.task.networks import CifarResNet, DigitsCNN

OUR_MODELS: Mapping[str, Callable[..., nn.Module]] = {
    "cifar_resnet20": partial(CifarResNet, 20),
    "cifar_resnet32": partial(CifarResNet, 32),
    "cifar_resnet44": partial(CifarResNet, 44),
    "cifar_resnet56": partial(CifarResNet, 56),
    "digits_cnn": DigitsCNN,
}
"""Name -> constructor with keyword arguments `num_classes` and `in_channels`."""


def model_names() -> list[str]:
    """The names that `task.model` can be: ours, then torchvision's classification models."""
    import torchvision.models

    return [*OUR_MODELS, *torchvision.models.list_models(module=torchvision.models)]


def build_model(spec: TaskSpec, num_classes: int, in_channels: int = 3) -> nn.Module:
    """The untrained network that `spec.model` names, with `spec.model_args` as keyword arguments.

    A torchvision model takes 3 channels. A `module:function` is called with `spec.model_args` alone and gives a module.

    Raises:
        TaskError: no such model, or arguments that it does not take.
    """
    name = spec.model or ""
    if ":" in name:
        model = call_factory("task.model", name, spec.model_args)
        if not isinstance(model, nn.Module):
            raise TaskError(f"task.model: {name} must return a torch.nn.Module, got {type(model).__name__}")
        return model
    build = OUR_MODELS.get(name)
    args: dict[str, Any] = {"num_classes": num_classes}
    if build is not None:
        args["in_channels"] = in_channels
    else:
        build = partial(_torchvision_builder(name), weights=None)
    try:
        return build(**(args | spec.model_args))
    except (TypeError, ValueError) as error:
        raise TaskError(f"task.model_args: {name} cannot be built with {spec.model_args}: {error}") from None


def _torchvision_builder(name: str) -> Callable[..., nn.Module]:
    import torchvision.models

    names = model_names()
    if name not in names:
        raise TaskError(f"task.model: no model '{name}', or write module:function for your own; {nearest(name, names)}")
    builder: Callable[..., nn.Module] = torchvision.models.get_model_builder(name)
    return builder
