"""The networks that MHAQ has, each with the recipe of its published config: model, data, training.

MHAQ makes a network by its name in `src.models` and loads a state dict into it, so that the names and the shapes of the
tensors decide which one ours is. Values are those of the configs in its repository (master of February 2026), bits
aside. It has no recipe for another kind of network than these three: images in classes, RFDN, YOLO 11.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

State = Mapping[str, Tensor]

WARMUP_STEPS = 1000


@dataclass(frozen=True)
class Recipe:
    """How MHAQ trains a kind of network: what goes into its YAML."""

    model_type: str
    criterion: str
    learning_rate: float
    max_epochs: int
    val_every_n_epochs: int
    batch_size: int
    metric: str  # the name of the score in its log, larger is better; zero until the bits have converged, if it says so
    checkpoint: str  # the class of its callback
    patience: int
    min_delta: float
    temperature: Mapping[str, float]
    distillation: str | None  # the loss to the float network; None: the criterion
    data_params: Mapping[str, Any] | None = None

    def training(self) -> dict[str, Any]:
        """The section `training`."""
        stop = {"patience": self.patience, "min_delta": self.min_delta}
        watched = {"monitor": self.metric, "mode": "max"}
        return {
            "criterion": self.criterion,
            "optimizer": "RAdam",
            "learning_rate": self.learning_rate,
            "max_epochs": self.max_epochs,
            "val_every_n_epochs": self.val_every_n_epochs,
            "log_every_n_steps": 10,
            "callbacks": {
                self.checkpoint: {"params": watched | {"filename": "mpsearch-{epoch:02d}"}},
                "NoiseEarlyStopping": {"params": watched | stop},
                "TemperatureScale": {"params": dict(self.temperature)},
            },
        }

    def distilled(self) -> dict[str, Any]:
        """The section `quantization.params`; EWGS, a method that it names too, stops in its own code."""
        if self.distillation is None:
            return {"distillation": False, "qnmethod": "STE"}
        return {"distillation": True, "distillation_loss": self.distillation, "qnmethod": "STE"}


CLASSES = Recipe(
    model_type="VISION_CLS",
    criterion="CrossEntropyLoss",
    learning_rate=0.002,
    max_epochs=500,
    val_every_n_epochs=2,
    batch_size=1000,
    metric="Metric/ns_Accuracy_top1",
    checkpoint="ModelCheckpoint",
    patience=50,
    min_delta=1e-4,
    temperature={"scale_lr": 1, "warmup": WARMUP_STEPS},
    distillation="Symmetrical KL",
)
SUPER_RESOLUTION = Recipe(
    model_type="VISION_SR",
    criterion="L1Loss",
    learning_rate=0.0005,
    max_epochs=2500,
    val_every_n_epochs=10,
    batch_size=24,
    metric="PSNR/Weighted_mean",
    checkpoint="NoiseModelCheckpoint",
    patience=1000,
    min_delta=5e-5,
    temperature={"scale_lr": 1, "scale_anneal": 0.9999, "warmup": 500},
    distillation=None,  # its teacher writes an image at each step
    data_params={},  # its module reads them without asking whether there are any
)
DETECTION = Recipe(
    model_type="VISION_OD",
    criterion="yolo_loss",
    learning_rate=0.0005,
    max_epochs=100,
    val_every_n_epochs=3,
    batch_size=24,
    metric="mAP",
    checkpoint="NoiseModelCheckpoint",
    patience=5,
    min_delta=1e-3,
    temperature={"scale_lr": 1, "scale_anneal": 0.9999, "warmup": 500},
    distillation=None,
)


@dataclass(frozen=True)
class MhaqNetwork:
    """A network of MHAQ's `src.models`, known by the shapes of some of its tensors and the number of all weights."""

    name: str
    recipe: Recipe
    weights: int  # tensors with more than one dimension
    shapes: Mapping[str, tuple[int | None, ...]]  # None: any
    params: Callable[[State], dict[str, Any]]
    data: str | None = None  # the dataset that it has for this network alone
    when: Callable[[State], bool] = field(default=lambda state: True)

    def is_network_of(self, state: State) -> bool:
        """Whether a float state dict is one of this network."""
        return (
            sum(tensor.ndim > 1 for tensor in state.values()) == self.weights
            and all(name in state and _like(state[name].shape, shape) for name, shape in self.shapes.items())
            and self.when(state)
        )


def _like(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    return len(shape) == len(expected) and all(b in (None, a) for a, b in zip(shape, expected, strict=True))


def _rows(name: str) -> Callable[[State], dict[str, Any]]:
    return lambda state: {"num_classes": state[name].shape[0]}


def _scale(state: State) -> dict[str, Any]:
    """RFDN's last layer gives colors x scale^2 channels, its first reads the colors."""
    out, colors = state["upsampler.0.weight"].shape[0], state["fea_conv.weight"].shape[1]
    params: dict[str, Any] = {"scale": round((out / colors) ** 0.5)}
    if (features := state["fea_conv.weight"].shape[0]) != 50:
        params["nf"] = features
    return params | ({} if colors == 3 else {"in_nc": colors, "out_nc": colors})


ANY = (None,) * 4
_OF_PYTORCHCV = {"features.init_block.conv.weight": (16, 3, 3, 3), "output.weight": (None, 64)}

NETWORKS: tuple[MhaqNetwork, ...] = (
    MhaqNetwork(
        "resnet20_cifar10",  # also with 100 classes: its `resnet20_cifar100` is pytorchcv's network
        CLASSES,
        20,
        {"conv1.weight": (16, 3, 3, 3), "layer3.2.conv2.weight": (64, 64, 3, 3), "linear.weight": (None, 64)},
        _rows("linear.weight"),
    ),
    MhaqNetwork(
        "resnet20_cifar10_new",
        CLASSES,
        22,
        _OF_PYTORCHCV,
        _rows("output.weight"),
        when=lambda state: state["output.weight"].shape[0] == 10,
    ),
    MhaqNetwork(
        "resnet20_cifar100",
        CLASSES,
        22,
        _OF_PYTORCHCV,
        _rows("output.weight"),
        when=lambda state: state["output.weight"].shape[0] == 100,
    ),
    MhaqNetwork(
        "resnet18",
        CLASSES,
        21,
        {"conv1.weight": (64, 3, 7, 7), "layer4.1.conv2.weight": (512, 512, 3, 3), "fc.weight": (None, 512)},
        _rows("fc.weight"),
    ),
    MhaqNetwork(
        "RFDN",
        SUPER_RESOLUTION,
        64,
        {"fea_conv.weight": (None, None, 3, 3), "B1.c1_d.weight": (None, None, 1, 1), "upsampler.0.weight": ANY},
        _scale,
        data="SR",
    ),
    MhaqNetwork(
        "yolo_v11_n",
        DETECTION,
        88,
        {"net.p1.0.conv.weight": (16, 3, 3, 3), "head.dfl.conv.weight": (1, 16, 1, 1), "head.cls.0.4.weight": ANY},
        _rows("head.cls.0.4.weight"),
        data="COCO",
    ),
)

DATASETS: Mapping[str, str] = {"cifar100": "CIFAR100", "cifar10": "CIFAR10", "mnist": "MNIST", "imagenet": "IMAGENET"}
"""What the name of a task holds -> the name in MHAQ's `src.data`; the first that holds counts."""


def recognize(state: State) -> MhaqNetwork | None:
    """The network of MHAQ that a float state dict belongs to, if any.

    Args:
        state: name -> tensor, as `nn.Module.state_dict` gives it.
    """
    return next((network for network in NETWORKS if network.is_network_of(state)), None)


def dataset(task: str) -> str | None:
    """The name that MHAQ has for the data of a task, if any.

    >>> dataset("cifar_resnet20 on CIFAR-10-JPEG"), dataset("digits"), dataset("imagenette")
    ('CIFAR10', None, None)
    """
    plain = "".join(character for character in task.lower() if character.isalnum()).replace("imagenette", "")
    return next((name for part, name in DATASETS.items() if part in plain), None)
