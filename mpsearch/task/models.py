"""Which network a study names: ours and torchvision's by name, those of libraries, anybody's by `module:function`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from mpsearch.errors import TaskError, nearest
from mpsearch.study import TaskSpec
from mpsearch.task.factory import call_factory
from mpsearch.task.libraries import LIBRARIES, Needs, Network
from mpsearch.task.networks import ESPCN, CifarResNet, DigitsCNN, UNet, WaveCNN, small_fcos

OUR_MODELS: Mapping[str, Callable[..., nn.Module]] = {
    "cifar_resnet20": partial(CifarResNet, 20),
    "cifar_resnet32": partial(CifarResNet, 32),
    "cifar_resnet44": partial(CifarResNet, 44),
    "cifar_resnet56": partial(CifarResNet, 56),
    "digits_cnn": DigitsCNN,
}
"""Classifiers of images: name -> constructor with keyword arguments `num_classes` and `in_channels`."""

OUR_OTHERS: Mapping[str, Callable[..., nn.Module]] = {
    "unet": UNet,
    "wave_cnn": WaveCNN,
    "espcn": ESPCN,
    "small_fcos": small_fcos,
}
"""The same for masks, sounds, larger images and boxes."""


def model_name(model: str | None) -> str:
    """What a `task.model` is called in records: without its library or module, and without the folders above it.

    >>> [model_name(model) for model in ("resnet18", "timm:resnet18", "hf:/nets/gpt/", "my.module:net")]
    ['resnet18', 'resnet18', 'gpt', 'net']
    """
    return (model or "").rpartition(":")[2].rstrip("/").rpartition("/")[2]


def model_names() -> list[str]:
    """The names that `task.model` can be without a library's: ours, then torchvision's classification models."""
    import torchvision.models

    return [*OUR_MODELS, *OUR_OTHERS, *torchvision.models.list_models(module=torchvision.models)]


def build_model(spec: TaskSpec, num_classes: int, in_channels: int = 3) -> nn.Module:
    """The network that `spec` names for so many classes; see `build_network`."""
    return build_network(spec, Needs("classification", num_classes, in_channels)).module


def build_network(spec: TaskSpec, needs: Needs) -> Network:
    """The network that `spec.model` names, with `spec.model_args` as keyword arguments.

    torchvision's by their bare names are its classifiers, which take 3 channels. A `module:function` is called with
    `spec.model_args` alone and gives a module.

    Raises:
        TaskError: no such model, or arguments that it does not take.
    """
    name = spec.model or ""
    library, colon, rest = name.partition(":")
    if colon and library in LIBRARIES:
        return LIBRARIES[library](rest, spec.model_args, needs)
    if colon:
        model = call_factory("task.model", name, spec.model_args)
        if not isinstance(model, nn.Module):
            raise TaskError(f"task.model: {name} must return a torch.nn.Module, got {type(model).__name__}")
        return Network(model)
    build = {**OUR_MODELS, **OUR_OTHERS}.get(name)
    args: dict[str, Any] = {} if needs.classes is None else {"num_classes": needs.classes}
    if build is not None:
        args["in_channels"] = needs.channels
    else:
        build = partial(_torchvision_builder(name), weights=None)
    try:
        return Network(build(**(args | spec.model_args)))
    except (TypeError, ValueError) as error:
        raise TaskError(f"task.model_args: {name} cannot be built with {spec.model_args}: {error}") from None


def _torchvision_builder(name: str) -> Callable[..., nn.Module]:
    import torchvision.models

    names = model_names()
    if name not in names:
        raise TaskError(
            f"task.model: no model '{name}', or write timm:NAME, torchvision:NAME, hf:CLASS, or module:function for "
            f"your own; {nearest(name, names)}"
        )
    builder: Callable[..., nn.Module] = torchvision.models.get_model_builder(name)
    return builder
